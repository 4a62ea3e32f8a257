//! What the calls of every vendor do to the machine, under their common names.
//!
//! Methods of the machine queue work or answer at once. Functions wait, so they count themselves under the vendor's name
//! and let go of the machine meanwhile.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;
use std::sync::Arc;
use std::time::Instant;

use crate::core::{
    self, INVALID_CONTEXT, INVALID_DEVICE, INVALID_HANDLE, INVALID_VALUE, Machine, NOT_FOUND, NOT_READY,
    NOT_SUPPORTED, OUT_OF_MEMORY, PEER_ACCESS_ALREADY_ENABLED, PEER_ACCESS_NOT_ENABLED,
    PEER_ACCESS_UNSUPPORTED, Pinned,
};
use crate::kernels::{Entry, HostKernel, Launch};
use crate::stream::{Event, HostFunction, Rows, Stream, Work};

/// Exports functions that count themselves, may be made to fail, and else run on the machine. `through` says how; `or` may
/// forward them to a driver that has methods of the same names.
macro_rules! calls {
    (through $through:path, or $forward:path; $(fn $name:ident($($argument:ident: $type:ty),* $(,)?) |$machine:ident| $body:expr;)*) => {
        $(
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> std::ffi::c_int {
                // SAFETY: the caller's promise.
                if let Some(code) = $forward(stringify!($name), |driver| unsafe { driver.$name($($argument),*) }) {
                    return code;
                }
                $through(stringify!($name), |$machine: &mut $crate::core::Machine| $body)
            }
        )*
    };
    (through $through:path; $(fn $name:ident($($argument:ident: $type:ty),* $(,)?) |$machine:ident| $body:expr;)*) => {
        $(
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> std::ffi::c_int {
                $through(stringify!($name), |$machine: &mut $crate::core::Machine| $body)
            }
        )*
    };
}

/// Writes a result through a caller's pointer.
macro_rules! give {
    ($target:expr, $value:expr) => {{
        let value = $value;
        // SAFETY: the caller passes a pointer that may be written.
        unsafe { $target.write(value) };
        Ok::<(), i32>(())
    }};
}

pub(crate) use {calls, give};

/// A launch as every vendor's call has it.
pub(crate) struct LaunchCall {
    pub(crate) function: usize,
    pub(crate) grid: [c_uint; 3],
    pub(crate) block: [c_uint; 3],
    pub(crate) shared_bytes: c_uint,
    pub(crate) stream: usize,
    pub(crate) params: *mut *mut c_void,
    pub(crate) extra: *mut *mut c_void,
    /// The key that ends the list of `extra`.
    pub(crate) end_key: usize,
}

impl LaunchCall {
    /// Length of the list in `extra`: a pointer and a size, each behind its key, then the end.
    pub(crate) const LIST_LEN: usize = 5;
}

/// `CUmemAccessDesc`, `hipMemAccessDesc`.
#[repr(C)]
pub(crate) struct MemAccess {
    location_type: c_int,
    location_id: c_int,
    flags: c_int,
}

/// `CU_MEM_LOCATION_TYPE_DEVICE`, `hipMemLocationTypeDevice`.
const LOCATION_TYPE_DEVICE: c_int = 1;
/// `CU_MEM_ACCESS_FLAGS_PROT_NONE` and `_READWRITE`, and HIP's.
const ACCESS_NONE: c_int = 0;
const ACCESS_READ_WRITE: c_int = 3;

impl Machine {
    /// Returns free and total bytes of the current device.
    pub(crate) fn memory(&mut self) -> Result<(usize, usize), i32> {
        let capacity = self.config.memory_bytes;
        let device = self.current_device().ok_or(INVALID_CONTEXT)?;
        let held = device.used_bytes + device.reserved_bytes;
        Ok(((capacity - held) as usize, capacity as usize))
    }

    /// Tells whether a device can be let to another's memory; both by their ordinals.
    pub(crate) fn can_access_peer(&self, device: c_int, peer: c_int) -> Result<c_int, i32> {
        let count = self.devices.len() as c_int;
        if !(0..count).contains(&device) || !(0..count).contains(&peer) {
            return Err(INVALID_DEVICE);
        }
        let is_refused = self.config.no_peers.contains(&(device as usize, peer as usize));
        Ok(c_int::from(self.config.peers && device != peer && !is_refused))
    }

