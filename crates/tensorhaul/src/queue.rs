//! A lane's reads, each with the memory it goes to.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tensorhaul_device::Allocation;
use tensorhaul_io::{Access, DeviceLanding, Feed, Job, JobMemory, Landing, Next};
use tensorhaul_plan::{Place, Plan, Read, plan::Target};
use tensorhaul_stage::Ring;

use crate::assignment::Assignment;
use crate::cancel::Cancel;
use crate::gate::{Gate, Passage};

/// A lane's reads, handed out in order.
pub(crate) struct Queue<'q> {
    pub(crate) plan: &'q Plan,
    /// How each read of the plan is done.
    pub(crate) access: &'q [Access],
    /// The lane's reads.
    pub(crate) reads: &'q [u32],
    pub(crate) next: AtomicUsize,
    /// The arenas that reads land in.
    pub(crate) landing: &'q [Option<Arc<dyn Allocation>>],
    pub(crate) ring: Option<&'q Ring>,
    pub(crate) gate: &'q Gate,
    pub(crate) assignment: &'q Assignment,
    pub(crate) cancel: &'q Cancel,
}

impl Feed for Queue<'_> {
    fn next(&self, wait: bool) -> Next {
        if self.cancel.is_cancelled() {
            return Next::Done;
        }
        if !wait && let Some(read) = self.peek() {
            // An engine that does not wait is the only one at its lane, so the read at hand stays its own.
            match self.passage(read, false) {
                Passage::Free => {}
                Passage::Blocked => return Next::Busy,
                Passage::Closed => return Next::Done,
            }
        }
        match (self.ring, wait) {
            // As above: the read at hand stays its own.
            (Some(ring), false) if self.peek().is_some_and(|read| self.is_staged(read)) => {
                match ring.try_take() {
                    Some(filling) => self.take(|_| Some(JobMemory::Staging(filling))),
                    None => Next::Busy,
                }
            }
            (ring, _) => self.take(|read| match (&self.plan.reads()[read as usize], ring) {
                (read @ Read { target: Target::InPlace(place), .. }, _) => {
                    Some(self.landing(*place, read.len_bytes()))
                }
                (_, Some(ring)) => ring.take().map(JobMemory::Staging),
                (_, None) => unreachable!("a plan with staged reads has a ring"),
            }),
        }
    }
}

impl Queue<'_> {
    /// Returns a range of an arena for storage to write into.
    fn landing(&self, place: Place, len_bytes: u64) -> JobMemory {
        let arena = self.landing[place.arena as usize].clone();
        let arena = arena.expect("devices that reads land in are prepared before the first read");
        // A direct read of a file's last sector may write up to the next multiple of the alignment.
        let reach_bytes = len_bytes.next_multiple_of(self.plan.machine().direct_align_bytes);
        let end_bytes = (place.offset_bytes + reach_bytes).min(arena.len_bytes());
        let reach_bytes = end_bytes - place.offset_bytes;
        assert!(reach_bytes >= len_bytes, "the plan's reads land inside their arenas");
        let (base, start) = (arena.address(), arena.host_ptr());
        let owner: Arc<dyn Any + Send + Sync> = arena;
        let Some(start) = start else {
            // SAFETY: as below; arenas that storage reads into were allocated past the device's streams, which have queued
            // nothing on them but operations, and the gate keeps reads behind those.
            let landing = unsafe { DeviceLanding::new(base, place.offset_bytes, reach_bytes, owner) };
            return JobMemory::Device(landing);
        };
        // SAFETY: the offset is inside the arena, as just checked.
        let start = unsafe { start.add(place.offset_bytes as usize) };
        // SAFETY: arenas are initialized and kept alive by `owner`; the plan's reads are disjoint in the
        // arena, each is taken once, and a tensor is emitted only after the last read that covers it.
        JobMemory::InPlace(unsafe { Landing::new(start, reach_bytes as usize, owner) })
    }

    fn peek(&self) -> Option<u32> {
        self.reads.get(self.next.load(Ordering::Relaxed)).copied()
    }

    fn passage(&self, read: u32, wait: bool) -> Passage {
        let read = &self.plan.reads()[read as usize];
        let fed = if read.after.is_empty() { Vec::new() } else { self.assignment.fed_by(self.plan, read) };
        self.gate.passage(&read.after, &fed, wait, self.cancel)
    }

    fn is_staged(&self, read: u32) -> bool {
        matches!(self.plan.reads()[read as usize].target, Target::Staged { .. })
    }

    fn take(&self, memory: impl FnOnce(u32) -> Option<JobMemory>) -> Next {
        let Some(read) = self.reads.get(self.next.fetch_add(1, Ordering::Relaxed)).copied() else {
            return Next::Done;
        };
        // Before it takes a buffer: what it waits for may need that.
        if self.passage(read, true) == Passage::Closed {
            return Next::Done;
        }
        let Some(memory) = memory(read) else {
            return Next::Done; // The ring was closed: the load is cancelled.
        };
        let Read { extent, stride, .. } = self.plan.reads()[read as usize];
        Next::Job(Job { read, extent, stride, access: self.access[read as usize], memory })
    }
}
