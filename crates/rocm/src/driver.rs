//! HIP's calls under the names that all vendors share.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_int, c_void};
use std::path::PathBuf;
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

use tensorhaul_device::gpu::{
    BatchPiece, CallError, CaptureMode, CompileError, Compiled, Context, DeviceFacts, Driver, EventHandle,
    FunctionHandle, LaunchShape, Meaning, ModuleHandle, NoDriver, Peer, PeerCopy, Rows, StreamHandle,
    call::pointer, table,
};
use tensorhaul_plan::DeviceId;

use crate::describe::why_no_device;
use crate::kernels;
use crate::rtc::Compiler;
use crate::sys::{self, Table};

/// AMD's HIP runtime, loaded and initialized.
pub struct Rocm {
    pub(crate) table: Table,
    version: c_int,
    /// Found when it is first needed.
    compiler: OnceLock<Result<Compiler, String>>,
    /// What was compiled, by architecture and module.
    compiled: Mutex<BTreeMap<(String, String), &'static [u8]>>,
}

impl Rocm {
    /// Takes the runtime that the process holds, or loads the first of these libraries, and initializes it; the error is a
    /// sentence with the likely cause.
    pub(crate) fn load(candidates: &[PathBuf]) -> Result<Rocm, NoDriver> {
        let table = match table::held("libamdhip64.so") {
            Some((library, path)) => Table::look_up(library, &path),
            None => Table::load(candidates),
        };
        let table = table.map_err(|error| {
            error.no_driver("AMD's ROCm is not installed, or not visible in this container (--device=/dev/kfd --device=/dev/dri)")
        })?;
        let mut rocm = Rocm { table, version: 0, compiler: OnceLock::new(), compiled: Mutex::default() };
        let path = rocm.table.path.display().to_string();
        // SAFETY: the only argument must be 0.
        rocm.check("hipInit", unsafe { (rocm.table.hipInit)(0) }).map_err(|error| match error.code {
            sys::NO_DEVICE | sys::INVALID_DEVICE => {
                NoDriver::NoDevice(format!("{path}: {error}: {}", why_no_device()))
            }
            _ => NoDriver::Fails(format!(
                "{path}: {error}: the runtime and the amdgpu kernel module may not fit together"
            )),
        })?;
        // SAFETY: writes one integer. A failure leaves 0, which is printed as unknown.
        let _ = unsafe { (rocm.table.hipRuntimeGetVersion)(&raw mut rocm.version) };
        Ok(rocm)
    }

    pub(crate) fn check(&self, call: &'static str, code: c_int) -> Result<(), CallError> {
        if code == sys::SUCCESS {
            return Ok(());
        }
        self.forget_last_error();
        let meaning = match code {
            sys::OUT_OF_MEMORY => Meaning::OutOfMemory,
            sys::NO_BINARY_FOR_GPU => Meaning::WrongArchitecture,
            code if sys::LOST.contains(&code) => Meaning::Lost,
            _ => Meaning::Other,
        };
        Err(CallError { call, code, name: self.error_name(code), meaning })
    }

    /// Frameworks ask for the last error behind every launch, and would take ours for their own.
    fn forget_last_error(&self) {
        // SAFETY: takes nothing, and changes what this thread will be told.
        let _ = unsafe { (self.table.hipGetLastError)() };
    }

    fn error_name(&self, code: c_int) -> String {
        // SAFETY: takes any number.
        let name = unsafe { (self.table.hipGetErrorName)(code) };
        if name.is_null() {
            return String::new();
        }
        // SAFETY: the runtime's static, terminated string.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }
}

// SAFETY: each method calls the function of HIP's reference for its name, with these arguments.
unsafe impl Driver for Rocm {
    fn device_id(&self, ordinal: u32) -> DeviceId {
        DeviceId::Rocm(ordinal)
    }

    fn library(&self) -> String {
        self.table.path.display().to_string()
    }

    fn version(&self) -> String {
        format!("HIP {}.{}", self.version / 10_000_000, self.version / 100_000 % 100)
    }

    fn device_count(&self) -> Result<u32, CallError> {
        let mut count = 0;
        // SAFETY: writes one integer.
        match unsafe { (self.table.hipGetDeviceCount)(&raw mut count) } {
            sys::NO_DEVICE => {
                self.forget_last_error();
                Ok(0)
            }
            code => self.check("hipGetDeviceCount", code).map(|()| count.max(0) as u32),
        }
    }

    fn describe(&self, ordinal: u32) -> Result<DeviceFacts, CallError> {
        self.facts(ordinal)
    }

    fn open(&self, ordinal: u32) -> Result<Context, CallError> {
        // The runtime makes a device ready by itself, for the whole process, and never lets go of it.
        Ok(Context(ordinal as usize + 1))
    }

    fn close(&self, _ordinal: u32, _context: Context) {}