    /// Lets the current device to the memory of another, by its index.
    pub(crate) fn enable_peer(&mut self, peer: usize, flags: c_uint) -> Result<(), i32> {
        let current = self.current().checked_sub(1).ok_or(INVALID_CONTEXT)?;
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        if self.can_access_peer(current as c_int, peer as c_int)? == 0 {
            return Err(PEER_ACCESS_UNSUPPORTED);
        }
        let device = &mut self.devices[current];
        if device.peers.insert(peer) { Ok(()) } else { Err(PEER_ACCESS_ALREADY_ENABLED) }
    }

    /// Returns the pool of a device, which is named by its ordinal, from 1.
    pub(crate) fn pool_of(&self, device: c_int) -> Result<*mut c_void, i32> {
        let index = usize::try_from(device).ok().filter(|device| *device < self.devices.len());
        let index = index.ok_or(INVALID_DEVICE)?;
        if self.config.pools { Ok(ptr::without_provenance_mut(index + 1)) } else { Err(NOT_SUPPORTED) }
    }

    /// Lets devices to what a pool gives, or takes that back.
    pub(crate) fn open_pool(&mut self, pool: usize, descriptions: &[MemAccess]) -> Result<(), i32> {
        let owner = pool.checked_sub(1).filter(|owner| *owner < self.devices.len()).ok_or(INVALID_VALUE)?;
        for access in descriptions {
            if access.location_type != LOCATION_TYPE_DEVICE {
                return Err(INVALID_VALUE);
            }
            let is_reached = self.can_access_peer(access.location_id, owner as c_int)? != 0;
            let (reader, readers) = (access.location_id as usize, &mut self.devices[owner].pool_readers);
            match access.flags {
                ACCESS_READ_WRITE if is_reached => drop(readers.insert(reader)),
                ACCESS_NONE => drop(readers.remove(&reader)),
                _ => return Err(INVALID_DEVICE),
            }
        }
        Ok(())
    }

    /// Takes back what [`Machine::enable_peer`] gave.
    pub(crate) fn disable_peer(&mut self, peer: usize) -> Result<(), i32> {
        let device = self.current_device().ok_or(INVALID_CONTEXT)?;
        if device.peers.remove(&peer) { Ok(()) } else { Err(PEER_ACCESS_NOT_ENABLED) }
    }

    pub(crate) fn stream_create(&mut self) -> Result<*mut c_void, i32> {
        let device = self.current().checked_sub(1).ok_or(INVALID_CONTEXT)?;
        let handle = self.new_handle();
        self.streams.insert(handle, Arc::new(Stream::start(&self.config, device)));
        Ok(ptr::without_provenance_mut(handle))
    }

    pub(crate) fn stream_wait_event(&mut self, stream: usize, event: usize) -> Result<(), i32> {
        let (stream, event) = (self.stream(stream)?, self.event(event)?);
        let recording = event.recorded();
        stream.queue(Work::Wait(event, recording));
        Ok(())
    }

    pub(crate) fn event_create(&mut self) -> Result<*mut c_void, i32> {
        self.current_device().ok_or(INVALID_CONTEXT)?;
        let handle = self.new_handle();
        self.events.insert(handle, Arc::new(Event::default()));
        Ok(ptr::without_provenance_mut(handle))
    }

    pub(crate) fn event_destroy(&mut self, event: usize) -> Result<(), i32> {
        self.events.remove(&event).map(drop).ok_or(INVALID_HANDLE)
    }

    pub(crate) fn event_record(&mut self, event: usize, stream: usize) -> Result<(), i32> {
        let (event, stream) = (self.event(event)?, self.stream(stream)?);
        let recording = event.record();
        stream.queue(Work::Complete(event, recording));
        Ok(())
    }

    pub(crate) fn event_query(&mut self, event: usize) -> Result<(), i32> {
        let event = self.event(event)?;
        if event.is_complete(event.recorded()) { Ok(()) } else { Err(NOT_READY) }
    }

