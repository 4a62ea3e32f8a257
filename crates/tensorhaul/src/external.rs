//! Memory that is the caller's own: single buffers for single tensors, or an allocator for all of them.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;

use tensorhaul_device::Allocation;
use tensorhaul_plan::DeviceId;

/// A buffer of the caller's that a tensor's bytes go into.
#[derive(Clone)]
pub struct ExternalMemory {
    address: u64,
    host_ptr: Option<NonNull<u8>>,
    len_bytes: u64,
    /// Kept until the last tensor in the memory is dropped.
    _owner: Arc<dyn Any + Send + Sync>,
}

impl ExternalMemory {
    /// Takes memory of a device, by its address in the device's address space.
    ///
    /// # Safety
    /// - The range is memory of the device that the load is for, and stays allocated while `owner` lives.
    /// - Until the tensor is handed over nobody reads or writes it, but work queued on the stream given with
    ///   [`LoadOptions::stream`](crate::LoadOptions::stream) before the load.
    pub unsafe fn device(address: u64, len_bytes: u64, owner: Arc<dyn Any + Send + Sync>) -> ExternalMemory {
        ExternalMemory { address, host_ptr: None, len_bytes, _owner: owner }
    }

    /// Takes memory of the host.
    ///
    /// # Safety
    /// - The range is initialized, writable, and stays so while `owner` lives.
    /// - Until the tensor is handed over nobody reads or writes it; while tensors in it live, nobody writes it.
    pub unsafe fn host(
        start: NonNull<u8>,
        len_bytes: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> ExternalMemory {
        ExternalMemory { address: start.addr().get() as u64, host_ptr: Some(start), len_bytes, _owner: owner }
    }
}

// SAFETY: an address, a length and an owner that is Send and Sync; the conditions of the constructors say
// who may touch the bytes when.
unsafe impl Send for ExternalMemory {}
// SAFETY: as above; the value itself never changes.
unsafe impl Sync for ExternalMemory {}

// SAFETY: the conditions of the constructors, kept by the owner.
unsafe impl Allocation for ExternalMemory {
    fn address(&self) -> u64 {
        self.address
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn host_ptr(&self) -> Option<NonNull<u8>> {
        self.host_ptr
    }

    /// The owner decides when the memory is freed, and after what.
    fn release_after(&self, _stream: u64) {}
}

/// Gives memory for the result, such as a framework's caching allocator.
///
/// # Safety
/// Each allocation is memory that nobody else uses until it is dropped, but work queued on the stream given with
/// [`LoadOptions::stream`](crate::LoadOptions::stream) before the load.
pub unsafe trait Allocator: Send + Sync {
    /// Allocates memory of a device that starts on a multiple of 256.
    ///
    /// # Errors
    /// Whatever the allocator has to say; the load fails with it as out of memory.
    fn allocate(
        &self,
        device: DeviceId,
        len_bytes: u64,
    ) -> Result<Arc<dyn Allocation>, Box<dyn std::error::Error + Send + Sync>>;
}
