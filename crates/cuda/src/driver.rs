//! NVIDIA's calls under the names that all vendors share.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;
use std::ptr;

use tensorhaul_device::gpu::{
    BatchPiece, CallError, CaptureMode, CompileError, Compiled, Context, DeviceFacts, Driver, EventHandle,
    FunctionHandle, LaunchShape, Meaning, ModuleHandle, NoDriver, Peer, PeerCopy, Rows, StreamHandle,
    call::pointer,
};
use tensorhaul_plan::DeviceId;

use crate::kernels;
use crate::sys::{self, Table};

/// NVIDIA's driver, loaded and initialized.
pub struct Cuda {
    pub(crate) table: Table,
    version: c_int,
}

impl Cuda {
    /// Loads the first of these libraries and initializes it; the error is a sentence with the likely cause.
    pub(crate) fn load(candidates: &[PathBuf]) -> Result<Cuda, NoDriver> {
        let table = Table::load(candidates).map_err(|error| {
            error.no_driver("NVIDIA's driver is not installed, or not visible in this container (--gpus all)")
        })?;
        let mut cuda = Cuda { table, version: 0 };
        let path = cuda.table.path.display().to_string();
        // SAFETY: the only argument must be 0.
        cuda.check("cuInit", unsafe { (cuda.table.cuInit)(0) }).map_err(|error| {
            let why = format!("{path}: {error}: {}", likely_cause(error.code));
            if error.code == sys::NO_DEVICE { NoDriver::NoDevice(why) } else { NoDriver::Fails(why) }
        })?;
        // SAFETY: writes one integer. A failure leaves 0, which is printed as unknown.
        let _ = unsafe { (cuda.table.cuDriverGetVersion)(&raw mut cuda.version) };
        Ok(cuda)
    }

    pub(crate) fn check(&self, call: &'static str, code: c_int) -> Result<(), CallError> {
        if code == sys::SUCCESS {
            return Ok(());
        }
        let meaning = match code {
            sys::OUT_OF_MEMORY => Meaning::OutOfMemory,
            sys::DEVICE_UNAVAILABLE => Meaning::Busy,
            sys::UNSUPPORTED_PTX_VERSION => Meaning::DriverTooOld,
            code if sys::WRONG_ARCHITECTURE.contains(&code) => Meaning::WrongArchitecture,
            code if sys::NO_COMPILER.contains(&code) => Meaning::NoCompiler,
            code if sys::LOST.contains(&code) => Meaning::Lost,
            _ => Meaning::Other,
        };
        Err(CallError { call, code, name: self.error_name(code), meaning })
    }

    fn error_name(&self, code: c_int) -> String {
        let mut name: *const c_char = ptr::null();
        // SAFETY: writes one pointer, to a static string, or null for a code it does not know.
        let result = unsafe { (self.table.cuGetErrorName)(code, &raw mut name) };
        if result != sys::SUCCESS || name.is_null() {
            return String::new();
        }
        // SAFETY: the driver's static, terminated string.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }
}

/// Returns why a driver that is there does not start, and what to do.
///
/// # Source
/// NVIDIA, CUDA driver API, `CUresult`.
fn likely_cause(code: c_int) -> &'static str {
    match code {
        sys::NO_DEVICE => "a driver is installed, but it sees no GPU (CUDA_VISIBLE_DEVICES?)",
        sys::SYSTEM_NOT_READY => {
            "the system is not ready; where GPUs are joined by NVSwitch (HGX, DGX), start the service nvidia-fabricmanager, of the driver's version"
        }
        sys::SYSTEM_DRIVER_MISMATCH => {
            "the driver and the kernel module differ in version; reboot, or install one version of both"
        }
        sys::COMPAT_NOT_SUPPORTED => {
            "a forward compatibility driver (cuda-compat) was found, which this device does not take; take it off the library path"
        }
        _ => "a driver is installed, but does not start; nvidia-smi and the kernel's log may say more",
    }
}

// SAFETY: each method calls the function of NVIDIA's reference for its name, with these arguments.
unsafe impl Driver for Cuda {
    fn device_id(&self, ordinal: u32) -> DeviceId {
        DeviceId::Cuda(ordinal)
    }

