//! Hand-over to cudarc: a tensor of an NVIDIA device as a `CudaSlice` that borrows its memory.
//!
//! A `CudaSlice` frees its memory by itself, and a tensor's memory is a part of an arena that other tensors live in.
//! So cudarc gets a slice that it never frees: [`BorrowedSlice`] gives the memory back when it is dropped.
//!
//! # Which features of cudarc
//! The crate asks for `driver`, `f16`, `cuda-version-from-build-system`, `fallback-latest` and `fallback-dynamic-loading`,
//! which unite with everyone else's in one program: a `cuda-12080` or a `dynamic-linking` named elsewhere decides. Without
//! either, cudarc's newest bindings are loaded at run time, and nothing of CUDA is needed to build. Drivers older than the
//! bindings lack a few functions (cudarc panics at their first use): name the `cuda-XXXXX` of the oldest driver you
//! support. At most one crate of a program may name one.
//!
//! # Source
//! cudarc 0.19, `driver::safe`: `CudaStream::upgrade_device_ptr`, `CudaSlice::leak`, the events of a slice.

use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use tensorhaul_plan::DeviceId;

use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Element, Tensor};

/// A tensor's memory as a `CudaSlice`: to read, to pass to kernels, to copy from.
///
/// It keeps the memory, and the memory keeps the stream. The memory is freed behind what is queued on the stream when the
/// slice, every tensor and every other slice of the arena are dropped; work that cudarc tracks on other streams
/// comes before that too. Memory of the caller's own ([`ExternalMemory`](crate::ExternalMemory)) is its owner's to order.
///
/// There is no mutable access: clones of the tensor share the memory. An owned `CudaSlice`, which cudarc would free, is
/// a copy: [`CudaSlice::try_clone`].
pub struct BorrowedSlice<T> {
    /// Leaked when this is dropped, before the tensor lets go of the memory.
    slice: ManuallyDrop<CudaSlice<T>>,
    tensor: Tensor,
}

impl Tensor {
    /// Returns the elements as a slice of cudarc's, whose work is queued on `stream` unless another is named.
    ///
    /// Costs two events of the driver where the context tracks them. The bytes are there: any stream may read them at once.
    ///
    /// # Errors
    /// - [`ErrorKind::BadRequest`] when `T` is not the tensor's element type ([`Tensor::cuda_bytes`] takes any), the
    ///   tensor is not on the stream's device, or the stream is the per-thread default stream or one of a context
    ///   that is not the device's primary one, which this crate works in.
    /// - [`ErrorKind::Unsupported`] when the tensor's address is no multiple of the element's size.
    /// - [`ErrorKind::Device`] when the context of the stream has failed.
    ///
    /// # Panics
    /// As cudarc does, when the driver has no more events.
    ///
    /// # Example
    /// ```no_run
    /// use cudarc::driver::CudaContext;
    /// use half::bf16;
    /// use tensorhaul::{DeviceId, LoadOptions, Model, Request};
    ///
    /// let mut request = Request::all();
    /// request.device = DeviceId::Cuda(0);
    /// let loaded = Model::open("model")?.load(&LoadOptions::default().request(request))?;
    ///
    /// let stream = CudaContext::new(0)?.new_stream()?;
    /// let weight = loaded.tensors.get("lm_head.weight").expect("a language model has one");
    /// let weight = weight.cuda_slice::<bf16>(&stream)?;
    /// let first_row = stream.clone_dtoh(&weight.slice(..4096))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn cuda_slice<T: Element>(&self, stream: &Arc<CudaStream>) -> Result<BorrowedSlice<T>> {
        self.check_dtype::<T>()?;
        BorrowedSlice::new(self, stream)
    }

    /// Returns the bytes, little-endian as stored, as [`Tensor::cuda_slice`] does the elements: for element types without a
    /// host type, such as F8.
    ///
    /// # Errors
    /// As for [`Tensor::cuda_slice`], but for the element type.
    pub fn cuda_bytes(&self, stream: &Arc<CudaStream>) -> Result<BorrowedSlice<u8>> {
        BorrowedSlice::new(self, stream)
    }
}

impl<T> BorrowedSlice<T> {
    fn new(tensor: &Tensor, stream: &Arc<CudaStream>) -> Result<BorrowedSlice<T>> {
        tensor.check_contiguous()?;
        check_stream(tensor.device(), stream)?;
        if !tensor.address().is_multiple_of(align_of::<T>() as u64) {
            let what = format!(
                "{} elements at an address that is no multiple of {} cannot be a slice",
                tensor.dtype(),
                align_of::<T>()
            );
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        stream.context().bind_to_thread().map_err(|error| Error::new(ErrorKind::Device, error))?;
        if let Some((memory, _)) = tensor.allocation()
            && !stream.cu_stream().is_null()
        {
            // The default stream is waited for in any case, and lives for ever.
            memory.release_after(stream.cu_stream().addr() as u64);
            memory.keep(Arc::clone(stream) as Arc<_>);
        }
        let len = tensor.len_bytes() as usize / size_of::<T>();
        // SAFETY: `len` elements of the tensor's memory, which `tensor` keeps; every bit pattern is a `T`, as `Element`
        // demands; they are written by nobody any more, and cudarc never frees them: `drop` leaks the slice.
        let slice = unsafe { stream.upgrade_device_ptr::<T>(tensor.address(), len) };
        Ok(BorrowedSlice { slice: ManuallyDrop::new(slice), tensor: tensor.clone() })
    }

    /// Returns the tensor whose memory this is.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }
}

impl<T> Deref for BorrowedSlice<T> {
    type Target = CudaSlice<T>;

    fn deref(&self) -> &CudaSlice<T> {
        &self.slice
    }
}

impl<T> Drop for BorrowedSlice<T> {
    fn drop(&mut self) {
        // SAFETY: taken here and nowhere else.
        let slice = unsafe { ManuallyDrop::take(&mut self.slice) };
        // Its stream now waits for what cudarc tracked on others; the memory waits for its stream.
        slice.leak();
    }
}

impl<T> fmt::Debug for BorrowedSlice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BorrowedSlice").field(&self.tensor).finish()
    }
}

/// Checks that the stream is of the tensor's device, and one that the freeing of its memory can be ordered behind.
fn check_stream(device: DeviceId, stream: &CudaStream) -> Result<()> {
    let context = stream.context();
    let DeviceId::Cuda(ordinal) = device else {
        return Err(Error::bad_request(format!(
            "the tensor is in memory of {device}; only those of a cuda device can be a CudaSlice"
        )));
    };
    if context.ordinal() != ordinal as usize {
        let what = format!("the tensor is on {device}, the stream on cuda:{}", context.ordinal());
        return Err(Error::bad_request(what));
    }
    if !context.is_primary() {
        let what = "the stream's context is not the primary one; CudaContext::new gives that";
        return Err(Error::bad_request(what));
    }
    if stream.cu_stream().addr() == PER_THREAD_STREAM {
        let what = "the per-thread default stream is another one on each thread; give a stream of its own";
        return Err(Error::bad_request(what));
    }
    Ok(())
}

/// `CU_STREAM_PER_THREAD`.
const PER_THREAD_STREAM: usize = 2;
