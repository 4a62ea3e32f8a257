//! Devices that share the host's memory: reads land in what the device works on, and nothing is copied.

use std::ffi::c_void;
use std::fs;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use tensorhaul::doctor::Doctor;
use tensorhaul::{
    Allocation, Allocator, DeviceId, DeviceMap, Dtype, EngineChoice, ErrorKind, Handover, LoadOptions,
    Loaded, Model, Preference, Request, Select,
};
use tensorhaul_device::Device;
use tensorhaul_device::gpu::{Context, Driver, StreamHandle};
use tensorhaul_device::host::Host;

use crate::suite::load::{assert_same_bytes, checkpoint, options, read_back};
use crate::suite::quantized::{self, onto};
use crate::suite::sim::{Happened, Sim, failure, launch_host_function};
use crate::vendor::{self, call};

fn model() -> (TempDir, Model) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    (folder, model)
}

/// Of tensors that are long and aligned, so that all of their bytes can land where they belong.
fn long() -> LoadOptions {
    let mut request = Request::of(Select::Globs(vec!["*.w".to_owned()]));
    request.device = vendor::id(0);
    options().request(request)
}

/// Compares every tensor, as the host sees it and as the device does.
fn assert_shared(model: &Model, loaded: &Loaded) {
    let device = vendor::open(0).unwrap();
    for (name, tensor) in loaded.tensors.iter() {
        assert_eq!(tensor.device(), vendor::id(0), "{name}");
        let expected = model.tensor(name).unwrap();
        let expected = expected.bytes().unwrap();
        assert!(tensor.bytes().unwrap() == expected, "{name} on the host");
        assert!(expected.is_empty() || read_back(&device, tensor, expected.len()) == expected, "{name}");
    }
}

fn copies(happened: &Happened) -> u64 {
    let calls = [call::COPY_IN, call::COPY_BATCH, call::COPY_ROWS, call::COPY_ON_DEVICE, call::COPY_OUT];
    calls.iter().map(|call| happened.calls(call)).sum()
}

#[test]
fn reads_land_in_the_devices_memory_and_nothing_is_copied() {
    let (_folder, model) = model();
    for config in ["integrated=1", "integrated=1;delay_us=300;pools=0"] {
        for engine in [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring] {
            let sim = Sim::new(config);
            let loaded = model.load(&long().engine(engine)).unwrap();
            let (happened, report) = (sim.report(), &loaded.report);
            assert_eq!((copies(&happened), happened.calls(call::LAUNCH)), (0, 0), "{config}");
            assert_eq!(happened.calls(call::ALLOCATE) + happened.calls(call::ALLOCATE_ORDERED), 0);
            assert_eq!(report.bytes_in_place, report.promised.read_bytes);
            assert_eq!((report.promised.copies, report.peak_staging_bytes), (0, 0));
            // Each byte is counted once: the result is the host's memory, and there is nothing else.
            assert_eq!(report.peak_host_bytes, report.promised.target_bytes);
            assert_eq!(report.promised.peak_host_bytes, report.promised.target_bytes);
            let arenas = model.plan_for_devices(&long().engine(engine)).unwrap().arenas().len() as u64;
            assert_eq!(happened.live["live.pinned"], arenas, "no ring is pinned");
            assert_shared(&model, &loaded);
            drop(loaded);
            sim.assert_clean(config);
        }
    }
}

#[test]
fn memory_far_from_its_device_is_told_of() {
    let (_folder, model) = model();
    // A node that no machine has.
    let sim = Sim::new("integrated=1;host_node=1023");
    let loaded = model.load(&long()).unwrap();
    let told: Vec<_> = loaded.report.fallbacks.iter().map(|told| told.what.clone()).collect();
    let id = vendor::id(0);
    let far = format!("memory of {id} lies on any memory node, not on node 1023, its nearest");
    assert_eq!(told, [far], "once for all arenas");
    assert_shared(&model, &loaded);
    drop(loaded);
    sim.assert_clean("far");
}

#[test]
fn what_cannot_land_is_staged_and_the_plan_says_so_before() {
    let (_folder, model) = model();
    let sim = Sim::new("integrated=1;delay_us=300;batches=0");
    // Runs that are too short to be worth requests of their own, beside one that is not.
    let mut request =
        Request::of(Select::Globs(vec!["f0.layers.1.w".to_owned(), "*.layers.[02].odd".to_owned()]));
    request.device = vendor::id(0);
    let options = || options().request(request.clone());
    let promised = *model.plan_for_devices(&options()).unwrap().promised();
    assert!(promised.in_place_bytes > 0 && promised.copies > 0, "{promised:?}");
    let loaded = model.load(&options()).unwrap();
    assert_eq!(loaded.report.promised, promised);
    assert_eq!(loaded.report.bytes_in_place, promised.in_place_bytes);
    assert_eq!(loaded.report.peak_host_bytes, promised.target_bytes + loaded.report.peak_staging_bytes);
    assert_shared(&model, &loaded);
    drop(loaded);
    sim.assert_clean("after the load");
}

