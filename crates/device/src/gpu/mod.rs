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

mod dequantize;
mod dequantize_params;
mod driver;
mod kernels;
mod memory;
mod params;
mod peers;
mod staging;
pub mod table;
pub mod topology;
mod unified;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use driver::{
    BatchPiece, CallError, CaptureMode, CompileError, Compiled, Context, DeviceFacts, Driver, EventHandle,
    FunctionHandle, LaunchShape, Meaning, ModuleHandle, Peer, PeerCopy, Rows, StreamHandle,
};
use kernels::Modules;
use memory::Memory;
use peers::Peers;
use tensorhaul_plan::DeviceId;
use tensorhaul_stage::{HostMemory, StagingMemory};
use unified::Unified;

use crate::contract::{
    Allocation, Capabilities, Device, DeviceError, Event, MemoryInfo, Near, Piece, Stream, StridedCopy,
};
use crate::operation::{Location, Operation, OperationKind};

/// A device that the driver sees, described and not touched: no context was made, nothing was allocated on it.
pub struct Found<D: Driver> {
    driver: Arc<D>,
    ordinal: u32,
    facts: DeviceFacts,
}

/// One device of a vendor. Clones are handles of the same one.
pub struct Gpu<D: Driver> {
    shared: Arc<Shared<D>>,
}

pub(crate) struct Shared<D: Driver> {
    driver: Arc<D>,
    ordinal: u32,
    context: Context,
    copy: StreamHandle,
    compute: StreamHandle,
    facts: DeviceFacts,
    /// Events that nobody waits for any more.
    events: Mutex<Vec<EventHandle>>,
    /// Whether the driver has batched copies, as far as is known.
    batches: AtomicBool,
    /// Whether small pieces can be moved by a kernel, as far as is known.
    scatters: AtomicBool,
    modules: Modules,
    peers: Peers,
    /// Whether the driver pins memory that it did not allocate, as far as is known.
    registers: AtomicBool,
    /// What could not be done as preferred: what, why.
    fallbacks: Mutex<Vec<(String, String)>>,
    /// Drivers do not survive a fork.
    process: u32,
}

impl<D: Driver> Found<D> {
    /// Finds a device by its ordinal. Takes microseconds where opening takes tenths of a second.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] when there is no such device; [`DeviceError::Driver`] when a call failed.
    pub fn new(driver: Arc<D>, ordinal: u32) -> Result<Found<D>, DeviceError> {
        let device = driver.device_id(ordinal);
        let failed = |error| DeviceError::Driver { device, error };
        let count = driver.device_count().map_err(failed)?;
        if ordinal >= count {
            let have = match count {
                0 => "the driver sees no device".to_owned(),
                1 => "the driver sees one device, number 0".to_owned(),
                count => format!("the driver sees {count} devices, numbers 0 to {}", count - 1),
            };
            return Err(DeviceError::Unavailable { device, why: have });
        }
        let facts = driver.describe(ordinal).map_err(failed)?;
        Ok(Found { driver, ordinal, facts })
    }

    /// Returns what the device is.
    pub fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// Returns what it can do; the same as once it is open.
    pub fn capabilities(&self) -> Capabilities {
        capabilities(&self.facts)
    }

    /// Returns what of the host is nearest to it.
    pub fn near(&self) -> Near {
        topology::near(&self.facts)
    }

    /// Opens it: its context and two streams.
    ///
    /// # Errors
    /// [`DeviceError::Driver`] when a call failed.
    pub fn open(self) -> Result<Gpu<D>, DeviceError> {
        let Found { driver, ordinal, facts } = self;
        let device = driver.device_id(ordinal);
        let failed = |error| DeviceError::Driver { device, error };
        let context = driver.open(ordinal).map_err(failed)?;
        // From here on dropping `shared` undoes what was done, whatever fails.
        let scatters = AtomicBool::new(facts.reads_pinned);
        let mut shared = Shared {
            driver,
            ordinal,
            context,
            copy: StreamHandle(0),
            compute: StreamHandle(0),
            facts,
            events: Mutex::default(),
            batches: AtomicBool::new(true),
            scatters,
            modules: Modules::default(),
            peers: Peers::default(),
            registers: AtomicBool::new(true),
            fallbacks: Mutex::default(),
            process: std::process::id(),
        };
        let bound = shared.bind()?;
        let (copy, compute) = (shared.driver.stream_create(), shared.driver.stream_create());
        drop(bound);
        shared.copy = copy.as_ref().copied().unwrap_or(StreamHandle(0));
        shared.compute = compute.as_ref().copied().unwrap_or(StreamHandle(0));
        copy.and(compute).map_err(failed)?;
        Ok(Gpu { shared: Arc::new(shared) })
    }
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

impl<D: Driver> Shared<D> {
    fn id(&self) -> DeviceId {
        self.driver.device_id(self.ordinal)
    }

