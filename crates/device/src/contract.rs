//! What a backend promises, and what its caller does.

use std::any::Any;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tensorhaul_plan::DeviceId;
use tensorhaul_stage::{HostMemory, StagingMemory};

use crate::gpu::{CallError, Meaning};
use crate::operation::{Location, Operation, OperationKind};

/// One place that tensors can live in.
pub trait Device: Send + Sync {
    /// Returns which device this is.
    fn id(&self) -> DeviceId;

    /// Returns the name people know it by.
    fn name(&self) -> String;

    /// Returns what it can do; the same answer for the life of the device.
    fn capabilities(&self) -> Capabilities;

    /// Asks how much memory it has.
    ///
    /// # Errors
    /// [`DeviceError`] when the device does not answer.
    fn memory(&self) -> Result<MemoryInfo, DeviceError>;

    /// Allocates memory that starts on a multiple of `capabilities().align_bytes` and may be written by
    /// either stream at once. It is freed when the last handle is dropped. A length of 0 is allowed.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] with the bytes needed and free.
    fn allocate(&self, len_bytes: u64) -> Result<Arc<dyn Allocation>, DeviceError>;

    /// Allocates memory that storage may be told to write to past the device's streams: it starts on a multiple of
    /// [`STORAGE_ALIGN_BYTES`], and is not of a stream-ordered pool, whose memory vendors do not map for other devices of the bus.
    /// Otherwise as [`Device::allocate`].
    ///
    /// # Errors
    /// As for [`Device::allocate`].
    fn allocate_for_storage(&self, len_bytes: u64) -> Result<Arc<dyn Allocation>, DeviceError>;

    /// Runs `act`, once, with the device current on the calling thread, as calls of other libraries of its vendor need it, and puts
    /// back what was current before.
    ///
    /// # Errors
    /// [`DeviceError`] when the device could not be made current; `act` then does not run.
    fn enter(&self, act: &mut dyn FnMut()) -> Result<(), DeviceError>;

    /// Allocates memory that storage can write straight into: the host's own, with [`Allocation::host_ptr`] on whole pages. Only
    /// where [`Capabilities::in_place`] is set. Otherwise as [`allocate`](Device::allocate), but that dropping the last handle may
    /// wait for what is queued on it.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] with the bytes needed.
    fn allocate_in_place(&self, len_bytes: u64) -> Result<Arc<dyn Allocation>, DeviceError>;

    /// Allocates host memory from which [`Device::copy`] runs asynchronously (pinned memory), for every device of the driver.
    ///
    /// # Errors
    /// [`DeviceError::OutOfHostMemory`].
    fn staging_memory(&self, len_bytes: usize) -> Result<Box<dyn StagingMemory>, DeviceError>;

    /// Pins host memory where it is, for every device of the driver, also while storage writes to it, until what is returned is dropped.
    ///
    /// `None` when the driver pins no memory but its own: [`staging_memory`](Device::staging_memory) then gives that,
    /// and [`fallbacks`](Device::fallbacks) says why.
    ///
    /// # Errors
    /// [`DeviceError`] when the device could not even be asked.
    fn pin(&self, memory: Arc<HostMemory>) -> Result<Option<Box<dyn StagingMemory>>, DeviceError>;

    /// Queues a copy from staging memory of this device into an allocation of it.
    ///
    /// # Errors
    /// [`DeviceError`] when the copy could not be queued; it then never runs.
    ///
    /// # Safety
    /// - `source` lies in [`staging_memory`](Device::staging_memory) of this device or of another of the same driver, or in
    ///   memory that one of them has [pinned](Device::pin), and is neither written nor freed before an event recorded after the copy is complete.
    /// - `target_offset_bytes + source.len()` is within `target`, which is an allocation of this device; nobody
    ///   else reads or writes that range before that event.
    unsafe fn copy(
        &self,
        source: &[u8],
        target: &Arc<dyn Allocation>,
        target_offset_bytes: u64,
        stream: Stream,
    ) -> Result<(), DeviceError>;

