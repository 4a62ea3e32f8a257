//! The functions of the vendors' libraries, in one table: AMD's mirror NVIDIA's, name by name.
//!
//! # Source
//! NVIDIA, "cuFile API Reference Guide", release 1.14 (CUDA 12.9): signatures, structures, codes. AMD, "hipFile API reference",
//! 0.2: the same, with [`Properties`] laid out otherwise, and its own way to ask for a version.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem;
use std::path::{Path, PathBuf};

use libloading::Library;
use tensorhaul_device::gpu::table::{TableError, answer};

use crate::vendor::Vendor;

/// Declares the table and its loader: functions that both vendors have and that are required, then those that older releases lack,
/// then those that only one vendor has, with its prefix.
macro_rules! table {
    (
        required:
        $(fn $required:ident = $required_name:literal $required_type:tt $(-> $required_result:ty)?;)*
        optional:
        $(fn $optional:ident = $optional_name:literal $optional_type:tt $(-> $optional_result:ty)?;)*
        of one vendor:
        $(fn $own:ident = $own_name:literal $own_type:tt $(-> $own_result:ty)?;)*
    ) => {
        /// The functions of one vendor's library.
        pub(crate) struct Table {
            $(pub(crate) $required: unsafe extern "C" fn $required_type $(-> $required_result)?,)*
            $(pub(crate) $optional: Option<unsafe extern "C" fn $optional_type $(-> $optional_result)?>,)*
            $(pub(crate) $own: Option<unsafe extern "C" fn $own_type $(-> $own_result)?>,)*
            pub(crate) path: PathBuf,
            /// Keeps the functions mapped.
            _library: Library,
        }

        impl Table {
            fn look_up(library: Library, path: &Path, vendor: Vendor) -> Result<Table, TableError> {
                $(
                    let name = [concat!("cuFile", $required_name), concat!("hipFile", $required_name)][vendor as usize];
                    // SAFETY: the vendor documents this function with this signature, stable across versions.
                    let $required = match unsafe { library.get(name) } {
                        Ok(symbol) => *symbol,
                        Err(_) => return Err(TableError::MissingSymbol { library: path.to_owned(), symbol: name }),
                    };
                )*
                $(
                    let name = [concat!("cuFile", $optional_name), concat!("hipFile", $optional_name)][vendor as usize];
                    // SAFETY: as above.
                    let $optional = unsafe { library.get(name) }.ok().map(|symbol| *symbol);
                )*
                $(
                    // SAFETY: as above.
                    let $own = unsafe { library.get($own_name) }.ok().map(|symbol| *symbol);
                )*
                Ok(Table { $($required,)* $($optional,)* $($own,)* path: path.to_owned(), _library: library })
            }
        }
    };
}

table! {
    required:
    fn driver_open = "DriverOpen" () -> Status;
    fn driver_close = "DriverClose" () -> Status;
    fn handle_register = "HandleRegister" (*mut FileHandle, *mut Descriptor) -> Status;
    fn handle_deregister = "HandleDeregister" (FileHandle);
    fn buffer_register = "BufRegister" (*const c_void, usize, c_int) -> Status;
    fn buffer_deregister = "BufDeregister" (*const c_void) -> Status;
    fn read = "Read" (FileHandle, *mut c_void, usize, i64, i64) -> isize;
    optional:
    fn driver_properties = "DriverGetProperties" (*mut Properties) -> Status;
    fn parameter_bool = "GetParameterBool" (c_int, *mut bool) -> Status;
    fn set_parameter_bool = "SetParameterBool" (c_int, bool) -> Status;
    fn batch_set_up = "BatchIOSetUp" (*mut BatchHandle, c_uint) -> Status;
    fn batch_submit = "BatchIOSubmit" (BatchHandle, c_uint, *mut BatchRead, c_uint) -> Status;
    fn batch_status = "BatchIOGetStatus" (BatchHandle, c_uint, *mut c_uint, *mut BatchEvent, *mut libc::timespec) -> Status;
    fn batch_cancel = "BatchIOCancel" (BatchHandle) -> Status;
    fn batch_destroy = "BatchIODestroy" (BatchHandle);
    of one vendor:
    fn driver_close_v2 = "cuFileDriverClose_v2" () -> Status;
    fn cu_version = "cuFileGetVersion" (*mut c_int) -> Status;
    fn hip_version = "hipFileGetVersion" (*mut c_uint, *mut c_uint, *mut c_uint) -> Status;
    fn hip_code_text = "hipFileGetOpErrorString" (c_int) -> *const c_char;
}