    pub(crate) fn allocate_ordered(&mut self, len: usize, stream: usize) -> Result<u64, i32> {
        if !self.config.pools {
            return Err(NOT_SUPPORTED);
        }
        let device = self.stream(stream)?.device;
        let address = self.allocate(len as u64)?;
        self.devices[device].pooled.insert(address);
        Ok(address)
    }

    pub(crate) fn free_ordered(&mut self, address: u64, stream: usize) -> Result<(), i32> {
        let stream = self.stream(stream)?;
        self.give_back(address)?;
        stream.queue(Work::Free(address));
        Ok(())
    }

    /// Allocates pinned memory; `is_mapped` where kernels reach it by the host's address without being told another.
    pub(crate) fn host_allocate(&mut self, len: usize, is_mapped: bool) -> Result<*mut c_void, i32> {
        // SAFETY: plain allocation; page-aligned, as the drivers' is.
        let memory = unsafe { libc::aligned_alloc(4096, len.next_multiple_of(4096)) };
        if memory.is_null() {
            return Err(OUT_OF_MEMORY);
        }
        self.pinned.insert(memory.addr(), Pinned { len, is_drivers: true, is_mapped });
        Ok(memory)
    }

    pub(crate) fn host_free(&mut self, start: *mut c_void) -> Result<(), i32> {
        self.unpin(start.addr(), true)?;
        // SAFETY: allocated above.
        unsafe { libc::free(start) };
        Ok(())
    }

    /// Pins the caller's memory; `is_mapped` as in [`Machine::host_allocate`].
    pub(crate) fn host_register(
        &mut self,
        start: *mut c_void,
        len: usize,
        is_mapped: bool,
    ) -> Result<(), i32> {
        self.pinned.insert(start.addr(), Pinned { len, is_drivers: false, is_mapped });
        Ok(())
    }

    pub(crate) fn host_unregister(&mut self, start: *mut c_void) -> Result<(), i32> {
        self.unpin(start.addr(), false)
    }

    /// Returns the address by which kernels reach pinned memory, which they may from now on.
    pub(crate) fn host_address(&mut self, start: *mut c_void) -> Result<u64, i32> {
        let before = self.pinned.range_mut(..=start.addr()).next_back();
        let (_, pinned) =
            before.filter(|(first, pinned)| start.addr() < *first + pinned.len).ok_or(INVALID_VALUE)?;
        pinned.is_mapped = true;
        Ok(start.expose_provenance() as u64)
    }

    fn unpin(&mut self, start: usize, is_drivers: bool) -> Result<(), i32> {
        self.pinned.get(&start).filter(|pinned| pinned.is_drivers == is_drivers).ok_or(INVALID_VALUE)?;
        self.pinned.remove(&start);
        Ok(())
    }

    pub(crate) fn copy_in(
        &mut self,
        target: u64,
        source: *const c_void,
        len: usize,
        stream: usize,
    ) -> Result<(), i32> {
        let device = self.stream(stream)?.device;
        self.check_device_range(device, target, len as u64)?;
        self.check_pinned(source.addr(), len);
        self.copy(Rows::one(source.expose_provenance(), target as usize, len), stream)
    }

    pub(crate) fn copy_out(
        &mut self,
        target: *mut c_void,
        source: u64,
        len: usize,
        stream: usize,
    ) -> Result<(), i32> {
        let device = self.stream(stream)?.device;
        self.check_device_range(device, source, len as u64)?;
        self.check_pinned(target.addr(), len);
        self.copy(Rows::one(source as usize, target.expose_provenance(), len), stream)
    }

    /// Copies from host to device; the error has the number of the piece that is wrong.
    pub(crate) fn copy_batch(
        &mut self,
        targets: &[u64],
        sources: &[u64],
        lens: &[usize],
        stream: usize,
    ) -> Result<(), (usize, i32)> {
        for (piece, ((target, source), len)) in targets.iter().zip(sources).zip(lens).enumerate() {
            let source = ptr::with_exposed_provenance(*source as usize);
            self.copy_in(*target, source, *len, stream).map_err(|code| (piece, code))?;
        }
        Ok(())
    }

