//! The transfer: engines fill memory, the device takes it, tensors become ready. The only place that
//! sees a staging buffer and a device's event together.

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use tensorhaul_device::{Allocation, Device, DeviceError, Event, Piece, Stream};
use tensorhaul_io::{
    Access, Counts, Done, Engine, Feed, Job, JobMemory, Landing, Next, ReadCause, ReadError, Sink,
};
use tensorhaul_plan::{Place, Plan, plan::Target};
use tensorhaul_stage::{Copying, Filled, Ring};

use crate::cancel::Cancel;
use crate::checksum::{self, Hashing};
use crate::error::{Error, Result};
use crate::handover::{Emit, Ready};
use crate::model::Inner;
use crate::options::LoadOptions;
use crate::progress::Progress;
use crate::tensor::{Storage, Tensor};

/// An engine and the reads it does, in order.
pub(crate) struct Lane {
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) reads: Vec<u32>,
}

/// Everything a transfer needs.
pub(crate) struct Transfer<'t> {
    pub(crate) model: &'t Inner,
    pub(crate) plan: &'t Plan,
    pub(crate) device: &'t dyn Device,
    pub(crate) arenas: Vec<Arc<dyn Allocation>>,
    pub(crate) ring: Option<Ring>,
    pub(crate) options: &'t LoadOptions,
    pub(crate) cancel: &'t Cancel,
}

/// What a transfer did.
pub(crate) struct Transferred {
    pub(crate) counts: Counts,
    pub(crate) first_byte: Option<Instant>,
    /// When every byte was in place; checksums may have taken longer.
    pub(crate) finished: Instant,
    pub(crate) checksums: Option<BTreeMap<String, String>>,
}

impl Transfer<'_> {
    /// Runs every lane to its end, and emits each tensor when its last byte is in place.
    ///
    /// On error the lanes stop at their next read, what is in flight is waited for, and the first error
    /// is returned: when this returns, no thread, kernel or device touches the transfer's memory.
    pub(crate) fn run(&self, lanes: &[Lane], access: &[Access], emit: &mut Emit<'_>) -> Result<Transferred> {
        let (counts, finished) = (Counts::default(), Instant::now());
        let mut transferred = Transferred { counts, first_byte: None, finished, checksums: None };
        transferred.checksums = checksum::with_pool(self.options.checksums, |hashing| {
            let (sender, messages) = mpsc::channel();
            thread::scope(|scope| {
                let _guard = StopLanes(self.cancel);
                let mut arrivals = Arrivals::new(self, hashing, emit);
                for lane in lanes {
                    let sender = sender.clone();
                    let run = move || {
                        let queue =
                            Queue { transfer: self, access, reads: &lane.reads, next: AtomicUsize::new(0) };
                        let counts = lane.engine.run(&queue, &Answers(sender.clone()));
                        // The receiver outlives every lane.
                        let _ = sender.send(Message::Ended(counts));
                    };
                    let name = format!("tensorhaul-{}", lane.engine.name());
                    if let Err(error) = thread::Builder::new().name(name).spawn_scoped(scope, run) {
                        arrivals.fail(Error::new(crate::ErrorKind::OutOfMemory, error));
                    }
                }
                drop(sender);
                arrivals.take_all(&messages);
                transferred.finished = Instant::now();
                transferred.counts = arrivals.counts;
                transferred.first_byte = arrivals.first_byte;
                arrivals.result()
            })
        })?;
        Ok(transferred)
    }

    /// Returns a range of an arena for storage to write into.
    fn landing(&self, place: Place, len_bytes: u64) -> Landing {
        let arena = Arc::clone(&self.arenas[place.arena as usize]);
        // A direct read of a file's last sector may write up to the next multiple of the alignment.
        let reach_bytes = len_bytes.next_multiple_of(self.plan.machine().direct_align_bytes);
        let end_bytes = (place.offset_bytes + reach_bytes).min(arena.len_bytes());
        let len = (end_bytes - place.offset_bytes) as usize;
        assert!(len as u64 >= len_bytes, "the plan's reads land inside their arenas");
        let start = arena.host_ptr().expect("reads in place are planned only for memory of the host");
        // SAFETY: the offset is inside the arena, as just checked.
        let start = unsafe { start.add(place.offset_bytes as usize) };
        let owner: Arc<dyn Any + Send + Sync> = arena;
        // SAFETY: arenas are initialized and kept alive by `owner`; the plan's reads are disjoint in the
        // arena, each is taken once, and a tensor is emitted only after the last read that covers it.
        unsafe { Landing::new(start, len, owner) }
    }
}

/// Stops the lanes when a callback of the caller's panics: they would wait for staging buffers for ever, and the
/// panic for them.
struct StopLanes<'c>(&'c Cancel);

impl Drop for StopLanes<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.cancel();
        }
    }
}

/// A lane's reads, handed out in order.
struct Queue<'q> {
    transfer: &'q Transfer<'q>,
    access: &'q [Access],
    reads: &'q [u32],
    next: AtomicUsize,
}

