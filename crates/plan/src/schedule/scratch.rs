//! Operations: where their sources wait, and which operation must be over before its place is taken again.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use super::place::{CONGRUENCE_BYTES, How, IN_PLACE_LEN_BYTES_MIN, congruence_bytes};
use super::segment::{Destination, Segment, Way, gather};
use super::wanted::{Making, Wanted};
use crate::checkpoint::{Checkpoint, TensorId};
use crate::extent::align_up;
use crate::placement::{Arena, DeviceId, Place};
use crate::plan::{Machine, Operation, PlacedTensor, PlanError, Source, Steps};
use crate::quant::Role;
use crate::request::{Dequantize, Request};
use crate::slice::Pieces;

/// Operations in the order of their payloads, and the segments of their sources.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) operations: Vec<Operation>,
    /// Sources of a few bytes, which are read before everything else, ascending by file and offset.
    pub(super) small: Vec<Segment>,
    /// The other sources of each operation, adjacent in time; with the payload, which says where in the result's order they stand.
    pub(super) large: Vec<(TensorId, Vec<Segment>)>,
}

/// Places the sources of all operations in scratch arenas, two on each device, which it appends.
///
/// Small sources (a scale for each tensor, say) stay until the load is over: read together, they cost a few requests instead
/// of one each. The others wait in a ring: an operation's sources take the place of older ones when those have been worked off.
pub(super) fn scratch(
    checkpoint: &Checkpoint,
    request: &Request,
    wanted: &[Wanted<'_>],
    tensors: &[PlacedTensor],
    arenas: &mut Vec<Arena>,
    machine: &Machine,
) -> Result<Scratch, PlanError> {
    let mut scratch = Scratch::default();
    let Some(dequantize) = &request.dequantize else { return Ok(scratch) };
    let of_wanted = |(index, wanted): (u32, &'_ Wanted<'_>)| (index, wanted.device);
    let mut makings: Vec<(u32, DeviceId, &Making<'_>)> = (0..)
        .zip(wanted)
        .flat_map(|(index, wanted)| {
            let (index, device) = of_wanted((index, wanted));
            wanted.makings().iter().map(move |making| (index, device, making))
        })
        .collect();
    // In the order of time, whatever the device.
    makings.sort_by_key(|(_, _, making)| making.group.payload());
    let mut rings = rings(checkpoint, request, dequantize, &makings, arenas.len() as u32, machine)?;
    for (tensor, device, making) in makings {
        let ring = rings.get_mut(&device).expect("there is one for every device of a making");
        let operation = scratch.operations.len() as u32;
        let to = Destination {
            device,
            target: Place { arena: ring.arena, offset_bytes: 0 },
            tensors: tensor..tensor + 1,
            operation: Some(operation),
            after: 0..0,
        };
        let (sources, large) = ring.place(making, to, &mut scratch.small);
        let mut recipe = making.recipe().clone();
        recipe.fold = recipe.fold.filter(|_| dequantize.fold);
        let place = tensors[tensor as usize].place;
        let offset_bytes = place.offset_bytes + making.offset_bytes;
        scratch.operations.push(Operation {
            name: making.group.name.clone(),
            family: making.group.family,
            shape: making.shape(dequantize),
            is_transposed: making.is_transposed(dequantize),
            recipe,
            sources,
            tensor,
            place: Place { offset_bytes, ..place },
            len_bytes: making.len_bytes(dequantize),
            read_count: 0,
        });
        scratch.large.push((making.group.payload(), large));
    }
    scratch.small.sort_by_key(|segment| (segment.file, segment.begin));
    for (device, ring) in rings {
        let arena = |what: &str, len_bytes| Arena {
            device,
            group: what.to_owned(),
            is_external: false,
            is_scratch: true,
            len_bytes: align_up(len_bytes, congruence_bytes(machine, device)),
        };
        arenas.push(arena("small sources", ring.small_end));
        arenas.push(arena("sources", ring.slots.capacity_bytes));
    }
    Ok(scratch)
}

/// Prepares a ring for every device that something is made on; `arena` is the number of the first arena they append.
fn rings<'w>(
    checkpoint: &'w Checkpoint,
    request: &Request,
    dequantize: &'w Dequantize,
    makings: &[(u32, DeviceId, &Making<'_>)],
    arena: u32,
    machine: &'w Machine,
) -> Result<BTreeMap<DeviceId, Ring<'w>>, PlanError> {
    let mut of_devices: BTreeMap<DeviceId, Vec<&Making<'_>>> = BTreeMap::new();
    for (_, device, making) in makings {
        of_devices.entry(*device).or_default().push(making);
    }
    let ring = |(number, (device, makings)): (u32, (DeviceId, Vec<&Making<'_>>))| {
        let world = World { checkpoint, dequantize, device, machine };
        let budget = Budget::new(&world, request.transient_bytes_max, &makings)?;
        let slots = Slots::new(budget.ring_len_bytes, congruence_bytes(machine, device));
        let small_len_bytes_max = budget.small_len_bytes_max;
        Ok((device, Ring { world, small_len_bytes_max, slots, arena: arena + 2 * number, small_end: 0 }))
    };
    (0..).zip(of_devices).map(ring).collect()
}

/// Where the sources of one device's operations wait.
struct Ring<'w> {
    world: World<'w>,
    small_len_bytes_max: u64,
    slots: Slots,
    /// The arena of small sources; that of the others follows.
    arena: u32,
    small_end: u64,
}

impl Ring<'_> {
    /// Places the sources of an operation; returns the segments of those that are not small.
    fn place(
        &mut self,
        making: &Making<'_>,
        to: Destination,
        small: &mut Vec<Segment>,
    ) -> (Vec<Source>, Vec<Segment>) {
        let Ring { world, small_len_bytes_max, slots, arena, small_end } = self;
        let congruence = congruence_bytes(world.machine, world.device);
        let operation = to.operation.expect("sources are of an operation");
        let slot = slots.take(operation, world.slot_len_bytes(making, *small_len_bytes_max));
        let (mut sources, mut large) = (Vec::new(), Vec::new());
        let mut end = slot.begin;
        for (role, id, pieces) in making.sources(world.dequantize) {
            let stored = world.checkpoint.tensor(id);
            let len_bytes = world.len_bytes(id, pieces);
            if len_bytes == 0 {
                continue;
            }
            let is_small = len_bytes <= *small_len_bytes_max;
            let how = world.how(role, id, pieces);
            let place = if is_small {
                let offset_bytes = align_up(*small_end, SMALL_ALIGN_BYTES);
                *small_end = offset_bytes + len_bytes;
                Place { arena: *arena, offset_bytes }
            } else {
                let begin = stored.file_offset_bytes;
                let offset_bytes = how.start(end, begin, congruence);
                end = how.end(offset_bytes + len_bytes, congruence);
                Place { arena: *arena + 1, offset_bytes }
            };
            sources.push(Source { role, id, place, len_bytes });
            let after = if is_small { 0..0 } else { slot.after.clone() };
            let to = Destination { target: place, tensors: to.tensors.clone(), after, ..to };
            let segments = if is_small { &mut *small } else { &mut large };
            match pieces {
                Some(pieces) => gather(world.checkpoint, id, pieces, &to, segments),
                None => segments.push(Segment {
                    file: stored.file,
                    begin: stored.file_offset_bytes,
                    end: stored.file_offset_bytes + len_bytes,
                    piece_len_bytes: len_bytes,
                    steps: Steps::ONCE,
                    device: to.device,
                    target: place,
                    way: if !is_small && how == How::InPlace { Way::InPlace } else { Way::Staged },
                    tensors: to.tensors,
                    operation: to.operation,
                    after: to.after,
                }),
            }
        }
        (sources, large)
    }
}

/// What the lengths of sources depend on.
struct World<'w> {
    checkpoint: &'w Checkpoint,
    dequantize: &'w Dequantize,
    device: DeviceId,
    machine: &'w Machine,
}

