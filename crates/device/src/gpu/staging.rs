//! Pinned host memory: huge pages registered with the driver, or the driver's own.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::Arc;

use tensorhaul_stage::{HostMemory, StagingMemory};

use super::Shared;
use super::driver::Driver;
use crate::contract::DeviceError;

/// Pins staging memory by the first way that works.
///
/// Registering memory of one's own comes first: on 2 MiB pages there are 512 times fewer of them to pin,
/// and io_uring can register the same memory. Containers and some filesystems refuse it; the driver's own
/// allocation then serves, and the refusal is noted for the report.
pub(super) fn allocate<D: Driver>(
    shared: &Arc<Shared<D>>,
    len_bytes: usize,
) -> Result<Box<dyn StagingMemory>, DeviceError> {
    let refused = match register(shared, len_bytes)? {
        Ok(pinned) => return Ok(Box::new(pinned)),
        Err(refused) => refused,
    };
    shared.note("staging memory is the driver's own instead of registered huge pages", refused.to_string());
    let _bound = shared.bind()?;
    match shared.driver.host_allocate(len_bytes.max(1)) {
        Ok(start) => {
            let start = NonNull::new(start.cast()).expect("a successful allocation is not null");
            // Drivers do not promise zeroes, and staging memory is initialized.
            // SAFETY: the driver gave these bytes to us alone.
            unsafe { start.write_bytes(0, len_bytes) };
            Ok(Box::new(Allocated { shared: Arc::clone(shared), start, len_bytes }))
        }
        Err(error) => {
            Err(DeviceError::OutOfHostMemory { needed_bytes: len_bytes as u64, source: error.into() })
        }
    }
}

/// Registers fresh host memory; the inner error is the driver's refusal.
fn register<D: Driver>(
    shared: &Arc<Shared<D>>,
    len_bytes: usize,
) -> Result<Result<Registered<D>, super::CallError>, DeviceError> {
    let out_of_memory = |source: tensorhaul_stage::AllocateError| DeviceError::OutOfHostMemory {
        needed_bytes: len_bytes as u64,
        source: source.into(),
    };
    let memory = HostMemory::allocate(len_bytes.max(1)).map_err(out_of_memory)?;
    let _bound = shared.bind()?;
    // SAFETY: the memory is mapped and page-aligned, and `Registered` unregisters it before it is unmapped.
    let registered =
        unsafe { shared.driver.host_register(memory.as_ptr().as_ptr().cast(), memory.len_bytes()) };
    Ok(registered.map(|()| Registered {
        shared: Arc::clone(shared),
        memory: ManuallyDrop::new(memory),
        len_bytes,
    }))
}

struct Registered<D: Driver> {
    shared: Arc<Shared<D>>,
    /// Unmapped only once the driver has let go of it.
    memory: ManuallyDrop<HostMemory>,
    len_bytes: usize,
}

struct Allocated<D: Driver> {
    shared: Arc<Shared<D>>,
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: `memory` is such memory, ours alone; `len_bytes` is at most its length.
unsafe impl<D: Driver> StagingMemory for Registered<D> {
    fn as_ptr(&self) -> NonNull<u8> {
        self.memory.as_ptr()
    }

    fn len_bytes(&self) -> usize {
        self.len_bytes
    }
}

// SAFETY: the driver's allocation is readable, writable, stays where it is, and was zeroed.
unsafe impl<D: Driver> StagingMemory for Allocated<D> {
    fn as_ptr(&self) -> NonNull<u8> {
        self.start
    }

    fn len_bytes(&self) -> usize {
        self.len_bytes
    }
}

// SAFETY: an address and a length; whoever reads or writes through it answers for the order of accesses.
unsafe impl<D: Driver> Send for Allocated<D> {}
// SAFETY: as above; the value itself never changes.
unsafe impl<D: Driver> Sync for Allocated<D> {}

impl<D: Driver> Drop for Registered<D> {
    fn drop(&mut self) {
        if let Ok(_bound) = self.shared.bind() {
            // SAFETY: registered above; the ring gives memory up only when no copy from it is queued.
            let unregistered =
                unsafe { self.shared.driver.host_unregister(self.memory.as_ptr().as_ptr().cast()) };
            if unregistered.is_ok() {
                // SAFETY: dropped here and nowhere else.
                unsafe { ManuallyDrop::drop(&mut self.memory) };
            }
        }
    }
}

impl<D: Driver> Drop for Allocated<D> {
    fn drop(&mut self) {
        if let Ok(_bound) = self.shared.bind() {
            // SAFETY: allocated above, as for `Registered`.
            let _ = unsafe { self.shared.driver.host_free(self.start.as_ptr().cast::<c_void>()) };
        }
    }
}
