//! Every driver call of a load, and of what else one does with tensors, fails once, at its first, second and last use.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tensorhaul::{ErrorKind, LoadOptions, Model, PinnedAllocator, Request};
use tensorhaul_device::{Device, DeviceError, Stream, StridedCopy};

use crate::suite::consumer::Consumer;
use crate::suite::kernels::misaligned;
use crate::suite::load::{assert_same_bytes, checkpoint, options};
use crate::suite::sim::{Sim, failure};
use crate::vendor::{self, call};

#[test]
fn a_failed_call_is_a_typed_error_and_the_next_load_works() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    for machine in ["", "pools=0"] {
        let failed = fail_each_call(&Sim::new(machine), &model, &options(), 1, |_| true);
        assert!(failed > 15, "{machine:?}: {failed} calls");
    }
}

#[test]
fn a_failed_read_back_of_a_checksum_is_a_typed_error_and_the_next_load_works() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let reads_back = |call: &str| [call::COPY_OUT, call::EVENT_WAIT, call::EVENT_RECORD].contains(&call);
    let failed = fail_each_call(&Sim::new(""), &model, &options().checksums(true), 1, reads_back);
    assert_eq!(failed, 3);
}

/// A batch that is refused has an alternative (see `kernels.rs`); one that does not fit has none.
#[test]
fn a_failed_batch_of_a_load_of_small_tensors_is_a_typed_error_and_the_next_load_works() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(misaligned(folder.path(), "small", 500, 401)).unwrap();
    let options = options().staging_bytes(256 << 10);
    let failed = fail_each_call(&Sim::new(""), &model, &options, 2, |call| call == call::COPY_BATCH);
    assert_eq!(failed, 1);
}

#[test]
fn a_refused_batch_is_told_and_every_byte_arrives() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(misaligned(folder.path(), "small", 500, 401)).unwrap();
    let options = options().staging_bytes(256 << 10);
    let sim = Sim::new("");
    drop(model.load(&options).unwrap());
    let count = sim.report().calls(call::COPY_BATCH);
    for nth in [1, 2, count] {
        tensorhaul::release_devices();
        sim.fail(&format!("fail={}:{nth}:1", call::COPY_BATCH));
        let loaded = model.load(&options).unwrap();
        let told = loaded.report.fallbacks.iter().find(|told| told.what.contains("instead of in batches"));
        assert_eq!(told.unwrap().why, failure(call::COPY_BATCH, 1, vendor::INVALID_VALUE));
        assert_eq!(sim.report().calls(call::COPY_BATCH), nth, "a refusal is not provoked again");
        sim.fail("");
        assert_same_bytes(&model, &loaded);
        drop(loaded);
        sim.assert_clean(&format!("refused at use {nth} of {count}"));
    }
}

/// Lets each call of a load fail with a code at its first, second and last use, and loads again after each. Returns how many
/// calls that were.
fn fail_each_call(
    sim: &Sim,
    model: &Model,
    options: &LoadOptions,
    code: i32,
    is_meant: fn(&str) -> bool,
) -> usize {
    drop(model.load(options).unwrap());
    tensorhaul::release_devices();
    let mut counts = sim.report().calls;
    counts.retain(|call, _| is_meant(call));
    for (call, count) in &counts {
        for nth in BTreeSet::from([1, 2, *count]).into_iter().filter(|nth| nth <= count) {
            let what = format!("{call} fails at use {nth} of {count}");
            tensorhaul::release_devices(); // The load at hand opens and pins anew.
            let before = sim.report().live;
            sim.fail(&format!("fail={call}:{nth}:{code}"));
            let result = model.load(options);
            let may_leave = call::SURVIVED.contains(&call.as_str()) || result.is_ok();
            match result {
                Ok(loaded) => {
                    // The failure was of a call after the last byte, or of one that has an alternative.
                    assert!(
                        call::SURVIVED.contains(&call.as_str())
                            || sim.report().calls(call) < nth
                            || call::OF_THE_END.contains(&call.as_str()),
                        "{what}"
                    );
                    sim.fail("");
                    assert_same_bytes(model, &loaded);
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Device, "{what}: {}", error.one_line());
                    assert_names(&error.one_line(), call, code);
                }
            }
            sim.fail("");
            let again = model
                .load(options)
                .unwrap_or_else(|error| panic!("{what}: the next load: {}", error.one_line()));
            assert_same_bytes(model, &again);
            drop(again);
            tensorhaul::release_devices();
            let left = sim.report().live;
            assert!(may_leave || left == before, "{what}: {left:?}, before {before:?}");
            assert!(sim.report().violations.is_empty(), "{what}: {:?}", sim.report().violations);
        }
    }
    counts.len()
}

