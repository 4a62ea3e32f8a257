//! Operations: where their sources wait, and which operation must be over before its place is taken again.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::place::{CONGRUENCE_BYTES, How, IN_PLACE_LEN_BYTES_MIN, congruence_bytes};
use super::segment::{Destination, Segment, Way, gather};
use super::wanted::{Making, Wanted};
use crate::checkpoint::{Checkpoint, TensorId};
use crate::extent::align_up;
use crate::machine::Machine;
use crate::placement::{Arena, DeviceId, Place};
use crate::plan::{Operation, PlacedTensor, PlanError, Source, Steps};
use crate::quant::Role;
use crate::request::{Dequantize, Request};
use crate::slice::Pieces;

/// Operations in the order of their payloads, and the segments of their sources.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) operations: Vec<Operation>,
    /// For each its payload, which says where in the result's order its sources stand.
    pub(super) payloads: Vec<TensorId>,
    /// Sources of a few bytes, which are read before everything else, ascending by file and offset.
    pub(super) small: Vec<Segment>,
    /// The other sources, those of an operation one behind the other; those of operations with the same payload, for several devices,
    /// ascending together, so that each byte is read once for all of them.
    pub(super) large: Vec<Segment>,
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
    let jobs = jobs(checkpoint, dequantize, wanted, machine);
    let mut rings = rings(request, &jobs, arenas.len() as u32, machine)?;
    scratch.operations.reserve(jobs.jobs.len());
    scratch.payloads.reserve(jobs.jobs.len());
    scratch.large.reserve(jobs.jobs.len());
    let mut alike = (None, 0); // The payload of the last operations, and where their sources begin.
    for job in &jobs.jobs {
        if alike.0 != Some(job.payload) {
            scratch.ascend(alike.1);
            alike = (Some(job.payload), scratch.large.len());
        }
        let ring = rings.get_mut(&job.device).expect("there is one for every device of a job");
        let operation = scratch.operations.len() as u32;
        let to = Destination {
            device: job.device,
            target: Place { arena: ring.arena, offset_bytes: 0 },
            tensors: job.tensor..job.tensor + 1,
            operation: Some(operation),
            after: 0..0,
        };
        let (making, needed) = (job.making, &jobs.needed[job.needed.clone()]);
        let sources = ring.place(checkpoint, needed, to, &mut scratch.small, &mut scratch.large);
        let mut recipe = Arc::clone(making.recipe());
        if recipe.fold.is_some() && !dequantize.fold {
            Arc::make_mut(&mut recipe).fold = None;
        }
        let place = tensors[job.tensor as usize].place;
        let offset_bytes = place.offset_bytes + making.offset_bytes;
        scratch.payloads.push(job.payload);
        scratch.operations.push(Operation {
            name: making.group.name.clone(),
            family: making.group.family,
            shape: making.shape().into_owned(),
            is_transposed: making.is_transposed,
            recipe,
            sources,
            tensor: job.tensor,
            place: Place { offset_bytes, ..place },
            len_bytes: making.len_bytes(dequantize),
            read_count: 0,
        });
    }
    scratch.ascend(alike.1);
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

impl Scratch {
    /// Puts the last of the large sources in the order of their files, unless one of their operations waits for another: all of that
    /// one's sources then come first.
    fn ascend(&mut self, first: usize) {
        let alike = &mut self.large[first..];
        let first_operation = alike.first().and_then(|source| source.operation);
        let is_alone = alike.last().is_none_or(|source| source.operation == first_operation);
        let waits = |source: &Segment| Some(source.after.end) > first_operation;
        if !is_alone && !alike.iter().any(waits) {
            alike.sort_by_key(|source| (source.file, source.begin));
        }
    }
}

/// What operations have to make, in the order of time, whatever the device.
struct Jobs<'w> {
    jobs: Vec<Job<'w>>,
    /// What they need, those of a job in the order of the checkpoint's table.
    needed: Vec<Needed<'w>>,
}

struct Job<'w> {
    payload: TensorId,
    /// The tensor of the result, and where that goes.
    tensor: u32,
    device: DeviceId,
    making: &'w Making<'w>,
    /// Range of what all jobs need.
    needed: Range<usize>,
}

