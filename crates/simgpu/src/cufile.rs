//! NVIDIA's and AMD's libraries for direct storage, over the simulated machine: reads are ordinary reads into simulated device memory.
//!
//! # Safety
//! Each function asks of its caller what the vendors' references ask: pointers that may be written, handles that live.

#![allow(non_snake_case, reason = "the libraries' own names")]
#![allow(clippy::missing_safety_doc, reason = "one promise for all of them, above")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::{c_int, c_uint, c_void};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::Arc;

use crate::core::{self, Machine};

/// What a library for direct storage keeps.
pub(crate) struct Storage {
    opened: u64,
    /// Whether what cannot be read directly is read through the host.
    compatible: bool,
    files: HashMap<usize, Arc<File>>,
    /// The handle of each descriptor that is registered.
    descriptors: HashMap<i32, usize>,
    /// Start to length.
    buffers: BTreeMap<u64, u64>,
    /// Reads that are done and not yet asked for.
    batches: HashMap<usize, Vec<BatchEvent>>,
    reads: u64,
    /// Reads that went through the host.
    compatible_reads: u64,
}

impl Default for Storage {
    fn default() -> Storage {
        Storage {
            opened: 0,
            compatible: true,
            files: HashMap::new(),
            descriptors: HashMap::new(),
            buffers: BTreeMap::new(),
            batches: HashMap::new(),
            reads: 0,
            compatible_reads: 0,
        }
    }
}

