//! Hand-over to other frameworks through DLPack.
//!
//! # Source
//! DLPack 1.1, `include/dlpack/dlpack.h`: struct layouts, type codes, the versioned deleter.

use std::ffi::c_void;
use std::ptr::NonNull;

use tensorhaul_plan::{DeviceId, Dtype, DtypeKind};

use crate::tensor::Tensor;

/// `DLDevice`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DLDevice {
    /// `DLDeviceType`: 1 host, 2 CUDA, 3 host memory pinned by CUDA, 10 ROCm, 11 host memory pinned by ROCm.
    pub device_type: i32,
    /// Ordinal of the device; 0 for memory of the host, pinned or not.
    pub device_id: i32,
}

/// `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DLDataType {
    /// `DLDataTypeCode`.
    pub code: u8,
    /// Bits of one element.
    pub bits: u8,
    /// Always 1 here.
    pub lanes: u16,
}

/// `DLTensor`.
#[repr(C)]
#[derive(Debug)]
pub struct DLTensor {
    /// Address of the first element, in the device's address space.
    pub data: *mut c_void,
    /// Where that is.
    pub device: DLDevice,
    /// Number of dimensions.
    pub ndim: i32,
    /// Element type.
    pub dtype: DLDataType,
    /// `ndim` dimensions.
    pub shape: *mut i64,
    /// `ndim` distances, in elements.
    pub strides: *mut i64,
    /// Always 0: `data` is the first element.
    pub byte_offset: u64,
}

/// `DLPackVersion`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DLPackVersion {
    /// Changes break the layout.
    pub major: u32,
    /// Changes add.
    pub minor: u32,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
#[derive(Debug)]
pub struct DLManagedTensorVersioned {
    /// Version of these structs.
    pub version: DLPackVersion,
    /// Ours: keeps the tensor's memory.
    pub manager_ctx: *mut c_void,
    /// Frees the struct and lets go of the memory.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensorVersioned)>,
    /// [`FLAG_READ_ONLY`].
    pub flags: u64,
    /// The tensor.
    pub dl_tensor: DLTensor,
}

/// `DLPACK_FLAG_BITMASK_READ_ONLY`: writing to the memory is undefined; set for mapped tensors.
pub const FLAG_READ_ONLY: u64 = 1;

/// A tensor exported for DLPack. Dropping it lets go of the memory; [`Exported::into_raw`] hands that
/// duty to the consumer.
#[derive(Debug)]
pub struct Exported(NonNull<DLManagedTensorVersioned>);

/// What the raw struct points into.
struct Context {
    _tensor: Tensor,
    shape: Vec<i64>,
    strides: Vec<i64>,
}

impl Tensor {
    /// Exports the tensor without copying; the export keeps the memory alive on its own.
    ///
    /// `None` when DLPack 1.1 has no such element type, or a dimension passes its signed 64 bits.
    pub fn to_dlpack(&self) -> Option<Exported> {
        let shape = self.shape().iter().map(|dim| i64::try_from(*dim).ok()).collect::<Option<Vec<_>>>()?;
        let mut strides = vec![1i64; shape.len()];
        match self.strides() {
            Some(own) => {
                let own = own.iter().map(|stride| i64::try_from(*stride).ok());
                strides = own.collect::<Option<Vec<_>>>()?;
            }
            None => {
                for dim in (1..shape.len()).rev() {
                    strides[dim - 1] = strides[dim].checked_mul(shape[dim].max(1))?;
                }
            }
        }
        let (dtype, device) = (data_type(self.dtype())?, dl_device(self.device(), self.pinned_for())?);
        let mut context = Box::new(Context { _tensor: self.clone(), shape, strides });
        let dl_tensor = DLTensor {
            data: self.data_ptr().cast(),
            device,
            ndim: context.shape.len() as i32, // A header of 100 MB holds fewer dimensions.
            dtype,
            shape: context.shape.as_mut_ptr(),
            strides: context.strides.as_mut_ptr(),
            byte_offset: 0,
        };
        let managed = Box::new(DLManagedTensorVersioned {
            version: VERSION,
            manager_ctx: Box::into_raw(context).cast(),
            deleter: Some(delete),
            flags: if self.is_mapped() { FLAG_READ_ONLY } else { 0 },
            dl_tensor,
        });
        Some(Exported(NonNull::from(Box::leak(managed))))
    }
}

