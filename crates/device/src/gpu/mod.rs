//! A backend for any vendor whose driver has streams, events and pinned memory: the order of calls, once.
//!
//! A vendor's crate brings a [`Driver`], which is its calls one to one; [`Gpu`] is the [`Device`] built on them.
//! What can go wrong in a loader goes wrong in the order of calls, so that order is written, and tested
//! against simulated drivers, in one place.
//!
//! - One copy stream, one compute stream; neither waits for the default stream.
//! - Memory comes from the stream-ordered allocator where there is one, allocated on the copy stream and fenced,
//!   so that the compute stream may write it too.
//! - Memory that the device shares with the host is freed once everybody's work is done, because the host's allocator knows no streams.
//! - Memory is freed behind whatever may still use it: both streams, the default stream, and every
//!   stream a consumer named with [`Allocation::release_after`]. If that order cannot be had, it is leaked.
//! - The calling thread's own current device and capture mode are put back after every call.

mod batch;
pub mod call;
mod dequantize;
mod dequantize_params;
mod driver;
mod found;
mod kernels;
mod loaded;
mod memory;
mod params;
mod peers;
mod shared;
mod staging;
pub mod table;
pub mod topology;
mod unified;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use driver::{
    BatchPiece, CallError, CaptureMode, CompileError, Compiled, Context, DeviceFacts, Driver, EventHandle,
    FunctionHandle, LaunchShape, Meaning, ModuleHandle, Peer, PeerCopy, Rows, StreamHandle,
};
pub use found::Found;
pub use loaded::{Loaded, NoDriver};
use memory::Memory;
use shared::Shared;
use tensorhaul_plan::DeviceId;
use tensorhaul_stage::{HostMemory, StagingMemory};
use unified::Unified;

use crate::contract::{
    Allocation, Capabilities, Device, DeviceError, Event, MemoryInfo, Near, Piece, Stream, StridedCopy,
};
use crate::operation::{Location, Operation, OperationKind};

/// One device of a vendor. Clones are handles of the same one.
pub struct Gpu<D: Driver> {
    shared: Arc<Shared<D>>,
}

impl<D: Driver> Gpu<D> {
    /// Finds a device and opens it.
    ///
    /// # Errors
    /// Those of [`Found::new`] and [`Found::open`].
    pub fn open(driver: Arc<D>, ordinal: u32) -> Result<Gpu<D>, DeviceError> {
        Found::new(driver, ordinal)?.open()
    }

    /// Returns what the device is.
    pub fn facts(&self) -> &DeviceFacts {
        &self.shared.facts
    }
}

impl<D: Driver> Clone for Gpu<D> {
    fn clone(&self) -> Gpu<D> {
        Gpu { shared: Arc::clone(&self.shared) }
    }
}

/// The handle inside an [`Event`].
struct Recorded<D: Driver> {
    shared: Arc<Shared<D>>,
    event: EventHandle,
}

impl<D: Driver> Drop for Recorded<D> {
    fn drop(&mut self) {
        lock(&self.shared.events).push(self.event);
    }
}

impl<D: Driver> Gpu<D> {
    fn recorded(event: &Event) -> &Recorded<D> {
        event.handle().expect("an event goes back to the device that recorded it")
    }
}

impl<D: Driver> Device for Gpu<D> {
    fn id(&self) -> DeviceId {
        self.shared.id()
    }

    fn name(&self) -> String {
        self.shared.facts.name.clone()
    }

    fn capabilities(&self) -> Capabilities {
        capabilities(&self.shared.facts)
    }

    fn memory(&self) -> Result<MemoryInfo, DeviceError> {
        let _bound = self.shared.bind()?;
        let (free_bytes, total_bytes) =
            self.shared.driver.memory().map_err(|error| self.shared.failed(error))?;
        Ok(MemoryInfo { free_bytes, total_bytes })
    }

    fn allocate(&self, len_bytes: u64) -> Result<Arc<dyn Allocation>, DeviceError> {
        Ok(Arc::new(Memory::allocate(&self.shared, len_bytes)?))
    }

    fn allocate_for_storage(&self, len_bytes: u64) -> Result<Arc<dyn Allocation>, DeviceError> {
        Ok(Arc::new(Memory::allocate_for_storage(&self.shared, len_bytes)?))
    }

