//! A vendor's library, opened: its calls with their errors typed, and never in compatibility mode unless asked for.

use std::collections::HashMap;
use std::env;
use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use tensorhaul_device::Device;
use tensorhaul_device::gpu::table::TableError;

use crate::kernel::Kernel;
use crate::refusal::{CallFailed, Refusal};
use crate::registered::Registered;
use crate::sys::{self, FileHandle, Properties, Status, Table};
use crate::vendor::Vendor;

/// Whether the library may read into host memory and copy from there where storage cannot write into the device.
///
/// That path is slower than the staging ring, and cannot be told from the outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compatibility {
    /// It may not: such files are refused, with the reason.
    #[default]
    Refused,
    /// It may.
    Allowed,
}

/// A vendor's library, open. Dropping the last handle closes it.
pub struct Library {
    vendor: Vendor,
    /// The device it was opened inside, and is closed inside.
    device: Arc<dyn Device>,
    table: Arc<Table>,
    compatibility: Compatibility,
    /// Where this value opened it, and is to close it; a framework in the same process may have opened it before.
    opened: Option<Opened>,
    /// Libraries with threads and kernel state do not survive a fork.
    process: u32,
    /// Files that are registered, by their descriptors: the library takes each once, for whatever device.
    files: Mutex<HashMap<RawFd, Weak<Registered>>>,
}

/// What is open in this process: settings are of the process, and opening may take seconds.
static OPEN: [Mutex<Weak<Library>>; 2] = [const { Mutex::new(Weak::new()) }; 2];

/// Libraries stay loaded for good: they leave threads behind.
static LOADED: [OnceLock<Result<Arc<Table>, TableError>>; 2] = [const { OnceLock::new() }; 2];

/// By vendor, the process that opened its library and has not closed it yet, and who waits for that.
///
/// Apart from [`OPEN`], which is held while some libraries are dropped: once the last handle of one is gone, nobody finds it there, though it is still to be closed.
static CLOSING: [(Mutex<Option<u32>>, Condvar); 2] = [const { (Mutex::new(None), Condvar::new()) }; 2];

impl Library {
    /// Opens the library of the device's vendor, or returns the one that is open. May take seconds.
    ///
    /// The device proves that there is one: a release of cuFile spins for ever where there is none.
    ///
    /// # Errors
    /// [`Refusal::Library`], [`Refusal::Open`], [`Refusal::Compatibility`], [`Refusal::Device`] or [`Refusal::Forked`].
    ///
    /// # Panics
    /// When the device is the host, which has no such library.
    pub fn open(device: &Arc<dyn Device>, compatibility: Compatibility) -> Result<Arc<Library>, Refusal> {
        let vendor = Vendor::of(device.id()).expect("direct storage is asked for with an accelerator");
        // A panic elsewhere leaves a handle that is whole, or none.
        let mut open = OPEN[vendor as usize].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = open.upgrade() {
            if library.process != std::process::id() {
                std::mem::forget(library);
                return Err(Refusal::Forked);
            }
            if library.compatibility == Compatibility::Allowed && compatibility == Compatibility::Refused {
                let why = "an earlier load of this process allowed it".to_owned();
                return Err(Refusal::Compatibility { vendor, why });
            }
            return Ok(library);
        }
        Opened::wait_until_closed(vendor)?;
        let table = load(vendor)?;
        let mut opened = None;
        let inside =
            device.enter(&mut || opened = Some(Library::open_new(device, vendor, &table, compatibility)));
        inside.map_err(Refusal::Device)?;
        let library = Arc::new(opened.expect("what runs inside a device runs")?);
        *open = Arc::downgrade(&library);
        Ok(library)
    }

