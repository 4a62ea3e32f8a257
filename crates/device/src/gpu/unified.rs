//! Memory that the device shares with the host: storage writes it, kernels read it, and nothing is copied.

use std::any::Any;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::Arc;

use tensorhaul_stage::StagingMemory;

use super::driver::Driver;
use super::memory::Consumers;
use super::{Shared, staging, topology};
use crate::contract::{Allocation, Device, DeviceError};
use crate::host::Host;

/// Pinned memory of the host with the address that kernels know it by.
///
/// It is made as staging memory is, because huge pages that are registered take direct reads at several times the speed of small
/// ones. Unlike the device's own it is gone at once when it is freed, whatever is queued; so dropping it waits.
pub(super) struct Unified<D: Driver> {
    shared: Arc<Shared<D>>,
    /// Dropped once nobody uses it any more, or never.
    memory: ManuallyDrop<Box<dyn StagingMemory>>,
    address: u64,
    len_bytes: u64,
    consumers: Consumers,
}

impl<D: Driver> Unified<D> {
    pub(super) fn allocate(shared: &Arc<Shared<D>>, len_bytes: u64) -> Result<Unified<D>, DeviceError> {
        let out_of_memory = || DeviceError::OutOfMemory {
            device: shared.id(),
            needed_bytes: len_bytes,
            // Memory that is free and still refused is behind a limit of the process; saying "free" would mislead.
            free_bytes: Host.memory().ok().map(|memory| memory.free_bytes).filter(|free| *free < len_bytes),
        };
        let len = usize::try_from(len_bytes).map_err(|_| out_of_memory())?;
        let (memory, placement) = staging::allocate(shared, len).map_err(|error| match error {
            DeviceError::OutOfHostMemory { .. } => out_of_memory(),
            error => error,
        })?;
        if let Some((node, why)) = topology::refused(placement) {
            let id = shared.id();
            let what = format!("memory of {id} lies on any memory node, not on node {node}, its nearest");
            shared.note(&what, why);
        }
        let _bound = shared.bind()?;
        // SAFETY: staging memory is pinned, and not freed meanwhile.
        let address = unsafe { shared.driver.host_address(memory.as_ptr().as_ptr().cast()) };
        let address = address.map_err(|error| shared.failed(error))?;
        let memory = ManuallyDrop::new(memory);
        let (shared, consumers) = (Arc::clone(shared), Consumers::default());
        Ok(Unified { shared, memory, address, len_bytes, consumers })
    }

    /// Waits for everyone who may still use the memory.
    fn wait(&self) -> Result<(), DeviceError> {
        let shared = &*self.shared;
        let _bound = shared.bind()?;
        shared.order_behind(&self.consumers)?;
        let event = shared.record(shared.copy).map_err(|error| shared.failed(error))?;
        // SAFETY: just recorded, and alive.
        let waited = unsafe { shared.driver.event_wait(event) };
        super::lock(&shared.events).push(event);
        waited.map_err(|error| shared.failed(error))
    }
}

impl<D: Driver> Drop for Unified<D> {
    fn drop(&mut self) {
        if let Err(error) = self.wait() {
            // A device that may still use it must not find somebody else's bytes: it is leaked instead.
            tracing::warn!(device = %self.shared.id(), len_bytes = self.len_bytes, %error, "shared memory leaked");
            return;
        }
        // SAFETY: dropped here and nowhere else.
        unsafe { ManuallyDrop::drop(&mut self.memory) };
    }
}

// SAFETY: staging memory is initialized memory of the host, this value's alone, and freed behind all use; the driver has told by
// which address its device has the same.
unsafe impl<D: Driver> Allocation for Unified<D> {
    fn address(&self) -> u64 {
        self.address
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn host_ptr(&self) -> Option<NonNull<u8>> {
        Some(self.memory.as_ptr())
    }

    fn release_after(&self, stream: u64) {
        self.consumers.add(stream);
    }

    fn keep(&self, owner: Arc<dyn Any + Send + Sync>) {
        self.consumers.keep(owner);
    }
}