    fn library(&self) -> String {
        self.table.path.display().to_string()
    }

    fn version(&self) -> String {
        format!("CUDA {}.{}", self.version / 1000, self.version % 1000 / 10)
    }

    fn device_count(&self) -> Result<u32, CallError> {
        let mut count = 0;
        // SAFETY: writes one integer.
        self.check("cuDeviceGetCount", unsafe { (self.table.cuDeviceGetCount)(&raw mut count) })?;
        Ok(count.max(0) as u32)
    }

    fn describe(&self, ordinal: u32) -> Result<DeviceFacts, CallError> {
        self.facts(ordinal)
    }

    fn open(&self, ordinal: u32) -> Result<Context, CallError> {
        let device = self.device(ordinal)?;
        let mut context: sys::Context = ptr::null_mut();
        // SAFETY: writes one pointer. The primary context is the one that frameworks in this process use.
        let code = unsafe { (self.table.cuDevicePrimaryCtxRetain)(&raw mut context, device) };
        self.check("cuDevicePrimaryCtxRetain", code)?;
        Ok(Context(context.expose_provenance()))
    }

    fn close(&self, ordinal: u32, _context: Context) {
        if let Ok(device) = self.device(ordinal) {
            // SAFETY: retained in `open`, released once. A failure is of a context that is gone already.
            let _ = unsafe { (self.table.cuDevicePrimaryCtxRelease_v2)(device) };
        }
    }

    fn current(&self) -> Result<Context, CallError> {
        let mut context: sys::Context = ptr::null_mut();
        // SAFETY: writes one pointer.
        self.check("cuCtxGetCurrent", unsafe { (self.table.cuCtxGetCurrent)(&raw mut context) })?;
        Ok(Context(context.expose_provenance()))
    }

    fn make_current(&self, context: Context) -> Result<(), CallError> {
        // SAFETY: a context of `open` or `current`, or null for none.
        self.check("cuCtxSetCurrent", unsafe { (self.table.cuCtxSetCurrent)(pointer(context.0)) })
    }

    fn exchange_capture_mode(&self, mode: CaptureMode) -> Option<Result<CaptureMode, CallError>> {
        let exchange = self.table.cuThreadExchangeStreamCaptureMode?;
        let CaptureMode(mut mode) = mode;
        // SAFETY: reads and writes one integer.
        let code = unsafe { exchange(&raw mut mode) };
        Some(self.check("cuThreadExchangeStreamCaptureMode", code).map(|()| CaptureMode(mode)))
    }

    fn memory(&self) -> Result<(u64, u64), CallError> {
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: writes two integers.
        self.check("cuMemGetInfo", unsafe { (self.table.cuMemGetInfo_v2)(&raw mut free, &raw mut total) })?;
        Ok((free as u64, total as u64))
    }

    fn stream_create(&self) -> Result<StreamHandle, CallError> {
        let mut stream: sys::Stream = ptr::null_mut();
        // SAFETY: writes one pointer.
        let code = unsafe { (self.table.cuStreamCreate)(&raw mut stream, sys::STREAM_NON_BLOCKING) };
        self.check("cuStreamCreate", code)?;
        Ok(StreamHandle(stream.expose_provenance()))
    }

    unsafe fn stream_destroy(&self, stream: StreamHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("cuStreamDestroy", unsafe { (self.table.cuStreamDestroy_v2)(pointer(stream.0)) })
    }

    unsafe fn stream_wait(&self, stream: StreamHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("cuStreamSynchronize", unsafe { (self.table.cuStreamSynchronize)(pointer(stream.0)) })
    }

    unsafe fn stream_wait_event(&self, stream: StreamHandle, event: EventHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise; the flags must be 0.
        let code = unsafe { (self.table.cuStreamWaitEvent)(pointer(stream.0), pointer(event.0), 0) };
        self.check("cuStreamWaitEvent", code)
    }

    fn event_create(&self) -> Result<EventHandle, CallError> {
        let mut event: sys::Event = ptr::null_mut();
        // SAFETY: writes one pointer.
        let code = unsafe { (self.table.cuEventCreate)(&raw mut event, sys::EVENT_DISABLE_TIMING) };
        self.check("cuEventCreate", code)?;
        Ok(EventHandle(event.expose_provenance()))
    }

