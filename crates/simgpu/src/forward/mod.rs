//! HIP's calls carried out by a CUDA driver, a real one: the ROCm backend's order of calls then meets hardware that is
//! really asynchronous, on a machine that has no AMD GPU.
//!
//! What the two have in common goes through as it is: streams, events, copies, flags, most status codes. What differs:
//! - HIP has a current device for each thread and no contexts. Each device has its primary context here, retained when it is
//!   first needed and never let go, and every call first makes that of its thread's device current. So the thread's
//!   own current CUDA context is lost; frameworks that use CUDA beside have to make theirs current again.
//! - A module is given as an AMD code object. Its kernels' names tell which module of `kernels/` it is; the driver gets the PTX
//!   of the same. Grids are counted in blocks in both, and no kernel asks how many threads run in step.
//! - The architecture is the configuration's: `gfx=` names one that the backend has code objects for.
//!
//! Calls are counted and made to fail as without it, under HIP's names. The machine's memory is not looked at: the driver is.

#![allow(non_snake_case, reason = "the runtime's own names")]

mod codes;
mod table;

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;

use crate::calls::{LaunchCall, MemAccess, array};
use crate::code_object::CodeObject;
use crate::core::{self, INVALID_DEVICE, INVALID_VALUE, NO_DEVICE, NOT_SUPPORTED};
use crate::cuda::Memcpy2d;
use crate::kernels::PTX;
use crate::stream::HostFunction;
use crate::{hip, ptx};
use codes::check;
use table::{Address, Handle, Table};
use tensorhaul_device::gpu::table::TableError;

/// The driver that calls go to, loaded at the first of them.
pub(crate) struct Forwarding {
    library: PathBuf,
    driver: OnceLock<Result<Driver, c_int>>,
}

impl Forwarding {
    pub(crate) fn to(library: &str) -> Forwarding {
        Forwarding { library: library.into(), driver: OnceLock::new() }
    }

    /// Returns the driver, or the status that every call has without it.
    pub(crate) fn driver(&self) -> Result<&Driver, c_int> {
        self.driver.get_or_init(|| Driver::load(&self.library)).as_ref().map_err(|code| *code)
    }
}

/// A CUDA driver that is loaded and initialized.
pub(crate) struct Driver {
    table: Table,
    /// The primary context of each device, once it was needed.
    contexts: Vec<OnceLock<Result<usize, c_int>>>,
}

thread_local! {
    /// The thread's current device.
    static DEVICE: Cell<c_int> = const { Cell::new(0) };
}

/// What a forwarded call answers: nothing, or HIP's status.
type Answer = Result<(), c_int>;

impl Driver {
    /// Loads and initializes a driver. HIP has codes for what may be missing and no words, so those go to standard error.
    fn load(library: &Path) -> Result<Driver, c_int> {
        let table = Table::load(&[library.to_owned()]).map_err(|error| {
            eprintln!("simgpu: forward={}: {error}", library.display());
            match error {
                TableError::MissingSymbol { .. } => SHARED_OBJECT_SYMBOL_NOT_FOUND,
                _ => SHARED_OBJECT_INIT_FAILED,
            }
        })?;
        let told = |call: &str, code: c_int| {
            check(code)
                .inspect_err(|_| eprintln!("simgpu: {}: {call} failed with {code}", table.path.display()))
        };
        // SAFETY: the only argument must be 0.
        told("cuInit", unsafe { (table.cuInit)(0) })?;
        let mut count = 0;
        // SAFETY: writes one integer.
        told("cuDeviceGetCount", unsafe { (table.cuDeviceGetCount)(&raw mut count) })?;
        Ok(Driver { table, contexts: (0..count).map(|_| OnceLock::new()).collect() })
    }

    fn device(&self, ordinal: c_int) -> Result<c_int, c_int> {
        let mut device = 0;
        // SAFETY: writes one integer.
        check(unsafe { (self.table.cuDeviceGet)(&raw mut device, ordinal) })?;
        Ok(device)
    }

