//! Operations: where their sources wait, and which operation must be over before its place is taken again.

use std::collections::VecDeque;
use std::ops::Range;

use super::place::{CONGRUENCE_BYTES, How, IN_PLACE_LEN_BYTES_MIN, Segment, congruence_bytes};
use super::wanted::{Wanted, What, members};
use crate::checkpoint::{Checkpoint, TensorId};
use crate::extent::align_up;
use crate::placement::{Arena, DeviceId, Place};
use crate::plan::{Machine, Operation, PlacedTensor, PlanError, Source};
use crate::quant::{Group, Role};
use crate::request::{Dequantize, Layout, Request};

/// Operations in the order of their payloads, and the segments of their sources.
pub(super) struct Scratch {
    pub(super) operations: Vec<Operation>,
    /// Sources of a few bytes, which are read before everything else, ascending by file and offset.
    pub(super) small: Vec<Segment>,
    /// The other sources of each operation, adjacent in time; with the operation's own place in the result's order.
    pub(super) large: Vec<(TensorId, Vec<Segment>)>,
}

/// Places the sources of all operations in scratch arenas, which it appends.
///
/// Small sources (a scale for each tensor, say) stay until the load is over: read together, they cost a few requests instead
/// of one each. The others wait in a ring: an operation's sources take the place of older ones when those have been worked off.
pub(super) fn scratch(
    checkpoint: &Checkpoint,
    request: &Request,
    wanted: &[Wanted<'_>],
    tensors: &mut [PlacedTensor],
    arenas: &mut Vec<Arena>,
    names: &mut Vec<String>,
    machine: &Machine,
) -> Result<Scratch, PlanError> {
    let mut scratch = Scratch { operations: Vec::new(), small: Vec::new(), large: Vec::new() };
    let Some(dequantize) = &request.dequantize else { return Ok(scratch) };
    let made = || {
        wanted.iter().enumerate().filter_map(|(index, wanted)| match &wanted.what {
            What::Made(group) => Some((index as u32, *group)),
            What::Stored(_) => None,
        })
    };
    let stays = arenas.len() as u32;
    let world = World { checkpoint, dequantize, device: request.device, machine };
    let groups: Vec<&Group> = made().map(|(_, group)| group).collect();
    let budget = Budget::new(&world, request.transient_bytes_max, &groups)?;
    let mut slots = Slots::new(budget.ring_len_bytes, congruence_bytes(machine, request.device));
    let mut small_end = 0;
    for (tensor, group) in made() {
        let operation = scratch.operations.len() as u32;
        let slot = slots.take(operation, world.slot_len_bytes(group, budget.small_len_bytes_max));
        let (mut sources, mut large) = (Vec::new(), Vec::new());
        let mut end = slot.begin;
        let mut ordered: Vec<_> = members(group, dequantize).collect();
        ordered.sort_by_key(|(_, id)| *id);
        for (role, id) in ordered {
            let stored = checkpoint.tensor(id);
            let (begin, len_bytes) = (stored.file_offset_bytes, stored.info.len_bytes());
            if len_bytes == 0 || role == Role::Description {
                continue;
            }
            let is_small = len_bytes <= budget.small_len_bytes_max;
            let how = world.how(role, id);
            let place = if is_small {
                let offset_bytes = align_up(small_end, SMALL_ALIGN_BYTES);
                small_end = offset_bytes + len_bytes;
                Place { arena: stays, offset_bytes }
            } else {
                let offset_bytes = how.start(end, begin, congruence_bytes(machine, request.device));
                end = how.end(offset_bytes + len_bytes, congruence_bytes(machine, request.device));
                Place { arena: stays + 1, offset_bytes }
            };
            sources.push(Source { role, id, place, len_bytes });
            let segment = Segment {
                file: stored.file,
                begin,
                end: begin + len_bytes,
                target: place,
                in_place: !is_small && how == How::InPlace,
                tensors: tensor..tensor + 1,
                operation: Some(operation),
                after: if is_small { 0..0 } else { slot.after.clone() },
            };
            if is_small { scratch.small.push(segment) } else { large.push(segment) }
        }
        let made = &mut tensors[tensor as usize];
        let mut recipe = group.recipe.clone();
        recipe.fold = recipe.fold.filter(|_| dequantize.fold);
        let is_transposed = dequantize.layout == Layout::AsStored && recipe.is_column_major;
        let shape = shape(group, is_transposed);
        (made.name, made.shape) = (Some(names.len() as u32), Some(shape.as_slice().into()));
        made.operation_count += 1;
        names.push(group.name.clone());
        scratch.operations.push(Operation {
            name: group.name.clone(),
            family: group.family,
            shape,
            is_transposed,
            recipe,
            sources,
            tensor,
            place: made.place,
            len_bytes: made.len_bytes,
            read_count: 0,
        });
        scratch.large.push((group.payload(), large));
    }
    scratch.small.sort_by_key(|segment| (segment.file, segment.begin));
    if !scratch.operations.is_empty() {
        let arena = |what: &str, len_bytes| Arena {
            device: request.device,
            group: what.to_owned(),
            is_external: false,
            is_scratch: true,
            len_bytes: align_up(len_bytes, congruence_bytes(machine, request.device)),
        };
        arenas.push(arena("small sources", small_end));
        arenas.push(arena("sources", slots.capacity_bytes));
    }
    Ok(scratch)
}

/// Returns the shape of what is made: `[.., K, N]` where the file's own order is kept.
fn shape(group: &Group, is_transposed: bool) -> Vec<u64> {
    let mut shape = group.shape.clone();
    if is_transposed && let [.., rows, cols] = shape.as_mut_slice() {
        std::mem::swap(rows, cols);
    }
    shape
}

/// What the lengths of sources depend on.
struct World<'w> {
    checkpoint: &'w Checkpoint,
    dequantize: &'w Dequantize,
    device: DeviceId,
    machine: &'w Machine,
}

