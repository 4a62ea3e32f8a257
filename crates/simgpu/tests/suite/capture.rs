//! Loads beside somebody who captures a graph: their capture survives, and the thread's capture mode is put back.

use tensorhaul::Model;
use tensorhaul_device::Device;
use tensorhaul_device::gpu::{CaptureMode, Driver};

use crate::suite::load::{assert_same_bytes, checkpoint, options};
use crate::suite::sim::{Sim, failure};
use crate::vendor::{self, call};

const GLOBAL: CaptureMode = CaptureMode(0);
const THREAD_LOCAL: CaptureMode = CaptureMode(1);

/// Sets the mode of this thread, and returns what it was.
fn exchange(mode: CaptureMode) -> CaptureMode {
    vendor::driver().unwrap().exchange_capture_mode(mode).unwrap().unwrap()
}

#[test]
fn a_load_ends_nobodys_capture() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    for machine in ["capturing=1", "capturing=1;pools=0", "capturing=1;batches=0;delay_us=50"] {
        let sim = Sim::new(machine);
        let loaded = model.load(&options().checksums(true)).unwrap();
        assert_same_bytes(&model, &loaded);
        drop(loaded);
        sim.assert_clean(machine);
        assert_eq!(exchange(GLOBAL), GLOBAL, "{machine}: the loading thread's");
    }
}

/// The control of the test above: it would see a call from a thread that is held to the rules.
#[test]
fn a_query_outside_the_backend_ends_a_capture() {
    let sim = Sim::new("capturing=1");
    let device = vendor::open(0).unwrap();
    let driver = vendor::driver().unwrap();
    let event = device.record(tensorhaul_device::Stream::Copy).unwrap();
    device.wait(&event).unwrap();
    assert!(sim.report().violations.is_empty(), "{:?}", sim.report().violations);
    // Where no device is current, this fails besides.
    let allocated = driver.allocate(64);
    assert_eq!(sim.report().violations, [format!("{} ends a capture of somebody else", call::ALLOCATE)]);
    if let Ok(address) = allocated {
        // SAFETY: just allocated.
        unsafe { driver.free(address) }.unwrap();
    }
}

#[test]
fn the_threads_capture_mode_is_put_back_whatever_happens() {
    let sim = Sim::new("devices=2");
    let device = vendor::open(1).unwrap(); // Nobody's current device.
    for mode in [GLOBAL, THREAD_LOCAL, CaptureMode::RELAXED] {
        let before = exchange(mode);
        device.memory().unwrap();
        assert_eq!(exchange(mode), mode, "after a call that went well");
        for (call, nth) in [
            (call::MEMORY, 1),
            (call::CURRENT, 1),
            (call::MAKE_CURRENT, 1),
            (call::MAKE_CURRENT, 2),
            (call::CAPTURE_MODE, 1),
        ] {
            sim.fail(&format!("fail={call}:{nth}:1"));
            let result = device.memory();
            sim.fail("");
            // The call that puts the caller's own device back has nobody to tell.
            assert_eq!(result.is_err(), (call, nth) != (call::MAKE_CURRENT, 2), "{call} at use {nth}");
            assert_eq!(exchange(mode), mode, "after {call} at use {nth}");
            let driver = vendor::driver().unwrap();
            driver.make_current(tensorhaul_device::gpu::Context(0)).unwrap();
        }
        exchange(before);
    }
    let before = sim.report().calls(call::CAPTURE_MODE);
    exchange(CaptureMode::RELAXED);
    device.memory().unwrap();
    exchange(GLOBAL);
    let calls = sim.report().calls(call::CAPTURE_MODE) - before;
    assert_eq!(calls, 3, "what is relaxed already is not put back");
    drop(device);
    sim.assert_clean("after all");
}

#[test]
fn a_context_that_cannot_be_relaxed_is_an_error_and_the_callers_own_is_current_again() {
    let sim = Sim::new("devices=2");
    let device = vendor::open(0).unwrap();
    let driver = vendor::driver().unwrap();
    let others = tensorhaul_device::gpu::Context(2);
    driver.make_current(others).unwrap();
    sim.fail(&format!("fail={}:1:1", call::CAPTURE_MODE));
    let error = device.memory().unwrap_err().to_string();
    let failure = failure(call::CAPTURE_MODE, 1, vendor::INVALID_VALUE);
    assert_eq!(error, format!("{}: {failure}", vendor::FIRST));
    assert_eq!(driver.current().unwrap(), others);
    driver.make_current(tensorhaul_device::gpu::Context(0)).unwrap();
}