    fn current(&self) -> Result<Context, CallError> {
        let mut device: sys::Device = 0;
        // SAFETY: writes one integer.
        self.check("hipGetDevice", unsafe { (self.table.hipGetDevice)(&raw mut device) })?;
        Ok(Context(device.max(0) as usize + 1))
    }

    fn make_current(&self, context: Context) -> Result<(), CallError> {
        // SAFETY: takes any number.
        self.check("hipSetDevice", unsafe { (self.table.hipSetDevice)(device_of(context)) })
    }

    fn exchange_capture_mode(&self, mode: CaptureMode) -> Option<Result<CaptureMode, CallError>> {
        let exchange = self.table.hipThreadExchangeStreamCaptureMode?;
        let CaptureMode(mut mode) = mode;
        // SAFETY: reads and writes one integer.
        let code = unsafe { exchange(&raw mut mode) };
        Some(self.check("hipThreadExchangeStreamCaptureMode", code).map(|()| CaptureMode(mode)))
    }

    fn memory(&self) -> Result<(u64, u64), CallError> {
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: writes two integers.
        self.check("hipMemGetInfo", unsafe { (self.table.hipMemGetInfo)(&raw mut free, &raw mut total) })?;
        Ok((free as u64, total as u64))
    }

    fn stream_create(&self) -> Result<StreamHandle, CallError> {
        let mut stream: sys::Stream = ptr::null_mut();
        // SAFETY: writes one pointer.
        let code =
            unsafe { (self.table.hipStreamCreateWithFlags)(&raw mut stream, sys::STREAM_NON_BLOCKING) };
        self.check("hipStreamCreateWithFlags", code)?;
        Ok(StreamHandle(stream.expose_provenance()))
    }

    unsafe fn stream_destroy(&self, stream: StreamHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("hipStreamDestroy", unsafe { (self.table.hipStreamDestroy)(pointer(stream.0)) })
    }

    unsafe fn stream_wait(&self, stream: StreamHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("hipStreamSynchronize", unsafe { (self.table.hipStreamSynchronize)(pointer(stream.0)) })
    }

    unsafe fn stream_wait_event(&self, stream: StreamHandle, event: EventHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise; the flags must be 0.
        let code = unsafe { (self.table.hipStreamWaitEvent)(pointer(stream.0), pointer(event.0), 0) };
        self.check("hipStreamWaitEvent", code)
    }

    fn event_create(&self) -> Result<EventHandle, CallError> {
        let mut event: sys::Event = ptr::null_mut();
        // SAFETY: writes one pointer.
        let code = unsafe { (self.table.hipEventCreateWithFlags)(&raw mut event, sys::EVENT_DISABLE_TIMING) };
        self.check("hipEventCreateWithFlags", code)?;
        Ok(EventHandle(event.expose_provenance()))
    }

    unsafe fn event_destroy(&self, event: EventHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("hipEventDestroy", unsafe { (self.table.hipEventDestroy)(pointer(event.0)) })
    }

    unsafe fn event_record(&self, event: EventHandle, stream: StreamHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("hipEventRecord", unsafe {
            (self.table.hipEventRecord)(pointer(event.0), pointer(stream.0))
        })
    }

    unsafe fn event_is_complete(&self, event: EventHandle) -> Result<bool, CallError> {
        // SAFETY: the caller's promise.
        match unsafe { (self.table.hipEventQuery)(pointer(event.0)) } {
            sys::NOT_READY => {
                self.forget_last_error();
                Ok(false)
            }
            code => self.check("hipEventQuery", code).map(|()| true),
        }
    }

    unsafe fn event_wait(&self, event: EventHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("hipEventSynchronize", unsafe { (self.table.hipEventSynchronize)(pointer(event.0)) })
    }

    unsafe fn allocate_ordered(
        &self,
        len_bytes: u64,
        stream: StreamHandle,
    ) -> Option<Result<u64, CallError>> {
        let (Some(allocate), Some(_)) = (self.table.hipMallocAsync, self.table.hipFreeAsync) else {
            return None;
        };
        let mut address = 0;
        // SAFETY: writes one address; the stream is the caller's promise.
        let code = unsafe { allocate(&raw mut address, len_bytes as usize, pointer(stream.0)) };
        match code {
            // The runtime or the device has no memory pools: `hipMalloc` serves.
            sys::NOT_SUPPORTED => {
                self.forget_last_error();
                None
            }
            code => Some(self.check("hipMallocAsync", code).map(|()| address)),
        }
    }

    unsafe fn free_ordered(&self, address: u64, stream: StreamHandle) -> Result<(), CallError> {
        let free = self.table.hipFreeAsync.expect("memory allocated in order is freed by the same runtime");
        // SAFETY: the caller's promise.
        self.check("hipFreeAsync", unsafe { free(address, pointer(stream.0)) })
    }

