//! The functions of NVIDIA's driver, over the simulated machine.
//!
//! # Safety
//! Each function asks of its caller what CUDA's reference asks: pointers that may be written, handles that live.

#![allow(non_snake_case, reason = "the driver's own names")]
#![allow(clippy::missing_safety_doc, reason = "one promise for all of them, above")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::Arc;
use std::time::Instant;

use crate::core::{
    self, INVALID_CONTEXT, INVALID_DEVICE, INVALID_HANDLE, INVALID_PTX, INVALID_VALUE, Machine, NO_DEVICE,
    NOT_FOUND, NOT_INITIALIZED, NOT_READY, NOT_SUPPORTED, OUT_OF_MEMORY, PEER_ACCESS_ALREADY_ENABLED,
    PEER_ACCESS_NOT_ENABLED, PEER_ACCESS_UNSUPPORTED,
};
use crate::kernels::{HostKernel, Launch};
use crate::ptx;
use crate::stream::{Event, HostFunction, Rows, Stream, Work};

/// Writes a result through a caller's pointer.
macro_rules! write {
    ($target:expr, $value:expr) => {{
        let value = $value;
        // SAFETY: the caller passes a pointer that may be written.
        unsafe { $target.write(value) };
        Ok::<(), i32>(())
    }};
}

/// Exports functions that count themselves, may be made to fail, and else run on the machine.
macro_rules! calls {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) |$machine:ident| $body:expr;)*) => {
        $(
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
                core::call(stringify!($name), |$machine: &mut Machine| $body)
            }
        )*
    };
}