impl Exported {
    /// Returns the struct.
    pub fn managed(&self) -> &DLManagedTensorVersioned {
        // SAFETY: the struct is ours and valid until the drop.
        unsafe { self.0.as_ref() }
    }

    /// Hands the struct over: the consumer calls its `deleter` once, from any thread.
    pub fn into_raw(self) -> NonNull<DLManagedTensorVersioned> {
        let raw = self.0;
        std::mem::forget(self);
        raw
    }
}

impl Drop for Exported {
    fn drop(&mut self) {
        // SAFETY: the struct came from `to_dlpack` and was not handed over.
        unsafe { delete(self.0.as_ptr()) };
    }
}

// SAFETY: the struct owns a `Tensor`, which is Send and Sync, and vectors nobody changes.
unsafe impl Send for Exported {}
// SAFETY: as above.
unsafe impl Sync for Exported {}

/// # Safety
/// `managed` came from [`Tensor::to_dlpack`] and is deleted once.
unsafe extern "C" fn delete(managed: *mut DLManagedTensorVersioned) {
    // SAFETY: `to_dlpack` leaked this box, and the caller deletes it once.
    let managed = unsafe { Box::from_raw(managed) };
    // SAFETY: `to_dlpack` leaked this box into the struct.
    drop(unsafe { Box::from_raw(managed.manager_ctx.cast::<Context>()) });
}

/// `pinned_for` is the device whose driver has pinned the memory, where it is the host's.
fn dl_device(device: DeviceId, pinned_for: Option<DeviceId>) -> Option<DLDevice> {
    let (device_type, ordinal) = match (device, pinned_for) {
        (DeviceId::Host, None) => (CPU, 0),
        (DeviceId::Host, Some(DeviceId::Cuda(_))) => (CUDA_HOST, 0),
        (DeviceId::Host, Some(DeviceId::Rocm(_))) => (ROCM_HOST, 0),
        (DeviceId::Cuda(ordinal), _) => (CUDA, ordinal),
        (DeviceId::Rocm(ordinal), _) => (ROCM, ordinal),
        _ => return None,
    };
    Some(DLDevice { device_type, device_id: i32::try_from(ordinal).ok()? })
}

fn data_type(dtype: Dtype) -> Option<DLDataType> {
    let code = match (dtype, dtype.kind()) {
        (Dtype::Bf16, _) => 4,
        (Dtype::F8E4m3, _) => 10,
        (Dtype::F8E4m3Fnuz, _) => 11,
        (Dtype::F8E5m2, _) => 12,
        (Dtype::F8E5m2Fnuz, _) => 13,
        (Dtype::F8E8m0, _) => 14,
        (Dtype::F6E2m3, _) => 15,
        (Dtype::F6E3m2, _) => 16,
        (Dtype::F4, _) => 17,
        (_, DtypeKind::Signed) => 0,
        (_, DtypeKind::Unsigned) => 1,
        (_, DtypeKind::Float) => 2,
        (_, DtypeKind::Complex) => 5,
        (_, DtypeKind::Bool) => 6,
        _ => return None,
    };
    Some(DLDataType { code, bits: dtype.bits() as u8, lanes: 1 })
}

/// `DLDeviceType`: `kDLCPU`, `kDLCUDA`, `kDLCUDAHost`, `kDLROCM`, `kDLROCMHost`.
const CPU: i32 = 1;
const CUDA: i32 = 2;
const CUDA_HOST: i32 = 3;
const ROCM: i32 = 10;
const ROCM_HOST: i32 = 11;

const VERSION: DLPackVersion = DLPackVersion { major: 1, minor: 1 };

#[cfg(test)]
mod tests {
    use super::*;
    use tensorhaul_device::{Device, host::Host};