impl Table {
    /// Loads the first of these libraries that exists, and looks its functions up.
    pub(crate) fn load(vendor: Vendor, candidates: &[PathBuf]) -> Result<Table, TableError> {
        let mut tried = Vec::new();
        for path in candidates {
            // SAFETY: these are the names of the vendor's library, or a path the user gave for it; loading it runs its
            // initializers, which touch no device.
            match unsafe { Library::new(path) } {
                Ok(library) => return Table::look_up(library, path, vendor),
                Err(error) => tried.push((path.clone(), answer(&error))),
            }
        }
        Err(TableError::NoLibrary { tried })
    }
}

/// `CUfileError_t`, `hipFileError_t`: returned by value.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Status {
    /// `CUfileOpError`, `hipFileOpError_t`: 0, or [`BASE_ERROR`] and more.
    pub(crate) code: c_int,
    /// The device driver's own code, where `code` is [`DEVICE_DRIVER_ERROR`].
    pub(crate) driver_code: c_int,
}
const _: () = assert!(size_of::<Status>() == 8);

/// `CUfileHandle_t`, `hipFileHandle_t`.
pub(crate) type FileHandle = *mut c_void;

/// `CUfileBatchHandle_t`, `hipFileBatchHandle_t`.
pub(crate) type BatchHandle = *mut c_void;

/// `CUfileDescr_t`, `hipFileDescr_t`.
#[repr(C)]
pub(crate) struct Descriptor {
    /// [`HANDLE_TYPE_FD`].
    pub(crate) kind: c_int,
    pub(crate) handle: DescriptorHandle,
    /// Operations of filesystems in user space; null for those of the kernel.
    pub(crate) fs_ops: *const c_void,
}
const _: () = assert!(size_of::<Descriptor>() == 24);

#[repr(C)]
pub(crate) union DescriptorHandle {
    pub(crate) fd: c_int,
    /// Of other systems; makes the union as large as it is.
    pub(crate) _handle: *mut c_void,
}

/// `CUfileDrvProps_t` and `hipFileDriverProps_t`, as far as they are alike, and room for the rest of either and for what later
/// releases add.
#[repr(C)]
pub(crate) struct Properties {
    pub(crate) major_version: c_uint,
    pub(crate) minor_version: c_uint,
    pub(crate) poll_threshold: u64,
    pub(crate) max_direct_io: u64,
    pub(crate) status_flags: c_uint,
    pub(crate) control_flags: c_uint,
    // From here on NVIDIA's alone.
    pub(crate) feature_flags: c_uint,
    pub(crate) max_device_cache: c_uint,
    pub(crate) per_buffer_cache: c_uint,
    pub(crate) max_device_pinned: c_uint,
    /// `max_batch_io_size`: entries, not bytes.
    pub(crate) batch_entries_max: c_uint,
    pub(crate) rest: [c_uint; 64],
}
const _: () = assert!(mem::offset_of!(Properties, batch_entries_max) == 48);

/// `CUfileIOParams_t`, `hipFileIOParams_t`.
#[repr(C)]
pub(crate) struct BatchRead {
    /// [`BATCH_MODE`].
    pub(crate) mode: c_int,
    pub(crate) base: *mut c_void,
    pub(crate) file_offset: i64,
    pub(crate) base_offset: i64,
    pub(crate) len: usize,
    pub(crate) handle: FileHandle,
    /// [`BATCH_READ`].
    pub(crate) operation: c_int,
    pub(crate) cookie: *mut c_void,
}
const _: () = assert!(size_of::<BatchRead>() == 64);