    /// Queues copies of several pieces of staging memory, in one call of the driver where it has one for that.
    ///
    /// # Errors
    /// As for [`Device::copy`]; some of the pieces may then still be copied.
    ///
    /// # Safety
    /// As for [`Device::copy`], for every piece.
    unsafe fn copy_pieces(
        &self,
        source: &[u8],
        pieces: &[Piece<'_>],
        stream: Stream,
    ) -> Result<(), DeviceError>;

    /// Queues a copy of equal pieces at equal distances; see [`StridedCopy`].
    ///
    /// # Errors
    /// As for [`Device::copy`].
    ///
    /// # Safety
    /// As for [`Device::copy`], for every piece.
    unsafe fn copy_strided(
        &self,
        source: &[u8],
        target: &Arc<dyn Allocation>,
        copy: StridedCopy,
        stream: Stream,
    ) -> Result<(), DeviceError>;

    /// Queues a copy from an allocation of this device into its staging memory.
    ///
    /// # Errors
    /// As for [`Device::copy`].
    ///
    /// # Safety
    /// As for [`Device::copy`] with source and target exchanged.
    unsafe fn copy_back(
        &self,
        source: &Arc<dyn Allocation>,
        source_offset_bytes: u64,
        target: &mut [u8],
        stream: Stream,
    ) -> Result<(), DeviceError>;

    /// Tells whether [`copy_from_peer`](Device::copy_from_peer) runs from memory of a device, without the host's: of this one
    /// itself, or of another of its vendor that the driver lets it to. Where it does not, copies go through the host, and
    /// [`fallbacks`](Device::fallbacks) says why. The first call for a device makes both ready for it.
    fn can_reach(&self, peer: DeviceId) -> bool;

    /// Queues a copy from an allocation of another device, or of this one, into an allocation of this one.
    ///
    /// It waits for nothing on the other device: [`order`](Device::order) the stream behind an event there first.
    ///
    /// # Errors
    /// [`DeviceError::Unreachable`] where [`can_reach`](Device::can_reach) says no; else as for [`Device::copy`].
    ///
    /// # Safety
    /// - `source` is of an allocation of `peer`, `target` of one of this device; both have `len_bytes` from there on, do not
    ///   overlap, and live until an event recorded on this device after the copy is complete.
    /// - Until that event nobody writes the source or touches the target.
    unsafe fn copy_from_peer(
        &self,
        peer: DeviceId,
        source: Location<'_>,
        target: Location<'_>,
        len_bytes: u64,
        stream: Stream,
    ) -> Result<(), DeviceError>;

    /// Loads what operations of a kind need, so that the first does not pay for it, and returns the time that took: zero
    /// where it was loaded before. [`Device::run`] does the same by itself.
    ///
    /// # Errors
    /// [`DeviceError::NoKernels`] when this build has none for the device and there is no compiler,
    /// [`DeviceError::NotCompiled`] when there is; [`DeviceError::Driver`] when the driver refused them.
    fn prepare(&self, kind: OperationKind) -> Result<Duration, DeviceError>;

    /// Queues an operation on memory of this device.
    ///
    /// # Errors
    /// As for [`Device::prepare`]; [`DeviceError`] also when the operation could not be queued. It then never runs.
    ///
    /// # Safety
    /// - The ranges lie in allocations of this device that live until an event recorded after the operation is complete;
    ///   source and target do not overlap.
    /// - Until that event nobody else writes the source or touches the target.
    unsafe fn run(&self, operation: &Operation<'_>, stream: Stream) -> Result<(), DeviceError>;

    /// Marks the point behind everything queued on a stream so far.
    ///
    /// # Errors
    /// [`DeviceError`] when the mark could not be queued.
    fn record(&self, stream: Stream) -> Result<Event, DeviceError>;

    /// Makes a stream wait for an event, of this device or of another that it [reaches](Device::can_reach), before whatever
    /// is queued on it from now on.
    ///
    /// # Errors
    /// [`DeviceError`] when the wait could not be queued.
    fn order(&self, stream: Stream, after: &Event) -> Result<(), DeviceError>;

    /// Tells whether everything before an event is done, without waiting.
    ///
    /// # Errors
    /// [`DeviceError`] when work before the event failed.
    fn is_complete(&self, event: &Event) -> Result<bool, DeviceError>;

    /// Waits until everything before an event is done.
    ///
    /// # Errors
    /// [`DeviceError`] when work before the event failed.
    fn wait(&self, event: &Event) -> Result<(), DeviceError>;

    /// Makes both streams wait for what is queued on a stream of somebody else's, given as the driver's raw handle.
    /// The host has no streams, and nothing to wait for.
    ///
    /// # Errors
    /// [`DeviceError`] when the wait could not be queued.
    fn follow(&self, stream: u64) -> Result<(), DeviceError>;

    /// Calls `act` with the driver's raw handle of a stream, while the device is current on this thread: for libraries of the
    /// vendor that queue work of their own. The host has no streams; `act` gets 0.
    ///
    /// # Errors
    /// [`DeviceError`] when the device could not be made current; `act` was then not called.
    fn lend(&self, stream: Stream, act: &mut dyn FnMut(u64)) -> Result<(), DeviceError>;

    /// Returns what of the host is nearest to the device.
    fn near(&self) -> Near;

    /// Returns what could not be done as preferred so far: what was done instead, and why.
    fn fallbacks(&self) -> Vec<(String, String)>;
}

/// What of the host is nearest to a device: on the same socket, before the link to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Near {
    /// The memory node; `None` when nobody knows.
    pub node: Option<u32>,
    /// The processors; empty when all are as near, or nobody knows.
    pub processors: Vec<u32>,
}

impl Near {
    /// Allocates host memory near the device, if anybody knows where that is; nothing has touched it.
    ///
    /// # Errors
    /// [`DeviceError::OutOfHostMemory`] with the bytes needed.
    pub fn allocate(&self, len_bytes: usize) -> Result<HostMemory, DeviceError> {
        let memory = HostMemory::allocate(len_bytes).map_err(|error| DeviceError::OutOfHostMemory {
            needed_bytes: len_bytes as u64,
            source: error.into(),
        })?;
        Ok(match self.node {
            Some(node) => memory.near(node),
            None => memory,
        })
    }
}

/// Memory of a device. Dropping the last handle frees it; whoever queued work on it keeps a handle until
/// that work is done.
///
/// # Safety
/// For the life of the value the `len_bytes` bytes at `address` are memory of its device that nobody else uses. Where
/// `host_ptr` is given it is the same memory, initialized, and readable and writable by the host.
pub unsafe trait Allocation: Any + Send + Sync {
    /// Returns the address of the first byte, in the device's own address space.
    fn address(&self) -> u64;

