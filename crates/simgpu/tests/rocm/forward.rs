//! The ROCm backend over a CUDA driver: HIP's calls forwarded to a second copy of the simulator, which has a machine of its own
//! and plays the real driver.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;
use tensorhaul::selftest;
use tensorhaul::{DeviceId, Dtype, Model};
use tensorhaul_device::gpu::Driver as _;
use tensorhaul_device::{Device, DeviceError, OperationKind, conformance};

use crate::code_object;
use crate::suite::kernels::{misaligned, run_everything};
use crate::suite::load::{assert_same_bytes, checkpoint, options};
use crate::suite::missing::probe;
use crate::suite::quantized::{self, onto};
use crate::suite::sim::{self, Happened, Sim, library_path};
use crate::vendor;

/// The machine that calls are forwarded to, beside the one that forwards them.
struct Real {
    forwarding: Sim,
}

impl Real {
    fn new(config: &str) -> Real {
        let forwarding = Sim::new(&format!("forward={}", real_path().display()));
        // Small, because the suite fills it several times over.
        sim::configure(real(), &format!("memory=67108864;{config}"));
        Real { forwarding }
    }

    fn report(&self) -> Happened {
        sim::report(real())
    }

    /// Asserts that everything was given back to the driver but the contexts, which HIP keeps for the process, and that nothing was
    /// done that it forbids; and that the machine which forwards was left alone.
    fn assert_clean(&self, when: &str) {
        self.forwarding.assert_clean(when);
        let happened = self.report();
        assert!(happened.violations.is_empty(), "{when}: {:?}", happened.violations);
        let left: Vec<_> =
            happened.live.iter().filter(|(what, count)| *what != "live.contexts" && **count > 0).collect();
        assert!(left.is_empty(), "{when}: left behind: {left:?}");
    }
}

fn real() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    // SAFETY: the project's own library; it has no initializers.
    LIBRARY.get_or_init(|| unsafe { Library::new(real_path()) }.unwrap())
}

/// A copy of the library's file, which the loader takes for another library.
fn real_path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("libreal-{}.so", std::process::id()));
        fs::copy(library_path(), &path).unwrap();
        path
    })
}

#[test]
fn the_backend_passes_the_conformance_suite_over_a_cuda_driver() {
    for config in ["", "delay_us=200", "pools=0;delay_us=200;seed=7", "batches=0"] {
        let real = Real::new(config);
        let device = vendor::open(0).unwrap();
        assert_eq!(device.facts().architecture, vendor::ARCHITECTURE);
        for verdict in conformance::run(&device) {
            verdict.result.unwrap_or_else(|what| panic!("{config:?}: {}: {what}", verdict.promise));
        }
        run_everything().unwrap();
        drop(device);
        let (forwarded, happened) = (real.forwarding.report(), real.report());
        assert!(forwarded.calls("hipModuleLaunchKernel") > 0);
        assert_eq!(forwarded.calls("hipModuleLaunchKernel"), happened.calls("cuLaunchKernel"));
        assert_eq!(forwarded.calls("hipEventRecord"), happened.calls("cuEventRecord"));
        real.assert_clean(config);
    }
}

#[test]
fn two_devices_pass_the_conformance_suite_over_a_cuda_driver() {
    for (config, is_reached) in
        [("devices=2;delay_us=300", true), ("devices=2;pools=0", true), ("devices=2;peers=0", false)]
    {
        let real = Real::new(config);
        let (device, peer) = (vendor::open(0).unwrap(), vendor::open(1).unwrap());
        for verdict in conformance::run_pair(&device, &peer) {
            verdict.result.unwrap_or_else(|what| panic!("{config:?}: {}: {what}", verdict.promise));
        }
        assert_eq!(device.can_reach(peer.id()), is_reached, "{config}");
        drop((device, peer));
        real.assert_clean(config);
    }
}

