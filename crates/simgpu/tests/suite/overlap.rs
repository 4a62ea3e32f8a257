//! Reads run beside the making of the device, whatever becomes of it.
//!
//! Each test holds a driver's call until something was seen to have happened meanwhile, and then lets it go on: it is
//! about order, not about time.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tensorhaul::{EngineChoice, ErrorKind, LoadOptions, Loaded, Model, Result};
use tensorhaul_device::{Device, Stream};

use crate::suite::load::{assert_same_bytes, checkpoint, options};
use crate::suite::sim::{Sim, refusal};
use crate::vendor::{self, call};

fn model() -> (tempfile::TempDir, Model) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    (folder, model)
}

/// Loads once, so that what an earlier test's driver refused is forgotten, and then anew from the driver's context on.
fn forget_refusals(model: &Model, sim: &Sim) {
    drop(model.load(&options()).unwrap());
    tensorhaul::release_devices();
    sim.fail("");
}

/// Reads with `pread`, whose bytes the system counts for the process.
fn counted() -> LoadOptions {
    options().engine(EngineChoice::Pread)
}

/// Loads while `call` is held until half a ring was read. `seen` then looks at the machine, and the call goes on with
/// what `then` says of failures.
fn load_holding(model: &Model, sim: &Sim, call: &str, then: &str, seen: impl FnOnce()) -> Result<Loaded> {
    sim.fail(&format!("slow={call}:600000"));
    let before = bytes_read();
    thread::scope(|scope| {
        let load = scope.spawn(|| model.load(&counted()));
        wait_until("half a ring was read", || {
            bytes_read() - before >= RING_BYTES / 2 && sim.report().calls(call) == 1
        });
        seen();
        sim.fail(then);
        load.join().unwrap()
    })
}

/// What system calls of this process have read so far, without those that asked for it.
fn bytes_read() -> u64 {
    static ASKING: AtomicU64 = AtomicU64::new(0);
    let text = fs::read_to_string("/proc/self/io").unwrap();
    let read: u64 = text.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap();
    read - ASKING.fetch_add(text.len() as u64, Ordering::Relaxed)
}

/// Waits for something that happens soon; a minute is for machines that are busy with something else.
fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The budget of [`options`].
const RING_BYTES: u64 = 1 << 20;

#[test]
fn reads_land_before_the_context_exists() {
    let (_folder, model) = model();
    let sim = Sim::new("");
    forget_refusals(&model, &sim);
    let seen = || {
        let happened = sim.report();
        assert_eq!(happened.live["live.contexts"], 0);
        assert_eq!(happened.live["live.pinned"], 0);
        assert_eq!(happened.calls(call::STREAM_CREATE), 0);
    };
    let loaded = load_holding(&model, &sim, call::OPEN, "", seen).unwrap();
    let report = &loaded.report;
    assert!(report.bytes_ahead > 0 && report.bytes_ahead <= report.peak_staging_bytes, "{report:?}");
    assert!(
        report.peak_staging_bytes <= RING_BYTES,
        "what waits for the device waits in the ring: {report:?}"
    );
    let phases = report.phases;
    assert!(phases.hidden_seconds > 0.0 && phases.first_copy_seconds > 0.0, "{phases:?}");
    assert!(report.fallbacks.iter().all(|told| !told.what.contains("staging memory")), "{report:?}");
    assert_same_bytes(&model, &loaded);
    drop(loaded);
    sim.assert_clean("after the load");
}

#[test]
fn every_engine_reads_ahead_of_the_context() {
    let (_folder, model) = model();
    for engine in [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring, EngineChoice::Mmap] {
        let sim =
            Sim::new(&format!("slow={}:10;slow={}:5;delay_us=100", call::STREAM_CREATE, call::HOST_REGISTER));
        let loaded = model.load(&options().engine(engine)).unwrap();
        assert_same_bytes(&model, &loaded);
        drop(loaded);
        sim.assert_clean(&format!("{engine:?}"));
    }
}

#[test]
fn a_ring_that_is_refused_after_reads_began_is_replaced_and_every_byte_arrives() {
    let (_folder, model) = model();
    let sim = Sim::new("");
    forget_refusals(&model, &sim);
    let fails = format!("fail={}:1:801", call::HOST_REGISTER);
    let loaded = load_holding(&model, &sim, call::HOST_REGISTER, &fails, || ()).unwrap();
    let told = |what: &str| {
        let mut fallbacks = loaded.report.fallbacks.iter();
        fallbacks.find(|told| told.what.contains(what)).unwrap_or_else(|| panic!("{what}")).why.clone()
    };
    assert_eq!(told("staging memory"), refusal(call::HOST_REGISTER));
    assert_eq!(told("bytes were read twice"), "the driver refused to pin the memory they were in");
    assert_eq!(sim.report().live["live.pinned"], 1, "the ring that was refused is gone");
    assert_same_bytes(&model, &loaded);
    drop(loaded);

    tensorhaul::release_devices();
    sim.fail(&fails);
    let loaded = model.load(&counted()).unwrap();
    let report = &loaded.report;
    assert_eq!(report.bytes_ahead, 0, "a process that was refused pins before it reads");
    assert!(report.fallbacks.iter().all(|told| !told.what.contains("twice")), "{report:?}");
    assert_same_bytes(&model, &loaded);
    drop(loaded);
    sim.assert_clean("after both loads");
}