#[test]
fn several_that_have_the_hosts_memory_are_told_why_nothing_is_copied_between_them() {
    let (_folder, model) = model();
    for (in_place, is_told) in [(Preference::Preferred, true), (Preference::Off, false)] {
        let sim = Sim::new("integrated=1;devices=2");
        let map = DeviceMap::everything_on(vec![vendor::id(0), vendor::id(1)]).unwrap();
        let loaded = model.load(&long().device_map(map).in_place(in_place)).unwrap();
        let told: Vec<_> = loaded.report.fallbacks.iter().map(|told| told.why.clone()).collect();
        let is_so = told.iter().all(|why| why.starts_with("the memory of ") && why.contains("is the host's"));
        assert!(is_so && told.is_empty() != is_told, "{told:?}");
        drop(loaded);
        sim.assert_clean("several");
    }
}

#[test]
fn packed_tensors_become_numbers_where_they_landed() {
    let folder = quantized::checkpoint();
    let model = Model::open(folder.path()).unwrap();
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let expected = model.load(&onto(DeviceId::Host, dtype)).unwrap().tensors;
        for config in ["integrated=1", "integrated=1;delay_us=300;seed=9", "integrated=1;batches=0"] {
            let sim = Sim::new(config);
            let loaded = model.load(&onto(vendor::id(0), dtype)).unwrap();
            assert_eq!(loaded.report.promised.operations, 6);
            assert!(loaded.report.bytes_in_place > 0);
            for (name, tensor) in loaded.tensors.iter() {
                let expected = expected.get(name).unwrap();
                assert!(tensor.bytes().unwrap() == expected.bytes().unwrap(), "{config}: {name}");
            }
            drop(loaded);
            sim.assert_clean(config);
        }
    }
}

#[test]
fn checksums_are_those_of_a_load_onto_the_host() {
    let (_folder, model) = model();
    let host = LoadOptions::default().handover(Handover::Private).checksums(true);
    let expected = model.load(&host).unwrap().report.checksums;
    let sim = Sim::new("integrated=1;delay_us=100");
    let loaded = model.load(&options().checksums(true)).unwrap();
    assert_eq!(loaded.report.checksums, expected);
    assert!(expected.is_some());
    drop(loaded);
    sim.assert_clean("after the load");
}

#[test]
fn ordinary_device_memory_is_there_for_those_who_want_it() {
    let (_folder, model) = model();
    let off = || options().in_place(Preference::Off);
    // A device whose kernels do not reach the host's memory is none that shares it, whatever it says of itself.
    for (config, options) in [("integrated=1", off()), ("integrated=1;unified=0", options()), ("", options())]
    {
        let sim = Sim::new(config);
        let loaded = model.load(&options).unwrap();
        assert_eq!((loaded.report.bytes_in_place, loaded.report.promised.in_place_bytes), (0, 0));
        assert!(sim.report().calls(call::ALLOCATE_ORDERED) > 0);
        assert_same_bytes(&model, &loaded);
        drop(loaded);
        sim.assert_clean(config);
    }
    for (config, works) in [("integrated=1", true), ("integrated=1;unified=0", false), ("", false)] {
        let _sim = Sim::new(config);
        let required = model.load(&long().in_place(Preference::Required));
        assert_eq!(
            required.as_ref().err().map(|error| error.kind()),
            (!works).then_some(ErrorKind::BadRequest)
        );
    }
}

struct Own(tensorhaul_device::gpu::Gpu<vendor::Vendor>);

// SAFETY: the device's own allocations, each given once.
unsafe impl Allocator for Own {
    fn allocate(
        &self,
        _device: DeviceId,
        len_bytes: u64,
    ) -> Result<Arc<dyn Allocation>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.0.allocate(len_bytes)?)
    }
}

#[test]
fn memory_of_the_callers_allocator_is_copied_to_because_it_may_not_be_the_hosts() {
    let (_folder, model) = model();
    let sim = Sim::new("integrated=1");
    let allocator = Arc::new(Own(vendor::open(0).unwrap()));
    let loaded = model.load(&options().allocator(allocator)).unwrap();
    assert_eq!(loaded.report.bytes_in_place, 0);
    assert_same_bytes(&model, &loaded);
    drop(loaded);
    sim.assert_clean("after the load");
}