    unsafe fn event_destroy(&self, event: EventHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("cuEventDestroy", unsafe { (self.table.cuEventDestroy_v2)(pointer(event.0)) })
    }

    unsafe fn event_record(&self, event: EventHandle, stream: StreamHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("cuEventRecord", unsafe {
            (self.table.cuEventRecord)(pointer(event.0), pointer(stream.0))
        })
    }

    unsafe fn event_is_complete(&self, event: EventHandle) -> Result<bool, CallError> {
        // SAFETY: the caller's promise.
        match unsafe { (self.table.cuEventQuery)(pointer(event.0)) } {
            sys::NOT_READY => Ok(false),
            code => self.check("cuEventQuery", code).map(|()| true),
        }
    }

    unsafe fn event_wait(&self, event: EventHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("cuEventSynchronize", unsafe { (self.table.cuEventSynchronize)(pointer(event.0)) })
    }

    unsafe fn allocate_ordered(
        &self,
        len_bytes: u64,
        stream: StreamHandle,
    ) -> Option<Result<u64, CallError>> {
        let (Some(allocate), Some(_)) = (self.table.cuMemAllocAsync, self.table.cuMemFreeAsync) else {
            return None;
        };
        let mut address = 0;
        // SAFETY: writes one integer; the stream is the caller's promise.
        let code = unsafe { allocate(&raw mut address, len_bytes as usize, pointer(stream.0)) };
        match code {
            // The device or its driver has no memory pools: `cuMemAlloc` serves.
            sys::NOT_SUPPORTED => None,
            code => Some(self.check("cuMemAllocAsync", code).map(|()| address)),
        }
    }

    unsafe fn free_ordered(&self, address: u64, stream: StreamHandle) -> Result<(), CallError> {
        let free = self.table.cuMemFreeAsync.expect("memory allocated in order is freed by the same driver");
        // SAFETY: the caller's promise.
        self.check("cuMemFreeAsync", unsafe { free(address, pointer(stream.0)) })
    }

    fn allocate(&self, len_bytes: u64) -> Result<u64, CallError> {
        let mut address = 0;
        // SAFETY: writes one integer.
        self.check("cuMemAlloc", unsafe {
            (self.table.cuMemAlloc_v2)(&raw mut address, len_bytes as usize)
        })?;
        Ok(address)
    }

