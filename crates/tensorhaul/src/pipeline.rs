//! The transfer: engines fill memory, devices take it, tensors become ready. The only place that
//! sees a staging buffer and a device's event together.

use std::any::Any;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tensorhaul_device::{DeviceError, Event, Piece, Stream, StridedCopy};
use tensorhaul_io::{Access, Counts, Done, Engine, JobMemory, ReadCause, ReadError, Sink};
use tensorhaul_plan::{Brought, Copy, Plan};
use tensorhaul_stage::{Copying, Filled, Ring};

use crate::assignment::Assignment;
use crate::cancel::Cancel;
use crate::checksum::{self, Hashing};
use crate::devices;
use crate::error::{Error, Result};
use crate::external::ExternalMemory;
use crate::fan_out::FanOut;
use crate::gate::Gate;
use crate::handover::{Emit, Ready};
use crate::model::Inner;
use crate::operations::Operations;
use crate::options::LoadOptions;
use crate::prepare::{Prepared, PreparedDevice, Preparing};
use crate::progress::Progress;
use crate::queue::Queue;
use crate::tensor::{Storage, Tensor};

/// An engine and the reads it does, in order, all for one device.
pub(crate) struct Lane {
    pub(crate) device: usize,
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) reads: Vec<u32>,
}

/// Everything a transfer needs.
pub(crate) struct Transfer<'t> {
    pub(crate) model: &'t Inner,
    pub(crate) plan: &'t Plan,
    pub(crate) assignment: &'t Assignment,
    /// For each device, its own, if anything is staged for it.
    pub(crate) rings: &'t [Option<Ring>],
    pub(crate) options: &'t LoadOptions,
    pub(crate) cancel: &'t Cancel,
}

/// How a transfer ended, when nothing failed.
pub(crate) enum Ended {
    /// Every byte is in place.
    Complete(Transferred, Prepared),
    /// A device refused to pin the ring that its lanes were reading into. All lanes were stopped, and what they had read
    /// was let go; no tensor was emitted.
    Refused(Vec<PreparedDevice>, Dropped),
}

/// What lanes read in vain.
pub(crate) struct Dropped {
    pub(crate) bytes: u64,
    pub(crate) counts: Counts,
}

/// What a transfer did.
pub(crate) struct Transferred {
    pub(crate) counts: Counts,
    pub(crate) first_byte: Option<Instant>,
    /// When the first copy was seen to be complete.
    pub(crate) first_copy: Option<Instant>,
    pub(crate) ahead: Ahead,
    /// When every byte was in place; checksums may have taken longer.
    pub(crate) finished: Instant,
    pub(crate) checksums: Option<BTreeMap<String, String>>,
}

/// What had landed when the devices were ready for it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ahead {
    pub(crate) bytes: u64,
    pub(crate) last_byte: Option<Instant>,
}