    fn open_new(
        device: &Arc<dyn Device>,
        vendor: Vendor,
        table: &Arc<Table>,
        compatibility: Compatibility,
    ) -> Result<Library, Refusal> {
        let mut library = Library {
            vendor,
            device: Arc::clone(device),
            table: Arc::clone(table),
            compatibility,
            opened: None,
            process: std::process::id(),
            files: Mutex::default(),
        };
        let is_allowed = compatibility == Compatibility::Allowed;
        let is_told = library.set_parameter(sys::PARAMETER_ALLOW_COMPATIBILITY, is_allowed);
        if !is_allowed {
            // Somebody's configuration file may force it. Where this cannot be said, what is asked below still holds.
            let _ = library.set_parameter(sys::PARAMETER_FORCE_COMPATIBILITY, false);
        }
        if vendor == Vendor::Nvidia && Kernel::examine().nvidia_fs.is_none() {
            // Without nvidia-fs the kernel's P2PDMA is the only way into the device, and it is off unless asked for. Releases before
            // 1.14 do not know it, and refuse.
            let _ = library.set_parameter(sys::PARAMETER_USE_PCI_P2PDMA, true);
        }
        // SAFETY: takes nothing; the device is current.
        let status = unsafe { (library.table.driver_open)() };
        match library.check("DriverOpen", status) {
            Ok(()) => library.opened = Some(Opened::new(vendor)),
            Err(error) if error.code == sys::DRIVER_ALREADY_OPEN => {}
            Err(error) => {
                return Err(Refusal::Open { vendor, error, kernel: Kernel::examine().tell(vendor) });
            }
        }
        if is_allowed {
            return Ok(library);
        }
        match library.may_fall_back(is_told) {
            Some(why) => Err(Refusal::Compatibility { vendor, why }),
            None => Ok(library),
        }
    }

    /// Sets a parameter, which is possible only before the library is open; tells whether the library took it.
    fn set_parameter(&self, parameter: c_int, value: bool) -> bool {
        let Some(set) = self.table.set_parameter_bool else { return false };
        // SAFETY: a parameter of the vendor's list and its value.
        unsafe { set(parameter, value) }.code == 0
    }

    /// Returns why the library may read through host memory; `None` when it is known not to.
    ///
    /// What it says itself counts first; then whether it took the setting; then its properties; last, for AMD's, which has none of
    /// these (0.2), the environment that it reads.
    fn may_fall_back(&self, is_told: bool) -> Option<String> {
        if let Some(is_allowed) = self.parameter(sys::PARAMETER_ALLOW_COMPATIBILITY) {
            return is_allowed.then(|| "it is open already, with that mode allowed".to_owned());
        }
        if is_told {
            return None;
        }
        match self.vendor {
            Vendor::Nvidia => match self.control_flags() {
                Some(flags) if flags & sys::CONTROL_ALLOW_COMPATIBILITY == 0 => None,
                Some(_) => Some("its configuration allows that, and it cannot be told otherwise".to_owned()),
                None => Some("it can neither be told nor asked".to_owned()),
            },
            Vendor::Amd => {
                let is_off = env::var(HIPFILE_COMPATIBILITY_VARIABLE)
                    .is_ok_and(|value| value.eq_ignore_ascii_case("false"));
                let why =
                    format!("it cannot be told otherwise but by {HIPFILE_COMPATIBILITY_VARIABLE}=false");
                (!is_off).then_some(why)
            }
        }
    }

    fn parameter(&self, parameter: c_int) -> Option<bool> {
        let mut value = false;
        // SAFETY: a parameter of the vendor's list, and room for its value.
        let status = unsafe { self.table.parameter_bool?(parameter, &raw mut value) };
        (status.code == 0).then_some(value)
    }

    fn control_flags(&self) -> Option<u32> {
        Some(self.properties()?.control_flags)
    }

    /// Returns how many reads go into a batch at most, where NVIDIA's library tells; AMD's, which has no batches, lays its properties out otherwise.
    pub(crate) fn batch_entries_max(&self) -> Option<u32> {
        let properties = self.properties().filter(|_| self.vendor == Vendor::Nvidia)?;
        (properties.batch_entries_max > 0).then_some(properties.batch_entries_max)
    }

