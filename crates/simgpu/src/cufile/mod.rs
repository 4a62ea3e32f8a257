//! NVIDIA's and AMD's libraries for direct storage, over the simulated machine: reads are ordinary reads into simulated device memory.
//!
//! # Safety
//! Each function asks of its caller what the vendors' references ask: pointers that may be written, handles that live.

#![allow(non_snake_case, reason = "the libraries' own names")]
#![allow(clippy::missing_safety_doc, reason = "one promise for all of them, above")]

mod batch;
mod exports;

use std::collections::{BTreeMap, HashMap};
use std::ffi::{c_int, c_uint, c_void};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::Arc;

use batch::BatchEvent;

use crate::core::{self, Machine};

/// What a library for direct storage keeps.
pub(crate) struct Storage {
    /// By vendor.
    opened: [bool; 2],
    /// Whether what cannot be read directly is read through the host.
    compatible: bool,
    /// Whether cuFile was told to use the kernel's P2PDMA.
    uses_p2pdma: bool,
    files: HashMap<usize, Arc<File>>,
    /// The handle of each descriptor that is registered.
    descriptors: HashMap<i32, usize>,
    /// Start to length.
    buffers: BTreeMap<u64, u64>,
    /// Reads that are done and not yet asked for: for all that the caller knows, they are under way.
    batches: HashMap<usize, Vec<BatchEvent>>,
    reads: u64,
    /// Reads that went through the host.
    compatible_reads: u64,
}

impl Default for Storage {
    fn default() -> Storage {
        Storage {
            opened: [false; 2],
            compatible: true,
            uses_p2pdma: false,
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
            format!("live.storage_opened {}", self.opened.iter().filter(|is_open| **is_open).count()),
            format!("live.storage_files {}", self.files.len()),
            format!("live.storage_buffers {}", self.buffers.len()),
            format!("live.storage_batches {}", self.batches.len()),
        ];
        if self.compatible_reads > 0 {
            lines.push(format!("call.storage_compatible_reads {}", self.compatible_reads));
        }
        lines
    }

    /// Notes who lets go of something while reads may be under way.
    fn check_no_reads(&self, violations: &mut Vec<String>, name: &str) {
        let count: usize = self.batches.values().map(Vec::len).sum();
        if count > 0 {
            violations.push(format!("{name} while {count} reads may be under way"));
        }
    }
}

impl Machine {
    /// Tells whether storage can write into devices of that vendor's library, and the library does what that takes.
    fn is_direct(&self, vendor: Vendor) -> bool {
        let needs_p2pdma = vendor == Vendor::Nvidia && self.config.direct_p2pdma;
        self.config.direct && (!needs_p2pdma || self.storage.uses_p2pdma)
    }
}

/// Notes who lets go of something without its device, unless that is lost, or while reads may be under way.
fn check_lets_go(machine: &mut Machine, name: &str) {
    if machine.current() == 0 && machine.devices.iter().all(|device| device.lost.is_none()) {
        machine.violations.push(format!("{name} without a device"));
    }
    machine.storage.check_no_reads(&mut machine.violations, name);
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
    feature_flags: c_uint,
    caches: [c_uint; 3],
    max_batch_io_size: c_uint,
    max_batch_io_timeout_msecs: c_uint,
}

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
        if !machine.is_direct(vendor) && !machine.storage.compatible {
            return Err(NOT_INITIALIZED);
        }
        if std::mem::replace(&mut machine.storage.opened[vendor as usize], true) {
            return Err(ALREADY_OPEN);
        }
        Ok(())
    })
}

fn close(vendor: Vendor, name: &'static str) -> Status {
    status(name, |machine| {
        check_lets_go(machine, name);
        let storage = &mut machine.storage;
        if !std::mem::replace(&mut storage.opened[vendor as usize], false) {
            return Err(NOT_INITIALIZED);
        }
        if storage.opened == [false; 2] && !(storage.files.is_empty() && storage.buffers.is_empty()) {
            machine.violations.push(format!("{name} before everything was deregistered"));
        }
        Ok(())
    })
}

unsafe fn handle_register(
    vendor: Vendor,
    name: &'static str,
    handle: *mut *mut c_void,
    file: *mut Descriptor,
) -> Status {
    // SAFETY: the caller passes a descriptor.
    let Descriptor { kind, fd, fs_ops, .. } = unsafe { file.read() };
    status(name, |machine| {
        if !machine.storage.opened[vendor as usize] {
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
        check_lets_go(machine, name);
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
        check_lets_go(machine, name);
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
    let is_direct = machine.is_direct(vendor) && (vendor == Vendor::Nvidia || is_whole);
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

/// Returns what a read in a batch is told to have failed with: the library's code or the system's, negative.
fn failed(code: i32) -> isize {
    match code {
        code if core::LOST_CODES.contains(&code) => -(DEVICE_DRIVER_ERROR as isize),
        code => -(code as isize),
    }
}

/// Returns what a read returns: the system's codes by `errno`.
fn by_errno(result: isize) -> isize {
    if !(-255..0).contains(&result) {
        return result;
    }
    // SAFETY: takes nothing.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the thread's own error number.
    unsafe { errno.write(-result as i32) };
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
        let properties = Properties {
            versions: [2, 17],
            sizes: [0; 2],
            status_flags: 0,
            control_flags,
            feature_flags: 0,
            caches: [0; 3],
            max_batch_io_size: machine.config.direct_batch,
            max_batch_io_timeout_msecs: 5,
        };
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
        if machine.storage.opened[vendor as usize] {
            return Err(ALREADY_OPEN);
        }
        if parameter == ALLOW_COMPATIBILITY && !machine.config.direct_insists {
            machine.storage.compatible = value;
        }
        if parameter == USE_PCI_P2PDMA {
            machine.storage.uses_p2pdma = value;
        }
        Ok(())
    })
}

unsafe fn parameter(vendor: Vendor, name: &'static str, parameter: c_int, value: *mut bool) -> Status {
    status(name, |machine| {
        has_parameters(machine, vendor)?;
        let is_set = match parameter {
            ALLOW_COMPATIBILITY => machine.storage.compatible,
            USE_PCI_P2PDMA => machine.storage.uses_p2pdma,
            _ => false,
        };
        // SAFETY: the caller passes a pointer that may be written.
        unsafe { value.write(is_set) };
        Ok(())
    })
}

const NOT_INITIALIZED: i32 = 5001;
const IO_NOT_SUPPORTED: i32 = 5008;
const DEVICE_DRIVER_ERROR: i32 = 5011;
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
const USE_PCI_P2PDMA: c_int = 7;
const CALL_LEN_MAX: usize = 0x7fff_f000;