    fn stream(&self, stream: Stream) -> StreamHandle {
        match stream {
            Stream::Copy => self.copy,
            Stream::Compute => self.compute,
        }
    }

    fn failed(&self, error: CallError) -> DeviceError {
        DeviceError::Driver { device: self.id(), error }
    }

    /// Makes the device current on this thread until the guard is dropped, and the thread's capture mode relaxed: a
    /// library that captures a graph in this process would else have its capture ended by our allocations and queries.
    fn bind(&self) -> Result<Bound<'_, D>, DeviceError> {
        if std::process::id() != self.process {
            return Err(DeviceError::Unavailable { device: self.id(), why: FORKED.to_owned() });
        }
        let before = self.driver.current().map_err(|error| self.failed(error))?;
        let mut bound = Bound { driver: &*self.driver, before: None, capture_mode: None };
        if before != self.context {
            self.driver.make_current(self.context).map_err(|error| self.failed(error))?;
            bound.before = Some(before);
        }
        // From here on dropping `bound` undoes what was done.
        if let Some(exchanged) = self.driver.exchange_capture_mode(CaptureMode::RELAXED) {
            let mode = exchanged.map_err(|error| self.failed(error))?;
            bound.capture_mode = Some(mode).filter(|mode| *mode != CaptureMode::RELAXED);
        }
        Ok(bound)
    }

    /// Records an event on a stream, taking one that is free.
    fn record(&self, stream: StreamHandle) -> Result<EventHandle, CallError> {
        let free = lock(&self.events).pop();
        let event = match free {
            Some(event) => event,
            None => self.driver.event_create()?,
        };
        // SAFETY: both are of this device's context, and alive.
        match unsafe { self.driver.event_record(event, stream) } {
            Ok(()) => Ok(event),
            Err(error) => {
                lock(&self.events).push(event);
                Err(error)
            }
        }
    }

    /// Makes one stream wait for what is queued on another.
    fn fence(&self, before: StreamHandle, after: StreamHandle) -> Result<(), CallError> {
        let event = self.record(before)?;
        // SAFETY: both are alive. A wait that is queued refers to this recording, also once the event is recorded anew.
        let result = unsafe { self.driver.stream_wait_event(after, event) };
        lock(&self.events).push(event);
        result
    }

    fn note(&self, what: &str, why: String) {
        let mut fallbacks = lock(&self.fallbacks);
        if !fallbacks.iter().any(|(noted, _)| noted == what) {
            fallbacks.push((what.to_owned(), why));
        }
    }
}

impl<D: Driver> Drop for Shared<D> {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            return; // The parent's driver state is not ours to end.
        }
        if let Ok(bound) = self.bind() {
            self.unload();
            for event in lock(&self.events).drain(..) {
                // SAFETY: nobody holds an event that came back. A failure leaves it to the context's end.
                let _ = unsafe { self.driver.event_destroy(event) };
            }
            for stream in [self.copy, self.compute] {
                if stream != StreamHandle(0) {
                    // SAFETY: the last handle of this device goes away, and with it all use of its streams.
                    let _ = unsafe { self.driver.stream_destroy(stream) };
                }
            }
            drop(bound);
        }
        self.leave_peers();
        self.driver.close(self.ordinal, self.context);
    }
}

/// The device is current on this thread, and the thread's capture mode relaxed.
struct Bound<'d, D: Driver> {
    driver: &'d D,
    /// What was current, where that was something else.
    before: Option<Context>,
    /// The capture mode, where that was stricter.
    capture_mode: Option<CaptureMode>,
}

