//! Forks before and after the driver is initialized, in a process of their own.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use tensorhaul::{DeviceMap, Model};

use crate::suite::load::{assert_same_bytes, checkpoint, options};
use crate::suite::sim::library_path;
use crate::vendor;

#[test]
fn a_child_has_devices_only_when_it_is_forked_before_the_driver_is_initialized() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "suite::fork::in_a_process_of_its_own", "--ignored", "--test-threads=1"])
        .env(vendor::LIBRARY_VARIABLE, library_path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("test result: ok. 1 passed"), "{text}");
}

#[test]
#[ignore = "run by the test above, with another environment"]
fn in_a_process_of_its_own() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    // A plan leaves the driver alone, also one that would like to know which devices reach each other.
    let everywhere = DeviceMap::everything_on(vec![vendor::id(0), vendor::id(1)]).unwrap();
    for planned in [options(), options().device_map(everywhere)] {
        assert_eq!(model.plan(&planned).unwrap().promised().in_place_bytes, 0);
    }
    assert!(holds_in_a_child(|| {
        assert_same_bytes(&model, &model.load(&options()).unwrap());
    }));
    assert!(holds_in_a_child(|| {
        share_memory();
        let loaded = model.load(&options()).unwrap();
        assert!(loaded.report.bytes_in_place > 0);
        // The driver is known now, and what it says of its device.
        let planned = model.plan(&options()).unwrap().promised().in_place_bytes;
        assert_eq!(planned, loaded.report.bytes_in_place);
    }));
    assert!(holds_in_a_child(|| {
        share_memory();
        assert!(model.plan_for_devices(&options()).unwrap().promised().in_place_bytes > 0);
    }));
    let loaded = model.load(&options()).unwrap();
    assert!(holds_in_a_child(|| {
        for _ in 0..2 {
            let error = model.load(&options()).unwrap_err().one_line();
            assert!(
                error.starts_with(&format!("{}: the process was forked after the driver", vendor::FIRST)),
                "{error}"
            );
            // What the parent keeps is neither used nor freed.
            tensorhaul::release_devices();
        }
    }));
    assert_same_bytes(&model, &loaded);
    assert_same_bytes(&model, &model.load(&options()).unwrap());
}

/// Makes the machine of this process, whose driver was not asked yet, one whose device shares the host's memory.
fn share_memory() {
    // SAFETY: this process has one thread.
    unsafe { std::env::set_var("SIMGPU", "integrated=1") };
}

/// Runs assertions in a child, and tells whether they held. No other thread of this process is at work meanwhile.
fn holds_in_a_child(assertions: impl FnOnce()) -> bool {
    // SAFETY: no other thread holds a lock that the child may need.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let held = catch_unwind(AssertUnwindSafe(assertions)).is_ok();
        // SAFETY: ends the child without running the parent's destructors.
        unsafe { libc::_exit(i32::from(!held)) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    status == 0
}
