//! Loads onto simulated devices, compared byte for byte.

use std::path::{Path, PathBuf};

use tensorhaul::{EngineChoice, LoadOptions, Loaded, Model, Request, Select};
use tensorhaul_device::{Device, Stream};

use crate::suite::sim::Sim;
use crate::vendor::{self, call};

/// A checkpoint with tensors of every alignment, several files' worth of staging buffers.
pub(crate) fn checkpoint(folder: &Path) -> PathBuf {
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let bytes = |len: usize, salt: usize| {
        (0..len).map(|at| (((at + salt) * 2_654_435_761) >> 11) as u8).collect::<Vec<_>>()
    };
    for file in 0..2usize {
        let mut data: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        for layer in 0..3 {
            let shape = vec![600 + file, 1024];
            let len = shape.iter().product::<usize>() * 2;
            data.push((format!("f{file}.layers.{layer}.w"), Dtype::BF16, shape, bytes(len, layer)));
            data.push((format!("f{file}.layers.{layer}.odd"), Dtype::U8, vec![1001], bytes(1001, layer)));
            data.push((format!("f{file}.layers.{layer}.scale"), Dtype::F32, vec![], bytes(4, layer)));
        }
        data.push((format!("f{file}.none"), Dtype::F32, vec![0, 4], Vec::new()));
        let views = data.iter().map(|(name, dtype, shape, bytes)| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        serialize_to_file(views, None, &folder.join(format!("part-{file}.safetensors"))).unwrap();
    }
    folder.to_owned()
}

pub(crate) fn options() -> LoadOptions {
    let mut request = Request::all();
    request.device = vendor::id(0);
    LoadOptions::default().request(request).staging_bytes(1 << 20)
}

/// Compares every tensor with the file's own bytes, through the device.
pub(crate) fn assert_same_bytes(model: &Model, loaded: &Loaded) {
    let device = vendor::open(0).unwrap();
    assert_eq!(loaded.tensors.len(), model.checkpoint().len());
    for (name, tensor) in loaded.tensors.iter() {
        let expected = model.tensor(name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (expected.dtype(), expected.shape()));
        assert_eq!(tensor.device(), vendor::id(0));
        let expected = expected.bytes().unwrap();
        if expected.is_empty() {
            continue;
        }
        assert!(tensor.address().is_multiple_of(tensor.dtype().align_bytes()), "{name}");
        assert!(tensor.bytes().is_err(), "the host must not read device memory");
        assert!(read_back(&device, tensor, expected.len()) == expected, "{name}");
    }
}

pub(crate) fn read_back(device: &dyn Device, tensor: &tensorhaul::Tensor, len: usize) -> Vec<u8> {
    let memory = device.staging_memory(len).unwrap();
    // SAFETY: initialized, `len` long, ours alone.
    let staged = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr().as_ptr(), len) };
    let (arena, offset) = tensor.allocation().unwrap();
    // SAFETY: both live until the event below was waited for.
    unsafe { device.copy_back(arena, offset, staged, Stream::Copy) }.unwrap();
    device.wait(&device.record(Stream::Copy).unwrap()).unwrap();
    staged.to_vec()
}

#[test]
fn every_byte_arrives_whatever_the_engine_and_the_timing() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    for config in ["", "delay_us=300", "delay_us=300;seed=9;pools=0", "batches=0"] {
        for engine in [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring] {
            let sim = Sim::new(config);
            let loaded = model.load(&options().engine(engine)).unwrap();
            assert_same_bytes(&model, &loaded);
            assert_eq!(loaded.report.device, vendor::FIRST);
            drop(loaded);
            sim.assert_clean(config);
        }
    }
}

