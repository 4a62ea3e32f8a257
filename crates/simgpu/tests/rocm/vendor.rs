//! What the suite needs to know of HIP: its names.

use std::sync::OnceLock;

pub(crate) use tensorhaul_cuda::LIBRARY_VARIABLE as LIBRARY_VARIABLE_OF_OTHERS;
pub(crate) use tensorhaul_rocm::{LIBRARY_VARIABLE, Rocm as Vendor, driver, open};

use crate::code_object;

/// Names a device.
pub(crate) fn id(ordinal: u32) -> tensorhaul::DeviceId {
    tensorhaul::DeviceId::Rocm(ordinal)
}

pub(crate) const NAME: &str = "rocm";
pub(crate) const FIRST: &str = "rocm:0";
pub(crate) const SECOND: &str = "rocm:1";
pub(crate) const VERSION_START: &str = "HIP 7.1";
pub(crate) const ARCHITECTURE: &str = "gfx942";
/// `DLDeviceType` of device memory, and of pinned memory of the host.
pub(crate) const DLPACK_TYPES: (i32, i32) = (10, 11);

pub(crate) const INVALID_VALUE: &str = "hipErrorInvalidValue";
pub(crate) const OUT_OF_MEMORY: &str = "hipErrorOutOfMemory";
pub(crate) const NOT_SUPPORTED: &str = "hipErrorNotSupported";
pub(crate) const ILLEGAL_ADDRESS: &str = "hipErrorIllegalAddress";
/// What a kernel's misaligned access ends with.
pub(crate) const MISALIGNED: i32 = 719;

/// How the runtime refuses kernels, and what that means.
pub(crate) const REFUSALS: &[(i32, &str)] = &[(209, "the kernels are for other devices than this one")];

/// What is said where there is no runtime, and where one sees no device, which depends on the machine.
pub(crate) const NO_DRIVER: &str = "AMD's ROCm is not installed";
pub(crate) const NO_DEVICE: &[&str] =
    &["there is no /dev/kfd", "/dev/kfd cannot be opened", "ROCm is installed, but it sees no GPU"];
pub(crate) const FIRST_SYMBOL: &str = "hipInit";
pub(crate) const OPTIONAL_SYMBOLS: &[&str] = &[
    call::CAPTURE_MODE,
    "hipMallocAsync",
    "hipFreeAsync",
    "hipMemcpyBatchAsync",
    "hipGetDevicePropertiesR0600",
];

/// Returns a module with the simulator's own kernel `probe`, which takes an address.
pub(crate) fn probe_image() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| code_object::with_one_kernel(ARCHITECTURE, "probe", 8))
}

/// The calls, by the names they are exported with.
pub(crate) mod call {
    /// The first call for a device that is to be made ready: the runtime does that by itself.
    pub(crate) const OPEN: &str = "hipGetDevice";
    pub(crate) const CURRENT: &str = "hipGetDevice";
    pub(crate) const MAKE_CURRENT: &str = "hipSetDevice";
    pub(crate) const CAPTURE_MODE: &str = "hipThreadExchangeStreamCaptureMode";
    pub(crate) const MEMORY: &str = "hipMemGetInfo";
    pub(crate) const STREAM_CREATE: &str = "hipStreamCreateWithFlags";
    pub(crate) const STREAM_WAIT: &str = "hipStreamSynchronize";
    pub(crate) const STREAM_WAIT_EVENT: &str = "hipStreamWaitEvent";
    pub(crate) const EVENT_RECORD: &str = "hipEventRecord";
    pub(crate) const EVENT_QUERY: &str = "hipEventQuery";
    pub(crate) const EVENT_WAIT: &str = "hipEventSynchronize";
    pub(crate) const ALLOCATE: &str = "hipMalloc";
    pub(crate) const ALLOCATE_ORDERED: &str = "hipMallocAsync";
    pub(crate) const FREE_ORDERED: &str = "hipFreeAsync";
    pub(crate) const FREE: &str = "hipFree";
    pub(crate) const HOST_ALLOCATE: &str = "hipHostMalloc";
    pub(crate) const HOST_REGISTER: &str = "hipHostRegister";
    pub(crate) const HOST_ADDRESS: &str = "hipHostGetDevicePointer";
    pub(crate) const COPY_IN: &str = "hipMemcpyHtoDAsync";
    pub(crate) const COPY_BATCH: &str = "hipMemcpyBatchAsync";
    pub(crate) const COPY_OUT: &str = "hipMemcpyDtoHAsync";
    pub(crate) const COPY_ROWS: &str = "hipMemcpy2DAsync";
    pub(crate) const COPY_ON_DEVICE: &str = "hipMemcpyDtoDAsync";
    pub(crate) const CAN_ACCESS_PEER: &str = "hipDeviceCanAccessPeer";
    pub(crate) const ENABLE_PEER: &str = "hipDeviceEnablePeerAccess";
    pub(crate) const POOL_OF: &str = "hipDeviceGetMemPool";
    pub(crate) const OPEN_POOL: &str = "hipMemPoolSetAccess";
    pub(crate) const COPY_PEER: &str = "hipMemcpyPeerAsync";
    pub(crate) const HOST_CALL: &str = "hipLaunchHostFunc";
    pub(crate) const MODULE_LOAD: &str = "hipModuleLoadData";
    pub(crate) const MODULE_UNLOAD: &str = "hipModuleUnload";
    pub(crate) const FUNCTION: &str = "hipModuleGetFunction";
    pub(crate) const LAUNCH: &str = "hipModuleLaunchKernel";

