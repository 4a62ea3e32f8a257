//! Hand-over as an address and what owns it, for frameworks that speak neither DLPack nor cudarc.

use std::ffi::c_void;
use std::fmt;
use std::ptr::NonNull;

use tensorhaul_plan::{DeviceId, Dtype};

use crate::tensor::{Storage, Tensor};

/// A tensor taken apart: where its bytes are, what they mean, and what keeps them.
#[derive(Debug)]
pub struct RawTensor {
    /// Whose memory holds the bytes.
    pub device: DeviceId,
    /// The first byte, in the device's address space; meaningless where `len_bytes` is 0.
    pub address: u64,
    /// Number of bytes of all elements, little-endian as stored: row-major without gaps, but for `strides`.
    pub len_bytes: u64,
    /// The element type.
    pub dtype: Dtype,
    /// The dimensions; empty for a scalar.
    pub shape: Vec<u64>,
    /// Elements from neighbour to neighbour of each dimension, where the caller's memory has gaps; see [`Tensor::strides`].
    pub strides: Option<Vec<u64>>,
    /// Whether the bytes are pages of a file, which writing to kills the process.
    pub is_read_only: bool,
    /// Keeps the bytes.
    pub owner: MemoryOwner,
}

/// Keeps the memory of a tensor. Dropping the last owner and the last tensor of an arena frees it, behind the streams named
/// with [`MemoryOwner::release_after`] and what [`LoadOptions::stream`](crate::LoadOptions::stream) named before.
#[derive(Clone)]
pub struct MemoryOwner(Storage);

impl Tensor {
    /// Takes the tensor apart. Nothing is copied; other clones of the tensor stay as they are, and share the bytes.
    ///
    /// # Example
    /// A consumer in C takes an address, a context and a function that is called with the context at the end:
    /// ```
    /// use std::ffi::c_void;
    /// use std::ptr::NonNull;
    /// use tensorhaul::{Handover, LoadOptions, MemoryOwner, Model};
    ///
    /// extern "C" fn free(owner: *mut c_void) {
    ///     let owner = NonNull::new(owner).expect("the owner that was given");
    ///     // SAFETY: from `into_ptr`, and called once.
    ///     drop(unsafe { MemoryOwner::from_ptr(owner) });
    /// }
    ///
    /// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/models/tiny-llama");
    /// let loaded = Model::open(path)?.load(&LoadOptions::default().handover(Handover::Private))?;
    /// for (name, tensor) in loaded.tensors {
    ///     let raw = tensor.into_raw();
    ///     let (address, context) = (raw.address as *mut c_void, raw.owner.into_ptr().as_ptr());
    ///     // consumer_take(name, address, raw.len_bytes, context, free);
    ///     # let _ = (name, address);
    ///     free(context);
    /// }
    /// # Ok::<(), tensorhaul::Error>(())
    /// ```
    pub fn into_raw(self) -> RawTensor {
        RawTensor {
            device: self.device(),
            address: self.address(),
            len_bytes: self.len_bytes(),
            dtype: self.dtype(),
            shape: self.shape().to_vec(),
            strides: self.strides().map(<[u64]>::to_vec),
            is_read_only: self.is_mapped(),
            owner: MemoryOwner(self.into_storage()),
        }
    }
}

impl MemoryOwner {
    /// Orders the freeing of the memory after what is queued at the last drop on this stream, given as the driver's
    /// raw handle; the stream must outlive the memory. Mapped memory has no streams, and nothing to order.
    pub fn release_after(&self, stream: u64) {
        if let Storage::Arena(_, arena) = &self.0 {
            arena.release_after(stream);
        }
    }

    /// Turns the owner into a pointer that other languages can keep. Whoever has it calls [`MemoryOwner::from_ptr`]
    /// once, from any thread; without that the memory is never freed.
    pub fn into_ptr(self) -> NonNull<c_void> {
        NonNull::from(Box::leak(Box::new(self))).cast()
    }

    /// Takes the owner back.
    ///
    /// # Safety
    /// `owner` came from [`MemoryOwner::into_ptr`] and is taken back once.
    pub unsafe fn from_ptr(owner: NonNull<c_void>) -> MemoryOwner {
        // SAFETY: `into_ptr` leaked this box, and the caller takes it back once.
        *unsafe { Box::from_raw(owner.cast::<MemoryOwner>().as_ptr()) }
    }
}

impl fmt::Debug for MemoryOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MemoryOwner(..)")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tensorhaul_device::{Device, host::Host};

    use super::*;

    #[test]
    fn the_owner_keeps_the_memory_through_a_pointer_and_back() {
        let arena = Host.allocate(4096).unwrap();
        let storage = Storage::Arena(DeviceId::Host, Arc::clone(&arena));
        let raw = Tensor::new(Dtype::F32, &[2, 6], storage, 256, 48).into_raw();
        assert_eq!((raw.device, raw.address, raw.len_bytes), (DeviceId::Host, arena.address() + 256, 48));
        assert_eq!((raw.dtype, &*raw.shape, raw.is_read_only), (Dtype::F32, &[2, 6][..], false));
        let kept = raw.owner.into_ptr();
        assert_eq!(Arc::strong_count(&arena), 2, "the pointer keeps the arena");
        // SAFETY: made above, taken back once.
        drop(unsafe { MemoryOwner::from_ptr(kept) });
        assert_eq!(Arc::strong_count(&arena), 1);
    }
}