    /// Returns a device's primary context.
    fn context(&self, ordinal: c_int) -> Result<Handle, c_int> {
        let made = usize::try_from(ordinal).ok().and_then(|index| self.contexts.get(index));
        let retained = made.ok_or(INVALID_DEVICE)?.get_or_init(|| {
            let (device, mut context) = (self.device(ordinal)?, ptr::null_mut());
            // SAFETY: writes one pointer.
            check(unsafe { (self.table.cuDevicePrimaryCtxRetain)(&raw mut context, device) })?;
            Ok(context.expose_provenance())
        });
        retained.map(ptr::with_exposed_provenance_mut)
    }

    /// Makes the context of the thread's device current.
    fn enter(&self) -> Answer {
        let context = self.context(DEVICE.get())?;
        // SAFETY: retained, and never let go.
        check(unsafe { (self.table.cuCtxSetCurrent)(context) })
    }
}

/// Forwards calls that both vendors have, in the context of the thread's device. Those in brackets a driver may lack.
macro_rules! forwards {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) => $to:tt($($given:expr),*);)*) => {
        impl Driver {
            $(
                pub(crate) unsafe fn $name(&self, $($argument: $type),*) -> Answer {
                    self.enter()?;
                    let call = forwards!(@of self $to);
                    // SAFETY: what the caller promises of HIP's call, the driver asks of its own.
                    check(unsafe { call($($given),*) })
                }
            )*
        }
    };
    (@of $self:ident [$to:ident]) => { $self.table.$to.ok_or(NOT_SUPPORTED)? };
    (@of $self:ident $to:ident) => { $self.table.$to };
}

forwards! {
    fn hipMemGetInfo(free: *mut usize, total: *mut usize) => cuMemGetInfo_v2(free, total);
    fn hipThreadExchangeStreamCaptureMode(mode: *mut c_int) => [cuThreadExchangeStreamCaptureMode](mode);

    fn hipStreamCreateWithFlags(stream: *mut Handle, flags: c_uint) => cuStreamCreate(stream, flags);
    fn hipStreamDestroy(stream: Handle) => cuStreamDestroy_v2(stream);
    fn hipStreamSynchronize(stream: Handle) => cuStreamSynchronize(stream);
    fn hipStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint) => cuStreamWaitEvent(stream, event, flags);
    fn hipEventCreateWithFlags(event: *mut Handle, flags: c_uint) => cuEventCreate(event, flags);
    fn hipEventDestroy(event: Handle) => cuEventDestroy_v2(event);
    fn hipEventRecord(event: Handle, stream: Handle) => cuEventRecord(event, stream);
    fn hipEventQuery(event: Handle) => cuEventQuery(event);
    fn hipEventSynchronize(event: Handle) => cuEventSynchronize(event);
    fn hipLaunchHostFunc(stream: Handle, function: HostFunction, data: *mut c_void) => cuLaunchHostFunc(stream, function, data);

    fn hipMalloc(address: *mut Address, len: usize) => cuMemAlloc_v2(address, len);
    fn hipFree(address: Address) => cuMemFree_v2(address);
    fn hipMallocAsync(address: *mut Address, len: usize, stream: Handle) => [cuMemAllocAsync](address, len, stream);
    fn hipFreeAsync(address: Address, stream: Handle) => [cuMemFreeAsync](address, stream);
    fn hipHostMalloc(start: *mut *mut c_void, len: usize, flags: c_uint) => cuMemHostAlloc(start, len, flags);
    fn hipHostFree(start: *mut c_void) => cuMemFreeHost(start);
    fn hipHostRegister(start: *mut c_void, len: usize, flags: c_uint) => cuMemHostRegister_v2(start, len, flags);
    fn hipHostUnregister(start: *mut c_void) => cuMemHostUnregister(start);
    fn hipHostGetDevicePointer(address: *mut Address, start: *mut c_void, flags: c_uint)
        => cuMemHostGetDevicePointer_v2(address, start, flags);

    fn hipMemcpyHtoDAsync(target: Address, source: *const c_void, len: usize, stream: Handle)
        => cuMemcpyHtoDAsync_v2(target, source, len, stream);
    fn hipMemcpyDtoHAsync(target: *mut c_void, source: Address, len: usize, stream: Handle)
        => cuMemcpyDtoHAsync_v2(target, source, len, stream);
    fn hipMemcpyDtoDAsync(target: Address, source: Address, len: usize, stream: Handle)
        => cuMemcpyDtoDAsync_v2(target, source, len, stream);

    fn hipModuleUnload(module: Handle) => cuModuleUnload(module);
    fn hipModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char)
        => cuModuleGetFunction(function, module, name);
}