/// A source of an operation, whole or in part.
struct Needed<'w> {
    role: Role,
    id: TensorId,
    file: u32,
    file_offset_bytes: u64,
    pieces: Option<&'w Pieces>,
    len_bytes: u64,
    how: How,
}

fn jobs<'w>(
    checkpoint: &Checkpoint,
    dequantize: &Dequantize,
    wanted: &'w [Wanted<'_>],
    machine: &Machine,
) -> Jobs<'w> {
    let mut jobs: Vec<Job<'_>> = Vec::with_capacity(wanted.len());
    for (tensor, wanted) in (0..).zip(wanted) {
        jobs.extend(wanted.makings().iter().map(|making| Job {
            payload: making.group.payload(),
            tensor,
            device: wanted.device,
            making,
            needed: 0..0,
        }));
    }
    jobs.sort_by_key(|job| job.payload);
    let shared = shared(checkpoint, dequantize, &jobs);
    let mut needed = Vec::with_capacity(2 * jobs.len());
    for job in &mut jobs {
        let first = needed.len();
        needed.extend(job.making.sources(dequantize).map(|(role, id, pieces)| {
            let stored = checkpoint.tensor(id);
            // Only whole payloads are worth a read of their own in place, and where several devices take one, it is read once through the
            // staging ring.
            let is_long = stored.info.len_bytes() >= IN_PLACE_LEN_BYTES_MIN;
            let is_worth_it = role == Role::Payload && is_long && pieces.is_none();
            let is_shared = shared.get(id.0 as usize).is_some_and(|takers| *takers > 1);
            let can_land = || machine.in_place.route(job.device, stored.file).is_some();
            Needed {
                role,
                id,
                file: stored.file,
                file_offset_bytes: stored.file_offset_bytes,
                pieces,
                len_bytes: pieces.map_or(stored.info.len_bytes(), Pieces::len_bytes),
                how: if is_worth_it && !is_shared && can_land() { How::InPlace } else { How::Gathered },
            }
        }));
        needed[first..].sort_by_key(|needed| needed.id);
        job.needed = first..needed.len();
    }
    Jobs { jobs, needed }
}

