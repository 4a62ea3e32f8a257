//! The functions of AMD's HIP runtime, over the simulated machine.
//!
//! HIP has no contexts: a thread has a current device, the first unless it says another, and the status of its last failed
//! call, which [`hipGetLastError`] takes. Where the configuration says so, calls go to a CUDA driver instead: [`crate::forward`].
//!
//! # Safety
//! Each function asks of its caller what HIP's reference asks: pointers that may be written, handles that live.

#![allow(non_snake_case, reason = "the runtime's own names")]
#![allow(clippy::missing_safety_doc, reason = "one promise for all of them, above")]

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use crate::calls::{self, LaunchCall, MemAccess, array, calls, give};
use crate::code_object::CodeObject;
use crate::core::{self, INVALID_DEVICE, INVALID_VALUE, Machine, NO_DEVICE, NOT_SUPPORTED};
use crate::forward::Driver;
use crate::kernels::MISALIGNED_ADDRESS;
use crate::stream::{HostFunction, Rows};

thread_local! {
    /// What `hipGetLastError` tells.
    static LAST: Cell<c_int> = const { Cell::new(0) };
}

/// Makes a call as HIP's are: on the first device, unless the thread chose one, and with a status that is kept.
fn call(name: &'static str, act: impl FnOnce(&mut Machine) -> Result<(), i32>) -> c_int {
    through(|| core::call(name, act))
}

/// Makes a call on the driver that calls are forwarded to; `None` where they are not. Counted, and made to fail, as every other;
/// the machine is let go of meanwhile, so that threads meet in the driver and not here.
fn forward(name: &'static str, act: impl FnOnce(&Driver) -> Result<(), i32>) -> Option<c_int> {
    let forwarding = core::with(|machine| machine.forwarding)?;
    Some(through(|| match core::call(name, |_machine| Ok(())) {
        0 => forwarding.driver().and_then(act).err().unwrap_or(0),
        code => code,
    }))
}

fn through(call: impl FnOnce() -> c_int) -> c_int {
    core::with(|machine| {
        if machine.current() == 0 && !machine.devices.is_empty() {
            machine.set_current(1);
        }
    });
    let code = match call() {
        // HIP has no name of its own for this one.
        MISALIGNED_ADDRESS => LAUNCH_FAILURE,
        code => code,
    };
    if code != 0 {
        LAST.set(code);
    }
    code
}