/// Calls that are not one call of CUDA's.
impl Driver {
    pub(crate) unsafe fn hipInit(&self, _flags: c_uint) -> Answer {
        if self.contexts.is_empty() { Err(INVALID_DEVICE) } else { Ok(()) }
    }

    pub(crate) unsafe fn hipRuntimeGetVersion(&self, version: *mut c_int) -> Answer {
        // SAFETY: the caller's promise.
        unsafe { version.write(hip::VERSION) };
        Ok(())
    }

    pub(crate) unsafe fn hipGetDeviceCount(&self, count: *mut c_int) -> Answer {
        // SAFETY: the caller's promise.
        unsafe { count.write(self.contexts.len() as c_int) };
        if self.contexts.is_empty() { Err(NO_DEVICE) } else { Ok(()) }
    }

    pub(crate) unsafe fn hipGetDevice(&self, device: *mut c_int) -> Answer {
        // SAFETY: the caller's promise.
        unsafe { device.write(DEVICE.get()) };
        Ok(())
    }

    pub(crate) unsafe fn hipSetDevice(&self, device: c_int) -> Answer {
        if !(0..self.contexts.len() as c_int).contains(&device) {
            return Err(INVALID_DEVICE);
        }
        DEVICE.set(device);
        Ok(())
    }

    pub(crate) unsafe fn hipDeviceGetName(&self, name: *mut c_char, len: c_int, device: c_int) -> Answer {
        let device = self.device(device)?;
        // SAFETY: the caller's promise.
        check(unsafe { (self.table.cuDeviceGetName)(name, len, device) })
    }

    pub(crate) unsafe fn hipDeviceGetPCIBusId(&self, name: *mut c_char, len: c_int, device: c_int) -> Answer {
        let device = self.device(device)?;
        // SAFETY: the caller's promise.
        check(unsafe { (self.table.cuDeviceGetPCIBusId)(name, len, device) })
    }

    pub(crate) unsafe fn hipDeviceTotalMem(&self, bytes: *mut usize, device: c_int) -> Answer {
        let device = self.device(device)?;
        // SAFETY: the caller's promise.
        check(unsafe { (self.table.cuDeviceTotalMem_v2)(bytes, device) })
    }

    pub(crate) unsafe fn hipDeviceGetAttribute(
        &self,
        value: *mut c_int,
        attribute: c_int,
        device: c_int,
    ) -> Answer {
        let known = ATTRIBUTES.iter().find(|(hip, _)| *hip == attribute);
        let (_, attribute) = known.ok_or(INVALID_VALUE)?;
        let device = self.device(device)?;
        // SAFETY: the caller's promise.
        check(unsafe { (self.table.cuDeviceGetAttribute)(value, *attribute, device) })
    }

    pub(crate) unsafe fn hipGetDeviceProperties(&self, properties: *mut u8, device: c_int) -> Answer {
        self.device(device)?;
        hip::describe(properties, hip::PROPERTIES, &architecture());
        Ok(())
    }

