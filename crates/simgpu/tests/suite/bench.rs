//! What the doctor and the bench see of a simulated device, and that they leave nothing on it.

use tensorhaul::bench::{BenchOptions, run};
use tensorhaul::doctor::Doctor;
use tensorhaul::{ErrorKind, LoadOptions, Model};

use crate::suite::load::checkpoint;
use crate::suite::sim::{Sim, library_path};
use crate::vendor::{self, call};

#[test]
fn the_doctor_names_the_driver_and_measures_pinned_copies() {
    let sim = Sim::new("devices=2;link_mb_per_s=4000");
    let doctor = Doctor::examine();
    let driver = doctor.drivers.iter().find(|driver| driver.name == vendor::NAME).unwrap();
    assert!(driver.found && driver.why.is_none(), "{driver:?}");
    assert_eq!(driver.library.as_deref(), library_path().to_str());
    assert!(driver.version.as_ref().unwrap().starts_with(vendor::VERSION_START), "{driver:?}");
    for name in [vendor::FIRST, vendor::SECOND] {
        let device = doctor.devices.iter().find(|device| device.name == name).unwrap();
        let copies = device.copies.unwrap();
        // The simulated link is no faster than it was told to be, however busy the machine is.
        for gb_per_s in [copies.to_device_gb_per_s, copies.to_host_gb_per_s] {
            assert!(gb_per_s > 0.0 && gb_per_s < 4.4, "{name}: {copies:?}");
        }
    }
    let happened = sim.report();
    assert!(happened.calls(call::COPY_IN) > 0 && happened.calls(call::COPY_OUT) > 0);
    sim.assert_clean("after the doctor");
}

#[test]
fn a_device_whose_copies_fail_does_not_work_and_says_why() {
    let sim = Sim::new("");
    for (call, nth) in [(call::OPEN, 1), (call::COPY_IN, 2), (call::EVENT_WAIT, 3)] {
        sim.fail(&format!("fail={call}:{nth}:1"));
        let doctor = Doctor::examine();
        let device = doctor.devices.iter().find(|device| device.name == vendor::FIRST).unwrap();
        assert!(!device.works && device.copies.is_none(), "{call}: {device:?}");
        assert!(device.why.as_ref().unwrap().contains(vendor::INVALID_VALUE), "{call}: {device:?}");
        sim.fail("");
    }
    sim.assert_clean("after the failures");
}

#[test]
fn a_bench_compares_loads_with_the_link_and_the_storage() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = Sim::new("link_mb_per_s=4000");
    let load = LoadOptions::default().staging_bytes(1 << 20);
    let options = BenchOptions::default().load(load).device(vendor::id(0)).runs(2);
    let bench = run(&model, &options).unwrap();
    let row = |name: &str| bench.ceilings.iter().find(|row| row.name == name).unwrap();
    for name in ["host to device", "device to host"] {
        let speed = row(name).gb_per_s.unwrap();
        assert!(speed.max < 4.4 && row(name).runs.len() == 2, "{name}: {speed:?}");
    }
    assert_eq!(bench.device, vendor::FIRST);
    assert!(bench.first_load.run.report.as_ref().unwrap().phases.pin_seconds > 0.0);
    for load in &bench.loads {
        assert_eq!(load.runs.len() == 2, load.why.is_none(), "{load:?}");
        // The least of two bests: whichever it is, the link is no slower.
        if let (Some(ceiling), Some(_)) = (load.ceiling, load.gb_per_s) {
            let link = row("host to device").gb_per_s.unwrap().median;
            assert!(row(ceiling).gb_per_s.unwrap().median <= link, "{load:?}");
            assert!(load.peak_staging_bytes.unwrap() <= 1 << 20, "{load:?}");
        }
    }
    sim.assert_clean("after the bench");
}

#[test]
fn a_bench_of_what_does_not_fit_says_so_and_leaves_nothing() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = Sim::new("memory=2000000");
    let error = run(&model, &BenchOptions::default().device(vendor::id(0))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error:?}");
    sim.assert_clean("after the refusal");
}
