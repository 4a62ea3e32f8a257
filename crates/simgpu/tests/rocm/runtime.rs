//! What HIP does otherwise than CUDA's driver.

use std::ffi::c_int;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use libloading::{Library, Symbol};
use tensorhaul::Model;
use tensorhaul_device::gpu::{Context, Driver, LaunchShape};
use tensorhaul_device::{Device, DeviceError, OperationKind, Stream};

use crate::code_object;
use crate::suite::kernels::{misaligned, run_everything};
use crate::suite::load::{assert_same_bytes, checkpoint, options};
use crate::suite::missing::{probe, without};
use crate::suite::sim::{Sim, library_path};
use crate::vendor::{self, call};

#[test]
fn every_architecture_has_kernels_of_its_own_that_take_what_the_host_build_takes() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(misaligned(folder.path(), "small", 500, 401)).unwrap();
    for architecture in ["gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1201"] {
        let sim = Sim::new(&format!("gfx={architecture}:sramecc+:xnack-;batches=0"));
        assert_eq!(vendor::open(0).unwrap().facts().architecture, architecture);
        run_everything().unwrap();
        vendor::open(0).unwrap().prepare(OperationKind::Dequantize).unwrap();
        drop(model.load(&options()).unwrap());
        let modules = sim.report().calls(call::MODULE_LOAD);
        assert_eq!(
            modules, 6,
            "{architecture}: casts, strided copies, three ways to dequantize, the scattering of small tensors"
        );
        sim.assert_clean(architecture);
    }
}

/// The control of the test above: the simulator would see a kernel that takes something else.
#[test]
fn a_kernel_that_takes_other_parameters_than_the_host_build_is_refused() {
    let sim = Sim::new("");
    let driver = vendor::driver().unwrap();
    for (name, host) in [("cast", "32 bytes of parameters"), ("no_such_kernel", "no build")] {
        let image = code_object::with_one_kernel("gfx942", name, 100).leak();
        // SAFETY: a code object.
        assert_eq!(unsafe { driver.module_load(image) }.unwrap_err().code, 1);
        let told = format!("kernel {name}: 100 bytes of parameters in the image, {host} for the host");
        assert_eq!(sim.report().violations.last(), Some(&told));
    }
}

#[test]
fn for_an_architecture_without_kernels_they_are_compiled_and_that_is_told() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(misaligned(folder.path(), "small", 500, 401)).unwrap();
    for architecture in ["gfx906", "gfx1151"] {
        let sim = Sim::new(&format!("gfx={architecture}:sramecc+:xnack-;batches=0;devices=2"));
        let device = vendor::open(0).unwrap();
        for kind in [OperationKind::Cast, OperationKind::Strided, OperationKind::Dequantize] {
            device.prepare(kind).unwrap();
        }
        let (what, why) = device.fallbacks().remove(0);
        assert_eq!(what, "kernels are compiled on this machine");
        let told =
            format!("this build has none for {architecture}, but for gfx90a, {}; hipRTC 9.0 (", &KNOWN[8..]);
        assert!(why.starts_with(&told) && why.ends_with(" compiles them"), "{why}");
        run_everything().unwrap();
        let loaded = model.load(&options()).unwrap();
        assert_same_bytes(&model, &loaded);
        assert!(
            loaded.report.fallbacks.iter().any(|told| told.what == what),
            "{:?}",
            loaded.report.fallbacks
        );
        vendor::open(1).unwrap().prepare(OperationKind::Dequantize).unwrap();
        assert_eq!(
            sim.report().calls("hiprtcCompileProgram"),
            6,
            "{architecture}: each module once a process"
        );
        drop((loaded, device));
        sim.assert_clean(architecture);
    }
}

#[test]
fn kernels_that_do_not_compile_are_a_typed_error_with_the_log_and_tensors_load_all_the_same() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(misaligned(folder.path(), "small", 500, 401)).unwrap();
    let sim = Sim::new("gfx=gfx909;batches=0");
    sim.fail("fail=hiprtcCompileProgram:1:6;fail=hiprtcCompileProgram:2:6");
    let error = vendor::open(0).unwrap().prepare(OperationKind::Cast).unwrap_err();
    let text = error.to_string();
    let DeviceError::NotCompiled { log, .. } = error else { panic!("{text}") };
    assert_eq!(log, "1 warning generated.\nvendor.h:1:1: error: made to fail\n");
    let told =
        "hiprtcCompileProgram failed with 6 (HIPRTC_ERROR_COMPILATION): vendor.h:1:1: error: made to fail";
    assert!(
        text.starts_with("rocm:0: the kernels for gfx909 do not compile: hipRTC 9.0 (")
            && text.ends_with(told),
        "{text}"
    );
    // The kernel that moves small tensors does not compile either: they are copied one by one.
    let loaded = model.load(&options()).unwrap();
    assert_same_bytes(&model, &loaded);
    let told = loaded
        .report
        .fallbacks
        .iter()
        .find(|told| told.what.starts_with("small tensors are copied one by one"));
    assert!(told.unwrap().why.contains("do not compile"), "{:?}", loaded.report.fallbacks);
    drop(loaded);
    // An architecture that the compiler does not know is no other case.
    let _sim = {
        drop(sim);
        Sim::new("gfx=gfx90")
    };
    let error = vendor::open(0).unwrap().prepare(OperationKind::Cast).unwrap_err().to_string();
    assert!(error.ends_with("error: unknown target 'gfx90'"), "{error}");
}

