//! What a vendor's driver brings: its calls, one to one, and nothing decided.

use std::ffi::{CStr, c_void};
use std::fmt;

use tensorhaul_plan::DeviceId;

/// One vendor's driver, loaded and initialized.
///
/// The methods are the vendor's calls under common names. [`Gpu`](super::Gpu) is built on them once for all
/// vendors, so that the order of calls, which is where loaders go wrong, is written once.
///
/// # Safety
/// An implementation calls what the vendor documents for the name, with these arguments.
pub unsafe trait Driver: Send + Sync + 'static {
    /// Returns the name of a device of this vendor.
    fn device_id(&self, ordinal: u32) -> DeviceId;

    /// Returns the library, by the name or path it was loaded with.
    fn library(&self) -> String;

    /// Returns the version of the driver, as people know it.
    fn version(&self) -> String;

    /// Counts the devices.
    ///
    /// # Errors
    /// [`CallError`].
    fn device_count(&self) -> Result<u32, CallError>;

    /// Describes a device without touching it.
    ///
    /// # Errors
    /// [`CallError`].
    fn describe(&self, ordinal: u32) -> Result<DeviceFacts, CallError>;

    /// Prepares a device for work, once a process: its primary context.
    ///
    /// # Errors
    /// [`CallError`].
    fn open(&self, ordinal: u32) -> Result<Context, CallError>;

    /// Lets go of what [`Driver::open`] took.
    fn close(&self, ordinal: u32, context: Context);

    /// Returns what is current on the calling thread.
    ///
    /// # Errors
    /// [`CallError`].
    fn current(&self) -> Result<Context, CallError>;

    /// Makes a context current on the calling thread; every call below works in it.
    ///
    /// # Errors
    /// [`CallError`].
    fn make_current(&self, context: Context) -> Result<(), CallError>;

    /// Sets how strictly the calling thread is held to the rules of stream capture, and returns how it was; `None` when the
    /// driver has no such call.
    fn exchange_capture_mode(&self, mode: CaptureMode) -> Option<Result<CaptureMode, CallError>>;

    /// Returns free and total bytes.
    ///
    /// # Errors
    /// [`CallError`].
    fn memory(&self) -> Result<(u64, u64), CallError>;

    /// Makes a stream that does not wait for the default stream.
    ///
    /// # Errors
    /// [`CallError`].
    fn stream_create(&self) -> Result<StreamHandle, CallError>;

    /// Ends a stream; what is queued still runs.
    ///
    /// # Safety
    /// The stream is of this context and not used again.
    unsafe fn stream_destroy(&self, stream: StreamHandle) -> Result<(), CallError>;

    /// Waits for everything on a stream.
    ///
    /// # Safety
    /// The stream is of this context and alive.
    unsafe fn stream_wait(&self, stream: StreamHandle) -> Result<(), CallError>;

    /// Makes a stream wait for an event.
    ///
    /// # Safety
    /// Both are of this process and alive.
    unsafe fn stream_wait_event(&self, stream: StreamHandle, event: EventHandle) -> Result<(), CallError>;

    /// Makes an event that keeps no time.
    ///
    /// # Errors
    /// [`CallError`].
    fn event_create(&self) -> Result<EventHandle, CallError>;

    /// Ends an event.
    ///
    /// # Safety
    /// The event is of this context and not used again.
    unsafe fn event_destroy(&self, event: EventHandle) -> Result<(), CallError>;

    /// Records an event behind everything on a stream.
    ///
    /// # Safety
    /// Both are of this context and alive.
    unsafe fn event_record(&self, event: EventHandle, stream: StreamHandle) -> Result<(), CallError>;

    /// Tells whether an event is complete.
    ///
    /// # Safety
    /// The event is alive.
    unsafe fn event_is_complete(&self, event: EventHandle) -> Result<bool, CallError>;

    /// Waits for an event.
    ///
    /// # Safety
    /// The event is alive.
    unsafe fn event_wait(&self, event: EventHandle) -> Result<(), CallError>;

    /// Allocates device memory in the order of a stream; `None` when the driver or device has no such allocator.
    ///
    /// # Safety
    /// The stream is of this context and alive.
    unsafe fn allocate_ordered(&self, len_bytes: u64, stream: StreamHandle)
    -> Option<Result<u64, CallError>>;

    /// Frees in the order of a stream what [`Driver::allocate_ordered`] gave.
    ///
    /// # Safety
    /// The memory came from there and is not used by work that is not ordered before this.
    unsafe fn free_ordered(&self, address: u64, stream: StreamHandle) -> Result<(), CallError>;

    /// Allocates device memory at once.
    ///
    /// # Errors
    /// [`CallError`].
    fn allocate(&self, len_bytes: u64) -> Result<u64, CallError>;

    /// Frees what [`Driver::allocate`] gave; waits for the device.
    ///
    /// # Safety
    /// The memory came from there and is not used again.
    unsafe fn free(&self, address: u64) -> Result<(), CallError>;

    /// Allocates pinned host memory that every context may copy from, cached by the CPU.
    ///
    /// # Errors
    /// [`CallError`].
    fn host_allocate(&self, len_bytes: usize) -> Result<*mut c_void, CallError>;

    /// Frees what [`Driver::host_allocate`] gave.
    ///
    /// # Safety
    /// The memory came from there and is not used again.
    unsafe fn host_free(&self, start: *mut c_void) -> Result<(), CallError>;

    /// Pins host memory where it is.
    ///
    /// # Safety
    /// The memory is mapped, page-aligned, and stays mapped until [`Driver::host_unregister`].
    unsafe fn host_register(&self, start: *mut c_void, len_bytes: usize) -> Result<(), CallError>;

    /// Unpins it.
    ///
    /// # Safety
    /// The memory was registered, and no copy from it is queued.
    unsafe fn host_unregister(&self, start: *mut c_void) -> Result<(), CallError>;

    /// Returns the address by which kernels read pinned memory of the host.
    ///
    /// # Safety
    /// The memory was registered, or came from [`Driver::host_allocate`], and still is.
    unsafe fn host_address(&self, start: *const c_void) -> Result<u64, CallError>;

    /// Queues a copy to the device.
    ///
    /// # Safety
    /// Both ranges are valid until the copy is done; the source is pinned.
    unsafe fn copy_in(
        &self,
        target: u64,
        source: *const c_void,
        len_bytes: usize,
        stream: StreamHandle,
    ) -> Result<(), CallError>;

    /// Queues several copies to the device in one call; `None` when the driver has no such call.
    ///
    /// # Safety
    /// As [`Driver::copy_in`], for every piece.
    unsafe fn copy_in_batch(
        &self,
        pieces: &[BatchPiece],
        stream: StreamHandle,
    ) -> Option<Result<(), CallError>>;

    /// Queues a copy from the device.
    ///
    /// # Safety
    /// Both ranges are valid until the copy is done; the target is pinned.
    unsafe fn copy_out(
        &self,
        target: *mut c_void,
        source: u64,
        len_bytes: usize,
        stream: StreamHandle,
    ) -> Result<(), CallError>;

    /// Queues a copy of rows to the device.
    ///
    /// # Safety
    /// As [`Driver::copy_in`], for every row.
    unsafe fn copy_rows_in(&self, rows: Rows, stream: StreamHandle) -> Result<(), CallError>;

    /// Tells whether a device can be let to the memory of another, both by their ordinals; `None` when the driver has not
    /// all that this takes.
    fn can_access_peer(&self, ordinal: u32, peer: u32) -> Option<Result<bool, CallError>>;

    /// Lets the current device to the memory of another, what its pool gives included. That it was let there before, by
    /// whomever, is no error. Only where [`Driver::can_access_peer`] has said yes.
    ///
    /// # Errors
    /// [`CallError`].
    fn enable_peer(&self, ordinal: u32, peer: Peer) -> Result<(), CallError>;

    /// Queues a copy from the memory of one device to that of another, or of the same one. Only where
    /// [`Driver::can_access_peer`] gives an answer.
    ///
    /// # Safety
    /// Both ranges are valid until the copy is done, and of the contexts named, which are retained until then.
    unsafe fn copy_peer(&self, copy: PeerCopy, stream: StreamHandle) -> Result<(), CallError>;

    /// Returns the kernels of a module of `kernels/`, compiled for an architecture, where this build has them.
    fn kernels(&self, architecture: &str, module: &str) -> Option<&'static [u8]>;

    /// Compiles a module of `kernels/` for the architecture of a device that this driver drives, for which
    /// [`Driver::kernels`] has none. What is compiled is kept for the process.
    ///
    /// # Errors
    /// [`CompileError`].
    fn compile(&self, architecture: &str, module: &str) -> Result<Compiled, CompileError>;

    /// Returns what this build has kernels for, as people read it.
    fn architectures(&self) -> String;

    /// Loads compiled kernels.
    ///
    /// # Safety
    /// The image is one of [`Driver::kernels`] or [`Driver::compile`].
    unsafe fn module_load(&self, image: &'static [u8]) -> Result<ModuleHandle, CallError>;

    /// Unloads them.
    ///
    /// # Safety
    /// The module is of this context, nothing of it runs or is queued, and it is not used again.
    unsafe fn module_unload(&self, module: ModuleHandle) -> Result<(), CallError>;

    /// Finds a kernel by its name.
    ///
    /// # Safety
    /// The module is of this context and loaded.
    unsafe fn function(&self, module: ModuleHandle, name: &CStr) -> Result<FunctionHandle, CallError>;

    /// Queues a kernel. The parameters are copied before the call returns.
    ///
    /// # Safety
    /// The kernel takes parameters of exactly this form, and what they point to is valid until it is done.
    unsafe fn launch(
        &self,
        function: FunctionHandle,
        shape: LaunchShape,
        params: &[u8],
        stream: StreamHandle,
    ) -> Result<(), CallError>;
}