    fn enter(&self, act: &mut dyn FnMut()) -> Result<(), DeviceError> {
        let _bound = self.shared.bind()?;
        act();
        Ok(())
    }

    fn allocate_in_place(&self, len_bytes: u64) -> Result<Arc<dyn Allocation>, DeviceError> {
        debug_assert!(self.capabilities().in_place, "asked before");
        Ok(Arc::new(Unified::allocate(&self.shared, len_bytes)?))
    }

    fn staging_memory(&self, len_bytes: usize) -> Result<Box<dyn StagingMemory>, DeviceError> {
        Ok(staging::allocate(&self.shared, len_bytes)?.0)
    }

    fn pin(&self, memory: Arc<HostMemory>) -> Result<Option<Box<dyn StagingMemory>>, DeviceError> {
        staging::register(&self.shared, memory)
    }

    unsafe fn copy(
        &self,
        source: &[u8],
        target: &Arc<dyn Allocation>,
        target_offset_bytes: u64,
        stream: Stream,
    ) -> Result<(), DeviceError> {
        let shared = &*self.shared;
        let address = within(target, target_offset_bytes, source.len() as u64);
        let _bound = shared.bind()?;
        // SAFETY: the caller keeps both ranges until an event behind this copy; the source is our staging memory.
        let queued = unsafe {
            shared.driver.copy_in(address, source.as_ptr().cast(), source.len(), shared.stream(stream))
        };
        queued.map_err(|error| shared.failed(error))
    }

