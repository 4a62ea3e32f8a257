//! Tensors that own their memory, and typed views of them.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use half::{bf16, f16};
use tensorhaul_device::Allocation;
use tensorhaul_plan::{DeviceId, Dtype};

use crate::devices;
use crate::error::{Error, ErrorKind, Result};
use crate::external::ExternalMemory;
use crate::pinned::PinnedMemory;

/// A tensor: element type, shape, and the memory it lives in, row-major and without gaps, unless the caller gave memory of
/// [other strides](Tensor::strides).
///
/// Clones share the memory. It is freed when the last tensor of its arena (a layer, an expert) is
/// dropped; a mapped tensor keeps the mapping of its file.
#[derive(Clone)]
pub struct Tensor {
    dtype: Dtype,
    shape: Arc<[u64]>,
    /// `None`: row-major without gaps.
    strides: Option<Arc<[u64]>>,
    storage: Storage,
    offset_bytes: u64,
    len_bytes: u64,
}

/// What keeps a tensor's bytes.
#[derive(Clone)]
pub(crate) enum Storage {
    /// Pages of the file itself.
    Mapped(Arc<memmap2::Mmap>),
    /// An arena of a device.
    Arena(DeviceId, Arc<dyn Allocation>),
}

impl Tensor {
    /// The storage's range must be inside it, written by nobody any more, and hold `dtype` and `shape`.
    pub(crate) fn new(
        dtype: Dtype,
        shape: &[u64],
        storage: Storage,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Tensor {
        let end = offset_bytes + len_bytes;
        assert!(len_bytes == 0 || end <= storage.len_bytes(), "a tensor lies inside its storage");
        Tensor { dtype, shape: shape.into(), strides: None, storage, offset_bytes, len_bytes }
    }

    /// The tensor with its elements as far apart as these strides say; its storage must reach to the last of them.
    pub(crate) fn with_strides(self, strides: &[u64]) -> Tensor {
        Tensor { strides: Some(strides.into()), ..self }
    }

    /// Returns the element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Returns the dimensions; empty for a scalar.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Returns the elements from neighbour to neighbour of each dimension, where the tensor lies with gaps, or in another order, in
    /// [memory of the caller's](crate::ExternalMemory::layout); `None` where it is row-major without gaps.
    pub fn strides(&self) -> Option<&[u64]> {
        self.strides.as_deref()
    }

    /// Returns the number of elements.
    pub fn numel(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Returns the number of bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Returns the device whose memory holds the bytes.
    pub fn device(&self) -> DeviceId {
        match &self.storage {
            Storage::Mapped(_) => DeviceId::Host,
            Storage::Arena(device, _) => *device,
        }
    }

    /// Tells whether the bytes are pages of the file: shared, not to be written, and at the mercy of
    /// whoever truncates the file (touching a page that is gone kills the process with SIGBUS).
    pub fn is_mapped(&self) -> bool {
        matches!(self.storage, Storage::Mapped(_))
    }

    /// Returns the device whose driver has pinned the host memory that holds the bytes, as far as this crate knows: memory
    /// of a [`PinnedAllocator`](crate::PinnedAllocator), or given with [`ExternalMemory::pinned`].
    pub fn pinned_for(&self) -> Option<DeviceId> {
        let (arena, _) = self.allocation()?;
        let arena = &**arena as &dyn Any;
        let external = || arena.downcast_ref().and_then(ExternalMemory::pinned_for);
        arena.downcast_ref().map(PinnedMemory::device).or_else(external)
    }

    /// Returns the address of the first byte in its device's address space.
    pub fn address(&self) -> u64 {
        match &self.storage {
            Storage::Mapped(map) => map.as_ptr().addr() as u64 + self.offset_bytes,
            Storage::Arena(_, arena) => arena.address() + self.offset_bytes,
        }
    }

    /// Returns the first byte: a host pointer, or a device address that only its device can follow.
    pub(crate) fn data_ptr(&self) -> *mut u8 {
        let offset = self.offset_bytes as usize;
        match &self.storage {
            Storage::Mapped(map) => map.as_ptr().wrapping_add(offset).cast_mut(),
            // A device that shares the host's memory may have another address for it.
            Storage::Arena(device, arena) => match arena.host_ptr().filter(|_| *device == DeviceId::Host) {
                Some(start) => start.as_ptr().wrapping_add(offset),
                None => std::ptr::without_provenance_mut(self.address() as usize),
            },
        }
    }

    /// Returns the arena the tensor lies in and its first byte's distance from the arena's start; `None` for a
    /// mapped tensor. The arena lives as long as the handle.
    pub fn allocation(&self) -> Option<(&Arc<dyn Allocation>, u64)> {
        match &self.storage {
            Storage::Mapped(_) => None,
            Storage::Arena(_, arena) => Some((arena, self.offset_bytes)),
        }
    }

    /// Returns the bytes, little-endian as stored.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] when the host cannot read the tensor's memory, or the tensor has [strides](Tensor::strides).
    pub fn bytes(&self) -> Result<&[u8]> {
        let (begin, len) = (self.offset_bytes as usize, self.len_bytes as usize);
        self.check_contiguous()?;
        match &self.storage {
            _ if len == 0 => Ok(&[]),
            Storage::Mapped(map) => Ok(&map[begin..begin + len]),
            Storage::Arena(device, arena) => {
                let start = arena.host_ptr().ok_or_else(|| {
                    let what = format!("the tensor is in memory of {device}, which the host cannot read");
                    Error::bad_request(what)
                })?;
                // SAFETY: `new` checked the range.
                let start = unsafe { start.add(begin) };
                // SAFETY: arenas of the host are initialized (the system zeroes them), live as long as `self`, and are
                // written by nobody once their tensors are handed over.
                Ok(unsafe { std::slice::from_raw_parts(start.as_ptr(), len) })
            }
        }
    }

    /// Copies the bytes to the host, wherever they are.
    ///
    /// # Errors
    /// [`ErrorKind::Device`](crate::ErrorKind::Device) when the device does not give them; [`ErrorKind::BadRequest`] as for
    /// [`Tensor::bytes`].
    pub fn to_host(&self) -> Result<Vec<u8>> {
        self.check_contiguous()?;
        match &self.storage {
            Storage::Arena(device, arena) if arena.host_ptr().is_none() => {
                devices::read_back(*device, arena, self.offset_bytes, self.len_bytes)
            }
            _ => Ok(self.bytes()?.to_vec()),
        }
    }

    /// Returns the elements as numbers of the host.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] when `T` is not the tensor's element type, or the host cannot read its
    /// memory; [`ErrorKind::Unsupported`] when the file stores it at an address that `T` does not allow
    /// (only mapped tensors: a private load realigns them; [`Tensor::to_vec`] copies).
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        let bytes = self.typed_bytes::<T>()?;
        if bytes.is_empty() {
            return Ok(&[]); // No element has an address that could be wrong.
        }
        bytemuck::try_cast_slice(bytes).map_err(|_| {
            let what = format!(
                "{} elements at a file offset that is no multiple of {} cannot be viewed in place; load privately or copy",
                self.dtype,
                size_of::<T>()
            );
            Error::new(ErrorKind::Unsupported, what)
        })
    }

    /// Copies the elements, however they are aligned.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] as for [`Tensor::as_slice`].
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        let bytes = self.typed_bytes::<T>()?;
        let mut elements = vec![T::zeroed(); bytes.len() / size_of::<T>()];
        bytemuck::cast_slice_mut(&mut elements).copy_from_slice(bytes);
        Ok(elements)
    }