impl<D: Driver> Drop for Bound<'_, D> {
    fn drop(&mut self) {
        // When one of these fails, the next caller's own call says so.
        if let Some(mode) = self.capture_mode {
            let _ = self.driver.exchange_capture_mode(mode);
        }
        if let Some(before) = self.before {
            let _ = self.driver.make_current(before);
        }
    }
}

impl<D: Driver> Gpu<D> {
    /// Queues several copies in one call of the driver, or in one kernel; false when neither can be had.
    ///
    /// # Safety
    /// As for [`Device::copy_pieces`].
    unsafe fn copy_at_once(
        &self,
        source: &[u8],
        pieces: &[Piece<'_>],
        stream: Stream,
    ) -> Result<bool, DeviceError> {
        let shared = &*self.shared;
        let has_batches = shared.batches.load(Ordering::Relaxed);
        let has_scatter = shared.scatters.load(Ordering::Relaxed) && is_for_scatter(source, pieces);
        if !has_batches && !has_scatter {
            return Ok(false);
        }
        let batch: Vec<_> = pieces
            .iter()
            .map(|piece| BatchPiece {
                target: within(piece.target, piece.target_offset_bytes, piece.len_bytes as u64),
                source: piece.source(source).as_ptr().cast(),
                len_bytes: piece.len_bytes,
            })
            .collect();
        let stream = shared.stream(stream);
        let _bound = shared.bind()?;
        if has_batches {
            // SAFETY: the caller's promise for every piece.
            match unsafe { shared.driver.copy_in_batch(&batch, stream) } {
                Some(Ok(())) => return Ok(true),
                Some(Err(error)) if error.meaning != Meaning::Other => return Err(shared.failed(error)),
                // Copying a piece twice is harmless; going on in batches that are refused is not.
                Some(Err(error)) => {
                    shared.batches.store(false, Ordering::Relaxed);
                    let what = match has_scatter {
                        true => "small tensors are moved by a kernel instead of in batches",
                        false => "small tensors are copied one by one instead of in batches",
                    };
                    shared.note(what, error.to_string());
                }
                None => shared.batches.store(false, Ordering::Relaxed),
            }
        }
        if has_scatter {
            // SAFETY: the caller's promise for every piece; `is_for_scatter` knows the distances.
            match unsafe { shared.scatter(source.as_ptr().cast(), &batch, stream) } {
                Ok(()) => return Ok(true),
                Err(error) if is_refusal(&error) => {
                    shared.scatters.store(false, Ordering::Relaxed);
                    shared.note(
                        "small tensors are copied one by one instead of by a kernel",
                        error.to_string(),
                    );
                }
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }
}

/// Tells whether pieces are many and small enough that a kernel, which reads across the link itself, beats single copies.
fn is_for_scatter(source: &[u8], pieces: &[Piece<'_>]) -> bool {
    let len_bytes: usize = pieces.iter().map(|piece| piece.len_bytes).sum();
    pieces.len() >= SCATTER_MIN
        && len_bytes / pieces.len() < SCATTER_MEAN_LEN_BYTES
        && u32::try_from(source.len()).is_ok()
}

/// Tells whether the driver refused a kernel, but not the device.
fn is_refusal(error: &DeviceError) -> bool {
    match error {
        DeviceError::NoKernels { .. } | DeviceError::NotCompiled { .. } => true,
        DeviceError::Driver { error, .. } => !matches!(error.meaning, Meaning::Lost | Meaning::OutOfMemory),
        _ => false,
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
        staging::allocate(&self.shared, len_bytes)
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
        topology::near(&self.shared.facts)
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

/// Below this, single copies cost no more calls than loading a module does.
const SCATTER_MIN: usize = 8;

/// From here on a copy's bytes take longer than its call, some 5 us at 12 GB/s, and copy engines read faster than kernels.
const SCATTER_MEAN_LEN_BYTES: usize = 64 << 10;

/// A device that shares the host's memory, and reaches it where the host's driver has pinned it, has one residency for
/// tensors: what storage wrote is where kernels read. Both vendors' allocators align to 256 bytes at least.
fn capabilities(facts: &DeviceFacts) -> Capabilities {
    Capabilities { in_place: facts.integrated && facts.reads_pinned, align_bytes: 256 }
}