calls! {
    fn cuDriverGetVersion(version: *mut c_int) |_machine| write!(version, 12_000);
    fn cuDeviceGetCount(count: *mut c_int) |machine| {
        if !machine.initialized { return Err(NOT_INITIALIZED) }
        write!(count, machine.devices.len() as c_int)
    };
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) |machine| {
        if ordinal < 0 || ordinal as usize >= machine.devices.len() { return Err(INVALID_DEVICE) }
        write!(device, ordinal)
    };
    fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) |_machine| {
        text(name, len, &format!("Simulated GPU {device}"))
    };
    fn cuDeviceGetPCIBusId(name: *mut c_char, len: c_int, device: c_int) |_machine| {
        text(name, len, &format!("0000:{device:02x}:00.0"))
    };
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) |machine| {
        let unified = c_int::from(machine.config.unified);
        write!(value, match attribute { 75 => 8, 76 => 0, 18 => 0, 16 => 2, 41 | 91 => unified, 115 => 1, _ => return Err(INVALID_VALUE) })
    };
    fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) |machine| write!(bytes, machine.config.memory_bytes as usize);

    fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) |machine| {
        machine.devices[device as usize].retained += 1;
        write!(context, ptr::without_provenance_mut(device as usize + 1))
    };
    fn cuCtxGetCurrent(context: *mut *mut c_void) |machine| write!(context, ptr::without_provenance_mut(machine.current()));
    fn cuCtxSetCurrent(context: *mut c_void) |machine| {
        if context.addr() > machine.devices.len() { return Err(INVALID_CONTEXT) }
        machine.set_current(context.addr());
        Ok(())
    };
    fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) |machine| {
        // SAFETY: the caller passes a pointer that may be read.
        let wanted = unsafe { *mode };
        write!(mode, machine.exchange_capture_mode(wanted)?)
    };
    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) |machine| {
        let count = machine.devices.len() as c_int;
        if !(0..count).contains(&device) || !(0..count).contains(&peer) { return Err(INVALID_DEVICE) }
        write!(can, c_int::from(machine.config.peers && device != peer))
    };
    fn cuCtxEnablePeerAccess(context: *mut c_void, flags: c_uint) |machine| {
        let (peer, can) = (machine.peer(context.addr())?, machine.config.peers);
        let device = machine.current_device().ok_or(INVALID_CONTEXT)?;
        if flags != 0 { return Err(INVALID_VALUE) }
        if !can { return Err(PEER_ACCESS_UNSUPPORTED) }
        if device.peers.insert(peer) { Ok(()) } else { Err(PEER_ACCESS_ALREADY_ENABLED) }
    };
    fn cuCtxDisablePeerAccess(context: *mut c_void) |machine| {
        let peer = machine.peer(context.addr())?;
        let device = machine.current_device().ok_or(INVALID_CONTEXT)?;
        if device.peers.remove(&peer) { Ok(()) } else { Err(PEER_ACCESS_NOT_ENABLED) }
    };
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) |machine| {
        let capacity = machine.config.memory_bytes;
        let device = machine.current_device().ok_or(INVALID_CONTEXT)?;
        let held = device.used_bytes + device.reserved_bytes;
        write!(total, capacity as usize)?;
        write!(free, (capacity - held) as usize)
    };

    fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) |machine| {
        let device = machine.current().checked_sub(1).ok_or(INVALID_CONTEXT)?;
        let handle = machine.new_handle();
        machine.streams.insert(handle, Arc::new(Stream::start(&machine.config, device)));
        write!(stream, ptr::without_provenance_mut(handle))
    };
    fn cuStreamWaitEvent(stream: *mut c_void, event: *mut c_void, _flags: c_uint) |machine| {
        let (stream, event) = (machine.stream(stream.addr())?, machine.event(event.addr())?);
        let recording = event.recorded();
        stream.queue(Work::Wait(event, recording));
        Ok(())
    };
    fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) |machine| {
        if machine.current_device().is_none() { return Err(INVALID_CONTEXT) }
        let handle = machine.new_handle();
        machine.events.insert(handle, Arc::new(Event::default()));
        write!(event, ptr::without_provenance_mut(handle))
    };
    fn cuEventDestroy_v2(event: *mut c_void) |machine| {
        machine.event(event.addr())?;
        machine.events.remove(&event.addr());
        Ok(())
    };
    fn cuEventRecord(event: *mut c_void, stream: *mut c_void) |machine| {
        let (event, stream) = (machine.event(event.addr())?, machine.stream(stream.addr())?);
        let recording = event.record();
        stream.queue(Work::Complete(event, recording));
        Ok(())
    };
    fn cuEventQuery(event: *mut c_void) |machine| {
        let event = machine.event(event.addr())?;
        if event.is_complete(event.recorded()) { Ok(()) } else { Err(NOT_READY) }
    };

    fn cuMemAlloc_v2(address: *mut u64, len: usize) |machine| write!(address, machine.allocate(len as u64)?);
    fn cuMemAllocAsync(address: *mut u64, len: usize, stream: *mut c_void) |machine| {
        if !machine.config.pools { return Err(NOT_SUPPORTED) }
        machine.stream(stream.addr())?;
        write!(address, machine.allocate(len as u64)?)
    };
    fn cuMemFreeAsync(address: u64, stream: *mut c_void) |machine| {
        let stream = machine.stream(stream.addr())?;
        machine.give_back(address)?;
        stream.queue(Work::Free(address));
        Ok(())
    };
    fn cuMemHostAlloc(start: *mut *mut c_void, len: usize, _flags: c_uint) |machine| {
        // SAFETY: plain allocation; page-aligned, as the driver's is.
        let memory = unsafe { libc::aligned_alloc(4096, len.next_multiple_of(4096)) };
        if memory.is_null() { return Err(OUT_OF_MEMORY) }
        machine.pinned.insert(memory.addr(), (len, true));
        write!(start, memory)
    };
    fn cuMemFreeHost(start: *mut c_void) |machine| {
        match machine.pinned.remove(&start.addr()) {
            Some((_, true)) => {
                // SAFETY: allocated above.
                unsafe { libc::free(start) };
                Ok(())
            }
            _ => Err(INVALID_VALUE),
        }
    };
    fn cuMemHostRegister_v2(start: *mut c_void, len: usize, _flags: c_uint) |machine| {
        machine.pinned.insert(start.addr(), (len, false));
        Ok(())
    };
    fn cuMemHostUnregister(start: *mut c_void) |machine| {
        match machine.pinned.remove(&start.addr()) {
            Some((_, false)) => Ok(()),
            _ => Err(INVALID_VALUE),
        }
    };

    fn cuMemcpyHtoDAsync_v2(target: u64, source: *const c_void, len: usize, stream: *mut c_void) |machine| {
        let device = machine.stream(stream.addr())?.device;
        machine.check_device_range(device, target, len as u64)?;
        machine.check_pinned(source.addr(), len);
        let (source, target) = (source.expose_provenance(), target as usize);
        copy(machine, stream, Rows { source, source_stride: 0, target, target_stride: 0, row_len: len, row_count: 1 })
    };
    fn cuMemcpyDtoHAsync_v2(target: *mut c_void, source: u64, len: usize, stream: *mut c_void) |machine| {
        let device = machine.stream(stream.addr())?.device;
        machine.check_device_range(device, source, len as u64)?;
        machine.check_pinned(target.addr(), len);
        let (source, target) = (source as usize, target.expose_provenance());
        copy(machine, stream, Rows { source, source_stride: 0, target, target_stride: 0, row_len: len, row_count: 1 })
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
        let device = machine.stream(stream.addr())?.device;
        for piece in 0..count {
            let (target, source, len) = (targets[piece], sources[piece] as usize, lens[piece]);
            if let Err(code) = machine.check_device_range(device, target, len as u64) {
                write!(failed, piece)?;
                return Err(code);
            }
            machine.check_pinned(source, len);
            let target = target as usize;
            copy(machine, stream, Rows { source, source_stride: 0, target, target_stride: 0, row_len: len, row_count: 1 })?;
        }
        Ok(())
    };
    fn cuMemcpyDtoDAsync_v2(target: u64, source: u64, len: usize, stream: *mut c_void) |machine| {
        let device = machine.stream(stream.addr())?.device;
        machine.check_device_range(device, source, len as u64)?;
        machine.check_device_range(device, target, len as u64)?;
        let (source, target) = (source as usize, target as usize);
        copy(machine, stream, Rows { source, source_stride: 0, target, target_stride: 0, row_len: len, row_count: 1 })
    };
    // Needs no access enabled: without it, a driver carries the bytes through the host.
    fn cuMemcpyPeerAsync(
        target: u64, target_context: *mut c_void, source: u64, source_context: *mut c_void, len: usize, stream: *mut c_void,
    ) |machine| {
        for (context, address) in [(source_context, source), (target_context, target)] {
            let named = context.addr().checked_sub(1).filter(|device| *device < machine.devices.len());
            let named = named.ok_or(INVALID_CONTEXT)?;
            if machine.owner(address, len as u64) != Some(named) {
                machine.violations.push(format!("{len} bytes at {address:#x} are not inside an allocation of device {named}"));
                return Err(INVALID_VALUE);
            }
        }
        let (source, target) = (source as usize, target as usize);
        copy(machine, stream, Rows { source, source_stride: 0, target, target_stride: 0, row_len: len, row_count: 1 })
    };
    fn cuLaunchHostFunc(stream: *mut c_void, function: HostFunction, data: *mut c_void) |machine| {
        machine.stream(stream.addr())?.queue(Work::Call(function, data.expose_provenance()));
        Ok(())
    };
    fn cuMemcpy2DAsync_v2(rows: *const Memcpy2d, stream: *mut c_void) |machine| {
        // SAFETY: the caller passes a struct that may be read.
        let rows = unsafe { &*rows };
        if (rows.src_memory_type, rows.dst_memory_type) != (1, 2) || rows.width > rows.src_pitch || rows.width > rows.dst_pitch {
            return Err(INVALID_VALUE);
        }
        let reach = |pitch: usize| (rows.height - 1) * pitch + rows.width;
        let device = machine.stream(stream.addr())?.device;
        machine.check_device_range(device, rows.dst_device, reach(rows.dst_pitch) as u64)?;
        machine.check_pinned(rows.src_host.addr(), reach(rows.src_pitch));
        let (source, target) = (rows.src_host.expose_provenance(), rows.dst_device as usize);
        copy(machine, stream, Rows {
            source, source_stride: rows.src_pitch, target, target_stride: rows.dst_pitch, row_len: rows.width, row_count: rows.height,
        })
    };

    fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_char) |machine| {
        if machine.current_device().is_none() { return Err(INVALID_CONTEXT) }
        // SAFETY: the caller passes PTX, terminated.
        let text = unsafe { CStr::from_ptr(image) };
        let entries = text.to_str().ok().and_then(ptx::entries).ok_or(INVALID_PTX)?;
        let handle = machine.new_handle();
        machine.modules.insert(handle, entries);
        write!(module, ptr::without_provenance_mut(handle))
    };
    fn cuModuleUnload(module: *mut c_void) |machine| {
        machine.modules.remove(&module.addr()).ok_or(INVALID_HANDLE)?;
        machine.functions.retain(|_, (of, _)| *of != module.addr());
        Ok(())
    };
    fn cuModuleGetFunction(function: *mut *mut c_void, module: *mut c_void, name: *const c_char) |machine| {
        // SAFETY: the caller passes a terminated string.
        let name = unsafe { CStr::from_ptr(name) };
        let entries = machine.modules.get(&module.addr()).ok_or(INVALID_HANDLE)?;
        let entry = entries.iter().find(|entry| entry.name.as_bytes() == name.to_bytes()).ok_or(NOT_FOUND)?.clone();
        let handle = machine.new_handle();
        machine.functions.insert(handle, (module.addr(), entry));
        write!(function, ptr::without_provenance_mut(handle))
    };
    fn cuLaunchKernel(
        function: *mut c_void, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint,
        shared_bytes: c_uint, stream: *mut c_void, params: *mut *mut c_void, extra: *mut *mut c_void,
    ) |machine| {
        let stream = machine.stream(stream.addr())?;
        let (_, entry) = machine.functions.get(&function.addr()).ok_or(INVALID_HANDLE)?.clone();
        let is_launch = grid_x > 0 && grid_x < 1 << 31 && (1..=1024).contains(&block_x) && shared_bytes <= 48 << 10;
        // SAFETY: the caller passes one of the two, as the reference asks.
        let params = unsafe { launch_params(params, extra, entry.params_len) }?;
        if !is_launch || [grid_y, grid_z, block_y, block_z] != [1; 4] { return Err(INVALID_VALUE) }
        let Some(kernel) = HostKernel::find(&entry.name) else {
            machine.violations.push(format!("kernel {} has no build for the host", entry.name));
            return Err(NOT_FOUND);
        };
        if u64::from(kernel.params_len()) != entry.params_len {
            let (host, ptx) = (kernel.params_len(), entry.params_len);
            machine.violations.push(format!("kernel {}: {host} bytes of parameters on the host, {ptx} in the PTX", entry.name));
            return Err(INVALID_VALUE);
        }
        let device = stream.device;
        stream.queue(Work::Launch(Launch { kernel, threads: grid_x * block_x, params, device }));
        Ok(())
    };
}

