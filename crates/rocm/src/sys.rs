//! The functions of AMD's HIP runtime that the backend calls.
//!
//! # Source
//! HIP runtime API reference, versions 5.2 to 7.1: signatures, flags, attributes and status codes, which did not change. All
//! functions are in every version since 5.0 but the optional ones: capture modes are of 5.0 itself, ordered allocation and
//! access to pools of 5.1, properties in their new layout of 6.0, batched copies of 7.1. Those for peers are older; one device does
//! without.

use std::ffi::{c_char, c_int, c_uint, c_void};

use tensorhaul_device::gpu::call::LaunchKeys;

pub(crate) type Device = c_int;
pub(crate) type Stream = *mut c_void;
pub(crate) type Event = *mut c_void;
pub(crate) type Module = *mut c_void;
pub(crate) type MemPool = *mut c_void;
pub(crate) type Function = *mut c_void;
/// `hipDeviceptr_t` and other pointers that only the device follows.
pub(crate) type Address = u64;

tensorhaul_device::driver_table! {
    /// AMD's HIP runtime.
    pub(crate) struct Table {
        fn hipInit(c_uint);
        fn hipRuntimeGetVersion(*mut c_int);
        fn hipGetErrorName(c_int) -> *const c_char;
        fn hipGetLastError();
        fn hipGetDeviceCount(*mut c_int);
        fn hipDeviceGetName(*mut c_char, c_int, Device);
        fn hipDeviceGetAttribute(*mut c_int, c_int, Device);
        fn hipDeviceGetPCIBusId(*mut c_char, c_int, Device);
        fn hipDeviceTotalMem(*mut usize, Device);
        fn hipGetDevice(*mut Device);
        fn hipSetDevice(Device);
        fn hipMemGetInfo(*mut usize, *mut usize);
        fn hipStreamCreateWithFlags(*mut Stream, c_uint);
        fn hipStreamDestroy(Stream);
        fn hipStreamSynchronize(Stream);
        fn hipStreamWaitEvent(Stream, Event, c_uint);
        fn hipEventCreateWithFlags(*mut Event, c_uint);
        fn hipEventDestroy(Event);
        fn hipEventRecord(Event, Stream);
        fn hipEventQuery(Event);
        fn hipEventSynchronize(Event);
        fn hipMalloc(*mut Address, usize);
        fn hipFree(Address);
        fn hipHostMalloc(*mut *mut c_void, usize, c_uint);
        fn hipHostFree(*mut c_void);
        fn hipHostRegister(*mut c_void, usize, c_uint);
        fn hipHostUnregister(*mut c_void);
        fn hipHostGetDevicePointer(*mut Address, *mut c_void, c_uint);
        fn hipMemcpyHtoDAsync(Address, *const c_void, usize, Stream);
        fn hipMemcpyDtoHAsync(*mut c_void, Address, usize, Stream);
        fn hipMemcpy2DAsync(Address, usize, *const c_void, usize, usize, usize, c_int, Stream);
        fn hipModuleLoadData(*mut Module, *const c_void);
        fn hipModuleUnload(Module);
        fn hipModuleGetFunction(*mut Function, Module, *const c_char);
        fn hipModuleLaunchKernel(
            Function, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Stream, *mut *mut c_void, *mut *mut c_void,
        );
        optional:
        fn hipThreadExchangeStreamCaptureMode(*mut c_int);
        fn hipDeviceCanAccessPeer(*mut c_int, Device, Device);
        fn hipDeviceEnablePeerAccess(Device, c_uint);
        fn hipMemcpyPeerAsync(Address, Device, Address, Device, usize, Stream);
        fn hipDeviceGetMemPool(*mut MemPool, Device);
        fn hipMemPoolSetAccess(MemPool, *const MemAccess, usize);
        fn hipGetDeviceProperties(*mut Properties, Device);
        fn hipGetDevicePropertiesR0600(*mut Properties, Device);
        fn hipMallocAsync(*mut Address, usize, Stream);
        fn hipFreeAsync(Address, Stream);
        fn hipMemcpyBatchAsync(
            *mut Address, *mut *const c_void, *mut usize, usize, *mut c_void, *mut usize, usize, *mut usize, Stream,
        );
    }
}

