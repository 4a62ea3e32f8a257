//! The caller's own memory, allocator and stream; what loads keep for the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tensorhaul::{Allocation, Allocator, DeviceId, ErrorKind, ExternalMemory, Model};
use tensorhaul_device::Device;
use tensorhaul_device::gpu::Driver;

use crate::suite::load::{assert_same_bytes, checkpoint, options};
use crate::suite::sim::{Sim, refusal};
use crate::vendor::{self, call};

fn model() -> (tempfile::TempDir, Model) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    (folder, model)
}

/// Wraps device memory that the test allocated, as a framework would.
fn external(memory: &Arc<dyn Allocation>, len_bytes: u64) -> ExternalMemory {
    let owner = Arc::new(Arc::clone(memory));
    // SAFETY: the owner keeps the allocation, and the test does not touch it until the tensor is handed over.
    unsafe { ExternalMemory::device(vendor::id(0), memory.address(), len_bytes, owner) }
}

#[test]
fn tensors_land_in_the_callers_own_memory() {
    let (_folder, model) = model();
    let sim = Sim::new("delay_us=100");
    let device = vendor::open(0).unwrap();
    let names = ["f0.layers.1.w", "f1.layers.0.odd", "f1.layers.2.scale"];
    let mut options = options();
    let mut memories = Vec::new();
    for name in names {
        let len_bytes = model.tensor(name).unwrap().len_bytes();
        let memory = device.allocate(len_bytes).unwrap();
        options = options.target(name, external(&memory, len_bytes));
        memories.push(memory);
    }
    let loaded = model.load(&options).unwrap();
    for (name, memory) in names.iter().zip(&memories) {
        assert_eq!(loaded.tensors.get(name).unwrap().address(), memory.address());
    }
    assert_same_bytes(&model, &loaded);
    drop((options, loaded, memories, device));
    sim.assert_clean("after all handles");
}

#[test]
fn memory_of_another_length_is_an_error_before_the_first_read() {
    let (_folder, model) = model();
    let sim = Sim::new("");
    let device = vendor::open(0).unwrap();
    let memory = device.allocate(1000).unwrap();
    let error = model.load(&options().target("f0.layers.1.odd", external(&memory, 1000))).unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (ErrorKind::BadRequest, Some("f0.layers.1.odd")));
    assert!(
        error.one_line().contains("the memory given has 1000 bytes, the tensor 1001"),
        "{}",
        error.one_line()
    );
    assert_eq!(sim.report().calls(call::COPY_IN), 0);
    let error = model.load(&options().target("nobody", external(&memory, 1000))).unwrap_err();
    assert_eq!(error.tensor(), Some("nobody"));
}

struct Counting {
    device: tensorhaul_device::gpu::Gpu<vendor::Vendor>,
    len_bytes: AtomicU64,
}

// SAFETY: the device's own allocations, each given once.
unsafe impl Allocator for Counting {
    fn allocate(
        &self,
        device: DeviceId,
        len_bytes: u64,
    ) -> Result<Arc<dyn Allocation>, Box<dyn std::error::Error + Send + Sync>> {
        assert_eq!(device, vendor::id(0));
        if self.len_bytes.fetch_add(len_bytes, Ordering::Relaxed) > 1 << 20 {
            return Err("the framework's pool is full".into());
        }
        Ok(self.device.allocate(len_bytes)?)
    }
}

#[test]
fn memory_comes_from_the_callers_allocator_and_its_refusal_is_passed_on() {
    let (_folder, model) = model();
    let sim = Sim::new("");
    let allocator = Arc::new(Counting { device: vendor::open(0).unwrap(), len_bytes: 0.into() });
    let some = tensorhaul::Request::of(tensorhaul::Select::Globs(vec!["*.odd".into(), "*.scale".into()]));
    let mut request = some.clone();
    request.device = vendor::id(0);
    let loaded = model.load(&options().request(request).allocator(allocator.clone())).unwrap();
    assert_eq!(allocator.len_bytes.load(Ordering::Relaxed), loaded.report.promised.target_bytes);
    allocator.len_bytes.store(2 << 20, Ordering::Relaxed);
    let error = model.load(&options().allocator(allocator.clone())).unwrap_err();
    assert_eq!(
        (error.kind(), error.one_line()),
        (ErrorKind::OutOfMemory, "the framework's pool is full".to_owned())
    );
    drop((allocator, loaded));
    sim.assert_clean("after the allocator");
}