    unsafe fn copy_pieces(
        &self,
        source: &[u8],
        pieces: &[Piece<'_>],
        stream: Stream,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise for every piece.
        if pieces.len() >= BATCH_MIN && unsafe { self.copy_at_once(source, pieces, stream)? } {
            return Ok(());
        }
        for piece in pieces {
            // SAFETY: the caller's promise for every piece.
            unsafe { self.copy(piece.source(source), piece.target, piece.target_offset_bytes, stream)? };
        }
        Ok(())
    }

    unsafe fn copy_strided(
        &self,
        source: &[u8],
        target: &Arc<dyn Allocation>,
        copy: StridedCopy,
        stream: Stream,
    ) -> Result<(), DeviceError> {
        let shared = &*self.shared;
        let (count, piece) = (copy.piece_count, copy.piece_len_bytes);
        if count == 0 || piece == 0 {
            return Ok(());
        }
        assert!(
            ((count - 1) * copy.source_stride_bytes + piece) <= source.len() as u64,
            "pieces lie inside their source"
        );
        let reach_bytes = (count - 1) * copy.target_stride_bytes + piece;
        let rows = Rows {
            source: source.as_ptr().cast(),
            source_stride_bytes: copy.source_stride_bytes as usize,
            target: within(target, copy.target_offset_bytes, reach_bytes),
            target_stride_bytes: copy.target_stride_bytes as usize,
            row_len_bytes: piece as usize,
            row_count: count as usize,
        };
        let _bound = shared.bind()?;
        // SAFETY: as for `copy`; the extent of the rows was just checked on both sides.
        let queued = unsafe { shared.driver.copy_rows_in(rows, shared.stream(stream)) };
        queued.map_err(|error| shared.failed(error))
    }

    unsafe fn copy_back(
        &self,
        source: &Arc<dyn Allocation>,
        source_offset_bytes: u64,
        target: &mut [u8],
        stream: Stream,
    ) -> Result<(), DeviceError> {
        let shared = &*self.shared;
        let address = within(source, source_offset_bytes, target.len() as u64);
        let _bound = shared.bind()?;
        // SAFETY: as for `copy`, with source and target exchanged.
        let queued = unsafe {
            shared.driver.copy_out(target.as_mut_ptr().cast(), address, target.len(), shared.stream(stream))
        };
        queued.map_err(|error| shared.failed(error))
    }

    fn can_reach(&self, peer: DeviceId) -> bool {
        self.shared.bind().is_ok_and(|_bound| self.shared.reach(peer).is_ok())
    }

    unsafe fn copy_from_peer(
        &self,
        peer: DeviceId,
        source: Location<'_>,
        target: Location<'_>,
        len_bytes: u64,
        stream: Stream,
    ) -> Result<(), DeviceError> {
        let _bound = self.shared.bind()?;
        // SAFETY: the caller's promise.
        unsafe { self.shared.copy_from_peer(peer, source, target, len_bytes, stream) }
    }

    fn prepare(&self, kind: OperationKind) -> Result<Duration, DeviceError> {
        let _bound = self.shared.bind()?;
        self.shared.prepare(kind)
    }

    unsafe fn run(&self, operation: &Operation<'_>, stream: Stream) -> Result<(), DeviceError> {
        let _bound = self.shared.bind()?;
        // SAFETY: the caller's promise.
        unsafe { self.shared.run(operation, self.shared.stream(stream)) }
    }

    fn record(&self, stream: Stream) -> Result<Event, DeviceError> {
        let _bound = self.shared.bind()?;
        let event =
            self.shared.record(self.shared.stream(stream)).map_err(|error| self.shared.failed(error))?;
        Ok(Event::new(Recorded { shared: Arc::clone(&self.shared), event }))
    }

    fn order(&self, stream: Stream, after: &Event) -> Result<(), DeviceError> {
        let shared = &*self.shared;
        let _bound = shared.bind()?;
        let event = Gpu::<D>::recorded(after).event;
        // SAFETY: both are alive: the event is the caller's, the stream this device's.
        let queued = unsafe { shared.driver.stream_wait_event(shared.stream(stream), event) };
        queued.map_err(|error| shared.failed(error))
    }

    fn is_complete(&self, event: &Event) -> Result<bool, DeviceError> {
        let shared = &*self.shared;
        let _bound = shared.bind()?;
        // SAFETY: the event is the caller's, and alive.
        let asked = unsafe { shared.driver.event_is_complete(Gpu::<D>::recorded(event).event) };
        asked.map_err(|error| shared.failed(error))
    }

    fn wait(&self, event: &Event) -> Result<(), DeviceError> {
        let shared = &*self.shared;
        let _bound = shared.bind()?;
        // SAFETY: the event is the caller's, and alive.
        let waited = unsafe { shared.driver.event_wait(Gpu::<D>::recorded(event).event) };
        waited.map_err(|error| shared.failed(error))
    }

    fn follow(&self, stream: u64) -> Result<(), DeviceError> {
        let shared = &*self.shared;
        let _bound = shared.bind()?;
        for ours in [shared.copy, shared.compute] {
            shared.fence(StreamHandle(stream as usize), ours).map_err(|error| shared.failed(error))?;
        }
        Ok(())
    }

    fn lend(&self, stream: Stream, act: &mut dyn FnMut(u64)) -> Result<(), DeviceError> {
        let _bound = self.shared.bind()?;
        act(self.shared.stream(stream).0 as u64);
        Ok(())
    }

    fn near(&self) -> Near {
        self.shared.near.clone()
    }

    fn fallbacks(&self) -> Vec<(String, String)> {
        lock(&self.shared.fallbacks).clone()
    }
}

/// Returns the device address of a range.
///
/// # Panics
/// When the range leaves the allocation: the caller broke the contract, and going on would write over
/// somebody else's memory.
fn within(allocation: &Arc<dyn Allocation>, offset_bytes: u64, len_bytes: u64) -> u64 {
    let end = offset_bytes.checked_add(len_bytes);
    assert!(end.is_some_and(|end| end <= allocation.len_bytes()), "a copy stays inside its allocation");
    allocation.address() + offset_bytes
}

/// A panic elsewhere cannot leave these lists half changed: every change is one push or pop.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a child of a fork has no devices, and what would help.
pub const FORKED: &str = "the process was forked after the driver was initialized, which no driver survives; \
                          fork before the first load, or start processes anew (spawn)";

/// One copy is as cheap without a batch.
const BATCH_MIN: usize = 2;

/// A device that shares the host's memory, and reaches it where the host's driver has pinned it, has one residency for
/// tensors: what storage wrote is where kernels read. Both vendors' allocators align to 256 bytes at least.
fn capabilities(facts: &DeviceFacts) -> Capabilities {
    Capabilities { in_place: facts.integrated && facts.reads_pinned, align_bytes: 256 }
}