impl Feed for Queue<'_> {
    fn next(&self, wait: bool) -> Next {
        if self.transfer.cancel.is_cancelled() {
            return Next::Done;
        }
        match (&self.transfer.ring, wait) {
            // An engine that does not wait is the only one at its lane, so the read at hand stays its own.
            (Some(ring), false) if self.peek().is_some_and(|read| self.is_staged(read)) => {
                match ring.try_take() {
                    Some(filling) => self.take(|_| Some(JobMemory::Staging(filling))),
                    None => Next::Busy,
                }
            }
            (ring, _) => self.take(|read| match (&self.transfer.plan.reads()[read as usize], ring) {
                (tensorhaul_plan::Read { target: Target::InPlace(place), extent, .. }, _) => {
                    Some(JobMemory::InPlace(self.transfer.landing(*place, extent.len_bytes)))
                }
                (_, Some(ring)) => ring.take().map(JobMemory::Staging),
                (_, None) => unreachable!("a plan with staged reads has a ring"),
            }),
        }
    }
}

impl Queue<'_> {
    fn peek(&self) -> Option<u32> {
        self.reads.get(self.next.load(Ordering::Relaxed)).copied()
    }

    fn is_staged(&self, read: u32) -> bool {
        matches!(self.transfer.plan.reads()[read as usize].target, Target::Staged { .. })
    }

    fn take(&self, memory: impl FnOnce(u32) -> Option<JobMemory>) -> Next {
        let Some(read) = self.reads.get(self.next.fetch_add(1, Ordering::Relaxed)).copied() else {
            return Next::Done;
        };
        let Some(memory) = memory(read) else {
            return Next::Done; // The ring was closed: the load is cancelled.
        };
        let (extent, access) = (self.transfer.plan.reads()[read as usize].extent, self.access[read as usize]);
        Next::Job(Job { read, extent, access, memory })
    }
}

/// What lanes tell the transfer.
enum Message {
    Done(Done),
    Lost(u32, ReadError),
    Ended(Counts),
}

struct Answers(Sender<Message>);

impl Sink for Answers {
    fn done(&self, done: Done) {
        // The receiver outlives every lane.
        let _ = self.0.send(Message::Done(done));
    }

    fn lost(&self, read: u32, error: ReadError) {
        let _ = self.0.send(Message::Lost(read, error));
    }
}

/// Takes what arrives, on the thread that called the load.
struct Arrivals<'a, 'e> {
    transfer: &'a Transfer<'a>,
    hashing: &'a Hashing,
    emit: &'a mut Emit<'e>,
    /// Reads that each tensor still waits for.
    missing: Vec<u32>,
    /// Buffers that the device is copying from, oldest first.
    copying: VecDeque<(Event, Copying, u32)>,
    failed: Option<Error>,
    counts: Counts,
    first_byte: Option<Instant>,
    progress: Progress,
}

impl<'a, 'e> Arrivals<'a, 'e> {
    fn new(transfer: &'a Transfer<'a>, hashing: &'a Hashing, emit: &'a mut Emit<'e>) -> Arrivals<'a, 'e> {
        let plan = transfer.plan;
        let progress = Progress {
            total_bytes: plan.promised().read_bytes,
            total_tensors: plan.tensors().len() as u64,
            ..Progress::default()
        };
        Arrivals {
            transfer,
            hashing,
            emit,
            missing: plan.tensors().iter().map(|tensor| tensor.read_count).collect(),
            copying: VecDeque::new(),
            failed: None,
            counts: Counts::default(),
            first_byte: None,
            progress,
        }
    }