#[test]
fn memory_is_freed_behind_the_consumers_stream() {
    let (_folder, model) = model();
    let sim = Sim::new("delay_us=200");
    let device = vendor::open(0).unwrap();
    let driver = vendor::driver().unwrap();
    let before = driver.current().unwrap();
    driver.make_current(tensorhaul_device::gpu::Context(1)).unwrap();
    let stream = driver.stream_create().unwrap();
    driver.make_current(before).unwrap();

    // SAFETY: the stream lives until after the tensors are dropped below.
    let options = unsafe { options().stream(stream.0 as u64) };
    let loaded = model.load(&options).unwrap();
    let waits = sim.report().calls(call::STREAM_WAIT_EVENT);
    let arenas = sim.report().live["live.allocations"];
    drop(loaded);
    // Each arena waits for the compute stream, the default stream and the consumer's before it is freed.
    assert_eq!(sim.report().calls(call::STREAM_WAIT_EVENT) - waits, 3 * arenas);
    assert_eq!(sim.report().calls(call::FREE_ORDERED), arenas);
    // SAFETY: made above, used by nobody any more.
    unsafe { driver.stream_destroy(stream) }.unwrap();
    drop(device);
    sim.assert_clean("after the stream");
}

#[test]
fn the_second_load_finds_the_device_open_and_the_ring_pinned() {
    let (_folder, model) = model();
    let sim = Sim::new("");
    drop(model.load(&options()).unwrap());
    let first = sim.report();
    drop(model.load(&options()).unwrap());
    let second = sim.report();
    for call in [call::HOST_REGISTER, call::HOST_ALLOCATE].iter().chain(call::OF_OPENING) {
        assert_eq!(first.calls(call), second.calls(call), "{call}");
    }
    assert_eq!(second.calls(call::MEMORY), 2, "each load asks once what is free");
    sim.assert_clean("after the devices were released");
}

#[test]
fn memory_that_a_pool_keeps_is_there_for_the_next_load() {
    let (_folder, model) = model();
    let sim = Sim::new("memory=10000000");
    let device = vendor::open(0).unwrap();
    let loaded = model.load(&options()).unwrap();
    let needed_bytes = loaded.report.promised.target_bytes;
    drop(loaded);
    let free_bytes = device.memory().unwrap().free_bytes;
    assert!(free_bytes < needed_bytes, "{free_bytes} are free: nothing to wait for");
    drop(model.load(&options()).unwrap());
    drop(device);
    sim.assert_clean("after both loads");
}

#[test]
fn a_smaller_budget_holds_also_when_a_larger_ring_was_kept() {
    let (_folder, model) = model();
    let sim = Sim::new("");
    for budget in [4 << 20, 64 << 10, 1 << 20] {
        let report = model.load(&options().staging_bytes(budget)).unwrap().report;
        assert!(report.peak_staging_bytes <= report.promised.peak_staging_bytes, "{budget}: {report:?}");
        assert!(report.promised.peak_staging_bytes <= budget, "{budget}: {report:?}");
        assert_eq!(sim.report().live["live.pinned"], 1, "one ring is kept, and no other");
    }
}

#[test]
fn refused_registration_falls_back_to_the_drivers_own_memory_and_says_so() {
    let (_folder, model) = model();
    let sim = Sim::new("");
    sim.fail(&format!("fail={}:1:801", call::HOST_REGISTER));
    let loaded = model.load(&options()).unwrap();
    let told =
        loaded.report.fallbacks.iter().find(|fallback| fallback.what.contains("staging memory")).unwrap();
    assert_eq!(told.why, refusal(call::HOST_REGISTER));
    assert_same_bytes(&model, &loaded);
    drop(loaded);
    sim.assert_clean("after the fallback");
}

#[test]
fn a_child_of_a_fork_gets_an_error_and_not_a_broken_driver() {
    let (_folder, model) = model();
    let _sim = Sim::new("");
    let device = vendor::open(0).unwrap();
    // SAFETY: the child only asks the device, which takes no lock that another thread of the parent may hold, and exits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let refused = device.memory().is_err_and(|error| error.to_string().contains("forked"));
        // SAFETY: ends the child without running the parent's destructors.
        unsafe { libc::_exit(i32::from(!refused)) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0, "the child saw no error");
    drop(model.load(&options()).unwrap());
}