#[test]
fn loads_arrive_over_a_cuda_driver_as_stored_and_as_numbers() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let small = Model::open(misaligned(folder.path(), "small", 500, 401)).unwrap();
    let packed = quantized::checkpoint();
    let packed = Model::open(packed.path()).unwrap();
    let expected = packed.load(&onto(DeviceId::Host, Dtype::Bf16)).unwrap().tensors;
    for config in ["delay_us=300", "delay_us=300;seed=9;pools=0", "batches=0"] {
        let real = Real::new(config);
        for model in [&model, &small] {
            assert_same_bytes(model, &model.load(&options()).unwrap());
        }
        let made = packed.load(&onto(vendor::id(0), Dtype::Bf16)).unwrap();
        assert_eq!(made.report.promised.operations, 6);
        for (name, tensor) in made.tensors.iter() {
            assert!(tensor.to_host().unwrap() == expected.get(name).unwrap().bytes().unwrap(), "{name}");
        }
        drop(made);
        real.assert_clean(config);
    }
}

#[test]
fn the_selftest_passes_over_a_cuda_driver() {
    let real = Real::new("delay_us=100");
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let verdict = selftest::run(vendor::id(0), folder.path()).unwrap();
    assert!(verdict.passed, "{:?}", verdict.failures);
    assert!(verdict.compared_bytes > 0);
    real.assert_clean("after the selftest");
}

#[test]
fn a_drivers_status_is_told_in_hips_words() {
    let refused = |config: &str| {
        let _real = Real::new(config);
        vendor::open(0).unwrap().allocate(1 << 20).err().unwrap()
    };
    assert!(matches!(refused("fail=cuMemAllocAsync:1:2"), DeviceError::OutOfMemory { .. }));
    for (code, told) in [
        (716, "719 (hipErrorLaunchFailure)"),
        (700, "700 (hipErrorIllegalAddress)"),
        (46, "999 (hipErrorUnknown)"),
    ] {
        let error = refused(&format!("fail=cuMemAllocAsync:1:{code}")).to_string();
        assert!(error.contains(told), "{error}");
    }
    let _real = Real::new("fail=cuModuleLoadData:1:222");
    let error = vendor::open(0).unwrap().prepare(OperationKind::Cast).unwrap_err().to_string();
    assert!(error.contains("209 (hipErrorNoBinaryForGpu)"), "{error}");
}

#[test]
fn kernels_that_are_none_of_the_projects_are_refused() {
    let _real = Real::new("");
    let driver = vendor::driver().unwrap();
    vendor::open(0).unwrap();
    for architecture in ["gfx942", "gfx90a"] {
        let image = code_object::with_one_kernel(architecture, "no_such_kernel", 8).leak();
        // SAFETY: a code object.
        assert_eq!(unsafe { driver.module_load(image) }.unwrap_err().code, 209);
    }
}

#[test]
fn calls_that_are_forwarded_can_be_made_to_fail() {
    let real = Real::new("");
    real.forwarding.fail("fail=hipMallocAsync:1:2");
    let error = vendor::open(0).unwrap().allocate(1 << 20).err().unwrap();
    assert!(matches!(error, DeviceError::OutOfMemory { .. }), "{error}");
    assert_eq!(real.report().calls("cuMemAllocAsync"), 0);
    real.assert_clean("after a refusal");
}

#[test]
fn a_driver_that_is_missing_or_has_no_device_is_an_error_with_its_status() {
    let told = |forward: &str, more: &str| probe(&library_path(), &format!("forward={forward}{more}"));
    for (library, status) in [
        ("/nowhere/libcuda.so.1", "hipInit failed with 303 (hipErrorSharedObjectInitFailed)"),
        ("/etc/passwd", "hipInit failed with 303 (hipErrorSharedObjectInitFailed)"),
        ("libc.so.6", "hipInit failed with 302 (hipErrorSharedObjectSymbolNotFound)"),
    ] {
        let error = told(library, "");
        assert!(error.contains(status), "{library}: {error}");
    }
    let path = real_path().display().to_string();
    let error = told(&path, ";devices=0");
    assert!(vendor::NO_DEVICE.iter().any(|words| error.contains(words)), "{error}");
    let found = told(&path, "");
    assert_eq!(found, "Simulated GPU 0, gfx942");
}