calls! {
    through call, or forward;

    // As ROCm 5.2 answers where there is no device.
    fn hipInit(_flags: c_uint) |machine| if machine.devices.is_empty() { Err(INVALID_DEVICE) } else { Ok(()) };
    fn hipRuntimeGetVersion(version: *mut c_int) |_machine| give!(version, VERSION);
    fn hipGetDeviceCount(count: *mut c_int) |machine| {
        give!(count, machine.devices.len() as c_int)?;
        if machine.devices.is_empty() { Err(NO_DEVICE) } else { Ok(()) }
    };
    fn hipGetDevice(device: *mut c_int) |machine| give!(device, machine.current() as c_int - 1);
    fn hipSetDevice(device: c_int) |machine| {
        check_device(machine, device)?;
        machine.set_current(device as usize + 1);
        Ok(())
    };
    fn hipDeviceGetName(name: *mut c_char, len: c_int, device: c_int) |machine| {
        check_device(machine, device)?;
        text(name, len, &format!("Simulated GPU {device}"))
    };
    fn hipDeviceGetPCIBusId(name: *mut c_char, len: c_int, device: c_int) |machine| {
        check_device(machine, device)?;
        // A domain that no machine has, so that nothing is read of a real device's place.
        text(name, len, &format!("ffff:{device:02x}:00.0"))
    };
    fn hipDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) |machine| {
        check_device(machine, device)?;
        let unified = c_int::from(machine.config.unified);
        give!(value, match attribute { 3 => unified, 16 => machine.config.integrated.into(), 63 => 2, 92 => machine.config.host_node.ok_or(INVALID_VALUE)? as c_int, _ => return Err(INVALID_VALUE) })
    };
    fn hipDeviceTotalMem(bytes: *mut usize, device: c_int) |machine| {
        check_device(machine, device)?;
        give!(bytes, machine.config.memory_bytes as usize)
    };
    fn hipGetDeviceProperties(properties: *mut u8, device: c_int) |machine| {
        check_device(machine, device)?;
        describe(properties, PROPERTIES, &machine.config.gfx);
        Ok(())
    };
    fn hipGetDevicePropertiesR0600(properties: *mut u8, device: c_int) |machine| {
        check_device(machine, device)?;
        describe(properties, PROPERTIES_R0600, &machine.config.gfx);
        Ok(())
    };
    fn hipThreadExchangeStreamCaptureMode(mode: *mut c_int) |machine| {
        // SAFETY: the caller passes a pointer that may be read.
        let wanted = unsafe { *mode };
        give!(mode, machine.exchange_capture_mode(wanted)?)
    };
    fn hipDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) |machine| {
        give!(can, machine.can_access_peer(device, peer)?)
    };
    fn hipDeviceEnablePeerAccess(peer: c_int, flags: c_uint) |machine| {
        check_peer(machine, peer)?;
        machine.enable_peer(peer as usize, flags)
    };
    fn hipDeviceDisablePeerAccess(peer: c_int) |machine| {
        check_peer(machine, peer)?;
        machine.disable_peer(peer as usize)
    };
    fn hipDeviceGetMemPool(pool: *mut *mut c_void, device: c_int) |machine| give!(pool, machine.pool_of(device)?);
    fn hipMemPoolSetAccess(pool: *mut c_void, access: *const MemAccess, count: usize) |machine| {
        // SAFETY: the caller passes `count` descriptions.
        machine.open_pool(pool.addr(), unsafe { array(access, count) })
    };
    fn hipMemGetInfo(free: *mut usize, total: *mut usize) |machine| {
        let (free_bytes, total_bytes) = machine.memory()?;
        give!(free, free_bytes)?;
        give!(total, total_bytes)
    };

    fn hipStreamCreateWithFlags(stream: *mut *mut c_void, _flags: c_uint) |machine| give!(stream, machine.stream_create()?);
    fn hipStreamWaitEvent(stream: *mut c_void, event: *mut c_void, _flags: c_uint) |machine| {
        machine.stream_wait_event(stream.addr(), event.addr())
    };
    fn hipEventCreateWithFlags(event: *mut *mut c_void, _flags: c_uint) |machine| give!(event, machine.event_create()?);
    fn hipEventDestroy(event: *mut c_void) |machine| machine.event_destroy(event.addr());
    fn hipEventRecord(event: *mut c_void, stream: *mut c_void) |machine| machine.event_record(event.addr(), stream.addr());
    fn hipEventQuery(event: *mut c_void) |machine| machine.event_query(event.addr());

    fn hipMalloc(address: *mut u64, len: usize) |machine| give!(address, machine.allocate(len as u64)?);
    fn hipMallocAsync(address: *mut u64, len: usize, stream: *mut c_void) |machine| {
        give!(address, machine.allocate_ordered(len, stream.addr())?)
    };
    fn hipFreeAsync(address: u64, stream: *mut c_void) |machine| machine.free_ordered(address, stream.addr());
    fn hipHostMalloc(start: *mut *mut c_void, len: usize, _flags: c_uint) |machine| give!(start, machine.host_allocate(len, true)?);
    fn hipHostFree(start: *mut c_void) |machine| machine.host_free(start);
    // Where registered memory is for kernels, `hipHostGetDevicePointer` has to be asked.
    fn hipHostRegister(start: *mut c_void, len: usize, _flags: c_uint) |machine| machine.host_register(start, len, false);
    fn hipHostUnregister(start: *mut c_void) |machine| machine.host_unregister(start);
    fn hipHostGetDevicePointer(address: *mut u64, start: *mut c_void, _flags: c_uint) |machine| {
        give!(address, machine.host_address(start)?)
    };

    fn hipMemcpyHtoDAsync(target: u64, source: *const c_void, len: usize, stream: *mut c_void) |machine| {
        machine.copy_in(target, source, len, stream.addr())
    };
    fn hipMemcpyDtoHAsync(target: *mut c_void, source: u64, len: usize, stream: *mut c_void) |machine| {
        machine.copy_out(target, source, len, stream.addr())
    };
    fn hipMemcpyBatchAsync(
        targets: *mut u64, sources: *mut u64, lens: *mut usize, count: usize, attributes: *mut c_void,
        first_with_attributes: *mut usize, attribute_count: usize, failed: *mut usize, stream: *mut c_void,
    ) |machine| {
        if !machine.config.batches { return Err(NOT_SUPPORTED) }
        let lacks_attributes = attributes.is_null() || first_with_attributes.is_null();
        if count == 0 || attribute_count > 0 && lacks_attributes { return Err(INVALID_VALUE) }
        // SAFETY: the caller passes arrays of `count` entries.
        let (targets, sources) = (unsafe { array(targets, count) }, unsafe { array(sources, count) });
        // SAFETY: as above.
        let lens = unsafe { array(lens, count) };
        machine.copy_batch(targets, sources, lens, stream.addr()).or_else(|(piece, code)| {
            give!(failed, piece)?;
            Err(code)
        })
    };
    fn hipMemcpy2DAsync(
        target: *mut c_void, target_stride: usize, source: *const c_void, source_stride: usize, row_len: usize, row_count: usize,
        kind: c_int, stream: *mut c_void,
    ) |machine| {
        if kind != HOST_TO_DEVICE { return Err(INVALID_VALUE) }
        let (source, target) = (source.expose_provenance(), target.addr());
        machine.copy_rows_in(Rows { source, source_stride, target, target_stride, row_len, row_count }, stream.addr())
    };
    fn hipMemcpyDtoDAsync(target: u64, source: u64, len: usize, stream: *mut c_void) |machine| {
        machine.copy_on_device(target, source, len, stream.addr())
    };
    fn hipMemcpyPeerAsync(
        target: u64, target_device: c_int, source: u64, source_device: c_int, len: usize, stream: *mut c_void,
    ) |machine| {
        for device in [target_device, source_device] {
            check_device(machine, device)?;
        }
        machine.copy_peer((target_device as usize, target), (source_device as usize, source), len, stream.addr())
    };
    fn hipLaunchHostFunc(stream: *mut c_void, function: HostFunction, data: *mut c_void) |machine| {
        machine.host_call(stream.addr(), function, data)
    };

    fn hipModuleLoadData(module: *mut *mut c_void, image: *const u8) |machine| {
        // SAFETY: the caller passes a code object.
        let object = unsafe { CodeObject::read(image) }.ok_or(INVALID_IMAGE)?;
        if !object.is_for(&machine.config.gfx) { return Err(NO_BINARY_FOR_GPU) }
        give!(module, machine.module_load(object.entries)?)
    };
    fn hipModuleUnload(module: *mut c_void) |machine| machine.module_unload(module.addr());
    fn hipModuleGetFunction(function: *mut *mut c_void, module: *mut c_void, name: *const c_char) |machine| {
        // SAFETY: the caller passes a terminated string.
        let name = unsafe { CStr::from_ptr(name) };
        give!(function, machine.function(module.addr(), name.to_bytes())?)
    };
    fn hipModuleLaunchKernel(
        function: *mut c_void, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint,
        shared_bytes: c_uint, stream: *mut c_void, params: *mut *mut c_void, extra: *mut *mut c_void,
    ) |machine| {
        let (function, stream) = (function.addr(), stream.addr());
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let call = LaunchCall { function, grid, block, shared_bytes, stream, params, extra, end_key: LAUNCH_PARAM_END };
        // SAFETY: the caller passes parameters or a list of them, as the reference asks.
        unsafe { machine.launch(&call) }
    };
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipGetErrorName(code: c_int) -> *const c_char {
    let known = ERROR_NAMES.iter().find(|(number, _)| *number == code);
    known.map_or(c"hipErrorUnknown", |(_, name)| name).as_ptr()
}

