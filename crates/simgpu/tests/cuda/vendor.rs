//! What the suite needs to know of CUDA: its names.

pub(crate) use tensorhaul_cuda::{Cuda as Vendor, LIBRARY_VARIABLE, driver, open};
pub(crate) use tensorhaul_rocm::LIBRARY_VARIABLE as LIBRARY_VARIABLE_OF_OTHERS;

/// Names a device.
pub(crate) fn id(ordinal: u32) -> tensorhaul::DeviceId {
    tensorhaul::DeviceId::Cuda(ordinal)
}

pub(crate) const NAME: &str = "cuda";
pub(crate) const FIRST: &str = "cuda:0";
pub(crate) const SECOND: &str = "cuda:1";
pub(crate) const VERSION_START: &str = "CUDA ";
pub(crate) const ARCHITECTURE: &str = "sm_80";
/// `DLDeviceType` of device memory, and of pinned memory of the host.
pub(crate) const DLPACK_TYPES: (i32, i32) = (2, 3);

pub(crate) const INVALID_VALUE: &str = "CUDA_ERROR_INVALID_VALUE";
pub(crate) const OUT_OF_MEMORY: &str = "CUDA_ERROR_OUT_OF_MEMORY";
pub(crate) const NOT_SUPPORTED: &str = "CUDA_ERROR_NOT_SUPPORTED";
pub(crate) const ILLEGAL_ADDRESS: &str = "CUDA_ERROR_ILLEGAL_ADDRESS";
/// What a kernel's misaligned access ends with.
pub(crate) const MISALIGNED: i32 = 716;

/// How the driver refuses kernels, and what that means.
pub(crate) const REFUSALS: &[(i32, &str)] = &[
    (222, "the driver is older than the kernels, update it"),
    (218, "the kernels are for other devices than this one"),
    (209, "the kernels are for other devices than this one"),
    (221, "the driver's own compiler is missing or switched off"),
];

/// What is said where there is no driver, and where one sees no device.
pub(crate) const NO_DRIVER: &str = "NVIDIA's driver is not installed";
pub(crate) const NO_DEVICE: &[&str] = &["a driver is installed, but it sees no GPU"];
pub(crate) const FIRST_SYMBOL: &str = "cuInit";
pub(crate) const OPTIONAL_SYMBOLS: &[&str] = &[
    call::CAPTURE_MODE,
    call::CAN_ACCESS_PEER,
    call::ENABLE_PEER,
    call::POOL_OF,
    call::OPEN_POOL,
    call::COPY_PEER,
    "cuMemAllocAsync",
    "cuMemFreeAsync",
    "cuMemcpyBatchAsync",
];

/// Returns a module with the simulator's own kernel `probe`, which takes an address.
pub(crate) fn probe_image() -> &'static [u8] {
    b".version 7.0\n.target sm_80\n.visible .entry probe(.param .align 8 .b8 p[8]) { ret; }\0"
}

/// The calls, by the names they are exported with.
pub(crate) mod call {
    /// What makes a device ready for work.
    pub(crate) const OPEN: &str = "cuDevicePrimaryCtxRetain";
    pub(crate) const CURRENT: &str = "cuCtxGetCurrent";
    pub(crate) const MAKE_CURRENT: &str = "cuCtxSetCurrent";
    pub(crate) const CAPTURE_MODE: &str = "cuThreadExchangeStreamCaptureMode";
    pub(crate) const MEMORY: &str = "cuMemGetInfo_v2";
    pub(crate) const STREAM_CREATE: &str = "cuStreamCreate";
    pub(crate) const STREAM_WAIT: &str = "cuStreamSynchronize";
    pub(crate) const STREAM_WAIT_EVENT: &str = "cuStreamWaitEvent";
    pub(crate) const EVENT_RECORD: &str = "cuEventRecord";
    pub(crate) const EVENT_QUERY: &str = "cuEventQuery";
    pub(crate) const EVENT_WAIT: &str = "cuEventSynchronize";
    pub(crate) const ALLOCATE: &str = "cuMemAlloc_v2";
    pub(crate) const ALLOCATE_ORDERED: &str = "cuMemAllocAsync";
    pub(crate) const FREE_ORDERED: &str = "cuMemFreeAsync";
    pub(crate) const FREE: &str = "cuMemFree_v2";
    pub(crate) const HOST_ALLOCATE: &str = "cuMemHostAlloc";
    pub(crate) const HOST_REGISTER: &str = "cuMemHostRegister_v2";
    pub(crate) const HOST_ADDRESS: &str = "cuMemHostGetDevicePointer_v2";
    pub(crate) const COPY_IN: &str = "cuMemcpyHtoDAsync_v2";
    pub(crate) const COPY_BATCH: &str = "cuMemcpyBatchAsync";
    pub(crate) const COPY_OUT: &str = "cuMemcpyDtoHAsync_v2";
    pub(crate) const COPY_ROWS: &str = "cuMemcpy2DAsync_v2";
    pub(crate) const COPY_ON_DEVICE: &str = "cuMemcpyDtoDAsync_v2";
    pub(crate) const CAN_ACCESS_PEER: &str = "cuDeviceCanAccessPeer";
    pub(crate) const ENABLE_PEER: &str = "cuCtxEnablePeerAccess";
    pub(crate) const POOL_OF: &str = "cuDeviceGetMemPool";
    pub(crate) const OPEN_POOL: &str = "cuMemPoolSetAccess";
    pub(crate) const COPY_PEER: &str = "cuMemcpyPeerAsync";
    pub(crate) const HOST_CALL: &str = "cuLaunchHostFunc";
    pub(crate) const MODULE_LOAD: &str = "cuModuleLoadData";
    pub(crate) const MODULE_UNLOAD: &str = "cuModuleUnload";
    pub(crate) const FUNCTION: &str = "cuModuleGetFunction";
    pub(crate) const LAUNCH: &str = "cuLaunchKernel";