#[test]
fn whatever_fails_beside_the_reads_stops_them_and_leaves_nothing() {
    let (_folder, model) = model();
    let sim = Sim::new("");
    forget_refusals(&model, &sim);
    drop(model.load(&options()).unwrap());
    let allocations = sim.report().calls(call::ALLOCATE_ORDERED);
    tensorhaul::release_devices();
    let steps = [
        (call::OPEN, 1, "101"),
        (call::STREAM_CREATE, 1, "2"),
        (call::STREAM_CREATE, 2, "2"),
        (call::MEMORY, 1, "1"),
        (call::ALLOCATE_ORDERED, 1, "2"),
        (call::ALLOCATE_ORDERED, allocations, "2"),
        (call::STREAM_WAIT_EVENT, 1, "1"),
        (call::COPY_IN, 1, "1"),
    ];
    for (call, nth, code) in steps {
        let what = format!("{call} fails at use {nth} with {code}");
        let then = format!("fail={call}:{nth}:{code}");
        let error = load_holding(&model, &sim, call::OPEN, &then, || ()).unwrap_err();
        let out_of_memory = call == call::ALLOCATE_ORDERED;
        let kind = if out_of_memory { ErrorKind::OutOfMemory } else { ErrorKind::Device };
        assert_eq!(error.kind(), kind, "{what}: {}", error.one_line());
        assert!(
            error.one_line().starts_with(&format!("{}: ", vendor::FIRST)),
            "{what}: {}",
            error.one_line()
        );
        let tells_both =
            error.one_line().contains(" bytes do not fit, ") && error.one_line().ends_with(" are free");
        assert_eq!(tells_both, out_of_memory, "{what}: {}", error.one_line());
        sim.fail("");
        sim.assert_clean(&what);
        let again = model.load(&options()).unwrap();
        assert_same_bytes(&model, &again);
        drop(again);
        tensorhaul::release_devices();
    }
}

#[test]
fn no_staging_memory_of_either_kind_is_an_error_that_leaves_nothing() {
    let (_folder, model) = model();
    let sim = Sim::new("");
    forget_refusals(&model, &sim);
    let both = format!("fail={}:1:801;fail={}:1:2", call::HOST_REGISTER, call::HOST_ALLOCATE);
    let error = load_holding(&model, &sim, call::HOST_REGISTER, &both, || ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{}", error.one_line());
    sim.fail("");
    sim.assert_clean("after the error");
    drop(model.load(&options()).unwrap());
}

#[test]
fn a_load_cancelled_before_the_context_exists_stops_reading_at_once_and_allocates_nothing() {
    let (_folder, model) = model();
    let sim = Sim::new("");
    forget_refusals(&model, &sim);
    sim.fail(&format!("slow={}:600000", call::OPEN));
    let before = bytes_read();
    thread::scope(|scope| {
        let stream = model.stream(&counted()).unwrap();
        wait_until("half a ring was read", || bytes_read() - before >= RING_BYTES / 2);
        let dropping = scope.spawn(|| drop(stream));
        wait_until("the lanes had ended", || !lanes_run());
        assert_eq!(sim.report().live["live.contexts"], 0, "the context is still being made");
        sim.fail("");
        dropping.join().unwrap();
    });
    let happened = sim.report();
    assert_eq!(happened.calls(call::ALLOCATE_ORDERED), 0);
    assert_eq!(happened.calls(call::HOST_REGISTER), 0);
    sim.assert_clean("after the cancellation");
}

/// Tells whether any thread of this process reads for a load.
fn lanes_run() -> bool {
    let names = fs::read_dir("/proc/self/task").unwrap().filter_map(|task| {
        // A thread that ends meanwhile has no name any more.
        fs::read_to_string(task.ok()?.path().join("comm")).ok()
    });
    names.into_iter().any(|name| name.starts_with("tensorhaul-prea") || name.starts_with("tensorhaul-read"))
}

#[test]
fn a_plan_larger_than_what_is_free_is_refused_before_anything_is_allocated() {
    let (_folder, model) = model();
    let sim = Sim::new("memory=10000000");
    let device = vendor::open(0).unwrap();
    let other = device.allocate(5_000_000).unwrap(); // The plan needs about 7.4 MB.
    let allocations = sim.report().calls(call::ALLOCATE_ORDERED);
    let error = model.load(&options()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert!(error.one_line().contains("5000000 are free"), "{}", error.one_line());
    assert_eq!(sim.report().calls(call::ALLOCATE_ORDERED), allocations);
    drop(other);
    // A load waits for its own stream; this was freed on another.
    device.wait(&device.record(Stream::Copy).unwrap()).unwrap();
    let loaded = model.load(&options()).unwrap();
    let other = device.allocate(2_000_000).unwrap();
    // The device is open now: what is free is known before the first read.
    let before = bytes_read();
    let error = model.load(&counted()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert!(bytes_read() - before < RING_BYTES / 4, "nothing was read");
    drop((loaded, other, device));
    sim.assert_clean("after the refusals");
}