#[test]
fn calls_are_one_copy_an_extent_and_nothing_waits_inside_the_loop() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = Sim::new("");
    let loaded = model.load(&options()).unwrap();
    let happened = sim.report();
    let promised = loaded.report.promised;
    assert_eq!(happened.calls(call::COPY_IN), promised.copies);
    // One copy for each buffer, and one more where a buffer holds the end of one run and the start of another.
    let runs = model.checkpoint().len() as u64;
    assert!(promised.copies <= promised.reads + runs, "{promised:?}");
    assert_eq!(happened.calls(call::STREAM_WAIT), 0);
    assert!(
        happened.calls(call::EVENT_WAIT) <= promised.reads.min(32),
        "only the last buffers are waited for"
    );
    assert_eq!(happened.calls(call::EVENT_RECORD), happened.calls(call::STREAM_WAIT_EVENT) + promised.reads);
}

#[test]
fn a_tensor_takes_one_copy_for_each_buffer() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let buffer_len_bytes = 32 << 10; // 1 MiB in 32 buffers.
    for (names, misaligned) in [(vec!["f0.layers.1.w"], 0), (vec!["f0.layers.1.w", "f0.layers.2.scale"], 1)] {
        let sim = Sim::new("");
        let bytes: u64 = names.iter().map(|name| model.tensor(name).unwrap().len_bytes()).sum();
        let mut request = Request::of(Select::Globs(names.into_iter().map(str::to_owned).collect()));
        request.device = vendor::id(0);
        drop(model.load(&options().request(request)).unwrap());
        let happened = sim.report();
        let copies = happened.calls(call::COPY_IN) + happened.calls(call::COPY_BATCH);
        // A read starts on a boundary of storage, so the tensor may begin and end inside a buffer.
        assert!(
            copies <= bytes.div_ceil(buffer_len_bytes) + 1 + misaligned,
            "{copies} copies of {bytes} bytes"
        );
    }
}

#[test]
fn pieces_of_one_buffer_go_in_one_call_where_the_driver_has_one() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let mut request =
        Request::of(Select::Globs(vec!["*.layers.[02].odd".to_owned(), "*.layers.[02].scale".to_owned()]));
    request.device = vendor::id(0);
    request.over_read_max = 2.0; // What lies between them is read along, so that they share buffers.
    for (config, batches) in [("", true), ("batches=0", false)] {
        let sim = Sim::new(config);
        let loaded = model.load(&options().request(request.clone())).unwrap();
        let (happened, promised) = (sim.report(), loaded.report.promised);
        assert!(promised.copies > promised.reads, "{promised:?}");
        let single = happened.calls(call::COPY_IN);
        assert_eq!(single, if batches { 0 } else { promised.copies });
        // A refusal is asked for once and then remembered.
        assert_eq!(happened.calls(call::COPY_BATCH), if batches { promised.reads } else { 1 });
        assert_eq!(loaded.report.fallbacks.iter().any(|told| told.what.contains("one by one")), !batches);
    }
}

#[test]
fn two_loads_at_once_on_one_device_do_not_mix() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = Sim::new("delay_us=100");
    std::thread::scope(|scope| {
        let loads: Vec<_> = (0..2).map(|_| scope.spawn(|| model.load(&options()).unwrap())).collect();
        for load in loads {
            assert_same_bytes(&model, &load.join().unwrap());
        }
    });
    sim.assert_clean("after both");
}

#[test]
fn a_cancelled_load_leaves_nothing_behind() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    for taken in 0..4 {
        let sim = Sim::new("delay_us=500");
        let mut stream = model.stream(&options()).unwrap();
        let kept: Vec<_> = stream.by_ref().take(taken).map(|ready| ready.unwrap()).collect();
        drop(stream);
        drop(kept);
        sim.assert_clean("after the stream was dropped");
    }
}

#[test]
fn a_plan_larger_than_the_device_is_refused_before_the_first_read() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = Sim::new("memory=2000000");
    let error = model.load(&options()).unwrap_err();
    assert_eq!(error.kind(), tensorhaul::ErrorKind::OutOfMemory);
    let text = error.one_line();
    assert!(text.starts_with(vendor::FIRST) && text.contains("do not fit, it has 2000000 in all"), "{text}");
    assert_eq!(sim.report().calls(call::COPY_IN), 0);
    sim.assert_clean("after the refusal");
}