#[test]
fn an_architecture_without_kernels_and_without_a_compiler_is_named_and_loads_all_the_same() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let runtime = without("hiprtcCreateProgram", folder.path());
    let machine = Path::new("gfx=gfx906:sramecc+:xnack-;batches=0");
    run(
        "without_a_compiler",
        &[
            (vendor::LIBRARY_VARIABLE, &runtime),
            ("TENSORHAUL_HIPRTC_LIBRARY", Path::new("/nowhere/libhiprtc.so")),
            ("SIMGPU", machine),
        ],
    );
}

#[test]
#[ignore = "run by the test above, in another environment"]
fn without_a_compiler() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let error = vendor::open(0).unwrap().prepare(OperationKind::Cast).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, DeviceError::NoKernels { .. }), "{text}");
    assert_eq!(
        text,
        format!(
            "rocm:0: this build has no kernels for gfx906, but for {KNOWN}; hipRTC would compile them: no driver library found \
             (tried /nowhere/libhiprtc.so); load without casts and dequantization"
        )
    );
    assert_same_bytes(&model, &model.load(&options()).unwrap());
}

#[test]
fn a_compiler_apart_from_the_runtime_is_found_by_its_name() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let runtime = without("hiprtcCreateProgram", folder.path());
    let (compiler, machine) = (library_path(), Path::new("gfx=gfx906"));
    let environment = [
        (vendor::LIBRARY_VARIABLE, &*runtime),
        ("TENSORHAUL_HIPRTC_LIBRARY", &compiler),
        ("SIMGPU", machine),
    ];
    run("with_a_compiler_apart", &environment);
}

#[test]
#[ignore = "run by the test above, in another environment"]
fn with_a_compiler_apart() {
    let device = vendor::open(0).unwrap();
    device.prepare(OperationKind::Dequantize).unwrap();
    let (_, why) = device.fallbacks().remove(0);
    assert!(why.contains(&format!("hipRTC 9.0 ({})", library_path().display())), "{why}");
}

/// What this build has kernels for.
const KNOWN: &str = "gfx90a, gfx942, gfx950, gfx1030, gfx1100, gfx1201";

#[test]
fn a_code_object_of_another_architecture_or_of_none_is_refused() {
    let _sim = Sim::new("");
    let driver = vendor::driver().unwrap();
    let others = code_object::with_one_kernel("gfx90a", "probe", 8).leak();
    // SAFETY: a code object.
    assert_eq!(unsafe { driver.module_load(others) }.unwrap_err().code, 209);
    let wants = code_object::with_one_kernel("gfx942:xnack+", "probe", 8).leak();
    // SAFETY: as above.
    assert_eq!(unsafe { driver.module_load(wants) }.unwrap_err().code, 209);
    // SAFETY: as long as the header that is looked at.
    assert_eq!(unsafe { driver.module_load(&[0; 64]) }.unwrap_err().code, 200);
}

#[test]
fn no_status_is_left_behind_for_a_framework_to_find() {
    let sim = Sim::new("slow=hipMemcpyHtoDAsync:1");
    let device = vendor::open(0).unwrap();
    // SAFETY: the simulator, which stays loaded.
    let library = unsafe { Library::new(library_path()) }.unwrap();
    // SAFETY: exported with this signature.
    let last: Symbol<'_, unsafe extern "C" fn() -> c_int> =
        unsafe { library.get("hipGetLastError") }.unwrap();
    // SAFETY: as above.
    let set: Symbol<'_, unsafe extern "C" fn(c_int) -> c_int> =
        unsafe { library.get("hipSetDevice") }.unwrap();
    // SAFETY: takes any number.
    assert_eq!(unsafe { set(9) }, 101);
    // SAFETY: takes nothing.
    assert_eq!(unsafe { last() }, 101, "the control: a failed call leaves its status");

    sim.fail(
        "fail=hipMalloc:1:2;fail=hipMallocAsync:1:801;fail=hipHostRegister:1:801;fail=hipEventQuery:1:600",
    );
    assert!(device.allocate(64).is_err());
    drop(device.staging_memory(64).unwrap());
    assert!(!device.is_complete(&device.record(Stream::Copy).unwrap()).unwrap());
    // SAFETY: takes nothing.
    assert_eq!(unsafe { last() }, 0);
}