#[test]
fn memory_that_is_refused_is_an_error_of_its_kind_and_leaves_nothing() {
    let (_folder, model) = model();
    let (register, allocate) = (call::HOST_REGISTER, call::HOST_ALLOCATE);
    let sim = Sim::new("integrated=1");
    sim.fail(&format!("fail={register}:1:801;fail={allocate}:1:2"));
    let error = model.load(&long()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{}", error.one_line());
    assert!(error.one_line().starts_with(&format!("{}: ", vendor::FIRST)), "{}", error.one_line());
    sim.assert_clean("after the allocation was refused");

    sim.fail(&format!("fail={}:1:1", call::HOST_ADDRESS));
    let error = model.load(&long()).unwrap_err();
    let told = failure(call::HOST_ADDRESS, 1, vendor::INVALID_VALUE);
    assert!(error.kind() == ErrorKind::Device && error.one_line().contains(&told), "{}", error.one_line());
    sim.assert_clean("after the address was refused");

    // Where registration is refused, the driver's own memory serves, and the report says so.
    sim.fail(&format!("fail={register}:1:801"));
    let loaded = model.load(&long()).unwrap();
    assert!(sim.report().calls(allocate) > 0);
    assert_eq!(
        (copies(&sim.report()), loaded.report.fallbacks.len()),
        (0, 1),
        "{:?}",
        loaded.report.fallbacks
    );
    assert_shared(&model, &loaded);
    drop(loaded);
    sim.assert_clean("after the driver's own memory");
}

#[test]
fn more_than_the_host_has_is_refused_before_the_first_read() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("huge.safetensors");
    let len = 2 * Host.memory().unwrap().total_bytes; // Of a sparse file.
    let header = format!(r#"{{"huge":{{"dtype":"U8","shape":[{len}],"data_offsets":[0,{len}]}}}}"#);
    let header = format!("{header:128}");
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + len).unwrap();
    let model = Model::open(&path).unwrap();
    let sim = Sim::new("integrated=1");
    // The device says that it has less, which concerns what is its own alone.
    let error = model.load(&options().staging_bytes(256 << 20)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert!(error.one_line().contains(" bytes do not fit, "), "{}", error.one_line());
    assert_eq!(sim.report().calls(call::HOST_REGISTER), 0);
    sim.assert_clean("after the refusal");
}

#[test]
fn memory_is_freed_once_its_consumer_is_done() {
    static DONE: AtomicBool = AtomicBool::new(false);
    extern "C" fn work(_data: *mut c_void) {
        thread::sleep(Duration::from_millis(50));
        DONE.store(true, Ordering::SeqCst);
    }
    let (_folder, model) = model();
    let sim = Sim::new("integrated=1");
    let device = vendor::open(0).unwrap();
    let driver = vendor::driver().unwrap();
    driver.make_current(Context(1)).unwrap();
    let stream = driver.stream_create().unwrap();
    for StreamHandle(stream) in [stream, StreamHandle(0)] {
        // SAFETY: the stream lives until after the tensors are dropped below.
        let loaded = model.load(&unsafe { long().stream(stream as u64) }).unwrap();
        DONE.store(false, Ordering::SeqCst);
        let queued =
            launch_host_function(std::ptr::with_exposed_provenance_mut(stream), work, std::ptr::null_mut());
        assert_eq!(queued, 0);
        drop(loaded);
        assert!(DONE.load(Ordering::SeqCst), "the memory is gone and its consumer is not done");
        assert_eq!(sim.report().live["live.pinned"], 0);
    }
    // SAFETY: made above, used by nobody any more.
    unsafe { driver.stream_destroy(stream) }.unwrap();
    driver.make_current(Context(0)).unwrap();
    drop(device);
    sim.assert_clean("after the streams");
}

#[test]
fn memory_whose_consumer_cannot_be_waited_for_is_never_freed() {
    let (_folder, model) = model();
    let sim = Sim::new("integrated=1");
    let loaded = model.load(&long()).unwrap();
    let arenas = sim.report().live["live.pinned"];
    sim.fail(&format!("fail={}:1:1", call::EVENT_WAIT));
    drop(loaded);
    assert_eq!((arenas, sim.report().live["live.pinned"]), (1, 1));
}

#[test]
fn the_doctor_tells_whose_memory_it_is() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for (config, shares_memory) in [("integrated=1", true), ("", false)] {
        let _sim = Sim::new(config);
        let doctor = Doctor::examine_paths(&[folder.path().to_owned()]).unwrap();
        let device = doctor.devices.iter().find(|device| device.name == vendor::FIRST).unwrap();
        assert_eq!((device.works, device.shares_memory), (true, shares_memory), "{config}");
    }
}