/// Copies the parameters of a launch, given as one pointer for the one parameter that kernels have, or as one buffer.
///
/// # Safety
/// `params` is null, or points to a pointer to `len` bytes; `extra` is null, or a list as the reference describes it.
unsafe fn launch_params(
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
    len: u64,
) -> Result<Vec<u64>, i32> {
    const BUFFER_POINTER: usize = 1;
    const BUFFER_SIZE: usize = 2;
    let mut source: *const u8 = ptr::null();
    if !params.is_null() {
        // SAFETY: the caller's promise.
        source = unsafe { *params }.cast();
    } else if !extra.is_null() {
        // SAFETY: the caller's promise: a pointer and a size, each behind its key, then the end.
        let list = unsafe { array(extra, 5) };
        if [list[0].addr(), list[2].addr(), list[4].addr()] != [BUFFER_POINTER, BUFFER_SIZE, 0] {
            return Err(INVALID_VALUE);
        }
        source = list[1].cast();
        // SAFETY: the size is behind its key.
        let given = unsafe { *list[3].cast::<usize>() };
        if given as u64 != len {
            return Err(INVALID_VALUE);
        }
    }
    if source.is_null() {
        return Err(INVALID_VALUE);
    }
    let mut words = vec![0u64; (len as usize).div_ceil(8)];
    // SAFETY: `len` bytes on both sides.
    unsafe { ptr::copy_nonoverlapping(source, words.as_mut_ptr().cast(), len as usize) };
    Ok(words)
}

