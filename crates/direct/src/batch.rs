//! The batch form: one thread submits reads by the dozen and asks which are done.

use std::collections::VecDeque;
use std::ffi::{c_int, c_uint, c_void};
use std::mem;
use std::ptr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tensorhaul_io::{Counts, Done, Feed, Job, Next, ReadCause, ReadError, Sink};
use tensorhaul_plan::Extent;

use crate::engine::{Direct, cause, landing};
use crate::library::{Library, within};
use crate::pieces::{next_piece, resume_at};
use crate::sys::{self, BatchEvent, BatchHandle, BatchRead};

/// Reads the feed's jobs in batches.
pub(crate) fn run(direct: &Direct, batch: &mut Batch, feed: &dyn Feed, sink: &dyn Sink) -> Counts {
    let slots = (0..batch.entries).map(|_| None).collect();
    Run { direct, batch, sink, slots, again: VecDeque::new(), counts: Counts::default() }.run(feed)
}

/// A job that is being read, and how much of it is there.
struct Active {
    job: Job,
    have: u64,
    asked: u64,
}

struct Run<'r> {
    direct: &'r Direct,
    batch: &'r mut Batch,
    sink: &'r dyn Sink,
    /// Jobs in flight, by the number their reads carry.
    slots: Vec<Option<Active>>,
    /// Jobs that came back with less than was asked for.
    again: VecDeque<Active>,
    counts: Counts,
}