impl Storage {
    /// Returns what is not let go yet, and what was read how, as lines of the report.
    pub(crate) fn report(&self) -> Vec<String> {
        let mut lines = vec![
            format!("live.storage_opened {}", self.opened),
            format!("live.storage_files {}", self.files.len()),
            format!("live.storage_buffers {}", self.buffers.len()),
            format!("live.storage_batches {}", self.batches.len()),
        ];
        if self.compatible_reads > 0 {
            lines.push(format!("call.storage_compatible_reads {}", self.compatible_reads));
        }
        lines
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Nvidia,
    Amd,
}

#[repr(C)]
pub(crate) struct Status {
    code: c_int,
    driver_code: c_int,
}

#[repr(C)]
pub(crate) struct Descriptor {
    kind: c_int,
    _before: c_int,
    fd: c_int,
    _behind: c_int,
    fs_ops: *const c_void,
}

#[repr(C)]
pub(crate) struct Properties {
    versions: [c_uint; 2],
    sizes: [usize; 2],
    status_flags: c_uint,
    control_flags: c_uint,
}

#[repr(C)]
pub(crate) struct BatchRead {
    mode: c_int,
    base: *mut c_void,
    file_offset: i64,
    base_offset: i64,
    len: usize,
    handle: *mut c_void,
    operation: c_int,
    cookie: *mut c_void,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct BatchEvent {
    cookie: *mut c_void,
    status: c_int,
    result: isize,
}

// SAFETY: the cookie is the caller's, and never followed.
unsafe impl Send for BatchEvent {}

fn status(name: &'static str, act: impl FnOnce(&mut Machine) -> Result<(), i32>) -> Status {
    Status { code: core::call(name, act), driver_code: 0 }
}

fn open(vendor: Vendor, name: &'static str) -> Status {
    status(name, |machine| {
        if machine.devices.is_empty() || machine.current() == 0 {
            // A release of cuFile spins for ever here.
            machine.violations.push(format!("{name} without a device"));
            return Err(NO_CONTEXT);
        }
        if vendor == Vendor::Amd {
            let setting = std::env::var("HIPFILE_ALLOW_COMPAT_MODE");
            machine.storage.compatible = !setting.is_ok_and(|value| value.eq_ignore_ascii_case("false"));
        }
        if !machine.config.direct && !machine.storage.compatible {
            return Err(NOT_INITIALIZED);
        }
        machine.storage.opened += 1;
        Ok(())
    })
}

fn close(name: &'static str) -> Status {
    status(name, |machine| {
        let storage = &mut machine.storage;
        storage.opened = storage.opened.checked_sub(1).ok_or(NOT_INITIALIZED)?;
        if storage.opened == 0 && !(storage.files.is_empty() && storage.buffers.is_empty()) {
            machine.violations.push(format!("{name} before everything was deregistered"));
        }
        Ok(())
    })
}

unsafe fn handle_register(name: &'static str, handle: *mut *mut c_void, file: *mut Descriptor) -> Status {
    // SAFETY: the caller passes a descriptor.
    let Descriptor { kind, fd, fs_ops, .. } = unsafe { file.read() };
    status(name, |machine| {
        if machine.storage.opened == 0 {
            return Err(NOT_INITIALIZED);
        }
        if kind != 1 || !fs_ops.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: asks for the flags of a descriptor, whatever number it is.
        if unsafe { libc::fcntl(fd, libc::F_GETFL) } & libc::O_DIRECT == 0 {
            return Err(NOT_O_DIRECT);
        }
        // Read through the page cache: simulated memory need not be aligned as the disk wants it.
        let file = File::open(format!("/proc/self/fd/{fd}")).map_err(|_| INVALID_VALUE)?;
        if machine.storage.descriptors.contains_key(&fd) {
            return Err(FILE_ALREADY_REGISTERED);
        }
        let number = machine.new_handle();
        machine.storage.descriptors.insert(fd, number);
        machine.storage.files.insert(number, Arc::new(file));
        // SAFETY: the caller passes a pointer that may be written.
        unsafe { handle.write(ptr::without_provenance_mut(number)) };
        Ok(())
    })
}

fn handle_deregister(name: &'static str, handle: *mut c_void) {
    let _ = status(name, |machine| {
        machine.storage.descriptors.retain(|_, number| *number != handle.addr());
        if machine.storage.files.remove(&handle.addr()).is_none() {
            machine.violations.push(format!("{name} of a file that is not registered"));
        }
        Ok(())
    });
}

fn buffer_register(name: &'static str, base: *const c_void, len: usize) -> Status {
    status(name, |machine| {
        let device = machine.current().checked_sub(1).ok_or(NO_CONTEXT)?;
        machine.check_device_range(device, base.addr() as u64, len as u64).map_err(|_| INVALID_POINTER)?;
        match machine.storage.buffers.insert(base.addr() as u64, len as u64) {
            Some(_) => Err(ALREADY_REGISTERED),
            None => Ok(()),
        }
    })
}

fn buffer_deregister(name: &'static str, base: *const c_void) -> Status {
    status(name, |machine| {
        let (base, len) = match machine.storage.buffers.remove_entry(&(base.addr() as u64)) {
            Some(buffer) => buffer,
            None => return Err(NOT_REGISTERED),
        };
        if machine.owner(base, len).is_none() {
            machine.violations.push(format!("{len} bytes at {base:#x} were freed before {name}"));
        }
        Ok(())
    })
}

/// One read, checked.
struct Read {
    file: Arc<File>,
    start: *mut u8,
    len: usize,
    offset: u64,
}

/// Checks a read as the library would, and a little more.
fn check(
    machine: &mut Machine,
    vendor: Vendor,
    handle: *mut c_void,
    base: *mut c_void,
    len: usize,
    offsets: [i64; 2],
) -> Result<Read, i32> {
    let [file_offset, base_offset] = offsets.map(|offset| offset as u64);
    let device = machine.current().checked_sub(1).ok_or(NO_CONTEXT)?;
    let file = machine.storage.files.get(&handle.addr()).cloned().ok_or(NO_SUCH_FILE)?;
    if len > CALL_LEN_MAX {
        machine.violations.push(format!("a direct read of {len} bytes"));
        return Err(INVALID_VALUE);
    }
    let base = base.addr() as u64;
    let start = base + base_offset;
    machine.check_device_range(device, start, len as u64).map_err(|_| INVALID_POINTER)?;
    if let Some(registered) = machine.storage.buffers.get(&base)
        && base_offset + len as u64 > *registered
    {
        return Err(OUTSIDE_REGISTERED);
    }
    let is_whole = [len as u64, file_offset, start].iter().all(|number| number.is_multiple_of(4096));
    let is_direct = machine.config.direct && (vendor == Vendor::Nvidia || is_whole);
    if !is_direct {
        if !machine.storage.compatible {
            return Err(if vendor == Vendor::Nvidia { IO_NOT_SUPPORTED } else { INTERNAL });
        }
        machine.storage.compatible_reads += 1;
    }
    machine.storage.reads += 1;
    let short = machine.config.direct_short;
    let is_short = short > 0 && machine.storage.reads.is_multiple_of(short) && len > 8192;
    let len = if is_short { len / 2 + 1 } else { len };
    Ok(Read { file, start: ptr::with_exposed_provenance_mut(start as usize), len, offset: file_offset })
}

impl Read {
    fn run(&self) -> isize {
        // SAFETY: the range was just checked to be allocated, and is the caller's until the read returns.
        let target = unsafe { std::slice::from_raw_parts_mut(self.start, self.len) };
        let mut have = 0;
        loop {
            match self.file.read_at(&mut target[have..], self.offset + have as u64) {
                Ok(0) => break have as isize,
                Ok(read) => have += read,
                Err(error) => break failed(error.raw_os_error().unwrap_or(libc::EIO)),
            }
        }
    }
}

/// Returns what a read returns for a code: the library's own as it is, the system's by `errno`.
fn failed(code: i32) -> isize {
    if code > 255 {
        return -(code as isize);
    }
    // SAFETY: takes nothing.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the thread's own error number.
    unsafe { errno.write(code) };
    -1
}

fn read(
    vendor: Vendor,
    name: &'static str,
    handle: *mut c_void,
    base: *mut c_void,
    len: usize,
    offsets: [i64; 2],
) -> isize {
    let mut checked = None;
    let code = core::call(name, |machine| {
        checked = Some(check(machine, vendor, handle, base, len, offsets)?);
        Ok(())
    });
    match checked {
        Some(read) if code == 0 => read.run(),
        _ => failed(code),
    }
}

unsafe fn properties(vendor: Vendor, name: &'static str, target: *mut Properties) -> Status {
    status(name, |machine| {
        if vendor == Vendor::Amd {
            return Err(INTERNAL); // Not implemented.
        }
        let control_flags = c_uint::from(machine.storage.compatible) << 1;
        let properties = Properties { versions: [2, 17], sizes: [0; 2], status_flags: 0, control_flags };
        // SAFETY: the caller passes room for more than this.
        unsafe { target.write(properties) };
        Ok(())
    })
}

/// Tells whether a library has parameters; AMD's says that it has not implemented them.
fn has_parameters(machine: &Machine, vendor: Vendor) -> Result<(), i32> {
    if vendor == Vendor::Amd || !machine.config.direct_parameters { Err(INTERNAL) } else { Ok(()) }
}

fn set_parameter(vendor: Vendor, name: &'static str, parameter: c_int, value: bool) -> Status {
    status(name, |machine| {
        has_parameters(machine, vendor)?;
        if machine.storage.opened > 0 {
            return Err(ALREADY_OPEN);
        }
        if parameter == ALLOW_COMPATIBILITY && !machine.config.direct_insists {
            machine.storage.compatible = value;
        }
        Ok(())
    })
}

unsafe fn parameter(vendor: Vendor, name: &'static str, parameter: c_int, value: *mut bool) -> Status {
    status(name, |machine| {
        has_parameters(machine, vendor)?;
        // SAFETY: the caller passes a pointer that may be written.
        unsafe { value.write(parameter == ALLOW_COMPATIBILITY && machine.storage.compatible) };
        Ok(())
    })
}

unsafe fn batch_set_up(name: &'static str, handle: *mut *mut c_void) -> Status {
    status(name, |machine| {
        let number = machine.new_handle();
        machine.storage.batches.insert(number, Vec::new());
        // SAFETY: the caller passes a pointer that may be written.
        unsafe { handle.write(ptr::without_provenance_mut(number)) };
        Ok(())
    })
}

unsafe fn batch_submit(
    vendor: Vendor,
    names: [&'static str; 2],
    handle: *mut c_void,
    count: c_uint,
    reads: *mut BatchRead,
) -> Status {
    let submitted = status(names[0], |machine| match machine.storage.batches.get(&handle.addr()) {
        Some(_) => Ok(()),
        None => Err(INVALID_VALUE),
    });
    if submitted.code != 0 {
        return submitted;
    }
    for number in 0..count as usize {
        // SAFETY: the caller passes that many.
        let entry = unsafe { reads.add(number) };
        // SAFETY: as above.
        let entry = unsafe { entry.read() };
        let offsets = [entry.file_offset, entry.base_offset];
        let result = match (entry.mode, entry.operation) {
            (1, 0) => read(vendor, names[1], entry.handle, entry.base, entry.len, offsets),
            _ => failed(INVALID_VALUE),
        };
        let status = if result < 0 { BATCH_FAILED } else { BATCH_COMPLETE };
        let event = BatchEvent { cookie: entry.cookie, status, result };
        core::with(|machine| machine.storage.batches.entry(handle.addr()).or_default().push(event));
    }
    submitted
}

unsafe fn batch_status(
    name: &'static str,
    handle: *mut c_void,
    least: c_uint,
    count: *mut c_uint,
    events: *mut BatchEvent,
) -> Status {
    status(name, |machine| {
        let done = machine.storage.batches.get_mut(&handle.addr()).ok_or(INVALID_VALUE)?;
        // SAFETY: the caller passes a pointer that may be read.
        let room = unsafe { count.read() } as usize;
        if done.len() < least as usize {
            machine.violations.push(format!("{name} waits for reads that were not submitted"));
            return Err(INVALID_VALUE);
        }
        // The latest first: nobody may count on an order.
        let given = done.len().min(room);
        for number in 0..given {
            let event = done.pop().ok_or(INVALID_VALUE)?;
            // SAFETY: the caller has room for that many.
            let slot = unsafe { events.add(number) };
            // SAFETY: as above.
            unsafe { slot.write(event) };
        }
        // SAFETY: the caller passes a pointer that may be written.
        unsafe { count.write(given as c_uint) };
        Ok(())
    })
}

fn batch_destroy(name: &'static str, handle: *mut c_void) {
    let _ = status(name, |machine| {
        machine.storage.batches.remove(&handle.addr());
        Ok(())
    });
}

/// Exports one vendor's functions.
macro_rules! library {
    (
        $vendor:expr, $open:ident, $close:ident, $handle_register:ident, $handle_deregister:ident, $buffer_register:ident,
        $buffer_deregister:ident, $read:ident, $properties:ident, $set_parameter:ident, $parameter:ident, $batch_set_up:ident,
        $batch_submit:ident, $batch_read:ident, $batch_status:ident, $batch_cancel:ident, $batch_destroy:ident
    ) => {
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $open() -> Status {
            open($vendor, stringify!($open))
        }
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $close() -> Status {
            close(stringify!($close))
        }
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $handle_register(
            handle: *mut *mut c_void,
            file: *mut Descriptor,
        ) -> Status {
            // SAFETY: the caller's promise.
            unsafe { handle_register(stringify!($handle_register), handle, file) }
        }
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $handle_deregister(handle: *mut c_void) {
            handle_deregister(stringify!($handle_deregister), handle)
        }
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $buffer_register(base: *const c_void, len: usize, _flags: c_int) -> Status {
            buffer_register(stringify!($buffer_register), base, len)
        }
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $buffer_deregister(base: *const c_void) -> Status {
            buffer_deregister(stringify!($buffer_deregister), base)
        }
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $read(
            handle: *mut c_void,
            base: *mut c_void,
            len: usize,
            file_offset: i64,
            base_offset: i64,
        ) -> isize {
            read($vendor, stringify!($read), handle, base, len, [file_offset, base_offset])
        }
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $properties(target: *mut Properties) -> Status {
            // SAFETY: the caller's promise.
            unsafe { properties($vendor, stringify!($properties), target) }
        }
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $set_parameter(parameter: c_int, value: bool) -> Status {
            set_parameter($vendor, stringify!($set_parameter), parameter, value)
        }
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $parameter(name: c_int, value: *mut bool) -> Status {
            // SAFETY: the caller's promise.
            unsafe { parameter($vendor, stringify!($parameter), name, value) }
        }
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $batch_set_up(handle: *mut *mut c_void, _count: c_uint) -> Status {
            // SAFETY: the caller's promise.
            unsafe { batch_set_up(stringify!($batch_set_up), handle) }
        }
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $batch_submit(
            handle: *mut c_void,
            count: c_uint,
            reads: *mut BatchRead,
            _flags: c_uint,
        ) -> Status {
            let names = [stringify!($batch_submit), stringify!($batch_read)];
            // SAFETY: the caller's promise.
            unsafe { batch_submit($vendor, names, handle, count, reads) }
        }
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $batch_status(
            handle: *mut c_void,
            least: c_uint,
            count: *mut c_uint,
            events: *mut BatchEvent,
            _time: *mut c_void,
        ) -> Status {
            // SAFETY: the caller's promise.
            unsafe { batch_status(stringify!($batch_status), handle, least, count, events) }
        }
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $batch_cancel(_handle: *mut c_void) -> Status {
            status(stringify!($batch_cancel), |_| Ok(()))
        }
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $batch_destroy(handle: *mut c_void) {
            batch_destroy(stringify!($batch_destroy), handle)
        }
    };
}

library!(
    Vendor::Nvidia,
    cuFileDriverOpen,
    cuFileDriverClose,
    cuFileHandleRegister,
    cuFileHandleDeregister,
    cuFileBufRegister,
    cuFileBufDeregister,
    cuFileRead,
    cuFileDriverGetProperties,
    cuFileSetParameterBool,
    cuFileGetParameterBool,
    cuFileBatchIOSetUp,
    cuFileBatchIOSubmit,
    cuFileBatchRead,
    cuFileBatchIOGetStatus,
    cuFileBatchIOCancel,
    cuFileBatchIODestroy
);

library!(
    Vendor::Amd,
    hipFileDriverOpen,
    hipFileDriverClose,
    hipFileHandleRegister,
    hipFileHandleDeregister,
    hipFileBufRegister,
    hipFileBufDeregister,
    hipFileRead,
    hipFileDriverGetProperties,
    hipFileSetParameterBool,
    hipFileGetParameterBool,
    hipFileBatchIOSetUp,
    hipFileBatchIOSubmit,
    hipFileBatchRead,
    hipFileBatchIOGetStatus,
    hipFileBatchIOCancel,
    hipFileBatchIODestroy
);

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn cuFileGetVersion(version: *mut c_int) -> Status {
    // SAFETY: the caller passes a pointer that may be written.
    unsafe { version.write(1140) };
    Status { code: 0, driver_code: 0 }
}

const NOT_INITIALIZED: i32 = 5001;
const IO_NOT_SUPPORTED: i32 = 5008;
const INVALID_POINTER: i32 = 5012;
const OUTSIDE_REGISTERED: i32 = 5016;
const NOT_O_DIRECT: i32 = 5020;
const INVALID_VALUE: i32 = 5022;
const ALREADY_REGISTERED: i32 = 5023;
const NOT_REGISTERED: i32 = 5024;
const ALREADY_OPEN: i32 = 5026;
const FILE_ALREADY_REGISTERED: i32 = 5028;
const NO_SUCH_FILE: i32 = 5027;
const INTERNAL: i32 = 5030;
const NO_CONTEXT: i32 = 5047;

const ALLOW_COMPATIBILITY: c_int = 1;
const BATCH_COMPLETE: c_int = 0x10;
const BATCH_FAILED: c_int = 0x40;
const CALL_LEN_MAX: usize = 0x7fff_f000;
