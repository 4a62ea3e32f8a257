//! The transfer: lanes read beside the preparation of the devices, and one thread takes what they bring.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use tensorhaul_io::{Access, Counts, Done, Engine, ReadCause, ReadError, Sink};
use tensorhaul_plan::{Brought, Plan};
use tensorhaul_stage::Ring;

use crate::arrivals::Arrivals;
use crate::assignment::Assignment;
use crate::cancel::Cancel;
use crate::checksum::{self, Hashing};
use crate::error::{Error, ErrorKind, Result};
use crate::gate::Gate;
use crate::handover::Emit;
use crate::model::Inner;
use crate::options::{LoadOptions, Preference};
use crate::prepare::{Prepared, PreparedDevice, Preparing};
use crate::queue::Queue;
use crate::storage;

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
            let (mut counts, mut lost) = (Counts::default(), None);
            for message in messages {
                match message {
                    Message::Ended(ended) => counts += ended,
                    Message::Lost(read, error) => lost = lost.or(Some((read, error))),
                    Message::Done(_) => {} // Its buffer goes back.
                }
            }
            // Storage may write there for ever, so nothing is read there again.
            if let Some((read, error)) = lost {
                return Err(self.read_error(read, error));
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

    /// Tells what a failed read was of: the first tensor that the file's end, or the read, leaves incomplete.
    pub(crate) fn read_error(&self, read: u32, error: ReadError) -> Error {
        let Transfer { plan, model, .. } = self;
        let read = &plan.reads()[read as usize];
        let at_bytes = match error.cause {
            ReadCause::End { at_bytes } => at_bytes,
            _ => read.extent.offset_bytes,
        };
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
        let is_at_end = matches!(error.cause, ReadCause::End { .. });
        let error = Error::read(error, &model.file_path(read.extent.file as usize), tensor);
        let is_preferred = self.options.direct_storage == Preference::Preferred;
        // The library took the file and read its first page: nothing was read twice, and the caller may do without.
        if is_preferred && error.kind() == ErrorKind::Io && !is_at_end && storage::is_by_storage(plan, read) {
            return error.with_remedy("load without direct storage, through the staging ring");
        }
        error
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
pub(crate) enum Message {
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