    /// Calls that a device which is open has behind it.
    pub(crate) const OF_OPENING: &[&str] =
        &["hipDeviceGetName", "hipGetDevicePropertiesR0600", STREAM_CREATE];

    /// Calls whose failure a load survives: it learns less, or lets memory go later.
    pub(crate) const SURVIVED: &[&str] = &[
        "hipDeviceGetPCIBusId",
        "hipDeviceGetName",
        "hipRuntimeGetVersion",
        "hipInit",
        "hipHostRegister",
        "hipHostUnregister",
        "hipFreeAsync",
        "hipFree",
        "hipHostFree",
        "hipEventDestroy",
        "hipStreamDestroy",
    ];

    /// Calls that also run when memory is let go, where there is nobody to tell.
    pub(crate) const OF_THE_END: &[&str] = &[
        "hipGetDevice",
        "hipSetDevice",
        CAPTURE_MODE,
        "hipEventRecord",
        "hipStreamWaitEvent",
        "hipEventCreateWithFlags",
    ];
}

/// What peers are asked with, where the backend asks for something else or not at all.
pub(crate) mod peer {
    use std::ffi::{c_int, c_uint, c_void};

    use crate::suite::sim::function;

    /// The answer to a peer that is none: `hipErrorInvalidDevice`.
    pub(crate) const NO_PEER: c_int = 101;

    pub(crate) fn can_access(device: c_int, peer: c_int) -> (c_int, c_int) {
        type Call = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
        let mut can = -1;
        // SAFETY: writes one integer.
        let code = unsafe { function::<Call>("hipDeviceCanAccessPeer")(&raw mut can, device, peer) };
        (code, can)
    }

    pub(crate) fn enable(ordinal: u32) -> c_int {
        type Call = unsafe extern "C" fn(c_int, c_uint) -> c_int;
        // SAFETY: takes any number.
        unsafe { function::<Call>("hipDeviceEnablePeerAccess")(ordinal as c_int, 0) }
    }

    pub(crate) fn disable(ordinal: u32) -> c_int {
        type Call = unsafe extern "C" fn(c_int) -> c_int;
        // SAFETY: as above.
        unsafe { function::<Call>("hipDeviceDisablePeerAccess")(ordinal as c_int) }
    }

    /// Queues a copy from an address of one device to one of another, both given with the device's ordinal.
    ///
    /// # Safety
    /// The memory lives until the stream was waited for.
    pub(crate) unsafe fn copy(to: (u32, u64), from: (u32, u64), len: usize, stream: *mut c_void) -> c_int {
        type Call = unsafe extern "C" fn(u64, c_int, u64, c_int, usize, *mut c_void) -> c_int;
        let copy = function::<Call>("hipMemcpyPeerAsync");
        // SAFETY: the caller's promise.
        unsafe { copy(to.1, to.0 as c_int, from.1, from.0 as c_int, len, stream) }
    }
}
