//! Both vendors' names for the functions.

use std::ffi::{c_int, c_uint, c_void};

use super::batch::{self, BatchEvent, BatchRead};
use super::{
    Descriptor, Properties, Status, Vendor, buffer_deregister, buffer_register, by_errno, close,
    handle_deregister, handle_register, open, parameter, properties, read, set_parameter,
};

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
            close($vendor, stringify!($close))
        }
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $handle_register(
            handle: *mut *mut c_void,
            file: *mut Descriptor,
        ) -> Status {
            // SAFETY: the caller's promise.
            unsafe { handle_register($vendor, stringify!($handle_register), handle, file) }
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
            by_errno(read($vendor, stringify!($read), handle, base, len, [file_offset, base_offset]))
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
        pub(crate) unsafe extern "C" fn $batch_set_up(handle: *mut *mut c_void, count: c_uint) -> Status {
            // SAFETY: the caller's promise.
            unsafe { batch::set_up(stringify!($batch_set_up), handle, count) }
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
            unsafe { batch::submit($vendor, names, handle, count, reads) }
        }
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $batch_status(
            handle: *mut c_void,
            least: c_uint,
            count: *mut c_uint,
            events: *mut BatchEvent,
            time: *const libc::timespec,
        ) -> Status {
            // SAFETY: the caller's promise.
            unsafe { batch::status($vendor, stringify!($batch_status), handle, least, count, events, time) }
        }
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $batch_cancel(_handle: *mut c_void) -> Status {
            batch::cancel($vendor, stringify!($batch_cancel))
        }
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $batch_destroy(handle: *mut c_void) {
            batch::destroy(stringify!($batch_destroy), handle)
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