    fn properties(&self) -> Option<Properties> {
        let mut properties = Properties {
            major_version: 0,
            minor_version: 0,
            poll_threshold: 0,
            max_direct_io: 0,
            status_flags: 0,
            control_flags: 0,
            feature_flags: 0,
            max_device_cache: 0,
            per_buffer_cache: 0,
            max_device_pinned: 0,
            batch_entries_max: 0,
            rest: [0; 64],
        };
        // SAFETY: larger than the structure of any release.
        let status = unsafe { self.table.driver_properties?(&raw mut properties) };
        (status.code == 0).then_some(properties)
    }

    /// Returns the device it was opened inside.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Returns whose library it is.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Returns the library, by the name or path it was loaded with.
    pub fn path(&self) -> String {
        self.table.path.display().to_string()
    }

    /// Returns its version, where it tells.
    pub fn version(&self) -> Option<String> {
        if let Some(version) = self.table.cu_version {
            let mut number = 0;
            // SAFETY: writes one integer.
            let status = unsafe { version(&raw mut number) };
            return (status.code == 0).then(|| format!("{}.{}", number / 1000, number % 1000 / 10));
        }
        let [mut major, mut minor, mut patch] = [0; 3];
        // SAFETY: writes three integers.
        let status = unsafe { self.table.hip_version?(&raw mut major, &raw mut minor, &raw mut patch) };
        (status.code == 0).then(|| format!("{major}.{minor}.{patch}"))
    }

    /// Returns why reads cannot go in batches, if they cannot.
    pub(crate) fn lacks_batches(&self) -> Option<&'static str> {
        let Table { batch_set_up, batch_submit, batch_status, batch_cancel, batch_destroy, .. } =
            &*self.table;
        let is_complete = batch_set_up.is_some()
            && batch_submit.is_some()
            && batch_status.is_some()
            && batch_cancel.is_some()
            && batch_destroy.is_some();
        match self.vendor {
            // Its functions are there, but those that tell of reads and end batches do nothing (AMD, "Batch I/O API reference").
            Vendor::Amd => Some("hipFile takes batches, but does not tell when their reads are done"),
            Vendor::Nvidia if is_complete => None,
            Vendor::Nvidia => Some("the library has no batches"),
        }
    }

    /// Tells whether this is the process that opened it: a child of a fork leaves it alone.
    pub(crate) fn is_ours(&self) -> bool {
        self.process == std::process::id()
    }

    /// A panic elsewhere leaves a table that is whole.
    pub(crate) fn files(&self) -> MutexGuard<'_, HashMap<RawFd, Weak<Registered>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// Makes a status a result; `call` is the name without the vendor's prefix.
    pub(crate) fn check(&self, call: &str, status: Status) -> Result<(), CallFailed> {
        match status.code {
            0 => Ok(()),
            code => {
                let driver_code = (code == sys::DEVICE_DRIVER_ERROR).then_some(status.driver_code);
                Err(self.failed(call, code, driver_code))
            }
        }
    }

    pub(crate) fn failed(&self, call: &str, code: c_int, driver_code: Option<c_int>) -> CallFailed {
        let call = format!("{}{call}", self.vendor.library());
        CallFailed { call, code, driver_code, meaning: self.meaning(code) }
    }

    fn meaning(&self, code: c_int) -> String {
        if let Some(text) = self.table.hip_code_text {
            // SAFETY: takes any number; returns a static, terminated string, or null.
            let text = unsafe { text(code) };
            if !text.is_null() {
                // SAFETY: as just said.
                return unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
            }
        }
        let known = sys::CODES.iter().find(|(number, _)| sys::BASE_ERROR + number == code);
        known.map_or(String::new(), |(_, meaning)| (*meaning).to_owned())
    }

    /// Reads into device memory; returns how many bytes came, 0 at the file's end.
    ///
    /// # Safety
    /// - The handle is a registered file's.
    /// - The `len_bytes` bytes from `base + base_offset_bytes` are memory of the device that is current, which nobody else touches until
    ///   the call returns.
    pub(crate) unsafe fn read(
        &self,
        handle: FileHandle,
        base: u64,
        base_offset_bytes: u64,
        file_offset_bytes: u64,
        len_bytes: usize,
    ) -> Result<u64, ReadFailed> {
        let base = ptr::with_exposed_provenance_mut::<c_void>(base as usize);
        // SAFETY: the caller's promise.
        let result = unsafe {
            (self.table.read)(handle, base, len_bytes, file_offset_bytes as i64, base_offset_bytes as i64)
        };
        self.read_result(result)
    }

    /// Makes what a read returns a result: bytes, -1 with the thread's error number, or a code of the system's or the library's, negative.
    pub(crate) fn read_result(&self, result: isize) -> Result<u64, ReadFailed> {
        match result {
            -1 => Err(ReadFailed::System(io::Error::last_os_error())),
            result => self.event_result(result),
        }
    }

    /// Makes what is told of a read in a batch a result. It ran on a thread of the library's, so the error number of this one says nothing.
    pub(crate) fn event_result(&self, result: isize) -> Result<u64, ReadFailed> {
        let code = result.unsigned_abs() as c_int;
        match result {
            0.. => Ok(result as u64),
            -1 => Err(ReadFailed::Unsaid),
            _ if code < sys::BASE_ERROR => Err(ReadFailed::System(io::Error::from_raw_os_error(code))),
            _ => Err(ReadFailed::Call(self.failed("Read", code, None))),
        }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        if self.opened.is_none() || !self.is_ours() {
            return;
        }
        let close = self.table.driver_close_v2.unwrap_or(self.table.driver_close);
        within(&*self.device, || {
            // SAFETY: opened by this value, and every file and buffer, which keep it, is deregistered.
            let status = unsafe { close() };
            if let Err(error) = self.check("DriverClose", status) {
                tracing::warn!(%error, "direct storage was not closed");
            }
        });
    }
}

