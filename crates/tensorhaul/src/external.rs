//! Memory that is the caller's own: single buffers for single tensors, or an allocator for all of them.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;

use tensorhaul_device::{Allocation, Kept};
use tensorhaul_plan::{DeviceId, Dtype};

/// A buffer of the caller's that a tensor's bytes go into.
#[derive(Clone)]
pub struct ExternalMemory {
    device: DeviceId,
    /// Whose driver has pinned it.
    pinned_for: Option<DeviceId>,
    address: u64,
    host_ptr: Option<NonNull<u8>>,
    len_bytes: u64,
    layout: Option<Arc<Layout>>,
    /// Kept until the last tensor in the memory is dropped.
    _owner: Arc<dyn Any + Send + Sync>,
    kept: Arc<Kept>,
}

impl ExternalMemory {
    /// Takes memory of a device, by its address in the device's address space. A load for another device refuses it.
    ///
    /// # Safety
    /// - The range is memory of `device`, and stays allocated while `owner` lives.
    /// - Until the tensor is handed over nobody reads or writes it, but work queued on the stream given with
    ///   [`LoadOptions::stream`](crate::LoadOptions::stream) before the load.
    pub unsafe fn device(
        device: DeviceId,
        address: u64,
        len_bytes: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> ExternalMemory {
        let kept = Arc::default();
        ExternalMemory {
            device,
            pinned_for: None,
            address,
            host_ptr: None,
            len_bytes,
            layout: None,
            _owner: owner,
            kept,
        }
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
        ExternalMemory {
            device: DeviceId::Host,
            pinned_for: None,
            address: start.addr().get() as u64,
            host_ptr: Some(start),
            len_bytes,
            layout: None,
            _owner: owner,
            kept: Arc::default(),
        }
    }

    /// Takes memory of the host that the driver of a device has pinned (`cudaHostAlloc`, `cudaHostRegister`), so that
    /// consumers of the tensor know: [`Tensor::pinned_for`](crate::Tensor::pinned_for), and DLPack's types of pinned memory.
    ///
    /// # Safety
    /// As for [`ExternalMemory::host`]; the range stays pinned while `owner` lives.
    pub unsafe fn pinned(
        device: DeviceId,
        start: NonNull<u8>,
        len_bytes: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> ExternalMemory {
        // SAFETY: the caller's promise.
        let host = unsafe { ExternalMemory::host(start, len_bytes, owner) };
        ExternalMemory { pinned_for: Some(device), ..host }
    }

    /// Says what the memory is to hold. A load whose tensor has another dtype or shape is an error before the first read.
    ///
    /// `strides` are elements from neighbour to neighbour of each dimension, such as those of a view of a larger tensor; `None` is
    /// row-major without gaps. Bytes between elements are not touched, and the memory may be longer than the tensor reaches.
    ///
    /// A dequantized tensor takes no strides but row-major ones: operations write without gaps, and to spread what they write would take
    /// its memory twice. Rows of padding that a rank's vocabulary has are in no file: the shape is the one without them, the memory may have
    /// room for them behind it, and that room is left as it is, for the caller to fill with zeros.
    pub fn layout(
        self,
        dtype: Dtype,
        shape: impl Into<Vec<u64>>,
        strides: Option<Vec<u64>>,
    ) -> ExternalMemory {
        let layout = Layout { dtype, shape: shape.into(), strides };
        ExternalMemory { layout: Some(Arc::new(layout)), ..self }
    }

    /// Returns what it is to hold, if the caller said so.
    pub(crate) fn held(&self) -> Option<&Layout> {
        self.layout.as_deref()
    }

    /// Returns the strides of what it holds, if that has gaps or another order.
    pub(crate) fn strides(&self) -> Option<&[u64]> {
        let Layout { shape, strides, .. } = self.held()?;
        let strides = strides.as_deref()?;
        let mut natural = 1u64;
        let is_natural = |(len, stride): (&u64, &u64)| {
            let is_natural = *len <= 1 || *stride == natural;
            natural = natural.saturating_mul(*len);
            is_natural
        };
        let is_dense = shape.iter().zip(strides).rev().all(is_natural);
        (!is_dense).then_some(strides)
    }

    /// Returns whose memory it is.
    pub(crate) fn place(&self) -> DeviceId {
        self.device
    }

    pub(crate) fn pinned_for(&self) -> Option<DeviceId> {
        self.pinned_for
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

    fn keep(&self, owner: Arc<dyn Any + Send + Sync>) {
        self.kept.add(owner);
    }
}

/// What memory of the caller's is to hold.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    /// In elements; `None`: row-major without gaps.
    pub(crate) strides: Option<Vec<u64>>,
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