    pub(crate) unsafe fn hipGetDevicePropertiesR0600(&self, properties: *mut u8, device: c_int) -> Answer {
        self.device(device)?;
        hip::describe(properties, hip::PROPERTIES_R0600, &architecture());
        Ok(())
    }

    pub(crate) unsafe fn hipDeviceCanAccessPeer(
        &self,
        can: *mut c_int,
        device: c_int,
        peer: c_int,
    ) -> Answer {
        let (device, peer) = (self.device(device)?, self.device(peer)?);
        // SAFETY: the caller's promise.
        check(unsafe { (self.table.cuDeviceCanAccessPeer)(can, device, peer) })
    }

    pub(crate) unsafe fn hipDeviceEnablePeerAccess(&self, peer: c_int, flags: c_uint) -> Answer {
        let context = self.peer(peer)?;
        // SAFETY: the context is retained.
        check(unsafe { (self.table.cuCtxEnablePeerAccess)(context, flags) })
    }

    pub(crate) unsafe fn hipDeviceDisablePeerAccess(&self, peer: c_int) -> Answer {
        let context = self.peer(peer)?;
        // SAFETY: the context is retained.
        check(unsafe { (self.table.cuCtxDisablePeerAccess)(context) })
    }

    /// Returns the context of a device that is not the thread's, whose context is then current.
    fn peer(&self, peer: c_int) -> Result<Handle, c_int> {
        let context = self.context(peer)?;
        self.enter()?;
        if peer == DEVICE.get() { Err(INVALID_DEVICE) } else { Ok(context) }
    }

    pub(crate) unsafe fn hipDeviceGetMemPool(&self, pool: *mut Handle, device: c_int) -> Answer {
        let (call, device) = (self.table.cuDeviceGetMemPool.ok_or(NOT_SUPPORTED)?, self.device(device)?);
        // SAFETY: the caller's promise.
        check(unsafe { call(pool, device) })
    }

    pub(crate) unsafe fn hipMemPoolSetAccess(
        &self,
        pool: Handle,
        access: *const MemAccess,
        count: usize,
    ) -> Answer {
        let call = self.table.cuMemPoolSetAccess.ok_or(NOT_SUPPORTED)?;
        // SAFETY: the caller's promise; the struct and its numbers are the same.
        check(unsafe { call(pool, access, count) })
    }

    #[allow(clippy::too_many_arguments, reason = "HIP's own")]
    pub(crate) unsafe fn hipMemcpyBatchAsync(
        &self,
        targets: *mut Address,
        sources: *mut Address,
        lens: *mut usize,
        count: usize,
        _attributes: *mut c_void,
        _first_with_attributes: *mut usize,
        _attribute_count: usize,
        failed: *mut usize,
        stream: Handle,
    ) -> Answer {
        let call = self.table.cuMemcpyBatchAsync.ok_or(NOT_SUPPORTED)?;
        self.enter()?;
        // CUDA wants attributes: sources are read in the order of the stream, with no hints and no flags.
        let (mut attributes, mut first) = ([ACCESS_ORDER_STREAM, 0, 0, 0, 0, 0], 0);
        let set = attributes.as_mut_ptr();
        // SAFETY: the caller's promise of the arrays; one set of attributes, for all pieces from number 0 on.
        check(unsafe { call(targets, sources, lens, count, set, &raw mut first, 1, failed, stream) })
    }

    #[allow(clippy::too_many_arguments, reason = "HIP's own")]
    pub(crate) unsafe fn hipMemcpy2DAsync(
        &self,
        target: *mut c_void,
        target_stride: usize,
        source: *const c_void,
        source_stride: usize,
        row_len: usize,
        row_count: usize,
        kind: c_int,
        stream: Handle,
    ) -> Answer {
        if kind != hip::HOST_TO_DEVICE {
            return Err(INVALID_VALUE);
        }
        self.enter()?;
        let rows = Memcpy2d::to_device(
            target.addr() as Address,
            target_stride,
            source,
            source_stride,
            row_len,
            row_count,
        );
        // SAFETY: the caller's promise; the struct is read before the call returns.
        check(unsafe { (self.table.cuMemcpy2DAsync_v2)(&raw const rows, stream) })
    }