/// Checks that an error names the device, the call, and the code with its name.
fn assert_names(error: &str, call: &str, code: i32) {
    let name = match code {
        1 => vendor::INVALID_VALUE,
        2 => vendor::OUT_OF_MEMORY,
        _ => panic!("no name for {code}"),
    };
    let failure = format!("{}: {}", vendor::FIRST, failure(call, code, name));
    assert!(error.starts_with(&failure), "{call}: {error}");
}

#[test]
fn a_tensor_that_cannot_be_read_back_is_a_typed_error_and_the_next_one_can() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = Sim::new("delay_us=50");
    let loaded = model.load(&options()).unwrap();
    let read_all = || loaded.tensors.iter().try_for_each(|(_, tensor)| tensor.to_host().map(drop));
    sim.fail("");
    read_all().unwrap();
    let counts = sim.report();
    for call in [call::COPY_OUT, call::EVENT_RECORD, call::EVENT_WAIT] {
        let count = counts.calls(call);
        assert!(count > 2, "{call}: {count}");
        for nth in [1, 2, count] {
            let before = sim.report().live;
            sim.fail(&format!("fail={call}:{nth}:1"));
            let error = read_all().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Device);
            assert_names(&error.one_line(), call, 1);
            sim.fail("");
            assert_same_bytes(&model, &loaded);
            let mut left = sim.report().live;
            // An event that was made serves the next one.
            left.insert("live.events".to_owned(), before["live.events"]);
            assert_eq!(left, before, "{call} at use {nth} of {count}");
        }
    }
    drop(loaded);
    sim.assert_clean("after the tensors");
}

/// Loads gather on the host; a device gathers for those who call it themselves.
#[test]
fn a_failed_strided_copy_is_a_typed_error_and_the_next_one_works() {
    const CALL: &str = call::COPY_ROWS;
    let sim = Sim::new("delay_us=50");
    let gather = || -> Result<(), DeviceError> {
        let device = vendor::open(0)?;
        let target = device.allocate(1024)?;
        let staged = device.staging_memory(4096)?;
        // SAFETY: initialized, as long, and written by nobody.
        let bytes = unsafe { std::slice::from_raw_parts(staged.as_ptr().as_ptr(), 4096) };
        for offset_bytes in [0, 256, 512] {
            let copy = StridedCopy {
                piece_len_bytes: 16,
                piece_count: 8,
                source_stride_bytes: 512,
                target_stride_bytes: 32,
                target_offset_bytes: offset_bytes,
            };
            // SAFETY: both live until the wait below, or until the streams ended with the device.
            let queued = unsafe { device.copy_strided(bytes, &target, copy, Stream::Copy) };
            device.wait(&device.record(Stream::Copy)?)?;
            queued?;
        }
        Ok(())
    };
    gather().unwrap();
    assert_eq!(sim.report().calls(CALL), 3);
    for nth in [1, 2, 3] {
        sim.fail(&format!("fail={CALL}:{nth}:1"));
        assert_names(&gather().unwrap_err().to_string(), CALL, 1);
        sim.assert_clean(&format!("use {nth}"));
        sim.fail("");
        gather().unwrap();
    }
    sim.assert_clean("after all");
}

