//! Operations and the scatter kernel over the simulated driver: what they cost in calls, and what happens when one fails.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use tensorhaul::{Dtype, Model};
use tensorhaul_device::gpu::{Context, Driver, LaunchShape};
use tensorhaul_device::{Cast, Device, DeviceError, Location, Operation, OperationKind, Stream, Strided};

use crate::suite::load::{assert_same_bytes, options};
use crate::suite::sim::{Happened, Sim};
use crate::vendor::{self, call};

/// What kernels are loaded and launched by.
const CALLS: &[&str] = &[call::MODULE_LOAD, call::FUNCTION, call::LAUNCH];

#[test]
fn a_failed_module_or_launch_is_a_typed_error_and_the_next_one_works() {
    let sim = Sim::new("batches=0");
    run_everything().unwrap();
    let counts = sim.report();
    for call in CALLS {
        let count = counts.calls(call);
        assert!(count >= 2, "{call}: {count}");
        for nth in [1, 2, count] {
            let what = format!("{call} fails at use {nth} of {count}");
            sim.fail(&format!("batches=0;fail={call}:{nth}:1"));
            let error = run_everything().expect_err(&what).to_string();
            let name = format!("{}: {call} failed with 1 ({})", vendor::FIRST, vendor::INVALID_VALUE);
            assert_eq!(error, name, "{what}");
            sim.assert_clean(&what);
            sim.fail("");
            run_everything().unwrap_or_else(|error| panic!("{what}: the next one: {error}"));
            sim.assert_clean(&what);
        }
    }
}

#[test]
fn a_module_that_cannot_be_unloaded_is_left_to_the_driver() {
    let sim = Sim::new("");
    for call in [call::MODULE_UNLOAD, call::STREAM_WAIT] {
        sim.fail(&format!("fail={call}:1:1"));
        run_everything().unwrap();
        assert!(sim.report().live["live.modules"] >= 1, "{call}");
    }
}

#[test]
fn a_driver_that_refuses_the_kernels_is_an_error_with_a_cause() {
    for (code, cause) in vendor::REFUSALS {
        let sim = Sim::new("");
        sim.fail(&format!("fail={}:1:{code}", call::MODULE_LOAD));
        let device = vendor::open(0).unwrap();
        let error = device.prepare(OperationKind::Cast).unwrap_err().to_string();
        let call = format!("{}: {} failed with {code}", vendor::FIRST, call::MODULE_LOAD);
        assert!(error.starts_with(&call) && error.contains(cause), "{error}");
        device.prepare(OperationKind::Cast).unwrap();
        drop(device);
        sim.assert_clean("after the refusal");
    }
}

#[test]
fn a_kernel_that_leaves_its_memory_loses_the_device_and_is_named() {
    let sim = Sim::new("");
    let device = vendor::open(0).unwrap();
    device.prepare(OperationKind::Cast).unwrap();
    let memory = device.allocate(256).unwrap();
    let driver = vendor::driver().unwrap();
    driver.make_current(Context(1)).unwrap();
    let stream = driver.stream_create().unwrap();
    let image = driver.kernels(vendor::ARCHITECTURE, "cast").unwrap();
    // SAFETY: the driver's own image.
    let module = unsafe { driver.module_load(image) }.unwrap();
    // SAFETY: just loaded.
    let function = unsafe { driver.function(module, c"cast") }.unwrap();
    // SAFETY: as above.
    let missing = unsafe { driver.function(module, c"no_such_kernel") }.unwrap_err();
    assert_eq!(missing.code, 500);
    let shape = LaunchShape { block_count: 1, block_threads: 256, shared_bytes: 0 };
    let params = |numel: u64| {
        let f8_to_f16 = 5u64 | 2 << 32;
        [memory.address(), memory.address(), numel, f8_to_f16].map(u64::to_le_bytes).concat()
    };
    // SAFETY: the simulator refuses parameters of another length.
    let short = unsafe { driver.launch(function, shape, &params(1)[..24], stream) }.unwrap_err();
    assert_eq!(short.code, 1);
    assert!(sim.report().violations.is_empty());
    // SAFETY: the simulator leaves out what the kernel must not touch.
    unsafe { driver.launch(function, shape, &params(200), stream) }.unwrap();
    // SAFETY: alive. Where the kernel has failed already, this says so too.
    let _ = unsafe { driver.stream_wait(stream) };
    let violations = sim.report().violations;
    assert!(violations[0].starts_with("kernel cast: writes 16 bytes at 0x"), "{violations:?}");
    let error = device.record(Stream::Copy).unwrap_err().to_string();
    let lost = format!("failed with 700 ({}); the device is lost", vendor::ILLEGAL_ADDRESS);
    assert!(error.contains(&lost), "{error}");
}