/// Returns the status of the thread's last call that failed, and forgets it.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipGetLastError() -> c_int {
    LAST.replace(0)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipStreamDestroy(stream: *mut c_void) -> c_int {
    let to = |driver: &Driver| {
        // SAFETY: the caller's promise.
        unsafe { driver.hipStreamDestroy(stream) }
    };
    if let Some(code) = forward("hipStreamDestroy", to) {
        return code;
    }
    through(|| calls::stream_destroy("hipStreamDestroy", stream.addr()))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipStreamSynchronize(stream: *mut c_void) -> c_int {
    let to = |driver: &Driver| {
        // SAFETY: the caller's promise.
        unsafe { driver.hipStreamSynchronize(stream) }
    };
    if let Some(code) = forward("hipStreamSynchronize", to) {
        return code;
    }
    through(|| calls::stream_wait("hipStreamSynchronize", stream.addr()))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipEventSynchronize(event: *mut c_void) -> c_int {
    let to = |driver: &Driver| {
        // SAFETY: the caller's promise.
        unsafe { driver.hipEventSynchronize(event) }
    };
    if let Some(code) = forward("hipEventSynchronize", to) {
        return code;
    }
    through(|| calls::event_wait("hipEventSynchronize", event.addr()))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hipFree(address: u64) -> c_int {
    let to = |driver: &Driver| {
        // SAFETY: the caller's promise.
        unsafe { driver.hipFree(address) }
    };
    if let Some(code) = forward("hipFree", to) {
        return code;
    }
    through(|| calls::free("hipFree", address))
}

fn check_device(machine: &Machine, device: c_int) -> Result<(), i32> {
    if device < 0 || device as usize >= machine.devices.len() { Err(INVALID_DEVICE) } else { Ok(()) }
}

fn check_peer(machine: &Machine, peer: c_int) -> Result<(), i32> {
    check_device(machine, peer)?;
    if peer as usize + 1 == machine.current() { Err(INVALID_DEVICE) } else { Ok(()) }
}

fn text(target: *mut c_char, len: c_int, text: &str) -> Result<(), i32> {
    // SAFETY: the caller passes `len` writable bytes.
    unsafe { core::write_text(target, len.max(0) as usize, text) };
    Ok(())
}

/// Tells whether HIP has a status of this number.
pub(crate) fn is_known(code: c_int) -> bool {
    ERROR_NAMES.iter().any(|(number, _)| *number == code)
}

/// Fills a `hipDeviceProp_t` with the one field that the backend reads, which is where each version of the struct has it.
pub(crate) fn describe(properties: *mut u8, layout: PropertiesLayout, architecture: &str) {
    let PropertiesLayout { len, architecture_offset } = layout;
    // SAFETY: the caller passes a struct of this length.
    unsafe { properties.write_bytes(0, len) };
    // SAFETY: inside it.
    let field = unsafe { properties.add(architecture_offset) };
    // SAFETY: the field is 256 bytes long.
    unsafe { core::write_text(field.cast(), 256, architecture) };
}

/// How long a version of `hipDeviceProp_t` is, and where the architecture's name is in it.
#[derive(Clone, Copy)]
pub(crate) struct PropertiesLayout {
    len: usize,
    architecture_offset: usize,
}

/// Until ROCm 5, and since ROCm 6.
pub(crate) const PROPERTIES: PropertiesLayout = PropertiesLayout { len: 792, architecture_offset: 396 };
pub(crate) const PROPERTIES_R0600: PropertiesLayout =
    PropertiesLayout { len: 1472, architecture_offset: 1160 };

/// 7.1.
pub(crate) const VERSION: c_int = 70_100_000;

/// `hipMemcpyHostToDevice`.
pub(crate) const HOST_TO_DEVICE: c_int = 1;
/// `HIP_LAUNCH_PARAM_END`, which is not CUDA's 0.
pub(crate) const LAUNCH_PARAM_END: usize = 3;

pub(crate) const INVALID_IMAGE: i32 = 200;
const NO_BINARY_FOR_GPU: i32 = 209;
const LAUNCH_FAILURE: i32 = 719;

const ERROR_NAMES: &[(c_int, &CStr)] = &[
    (0, c"hipSuccess"),
    (1, c"hipErrorInvalidValue"),
    (2, c"hipErrorOutOfMemory"),
    (3, c"hipErrorNotInitialized"),
    (4, c"hipErrorDeinitialized"),
    (100, c"hipErrorNoDevice"),
    (101, c"hipErrorInvalidDevice"),
    (200, c"hipErrorInvalidImage"),
    (201, c"hipErrorInvalidContext"),
    (209, c"hipErrorNoBinaryForGpu"),
    (214, c"hipErrorECCNotCorrectable"),
    (217, c"hipErrorPeerAccessUnsupported"),
    (302, c"hipErrorSharedObjectSymbolNotFound"),
    (303, c"hipErrorSharedObjectInitFailed"),
    (304, c"hipErrorOperatingSystem"),
    (400, c"hipErrorInvalidHandle"),
    (500, c"hipErrorNotFound"),
    (600, c"hipErrorNotReady"),
    (700, c"hipErrorIllegalAddress"),
    (701, c"hipErrorLaunchOutOfResources"),
    (702, c"hipErrorLaunchTimeOut"),
    (704, c"hipErrorPeerAccessAlreadyEnabled"),
    (705, c"hipErrorPeerAccessNotEnabled"),
    (709, c"hipErrorContextIsDestroyed"),
    (710, c"hipErrorAssert"),
    (712, c"hipErrorHostMemoryAlreadyRegistered"),
    (713, c"hipErrorHostMemoryNotRegistered"),
    (719, c"hipErrorLaunchFailure"),
    (801, c"hipErrorNotSupported"),
    (900, c"hipErrorStreamCaptureUnsupported"),
    (901, c"hipErrorStreamCaptureInvalidated"),
    (906, c"hipErrorStreamCaptureImplicit"),
    (907, c"hipErrorCapturedEvent"),
    (908, c"hipErrorStreamCaptureWrongThread"),
    (999, c"hipErrorUnknown"),
];