/// A driver's context, or whatever names a device on a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context(pub usize);

/// How strictly a thread is held to the rules of stream capture, in the driver's numbers, which all vendors share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureMode(pub i32);

impl CaptureMode {
    /// The thread may make every call that does not touch a stream under capture, whoever captures.
    pub const RELAXED: CaptureMode = CaptureMode(2);
}

/// A driver's stream; 0 is the default stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamHandle(pub usize);

/// A driver's event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventHandle(pub usize);

/// A driver's module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleHandle(pub usize);

/// A driver's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionHandle(pub usize);

/// Kernels that were compiled on this machine.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The image, as [`Driver::module_load`] takes it.
    pub image: &'static [u8],
    /// What compiled it, with its version.
    pub compiler: String,
}

/// Why kernels could not be compiled on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CompileError {
    /// There is no compiler: a sentence that says what was looked for.
    NoCompiler(String),
    /// It failed.
    Failed {
        /// The compiler, and its call with its status.
        what: String,
        /// The compiler's log, of many lines; empty where it wrote none.
        log: String,
    },
}

/// On how many threads a kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchShape {
    /// Number of blocks.
    pub block_count: u32,
    /// Threads of a block.
    pub block_threads: u32,
    /// Shared memory of a block.
    pub shared_bytes: u32,
}