    fn take_all(&mut self, messages: &Receiver<Message>) {
        for tensor in 0..self.missing.len() {
            if self.missing[tensor] == 0 {
                self.ready(tensor); // It has no bytes to wait for.
            }
        }
        loop {
            let message = if self.copying.is_empty() {
                messages.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                messages.recv_timeout(EVENT_POLL)
            };
            match message {
                Ok(Message::Done(done)) => self.done(done),
                Ok(Message::Lost(read, error)) => self.read_failed(read, error),
                Ok(Message::Ended(counts)) => self.counts += counts,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.take_copied();
        }
        self.drain();
    }

    fn result(self) -> Result<()> {
        match self.failed {
            Some(error) => Err(error),
            None if self.transfer.cancel.is_cancelled() => Err(Error::cancelled()),
            None => Ok(()),
        }
    }

    fn done(&mut self, done: Done) {
        let Done { read, memory, result } = done;
        if let Err(error) = result {
            return self.read_failed(read, error);
        }
        self.first_byte.get_or_insert_with(Instant::now);
        match memory {
            JobMemory::InPlace(landing) => {
                drop(landing);
                self.arrived(read);
            }
            JobMemory::Staging(filling) => {
                let len_bytes = self.transfer.plan.reads()[read as usize].extent.len_bytes;
                self.copy(read, filling.filled(len_bytes as usize));
            }
        }
    }

    /// Queues the copies out of a filled buffer.
    fn copy(&mut self, read: u32, filled: Filled) {
        if self.failed.is_some() {
            return; // The load has failed; the buffer goes back, and nobody needs its bytes.
        }
        let buffer = filled.copying();
        match self.queue_copies(read, &buffer) {
            Ok(event) => self.copying.push_back((event, buffer, read)),
            Err(error) => {
                self.give_back(buffer);
                self.fail(error.into());
            }
        }
    }

    fn queue_copies(&self, read: u32, buffer: &Copying) -> std::result::Result<Event, DeviceError> {
        let Transfer { plan, device, arenas, .. } = self.transfer;
        let piece = |copy: &tensorhaul_plan::Copy| Piece {
            source_offset_bytes: copy.source_offset_bytes as usize,
            len_bytes: copy.len_bytes as usize,
            target: &arenas[copy.target.arena as usize],
            target_offset_bytes: copy.target.offset_bytes,
        };
        let pieces: Vec<_> = plan.copies(&plan.reads()[read as usize]).iter().map(piece).collect();
        // SAFETY: the buffer is of this device's staging memory, and goes back to the ring only when an event recorded
        // after the copies is complete; the plan's copies are disjoint and inside their arenas, and a tensor is
        // emitted only after the last of them.
        unsafe { device.copy_pieces(buffer.bytes(), &pieces, Stream::Copy)? };
        device.record(Stream::Copy)
    }

    /// Gives buffers back whose copies are done.
    fn take_copied(&mut self) {
        while let Some((event, _, _)) = self.copying.front() {
            match self.transfer.device.is_complete(event) {
                Ok(false) => return,
                Ok(true) => {
                    if let Some((_, buffer, read)) = self.copying.pop_front() {
                        buffer.copied();
                        self.arrived(read);
                    }
                }
                Err(error) => {
                    if let Some((_, buffer, _)) = self.copying.pop_front() {
                        self.give_back(buffer);
                    }
                    self.fail(error.into());
                }
            }
        }
    }

    /// Waits for every copy.
    fn drain(&mut self) {
        while let Some((event, buffer, read)) = self.copying.pop_front() {
            match self.transfer.device.wait(&event) {
                Ok(()) => {
                    buffer.copied();
                    self.arrived(read);
                }
                Err(error) => {
                    self.give_back(buffer);
                    self.fail(error.into());
                }
            }
        }
    }

    /// Gives back a buffer whose copy or event failed: once the device has provably let go of it. When that
    /// cannot be proven, the buffer is leaked, never reused.
    fn give_back(&self, buffer: Copying) {
        let device = self.transfer.device;
        let drained = device.record(Stream::Copy).and_then(|event| device.wait(&event));
        match drained {
            Ok(()) => buffer.copied(),
            Err(_) => drop(buffer),
        }
    }

    /// A read's bytes are all in place.
    fn arrived(&mut self, read: u32) {
        let read = &self.transfer.plan.reads()[read as usize];
        self.progress.read_bytes += read.extent.len_bytes;
        for tensor in self.transfer.plan.brought(read) {
            let tensor = *tensor as usize;
            self.missing[tensor] -= 1;
            if self.missing[tensor] == 0 {
                self.ready(tensor);
            }
        }
        if let Some(progress) = &self.transfer.options.progress {
            progress(self.progress);
        }
    }

    fn ready(&mut self, tensor: usize) {
        if self.failed.is_some() || self.transfer.cancel.is_cancelled() {
            return;
        }
        let Transfer { plan, device, arenas, .. } = self.transfer;
        let placed = &plan.tensors()[tensor];
        let arena = Arc::clone(&arenas[placed.place.arena as usize]);
        let storage = Storage::Arena(device.id(), arena);
        let tensor = Tensor::new(
            placed.dtype,
            plan.shape(placed),
            storage,
            placed.place.offset_bytes,
            placed.len_bytes,
        );
        self.progress.ready_tensors += 1;
        let name = plan.name(placed);
        self.hashing.add(name, &tensor);
        (self.emit)(Ready { id: placed.id, name, is_made: placed.operation.is_some(), tensor });
    }

    fn read_failed(&mut self, read: u32, error: ReadError) {
        let Transfer { plan, model, .. } = self.transfer;
        let read = &plan.reads()[read as usize];
        let at_bytes = match error.cause {
            ReadCause::End { at_bytes } => at_bytes,
            _ => read.extent.offset_bytes,
        };
        // The first tensor of the read that the file's end, or the failed read, leaves incomplete.
        let mut brought = plan.brought(read).iter().map(|tensor| &plan.tensors()[*tensor as usize]);
        let incomplete = brought.find(|tensor| {
            let stored = plan.checkpoint().tensor(tensor.id);
            stored.file_offset_bytes + stored.info.len_bytes() > at_bytes
        });
        let tensor = incomplete.map(|tensor| plan.name(tensor));
        self.fail(Error::read(error, &model.file_path(read.extent.file as usize), tensor));
    }

    /// Keeps the first error and stops the lanes.
    fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
        self.transfer.cancel.cancel();
    }
}

/// How long a filled buffer may wait for its device to be asked again; a copy of 4 MiB takes 80 us on PCIe 5.
const EVENT_POLL: Duration = Duration::from_micros(50);
