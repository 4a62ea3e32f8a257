//! A stream is a thread with a queue; an event counts its recordings.

use std::collections::BTreeSet;
use std::ffi::c_void;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::core;
use crate::kernels::Launch;

/// Work in a queue.
pub(crate) enum Work {
    /// Copies of equal rows, and when they were queued; plain copies are one row.
    Copy(Rows, Instant),
    /// Flips a bit of the byte at an address, which a copy has just written.
    Flip(usize),
    /// A kernel.
    Launch(Launch),
    /// Marks an event's recording as complete.
    Complete(Arc<Event>, u64),
    /// Waits for an event's recording.
    Wait(Arc<Event>, u64),
    /// Frees device memory.
    Free(u64),
    /// Calls a function of the host with the address it was given.
    Call(HostFunction, usize),
}

/// `CUhostFn`, `hipHostFn_t`.
pub(crate) type HostFunction = unsafe extern "C" fn(*mut c_void);

/// Rows from one address to another.
pub(crate) struct Rows {
    pub(crate) source: usize,
    pub(crate) source_stride: usize,
    pub(crate) target: usize,
    pub(crate) target_stride: usize,
    pub(crate) row_len: usize,
    pub(crate) row_count: usize,
}

/// A queue and the thread that works it off.
pub(crate) struct Stream {
    /// Index of the device that does the work.
    pub(crate) device: usize,
    sender: Mutex<Option<Sender<Work>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    tail: Arc<Event>,
}

impl Stream {
    pub(crate) fn start(config: &Config, device: usize) -> Stream {
        let (sender, queue) = mpsc::channel::<Work>();
        let own_delay = config.delays_us.iter().find(|(of, _)| *of == device);
        let delay_us = own_delay.map_or(config.delay_us, |(_, delay_us)| *delay_us);
        let (link_mb_per_s, mut dice) = (config.link_mb_per_s, config.seed);
        let work = move || {
            let mut link = Link { mb_per_s: link_mb_per_s, free_at: Instant::now() };
            for work in queue {
                if delay_us > 0 {
                    dice = splitmix64(dice);
                    thread::sleep(Duration::from_micros(dice % (delay_us + 1)));
                }
                work.run(&mut link);
            }
        };
        let thread = thread::Builder::new()
            .name("simgpu-stream".to_owned())
            .spawn(work)
            .expect("a thread for a stream");
        let (sender, thread) = (Mutex::new(Some(sender)), Mutex::new(Some(thread)));
        Stream { device, sender, thread, tail: Arc::default() }
    }

    pub(crate) fn queue(&self, work: Work) {
        if let Some(sender) = &*self.sender.lock().unwrap_or_else(PoisonError::into_inner) {
            sender.send(work).expect("the stream's thread lives as long as its queue");
        }
    }

    /// Returns an event behind everything queued so far.
    pub(crate) fn tail(&self) -> (Arc<Event>, u64) {
        let recording = self.tail.record();
        self.queue(Work::Complete(Arc::clone(&self.tail), recording));
        (Arc::clone(&self.tail), recording)
    }

    /// Lets the queue run out, then ends the thread. Not to be called while the machine is locked.
    pub(crate) fn end(&self) {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            thread.join().expect("a stream's thread does not panic");
        }
    }
}

impl Work {
    fn run(self, link: &mut Link) {
        match self {
            Work::Copy(rows, queued_at) => {
                if rows.is_still_valid() {
                    rows.copy();
                }
                link.carry((rows.row_len * rows.row_count) as u64, queued_at);
            }
            Work::Flip(address) => {
                let byte = std::ptr::with_exposed_provenance_mut::<u8>(address);
                // SAFETY: the copy before it wrote there.
                unsafe { *byte ^= 1 };
            }
            Work::Launch(launch) => launch.run(),
            Work::Complete(event, recording) => event.complete(recording),
            Work::Wait(event, recording) => event.wait(recording),
            Work::Free(address) => core::with(|machine| {
                // A violation was noted if this is not allocated; the queue has nobody to tell.
                let _ = machine.free(address);
            }),
            // SAFETY: the caller passes a function for this address, and keeps both until it was called.
            Work::Call(function, data) => unsafe { function(std::ptr::with_exposed_provenance_mut(data)) },
        }
    }
}

/// A link that carries one copy after the other.
struct Link {
    /// 0 is no limit.
    mb_per_s: u64,
    /// When what was carried last had arrived. Kept as an instant, not slept copy by copy: a sleep that is too long
    /// would make the link slower, and a copy that is ready waits for nothing but the one before it.
    free_at: Instant,
}

impl Link {
    /// Sleeps until this many bytes have arrived.
    fn carry(&mut self, len_bytes: u64, queued_at: Instant) {
        let Some(nanos) = (len_bytes * 1000).checked_div(self.mb_per_s) else { return };
        self.free_at = self.free_at.max(queued_at) + Duration::from_nanos(nanos);
        thread::sleep(self.free_at.saturating_duration_since(Instant::now()));
    }
}

impl Rows {
    /// Returns the one row that a plain copy is.
    pub(crate) fn one(source: usize, target: usize, len: usize) -> Rows {
        Rows { source, source_stride: 0, target, target_stride: 0, row_len: len, row_count: 1 }
    }

    /// Tells whether nobody freed either end between the call and now; notes it otherwise.
    fn is_still_valid(&self) -> bool {
        let reach = |stride: usize| (self.row_count - 1) * stride + self.row_len;
        let ends = [(self.source, reach(self.source_stride)), (self.target, reach(self.target_stride))];
        core::with(|machine| ends.into_iter().all(|(start, len)| machine.check_not_freed(start, len)))
    }

    fn copy(&self) {
        for row in 0..self.row_count {
            let source = std::ptr::with_exposed_provenance::<u8>(self.source + row * self.source_stride);
            let target = std::ptr::with_exposed_provenance_mut::<u8>(self.target + row * self.target_stride);
            // SAFETY: the device side was checked against its allocation when the copy was queued; the host side
            // is the caller's promise, as with a real driver.
            unsafe { std::ptr::copy_nonoverlapping(source, target, self.row_len) };
        }
    }
}

/// Numbers recordings and knows which are not complete; a wait is for one recording. An event that is recorded anew on
/// another stream may complete there first, which says nothing about the recording before.
#[derive(Default)]
pub(crate) struct Event {
    counts: Mutex<Counts>,
    completed: Condvar,
}

#[derive(Default)]
struct Counts {
    recorded: u64,
    pending: BTreeSet<u64>,
}

impl Event {
    /// Returns the number of a new recording.
    pub(crate) fn record(&self) -> u64 {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.recorded += 1;
        let recording = counts.recorded;
        counts.pending.insert(recording);
        recording
    }

    /// Returns the number of the latest recording; 0 for an event never recorded, which counts as complete.
    pub(crate) fn recorded(&self) -> u64 {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).recorded
    }

    pub(crate) fn is_complete(&self, recording: u64) -> bool {
        !self.counts.lock().unwrap_or_else(PoisonError::into_inner).pending.contains(&recording)
    }

    pub(crate) fn wait(&self, recording: u64) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        while counts.pending.contains(&recording) {
            counts = self.completed.wait(counts).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn complete(&self, recording: u64) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.pending.remove(&recording);
        self.completed.notify_all();
    }
}

/// # Source
/// Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014.
fn splitmix64(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