    unsafe fn free(&self, address: u64) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("cuMemFree", unsafe { (self.table.cuMemFree_v2)(address) })
    }

    fn host_allocate(&self, len_bytes: usize) -> Result<*mut c_void, CallError> {
        let mut start = ptr::null_mut();
        // SAFETY: writes one pointer.
        let code = unsafe { (self.table.cuMemHostAlloc)(&raw mut start, len_bytes, sys::HOST_ALLOC_FLAGS) };
        self.check("cuMemHostAlloc", code)?;
        Ok(start)
    }

    unsafe fn host_free(&self, start: *mut c_void) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("cuMemFreeHost", unsafe { (self.table.cuMemFreeHost)(start) })
    }

    unsafe fn host_register(&self, start: *mut c_void, len_bytes: usize) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.table.cuMemHostRegister_v2)(start, len_bytes, sys::HOST_REGISTER_FLAGS) };
        self.check("cuMemHostRegister", code)
    }

    unsafe fn host_unregister(&self, start: *mut c_void) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("cuMemHostUnregister", unsafe { (self.table.cuMemHostUnregister)(start) })
    }

    unsafe fn host_address(&self, start: *const c_void) -> Result<u64, CallError> {
        start.expose_provenance();
        let mut address = 0;
        // On most devices it is the host's own; on some that share its memory it is not.
        // SAFETY: writes one address; the memory is the caller's promise; the flags must be 0.
        let code =
            unsafe { (self.table.cuMemHostGetDevicePointer_v2)(&raw mut address, start.cast_mut(), 0) };
        self.check("cuMemHostGetDevicePointer", code)?;
        Ok(address)
    }

    unsafe fn copy_in(
        &self,
        target: u64,
        source: *const c_void,
        len_bytes: usize,
        stream: StreamHandle,
    ) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.table.cuMemcpyHtoDAsync_v2)(target, source, len_bytes, pointer(stream.0)) };
        self.check("cuMemcpyHtoDAsync", code)
    }

    unsafe fn copy_in_batch(
        &self,
        pieces: &[BatchPiece],
        stream: StreamHandle,
    ) -> Option<Result<(), CallError>> {
        let copy = self.table.cuMemcpyBatchAsync?;
        let mut targets: Vec<u64> = pieces.iter().map(|piece| piece.target).collect();
        // With unified addressing, which every 64-bit driver has, a host pointer is an address too.
        let mut sources: Vec<u64> =
            pieces.iter().map(|piece| piece.source.expose_provenance() as u64).collect();
        let mut lens: Vec<usize> = pieces.iter().map(|piece| piece.len_bytes).collect();
        let mut attributes =
            sys::MemcpyAttributes { src_access_order: sys::ACCESS_ORDER_STREAM, ..Default::default() };
        let (mut first_with_attributes, mut failed) = (0usize, usize::MAX);
        // SAFETY: the ranges are the caller's promise; the arrays are as long as the count and read before the call
        // returns; one set of attributes is for all pieces from number 0 on.
        let code = unsafe {
            copy(
                targets.as_mut_ptr(),
                sources.as_mut_ptr(),
                lens.as_mut_ptr(),
                pieces.len(),
                &raw mut attributes,
                &raw mut first_with_attributes,
                1,
                &raw mut failed,
                pointer(stream.0),
            )
        };
        Some(self.check("cuMemcpyBatchAsync", code))
    }

    unsafe fn copy_out(
        &self,
        target: *mut c_void,
        source: u64,
        len_bytes: usize,
        stream: StreamHandle,
    ) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.table.cuMemcpyDtoHAsync_v2)(target, source, len_bytes, pointer(stream.0)) };
        self.check("cuMemcpyDtoHAsync", code)
    }

    unsafe fn copy_rows_in(&self, rows: Rows, stream: StreamHandle) -> Result<(), CallError> {
        let copy = sys::Memcpy2d {
            src_x_bytes: 0,
            src_y: 0,
            src_memory_type: sys::MEMORYTYPE_HOST,
            src_host: rows.source,
            src_device: 0,
            src_array: ptr::null_mut(),
            src_pitch: rows.source_stride_bytes,
            dst_x_bytes: 0,
            dst_y: 0,
            dst_memory_type: sys::MEMORYTYPE_DEVICE,
            dst_host: ptr::null_mut(),
            dst_device: rows.target,
            dst_array: ptr::null_mut(),
            dst_pitch: rows.target_stride_bytes,
            width_bytes: rows.row_len_bytes,
            height: rows.row_count,
        };
        // SAFETY: the caller's promise; the struct is read before the call returns.
        self.check("cuMemcpy2DAsync", unsafe {
            (self.table.cuMemcpy2DAsync_v2)(&raw const copy, pointer(stream.0))
        })
    }

    fn can_access_peer(&self, ordinal: u32, peer: u32) -> Option<Result<bool, CallError>> {
        let (ask, _, _) = (
            self.table.cuDeviceCanAccessPeer?,
            self.table.cuCtxEnablePeerAccess?,
            self.table.cuMemcpyPeerAsync?,
        );
        let asked = self.device(ordinal).and_then(|device| Ok((device, self.device(peer)?)));
        Some(asked.and_then(|(device, peer)| {
            let mut can = 0;
            // SAFETY: writes one integer.
            let code = unsafe { ask(&raw mut can, device, peer) };
            self.check("cuDeviceCanAccessPeer", code).map(|()| can != 0)
        }))
    }

    fn enable_peer(&self, ordinal: u32, peer: Peer) -> Result<(), CallError> {
        let enable = self.table.cuCtxEnablePeerAccess.expect("asked for by can_access_peer");
        // SAFETY: the context is retained; the flags must be 0.
        match unsafe { enable(pointer(peer.context.0), 0) } {
            sys::PEER_ACCESS_ALREADY_ENABLED => {}
            code => self.check("cuCtxEnablePeerAccess", code)?,
        }
        // What comes from a pool is reached by the devices that the pool names, whatever their contexts were let to.
        let (Some(pool_of), Some(open)) = (self.table.cuDeviceGetMemPool, self.table.cuMemPoolSetAccess)
        else {
            return Ok(());
        };
        let (device, mut pool) = (self.device(peer.ordinal)?, ptr::null_mut());
        // SAFETY: writes one pointer.
        match unsafe { pool_of(&raw mut pool, device) } {
            sys::NOT_SUPPORTED => return Ok(()),
            code => self.check("cuDeviceGetMemPool", code)?,
        }
        let access = sys::MemAccess {
            location_type: sys::LOCATION_TYPE_DEVICE,
            location_id: self.device(ordinal)?,
            flags: sys::ACCESS_READ_WRITE,
        };
        // SAFETY: the device's own pool; the one description is read before the call returns.
        self.check("cuMemPoolSetAccess", unsafe { open(pool, &raw const access, 1) })
    }

    unsafe fn copy_peer(&self, copy: PeerCopy, stream: StreamHandle) -> Result<(), CallError> {
        let queue = self.table.cuMemcpyPeerAsync.expect("asked for by can_access_peer");
        let (target, source) = (pointer(copy.target_context.0), pointer(copy.source_context.0));
        // SAFETY: the caller's promise.
        let code =
            unsafe { queue(copy.target, target, copy.source, source, copy.len_bytes, pointer(stream.0)) };
        self.check("cuMemcpyPeerAsync", code)
    }

    fn kernels(&self, _architecture: &str, module: &str) -> Option<&'static [u8]> {
        // The driver compiles PTX for whatever device it has.
        kernels::PTX.iter().find(|(name, _)| *name == module).map(|(_, text)| text.as_bytes())
    }

    fn compile(&self, _architecture: &str, module: &str) -> Result<Compiled, CompileError> {
        Err(CompileError::NoCompiler(format!(
            "the driver compiles PTX itself, and {module} is none of this build's"
        )))
    }

    fn architectures(&self) -> String {
        kernels::ARCHITECTURES.to_owned()
    }

    unsafe fn module_load(&self, image: &'static [u8]) -> Result<ModuleHandle, CallError> {
        let mut module: sys::Module = ptr::null_mut();
        // SAFETY: writes one pointer; the image is PTX, terminated.
        let code = unsafe { (self.table.cuModuleLoadData)(&raw mut module, image.as_ptr().cast()) };
        self.check("cuModuleLoadData", code)?;
        Ok(ModuleHandle(module.expose_provenance()))
    }

    unsafe fn module_unload(&self, module: ModuleHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("cuModuleUnload", unsafe { (self.table.cuModuleUnload)(pointer(module.0)) })
    }

    unsafe fn function(&self, module: ModuleHandle, name: &CStr) -> Result<FunctionHandle, CallError> {
        let mut function: sys::Function = ptr::null_mut();
        // SAFETY: writes one pointer; the module is the caller's promise.
        let code =
            unsafe { (self.table.cuModuleGetFunction)(&raw mut function, pointer(module.0), name.as_ptr()) };
        self.check("cuModuleGetFunction", code)?;
        Ok(FunctionHandle(function.expose_provenance()))
    }

    unsafe fn launch(
        &self,
        function: FunctionHandle,
        shape: LaunchShape,
        params: &[u8],
        stream: StreamHandle,
    ) -> Result<(), CallError> {
        // As one buffer, because then the driver knows its length and refuses a wrong one.
        let mut len = 0;
        let mut list = sys::LAUNCH_KEYS.list(params, &mut len);
        // SAFETY: the list and the buffer are read before the call returns; what the parameters mean is the caller's promise.
        let code = unsafe {
            (self.table.cuLaunchKernel)(
                pointer(function.0),
                shape.block_count,
                1,
                1,
                shape.block_threads,
                1,
                1,
                shape.shared_bytes,
                pointer(stream.0),
                ptr::null_mut(),
                list.as_mut_ptr(),
            )
        };
        self.check("cuLaunchKernel", code)
    }
}
