//! The functions of NVIDIA's driver that the backend calls.
//!
//! # Source
//! CUDA Driver API reference, version 12.0: signatures, flags, attributes and status codes. All are in
//! every driver since 11.2 but the optional ones: capture modes are of 10.1, ordered allocation and
//! access to pools of 11.2 itself, batched copies of 12.8. Those for peers are older; one device does without.

use std::ffi::{c_char, c_int, c_uint, c_void};

use tensorhaul_device::gpu::call::LaunchKeys;

pub(crate) type Device = c_int;
pub(crate) type Context = *mut c_void;
pub(crate) type Stream = *mut c_void;
pub(crate) type Event = *mut c_void;
pub(crate) type Module = *mut c_void;
pub(crate) type MemPool = *mut c_void;
pub(crate) type Function = *mut c_void;
pub(crate) type Address = u64;

tensorhaul_device::driver_table! {
    /// NVIDIA's driver.
    pub(crate) struct Table {
        fn cuInit(c_uint);
        fn cuDriverGetVersion(*mut c_int);
        fn cuGetErrorName(c_int, *mut *const c_char);
        fn cuDeviceGetCount(*mut c_int);
        fn cuDeviceGet(*mut Device, c_int);
        fn cuDeviceGetName(*mut c_char, c_int, Device);
        fn cuDeviceGetAttribute(*mut c_int, c_int, Device);
        fn cuDeviceGetPCIBusId(*mut c_char, c_int, Device);
        fn cuDeviceTotalMem_v2(*mut usize, Device);
        fn cuDevicePrimaryCtxRetain(*mut Context, Device);
        fn cuDevicePrimaryCtxRelease_v2(Device);
        fn cuCtxGetCurrent(*mut Context);
        fn cuCtxSetCurrent(Context);
        fn cuMemGetInfo_v2(*mut usize, *mut usize);
        fn cuStreamCreate(*mut Stream, c_uint);
        fn cuStreamDestroy_v2(Stream);
        fn cuStreamSynchronize(Stream);
        fn cuStreamWaitEvent(Stream, Event, c_uint);
        fn cuEventCreate(*mut Event, c_uint);
        fn cuEventDestroy_v2(Event);
        fn cuEventRecord(Event, Stream);
        fn cuEventQuery(Event);
        fn cuEventSynchronize(Event);
        fn cuMemAlloc_v2(*mut Address, usize);
        fn cuMemFree_v2(Address);
        fn cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
        fn cuMemFreeHost(*mut c_void);
        fn cuMemHostRegister_v2(*mut c_void, usize, c_uint);
        fn cuMemHostUnregister(*mut c_void);
        fn cuMemHostGetDevicePointer_v2(*mut Address, *mut c_void, c_uint);
        fn cuMemcpyHtoDAsync_v2(Address, *const c_void, usize, Stream);
        fn cuMemcpyDtoHAsync_v2(*mut c_void, Address, usize, Stream);
        fn cuMemcpy2DAsync_v2(*const Memcpy2d, Stream);
        fn cuModuleLoadData(*mut Module, *const c_void);
        fn cuModuleUnload(Module);
        fn cuModuleGetFunction(*mut Function, Module, *const c_char);
        fn cuLaunchKernel(
            Function, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Stream, *mut *mut c_void, *mut *mut c_void,
        );
        optional:
        fn cuDeviceCanAccessPeer(*mut c_int, Device, Device);
        fn cuCtxEnablePeerAccess(Context, c_uint);
        fn cuMemcpyPeerAsync(Address, Context, Address, Context, usize, Stream);
        fn cuDeviceGetMemPool(*mut MemPool, Device);
        fn cuMemPoolSetAccess(MemPool, *const MemAccess, usize);
        fn cuThreadExchangeStreamCaptureMode(*mut c_int);
        fn cuMemAllocAsync(*mut Address, usize, Stream);
        fn cuMemFreeAsync(Address, Stream);
        fn cuMemcpyBatchAsync(
            *mut Address, *mut Address, *mut usize, usize, *mut MemcpyAttributes, *mut usize, usize, *mut usize, Stream,
        );
    }
}

/// `CUmemAccessDesc`: who may do what with the memory of a pool.
#[repr(C)]
pub(crate) struct MemAccess {
    pub(crate) location_type: c_int,
    pub(crate) location_id: c_int,
    pub(crate) flags: c_int,
}

/// `CU_MEM_LOCATION_TYPE_DEVICE`.
pub(crate) const LOCATION_TYPE_DEVICE: c_int = 1;
/// `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`.
pub(crate) const ACCESS_READ_WRITE: c_int = 3;

/// `CUmemcpyAttributes` (CUDA 12.8).
#[repr(C)]
#[derive(Default)]
pub(crate) struct MemcpyAttributes {
    /// `CUmemcpySrcAccessOrder`.
    pub(crate) src_access_order: c_uint,
    /// Type and id of the locations that managed memory is near; unused for other memory.
    pub(crate) location_hints: [c_int; 4],
    pub(crate) flags: c_uint,
}
const _: () = assert!(size_of::<MemcpyAttributes>() == 24);

/// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`: sources are read in the order of the stream.
pub(crate) const ACCESS_ORDER_STREAM: c_uint = 1;

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub(crate) struct Memcpy2d {
    pub(crate) src_x_bytes: usize,
    pub(crate) src_y: usize,
    pub(crate) src_memory_type: c_uint,
    pub(crate) src_host: *const c_void,
    pub(crate) src_device: Address,
    pub(crate) src_array: *mut c_void,
    pub(crate) src_pitch: usize,
    pub(crate) dst_x_bytes: usize,
    pub(crate) dst_y: usize,
    pub(crate) dst_memory_type: c_uint,
    pub(crate) dst_host: *mut c_void,
    pub(crate) dst_device: Address,
    pub(crate) dst_array: *mut c_void,
    pub(crate) dst_pitch: usize,
    pub(crate) width_bytes: usize,
    pub(crate) height: usize,
}
const _: () = assert!(size_of::<Memcpy2d>() == 128);

/// `CU_MEMORYTYPE_HOST`.
pub(crate) const MEMORYTYPE_HOST: c_uint = 1;
/// `CU_MEMORYTYPE_DEVICE`.
pub(crate) const MEMORYTYPE_DEVICE: c_uint = 2;

/// `CUDA_SUCCESS`.
pub(crate) const SUCCESS: c_int = 0;
/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub(crate) const OUT_OF_MEMORY: c_int = 2;
/// `CUDA_ERROR_NO_DEVICE`.
pub(crate) const NO_DEVICE: c_int = 100;
/// `CUDA_ERROR_SYSTEM_NOT_READY`.
pub(crate) const SYSTEM_NOT_READY: c_int = 802;
/// `CUDA_ERROR_SYSTEM_DRIVER_MISMATCH`.
pub(crate) const SYSTEM_DRIVER_MISMATCH: c_int = 803;
/// `CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE`.
pub(crate) const COMPAT_NOT_SUPPORTED: c_int = 804;
/// `CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED`.
pub(crate) const PEER_ACCESS_ALREADY_ENABLED: c_int = 704;
/// `CUDA_ERROR_NOT_SUPPORTED`.
pub(crate) const NOT_SUPPORTED: c_int = 801;
/// `CUDA_ERROR_NOT_READY`.
pub(crate) const NOT_READY: c_int = 600;
/// `CUDA_ERROR_DEVICE_UNAVAILABLE`.
pub(crate) const DEVICE_UNAVAILABLE: c_int = 46;
/// After these the context answers every call with the same error: deinitialized, ECC, NVLink, a contained fault, illegal
/// address, launch timeout, destroyed context, assert, and the hardware faults from 714 to 719.
pub(crate) const LOST: &[c_int] = &[4, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719];

/// `CUDA_ERROR_NO_BINARY_FOR_GPU` and `CUDA_ERROR_INVALID_PTX`: kernels for newer devices than this one.
pub(crate) const WRONG_ARCHITECTURE: &[c_int] = &[209, 218];
/// `CUDA_ERROR_JIT_COMPILER_NOT_FOUND` and `CUDA_ERROR_JIT_COMPILATION_DISABLED`.
pub(crate) const NO_COMPILER: &[c_int] = &[221, 223];
/// `CUDA_ERROR_UNSUPPORTED_PTX_VERSION`: the driver is older than the PTX.
pub(crate) const UNSUPPORTED_PTX_VERSION: c_int = 222;

/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`.
pub(crate) const ATTRIBUTE_MULTIPROCESSOR_COUNT: c_int = 16;
/// `CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY`.
pub(crate) const ATTRIBUTE_CAN_MAP_HOST_MEMORY: c_int = 19;
/// `CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID`, since 12.2.
pub(crate) const ATTRIBUTE_HOST_NUMA_ID: c_int = 134;
/// `CU_DEVICE_ATTRIBUTE_INTEGRATED`.
pub(crate) const ATTRIBUTE_INTEGRATED: c_int = 18;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`.
pub(crate) const ATTRIBUTE_MAJOR: c_int = 75;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR`.
pub(crate) const ATTRIBUTE_MINOR: c_int = 76;

/// `CU_LAUNCH_PARAM_END`, `_BUFFER_POINTER`, `_BUFFER_SIZE`: keys of the list that hands parameters over as one buffer.
pub(crate) const LAUNCH_KEYS: LaunchKeys = LaunchKeys { end: 0, buffer: 1, len: 2 };

/// `CU_STREAM_NON_BLOCKING`.
pub(crate) const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DISABLE_TIMING`.
pub(crate) const EVENT_DISABLE_TIMING: c_uint = 2;
/// `CU_MEMHOSTALLOC_PORTABLE` and `_DEVICEMAP`: pinned for every context, and read by kernels. Not write-combined: the
/// CPU reads staging memory too.
pub(crate) const HOST_ALLOC_FLAGS: c_uint = 1 | 2;
/// `CU_MEMHOSTREGISTER_PORTABLE` and `_DEVICEMAP`.
pub(crate) const HOST_REGISTER_FLAGS: c_uint = 1 | 2;
