//! The rounds of a shared load: reads become copies and packed bytes, one exchange follows, what came is taken apart and dequantized.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tensorhaul_device::dequantize::{Layout, Output};
use tensorhaul_device::{
    Dequantize, Device, DeviceError, Event, Location, Operation, Source, Stream, Strided,
};
use tensorhaul_exchange::{Exchange, ExchangeError};
use tensorhaul_io::{Access, Counts, Done, JobMemory, ReadError, Sink};
use tensorhaul_plan::plan::Copy;
use tensorhaul_plan::share::Turn;
use tensorhaul_plan::{Brought, Share};
use tensorhaul_stage::{Copying, Filled, Pinned, Ring};

use super::copies::{Out, messages};
use super::feed::{RoundFeed, Window};
use super::memory::Memory;
use crate::cancel::Cancel;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Inner;
use crate::options::LoadOptions;
use crate::pipeline::Lane;
use crate::progress::Progress;

/// Everything that rounds need.
pub(super) struct Rounds<'r> {
    pub(super) model: &'r Inner,
    pub(super) share: &'r Share,
    pub(super) exchange: &'r dyn Exchange,
    pub(super) device: &'r Arc<dyn Device>,
    pub(super) memory: &'r Memory,
    pub(super) pinned: &'r Pinned,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Moved {
    pub(super) engines: Counts,
    pub(super) read_bytes: u64,
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
    pub(super) operations: u64,
}

impl Rounds<'_> {
    /// Runs every lane and every round to its end.
    ///
    /// On error the lanes stop, the exchange is aborted, and what is in flight is waited for: when this returns, no thread and no device touches
    /// the load's memory, or that memory is leaked.
    pub(super) fn run(
        &self,
        lanes: &[Lane],
        access: &[Access],
        ring: &Ring,
        cancel: &Cancel,
        options: &LoadOptions,
    ) -> Result<Moved> {
        let round_of = self.round_of();
        let ahead = ring.layout().buffer_count().clamp(1, 2) as usize;
        let window = Window::new(ahead);
        let (sender, messages) = mpsc::channel();
        thread::scope(|scope| {
            let _guard = StopLanes(cancel);
            for lane in lanes {
                let reads = lane.reads.iter().map(|read| (*read, round_of[read])).collect();
                let next = Mutex::new(0);
                let feed =
                    RoundFeed { plan: self.share.plan(), access, reads, next, window: &window, ring, cancel };
                let answers = Answers { sender: sender.clone() };
                let run = move || {
                    let counts = lane.engine.run(&feed, &answers);
                    answers.tell(Answer::Ended(counts));
                };
                let name = format!("tensorhaul-{}", lane.engine.name());
                if let Err(error) = thread::Builder::new().name(name).spawn_scoped(scope, run) {
                    cancel.cancel();
                    return Err(Error::new(ErrorKind::OutOfMemory, error));
                }
            }
            drop(sender);
            let mut turns = Turns {
                rounds: self,
                rank: self.exchange.rank(),
                filled: BTreeMap::new(),
                next: 0,
                copying: VecDeque::new(),
                copied: 0,
                exchanged: [None, None],
                made: VecDeque::new(),
                window: &window,
                ahead,
                cancel,
                moved: Moved::default(),
                asked_at: Instant::now(),
                moved_at: Instant::now(),
                options,
            };
            let taken = turns.take_all(&messages);
            if taken.is_err() {
                cancel.cancel();
                self.exchange.abort();
            }
            // What else comes holds a buffer, which goes back.
            for message in messages {
                if let Answer::Ended(counts) = message {
                    turns.moved.engines += counts;
                }
            }
            taken.map(|()| turns.moved) // Here the turns go, which waits for the device.
        })
    }

    fn round_of(&self) -> BTreeMap<u32, usize> {
        let rank = self.exchange.rank() as usize;
        let rounds = 0..self.share.round_count();
        rounds
            .flat_map(|round| self.share.round(round)[rank].reads.clone().map(move |read| (read, round)))
            .collect()
    }
}

/// Stops the lanes when a callback of the caller's panics: they would wait for staging buffers for ever.
struct StopLanes<'c>(&'c Cancel);

impl Drop for StopLanes<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.cancel();
        }
    }
}

/// What lanes tell.
enum Answer {
    Done(Done),
    Lost(u32, ReadError),
    Ended(Counts),
}

struct Answers {
    sender: Sender<Answer>,
}

impl Answers {
    fn tell(&self, answer: Answer) {
        // The receiver outlives every lane.
        let _ = self.sender.send(answer);
    }
}