/// One copy of a batch, from host to device.
#[derive(Clone, Copy, Debug)]
pub struct BatchPiece {
    /// Address on the device.
    pub target: u64,
    /// First byte on the host.
    pub source: *const c_void,
    /// Number of bytes.
    pub len_bytes: usize,
}

/// A device, seen from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its ordinal.
    pub ordinal: u32,
    /// Its context, retained.
    pub context: Context,
}

/// A copy between devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCopy {
    /// Address of the first byte to read.
    pub source: u64,
    /// The context that it is of.
    pub source_context: Context,
    /// Address of the first byte to write.
    pub target: u64,
    /// The context that it is of.
    pub target_context: Context,
    /// Number of bytes.
    pub len_bytes: usize,
}

/// Rows of equal length at equal distances, from host to device.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// First byte of the first row on the host.
    pub source: *const c_void,
    /// From row to row on the host; at least `row_len_bytes`.
    pub source_stride_bytes: usize,
    /// Address of the first row on the device.
    pub target: u64,
    /// From row to row on the device; at least `row_len_bytes`.
    pub target_stride_bytes: usize,
    /// Length of a row.
    pub row_len_bytes: usize,
    /// Number of rows.
    pub row_count: usize,
}

/// What a device is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceFacts {
    /// The name people know it by.
    pub name: String,
    /// Memory in all.
    pub total_bytes: u64,
    /// `0000:01:00.0`; empty where unknown.
    pub pci_bus_id: String,
    /// The host's memory node that is nearest, where the driver tells.
    pub host_node: Option<u32>,
    /// Architecture: `sm_90`, `gfx942`.
    pub architecture: String,
    /// Whether it shares its memory with the host.
    pub integrated: bool,
    /// Number of its processors, which run blocks of threads.
    pub processor_count: u32,
    /// Whether kernels reach pinned host memory, registered or allocated; [`Driver::host_address`] tells by which address.
    pub reads_pinned: bool,
}

/// A driver's call that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallError {
    /// The call.
    pub call: &'static str,
    /// The driver's status.
    pub code: i32,
    /// The driver's name for it; empty when it has none.
    pub name: String,
    /// What it means for the caller.
    pub meaning: Meaning,
}

/// What a failed call means for the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// The device's memory does not suffice.
    OutOfMemory,
    /// The device no longer works in this process.
    Lost,
    /// Another process has the device for itself, or nobody may use it.
    Busy,
    /// The driver is older than the kernels.
    DriverTooOld,
    /// The kernels are not for this device.
    WrongArchitecture,
    /// The driver's compiler, which turns portable kernels into the device's own, is missing or off.
    NoCompiler,
    /// Anything else.
    Other,
}

impl Meaning {
    /// Returns what the caller can do about it, where that is known.
    pub fn advice(self) -> Option<&'static str> {
        match self {
            Meaning::Lost => Some("the device is lost to this process, restart it"),
            Meaning::DriverTooOld => Some("the driver is older than the kernels, update it"),
            Meaning::WrongArchitecture => Some("the kernels are for other devices than this one"),
            Meaning::NoCompiler => {
                Some("the driver's own compiler is missing or switched off (libnvidia-ptxjitcompiler)")
            }
            Meaning::Busy => {
                Some("another process has the device for itself, or its compute mode forbids use")
            }
            Meaning::OutOfMemory => {
                Some("the memory that the driver itself needs is taken, by this process or others")
            }
            Meaning::Other => None,
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed with {}", self.call, self.code)?;
        if self.name.is_empty() { Ok(()) } else { write!(f, " ({})", self.name) }
    }
}

impl std::error::Error for CallError {}