    /// Calls that a device which is open has behind it.
    pub(crate) const OF_OPENING: &[&str] = &["cuDeviceGetName", OPEN, STREAM_CREATE];

    /// Calls whose failure a load survives: it learns less, or lets memory go later.
    pub(crate) const SURVIVED: &[&str] = &[
        "cuDeviceGetPCIBusId",
        "cuDeviceGetName",
        "cuDriverGetVersion",
        "cuInit",
        "cuMemHostRegister_v2",
        "cuMemHostUnregister",
        "cuMemFreeAsync",
        "cuMemFree_v2",
        "cuMemFreeHost",
        "cuEventDestroy_v2",
        "cuStreamDestroy_v2",
        "cuDevicePrimaryCtxRelease_v2",
    ];

    /// Calls that also run when memory is let go, where there is nobody to tell.
    pub(crate) const OF_THE_END: &[&str] = &[
        "cuCtxGetCurrent",
        "cuCtxSetCurrent",
        CAPTURE_MODE,
        "cuEventRecord",
        "cuStreamWaitEvent",
        "cuDeviceGet",
        "cuEventCreate",
    ];
}

/// What peers are asked with, where the backend asks for something else or not at all.
pub(crate) mod peer {
    use std::ffi::{c_int, c_uint, c_void};
    use std::ptr;

    use crate::suite::sim::function;

    /// The answer to a peer that is none: `CUDA_ERROR_INVALID_CONTEXT`.
    pub(crate) const NO_PEER: c_int = 201;

    pub(crate) fn can_access(device: c_int, peer: c_int) -> (c_int, c_int) {
        type Call = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
        let mut can = -1;
        // SAFETY: writes one integer.
        let code = unsafe { function::<Call>("cuDeviceCanAccessPeer")(&raw mut can, device, peer) };
        (code, can)
    }

    pub(crate) fn enable(ordinal: u32) -> c_int {
        type Call = unsafe extern "C" fn(*mut c_void, c_uint) -> c_int;
        // SAFETY: a context, or a number that is none, which the simulator knows.
        unsafe { function::<Call>("cuCtxEnablePeerAccess")(context(ordinal), 0) }
    }

    pub(crate) fn disable(ordinal: u32) -> c_int {
        type Call = unsafe extern "C" fn(*mut c_void) -> c_int;
        // SAFETY: as above.
        unsafe { function::<Call>("cuCtxDisablePeerAccess")(context(ordinal)) }
    }

    /// Queues a copy from an address of one device to one of another, both given with the device's ordinal.
    ///
    /// # Safety
    /// The memory lives until the stream was waited for.
    pub(crate) unsafe fn copy(to: (u32, u64), from: (u32, u64), len: usize, stream: *mut c_void) -> c_int {
        type Call = unsafe extern "C" fn(u64, *mut c_void, u64, *mut c_void, usize, *mut c_void) -> c_int;
        let copy = function::<Call>("cuMemcpyPeerAsync");
        // SAFETY: the caller's promise.
        unsafe { copy(to.1, context(to.0), from.1, context(from.0), len, stream) }
    }

    fn context(ordinal: u32) -> *mut c_void {
        ptr::without_provenance_mut(ordinal as usize + 1)
    }
}
