//! Pinned host memory: huge pages registered with the driver, or the driver's own.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tensorhaul_stage::{HostMemory, Placement, StagingMemory};

use super::Shared;
use super::driver::{Driver, Meaning};
use crate::contract::DeviceError;

/// Pins staging memory by the first way that works.
///
/// Registering memory of one's own comes first: on 2 MiB pages there are 512 times fewer of them to pin,
/// and io_uring can register the same memory. Containers and some filesystems refuse it; the driver's own
/// allocation then serves, and the refusal is noted for the report and not provoked again.
///
/// Returns where the system was asked to put it, too.
pub(super) fn allocate<D: Driver>(
    shared: &Arc<Shared<D>>,
    len_bytes: usize,
) -> Result<(Box<dyn StagingMemory>, Placement), DeviceError> {
    let memory = shared.near.allocate(len_bytes.max(1))?;
    let placement = memory.placement();
    if let Some(pinned) = register(shared, Arc::new(memory))? {
        return Ok((pinned, placement));
    }
    let _bound = shared.bind()?;
    match shared.driver.host_allocate(len_bytes.max(1)) {
        Ok(start) => {
            let start = NonNull::new(start.cast()).expect("a successful allocation is not null");
            // Drivers do not promise zeroes, and staging memory is initialized.
            // SAFETY: the driver gave these bytes to us alone.
            unsafe { start.write_bytes(0, len_bytes) };
            Ok((Box::new(Allocated { shared: Arc::clone(shared), start, len_bytes }), Placement::Anywhere))
        }
        Err(error) if error.meaning == Meaning::Lost => Err(shared.failed(error)),
        Err(error) => {
            Err(DeviceError::OutOfHostMemory { needed_bytes: len_bytes as u64, source: error.into() })
        }
    }
}

/// Registers host memory; `None` when the driver refuses, or has refused before.
pub(super) fn register<D: Driver>(
    shared: &Arc<Shared<D>>,
    memory: Arc<HostMemory>,
) -> Result<Option<Box<dyn StagingMemory>>, DeviceError> {
    if !shared.registers.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let _bound = shared.bind()?;
    // SAFETY: the memory is mapped and page-aligned, and `Registered` unregisters it before it lets go of it.
    match unsafe { shared.driver.host_register(memory.as_ptr().as_ptr().cast(), memory.len_bytes()) } {
        Ok(()) => {
            let memory = ManuallyDrop::new(memory);
            Ok(Some(Box::new(Registered { shared: Arc::clone(shared), memory })))
        }
        Err(error) if error.meaning == Meaning::Lost => Err(shared.failed(error)),
        Err(refused) => {
            shared.registers.store(false, Ordering::Relaxed);
            let what = "staging memory is the driver's own instead of registered huge pages";
            shared.note(what, refused.to_string());
            Ok(None)
        }
    }
}

struct Registered<D: Driver> {
    shared: Arc<Shared<D>>,
    /// Let go of only once the driver has.
    memory: ManuallyDrop<Arc<HostMemory>>,
}

struct Allocated<D: Driver> {
    shared: Arc<Shared<D>>,
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: `memory` is such memory, and kept alive.
unsafe impl<D: Driver> StagingMemory for Registered<D> {
    fn as_ptr(&self) -> NonNull<u8> {
        self.memory.as_ptr()
    }

    fn len_bytes(&self) -> usize {
        self.memory.len_bytes()
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
