//! Copies under way: out of staging buffers, to the devices that each of them feeds.

use std::collections::VecDeque;

use tensorhaul_device::{DeviceError, Event, Piece, Stream, StridedCopy};
use tensorhaul_plan::{Copy, Plan};
use tensorhaul_stage::{Copying, Filled};

use crate::assignment::Assignment;
use crate::operations::Operations;
use crate::prepare::Prepared;

/// The copies of one transfer.
pub(crate) struct Copies {
    /// For each device, the buffers of its ring that are being copied from, oldest first.
    running: Vec<VecDeque<Running>>,
}

/// Copies out of one buffer, to one device or several.
struct Running {
    /// What marks their end on each device that they are not known to be over on.
    ends: Vec<(usize, Event)>,
    buffer: Copying,
    read: u32,
}

type Over = Result<(), DeviceError>;

impl Copies {
    pub(crate) fn new(assignment: &Assignment) -> Copies {
        Copies { running: assignment.devices().iter().map(|_| VecDeque::new()).collect() }
    }

    /// Tells whether none is under way.
    pub(crate) fn are_over(&self) -> bool {
        self.running.iter().all(VecDeque::is_empty)
    }

    /// Queues the copies of a read out of the buffer that it filled, behind the operations whose sources lie where they land.
    pub(crate) fn start(
        &mut self,
        read: u32,
        filled: Filled,
        plan: &Plan,
        assignment: &Assignment,
        prepared: &Prepared,
        operations: &mut Operations,
    ) -> Over {
        let owner = assignment.of_read(read);
        let pinned = prepared.devices[owner].pinned.as_ref();
        let buffer = filled.copying(pinned.expect("a ring that is not pinned was refused before"));
        let fed = assignment.fed_by(plan, &plan.reads()[read as usize]);
        let mut ends = Vec::with_capacity(fed.len());
        for at in &fed {
            match queue(read, &buffer, *at, plan, assignment, prepared, operations) {
                Ok(event) => ends.push((*at, event)),
                Err(error) => {
                    give_back(buffer, &fed, prepared);
                    return Err(error);
                }
            }
        }
        self.running[owner].push_back(Running { ends, buffer, read });
        Ok(())
    }

    /// Takes the oldest read of a device out, if its copies are over on every device that it feeds, with whether they went well. Its
    /// buffer is back.
    pub(crate) fn next_over(&mut self, owner: usize, prepared: &Prepared) -> Option<(u32, Over)> {
        let running = self.running[owner].front_mut()?;
        while let Some((at, event)) = running.ends.last() {
            match prepared.devices[*at].device.is_complete(event) {
                Ok(false) => return None,
                Ok(true) => drop(running.ends.pop()),
                Err(error) => return self.abandon_next(owner, prepared, error),
            }
        }
        let Running { buffer, read, .. } = self.running[owner].pop_front()?;
        buffer.copied();
        Some((read, Ok(())))
    }

    /// Waits for the oldest read of a device, if there is one.
    pub(crate) fn wait_for_next(&mut self, owner: usize, prepared: &Prepared) -> Option<(u32, Over)> {
        let running = self.running[owner].front()?;
        let mut ends = running.ends.iter();
        match ends.try_for_each(|(at, event)| prepared.devices[*at].device.wait(event)) {
            Ok(()) => {
                let Running { buffer, read, .. } = self.running[owner].pop_front()?;
                buffer.copied();
                Some((read, Ok(())))
            }
            Err(error) => self.abandon_next(owner, prepared, error),
        }
    }

    /// Gives up the oldest read of a device, whose copies failed on one of the devices that they are not over on.
    fn abandon_next(&mut self, owner: usize, prepared: &Prepared, error: DeviceError) -> Option<(u32, Over)> {
        let Running { ends, buffer, read } = self.running[owner].pop_front()?;
        let fed: Vec<_> = ends.iter().map(|(at, _)| *at).collect();
        give_back(buffer, &fed, prepared);
        Some((read, Err(error)))
    }
}

/// Queues the copies out of a buffer that go to one device, and what marks their end.
fn queue(
    read: u32,
    buffer: &Copying,
    at: usize,
    plan: &Plan,
    assignment: &Assignment,
    prepared: &Prepared,
    operations: &mut Operations,
) -> Result<Event, DeviceError> {
    let (device, arenas) = (&prepared.devices[at].device, &prepared.arenas);
    let target = |copy: &Copy| &arenas[copy.target.arena as usize];
    let piece = |copy: &Copy| Piece {
        source_offset_bytes: copy.source_offset_bytes as usize,
        len_bytes: copy.len_bytes as usize,
        target: target(copy),
        target_offset_bytes: copy.target.offset_bytes,
    };
    let read = &plan.reads()[read as usize];
    operations.order_copies(&read.after, assignment, at, &**device)?;
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

/// Gives back a buffer whose copy or event failed: once the devices have provably let go of it. When that
/// cannot be proven, the buffer is leaked, never reused.
fn give_back(buffer: Copying, fed: &[usize], prepared: &Prepared) {
    let is_drained = |at: &usize| {
        let device = &prepared.devices[*at].device;
        device.record(Stream::Copy).and_then(|event| device.wait(&event)).is_ok()
    };
    // Each is drained, also behind one that is not.
    match fed.iter().filter(|at| !is_drained(at)).count() {
        0 => buffer.copied(),
        _ => drop(buffer),
    }
}