fn copy(machine: &mut Machine, stream: *mut c_void, rows: Rows) -> Result<(), i32> {
    machine.stream(stream.addr())?.queue(Work::Copy(rows, Instant::now()));
    Ok(())
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
    let mut ended = None;
    let code = core::call("cuStreamDestroy_v2", |machine| {
        ended = Some(machine.stream(stream.addr())?);
        machine.streams.remove(&stream.addr());
        Ok(())
    });
    if let Some(stream) = ended {
        stream.end();
    }
    code
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuStreamSynchronize(stream: *mut c_void) -> c_int {
    let mut tail = None;
    let code = core::call("cuStreamSynchronize", |machine| {
        tail = Some(machine.stream(stream.addr())?.tail());
        Ok(())
    });
    wait(tail, code)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuEventSynchronize(event: *mut c_void) -> c_int {
    let mut recorded = None;
    let code = core::call("cuEventSynchronize", |machine| {
        let event = machine.event(event.addr())?;
        let recording = event.recorded();
        recorded = Some((event, recording));
        Ok(())
    });
    wait(recorded, code)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    // The real call waits for the device; so does this one, for every stream.
    let mut tails = Vec::new();
    let code = core::call("cuMemFree_v2", |machine| {
        machine.give_back(address)?;
        tails = machine.streams.values().map(|stream| stream.tail()).collect();
        Ok(())
    });
    if code != 0 {
        return code;
    }
    for (event, recording) in tails {
        event.wait(recording);
    }
    let freed = core::with(|machine| {
        machine.free(address)?;
        machine.trim_pools();
        Ok(())
    });
    freed.err().unwrap_or(0)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuCtxSynchronize() -> c_int {
    let mut tails = Vec::new();
    let code = core::call("cuCtxSynchronize", |machine| {
        machine.current_device().ok_or(INVALID_CONTEXT)?;
        tails = machine.all_streams().map(|stream| stream.tail()).collect();
        Ok(())
    });
    for (event, recording) in tails {
        event.wait(recording);
    }
    core::with(Machine::trim_pools);
    code
}

fn wait(recorded: Option<(Arc<Event>, u64)>, code: c_int) -> c_int {
    if let Some((event, recording)) = recorded {
        event.wait(recording);
        core::with(Machine::trim_pools);
    }
    code
}

fn text(target: *mut c_char, len: c_int, text: &str) -> Result<(), i32> {
    // SAFETY: the caller passes `len` writable bytes.
    unsafe { core::write_text(target, len.max(0) as usize, text) };
    Ok(())
}

/// Returns an array that a caller passes.
///
/// # Safety
/// `start` points to `count` entries that may be read.
unsafe fn array<'a, T>(start: *const T, count: usize) -> &'a [T] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(start, count) }
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
];
