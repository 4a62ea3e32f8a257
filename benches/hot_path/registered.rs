//! Copies to a CUDA device straight out of a mapped file, windows of which are registered with the driver.
//!
//! The loader never does this: its types let a device copy only from memory of its own, and other vendors' drivers do not take
//! pages of files. So the bench has its own few functions of the driver.

use std::env;
use std::ffi::{c_int, c_uint, c_void};
use std::fs::File;
use std::path::PathBuf;

use memmap2::Mmap;
use tensorhaul_cuda::LIBRARY_VARIABLE;

use crate::Failure;

tensorhaul_device::driver_table! {
    /// What it takes to register, copy and wait.
    struct Table {
        fn cuDeviceGet(*mut c_int, c_int);
        fn cuDevicePrimaryCtxRetain(*mut *mut c_void, c_int);
        fn cuDevicePrimaryCtxRelease_v2(c_int);
        fn cuCtxSetCurrent(*mut c_void);
        fn cuStreamCreate(*mut *mut c_void, c_uint);
        fn cuStreamSynchronize(*mut c_void);
        fn cuStreamDestroy_v2(*mut c_void);
        fn cuMemHostRegister_v2(*mut c_void, usize, c_uint);
        fn cuMemHostUnregister(*mut c_void);
        fn cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, *mut c_void);
        optional:
    }
}

/// The first device's primary context, which the backend uses too.
pub(crate) struct Registrar {
    table: Table,
    device: c_int,
    context: *mut c_void,
}

// SAFETY: a context's handle may be used on any thread; the value never changes.
unsafe impl Sync for Registrar {}

impl Registrar {
    /// Finds the functions in the driver that the backend has initialized.
    pub(crate) fn new() -> Result<Registrar, Failure> {
        let library = env::var_os(LIBRARY_VARIABLE).map_or_else(|| "libcuda.so.1".into(), PathBuf::from);
        let table = Table::load(&[library])?;
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: the driver is initialized and writes one number.
        check("cuDeviceGet", unsafe { (table.cuDeviceGet)(&mut device, 0) })?;
        // SAFETY: the device is the driver's answer; it writes one handle.
        let code = unsafe { (table.cuDevicePrimaryCtxRetain)(&mut context, device) };
        check("cuDevicePrimaryCtxRetain", code)?;
        Ok(Registrar { table, device, context })
    }

    /// Asks whether the driver registers pages of a file at all.
    ///
    /// # Errors
    /// The driver's refusal.
    pub(crate) fn probe(&self, file: &File) -> Result<(), Failure> {
        // SAFETY: the file is the bench's own, which writes to it no more.
        let mapped = unsafe { Mmap::map(file) }?;
        self.enter()?;
        self.unregister(self.register(&mapped)?)
    }

    /// Copies windows of mappings to addresses of the device until there is no next; returns when all have arrived.
    ///
    /// Two streams in turn: while one window is copied, the next is registered.
    pub(crate) fn copy_all<'m>(&self, next: impl Fn() -> Option<(&'m [u8], u64)>) -> Result<(), Failure> {
        self.enter()?;
        let streams = [self.stream()?, self.stream()?];
        let mut in_flight = [const { None }; 2];
        for turn in (0..2).cycle() {
            let Some((bytes, target)) = next() else { break };
            if let Some(window) = in_flight[turn].take() {
                streams[turn].synchronize()?;
                self.unregister(window)?;
            }
            let window = self.register(bytes)?;
            streams[turn].copy(&window, target)?;
            in_flight[turn] = Some(window);
        }
        streams.iter().try_for_each(Stream::synchronize)?;
        in_flight.into_iter().flatten().try_for_each(|window| self.unregister(window))
    }

    /// Makes the context current on the calling thread.
    fn enter(&self) -> Result<(), Failure> {
        // SAFETY: the context is retained until `self` is dropped.
        check("cuCtxSetCurrent", unsafe { (self.table.cuCtxSetCurrent)(self.context) })
    }

    fn stream(&self) -> Result<Stream<'_>, Failure> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: a context is current; the driver writes one handle.
        let code = unsafe { (self.table.cuStreamCreate)(&mut handle, STREAM_NON_BLOCKING) };
        check("cuStreamCreate", code)?;
        Ok(Stream { table: &self.table, handle })
    }

    fn register<'m>(&self, bytes: &'m [u8]) -> Result<Window<'m>, Failure> {
        let start = bytes.as_ptr().cast_mut().cast();
        let flags = REGISTER_PORTABLE | REGISTER_READ_ONLY;
        // SAFETY: the bytes are mapped for as long as the window lives, they start on a page, and the driver is told that they are
        // only read.
        let code = unsafe { (self.table.cuMemHostRegister_v2)(start, bytes.len(), flags) };
        check("cuMemHostRegister", code)?;
        Ok(Window(bytes))
    }

    /// Gives a window up; the copies from it were waited for.
    fn unregister(&self, Window(bytes): Window<'_>) -> Result<(), Failure> {
        // SAFETY: registered by `register`, and not twice, since the window is consumed.
        let code = unsafe { (self.table.cuMemHostUnregister)(bytes.as_ptr().cast_mut().cast()) };
        check("cuMemHostUnregister", code)
    }
}

impl Drop for Registrar {
    fn drop(&mut self) {
        // SAFETY: retained in `new`, and streams and windows borrow `self`.
        let _ = unsafe { (self.table.cuDevicePrimaryCtxRelease_v2)(self.device) };
    }
}

struct Stream<'t> {
    table: &'t Table,
    handle: *mut c_void,
}

impl Stream<'_> {
    /// Queues a copy of a whole window.
    fn copy(&self, window: &Window<'_>, target: u64) -> Result<(), Failure> {
        let (source, len_bytes) = (window.0.as_ptr().cast(), window.0.len());
        // SAFETY: the window is registered, and unregistered only when this stream was waited for; the target is as much of an
        // allocation that lives until then.
        let code = unsafe { (self.table.cuMemcpyHtoDAsync_v2)(target, source, len_bytes, self.handle) };
        check("cuMemcpyHtoDAsync", code)
    }

    fn synchronize(&self) -> Result<(), Failure> {
        // SAFETY: the stream was made by `Registrar::stream` and lives.
        check("cuStreamSynchronize", unsafe { (self.table.cuStreamSynchronize)(self.handle) })
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `Registrar::stream`; work still queued after an error is completed by the driver first.
        let _ = unsafe { (self.table.cuStreamDestroy_v2)(self.handle) };
    }
}

/// Bytes that the device can copy from. After an error it may still do so: a window that is only dropped stays registered, which
/// keeps its pages in memory.
struct Window<'m>(&'m [u8]);

fn check(call: &str, code: i32) -> Result<(), Failure> {
    match code {
        0 => Ok(()),
        _ => Err(format!("{call} answered {code}").into()),
    }
}

/// `CU_STREAM_NON_BLOCKING`.
const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_MEMHOSTREGISTER_PORTABLE`.
const REGISTER_PORTABLE: c_uint = 1;
/// `CU_MEMHOSTREGISTER_READ_ONLY` (CUDA 11.1): without it, pages that the process may not write are refused.
const REGISTER_READ_ONLY: c_uint = 8;