    /// Returns the length.
    fn len_bytes(&self) -> u64;

    /// Returns the first byte, where the host can write to the memory as to its own.
    fn host_ptr(&self) -> Option<NonNull<u8>>;

    /// Orders the freeing of the memory after what is queued on this stream of the device's driver at the
    /// time of the last drop. The stream must outlive the memory. The host has no streams, and nothing to order.
    fn release_after(&self, stream: u64);

    /// Keeps a value until the memory is freed, such as the owner of a stream given to [`Allocation::release_after`].
    fn keep(&self, owner: Arc<dyn Any + Send + Sync>);
}

/// Storage writes whole pages: addresses that it writes to at full speed are multiples of this.
pub const STORAGE_ALIGN_BYTES: u64 = 4096;

/// Values that an allocation keeps for as long as it lives; what [`Allocation::keep`] is made of.
#[derive(Default)]
pub struct Kept(Mutex<Vec<Arc<dyn Any + Send + Sync>>>);

impl Kept {
    /// Adds a value, if it is not there yet.
    pub fn add(&self, owner: Arc<dyn Any + Send + Sync>) {
        // A panic elsewhere cannot leave the list half changed: every change is one push.
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !kept.iter().any(|other| Arc::ptr_eq(other, &owner)) {
            kept.push(owner);
        }
    }
}

/// What a device can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// It shares the host's memory, or is the host: reads land in what [`Device::allocate_in_place`] gives, and nothing is
    /// staged that need not be.
    pub in_place: bool,
    /// Alignment of what [`Device::allocate`] gives.
    pub align_bytes: u64,
}

/// Memory of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Bytes that can be allocated now.
    pub free_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// The two in-order queues of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Copies between host and device.
    Copy,
    /// Kernels.
    Compute,
}

/// One piece of staging memory and where it goes.
#[derive(Clone, Copy)]
pub struct Piece<'a> {
    /// Distance from the start of the staging memory given.
    pub source_offset_bytes: usize,
    /// Number of bytes.
    pub len_bytes: usize,
    /// The allocation it goes to.
    pub target: &'a Arc<dyn Allocation>,
    /// Distance from the start of the allocation.
    pub target_offset_bytes: u64,
}

impl Piece<'_> {
    /// Returns the bytes to copy.
    pub fn source<'s>(&self, memory: &'s [u8]) -> &'s [u8] {
        &memory[self.source_offset_bytes..self.source_offset_bytes + self.len_bytes]
    }
}

/// Equal pieces at equal distances, gathered or scattered: the part of a tensor's rows that a slice keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StridedCopy {
    /// Length of each piece.
    pub piece_len_bytes: u64,
    /// Number of pieces.
    pub piece_count: u64,
    /// From the start of one piece to the start of the next, in the source.
    pub source_stride_bytes: u64,
    /// From the start of one piece to the start of the next, in the target.
    pub target_stride_bytes: u64,
    /// Where the first piece lands.
    pub target_offset_bytes: u64,
}

/// A point in a stream. Each backend puts its own handle in and is given back only its own; devices of one vendor share
/// theirs.
pub struct Event(Box<dyn Any + Send + Sync>);

impl Event {
    /// Wraps a backend's handle.
    pub fn new(handle: impl Any + Send + Sync) -> Event {
        Event(Box::new(handle))
    }

    /// Returns the handle, if it is of this type.
    pub fn handle<T: Any>(&self) -> Option<&T> {
        self.0.downcast_ref()
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Event(..)")
    }
}