impl Transfer<'_> {
    /// Runs every lane to its end, and emits each tensor when its last byte is in place.
    ///
    /// Where devices are prepared beside the reads, filled buffers wait in the channel, which the rings bound.
    ///
    /// On error the lanes stop at their next read, what is in flight is waited for, and the first error
    /// is returned: when this returns, no thread, kernel or device touches the transfer's memory.
    pub(crate) fn run(
        &self,
        lanes: &[Lane],
        access: &[Access],
        preparing: Preparing<'_>,
        emit: &mut Emit<'_>,
    ) -> Result<Ended> {
        let mut landing = vec![None; self.plan.arenas().len()];
        for (arena, memory) in preparing.done.iter().flat_map(|device| &device.arenas) {
            landing[*arena as usize] = Some(Arc::clone(memory));
        }
        let mut ended = None;
        let checksums = checksum::with_pool(self.options.checksums, |hashing| {
            let (sender, messages) = mpsc::channel();
            let landed = Mutex::new(Landed::default());
            let gate = Gate::new(self.assignment.operations());
            thread::scope(|scope| {
                let _guard = StopLanes(self.cancel);
                for lane in lanes {
                    let answers = Answers { sender: sender.clone(), plan: self.plan, landed: &landed };
                    let (reads, next) = (&*lane.reads, AtomicUsize::new(0));
                    let (plan, ring, cancel) = (self.plan, self.rings[lane.device].as_ref(), self.cancel);
                    let queue = Queue {
                        plan,
                        access,
                        reads,
                        next,
                        landing: &landing,
                        ring,
                        gate: &gate,
                        assignment: self.assignment,
                        cancel,
                    };
                    let run = move || {
                        let counts = lane.engine.run(&queue, &answers);
                        answers.tell(Message::Ended(counts));
                    };
                    let name = format!("tensorhaul-{}", lane.engine.name());
                    if let Err(error) = thread::Builder::new().name(name).spawn_scoped(scope, run) {
                        self.cancel.cancel();
                        return Err(Error::new(crate::ErrorKind::OutOfMemory, error));
                    }
                }
                drop(sender);
                ended = Some(self.take(&messages, &landed, &gate, preparing, hashing, emit)?);
                Ok(())
            })
        })?;
        let mut ended = ended.expect("a load without an error has ended");
        if let Ended::Complete(transferred, _) = &mut ended {
            transferred.checksums = checksums;
        }
        Ok(ended)
    }

    /// Makes the devices ready, then takes what the lanes have read meanwhile, and the rest.
    fn take(
        &self,
        messages: &Receiver<Message>,
        landed: &Mutex<Landed>,
        gate: &Gate,
        preparing: Preparing<'_>,
        hashing: &Hashing,
        emit: &mut Emit<'_>,
    ) -> Result<Ended> {
        let Preparing { done: mut prepared, beside } = preparing;
        let mut ahead = Ahead::default();
        if let Some(prepare) = beside {
            match prepare() {
                Ok(others) => prepared.extend(others),
                Err(error) => {
                    self.cancel.cancel(); // The lanes stop; what they have read is dropped with the channel.
                    return Err(error);
                }
            }
            ahead = lock(landed).ahead;
        }
        if prepared.iter().any(|device| device.pinned.is_none() && self.rings[device.number].is_some()) {
            self.rings.iter().flatten().for_each(Ring::close);
            gate.close();
            let mut counts = Counts::default();
            for message in messages {
                if let Message::Ended(ended) = message {
                    counts += ended; // What else comes holds a buffer, which goes back.
                }
            }
            let dropped = Dropped { bytes: lock(landed).ahead.bytes, counts };
            return Ok(Ended::Refused(prepared, dropped));
        }
        let prepared = Prepared::new(prepared);
        let mut arrivals = Arrivals::new(self, &prepared, gate, hashing, emit);
        arrivals.take_all(messages);
        let transferred = Transferred {
            counts: arrivals.counts,
            first_byte: lock(landed).first_byte,
            first_copy: arrivals.first_copy,
            ahead,
            finished: Instant::now(),
            checksums: None,
        };
        arrivals.result()?;
        Ok(Ended::Complete(transferred, prepared))
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

/// What lanes tell the transfer.
enum Message {
    Done(Done),
    Lost(u32, ReadError),
    Ended(Counts),
}

/// What has landed so far, noted where it lands: the loading thread may be busy with the device.
#[derive(Default)]
struct Landed {
    first_byte: Option<Instant>,
    ahead: Ahead,
}

struct Answers<'a> {
    sender: Sender<Message>,
    plan: &'a Plan,
    landed: &'a Mutex<Landed>,
}

impl Answers<'_> {
    fn tell(&self, message: Message) {
        // The receiver outlives every lane.
        let _ = self.sender.send(message);
    }
}

impl Sink for Answers<'_> {
    fn done(&self, done: Done) {
        if done.result.is_ok() {
            let (mut landed, now) = (lock(self.landed), Instant::now());
            landed.first_byte.get_or_insert(now);
            landed.ahead.last_byte = Some(now);
            landed.ahead.bytes += self.plan.reads()[done.read as usize].len_bytes();
        }
        self.tell(Message::Done(done));
    }

    fn lost(&self, read: u32, error: ReadError) {
        self.tell(Message::Lost(read, error));
    }
}

