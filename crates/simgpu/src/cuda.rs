//! The functions of NVIDIA's driver, over the simulated machine.
//!
//! # Safety
//! Each function asks of its caller what CUDA's reference asks: pointers that may be written, handles that live.

#![allow(non_snake_case, reason = "the driver's own names")]
#![allow(clippy::missing_safety_doc, reason = "one promise for all of them, above")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;

use crate::calls::{self, LaunchCall, MemAccess, array, calls, give};
use crate::core::{
    self, INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, Machine, NO_DEVICE, NOT_INITIALIZED, NOT_SUPPORTED,
};
use crate::ptx;
use crate::stream::{HostFunction, Rows};

calls! {
    through core::call;

    fn cuDriverGetVersion(version: *mut c_int) |_machine| give!(version, 12_000);
    fn cuDeviceGetCount(count: *mut c_int) |machine| {
        if !machine.initialized { return Err(NOT_INITIALIZED) }
        give!(count, machine.devices.len() as c_int)
    };
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) |machine| {
        if ordinal < 0 || ordinal as usize >= machine.devices.len() { return Err(INVALID_DEVICE) }
        give!(device, ordinal)
    };
    fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) |_machine| {
        text(name, len, &format!("Simulated GPU {device}"))
    };
    fn cuDeviceGetPCIBusId(name: *mut c_char, len: c_int, device: c_int) |_machine| {
        // A domain that no machine has, so that nothing is read of a real device's place.
        text(name, len, &format!("ffff:{device:02x}:00.0"))
    };
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) |machine| {
        let unified = c_int::from(machine.config.unified);
        give!(value, match attribute { 75 => 8, 76 => 0, 18 => machine.config.integrated.into(), 16 => 2, 19 | 41 | 91 => unified, 115 => 1, 134 => machine.config.host_node.ok_or(INVALID_VALUE)? as c_int, _ => return Err(INVALID_VALUE) })
    };
    fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) |machine| give!(bytes, machine.config.memory_bytes as usize);

    fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) |machine| {
        machine.devices[device as usize].retained += 1;
        give!(context, ptr::without_provenance_mut(device as usize + 1))
    };
    fn cuCtxGetCurrent(context: *mut *mut c_void) |machine| give!(context, ptr::without_provenance_mut(machine.current()));
    fn cuCtxSetCurrent(context: *mut c_void) |machine| {
        if context.addr() > machine.devices.len() { return Err(INVALID_CONTEXT) }
        machine.set_current(context.addr());
        Ok(())
    };
    fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) |machine| {
        // SAFETY: the caller passes a pointer that may be read.
        let wanted = unsafe { *mode };
        give!(mode, machine.exchange_capture_mode(wanted)?)
    };
    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) |machine| {
        give!(can, machine.can_access_peer(device, peer)?)
    };
    fn cuCtxEnablePeerAccess(context: *mut c_void, flags: c_uint) |machine| {
        let peer = peer(machine, context)?;
        machine.enable_peer(peer, flags)
    };
    fn cuCtxDisablePeerAccess(context: *mut c_void) |machine| {
        let peer = peer(machine, context)?;
        machine.disable_peer(peer)
    };
    fn cuDeviceGetMemPool(pool: *mut *mut c_void, device: c_int) |machine| give!(pool, machine.pool_of(device)?);
    fn cuMemPoolSetAccess(pool: *mut c_void, access: *const MemAccess, count: usize) |machine| {
        // SAFETY: the caller passes `count` descriptions.
        machine.open_pool(pool.addr(), unsafe { array(access, count) })
    };
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) |machine| {
        let (free_bytes, total_bytes) = machine.memory()?;
        give!(free, free_bytes)?;
        give!(total, total_bytes)
    };

    fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) |machine| give!(stream, machine.stream_create()?);
    fn cuStreamWaitEvent(stream: *mut c_void, event: *mut c_void, _flags: c_uint) |machine| {
        machine.stream_wait_event(stream.addr(), event.addr())
    };
    fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) |machine| give!(event, machine.event_create()?);
    fn cuEventDestroy_v2(event: *mut c_void) |machine| machine.event_destroy(event.addr());
    fn cuEventRecord(event: *mut c_void, stream: *mut c_void) |machine| machine.event_record(event.addr(), stream.addr());
    fn cuEventQuery(event: *mut c_void) |machine| machine.event_query(event.addr());

    fn cuMemAlloc_v2(address: *mut u64, len: usize) |machine| give!(address, machine.allocate(len as u64)?);
    fn cuMemAllocAsync(address: *mut u64, len: usize, stream: *mut c_void) |machine| {
        give!(address, machine.allocate_ordered(len, stream.addr())?)
    };
    fn cuMemFreeAsync(address: u64, stream: *mut c_void) |machine| machine.free_ordered(address, stream.addr());
    // Unified addressing: kernels reach pinned memory by the host's address.
    fn cuMemHostAlloc(start: *mut *mut c_void, len: usize, _flags: c_uint) |machine| give!(start, machine.host_allocate(len, true)?);
    fn cuMemFreeHost(start: *mut c_void) |machine| machine.host_free(start);
    fn cuMemHostRegister_v2(start: *mut c_void, len: usize, _flags: c_uint) |machine| machine.host_register(start, len, true);
    fn cuMemHostUnregister(start: *mut c_void) |machine| machine.host_unregister(start);
    fn cuMemHostGetDevicePointer_v2(address: *mut u64, start: *mut c_void, _flags: c_uint) |machine| {
        give!(address, machine.host_address(start)?)
    };

    fn cuMemcpyHtoDAsync_v2(target: u64, source: *const c_void, len: usize, stream: *mut c_void) |machine| {
        machine.copy_in(target, source, len, stream.addr())
    };
    fn cuMemcpyDtoHAsync_v2(target: *mut c_void, source: u64, len: usize, stream: *mut c_void) |machine| {
        machine.copy_out(target, source, len, stream.addr())
    };
    fn cuMemcpyBatchAsync(
        targets: *mut u64, sources: *mut u64, lens: *mut usize, count: usize, attributes: *mut c_uint,
        first_with_attributes: *mut usize, attribute_count: usize, failed: *mut usize, stream: *mut c_void,
    ) |machine| {
        if !machine.config.batches { return Err(NOT_SUPPORTED) }
        if count == 0 || attribute_count == 0 || stream.is_null() { return Err(INVALID_VALUE) }
        // SAFETY: the caller passes sets of attributes, each of which begins with the order of accesses.
        let order = unsafe { *attributes };
        // SAFETY: as many numbers as sets: of the piece that each is for first.
        let first = unsafe { *first_with_attributes };
        if !(1..=3).contains(&order) || first != 0 { return Err(INVALID_VALUE) }
        // SAFETY: the caller passes arrays of `count` entries.
        let (targets, sources) = (unsafe { array(targets, count) }, unsafe { array(sources, count) });
        // SAFETY: as above.
        let lens = unsafe { array(lens, count) };
        machine.copy_batch(targets, sources, lens, stream.addr()).or_else(|(piece, code)| {
            give!(failed, piece)?;
            Err(code)
        })
    };
    fn cuMemcpyDtoDAsync_v2(target: u64, source: u64, len: usize, stream: *mut c_void) |machine| {
        machine.copy_on_device(target, source, len, stream.addr())
    };
    fn cuMemcpyPeerAsync(
        target: u64, target_context: *mut c_void, source: u64, source_context: *mut c_void, len: usize, stream: *mut c_void,
    ) |machine| {
        let [to, from] = [target_context, source_context].map(|context| device_of(machine, context));
        machine.copy_peer((to?, target), (from?, source), len, stream.addr())
    };
    fn cuLaunchHostFunc(stream: *mut c_void, function: HostFunction, data: *mut c_void) |machine| {
        machine.host_call(stream.addr(), function, data)
    };
    fn cuMemcpy2DAsync_v2(rows: *const Memcpy2d, stream: *mut c_void) |machine| {
        // SAFETY: the caller passes a struct that may be read.
        let rows = unsafe { &*rows };
        if (rows.src_memory_type, rows.dst_memory_type) != (HOST_MEMORY, DEVICE_MEMORY) { return Err(INVALID_VALUE) }
        let (source, target) = (rows.src_host.expose_provenance(), rows.dst_device as usize);
        machine.copy_rows_in(Rows {
            source, source_stride: rows.src_pitch, target, target_stride: rows.dst_pitch, row_len: rows.width, row_count: rows.height,
        }, stream.addr())
    };

    fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_char) |machine| {
        // SAFETY: the caller passes PTX, terminated.
        let text = unsafe { CStr::from_ptr(image) };
        let entries = text.to_str().ok().and_then(ptx::entries).ok_or(INVALID_PTX)?;
        give!(module, machine.module_load(entries)?)
    };
    fn cuModuleUnload(module: *mut c_void) |machine| machine.module_unload(module.addr());
    fn cuModuleGetFunction(function: *mut *mut c_void, module: *mut c_void, name: *const c_char) |machine| {
        // SAFETY: the caller passes a terminated string.
        let name = unsafe { CStr::from_ptr(name) };
        give!(function, machine.function(module.addr(), name.to_bytes())?)
    };
    fn cuLaunchKernel(
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

/// Makes the machine ready; with no device it answers as a driver without one.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuInit(_flags: c_uint) -> c_int {
    core::call("cuInit", |machine| {
        machine.initialized = true;
        if machine.devices.is_empty() { Err(NO_DEVICE) } else { Ok(()) }
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuGetErrorName(code: c_int, name: *mut *const c_char) -> c_int {
    let known = ERROR_NAMES.iter().find(|(number, _)| *number == code);
    let found = known.map_or(ptr::null(), |(_, name)| name.as_ptr());
    // SAFETY: the caller passes a pointer that may be written.
    unsafe { name.write(found) };
    if found.is_null() { INVALID_VALUE } else { 0 }
}

// The calls below wait, so they must not hold the machine meanwhile.

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> c_int {
    let mut ended = None;
    let code = core::call("cuDevicePrimaryCtxRelease_v2", |machine| {
        let device = machine.devices.get_mut(device as usize).ok_or(INVALID_DEVICE)?;
        device.retained = device.retained.checked_sub(1).ok_or(INVALID_CONTEXT)?;
        if device.retained == 0 {
            ended = device.default_stream.take();
            device.peers.clear();
        }
        Ok(())
    });
    if let Some(stream) = ended {
        stream.end();
    }
    code
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> c_int {
    calls::stream_destroy("cuStreamDestroy_v2", stream.addr())
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuStreamSynchronize(stream: *mut c_void) -> c_int {
    calls::stream_wait("cuStreamSynchronize", stream.addr())
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuEventSynchronize(event: *mut c_void) -> c_int {
    calls::event_wait("cuEventSynchronize", event.addr())
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    calls::free("cuMemFree_v2", address)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuCtxSynchronize() -> c_int {
    calls::device_wait("cuCtxSynchronize")
}

/// Returns the index of the device of a context.
fn device_of(machine: &Machine, context: *mut c_void) -> Result<usize, i32> {
    context.addr().checked_sub(1).filter(|device| *device < machine.devices.len()).ok_or(INVALID_CONTEXT)
}

/// Returns the index of the device of a context that is not the current one.
fn peer(machine: &Machine, context: *mut c_void) -> Result<usize, i32> {
    if context.addr() == machine.current() { Err(INVALID_CONTEXT) } else { device_of(machine, context) }
}

fn text(target: *mut c_char, len: c_int, text: &str) -> Result<(), i32> {
    // SAFETY: the caller passes `len` writable bytes.
    unsafe { core::write_text(target, len.max(0) as usize, text) };
    Ok(())
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub(crate) struct Memcpy2d {
    src_x: usize,
    src_y: usize,
    src_memory_type: c_uint,
    src_host: *const c_void,
    src_device: u64,
    src_array: *mut c_void,
    src_pitch: usize,
    dst_x: usize,
    dst_y: usize,
    dst_memory_type: c_uint,
    dst_host: *mut c_void,
    dst_device: u64,
    dst_array: *mut c_void,
    dst_pitch: usize,
    width: usize,
    height: usize,
}

impl Memcpy2d {
    /// Describes a copy of rows from host to device.
    pub(crate) fn to_device(
        target: u64,
        target_stride: usize,
        source: *const c_void,
        source_stride: usize,
        row_len: usize,
        row_count: usize,
    ) -> Memcpy2d {
        Memcpy2d {
            src_x: 0,
            src_y: 0,
            src_memory_type: HOST_MEMORY,
            src_host: source,
            src_device: 0,
            src_array: ptr::null_mut(),
            src_pitch: source_stride,
            dst_x: 0,
            dst_y: 0,
            dst_memory_type: DEVICE_MEMORY,
            dst_host: ptr::null_mut(),
            dst_device: target,
            dst_array: ptr::null_mut(),
            dst_pitch: target_stride,
            width: row_len,
            height: row_count,
        }
    }
}

/// `CU_MEMORYTYPE_HOST` and `CU_MEMORYTYPE_DEVICE`.
const HOST_MEMORY: c_uint = 1;
const DEVICE_MEMORY: c_uint = 2;

const LAUNCH_PARAM_END: usize = 0;

const INVALID_PTX: i32 = 218;

const ERROR_NAMES: &[(c_int, &std::ffi::CStr)] = &[
    (1, c"CUDA_ERROR_INVALID_VALUE"),
    (2, c"CUDA_ERROR_OUT_OF_MEMORY"),
    (3, c"CUDA_ERROR_NOT_INITIALIZED"),
    (46, c"CUDA_ERROR_DEVICE_UNAVAILABLE"),
    (100, c"CUDA_ERROR_NO_DEVICE"),
    (101, c"CUDA_ERROR_INVALID_DEVICE"),
    (201, c"CUDA_ERROR_INVALID_CONTEXT"),
    (209, c"CUDA_ERROR_NO_BINARY_FOR_GPU"),
    (217, c"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"),
    (218, c"CUDA_ERROR_INVALID_PTX"),
    (221, c"CUDA_ERROR_JIT_COMPILER_NOT_FOUND"),
    (222, c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
    (400, c"CUDA_ERROR_INVALID_HANDLE"),
    (500, c"CUDA_ERROR_NOT_FOUND"),
    (600, c"CUDA_ERROR_NOT_READY"),
    (700, c"CUDA_ERROR_ILLEGAL_ADDRESS"),
    (704, c"CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"),
    (705, c"CUDA_ERROR_PEER_ACCESS_NOT_ENABLED"),
    (716, c"CUDA_ERROR_MISALIGNED_ADDRESS"),
    (719, c"CUDA_ERROR_LAUNCH_FAILED"),
    (801, c"CUDA_ERROR_NOT_SUPPORTED"),
    (802, c"CUDA_ERROR_SYSTEM_NOT_READY"),
    (803, c"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
    (804, c"CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE"),
];