    pub(crate) fn copy_on_device(
        &mut self,
        target: u64,
        source: u64,
        len: usize,
        stream: usize,
    ) -> Result<(), i32> {
        let device = self.stream(stream)?.device;
        self.check_device_range(device, source, len as u64)?;
        self.check_device_range(device, target, len as u64)?;
        self.copy(Rows::one(source as usize, target as usize, len), stream)
    }

    /// Copies from a device, by its index, to another. Needs no access enabled: without it, a driver carries the bytes
    /// through the host.
    pub(crate) fn copy_peer(
        &mut self,
        (target_device, target): (usize, u64),
        (source_device, source): (usize, u64),
        len: usize,
        stream: usize,
    ) -> Result<(), i32> {
        for (device, address) in [(source_device, source), (target_device, target)] {
            if self.owner(address, len as u64) != Some(device) {
                self.violations.push(format!(
                    "{len} bytes at {address:#x} are not inside an allocation of device {device}"
                ));
                return Err(INVALID_VALUE);
            }
        }
        self.copy(Rows::one(source as usize, target as usize, len), stream)
    }

    /// Copies rows from host to device.
    pub(crate) fn copy_rows_in(&mut self, rows: Rows, stream: usize) -> Result<(), i32> {
        let is_narrow = rows.row_len > rows.source_stride || rows.row_len > rows.target_stride;
        if is_narrow || rows.row_count == 0 {
            return Err(INVALID_VALUE);
        }
        let reach = |stride: usize| (rows.row_count - 1) * stride + rows.row_len;
        let device = self.stream(stream)?.device;
        self.check_device_range(device, rows.target as u64, reach(rows.target_stride) as u64)?;
        self.check_pinned(rows.source, reach(rows.source_stride));
        self.copy(rows, stream)
    }

    fn copy(&mut self, rows: Rows, stream: usize) -> Result<(), i32> {
        let target = rows.target;
        self.stream(stream)?.queue(Work::Copy(rows, Instant::now()));
        if self.flips {
            self.stream(stream)?.queue(Work::Flip(target));
        }
        Ok(())
    }

    pub(crate) fn host_call(
        &mut self,
        stream: usize,
        function: HostFunction,
        data: *mut c_void,
    ) -> Result<(), i32> {
        self.stream(stream)?.queue(Work::Call(function, data.expose_provenance()));
        Ok(())
    }

    /// Loads kernels, if each takes what its build for the host takes.
    pub(crate) fn module_load(&mut self, entries: Vec<Entry>) -> Result<*mut c_void, i32> {
        self.current_device().ok_or(INVALID_CONTEXT)?;
        for Entry { name, params_len } in &entries {
            let host = HostKernel::find(name).map(|kernel| u64::from(kernel.params_len()));
            if host != Some(*params_len) {
                let host = host.map_or("no build".to_owned(), |len| format!("{len} bytes of parameters"));
                self.violations.push(format!(
                    "kernel {name}: {params_len} bytes of parameters in the image, {host} for the host"
                ));
                return Err(INVALID_VALUE);
            }
        }
        let handle = self.new_handle();
        self.modules.insert(handle, entries);
        Ok(ptr::without_provenance_mut(handle))
    }

    pub(crate) fn module_unload(&mut self, module: usize) -> Result<(), i32> {
        self.modules.remove(&module).ok_or(INVALID_HANDLE)?;
        self.functions.retain(|_, (of, _)| *of != module);
        Ok(())
    }

    pub(crate) fn function(&mut self, module: usize, name: &[u8]) -> Result<*mut c_void, i32> {
        let entries = self.modules.get(&module).ok_or(INVALID_HANDLE)?;
        let entry = entries.iter().find(|entry| entry.name.as_bytes() == name).ok_or(NOT_FOUND)?.clone();
        let handle = self.new_handle();
        self.functions.insert(handle, (module, entry));
        Ok(ptr::without_provenance_mut(handle))
    }