/// `CUfileIOEvents_t`, `hipFileIOEvents_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct BatchEvent {
    pub(crate) cookie: *mut c_void,
    /// [`BATCH_COMPLETE`], or what went wrong.
    pub(crate) status: c_int,
    /// Bytes read, or negative as what `read` returns.
    pub(crate) result: usize,
}
const _: () = assert!(size_of::<BatchEvent>() == 24);

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`.
pub(crate) const HANDLE_TYPE_FD: c_int = 1;
/// `CUFILE_BATCH`.
pub(crate) const BATCH_MODE: c_int = 1;
/// `CUFILE_READ`.
pub(crate) const BATCH_READ: c_int = 0;
/// `CUFILE_COMPLETE`.
pub(crate) const BATCH_COMPLETE: c_int = 0x10;

/// `CUFILE_WAITING`, `CUFILE_PENDING`: not begun yet, and under way.
pub(crate) const BATCH_UNDER_WAY: [c_int; 2] = [0x01, 0x02];
/// The states of `CUfileStatus_t` in which a read is over without being complete, or never began.
pub(crate) const BATCH_OVER: &[(c_int, &str)] =
    &[(0x04, "was not accepted"), (0x08, "was cancelled"), (0x40, "failed")];
/// `CUFILE_TIMEOUT`: nobody waits any longer, which does not say that storage writes no more.
pub(crate) const BATCH_TIMEOUT: c_int = 0x20;

/// `CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE`.
pub(crate) const PARAMETER_ALLOW_COMPATIBILITY: c_int = 1;
/// `CUFILE_PARAM_FORCE_COMPAT_MODE`.
pub(crate) const PARAMETER_FORCE_COMPATIBILITY: c_int = 2;
/// `CUFILE_PARAM_USE_PCIP2PDMA`, since 1.14.
pub(crate) const PARAMETER_USE_PCI_P2PDMA: c_int = 7;
/// `CU_FILE_ALLOW_COMPAT_MODE`, a bit of the control flags.
pub(crate) const CONTROL_ALLOW_COMPATIBILITY: c_uint = 1 << 1;

/// `CUFILEOP_BASE_ERR`, `HIPFILE_BASE_ERR`.
pub(crate) const BASE_ERROR: c_int = 5000;
/// `CU_FILE_CUDA_DRIVER_ERROR`, `hipFileHipDriverError`.
pub(crate) const DEVICE_DRIVER_ERROR: c_int = 5011;
/// `CU_FILE_DRIVER_ALREADY_OPEN`.
pub(crate) const DRIVER_ALREADY_OPEN: c_int = 5026;

/// What the codes from [`BASE_ERROR`] on mean, the same of both vendors up to 38.
pub(crate) const CODES: &[(c_int, &str)] = &[
    (1, "its kernel driver is not loaded"),
    (2, "invalid property"),
    (3, "property out of range"),
    (4, "library and kernel driver differ in version"),
    (5, "the kernel driver's version cannot be read"),
    (6, "the driver is closing"),
    (7, "platform not supported"),
    (8, "not supported on this file"),
    (9, "device not supported"),
    (10, "kernel driver error"),
    (11, "device driver error"),
    (12, "not an address of the device"),
    (13, "memory of a kind that cannot be used"),
    (14, "outside the allocation"),
    (15, "another device's context is current"),
    (16, "outside the registered memory"),
    (17, "outside the mapped memory"),
    (18, "file type not supported"),
    (19, "file opened with flags that are not supported"),
    (20, "file opened without O_DIRECT"),
    (22, "invalid argument"),
    (23, "memory is registered already"),
    (24, "memory is not registered"),
    (25, "permission denied"),
    (26, "the driver is open already"),
    (27, "file is not registered"),
    (28, "file is registered already"),
    (29, "device not found"),
    (30, "internal error"),
    (31, "no file descriptor left"),
    (33, "the driver could not be set up"),
    (34, "disabled for this file by the configuration"),
    (35, "batch not accepted"),
    (36, "device memory cannot be pinned"),
    (37, "batch is full"),
    (38, "asynchronous reads not supported"),
    (39, "batch could not be set up"),
    (40, "batch could not be submitted"),
    (41, "batch has no status"),
    (42, "batch cannot be cancelled"),
    (43, "out of memory"),
    (44, "I/O error"),
    (45, "memory could not be registered"),
    (47, "no context of the device is current"),
    (48, "kernel driver error"),
    (49, "compatibility mode is off"),
];