/// That a library is open, until it is closed: dropped with it, behind the call that closes.
struct Opened(Vendor);

impl Opened {
    fn new(vendor: Vendor) -> Opened {
        *Opened::process(vendor).0 = Some(std::process::id());
        Opened(vendor)
    }

    /// Waits until a library that nobody has any more is closed: opened before that, it would be closed under its user's feet.
    fn wait_until_closed(vendor: Vendor) -> Result<(), Refusal> {
        let (mut process, closed) = Opened::process(vendor);
        while let Some(opener) = *process {
            if opener != std::process::id() {
                return Err(Refusal::Forked); // The thread that closes it is the parent's.
            }
            process = closed.wait(process).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// A panic elsewhere leaves a number, or none.
    fn process(vendor: Vendor) -> (MutexGuard<'static, Option<u32>>, &'static Condvar) {
        let (process, closed) = &CLOSING[vendor as usize];
        (process.lock().unwrap_or_else(PoisonError::into_inner), closed)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let (mut process, closed) = Opened::process(self.0);
        if *process == Some(std::process::id()) {
            *process = None;
            closed.notify_all();
        }
    }
}

/// Runs a call that lets go of something inside its device. One that is lost cannot be entered; the library has to forget what is let go of
/// all the same, because the next to come may have the same address or descriptor.
pub(crate) fn within(device: &dyn Device, mut act: impl FnMut()) {
    if device.enter(&mut act).is_err() {
        act();
    }
}

/// A read that failed.
#[derive(Debug)]
pub(crate) enum ReadFailed {
    /// The system refused.
    System(io::Error),
    /// The library did.
    Call(CallFailed),
    /// Somebody did, and nobody says who or why.
    Unsaid,
}

impl std::fmt::Display for ReadFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ReadFailed::System(error) => error.fmt(f),
            ReadFailed::Call(error) => error.fmt(f),
            ReadFailed::Unsaid => f.write_str("the library does not say why"),
        }
    }
}

fn load(vendor: Vendor) -> Result<Arc<Table>, Refusal> {
    let load = || Table::load(vendor, &vendor.candidates()).map(Arc::new);
    LOADED[vendor as usize].get_or_init(load).clone().map_err(|error| Refusal::Library { vendor, error })
}

/// hipFile reads it once, when it is first used; `false` makes it refuse what it cannot read directly.
const HIPFILE_COMPATIBILITY_VARIABLE: &str = "HIPFILE_ALLOW_COMPAT_MODE";