/// `hipMemAccessDesc`: who may do what with the memory of a pool.
#[repr(C)]
pub(crate) struct MemAccess {
    pub(crate) location_type: c_int,
    pub(crate) location_id: c_int,
    pub(crate) flags: c_int,
}

/// `hipMemLocationTypeDevice`.
pub(crate) const LOCATION_TYPE_DEVICE: c_int = 1;
/// `hipMemAccessFlagsProtReadWrite`.
pub(crate) const ACCESS_READ_WRITE: c_int = 3;

/// `hipDeviceProp_t`, of which the architecture's name is read and nothing else: it is the one thing that no attribute tells.
///
/// The struct had 792 bytes before ROCm 6 and has 1472 since. The room is for what may be added: the runtime writes as much as its
/// own struct has.
#[repr(C, align(8))]
pub(crate) struct Properties(pub(crate) [u8; 8192]);

/// Where `gcnArchName` is in what `hipGetDeviceProperties` writes, and in what `hipGetDevicePropertiesR0600` writes.
pub(crate) const ARCHITECTURE_OFFSET: usize = 396;
pub(crate) const ARCHITECTURE_OFFSET_R0600: usize = 1160;

/// `hipSuccess`.
pub(crate) const SUCCESS: c_int = 0;
/// `hipErrorOutOfMemory`.
pub(crate) const OUT_OF_MEMORY: c_int = 2;
/// `hipErrorNoDevice`.
pub(crate) const NO_DEVICE: c_int = 100;
/// `hipErrorInvalidDevice`, which older versions answer to `hipInit` where there is none.
pub(crate) const INVALID_DEVICE: c_int = 101;
/// `hipErrorNoBinaryForGpu`.
pub(crate) const NO_BINARY_FOR_GPU: c_int = 209;
/// `hipErrorPeerAccessAlreadyEnabled`.
pub(crate) const PEER_ACCESS_ALREADY_ENABLED: c_int = 704;
/// `hipErrorNotReady`.
pub(crate) const NOT_READY: c_int = 600;
/// `hipErrorNotSupported`.
pub(crate) const NOT_SUPPORTED: c_int = 801;
/// After these the device answers every call with an error: deinitialized, ECC, illegal address, launch timeout,
/// destroyed context, assert, launch failure. `hipErrorUnknown` is not among them, because it is also the answer to calls
/// that merely went wrong.
pub(crate) const LOST: &[c_int] = &[4, 214, 700, 702, 709, 710, 719];

/// `hipDeviceAttributeCanMapHostMemory`.
pub(crate) const ATTRIBUTE_CAN_MAP_HOST_MEMORY: c_int = 3;
/// `hipDeviceAttributeHostNumaId`, since 7.2.
pub(crate) const ATTRIBUTE_HOST_NUMA_ID: c_int = 92;
/// `hipDeviceAttributeIntegrated`.
pub(crate) const ATTRIBUTE_INTEGRATED: c_int = 16;
/// `hipDeviceAttributeMultiprocessorCount`.
pub(crate) const ATTRIBUTE_MULTIPROCESSOR_COUNT: c_int = 63;

/// `HIP_LAUNCH_PARAM_BUFFER_POINTER`, `_BUFFER_SIZE`, `_END`: keys of the list that hands parameters over as one buffer. The
/// last is not CUDA's.
pub(crate) const LAUNCH_KEYS: LaunchKeys = LaunchKeys { buffer: 1, len: 2, end: 3 };

/// `hipMemcpyHostToDevice`.
pub(crate) const MEMCPY_HOST_TO_DEVICE: c_int = 1;
/// `hipStreamNonBlocking`.
pub(crate) const STREAM_NON_BLOCKING: c_uint = 1;
/// `hipEventDisableTiming`.
pub(crate) const EVENT_DISABLE_TIMING: c_uint = 2;
/// `hipHostMallocPortable` and `_Mapped`: pinned for every device, and read by kernels. Not write-combined: the CPU reads
/// staging memory too. Coherent, which is the default: kernels read what the CPU wrote after the last one.
pub(crate) const HOST_MALLOC_FLAGS: c_uint = 1 | 2;
/// `hipHostRegisterPortable` and `_Mapped`.
pub(crate) const HOST_REGISTER_FLAGS: c_uint = 1 | 2;