/// What a backend reports: only what its caller could not know.
#[derive(Debug)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device has not enough memory.
    OutOfMemory {
        /// Which device.
        device: DeviceId,
        /// Bytes asked for.
        needed_bytes: u64,
        /// Bytes it has, where it says.
        free_bytes: Option<u64>,
    },
    /// The device's whole memory would not suffice.
    TooSmall {
        /// Which device.
        device: DeviceId,
        /// Bytes asked for.
        needed_bytes: u64,
        /// Bytes it has in all.
        total_bytes: u64,
    },
    /// The host has not enough memory for staging.
    OutOfHostMemory {
        /// Bytes asked for.
        needed_bytes: u64,
        /// The system's answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is no such device, or no driver for it.
    Unavailable {
        /// Which device.
        device: DeviceId,
        /// Why, and what would help.
        why: String,
    },
    /// This build has no kernels for the device.
    NoKernels {
        /// Which device.
        device: DeviceId,
        /// Its architecture.
        architecture: String,
        /// What this build has kernels for.
        known: String,
        /// Why they cannot be compiled on this machine.
        why: String,
    },
    /// The kernels for the device did not compile on this machine.
    NotCompiled {
        /// Which device.
        device: DeviceId,
        /// Its architecture.
        architecture: String,
        /// The compiler, and its call with its status.
        what: String,
        /// The compiler's whole log.
        log: String,
    },
    /// Memory of another device is not reached without the host.
    Unreachable {
        /// Which device.
        device: DeviceId,
        /// Whose memory.
        peer: DeviceId,
        /// Why.
        why: String,
    },
    /// A call of the driver failed.
    Driver {
        /// Which device.
        device: DeviceId,
        /// The call, the driver's code and its name.
        error: CallError,
    },
    /// The device cannot say what was asked.
    Query {
        /// Which device.
        device: DeviceId,
        /// The system's answer.
        source: io::Error,
    },
}

impl DeviceError {
    /// Returns the device at fault; `None` where it is the host's memory.
    pub fn device(&self) -> Option<DeviceId> {
        match self {
            DeviceError::OutOfMemory { device, .. }
            | DeviceError::TooSmall { device, .. }
            | DeviceError::Unavailable { device, .. }
            | DeviceError::NoKernels { device, .. }
            | DeviceError::NotCompiled { device, .. }
            | DeviceError::Driver { device, .. }
            | DeviceError::Query { device, .. }
            | DeviceError::Unreachable { device, .. } => Some(*device),
            DeviceError::OutOfHostMemory { .. } => None,
        }
    }

    /// Tells whether the device itself is gone, or lost to this process, rather than that it refused one call.
    pub fn is_lost(&self) -> bool {
        match self {
            DeviceError::Driver { error, .. } => error.meaning == Meaning::Lost,
            DeviceError::Unavailable { .. } => true,
            _ => false,
        }
    }
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceError::OutOfMemory { device, needed_bytes, free_bytes: Some(free) } => {
                write!(f, "{device}: {needed_bytes} bytes do not fit, {free} are free")
            }
            DeviceError::OutOfMemory { device, needed_bytes, free_bytes: None } => {
                write!(f, "{device}: {needed_bytes} bytes do not fit")
            }
            DeviceError::TooSmall { device, needed_bytes, total_bytes } => {
                write!(f, "{device}: {needed_bytes} bytes do not fit, it has {total_bytes} in all")
            }
            DeviceError::OutOfHostMemory { needed_bytes, .. } => {
                write!(f, "no {needed_bytes} bytes of host memory for staging")
            }
            DeviceError::Unavailable { device, why } => write!(f, "{device}: {why}"),
            DeviceError::NoKernels { device, architecture, known, why } => {
                write!(
                    f,
                    "{device}: this build has no kernels for {architecture}, but for {known}; {why}; "
                )?;
                f.write_str("load without casts and dequantization")
            }
            DeviceError::NotCompiled { device, architecture, what, log } => {
                write!(f, "{device}: the kernels for {architecture} do not compile: {what}")?;
                match telling_line(log) {
                    Some(line) => write!(f, ": {line}"),
                    None => Ok(()),
                }
            }
            DeviceError::Unreachable { device, peer, why } => {
                write!(f, "{device} does not reach the memory of {peer}: {why}; copy through the host")
            }
            DeviceError::Driver { device, error } => match error.meaning.advice() {
                Some(advice) => write!(f, "{device}: {error}; {advice}"),
                None => write!(f, "{device}: {error}"),
            },
            DeviceError::Query { device, .. } => write!(f, "{device}: does not tell its memory"),
        }
    }
}

/// Returns the first error of a compiler's log, or its first line.
fn telling_line(log: &str) -> Option<&str> {
    let mut lines = log.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.clone().find(|line| line.contains("error")).or_else(|| lines.next())
}

impl std::error::Error for DeviceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            DeviceError::OutOfHostMemory { source, .. } => Some(&**source),
            DeviceError::Query { source, .. } => Some(source),
            _ => None,
        }
    }
}