impl World<'_> {
    /// Returns how a source gets to its place. Only payloads are worth a read of their own in place.
    fn how(&self, role: Role, id: TensorId) -> How {
        let stored = self.checkpoint.tensor(id);
        let is_worth_it = role == Role::Payload && stored.info.len_bytes() >= IN_PLACE_LEN_BYTES_MIN;
        let can_land = || self.machine.in_place.route(self.device, stored.file).is_some();
        if is_worth_it && can_land() { How::InPlace } else { How::Gathered }
    }

    /// Returns how a group's sources get to their places, and their lengths.
    fn lens_bytes(&self, group: &Group) -> impl Iterator<Item = (How, u64)> {
        let members = members(group, self.dequantize).filter(|(role, _)| *role != Role::Description);
        members.map(|(role, id)| (self.how(role, id), self.checkpoint.tensor(id).info.len_bytes()))
    }

    /// Returns the bytes that the small sources of a group take.
    fn small_len_bytes(&self, group: &Group, small_len_bytes_max: u64) -> u64 {
        let small = self.lens_bytes(group).filter(|(_, len_bytes)| *len_bytes <= small_len_bytes_max);
        small.map(|(_, len_bytes)| align_up(len_bytes, SMALL_ALIGN_BYTES)).sum()
    }

    /// Returns the bytes that the other sources take in the ring, wherever they begin.
    fn slot_len_bytes(&self, group: &Group, small_len_bytes_max: u64) -> u64 {
        let congruence = congruence_bytes(self.machine, self.device);
        let large = self.lens_bytes(group).filter(|(_, len_bytes)| *len_bytes > small_len_bytes_max);
        let len = |(how, len_bytes)| match how {
            // The aligned cover around it.
            How::InPlace => align_up(len_bytes, congruence) + congruence,
            _ => align_up(len_bytes, CONGRUENCE_BYTES),
        };
        // The payload may be preceded by sources that end off the congruence.
        align_up(large.map(len).sum::<u64>() + congruence, congruence)
    }
}

/// How the transient memory is shared between small sources and the ring.
struct Budget {
    small_len_bytes_max: u64,
    ring_len_bytes: u64,
}