/// Counts how many operations take each stored tensor, up to 2; empty where all are on one device.
fn shared(checkpoint: &Checkpoint, dequantize: &Dequantize, jobs: &[Job<'_>]) -> Vec<u8> {
    if jobs.windows(2).all(|pair| pair[0].device == pair[1].device) {
        return Vec::new();
    }
    let mut takers = vec![0u8; checkpoint.len()];
    for (_, id, _) in jobs.iter().flat_map(|job| job.making.sources(dequantize)) {
        let count = &mut takers[id.0 as usize];
        *count = (*count + 1).min(2);
    }
    takers
}

/// Prepares a ring for every device that something is made on; `arena` is the number of the first arena they append.
fn rings(
    request: &Request,
    jobs: &Jobs<'_>,
    arena: u32,
    machine: &Machine,
) -> Result<BTreeMap<DeviceId, Ring>, PlanError> {
    let mut devices: Vec<DeviceId> = jobs.jobs.iter().map(|job| job.device).collect();
    devices.sort_unstable();
    devices.dedup();
    let ring = |(number, device): (u32, DeviceId)| {
        let congruence = congruence_bytes(machine, device);
        let budget = Budget::new(jobs, device, congruence, request.transient_bytes_max)?;
        let slots = Slots::new(budget.ring_len_bytes, congruence);
        let small_len_bytes_max = budget.small_len_bytes_max;
        Ok((device, Ring { congruence, small_len_bytes_max, slots, arena: arena + 2 * number, small_end: 0 }))
    };
    (0..).zip(devices).map(ring).collect()
}

/// Where the sources of one device's operations wait.
struct Ring {
    congruence: u64,
    small_len_bytes_max: u64,
    slots: Slots,
    /// The arena of small sources; that of the others follows.
    arena: u32,
    small_end: u64,
}

impl Ring {
    /// Places the sources of an operation, and adds their segments.
    fn place(
        &mut self,
        checkpoint: &Checkpoint,
        needed: &[Needed<'_>],
        to: Destination,
        small: &mut Vec<Segment>,
        large: &mut Vec<Segment>,
    ) -> Vec<Source> {
        let Ring { congruence, small_len_bytes_max, slots, arena, small_end } = self;
        let operation = to.operation.expect("sources are of an operation");
        let slot = slots.take(operation, slot_len_bytes(needed, *small_len_bytes_max, *congruence));
        let mut sources = Vec::with_capacity(needed.len());
        let mut end = slot.begin;
        for Needed { role, id, file, file_offset_bytes: begin, pieces, len_bytes, how } in needed {
            let (role, id, begin, len_bytes) = (*role, *id, *begin, *len_bytes);
            if len_bytes == 0 {
                continue;
            }
            let is_small = len_bytes <= *small_len_bytes_max;
            let place = if is_small {
                let offset_bytes = align_up(*small_end, SMALL_ALIGN_BYTES);
                *small_end = offset_bytes + len_bytes;
                Place { arena: *arena, offset_bytes }
            } else {
                let offset_bytes = how.start(end, begin, *congruence);
                end = how.end(offset_bytes + len_bytes, *congruence);
                Place { arena: *arena + 1, offset_bytes }
            };
            sources.push(Source { role, id, place, len_bytes });
            let after = if is_small { 0..0 } else { slot.after.clone() };
            let to = Destination { target: place, tensors: to.tensors.clone(), after, ..to };
            let segments = if is_small { &mut *small } else { &mut *large };
            match pieces {
                Some(pieces) => gather(checkpoint, id, pieces, &to, segments),
                None => segments.push(Segment {
                    id,
                    file: *file,
                    begin,
                    end: begin + len_bytes,
                    piece_len_bytes: len_bytes,
                    steps: Steps::ONCE,
                    device: to.device,
                    target: place,
                    way: if !is_small && *how == How::InPlace { Way::InPlace } else { Way::Staged },
                    tensors: to.tensors,
                    operation: to.operation,
                    after: to.after,
                }),
            }
        }
        sources
    }
}

/// Returns the bytes that the small sources of an operation take.
fn small_len_bytes(needed: &[Needed<'_>], small_len_bytes_max: u64) -> u64 {
    let small = needed.iter().filter(|needed| needed.len_bytes <= small_len_bytes_max);
    small.map(|needed| align_up(needed.len_bytes, SMALL_ALIGN_BYTES)).sum()
}

/// Returns the bytes that the other sources take in the ring, wherever they begin.
fn slot_len_bytes(needed: &[Needed<'_>], small_len_bytes_max: u64, congruence: u64) -> u64 {
    let large = needed.iter().filter(|needed| needed.len_bytes > small_len_bytes_max);
    let len = |needed: &Needed<'_>| match needed.how {
        // The aligned cover around it.
        How::InPlace => align_up(needed.len_bytes, congruence) + congruence,
        _ => align_up(needed.len_bytes, CONGRUENCE_BYTES),
    };
    // The payload may be preceded by sources that end off the congruence.
    align_up(large.map(len).sum::<u64>() + congruence, congruence)
}

/// How the transient memory is shared between small sources and the ring.
struct Budget {
    small_len_bytes_max: u64,
    ring_len_bytes: u64,
}

impl Budget {
    /// Calls fewer sources small where all of them would leave the ring less than half of what is allowed, or less than the largest
    /// operation needs.
    fn new(
        jobs: &Jobs<'_>,
        device: DeviceId,
        align_bytes: u64,
        max_bytes: Option<u64>,
    ) -> Result<Budget, PlanError> {
        let mut small_len_bytes_max = SMALL_LEN_BYTES_MAX;
        loop {
            let (mut largest, mut sum, mut small) = ((0, None), 0u64, 0u64);
            for job in jobs.jobs.iter().filter(|job| job.device == device) {
                let needed = &jobs.needed[job.needed.clone()];
                let len = slot_len_bytes(needed, small_len_bytes_max, align_bytes);
                sum = sum.saturating_add(len);
                small = small.saturating_add(small_len_bytes(needed, small_len_bytes_max));
                if len > largest.0 {
                    largest = (len, Some(job.making));
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