/// A panic elsewhere cannot leave what landed half noted in a way that matters: it is figures for the report.
fn lock(landed: &Mutex<Landed>) -> MutexGuard<'_, Landed> {
    landed.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes what arrives, on the thread that called the load.
struct Arrivals<'a, 'e> {
    transfer: &'a Transfer<'a>,
    prepared: &'a Prepared,
    gate: &'a Gate,
    hashing: &'a Hashing,
    emit: &'a mut Emit<'e>,
    /// Reads and operations that each tensor still waits for.
    missing: Vec<u32>,
    /// Reads that each operation still waits for.
    missing_sources: Vec<u32>,
    /// For each device, the buffers of its ring that are being copied from, oldest first.
    copying: Vec<VecDeque<Copies>>,
    operations: Operations,
    fan_out: FanOut,
    /// Whether each tensor is on an earlier device, too; its checksum is computed there. Empty on a single device.
    is_repeated: Vec<bool>,
    failed: Option<Error>,
    counts: Counts,
    first_copy: Option<Instant>,
    progress: Progress,
}

/// Copies out of one buffer, to one device or several.
struct Copies {
    /// What marks their end on each device that they are not known to be over on.
    ends: Vec<(usize, Event)>,
    buffer: Copying,
    read: u32,
}

impl<'a, 'e> Arrivals<'a, 'e> {
    fn new(
        transfer: &'a Transfer<'a>,
        prepared: &'a Prepared,
        gate: &'a Gate,
        hashing: &'a Hashing,
        emit: &'a mut Emit<'e>,
    ) -> Arrivals<'a, 'e> {
        let (plan, assignment) = (transfer.plan, transfer.assignment);
        let progress = Progress {
            total_bytes: plan.promised().read_bytes,
            total_tensors: plan.tensors().len() as u64,
            ..Progress::default()
        };
        Arrivals {
            transfer,
            prepared,
            gate,
            hashing,
            emit,
            missing: plan.tensors().iter().map(|tensor| tensor.read_count + tensor.operation_count).collect(),
            is_repeated: repeated(plan, assignment),
            missing_sources: plan.operations().iter().map(|operation| operation.read_count).collect(),
            copying: assignment.devices().iter().map(|_| VecDeque::new()).collect(),
            operations: Operations::new(assignment),
            fan_out: FanOut::new(plan, assignment),
            failed: None,
            counts: Counts::default(),
            first_copy: None,
            progress,
        }
    }

