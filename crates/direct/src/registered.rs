//! Files and device memory that a library knows, until they are dropped.

use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr;
use std::sync::{Arc, Weak};

use tensorhaul_device::Device;

use crate::library::{Library, within};
use crate::refusal::CallFailed;
use crate::sys::{self, Descriptor, DescriptorHandle, FileHandle};

/// A file that the library knows; dropping it makes the library forget it.
pub(crate) struct Registered {
    library: Arc<Library>,
    /// The device that was current when it was registered.
    device: Arc<dyn Device>,
    fd: RawFd,
    handle: FileHandle,
}

impl Registered {
    /// Registers a descriptor, which must stay open for the life of the value, with this device current; or returns what registered it
    /// before.
    pub(crate) fn file(
        library: &Arc<Library>,
        device: &Arc<dyn Device>,
        file: BorrowedFd<'_>,
    ) -> Result<Arc<Registered>, CallFailed> {
        let fd = file.as_raw_fd();
        // Held across the call, so that nobody registers the same file meanwhile.
        let mut files = loop {
            let files = library.files();
            match files.get(&fd).map(Weak::upgrade) {
                None => break files,
                Some(Some(registered)) => return Ok(registered),
                // The last owner is about to make the library forget it.
                Some(None) => drop(files),
            }
            std::thread::yield_now();
        };
        let mut descriptor =
            Descriptor { kind: sys::HANDLE_TYPE_FD, handle: DescriptorHandle { fd }, fs_ops: ptr::null() };
        let mut handle = ptr::null_mut();
        // SAFETY: both are valid for the call, which writes the handle.
        let status = unsafe { (library.table().handle_register)(&raw mut handle, &raw mut descriptor) };
        library.check("HandleRegister", status)?;
        let (library, device) = (Arc::clone(library), Arc::clone(device));
        let registered = Arc::new(Registered { library, device, fd, handle });
        files.insert(fd, Arc::downgrade(&registered));
        Ok(registered)
    }

    pub(crate) fn handle(&self) -> FileHandle {
        self.handle
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let Registered { library, device, fd, handle } = self;
        if !library.is_ours() {
            return;
        }
        let mut files = library.files();
        files.remove(fd);
        // SAFETY: registered above, and no read of it is under way: engines end before they let go of their files, or never do.
        within(&**device, || unsafe { (library.table().handle_deregister)(*handle) });
    }
}

// SAFETY: a handle of the library's, which is documented to be used from any thread.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

/// Device memory that the library has mapped for storage; dropping it undoes that.
pub(crate) struct RegisteredBuffer {
    library: Arc<Library>,
    device: Arc<dyn Device>,
    base: u64,
}

impl RegisteredBuffer {
    /// Registers device memory.
    ///
    /// # Safety
    /// The range is one allocation of this device, which is current, or inside one, and outlives the value.
    pub(crate) unsafe fn new(
        library: &Arc<Library>,
        device: &Arc<dyn Device>,
        base: u64,
        len_bytes: u64,
    ) -> Result<RegisteredBuffer, CallFailed> {
        let start = ptr::with_exposed_provenance::<c_void>(base as usize);
        // SAFETY: the caller's promise.
        let status = unsafe { (library.table().buffer_register)(start, len_bytes as usize, 0) };
        library.check("BufRegister", status)?;
        Ok(RegisteredBuffer { library: Arc::clone(library), device: Arc::clone(device), base })
    }
}

impl Drop for RegisteredBuffer {
    fn drop(&mut self) {
        let RegisteredBuffer { library, device, base } = self;
        if !library.is_ours() {
            return;
        }
        let start = ptr::with_exposed_provenance::<c_void>(*base as usize);
        within(&**device, || {
            // SAFETY: registered above, and no read into it is under way.
            let status = unsafe { (library.table().buffer_deregister)(start) };
            if let Err(error) = library.check("BufDeregister", status) {
                tracing::warn!(%error, "device memory stays registered for direct storage");
            }
        });
    }
}