    /// Queues a kernel's build for the host.
    ///
    /// # Safety
    /// As for [`launch_params`].
    pub(crate) unsafe fn launch(&mut self, call: &LaunchCall) -> Result<(), i32> {
        let stream = self.stream(call.stream)?;
        let (_, entry) = self.functions.get(&call.function).ok_or(INVALID_HANDLE)?.clone();
        // SAFETY: the caller's promise.
        let params = unsafe { launch_params(call, entry.params_len) }?;
        let ([grid, grid_y, grid_z], [block, block_y, block_z]) = (call.grid, call.block);
        let is_launch =
            grid > 0 && grid < 1 << 31 && (1..=1024).contains(&block) && call.shared_bytes <= 48 << 10;
        if !is_launch || [grid_y, grid_z, block_y, block_z] != [1; 4] {
            return Err(INVALID_VALUE);
        }
        let kernel = HostKernel::find(&entry.name).expect("a module with other kernels is not loaded");
        let device = stream.device;
        stream.queue(Work::Launch(Launch { kernel, threads: grid * block, params, device }));
        Ok(())
    }
}

/// Copies the parameters of a launch, given as one pointer for the one parameter that kernels have, or as one buffer.
///
/// # Safety
/// `params` is null, or points to a pointer to `len` bytes; `extra` is null, or a list as the vendors' references
/// describe it.
unsafe fn launch_params(call: &LaunchCall, len: u64) -> Result<Vec<u64>, i32> {
    const BUFFER_POINTER: usize = 1;
    const BUFFER_SIZE: usize = 2;
    let mut source: *const u8 = ptr::null();
    if !call.params.is_null() {
        // SAFETY: the caller's promise.
        source = unsafe { *call.params }.cast();
    } else if !call.extra.is_null() {
        // SAFETY: the caller's promise.
        let list = unsafe { array(call.extra, LaunchCall::LIST_LEN) };
        if [list[0].addr(), list[2].addr(), list[4].addr()] != [BUFFER_POINTER, BUFFER_SIZE, call.end_key] {
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

/// Returns an array that a caller passes.
///
/// # Safety
/// `start` points to `count` entries that may be read.
pub(crate) unsafe fn array<'a, T>(start: *const T, count: usize) -> &'a [T] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(start, count) }
}

pub(crate) fn stream_destroy(name: &'static str, stream: usize) -> c_int {
    let mut ended = None;
    let code = core::call(name, |machine| {
        ended = Some(machine.stream(stream)?);
        machine.streams.remove(&stream);
        Ok(())
    });
    if let Some(stream) = ended {
        stream.end();
    }
    code
}

pub(crate) fn stream_wait(name: &'static str, stream: usize) -> c_int {
    wait(name, |machine| Ok(vec![machine.stream(stream)?.tail()]))
}

pub(crate) fn event_wait(name: &'static str, event: usize) -> c_int {
    wait(name, |machine| {
        let event = machine.event(event)?;
        let recording = event.recorded();
        Ok(vec![(event, recording)])
    })
}

/// Waits for everything on every device.
pub(crate) fn device_wait(name: &'static str) -> c_int {
    wait(name, |machine| {
        machine.current_device().ok_or(INVALID_CONTEXT)?;
        Ok(machine.all_streams().map(|stream| stream.tail()).collect())
    })
}

/// Frees memory; the real calls wait for the device, so does this one, for every stream.
pub(crate) fn free(name: &'static str, address: u64) -> c_int {
    let code = wait(name, |machine| {
        machine.give_back(address)?;
        Ok(machine.streams.values().map(|stream| stream.tail()).collect())
    });
    if code != 0 {
        return code;
    }
    let freed = core::with(|machine| {
        machine.free(address)?;
        machine.trim_pools();
        Ok(())
    });
    freed.err().unwrap_or(0)
}

/// Waits for recordings, without holding the machine.
fn wait(
    name: &'static str,
    recordings: impl FnOnce(&mut Machine) -> Result<Vec<(Arc<Event>, u64)>, i32>,
) -> c_int {
    let mut awaited = Vec::new();
    let code = core::call(name, |machine| {
        awaited = recordings(machine)?;
        Ok(())
    });
    for (event, recording) in awaited {
        event.wait(recording);
    }
    if code == 0 {
        core::with(Machine::trim_pools);
    }
    code
}