impl Budget {
    /// Calls fewer sources small where all of them would leave the ring less than half of what is allowed, or less than the largest
    /// operation needs.
    fn new(world: &World<'_>, max_bytes: Option<u64>, groups: &[&Group]) -> Result<Budget, PlanError> {
        let align_bytes = congruence_bytes(world.machine, world.device);
        let mut small_len_bytes_max = SMALL_LEN_BYTES_MAX;
        loop {
            let (mut largest, mut sum, mut small) = ((0, None), 0u64, 0u64);
            for group in groups {
                let len = world.slot_len_bytes(group, small_len_bytes_max);
                sum = sum.saturating_add(len);
                small = small.saturating_add(world.small_len_bytes(group, small_len_bytes_max));
                if len > largest.0 {
                    largest = (len, Some(group));
                }
            }
            let small_bytes = align_up(small, align_bytes);
            let needed_bytes = small_bytes + largest.0;
            let default_bytes =
                || TRANSIENT_BYTES_DEFAULT.max(largest.0 + small_bytes.min(SMALL_BYTES_DEFAULT_MAX));
            let max_bytes = max_bytes.unwrap_or_else(default_bytes);
            let is_ring_short = needed_bytes > max_bytes || small_bytes > max_bytes / 2;
            match largest.1 {
                Some(_) if is_ring_short && small > 0 => small_len_bytes_max /= 8,
                Some(group) if needed_bytes > max_bytes => {
                    return Err(PlanError::OverTransientBudget {
                        name: group.name.clone(),
                        needed_bytes,
                        max_bytes,
                    });
                }
                _ => {
                    let left_bytes = max_bytes - small_bytes;
                    let ring_len_bytes = sum.min(left_bytes - left_bytes % align_bytes);
                    return Ok(Budget { small_len_bytes_max, ring_len_bytes });
                }
            }
        }
    }
}

/// A ring of places for the sources of operations.
struct Slots {
    capacity_bytes: u64,
    align_bytes: u64,
    head: u64,
    /// Operations and what nobody took again of their places, in the order of places from the head on, around the ring.
    taken: VecDeque<(u32, Range<u64>)>,
}

/// A place, and the operations that were there before.
struct Slot {
    begin: u64,
    after: Range<u32>,
}

impl Slots {
    fn new(capacity_bytes: u64, align_bytes: u64) -> Slots {
        Slots { capacity_bytes, align_bytes, head: 0, taken: VecDeque::new() }
    }

    fn take(&mut self, operation: u32, len_bytes: u64) -> Slot {
        let len_bytes = align_up(len_bytes, self.align_bytes);
        let mut begin = self.head;
        if self.head + len_bytes > self.capacity_bytes {
            // What lies behind the head comes last when the ring is walked from its start.
            begin = 0;
            let behind = self.taken.iter().take_while(|(_, taken)| taken.start >= self.head).count();
            self.taken.rotate_left(behind);
        }
        let place = begin..begin + len_bytes;
        self.head = place.end;
        let mut after: Range<u32> = 0..0;
        while let Some((older, taken)) = self.taken.front_mut().filter(|(_, taken)| taken.start < place.end) {
            if taken.start < place.start {
                break; // Of this round: the ring was walked to its end.
            }
            let only = *older..*older + 1;
            after =
                if after.is_empty() { only } else { after.start.min(only.start)..after.end.max(only.end) };
            taken.start = place.end; // What is left of it is for the next, which then waits, too.
            if taken.start < taken.end {
                break;
            }
            self.taken.pop_front();
        }
        self.taken.push_back((operation, place));
        Slot { begin, after }
    }
}

/// A source up to this is read with all others of its kind before everything else, and stays until the load is over: 50,000 of
/// them take at most 200 MiB, and mostly a few bytes each. Less where the budget is tight.
const SMALL_LEN_BYTES_MAX: u64 = 4096;

/// The widest number of a small source, and the widest access of a kernel.
const SMALL_ALIGN_BYTES: u64 = 16;

/// Packed bytes that wait: a few tensors of a large model, so that reading the next goes on while one is worked off.
const TRANSIENT_BYTES_DEFAULT: u64 = 256 << 20;

/// What small sources may add to that where the largest operation alone needs all of it.
const SMALL_BYTES_DEFAULT_MAX: u64 = 64 << 20;