    pub(crate) unsafe fn hipMemcpyPeerAsync(
        &self,
        target: Address,
        target_device: c_int,
        source: Address,
        source_device: c_int,
        len: usize,
        stream: Handle,
    ) -> Answer {
        let (to, from) = (self.context(target_device)?, self.context(source_device)?);
        self.enter()?;
        // SAFETY: the caller's promise; the contexts are retained.
        check(unsafe { (self.table.cuMemcpyPeerAsync)(target, to, source, from, len, stream) })
    }

    pub(crate) unsafe fn hipModuleLoadData(&self, module: *mut Handle, image: *const u8) -> Answer {
        // SAFETY: the caller passes a code object.
        let object = unsafe { CodeObject::read(image) }.ok_or(hip::INVALID_IMAGE)?;
        if !object.is_for(&architecture()) {
            return Err(codes::NO_BINARY_FOR_GPU);
        }
        let text = ptx_of(object).ok_or(codes::NO_BINARY_FOR_GPU)?;
        self.enter()?;
        // SAFETY: writes one pointer; the text is terminated.
        check(unsafe { (self.table.cuModuleLoadData)(module, text.as_ptr().cast()) })
    }

    #[allow(clippy::too_many_arguments, reason = "HIP's own")]
    pub(crate) unsafe fn hipModuleLaunchKernel(
        &self,
        function: Handle,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: Handle,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> Answer {
        self.enter()?;
        // The same list, but for the key that ends it.
        let mut list = [ptr::null_mut(); LaunchCall::LIST_LEN];
        let mut extra = extra;
        if !extra.is_null() {
            // SAFETY: the caller passes a list of this length.
            list.copy_from_slice(unsafe { array(extra, LaunchCall::LIST_LEN) });
            if list[LaunchCall::LIST_LEN - 1].addr() != hip::LAUNCH_PARAM_END {
                return Err(INVALID_VALUE);
            }
            list[LaunchCall::LIST_LEN - 1] = ptr::null_mut();
            extra = list.as_mut_ptr();
        }
        // SAFETY: the caller's promise of the parameters; the list is read before the call returns.
        check(unsafe {
            (self.table.cuLaunchKernel)(
                function,
                grid_x,
                grid_y,
                grid_z,
                block_x,
                block_y,
                block_z,
                shared_bytes,
                stream,
                params,
                extra,
            )
        })
    }
}

/// Returns the architecture that devices are said to have.
fn architecture() -> String {
    core::with(|machine| machine.config.gfx.clone())
}

/// Returns the PTX of the kernels in a code object: those of the same names that take as much.
fn ptx_of(object: CodeObject) -> Option<&'static str> {
    let sorted = |mut entries: Vec<crate::kernels::Entry>| {
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        entries
    };
    let wanted = sorted(object.entries);
    PTX.iter().copied().find(|text| ptx::entries(text).map(sorted).as_ref() == Some(&wanted))
}

/// HIP's attributes and CUDA's: `CanMapHostMemory`, `Integrated`, `MultiprocessorCount`.
const ATTRIBUTES: &[(c_int, c_int)] = &[(3, 19), (16, 18), (63, 16), (92, 134)];

/// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`.
const ACCESS_ORDER_STREAM: c_uint = 1;

/// `hipErrorSharedObjectSymbolNotFound`.
const SHARED_OBJECT_SYMBOL_NOT_FOUND: c_int = 302;
/// `hipErrorSharedObjectInitFailed`.
const SHARED_OBJECT_INIT_FAILED: c_int = 303;