    use std::sync::Arc;

    use crate::external::ExternalMemory;
    use crate::tensor::Storage;

    fn tensor(dtype: Dtype, shape: &[u64]) -> Tensor {
        let arena = Host.allocate(4096).unwrap();
        Tensor::new(dtype, shape, Storage::Arena(DeviceId::Host, arena), 256, 48)
    }

    #[test]
    fn an_export_keeps_the_memory_and_describes_it() {
        let exported = tensor(Dtype::F32, &[2, 3, 2]).to_dlpack().unwrap();
        let managed = exported.managed();
        assert_eq!((managed.version, managed.flags), (VERSION, 0));
        let inside = &managed.dl_tensor;
        assert_eq!(inside.dtype, DLDataType { code: 2, bits: 32, lanes: 1 });
        assert_eq!(inside.device, DLDevice { device_type: 1, device_id: 0 });
        // SAFETY: `ndim` entries, as the struct says.
        let shape = unsafe { std::slice::from_raw_parts(inside.shape, 3) };
        // SAFETY: as above.
        let strides = unsafe { std::slice::from_raw_parts(inside.strides, 3) };
        assert_eq!((shape, strides), (&[2i64, 3, 2][..], &[6i64, 2, 1][..]));
        // SAFETY: the tensor's 48 bytes, kept by the export though the tensor is gone.
        let bytes = unsafe { std::slice::from_raw_parts(inside.data.cast::<u8>(), 48) };
        assert!(bytes.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_consumer_that_takes_the_struct_deletes_it() {
        let raw = tensor(Dtype::Bf16, &[24]).to_dlpack().unwrap().into_raw();
        // SAFETY: handed over just now.
        let deleter = unsafe { raw.as_ref() }.deleter.unwrap();
        // SAFETY: deleted once.
        unsafe { deleter(raw.as_ptr()) };
    }

    /// DLPack's numbers, and ordinal 0 for whatever is the host's.
    #[test]
    fn every_place_has_its_device_type() {
        for (device, pinned_for, device_type, device_id) in [
            (DeviceId::Host, None, 1, 0),
            (DeviceId::Cuda(3), None, 2, 3),
            (DeviceId::Host, Some(DeviceId::Cuda(3)), 3, 0),
            (DeviceId::Rocm(3), None, 10, 3),
            (DeviceId::Host, Some(DeviceId::Rocm(3)), 11, 0),
        ] {
            assert_eq!(dl_device(device, pinned_for), Some(DLDevice { device_type, device_id }), "{device}");
        }
    }

    #[test]
    fn memory_given_as_pinned_is_handed_over_as_pinned() {
        let mut memory = Box::new([0u8; 64]);
        let start = NonNull::from(&mut memory[0]);
        for (device, device_type) in [(DeviceId::Cuda(1), 3), (DeviceId::Rocm(1), 11)] {
            // SAFETY: initialized, 64 bytes, kept beyond the tensor; the test only claims that they are pinned.
            let given = unsafe { ExternalMemory::pinned(device, start, 64, Arc::new(())) };
            let storage = Storage::Arena(DeviceId::Host, Arc::new(given));
            let tensor = Tensor::new(Dtype::U8, &[64], storage, 0, 64);
            assert_eq!((tensor.device(), tensor.pinned_for()), (DeviceId::Host, Some(device)));
            let exported = tensor.to_dlpack().unwrap();
            let inside = &exported.managed().dl_tensor;
            assert_eq!(inside.device, DLDevice { device_type, device_id: 0 });
            assert_eq!(inside.data.cast(), start.as_ptr());
        }
    }

    #[test]
    fn every_dtype_has_a_code() {
        let codes: Vec<_> = Dtype::ALL.iter().map(|dtype| data_type(*dtype).unwrap()).collect();
        for (dtype, code) in Dtype::ALL.iter().zip(&codes) {
            assert_eq!(u64::from(code.bits), dtype.bits());
            assert_eq!(codes.iter().filter(|other| *other == code).count(), 1, "{dtype}");
        }
    }
}