impl Sink for Answers {
    fn done(&self, done: Done) {
        self.tell(Answer::Done(done));
    }

    fn lost(&self, read: u32, error: ReadError) {
        self.tell(Answer::Lost(read, error));
    }
}

/// Does one round after the other, on the thread that called the load.
struct Turns<'t> {
    rounds: &'t Rounds<'t>,
    rank: u32,
    /// What was read and not copied yet.
    filled: BTreeMap<u32, Filled>,
    /// The round to do next.
    next: usize,
    /// Buffers that the device is copying from, oldest first, by round.
    copying: VecDeque<(Event, Vec<Copying>)>,
    /// How many rounds have given their buffers back.
    copied: usize,
    /// Behind the last exchange out of each send buffer.
    exchanged: [Option<Event>; 2],
    /// Behind the operations of rounds that have any, oldest first, until copies are behind them too.
    made: VecDeque<(u32, Event)>,
    window: &'t Window,
    /// How many rounds may be read and not given back.
    ahead: usize,
    cancel: &'t Cancel,
    moved: Moved,
    /// When the peers were last asked for.
    asked_at: Instant,
    /// When the device last had something done, or was given something to do.
    moved_at: Instant,
    options: &'t LoadOptions,
}

impl Turns<'_> {
    fn take_all(&mut self, messages: &Receiver<Answer>) -> Result<()> {
        let round_count = self.rounds.share.round_count();
        loop {
            while self.next < round_count && self.is_read(self.next) {
                self.round()?;
                self.take_copied()?;
            }
            self.take_copied()?;
            if self.next == round_count {
                return self.finish();
            }
            self.check_peers()?;
            if !self.copying.is_empty() {
                self.check_time()?; // What copies wait for is an exchange; storage takes the time it takes.
            }
            let poll = if self.copying.is_empty() { PEER_POLL } else { EVENT_POLL };
            match messages.recv_timeout(poll) {
                Ok(Answer::Done(done)) => self.done(done)?,
                Ok(Answer::Lost(read, error)) => return Err(self.read_failed(read, error)),
                Ok(Answer::Ended(counts)) => self.moved.engines += counts,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) if self.cancel.is_cancelled() => {
                    return Err(Error::cancelled());
                }
                // All is read, and the window moves no more: what is left is rounds in which this rank reads nothing.
                Err(RecvTimeoutError::Disconnected) => unreachable!("every round's reads are somebody's"),
            }
        }
    }

    fn turn(&self, round: usize) -> &Turn {
        &self.rounds.share.round(round)[self.rank as usize]
    }

    fn is_read(&self, round: usize) -> bool {
        self.turn(round).reads.clone().all(|read| self.filled.contains_key(&read))
    }

    fn done(&mut self, done: Done) -> Result<()> {
        let Done { read, memory, result } = done;
        if let Err(error) = result {
            return Err(self.read_failed(read, error));
        }
        let JobMemory::Staging(filling) = memory else {
            unreachable!("reads of a share land in staging buffers");
        };
        let len_bytes = self.rounds.share.plan().reads()[read as usize].len_bytes();
        self.moved.read_bytes += len_bytes;
        self.filled.insert(read, filling.filled(len_bytes as usize));
        if let Some(progress) = &self.options.progress {
            let promised = self.rounds.share.promised(self.rank);
            progress(Progress {
                read_bytes: self.moved.read_bytes,
                total_bytes: promised.read_bytes,
                total_tensors: self.rounds.share.tensors(self.rank).count() as u64,
                ..Progress::default()
            });
        }
        Ok(())
    }

    /// Queues a round's copies, its exchange, and what follows that.
    fn round(&mut self) -> Result<()> {
        let (round, Rounds { share, memory, device, pinned, .. }) = (self.next, self.rounds);
        let turn = &share.round(round)[self.rank as usize];
        let slot = round % memory.send.len();
        self.next += 1;
        let take = |read| self.filled.remove(&read).expect("the round was read").copying(pinned);
        let buffers: Vec<_> = turn.reads.clone().map(take).collect();
        let queued = self.queue_copies(turn, slot, &buffers);
        let copied = match queued {
            Ok(event) => event,
            Err(error) => {
                self.give_back(buffers);
                return Err(error.into());
            }
        };
        let has_messages = !turn.sends.is_empty() || !turn.receives.is_empty();
        let is_followed = has_messages || !turn.operations.is_empty();
        let ordered = if is_followed { device.order(Stream::Compute, &copied) } else { Ok(()) };
        self.copying.push_back((copied, buffers));
        self.moved_at = Instant::now();
        ordered?;
        if has_messages {
            self.exchange(turn, slot)?;
        }
        if !turn.operations.is_empty() {
            turn.operations.iter().try_for_each(|operation| self.dequantize(*operation))?;
            self.moved.operations += turn.operations.len() as u64;
            self.made.push_back((round as u32, device.record(Stream::Compute)?));
        }
        Ok(())
    }

    /// Queues a round's messages, and takes apart what came in the receive buffer.
    fn exchange(&mut self, turn: &Turn, slot: usize) -> Result<()> {
        let Rounds { exchange, device, memory, .. } = self.rounds;
        let (sends, receives) = messages(turn, slot, memory);
        // SAFETY: arenas and buffers live until the streams were waited for, or are leaked. The copies that fill the send buffer are
        // before this on the stream, the next into it will be behind the event below, and what is received has its place alone: operations
        // whose sources lay there are before this on the stream.
        unsafe { exchange.exchange(device, Stream::Compute, &sends, &receives)? };
        self.moved.sent_bytes += sends.iter().map(|send| send.len_bytes).sum::<u64>();
        self.moved.received_bytes += receives.iter().map(|receive| receive.len_bytes).sum::<u64>();
        turn.unpacked.iter().try_for_each(|copy| self.unpack(copy))?;
        self.exchanged[slot] = Some(device.record(Stream::Compute)?);
        Ok(())
    }

    /// Queues an operation of this rank's own, whose sources are all there or before it on the stream.
    fn dequantize(&self, number: u32) -> Result<(), DeviceError> {
        let Rounds { share, device, memory, .. } = self.rounds;
        let operation = &share.plan().operations()[number as usize];
        let source = |source: &tensorhaul_plan::Source| Source {
            role: source.role,
            start: memory.location(source.place),
            len_bytes: source.len_bytes,
        };
        let sources: Vec<_> = operation.sources.iter().map(source).collect();
        let dtype = share.plan().tensors()[operation.tensor as usize].dtype;
        let layout = if operation.is_transposed { Layout::Columns } else { Layout::Rows };
        let dequantize = Operation::Dequantize(Dequantize {
            recipe: &operation.recipe,
            sources: &sources,
            target: memory.location(operation.place),
            output: Output { dtype, layout },
        });
        // SAFETY: the arenas live until the streams were waited for. What the sources are made of is before this on the stream; what
        // takes their place is on it too, or is ordered behind the event that is recorded after this. Nobody else knows of the target yet.
        unsafe { device.run(&dequantize, Stream::Compute) }
    }

    /// Queues the copies out of a round's staging buffers: into the rank's own tensors, and packed for others.
    fn queue_copies(&mut self, turn: &Turn, slot: usize, buffers: &[Copying]) -> Result<Event, DeviceError> {
        let Rounds { share, device, memory, .. } = self.rounds;
        if let Some(exchanged) = &self.exchanged[slot] {
            device.order(Stream::Copy, exchanged)?;
        }
        if let Some(after) = turn.after {
            self.order_behind_operations(after)?;
        }
        for (read, buffer) in turn.reads.clone().zip(buffers) {
            let own = share.own_copies(self.rank, read).map(|copy| Out::own(copy, memory));
            let packed = turn.packed.iter().filter(|packed| packed.read == read);
            let outs = own.chain(packed.map(|packed| Out::packed(packed, &memory.send[slot])));
            let (single, strided): (Vec<_>, Vec<_>) = outs.partition(|out| out.strides.piece_count == 1);
            let pieces: Vec<_> = single.iter().map(Out::piece).collect();
            // SAFETY: the buffer is of this device's staging memory, and goes back to the ring only when an event recorded
            // after the copies is complete. Copies of a share are disjoint and inside their memory, and what was in the send buffer before was
            // sent before the event above.
            unsafe { device.copy_pieces(buffer.bytes(), &pieces, Stream::Copy)? };
            for out in strided {
                let source = &buffer.bytes()[out.source_offset_bytes as usize..];
                // SAFETY: as above.
                unsafe { device.copy_strided(source, out.target, out.strides, Stream::Copy)? };
            }
        }
        device.record(Stream::Copy)
    }

    /// Makes copies from now on wait for the operations of rounds up to this one.
    fn order_behind_operations(&mut self, round: u32) -> Result<(), DeviceError> {
        let mut last = None;
        while self.made.front().is_some_and(|(made, _)| *made <= round) {
            last = self.made.pop_front();
        }
        last.map_or(Ok(()), |(_, event)| self.rounds.device.order(Stream::Copy, &event))
    }

    /// Queues a copy out of the receive buffer to where the bytes belong.
    fn unpack(&self, copy: &Copy) -> Result<(), DeviceError> {
        let Rounds { device, memory, .. } = self.rounds;
        let source = Location { allocation: &memory.receive, offset_bytes: copy.source_offset_bytes };
        let target = memory.location(copy.target);
        if copy.steps.is_once() && device.can_reach(device.id()) {
            // SAFETY: both are this device's, behind the exchange on its stream and before the next one into the same buffer; nobody else
            // writes where these bytes belong.
            return unsafe {
                device.copy_from_peer(device.id(), source, target, copy.len_bytes, Stream::Compute)
            };
        }
        let strided = Operation::Strided(Strided {
            source,
            source_stride_bytes: copy.steps.source_stride_bytes,
            target,
            target_stride_bytes: copy.steps.target_stride_bytes,
            piece_len_bytes: copy.len_bytes,
            piece_count: copy.steps.count,
        });
        // SAFETY: as above.
        unsafe { device.run(&strided, Stream::Compute) }
    }

    /// Gives buffers back whose copies are done, and lets further rounds be read.
    fn take_copied(&mut self) -> Result<()> {
        while let Some((event, _)) = self.copying.front() {
            if !self.rounds.device.is_complete(event)? {
                return Ok(());
            }
            if let Some((_, buffers)) = self.copying.pop_front() {
                buffers.into_iter().for_each(Copying::copied);
            }
            self.copied += 1;
            self.moved_at = Instant::now();
            self.window.move_to(self.copied + self.ahead);
        }
        Ok(())
    }

    /// Waits until everything is where it belongs.
    fn finish(&mut self) -> Result<()> {
        let device = self.rounds.device;
        for stream in [Stream::Copy, Stream::Compute] {
            let last = device.record(stream)?;
            while !device.is_complete(&last)? {
                self.check_peers()?;
                self.check_time()?;
                thread::sleep(EVENT_POLL);
            }
        }
        self.take_copied()
    }

    /// Asks now and then whether the others are still there: what they do not send never comes.
    fn check_peers(&mut self) -> Result<()> {
        if self.asked_at.elapsed() >= PEER_POLL {
            self.rounds.exchange.check()?;
            self.asked_at = Instant::now();
        }
        Ok(())
    }

    /// Gives up on a device that waits for peers which are there and do not send.
    fn check_time(&self) -> Result<()> {
        let after = self.rounds.exchange.timeout();
        if self.moved_at.elapsed() > after {
            return Err(ExchangeError::TimedOut { doing: "exchanging", after, missing: Vec::new() }.into());
        }
        Ok(())
    }

    /// Waits for the device, and leaks what it does not let go of.
    fn drain(&mut self) {
        let drained = self.drained();
        for (_, buffers) in self.copying.drain(..) {
            if drained {
                buffers.into_iter().for_each(Copying::copied);
            }
        }
        if !drained {
            self.rounds.memory.leak();
        }
    }

    fn give_back(&self, buffers: Vec<Copying>) {
        if self.drained() {
            buffers.into_iter().for_each(Copying::copied);
        }
    }

    fn drained(&self) -> bool {
        let device = self.rounds.device;
        let wait = |stream| device.record(stream).and_then(|event| device.wait(&event));
        let (copies, computes) = (wait(Stream::Copy), wait(Stream::Compute));
        copies.and(computes).is_ok()
    }

    fn read_failed(&self, read: u32, error: ReadError) -> Error {
        let (share, model) = (self.rounds.share, self.rounds.model);
        let plan = share.plan();
        let read = &plan.reads()[read as usize];
        // A read is for several ranks; what is stored has one name.
        let name = plan.brought(read).iter().find_map(|brought| match *brought {
            Brought::Tensor(tensor) => {
                Some(plan.checkpoint().tensor(plan.tensors()[tensor as usize].id).info.name)
            }
            Brought::Operation(_) => None,
        });
        Error::read(error, &model.file_path(read.extent.file as usize), name)
    }
}

impl Drop for Turns<'_> {
    /// However the rounds end, the device is done with their memory before that is anybody else's.
    ///
    /// When a callback of the caller's panics, peers are told first: an exchange that waits for them would never let the device be done.
    fn drop(&mut self) {
        if thread::panicking() {
            self.cancel.cancel();
            self.rounds.exchange.abort();
        }
        self.drain();
    }
}

/// How long a filled buffer may wait for its device to be asked again; a copy of 4 MiB takes 80 us on PCIe 5.
const EVENT_POLL: Duration = Duration::from_micros(50);

/// How long a peer may be gone before this rank notices.
const PEER_POLL: Duration = Duration::from_millis(20);