    fn take_all(&mut self, messages: &Receiver<Message>) {
        // What has no bytes to wait for.
        for tensor in 0..self.missing.len() {
            if self.missing[tensor] == 0 && self.transfer.plan.tensors()[tensor].copy_of.is_none() {
                self.whole(tensor);
            }
        }
        for number in 0..self.missing_sources.len() as u32 {
            if self.missing_sources[number as usize] == 0 {
                self.make(number);
            }
        }
        loop {
            let message = if self.is_idle() {
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
            self.take_made();
            self.take_fanned_out();
        }
        self.drain();
    }

    /// Tells whether nothing is under way on any device.
    fn is_idle(&self) -> bool {
        let is_copied = self.copying.iter().all(VecDeque::is_empty);
        is_copied && self.operations.are_over() && self.fan_out.is_over()
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
        match memory {
            memory @ (JobMemory::InPlace(_) | JobMemory::Device(_)) => {
                drop(memory);
                self.arrived(read);
            }
            JobMemory::Staging(filling) => {
                let len_bytes = self.transfer.plan.reads()[read as usize].len_bytes();
                self.copy(read, filling.filled(len_bytes as usize));
            }
        }
    }

    /// Queues the copies out of a filled buffer.
    fn copy(&mut self, read: u32, filled: Filled) {
        if self.failed.is_some() {
            return; // The load has failed; the buffer goes back, and nobody needs its bytes.
        }
        let Transfer { plan, assignment, .. } = *self.transfer;
        let owner = assignment.of_read(read);
        let pinned = self.prepared.devices[owner].pinned.as_ref();
        let buffer = filled.copying(pinned.expect("a ring that is not pinned was refused above"));
        let fed = assignment.fed_by(plan, &plan.reads()[read as usize]);
        let mut ends = Vec::with_capacity(fed.len());
        for at in &fed {
            match self.queue_copies(read, &buffer, *at) {
                Ok(event) => ends.push((*at, event)),
                Err(error) => {
                    self.give_back(buffer, &fed);
                    return self.fail(error.into());
                }
            }
        }
        self.copying[owner].push_back(Copies { ends, buffer, read });
    }

    /// Queues the copies out of a buffer that go to one device.
    fn queue_copies(
        &mut self,
        read: u32,
        buffer: &Copying,
        at: usize,
    ) -> std::result::Result<Event, DeviceError> {
        let Transfer { plan, assignment, .. } = *self.transfer;
        let (device, arenas) = (&self.prepared.devices[at].device, &self.prepared.arenas);
        let target = |copy: &Copy| &arenas[copy.target.arena as usize];
        let piece = |copy: &Copy| Piece {
            source_offset_bytes: copy.source_offset_bytes as usize,
            len_bytes: copy.len_bytes as usize,
            target: target(copy),
            target_offset_bytes: copy.target.offset_bytes,
        };
        let read = &plan.reads()[read as usize];
        self.operations.order_copies(&read.after, assignment, at, &**device)?;
        let copies = plan.copies(read).iter().filter(|copy| assignment.of_arena(copy.target.arena) == at);
        let (single, strided): (Vec<_>, Vec<_>) = copies.partition(|copy| copy.steps.is_once());
        let pieces: Vec<_> = single.into_iter().map(piece).collect();
        // SAFETY: the buffer is of staging memory that one of the load's devices has pinned, which all are of one driver but the host, and goes back to
        // the ring only when on every device it feeds an event recorded after the copies is complete; the plan's copies are disjoint and
        // inside their arenas, and a tensor is emitted only after the last of them.
        unsafe { device.copy_pieces(buffer.bytes(), &pieces, Stream::Copy)? };
        for copy in strided {
            let source = &buffer.bytes()[copy.source_offset_bytes as usize..];
            let strides = StridedCopy {
                piece_len_bytes: copy.len_bytes,
                piece_count: copy.steps.count,
                source_stride_bytes: copy.steps.source_stride_bytes,
                target_stride_bytes: copy.steps.target_stride_bytes,
                target_offset_bytes: copy.target.offset_bytes,
            };
            // SAFETY: as above.
            unsafe { device.copy_strided(source, target(copy), strides, Stream::Copy)? };
        }
        device.record(Stream::Copy)
    }

    /// Gives buffers back whose copies are done.
    fn take_copied(&mut self) {
        for owner in 0..self.copying.len() {
            while let Some(copies) = self.copying[owner].front_mut() {
                let Some((at, event)) = copies.ends.last() else {
                    if let Some(Copies { buffer, read, .. }) = self.copying[owner].pop_front() {
                        self.copied(buffer, read);
                    }
                    continue;
                };
                match self.prepared.devices[*at].device.is_complete(event) {
                    Ok(false) => break,
                    Ok(true) => drop(copies.ends.pop()),
                    Err(error) => {
                        if let Some(copies) = self.copying[owner].pop_front() {
                            self.abandon(copies);
                        }
                        self.fail(error.into());
                    }
                }
            }
        }
    }

    /// Takes what is still under way until nothing is. A single device is waited for; of several none is, because another may be done before.
    fn drain(&mut self) {
        let [PreparedDevice { device, .. }] = &*self.prepared.devices else {
            while !self.is_idle() {
                self.take_copied();
                self.take_made();
                self.take_fanned_out();
                thread::sleep(EVENT_POLL);
            }
            return;
        };
        while let Some(copies) = self.copying[0].pop_front() {
            match copies.ends.iter().try_for_each(|(_, event)| device.wait(event)) {
                Ok(()) => self.copied(copies.buffer, copies.read),
                Err(error) => {
                    self.abandon(copies);
                    self.fail(error.into());
                }
            }
        }
        while let Some((number, over)) = self.operations.wait_for_next(0, &**device) {
            self.made(number, over);
        }
    }

    fn copied(&mut self, buffer: Copying, read: u32) {
        buffer.copied();
        self.first_copy.get_or_insert_with(Instant::now);
        self.arrived(read);
    }

    /// Gives back a buffer whose copies failed on one of the devices that they are not over on.
    fn abandon(&self, copies: Copies) {
        let fed: Vec<_> = copies.ends.iter().map(|(at, _)| *at).collect();
        self.give_back(copies.buffer, &fed);
    }

    /// Gives back a buffer whose copy or event failed: once the devices have provably let go of it. When that
    /// cannot be proven, the buffer is leaked, never reused.
    fn give_back(&self, buffer: Copying, fed: &[usize]) {
        let is_drained = |at: &usize| {
            let device = &self.prepared.devices[*at].device;
            device.record(Stream::Copy).and_then(|event| device.wait(&event)).is_ok()
        };
        // Each is drained, also behind one that is not.
        match fed.iter().filter(|at| !is_drained(at)).count() {
            0 => buffer.copied(),
            _ => drop(buffer),
        }
    }

    /// A read's bytes are all in place.
    fn arrived(&mut self, read: u32) {
        let read = &self.transfer.plan.reads()[read as usize];
        self.progress.read_bytes += read.len_bytes();
        for brought in self.transfer.plan.brought(read) {
            match *brought {
                Brought::Tensor(tensor) => self.came(tensor as usize),
                Brought::Operation(number) => {
                    self.missing_sources[number as usize] -= 1;
                    if self.missing_sources[number as usize] == 0 {
                        self.make(number);
                    }
                }
            }
        }
        if let Some(progress) = &self.transfer.options.progress {
            progress(self.progress);
        }
    }

    /// One more of what a tensor waits for is done.
    fn came(&mut self, tensor: usize) {
        self.missing[tensor] -= 1;
        if self.missing[tensor] == 0 {
            self.whole(tensor);
        }
    }

    /// Every source of an operation has arrived: it can begin.
    fn make(&mut self, number: u32) {
        let operation = &self.transfer.plan.operations()[number as usize];
        if operation.len_bytes == 0 {
            self.gate.pass(number);
            return self.came(operation.tensor as usize); // There is nothing to make.
        }
        if self.failed.is_some() || self.transfer.cancel.is_cancelled() {
            return;
        }
        let Transfer { plan, assignment, .. } = *self.transfer;
        match self.operations.start(number, plan, assignment, self.prepared) {
            // Where reads land in the sources' own memory, nothing but the end of the operation keeps them apart.
            Ok(()) if !assignment.lands(assignment.of_operation(number)) => self.gate.pass(number),
            Ok(()) => {}
            Err(error) => self.fail(error.into()),
        }
    }

    /// Takes what operations have made meanwhile.
    fn take_made(&mut self) {
        for (at, prepared) in self.prepared.devices.iter().enumerate() {
            while let Some((number, over)) = self.operations.next_over(at, &*prepared.device) {
                self.made(number, over);
            }
        }
    }

    fn made(&mut self, number: u32, over: std::result::Result<(), DeviceError>) {
        match over {
            Ok(()) => {
                self.gate.pass(number);
                self.came(self.transfer.plan.operations()[number as usize].tensor as usize);
            }
            Err(error) => self.fail(error.into()),
        }
    }

    /// Every byte of a tensor is in place: it goes on to other devices, where there are copies of it, and is handed over behind that.
    fn whole(&mut self, tensor: usize) {
        let copies = self.fan_out.take_copies_of(tensor as u32);
        let mut is_kept = false;
        for copy in copies {
            if self.failed.is_some() || self.transfer.cancel.is_cancelled() {
                return;
            }
            let Transfer { plan, assignment, .. } = *self.transfer;
            if plan.tensors()[copy as usize].len_bytes == 0 {
                self.whole(copy as usize); // There is nothing to copy.
                continue;
            }
            match self.fan_out.start(copy, plan, assignment, self.prepared) {
                Ok(()) => is_kept = true,
                Err(error) => return self.fail(error.into()),
            }
        }
        if !is_kept {
            self.ready(tensor);
        }
    }

    /// Takes the tensors that were copied from device to device meanwhile.
    fn take_fanned_out(&mut self) {
        for (at, prepared) in self.prepared.devices.iter().enumerate() {
            while let Some((tensor, over)) = self.fan_out.next_over(at, &*prepared.device) {
                self.fanned_out(tensor, over);
            }
        }
    }

    fn fanned_out(&mut self, tensor: u32, over: std::result::Result<(), DeviceError>) {
        let Transfer { plan, assignment, .. } = *self.transfer;
        let copy = &plan.tensors()[tensor as usize];
        let source = copy.copy_of.expect("only copies are copied");
        match over {
            Ok(()) => {
                self.whole(tensor as usize);
                if self.fan_out.is_last_of(source) {
                    self.ready(source as usize);
                }
            }
            Err(error) => {
                let device = &self.prepared.devices[assignment.of_arena(copy.place.arena)].device;
                self.fan_out.let_go(source, plan, &**device, self.prepared);
                self.fail(error.into());
            }
        }
    }

    fn ready(&mut self, tensor: usize) {
        if self.failed.is_some() || self.transfer.cancel.is_cancelled() {
            return;
        }
        let plan = self.transfer.plan;
        let placed = &plan.tensors()[tensor];
        let is_repeated = self.is_repeated.get(tensor).copied().unwrap_or(false);
        let arena = Arc::clone(&self.prepared.arenas[placed.place.arena as usize]);
        let memory: &dyn Any = &*arena;
        let strides = memory.downcast_ref().and_then(ExternalMemory::strides).map(<[u64]>::to_vec);
        let storage = Storage::Arena(plan.device(placed), arena);
        let mut tensor = Tensor::new(
            placed.dtype,
            plan.shape(placed),
            storage,
            placed.place.offset_bytes,
            placed.len_bytes,
        );
        if let Some(strides) = strides {
            tensor = tensor.with_strides(&strides);
        }
        self.progress.ready_tensors += 1;
        let name = plan.name(placed);
        if !is_repeated {
            self.hashing.add(name, &tensor);
        }
        (self.emit)(Ready { id: placed.id, name, is_renamed: placed.name.is_some(), tensor });
    }

    fn read_failed(&mut self, read: u32, error: ReadError) {
        let Transfer { plan, model, .. } = self.transfer;
        let read = &plan.reads()[read as usize];
        let at_bytes = match error.cause {
            ReadCause::End { at_bytes } => at_bytes,
            _ => read.extent.offset_bytes,
        };
        // The first tensor of the read that the file's end, or the failed read, leaves incomplete.
        let tensor = |brought: &Brought| match *brought {
            Brought::Tensor(tensor) => &plan.tensors()[tensor as usize],
            Brought::Operation(number) => &plan.tensors()[plan.operations()[number as usize].tensor as usize],
        };
        let mut brought = plan.brought(read).iter().map(tensor);
        let incomplete = brought.find(|tensor| {
            let stored = plan.checkpoint().tensor(tensor.id);
            stored.file_offset_bytes + stored.info.len_bytes() > at_bytes
        });
        let tensor = incomplete.map(|tensor| plan.name(tensor));
        self.fail(Error::read(error, &model.file_path(read.extent.file as usize), tensor));
    }

    /// Keeps the first error and stops the lanes.
    fn fail(&mut self, error: Error) {
        devices::forget_failed(&error);
        self.failed.get_or_insert(error);
        self.transfer.cancel.cancel();
        self.gate.close();
    }
}

/// Finds the tensors that are on an earlier device, too, which comes first in a plan.
fn repeated(plan: &Plan, assignment: &Assignment) -> Vec<bool> {
    if assignment.devices().len() == 1 {
        return Vec::new();
    }
    let mut seen = HashSet::new();
    plan.tensors().iter().map(|tensor| !seen.insert(plan.name(tensor))).collect()
}

/// How long a filled buffer may wait for its device to be asked again; a copy of 4 MiB takes 80 us on PCIe 5.
const EVENT_POLL: Duration = Duration::from_micros(50);