    fn allocate(&self, len_bytes: u64) -> Result<u64, CallError> {
        let mut address = 0;
        // SAFETY: writes one address.
        self.check("hipMalloc", unsafe { (self.table.hipMalloc)(&raw mut address, len_bytes as usize) })?;
        Ok(address)
    }

    unsafe fn free(&self, address: u64) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("hipFree", unsafe { (self.table.hipFree)(address) })
    }

    fn host_allocate(&self, len_bytes: usize) -> Result<*mut c_void, CallError> {
        let mut start = ptr::null_mut();
        // SAFETY: writes one pointer.
        let code = unsafe { (self.table.hipHostMalloc)(&raw mut start, len_bytes, sys::HOST_MALLOC_FLAGS) };
        self.check("hipHostMalloc", code)?;
        Ok(start)
    }

    unsafe fn host_free(&self, start: *mut c_void) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("hipHostFree", unsafe { (self.table.hipHostFree)(start) })
    }

    unsafe fn host_register(&self, start: *mut c_void, len_bytes: usize) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.table.hipHostRegister)(start, len_bytes, sys::HOST_REGISTER_FLAGS) };
        self.check("hipHostRegister", code)
    }

    unsafe fn host_unregister(&self, start: *mut c_void) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("hipHostUnregister", unsafe { (self.table.hipHostUnregister)(start) })
    }

    unsafe fn host_address(&self, start: *const c_void) -> Result<u64, CallError> {
        start.expose_provenance();
        let mut address = 0;
        // Registered memory need not be where the host has it.
        // SAFETY: writes one address; the memory is the caller's promise; the flags must be 0.
        let code = unsafe { (self.table.hipHostGetDevicePointer)(&raw mut address, start.cast_mut(), 0) };
        self.check("hipHostGetDevicePointer", code)?;
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
        let code = unsafe { (self.table.hipMemcpyHtoDAsync)(target, source, len_bytes, pointer(stream.0)) };
        self.check("hipMemcpyHtoDAsync", code)
    }

    unsafe fn copy_in_batch(
        &self,
        pieces: &[BatchPiece],
        stream: StreamHandle,
    ) -> Option<Result<(), CallError>> {
        let copy = self.table.hipMemcpyBatchAsync?;
        let mut targets: Vec<u64> = pieces.iter().map(|piece| piece.target).collect();
        let mut sources: Vec<_> = pieces.iter().map(|piece| piece.source).collect();
        let mut lens: Vec<usize> = pieces.iter().map(|piece| piece.len_bytes).collect();
        let mut failed = usize::MAX;
        // The first version with this call knows no attributes. Without them copies are in the order of the stream.
        // SAFETY: the ranges are the caller's promise; the arrays are as long as the count and read before the call returns.
        let code = unsafe {
            copy(
                targets.as_mut_ptr(),
                sources.as_mut_ptr(),
                lens.as_mut_ptr(),
                pieces.len(),
                ptr::null_mut(),
                ptr::null_mut(),
                0,
                &raw mut failed,
                pointer(stream.0),
            )
        };
        Some(self.check("hipMemcpyBatchAsync", code))
    }

    unsafe fn copy_out(
        &self,
        target: *mut c_void,
        source: u64,
        len_bytes: usize,
        stream: StreamHandle,
    ) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.table.hipMemcpyDtoHAsync)(target, source, len_bytes, pointer(stream.0)) };
        self.check("hipMemcpyDtoHAsync", code)
    }

    unsafe fn copy_rows_in(&self, rows: Rows, stream: StreamHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        let code = unsafe {
            (self.table.hipMemcpy2DAsync)(
                rows.target,
                rows.target_stride_bytes,
                rows.source,
                rows.source_stride_bytes,
                rows.row_len_bytes,
                rows.row_count,
                sys::MEMCPY_HOST_TO_DEVICE,
                pointer(stream.0),
            )
        };
        self.check("hipMemcpy2DAsync", code)
    }

    fn can_access_peer(&self, ordinal: u32, peer: u32) -> Option<Result<bool, CallError>> {
        let (ask, _, _) = (
            self.table.hipDeviceCanAccessPeer?,
            self.table.hipDeviceEnablePeerAccess?,
            self.table.hipMemcpyPeerAsync?,
        );
        let mut can = 0;
        // SAFETY: writes one integer.
        let code = unsafe { ask(&raw mut can, ordinal as sys::Device, peer as sys::Device) };
        Some(self.check("hipDeviceCanAccessPeer", code).map(|()| can != 0))
    }

    fn enable_peer(&self, ordinal: u32, peer: Peer) -> Result<(), CallError> {
        let enable = self.table.hipDeviceEnablePeerAccess.expect("asked for by can_access_peer");
        // SAFETY: takes any number; the flags must be 0.
        match unsafe { enable(peer.ordinal as sys::Device, 0) } {
            sys::PEER_ACCESS_ALREADY_ENABLED => self.forget_last_error(),
            code => self.check("hipDeviceEnablePeerAccess", code)?,
        }
        // What comes from a pool is reached by the devices that the pool names, whatever else they were let to.
        let (Some(pool_of), Some(open)) = (self.table.hipDeviceGetMemPool, self.table.hipMemPoolSetAccess)
        else {
            return Ok(());
        };
        let mut pool = ptr::null_mut();
        // SAFETY: writes one pointer.
        match unsafe { pool_of(&raw mut pool, peer.ordinal as sys::Device) } {
            sys::NOT_SUPPORTED => {
                self.forget_last_error();
                return Ok(());
            }
            code => self.check("hipDeviceGetMemPool", code)?,
        }
        let access = sys::MemAccess {
            location_type: sys::LOCATION_TYPE_DEVICE,
            location_id: ordinal as c_int,
            flags: sys::ACCESS_READ_WRITE,
        };
        // SAFETY: the device's own pool; the one description is read before the call returns.
        self.check("hipMemPoolSetAccess", unsafe { open(pool, &raw const access, 1) })
    }

    unsafe fn copy_peer(&self, copy: PeerCopy, stream: StreamHandle) -> Result<(), CallError> {
        let queue = self.table.hipMemcpyPeerAsync.expect("asked for by can_access_peer");
        let [target, source] = [copy.target_context, copy.source_context].map(device_of);
        // SAFETY: the caller's promise.
        let code =
            unsafe { queue(copy.target, target, copy.source, source, copy.len_bytes, pointer(stream.0)) };
        self.check("hipMemcpyPeerAsync", code)
    }

    fn kernels(&self, architecture: &str, module: &str) -> Option<&'static [u8]> {
        kernels::find(architecture, module)
    }

    fn compile(&self, architecture: &str, module: &str) -> Result<Compiled, CompileError> {
        // One at a time: whoever comes second finds it compiled.
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let compiler = self.compiler.get_or_init(|| Compiler::find(&self.table.path)).as_ref();
        let compiler = compiler.map_err(|why| CompileError::NoCompiler(why.clone()))?;
        let name = (architecture.to_owned(), module.to_owned());
        let image = match compiled.get(&name) {
            Some(image) => image,
            None => {
                let (words, len) = compiler.compile(architecture, module)?;
                // Kept for the process, because the runtime may read a module again when it is loaded on another device.
                let words: &'static [u64] = words.leak();
                // SAFETY: never freed or written again, and at least `len` bytes long.
                let image = unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), len) };
                compiled.insert(name, image);
                image
            }
        };
        Ok(Compiled { image, compiler: compiler.name() })
    }

    fn architectures(&self) -> String {
        kernels::architectures()
    }

    unsafe fn module_load(&self, image: &'static [u8]) -> Result<ModuleHandle, CallError> {
        let mut module: sys::Module = ptr::null_mut();
        // SAFETY: writes one pointer; the image is a code object, whose headers tell its length.
        let code = unsafe { (self.table.hipModuleLoadData)(&raw mut module, image.as_ptr().cast()) };
        self.check("hipModuleLoadData", code)?;
        Ok(ModuleHandle(module.expose_provenance()))
    }

    unsafe fn module_unload(&self, module: ModuleHandle) -> Result<(), CallError> {
        // SAFETY: the caller's promise.
        self.check("hipModuleUnload", unsafe { (self.table.hipModuleUnload)(pointer(module.0)) })
    }

    unsafe fn function(&self, module: ModuleHandle, name: &CStr) -> Result<FunctionHandle, CallError> {
        let mut function: sys::Function = ptr::null_mut();
        // SAFETY: writes one pointer; the module is the caller's promise.
        let code =
            unsafe { (self.table.hipModuleGetFunction)(&raw mut function, pointer(module.0), name.as_ptr()) };
        self.check("hipModuleGetFunction", code)?;
        Ok(FunctionHandle(function.expose_provenance()))
    }

    unsafe fn launch(
        &self,
        function: FunctionHandle,
        shape: LaunchShape,
        params: &[u8],
        stream: StreamHandle,
    ) -> Result<(), CallError> {
        // As one buffer, because that is what a kernel takes, and `params` is.
        let mut len = 0;
        let mut list = sys::LAUNCH_KEYS.list(params, &mut len);
        // SAFETY: the list and the buffer are read before the call returns; what the parameters mean is the caller's promise.
        let code = unsafe {
            (self.table.hipModuleLaunchKernel)(
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
        self.check("hipModuleLaunchKernel", code)
    }
}

/// Contexts are devices' ordinals, from 1.
fn device_of(context: Context) -> sys::Device {
    context.0.saturating_sub(1) as sys::Device
}