impl Run<'_> {
    fn run(mut self, feed: &dyn Feed) -> Counts {
        let mut is_done = false;
        loop {
            let reads = self.gather(feed, &mut is_done);
            if !reads.is_empty()
                && let Err(why) = self.submit(reads)
            {
                return self.lose(&why, feed);
            }
            if self.in_flight() == 0 {
                if is_done {
                    return self.counts;
                }
                continue; // Everything gathered was answered at once.
            }
            match self.batch.wait(self.slots.len()) {
                Ok(events) => {
                    if let Err(why) = self.take_all(events) {
                        return self.lose(&why, feed);
                    }
                }
                Err(why) => return self.lose(&why, feed),
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Fills free slots, waiting for a job only when nothing is in flight.
    fn gather(&mut self, feed: &dyn Feed, is_done: &mut bool) -> Vec<BatchRead> {
        let mut reads = Vec::new();
        while let Some(slot) = self.slots.iter().position(Option::is_none) {
            let active = match self.again.pop_front() {
                Some(active) => active,
                None if *is_done => break,
                None => match feed.next(self.in_flight() == 0) {
                    Next::Job(job) => {
                        self.counts.requests += 1;
                        Active { job, have: 0, asked: 0 }
                    }
                    Next::Busy => break,
                    Next::Done => {
                        *is_done = true;
                        break;
                    }
                },
            };
            if let Some(read) = self.place(active, slot) {
                reads.push(read);
            }
        }
        reads
    }

    /// Puts a job's next piece into a slot; `None` when none is left, and the job is answered.
    fn place(&mut self, mut active: Active, slot: usize) -> Option<BatchRead> {
        let extent = active.job.extent;
        let (base, offset_bytes) = {
            let landing = landing(&active.job.memory);
            (landing.base(), landing.offset_bytes() + active.have)
        };
        let at_bytes = extent.offset_bytes + active.have;
        let file = self.direct.file(extent.file);
        let piece = match next_piece(self.direct.library.vendor(), extent, active.have) {
            Some(piece) if piece.is_tail => {
                self.counts.system_calls += 1;
                let read = self.direct.read_tail(file, at_bytes, piece.len_bytes, base, offset_bytes);
                self.answer(active.job, read);
                return None;
            }
            Some(piece) => piece,
            None => {
                self.answer(active.job, Ok(()));
                return None;
            }
        };
        active.asked = piece.len_bytes;
        self.slots[slot] = Some(active);
        Some(BatchRead {
            mode: sys::BATCH_MODE,
            base: ptr::with_exposed_provenance_mut(base as usize),
            file_offset: at_bytes as i64,
            base_offset: offset_bytes as i64,
            len: piece.len_bytes as usize,
            handle: file.registered.handle(),
            operation: sys::BATCH_READ,
            cookie: ptr::without_provenance_mut(slot + 1),
        })
    }

    fn submit(&mut self, mut reads: Vec<BatchRead>) -> Result<(), String> {
        self.counts.system_calls += 1;
        // SAFETY: files are registered; every range is a job's own, and the job stays in its slot until its event.
        unsafe { self.batch.submit(&mut reads) }
    }

    /// Takes what is told of reads; the error is a state that leaves open whether storage still writes.
    fn take_all(&mut self, events: Vec<BatchEvent>) -> Result<(), String> {
        let (mut is_any_over, mut result) = (false, Ok(()));
        for event in events {
            match state(event.status) {
                State::UnderWay => {}
                State::Over(why) => {
                    is_any_over = true;
                    self.take(event, why);
                }
                State::Unsure(why) => result = Err(why),
            }
        }
        if !is_any_over {
            thread::sleep(NOTHING_OVER); // A library that tells of what is under way does not wait for it.
        }
        result
    }

    /// Takes a read that is over, and why it is not complete.
    fn take(&mut self, event: BatchEvent, why: Option<&str>) {
        let slot = event.cookie.addr().checked_sub(1).and_then(|slot| self.slots.get_mut(slot));
        let Some(mut active) = slot.and_then(Option::take) else { return };
        let at_bytes = active.job.extent.offset_bytes + active.have;
        let result = event.result as isize;
        let read = match why {
            Some(why) if result >= 0 => Err(ReadCause::Library(format!("a read in a batch {why}").into())),
            _ => self.direct.library.event_result(result).map_err(cause),
        };
        let next = match read {
            Ok(0) => Err(ReadCause::End { at_bytes }),
            Ok(read) => {
                resume_at(self.direct.library.vendor(), active.have + read.min(active.asked), active.have)
            }
            Err(cause) => Err(cause),
        };
        match next {
            Ok(have) if have == active.job.extent.len_bytes => self.answer(active.job, Ok(())),
            Ok(have) => {
                active.have = have;
                self.again.push_back(active);
            }
            Err(cause) => self.answer(active.job, Err(self.direct.blame(cause))),
        }
    }

    fn answer(&self, job: Job, result: Result<(), ReadCause>) {
        let Job { read, extent, memory, .. } = job;
        self.sink.done(Done { read, memory, result: result.map_err(|cause| ReadError { extent, cause }) });
    }

    /// Gives up on a library that no longer answers, and fails the load with the error.
    ///
    /// What it still tells the end of, once everything is cancelled, is over. Into the others storage may write for ever: whatever that takes is kept, the
    /// batch included.
    fn lose(mut self, why: &str, feed: &dyn Feed) -> Counts {
        self.batch.cancel();
        let began = Instant::now();
        while self.in_flight() > 0
            && let Some(left) = LAST_EVENTS.checked_sub(began.elapsed())
            && let Ok(events) = self.batch.wait_until(self.slots.len(), left)
            && !events.is_empty()
        {
            // What is not sure now is told of anew, or stays in its slot.
            let _ = self.take_all(events);
        }
        for active in mem::take(&mut self.again) {
            self.answer(active.job, Err(self.direct.blame(ReadCause::Library(why.into()))));
        }
        let lost = self.keep();
        let told = format!(
            "{why}; {} reads may still be under way, so their memory, files and library are kept until the process ends",
            lost.len()
        );
        for (read, extent) in lost {
            let cause = self.direct.blame(ReadCause::Library(told.as_str().into()));
            self.sink.lost(read, ReadError { extent, cause });
        }
        self.direct.answer_all(feed, self.sink, why);
        self.counts
    }

    /// Keeps, for good, everything that reads use whose end nobody knows; returns which those are.
    fn keep(&mut self) -> Vec<(u32, Extent)> {
        let lost: Vec<_> = self.slots.iter_mut().filter_map(Option::take).collect();
        if !lost.is_empty() {
            tracing::warn!(reads = lost.len(), "direct storage: reads may be under way for ever");
            self.direct.lose();
            self.batch.is_lost = true;
        }
        let keep = |Active { job: Job { read, extent, memory, .. }, .. }| {
            mem::forget(memory);
            (read, extent)
        };
        lost.into_iter().map(keep).collect()
    }
}

impl Drop for Run<'_> {
    /// Nothing is in flight here, unless a panic elsewhere ended the run.
    fn drop(&mut self) {
        self.keep();
    }
}

/// What a library says of a read in a batch.
enum State {
    /// Storage may still write.
    UnderWay,
    /// Storage writes no more; why it is not complete, if it is not.
    Over(Option<&'static str>),
    /// Whether storage still writes, this does not say.
    Unsure(String),
}

/// Only the states that NVIDIA documents as a read's end are one.
///
/// # Source
/// NVIDIA, cuFile API reference, `CUfileStatus_t`.
fn state(status: c_int) -> State {
    let over = sys::BATCH_OVER.iter().find(|(number, _)| *number == status);
    match (status, over) {
        (sys::BATCH_COMPLETE, _) => State::Over(None),
        (_, Some((_, why))) => State::Over(Some(why)),
        _ if sys::BATCH_UNDER_WAY.contains(&status) => State::UnderWay,
        (sys::BATCH_TIMEOUT, _) => State::Unsure("a read in a batch timed out".to_owned()),
        _ => State::Unsure(format!("a read in a batch has the unknown status {status:#x}")),
    }
}

/// A batch of the library's.
pub(crate) struct Batch {
    library: Arc<Library>,
    handle: BatchHandle,
    /// How many reads it takes at once.
    entries: u32,
    /// Whether reads of it may be under way that nobody waits for: it is then never destroyed.
    is_lost: bool,
}

// SAFETY: the library asks for no thread in particular, and a batch is used by one at a time.
unsafe impl Send for Batch {}

impl Batch {
    /// Sets a batch up for so many reads, with the device current; the error is why there is none.
    pub(crate) fn set_up(library: &Arc<Library>, entries: u32) -> Result<Batch, String> {
        let set_up = library.table().batch_set_up.ok_or("the library has no batches")?;
        let mut handle = ptr::null_mut::<c_void>();
        // SAFETY: writes the handle.
        let status = unsafe { set_up(&raw mut handle, entries) };
        library.check("BatchIOSetUp", status).map_err(|error| error.to_string())?;
        Ok(Batch { library: Arc::clone(library), handle, entries, is_lost: false })
    }

    /// # Safety
    /// Every read's file is registered, and its range of device memory nobody else touches until its event was taken.
    unsafe fn submit(&self, reads: &mut [BatchRead]) -> Result<(), String> {
        let submit = self.library.table().batch_submit.ok_or("the library has no batches")?;
        // SAFETY: the caller's promise; the library copies the list.
        let status = unsafe { submit(self.handle, reads.len() as c_uint, reads.as_mut_ptr(), 0) };
        self.library.check("BatchIOSubmit", status).map_err(|error| error.to_string())
    }

    /// Waits for one read at least, and returns all that are done.
    fn wait(&self, entries: usize) -> Result<Vec<BatchEvent>, String> {
        self.events(entries, ptr::null_mut())
    }

    /// Waits for one read at least, or so long, and returns all that are done.
    fn wait_until(&self, entries: usize, time: Duration) -> Result<Vec<BatchEvent>, String> {
        let mut time =
            libc::timespec { tv_sec: time.as_secs() as libc::time_t, tv_nsec: time.subsec_nanos().into() };
        self.events(entries, &raw mut time)
    }

    fn events(&self, entries: usize, time: *mut libc::timespec) -> Result<Vec<BatchEvent>, String> {
        let wait = self.library.table().batch_status.ok_or("the library has no batches")?;
        let mut events = vec![BatchEvent { cookie: ptr::null_mut(), status: 0, result: 0 }; entries];
        let mut count = entries as c_uint;
        // SAFETY: room for `count` events; the time is null, to wait as long as it takes, or the caller's own.
        let status = unsafe { wait(self.handle, 1, &raw mut count, events.as_mut_ptr(), time) };
        self.library.check("BatchIOGetStatus", status).map_err(|error| error.to_string())?;
        events.truncate(count as usize);
        Ok(events)
    }

    fn cancel(&self) {
        if let Some(cancel) = self.library.table().batch_cancel {
            // SAFETY: the batch is alive. Whether it worked, the events say.
            let _ = unsafe { cancel(self.handle) };
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        if self.is_lost || !self.library.is_ours() {
            return;
        }
        if let Some(destroy) = self.library.table().batch_destroy {
            within(&**self.library.device(), || {
                // SAFETY: set up above, not used again, and every read of it is over.
                unsafe { destroy(self.handle) };
            });
        }
    }
}

/// A cancelled read is over at once, one that storage has begun when its 16 MiB are there: some milliseconds from a disk, more from one that is
/// busy with others.
const LAST_EVENTS: Duration = Duration::from_secs(2);

/// Far shorter than a read, and long enough not to keep a processor busy.
const NOTHING_OVER: Duration = Duration::from_micros(200);