#[test]
fn an_access_that_is_misaligned_or_nowhere_loses_the_device() {
    let probe = |sim: &Sim, offset: u64| {
        let device = vendor::open(0).unwrap();
        let memory = device.allocate(256).unwrap();
        let driver = vendor::driver().unwrap();
        driver.make_current(Context(1)).unwrap();
        let stream = driver.stream_create().unwrap();
        // SAFETY: an image as the driver takes it.
        let module = unsafe { driver.module_load(vendor::probe_image()) }.unwrap();
        // SAFETY: just loaded.
        let function = unsafe { driver.function(module, c"probe") }.unwrap();
        let shape = LaunchShape { block_count: 1, block_threads: 32, shared_bytes: 0 };
        let params = (memory.address() + offset).to_le_bytes();
        // SAFETY: the simulator leaves out what the kernel must not touch.
        unsafe { driver.launch(function, shape, &params, stream) }.unwrap();
        // SAFETY: alive. Where the kernel has failed already, this says so too.
        let _ = unsafe { driver.stream_wait(stream) };
        (device.record(Stream::Copy).err().map(|error| error.to_string()), sim.report().violations)
    };
    assert_eq!(probe(&Sim::new(""), 0), (None, Vec::new()));
    for (offset, code, access, why) in [
        (8, vendor::MISALIGNED, "reads 16 bytes", "misaligned"),
        (240, 700, "writes 16 bytes", "in no allocation and no pinned memory"),
        (256, 700, "reads 16 bytes", "in no allocation and no pinned memory"),
    ] {
        let (error, violations) = probe(&Sim::new(""), offset);
        assert!(error.unwrap().contains(&format!("failed with {code} ")), "{offset}");
        assert!(violations[0].contains(access) && violations[0].ends_with(why), "{violations:?}");
    }
}

#[test]
fn small_tensors_cost_no_more_calls_for_a_byte_than_large_ones() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let small = Model::open(misaligned(folder.path(), "small", 18_000, 401)).unwrap();
    let large = Model::open(misaligned(folder.path(), "large", 300, 24_060)).unwrap();
    let calls = |model: &Model, config: &str| {
        let sim = Sim::new(config);
        let loaded = model.load(&options()).unwrap();
        assert_same_bytes_of_some(model, &loaded);
        let (happened, copies) = (queued(&sim.report()), loaded.report.promised.copies);
        drop(loaded);
        sim.assert_clean(config);
        (happened, copies)
    };
    let (of_large, _) = calls(&large, "");
    for config in ["", "batches=0"] {
        let (of_small, copies) = calls(&small, config);
        assert!(copies >= 18_000, "{copies}");
        assert!(
            of_small * 2 < of_large * 3,
            "{config:?}: {of_small} calls for small tensors, {of_large} for large"
        );
    }
    // Without either way, each piece is a call.
    let (single, copies) = calls(&small, "batches=0;unified=0");
    assert!(single > copies, "{single} calls for {copies} copies");
}

#[test]
fn a_refused_scatter_is_told_and_the_bytes_arrive_one_by_one() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(misaligned(folder.path(), "small", 500, 401)).unwrap();
    for (call, code) in [(call::MODULE_LOAD, vendor::REFUSALS[0].0), (call::FUNCTION, 500), (call::LAUNCH, 1)]
    {
        let sim = Sim::new(&format!("batches=0;fail={call}:1:{code}"));
        let loaded = model.load(&options()).unwrap();
        assert_same_bytes(&model, &loaded);
        let told: Vec<_> = loaded.report.fallbacks.iter().map(|told| told.what.as_str()).collect();
        assert!(told.contains(&"small tensors are copied one by one instead of by a kernel"), "{told:?}");
        assert_eq!(sim.report().calls(call::COPY_IN), loaded.report.promised.copies);
        drop(loaded);
        sim.assert_clean(call);
    }
}

/// Opens a device, uses every kernel at least once, and closes it.
pub(crate) fn run_everything() -> Result<(), DeviceError> {
    let device = vendor::open(0)?;
    let (source, target) = (device.allocate(4096)?, device.allocate(4096)?);
    let place = |allocation| Location { allocation, offset_bytes: 0 };
    let cast = Operation::Cast(Cast {
        source: place(&source),
        source_dtype: Dtype::F32,
        target: place(&target),
        target_dtype: Dtype::Bf16,
        numel: 1000,
    });
    let strided = Operation::Strided(Strided {
        source: place(&source),
        source_stride_bytes: 8,
        target: place(&target),
        target_stride_bytes: 4,
        piece_len_bytes: 4,
        piece_count: 500,
    });
    for operation in [&cast, &strided, &cast] {
        // SAFETY: both allocations live until the event below was waited for.
        unsafe { device.run(operation, Stream::Compute)? };
    }
    device.wait(&device.record(Stream::Compute)?)
}

/// Calls that queue work; the others ask, or belong to opening.
fn queued(happened: &Happened) -> u64 {
    [call::COPY_IN, call::COPY_BATCH, call::LAUNCH, call::MODULE_LOAD, call::EVENT_RECORD]
        .into_iter()
        .map(|call| happened.calls(call))
        .sum()
}

/// A file of BF16 tensors at odd offsets: each goes to an aligned place of its own.
pub(crate) fn misaligned(folder: &Path, name: &str, count: usize, numel: usize) -> PathBuf {
    let mut header = String::from(r#"{"odd":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#);
    let mut at = 1;
    for number in 0..count {
        let end = at + 2 * numel;
        let _ = write!(
            header,
            r#","{name}.{number}.w":{{"dtype":"BF16","shape":[{numel}],"data_offsets":[{at},{end}]}}"#
        );
        at = end;
    }
    header.push('}');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend((0..at).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8));
    let path = folder.join(format!("{name}.safetensors"));
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Compares every hundredth tensor: each comparison is a round trip of its own.
fn assert_same_bytes_of_some(model: &Model, loaded: &tensorhaul::Loaded) {
    let device = vendor::open(0).unwrap();
    for (name, tensor) in loaded.tensors.iter().step_by(100) {
        let expected = model.tensor(name).unwrap();
        let expected = expected.bytes().unwrap();
        assert!(crate::suite::load::read_back(&device, tensor, expected.len()) == expected, "{name}");
    }
}
