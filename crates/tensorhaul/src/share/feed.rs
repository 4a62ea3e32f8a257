//! A lane's reads of a shared load, no further ahead than there are staging buffers for whole rounds.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tensorhaul_io::{Access, Feed, Job, JobMemory, Next};
use tensorhaul_plan::Plan;
use tensorhaul_stage::{Filling, Ring};

use crate::cancel::Cancel;

/// Says which rounds may be read.
///
/// A round's exchange needs all of its reads. The ring has buffers for all reads of two rounds, so a read of a round that may begin always finds
/// one, whatever the lanes do: no later read holds it.
#[derive(Debug)]
pub(super) struct Window {
    /// The first round that may not be read yet.
    end: Mutex<usize>,
    moved: Condvar,
}

impl Window {
    pub(super) fn new(end: usize) -> Window {
        Window { end: Mutex::new(end), moved: Condvar::new() }
    }

    /// Lets rounds before this one be read.
    pub(super) fn move_to(&self, end: usize) {
        let mut now = lock(&self.end);
        *now = end.max(*now);
        self.moved.notify_all();
    }
}

/// A lane's reads, handed out in order.
pub(super) struct RoundFeed<'f> {
    pub(super) plan: &'f Plan,
    pub(super) access: &'f [Access],
    /// The lane's reads, each with its round.
    pub(super) reads: Vec<(u32, usize)>,
    /// How many of them were handed out.
    pub(super) next: Mutex<usize>,
    pub(super) window: &'f Window,
    pub(super) ring: &'f Ring,
    pub(super) cancel: &'f Cancel,
}

impl Feed for RoundFeed<'_> {
    fn next(&self, wait: bool) -> Next {
        let mut next = lock(&self.next);
        let Some((read, round)) = self.reads.get(*next).copied() else { return Next::Done };
        let mut end = lock(&self.window.end);
        while round >= *end {
            if self.cancel.is_cancelled() {
                return Next::Done;
            }
            if !wait {
                return Next::Busy;
            }
            // A cancellation has no way to wake this: it is asked for now and then.
            let waited = self.window.moved.wait_timeout(end, CANCEL_POLL);
            end = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(end);
        if self.cancel.is_cancelled() {
            return Next::Done;
        }
        if !wait {
            let Some(filling) = self.ring.try_take() else { return Next::Busy };
            *next += 1;
            return self.job(read, filling);
        }
        *next += 1;
        drop(next);
        // The ring is closed when the load is cancelled.
        self.ring.take().map_or(Next::Done, |filling| self.job(read, filling))
    }
}

impl RoundFeed<'_> {
    fn job(&self, read: u32, filling: Filling) -> Next {
        let planned = &self.plan.reads()[read as usize];
        let (extent, stride, access) = (planned.extent, planned.stride, self.access[read as usize]);
        Next::Job(Job { read, extent, stride, access, memory: JobMemory::Staging(filling) })
    }
}

/// A panic elsewhere cannot leave a number half changed.
fn lock(number: &Mutex<usize>) -> MutexGuard<'_, usize> {
    number.lock().unwrap_or_else(PoisonError::into_inner)
}

const CANCEL_POLL: Duration = Duration::from_millis(10);