#[test]
fn kernels_reach_registered_memory_once_its_address_was_asked_for() {
    let shape = LaunchShape { block_count: 1, block_threads: 32, shared_bytes: 0 };
    for is_asked in [true, false] {
        let sim = Sim::new("");
        let device = vendor::open(0).unwrap();
        let memory = device.staging_memory(4096).unwrap();
        let start = memory.as_ptr().as_ptr().cast::<std::ffi::c_void>().cast_const();
        let driver = vendor::driver().unwrap();
        driver.make_current(Context(1)).unwrap();
        let address = match is_asked {
            // SAFETY: pinned above.
            true => unsafe { driver.host_address(start) }.unwrap(),
            false => start.expose_provenance() as u64,
        };
        // SAFETY: a code object.
        let module = unsafe { driver.module_load(vendor::probe_image()) }.unwrap();
        // SAFETY: just loaded.
        let function = unsafe { driver.function(module, c"probe") }.unwrap();
        let stream = driver.stream_create().unwrap();
        // SAFETY: the simulator leaves out what the kernel must not touch.
        unsafe { driver.launch(function, shape, &address.to_le_bytes(), stream) }.unwrap();
        // SAFETY: alive. Where the kernel has failed already, this says so too.
        let _ = unsafe { driver.stream_wait(stream) };
        assert_eq!(sim.report().violations.is_empty(), is_asked, "{:?}", sim.report().violations);
    }
}

#[test]
fn auto_is_the_device_of_whichever_vendor_has_one() {
    let _sim = Sim::new("devices=2");
    assert_eq!(tensorhaul::default_device(), vendor::id(0));
}

/// Runs one of the tests below in a process of its own.
fn run(test: &str, environment: &[(&str, &Path)]) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("runtime::{test}"), "--ignored"])
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
fn a_runtime_that_the_process_holds_comes_before_any_other() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let held = folder.path().join("libamdhip64.so.7");
    fs::copy(library_path(), &held).unwrap();
    run("with_a_runtime_in_the_process", &[("HELD", &held), (vendor::LIBRARY_VARIABLE, &library_path())]);
}

#[test]
#[ignore = "run by the test above, in another environment"]
fn with_a_runtime_in_the_process() {
    let held = PathBuf::from(std::env::var_os("HELD").unwrap());
    // SAFETY: the simulator, which has no initializers.
    let _library = unsafe { Library::new(&held) }.unwrap();
    assert_eq!(vendor::driver().unwrap().library(), held.display().to_string());
    drop(vendor::open(0).unwrap());
}

#[test]
fn both_vendors_work_in_one_process() {
    let library = library_path();
    run(
        "with_both_vendors",
        &[(vendor::LIBRARY_VARIABLE, &library), (vendor::LIBRARY_VARIABLE_OF_OTHERS, &library)],
    );
}

#[test]
#[ignore = "run by the test above, in another environment"]
fn with_both_vendors() {
    use tensorhaul::DeviceId;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    assert_eq!(tensorhaul::default_device(), DeviceId::Cuda(0), "of equals the first");
    let doctor = tensorhaul::doctor::Doctor::examine();
    for name in ["cuda", "rocm"] {
        assert!(doctor.drivers.iter().any(|driver| driver.name == name && driver.found), "{name}");
        let first = format!("{name}:0");
        assert!(doctor.devices.iter().any(|device| device.name == first && device.works), "{name}");
    }
    std::thread::scope(|scope| {
        let loads = [DeviceId::Cuda(0), DeviceId::Rocm(0)].map(|device| {
            let model = &model;
            scope.spawn(move || {
                let mut request = tensorhaul::Request::all();
                request.device = device;
                model.load(&options().request(request)).unwrap()
            })
        });
        for loaded in loads.map(|load| load.join().unwrap()) {
            for (name, tensor) in loaded.tensors.iter() {
                assert!(
                    tensor.to_host().unwrap() == model.tensor(name).unwrap().to_host().unwrap(),
                    "{name}"
                );
            }
        }
    });
}

/// AMD's own runtime, where a package of it is installed and no device is there.
#[test]
fn an_installed_runtime_without_a_device_is_an_error_with_the_cause() {
    let folders = ["/usr/lib/x86_64-linux-gnu", "/opt/rocm/lib"];
    let names = ["libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5"];
    let files = folders.iter().flat_map(|folder| names.map(|name| Path::new(folder).join(name)));
    let Some(runtime) = files.into_iter().find(|file| file.exists()) else {
        println!("skipped: no HIP runtime is installed (apt-get install libamdhip64-5)");
        return;
    };
    if Path::new("/dev/kfd").exists() {
        println!("skipped: there may be a device");
        return;
    }
    let error = probe(&runtime, "");
    let start = format!("rocm:0: {}: hipInit failed with 10", runtime.display());
    assert!(error.starts_with(&start) && error.contains("there is no /dev/kfd"), "{error}");
}