#[test]
fn pinned_memory_that_a_stream_may_still_read_is_kept_and_the_next_load_works() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(layers(folder.path())).unwrap();
    // The memory that cannot be let go keeps its device's context, so each of these has a machine of its own.
    for which in ["first", "second", "last"] {
        let sim = Sim::new("");
        let consumer = Consumer::new();
        let load = || {
            let pinned = Arc::new(PinnedAllocator::new(vendor::id(0)).unwrap());
            let on_host = options().request(Request::all()).allocator(pinned);
            // SAFETY: the stream outlives the tensors, which are dropped below.
            model.load(&unsafe { on_host.stream(consumer.stream()) }).unwrap()
        };
        let before = sim.report().live["live.pinned"];
        let loaded = load();
        let count = sim.report().live["live.pinned"] - before;
        assert!(count > 2, "{count} arenas");
        let nth = match which {
            "first" => 1,
            "second" => 2,
            _ => count,
        };
        sim.fail(&format!("fail={}:{nth}:1", call::EVENT_WAIT));
        drop(loaded);
        assert_eq!(sim.report().calls(call::EVENT_WAIT), count, "one wait an arena");
        sim.fail("");
        assert_eq!(sim.report().live["live.pinned"], before + 1, "{which}: all but one are let go");
        let again = load();
        for (name, tensor) in again.tensors.iter() {
            assert!(tensor.bytes().unwrap() == model.tensor(name).unwrap().bytes().unwrap(), "{name}");
        }
        drop(again);
        assert_eq!(sim.report().live["live.pinned"], before + 1, "{which}: after the next load");
        assert!(sim.report().violations.is_empty(), "{which}: {:?}", sim.report().violations);
    }
}

#[test]
fn memory_that_runs_out_though_it_seemed_to_suffice_is_an_error_with_both_numbers() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(layers(folder.path())).unwrap();
    for (machine, call) in [("", call::ALLOCATE_ORDERED), ("pools=0", call::ALLOCATE)] {
        let arenas = model.plan(&options()).unwrap().arenas().to_vec();
        assert!(arenas.len() > 2, "{} arenas", arenas.len());
        for nth in [1, 2, arenas.len()] {
            let sim = Sim::new(&format!("{machine};memory=100000000"));
            sim.fail(&format!("fail={call}:{nth}:2"));
            let error = model.load(&options()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{}", error.one_line());
            let needed_bytes = arenas[nth - 1].len_bytes;
            let taken_bytes: u64 = arenas[..nth - 1].iter().map(|arena| arena.len_bytes).sum();
            let free_bytes = 100_000_000 - taken_bytes;
            assert_eq!(
                error.one_line(),
                format!("{}: {needed_bytes} bytes do not fit, {free_bytes} are free", vendor::FIRST),
            );
            sim.fail("");
            sim.assert_clean(&format!("{call} fails at use {nth}"));
            assert_same_bytes(&model, &model.load(&options()).unwrap());
        }
    }
}

#[test]
fn a_lost_device_fails_the_load_and_hangs_nothing() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    for (call, nth, code) in
        [(call::COPY_IN, 3, 700), (call::EVENT_RECORD, 5, 719), (call::EVENT_QUERY, 2, 700)]
    {
        let sim = Sim::new("delay_us=50");
        sim.fail(&format!("fail={call}:{nth}:{code}"));
        let error = model.load(&options()).unwrap_err().one_line();
        assert!(error.contains("the device is lost to this process"), "{call}: {error}");
    }
}

#[test]
fn a_device_lost_while_it_pins_is_not_called_a_lack_of_memory() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let (register, allocate) = (call::HOST_REGISTER, call::HOST_ALLOCATE);
    for calls in [format!("fail={register}:1:719"), format!("fail={register}:1:801;fail={allocate}:1:719")] {
        let _sim = Sim::new(&calls);
        let error = model.load(&options()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device, "{calls}");
        assert!(error.one_line().contains("the device is lost"), "{calls}: {}", error.one_line());
    }
}

/// A file of four layers, each large enough for an arena of its own.
fn layers(folder: &Path) -> PathBuf {
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let bytes: Vec<u8> = (0..3u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let view = |layer: usize| TensorView::new(Dtype::U8, vec![2 << 20], &bytes[layer..][..2 << 20]).unwrap();
    let views = (0..4).map(|layer| (format!("model.layers.{layer}.w"), view(layer)));
    let path = folder.join("layers.safetensors");
    serialize_to_file(views, None, &path).unwrap();
    path
}
