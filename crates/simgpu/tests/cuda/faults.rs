//! Every driver call of a load fails once, at its first, second and last use.

use tensorhaul::{ErrorKind, Model};

use crate::load::{assert_same_bytes, checkpoint, options};
use crate::sim::Sim;

/// Calls whose failure a load survives: it learns less, or lets memory go later.
const SURVIVED: &[&str] = &[
    "cuDeviceGetPCIBusId",
    "cuDeviceGetName",
    "cuDriverGetVersion",
    "cuInit",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemFreeAsync",
    "cuMemFree_v2",
    "cuMemFreeHost",
    "cuEventDestroy_v2",
    "cuStreamDestroy_v2",
    "cuDevicePrimaryCtxRelease_v2",
];

#[test]
fn a_failed_call_is_a_typed_error_and_the_next_load_works() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    for machine in ["", "pools=0"] {
        let sim = Sim::new(machine);
        drop(model.load(&options()).unwrap());
        tensorhaul::release_devices();
        let counts = sim.report().calls;
        assert!(counts.len() > 15, "{counts:?}");
        for (call, count) in &counts {
            for nth in [1, 2, *count].into_iter().filter(|nth| nth <= count) {
                let what = format!("{machine:?}: {call} fails at use {nth} of {count}");
                let sim = &sim;
                tensorhaul::release_devices(); // The load at hand opens and pins anew.
                let before = sim.report().live;
                sim.fail(&format!("fail={call}:{nth}:1"));
                let result = model.load(&options());
                let may_leave = SURVIVED.contains(&call.as_str()) || result.is_ok();
                match result {
                    Ok(loaded) => {
                        // The failure was of a call after the last byte, or of one that has an alternative.
                        assert!(
                            SURVIVED.contains(&call.as_str())
                                || sim.report().calls(call) < nth
                                || is_of_the_end(call),
                            "{what}"
                        );
                        sim.fail("");
                        assert_same_bytes(&model, &loaded);
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Device, "{what}: {}", error.one_line());
                        let text = error.one_line();
                        assert!(
                            text.starts_with("cuda:0: cu")
                                && text.contains("failed with 1 (CUDA_ERROR_INVALID_VALUE)"),
                            "{what}: {text}"
                        );
                    }
                }
                sim.fail("");
                let again = model
                    .load(&options())
                    .unwrap_or_else(|error| panic!("{what}: the next load: {}", error.one_line()));
                assert_same_bytes(&model, &again);
                drop(again);
                tensorhaul::release_devices();
                let left = sim.report().live;
                assert!(may_leave || left == before, "{what}: {left:?}, before {before:?}");
                assert!(sim.report().violations.is_empty(), "{what}: {:?}", sim.report().violations);
            }
        }
    }
}

/// Calls that also run when memory is let go, where there is nobody to tell.
fn is_of_the_end(call: &str) -> bool {
    [
        "cuCtxGetCurrent",
        "cuCtxSetCurrent",
        "cuEventRecord",
        "cuStreamWaitEvent",
        "cuDeviceGet",
        "cuEventCreate",
    ]
    .contains(&call)
}

#[test]
fn a_lost_device_fails_the_load_and_hangs_nothing() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    for call in ["cuMemcpyHtoDAsync_v2:3:700", "cuEventRecord:5:719", "cuEventQuery:2:700"] {
        let sim = Sim::new("delay_us=50");
        sim.fail(&format!("fail={call}"));
        let error = model.load(&options()).unwrap_err().one_line();
        assert!(error.contains("the device is lost to this process"), "{call}: {error}");
    }
}

#[test]
fn a_device_that_somebody_else_has_is_not_called_lost() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = Sim::new("fail=cuDevicePrimaryCtxRetain:1:46");
    let error = model.load(&options()).unwrap_err().one_line();
    assert!(error.contains("(CUDA_ERROR_DEVICE_UNAVAILABLE); another process has the device"), "{error}");
    assert_same_bytes(&model, &model.load(&options()).unwrap());
    sim.assert_clean("after the load");
}

#[test]
fn a_device_lost_while_it_pins_is_not_called_a_lack_of_memory() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    for calls in
        ["fail=cuMemHostRegister_v2:1:719", "fail=cuMemHostRegister_v2:1:801;fail=cuMemHostAlloc:1:719"]
    {
        let _sim = Sim::new(calls);
        let error = model.load(&options()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device, "{calls}");
        assert!(error.one_line().contains("the device is lost"), "{calls}: {}", error.one_line());
    }
}
