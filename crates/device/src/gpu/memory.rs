//! Device memory that is freed behind whatever may still use it.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use super::driver::{Driver, Meaning, StreamHandle};
use super::{CallError, Shared, lock};
use crate::contract::{Allocation, DeviceError, Kept, STORAGE_ALIGN_BYTES};

/// An allocation of one device.
pub(crate) struct Memory<D: Driver> {
    shared: Arc<Shared<D>>,
    /// What the driver gave; 0 for nothing.
    start: u64,
    address: u64,
    len_bytes: u64,
    is_ordered: bool,
    consumers: Consumers,
}

/// Who may still use memory when it is dropped.
#[derive(Default)]
pub(super) struct Consumers {
    streams: Mutex<Vec<StreamHandle>>,
    /// Owners of those streams, dropped behind the freeing.
    kept: Kept,
}

impl Consumers {
    pub(super) fn add(&self, stream: u64) {
        let (stream, mut streams) = (StreamHandle(stream as usize), lock(&self.streams));
        if !streams.contains(&stream) {
            streams.push(stream);
        }
    }

    pub(super) fn keep(&self, owner: Arc<dyn Any + Send + Sync>) {
        self.kept.add(owner);
    }
}

impl<D: Driver> Shared<D> {
    /// Makes the copy stream wait for everyone who may still use memory. The device is current.
    pub(super) fn order_behind(&self, consumers: &Consumers) -> Result<(), DeviceError> {
        let streams = std::mem::take(&mut *lock(&consumers.streams));
        // Consumers that named no stream work on the default stream, or have waited.
        for stream in [self.compute, DEFAULT_STREAM].into_iter().chain(streams) {
            self.fence(stream, self.copy).map_err(|error| self.failed(error))?;
        }
        Ok(())
    }
}

impl<D: Driver> Memory<D> {
    pub(crate) fn allocate(shared: &Arc<Shared<D>>, len_bytes: u64) -> Result<Memory<D>, DeviceError> {
        let mut memory = Memory::none(shared);
        if len_bytes == 0 {
            return Ok(memory);
        }
        let _bound = shared.bind()?;
        let failed = |error| not_allocated(shared, len_bytes, error);
        // SAFETY: the stream is this device's, and alive.
        match unsafe { shared.driver.allocate_ordered(len_bytes, shared.copy) } {
            Some(address) => {
                memory.take(address.map_err(failed)?, len_bytes);
                memory.is_ordered = true;
                // The compute stream may write it too, but not before it exists there. On error `memory` frees it.
                shared.fence(shared.copy, shared.compute).map_err(|error| shared.failed(error))?;
            }
            None => memory.take(shared.driver.allocate(len_bytes).map_err(failed)?, len_bytes),
        }
        Ok(memory)
    }

    /// Allocates page-aligned memory past the streams. Drivers give small allocations a smaller alignment than that; such a one
    /// is made anew with a page to spare.
    pub(crate) fn allocate_for_storage(
        shared: &Arc<Shared<D>>,
        len_bytes: u64,
    ) -> Result<Memory<D>, DeviceError> {
        let mut memory = Memory::none(shared);
        if len_bytes == 0 {
            return Ok(memory);
        }
        let _bound = shared.bind()?;
        let allocate = |len_bytes| {
            shared.driver.allocate(len_bytes).map_err(|error| not_allocated(shared, len_bytes, error))
        };
        memory.take(allocate(len_bytes)?, len_bytes);
        if !memory.start.is_multiple_of(STORAGE_ALIGN_BYTES) {
            drop(std::mem::replace(&mut memory, Memory::none(shared)));
            memory.take(allocate(len_bytes + STORAGE_ALIGN_BYTES)?, len_bytes);
            memory.address = memory.start.next_multiple_of(STORAGE_ALIGN_BYTES);
        }
        Ok(memory)
    }

    fn none(shared: &Arc<Shared<D>>) -> Memory<D> {
        Memory {
            shared: Arc::clone(shared),
            start: 0,
            address: 0,
            len_bytes: 0,
            is_ordered: false,
            consumers: Consumers::default(),
        }
    }

    fn take(&mut self, start: u64, len_bytes: u64) {
        (self.start, self.address, self.len_bytes) = (start, start, len_bytes);
    }

    /// Frees in the order of the copy stream, which first waits for everyone else.
    fn free(&self) -> Result<(), DeviceError> {
        let shared = &*self.shared;
        let _bound = shared.bind()?;
        let failed = |error| shared.failed(error);
        if !self.is_ordered {
            // SAFETY: the last handle goes away; the call waits for the device.
            return unsafe { shared.driver.free(self.start) }.map_err(failed);
        }
        shared.order_behind(&self.consumers)?;
        // SAFETY: the last handle goes away, and everyone's work is ordered before this.
        unsafe { shared.driver.free_ordered(self.start, shared.copy) }.map_err(failed)
    }
}

impl<D: Driver> Drop for Memory<D> {
    fn drop(&mut self) {
        if self.start != 0
            && let Err(error) = self.free()
        {
            // Without the order, freeing could hand memory in use to somebody else: it is leaked instead.
            tracing::warn!(device = %self.shared.id(), len_bytes = self.len_bytes, %error, "device memory leaked");
        }
    }
}

// SAFETY: the driver gave this memory to this value alone, which frees it behind all use.
unsafe impl<D: Driver> Allocation for Memory<D> {
    fn address(&self) -> u64 {
        self.address
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn host_ptr(&self) -> Option<NonNull<u8>> {
        None
    }

    fn release_after(&self, stream: u64) {
        self.consumers.add(stream);
    }

    fn keep(&self, owner: Arc<dyn Any + Send + Sync>) {
        self.consumers.keep(owner);
    }
}

fn not_allocated<D: Driver>(shared: &Shared<D>, len_bytes: u64, error: CallError) -> DeviceError {
    match error.meaning {
        Meaning::OutOfMemory => DeviceError::OutOfMemory {
            device: shared.id(),
            needed_bytes: len_bytes,
            free_bytes: shared.driver.memory().ok().map(|(free_bytes, _)| free_bytes),
        },
        _ => shared.failed(error),
    }
}

const DEFAULT_STREAM: StreamHandle = StreamHandle(0);
