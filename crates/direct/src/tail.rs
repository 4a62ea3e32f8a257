//! The last, partial page of a file, where storage takes whole pages only: at most one for each file.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use tensorhaul_device::{Allocation, Device, DeviceError, Stream};
use tensorhaul_io::{OpenFile, ReadCause};

/// Where a tail comes from and goes to.
pub(crate) struct Tail<'t> {
    pub(crate) device: &'t dyn Device,
    pub(crate) file: &'t OpenFile,
    pub(crate) target: &'t Arc<dyn Allocation>,
}

impl Tail<'_> {
    /// Reads the bytes to the host and copies them to the device; they are there when it returns.
    pub(crate) fn read(&self, at_bytes: u64, len: usize, offset_bytes: u64) -> Result<(), ReadCause> {
        let device_failed = |error: DeviceError| ReadCause::Library(error.into());
        let staging = self.device.staging_memory(len).map_err(device_failed)?;
        // SAFETY: staging memory is initialized, as long, and this function's alone; no copy of it is queued yet.
        let staged = unsafe { std::slice::from_raw_parts_mut(staging.as_ptr().as_ptr(), len) };
        self.file.cached().read_exact_at(staged, at_bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ReadCause::End { at_bytes },
            _ => ReadCause::Io(error),
        })?;
        // SAFETY: the target's range is the job's own; the staging memory lives until the wait, or is leaked.
        unsafe { self.device.copy(staged, self.target, offset_bytes, Stream::Copy) }
            .map_err(device_failed)?;
        let wait = || self.device.record(Stream::Copy).and_then(|event| self.device.wait(&event));
        wait().map_err(|error| {
            if wait().is_err() {
                std::mem::forget(staging); // The device may still read it.
            }
            device_failed(error)
        })
    }
}