impl World<'_> {
    /// Returns the bytes of a source, or of the part that is needed.
    fn len_bytes(&self, id: TensorId, pieces: Option<&Pieces>) -> u64 {
        pieces.map_or_else(|| self.checkpoint.tensor(id).info.len_bytes(), Pieces::len_bytes)
    }

    /// Returns how a source gets to its place. Only whole payloads are worth a read of their own in place.
    fn how(&self, role: Role, id: TensorId, pieces: Option<&Pieces>) -> How {
        let stored = self.checkpoint.tensor(id);
        let is_long = stored.info.len_bytes() >= IN_PLACE_LEN_BYTES_MIN;
        let is_worth_it = role == Role::Payload && is_long && pieces.is_none();
        let can_land = || self.machine.in_place.route(self.device, stored.file).is_some();
        if is_worth_it && can_land() { How::InPlace } else { How::Gathered }
    }

    /// Returns how an operation's sources get to their places, and their lengths.
    fn lens_bytes(&self, making: &Making<'_>) -> impl Iterator<Item = (How, u64)> {
        let sources = making.sources(self.dequantize).into_iter();
        sources.map(|(role, id, pieces)| (self.how(role, id, pieces), self.len_bytes(id, pieces)))
    }

    /// Returns the bytes that the small sources of an operation take.
    fn small_len_bytes(&self, making: &Making<'_>, small_len_bytes_max: u64) -> u64 {
        let small = self.lens_bytes(making).filter(|(_, len_bytes)| *len_bytes <= small_len_bytes_max);
        small.map(|(_, len_bytes)| align_up(len_bytes, SMALL_ALIGN_BYTES)).sum()
    }

    /// Returns the bytes that the other sources take in the ring, wherever they begin.
    fn slot_len_bytes(&self, making: &Making<'_>, small_len_bytes_max: u64) -> u64 {
        let congruence = congruence_bytes(self.machine, self.device);
        let large = self.lens_bytes(making).filter(|(_, len_bytes)| *len_bytes > small_len_bytes_max);
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
    fn new(world: &World<'_>, max_bytes: Option<u64>, makings: &[&Making<'_>]) -> Result<Budget, PlanError> {
        let align_bytes = congruence_bytes(world.machine, world.device);
        let mut small_len_bytes_max = SMALL_LEN_BYTES_MAX;
        loop {
            let (mut largest, mut sum, mut small) = ((0, None), 0u64, 0u64);
            for making in makings {
                let len = world.slot_len_bytes(making, small_len_bytes_max);
                sum = sum.saturating_add(len);
                small = small.saturating_add(world.small_len_bytes(making, small_len_bytes_max));
                if len > largest.0 {
                    largest = (len, Some(making));
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
                Some(making) if needed_bytes > max_bytes => {
                    return Err(PlanError::OverTransientBudget {
                        name: making.group.name.clone(),
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
