//! Tensors that go on from one device to others, when they are whole.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::Arc;

use tensorhaul_device::{Allocation, Device, DeviceError, Event, Location, Stream};
use tensorhaul_plan::{Place, Plan};

use crate::assignment::Assignment;
use crate::prepare::Prepared;

/// The copies from device to device of one transfer.
///
/// A tensor that others are copied from is handed over behind those copies: whoever has it may free it, or write to it.
pub(crate) struct FanOut {
    /// For each tensor that others are copies of: those.
    copies_of: HashMap<u32, Vec<u32>>,
    /// For each of these, how many copies are still under way.
    under_way: HashMap<u32, u32>,
    /// For each device, the copies to it, oldest first.
    running: Vec<VecDeque<Running>>,
}

/// A copy under way.
struct Running {
    tensor: u32,
    /// Behind it, on the device that it goes to.
    event: Event,
    to: Arc<dyn Device>,
    /// What it reads.
    source: Arc<dyn Allocation>,
}

impl FanOut {
    pub(crate) fn new(plan: &Plan, assignment: &Assignment) -> FanOut {
        let mut copies_of: HashMap<u32, Vec<u32>> = HashMap::new();
        for (number, tensor) in (0..).zip(plan.tensors()) {
            if let Some(source) = tensor.copy_of {
                copies_of.entry(source).or_default().push(number);
            }
        }
        let running = assignment.devices().iter().map(|_| VecDeque::new()).collect();
        FanOut { copies_of, under_way: HashMap::new(), running }
    }

    /// Tells whether none is under way.
    pub(crate) fn is_over(&self) -> bool {
        self.running.iter().all(VecDeque::is_empty)
    }

    /// Takes the tensors that are copies of this one, which is whole; nobody asks for them again.
    pub(crate) fn take_copies_of(&mut self, tensor: u32) -> Vec<u32> {
        self.copies_of.remove(&tensor).unwrap_or_default()
    }

    /// Queues the copy of a tensor from the one it is a copy of, which is whole.
    pub(crate) fn start(
        &mut self,
        tensor: u32,
        plan: &Plan,
        assignment: &Assignment,
        prepared: &Prepared,
    ) -> Result<(), DeviceError> {
        let copy = &plan.tensors()[tensor as usize];
        let source_number = copy.copy_of.expect("only copies are started");
        let source = &plan.tensors()[source_number as usize];
        let at = assignment.of_arena(copy.place.arena);
        let (from, to) = (assignment.of_arena(source.place.arena), &prepared.devices[at].device);
        let (source_arena, target_arena) =
            (&prepared.arenas[source.place.arena as usize], &prepared.arenas[copy.place.arena as usize]);
        let location = |allocation, place: Place| Location { allocation, offset_bytes: place.offset_bytes };
        let (source_at, target_at) =
            (location(source_arena, source.place), location(target_arena, copy.place));
        let peer = assignment.devices()[from];
        // SAFETY: both arenas live until the transfer is over, which waits for the event below. The source is whole: the events of all it is made of
        // were seen complete, and it is handed over only behind this copy. Nobody else knows of the target yet.
        let queued = unsafe { to.copy_from_peer(peer, source_at, target_at, copy.len_bytes, Stream::Copy) };
        match queued.and_then(|()| to.record(Stream::Copy)) {
            Ok(event) => {
                let (to, source) = (Arc::clone(to), Arc::clone(source_arena));
                self.running[at].push_back(Running { tensor, event, to, source });
                *self.under_way.entry(source_number).or_default() += 1;
                Ok(())
            }
            Err(error) => {
                self.let_go(source_number, plan, &**to, prepared);
                Err(error)
            }
        }
    }

    /// Takes the tensor out that was the first to be copied to a device, if the copy is over, with whether it went well.
    pub(crate) fn next_over(
        &mut self,
        at: usize,
        device: &dyn Device,
    ) -> Option<(u32, Result<(), DeviceError>)> {
        let Running { event, .. } = self.running[at].front()?;
        let over = match device.is_complete(event) {
            Ok(false) => return None,
            Ok(true) => Ok(()),
            Err(error) => Err(error),
        };
        self.running[at].pop_front().map(|running| (running.tensor, over))
    }

    /// Counts a copy that went well; tells whether it was the last of its source, which can be handed over now.
    pub(crate) fn is_last_of(&mut self, source: u32) -> bool {
        let left = self.under_way.get_mut(&source).expect("a copy that is over was under way");
        *left -= 1;
        *left == 0
    }

    /// Makes sure that a device no longer reads a tensor of another after a copy or its event failed: once it has provably let go of it. When that
    /// cannot be proven, the tensor's memory is leaked, never reused.
    pub(crate) fn let_go(&self, source: u32, plan: &Plan, device: &dyn Device, prepared: &Prepared) {
        let drained = device.record(Stream::Copy).and_then(|event| device.wait(&event));
        if drained.is_err() {
            let place = plan.tensors()[source as usize].place;
            mem::forget(Arc::clone(&prepared.arenas[place.arena as usize]));
        }
    }
}

impl Drop for FanOut {
    /// Waits for copies that are still under way, as after a panic of the caller's: memory is freed behind the streams of its own device, and these are of
    /// another.
    fn drop(&mut self) {
        for Running { event, to, source, .. } in self.running.iter_mut().flat_map(mem::take) {
            if to.wait(&event).is_err() {
                mem::forget(source); // Never reused, rather than read while it is.
            }
        }
    }
}