    /// Refuses a view of bytes that do not lie back to back.
    pub(crate) fn check_contiguous(&self) -> Result<()> {
        match &self.strides {
            None => Ok(()),
            Some(strides) => {
                let what = format!(
                    "the tensor lies with strides {strides:?} in memory of the caller's; read it there"
                );
                Err(Error::bad_request(what))
            }
        }
    }

    fn typed_bytes<T: Element>(&self) -> Result<&[u8]> {
        self.check_dtype::<T>()?;
        self.bytes()
    }

    pub(crate) fn check_dtype<T: Element>(&self) -> Result<()> {
        if self.dtype != T::DTYPE {
            return Err(Error::bad_request(format!("the tensor holds {}, not {}", self.dtype, T::DTYPE)));
        }
        Ok(())
    }

    /// Returns what keeps the bytes.
    pub(crate) fn into_storage(self) -> Storage {
        self.storage
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.is_mapped() { " mapped" } else { "" };
        write!(f, "Tensor({} {:?} on {}{how})", self.dtype, self.shape, self.device())
    }
}

impl Storage {
    fn len_bytes(&self) -> u64 {
        match self {
            Storage::Mapped(map) => map.len() as u64,
            Storage::Arena(_, arena) => arena.len_bytes(),
        }
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A host type that is an element type of the format, bit for bit. F8 and narrower types have no host
/// type: read them with [`Tensor::bytes`].
pub trait Element: sealed::Sealed + bytemuck::Pod {
    /// The element type.
    const DTYPE: Dtype;
}

macro_rules! elements {
    ($($host:ty => $dtype:ident),* $(,)?) => {
        $(impl sealed::Sealed for $host {}
        impl Element for $host {
            const DTYPE: Dtype = Dtype::$dtype;
        })*
    };
}

elements! {
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64,
    f16 => F16, bf16 => Bf16, f32 => F32, f64 => F64,
}

#[cfg(target_endian = "big")]
compile_error!("safetensors are little-endian, and tensors are handed over as they are stored");
