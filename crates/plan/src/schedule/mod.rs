//! From a request to a plan: the tensors wanted, their places, the sources of operations, the reads.

mod assembled;
mod lifetimes;
mod over_reads;
mod place;
mod reads;
mod requests;
mod routes;
mod scratch;
mod segment;
mod select;
mod wanted;

use std::sync::{Arc, OnceLock};

use crate::checkpoint::{Checkpoint, TensorId};
use crate::machine::Machine;
use crate::plan::{Plan, PlanError, Promised, Read, Target};
use crate::request::Request;
use lifetimes::Lifetimes;
use over_reads::over_reads;
use place::{Placed, place};
use reads::{Reads, reads};
use requests::requests;
use routes::route;
use scratch::{Scratch, scratch};
use segment::Segment;
use wanted::wanted;

pub(crate) fn plan(
    checkpoint: &Arc<Checkpoint>,
    request: &Request,
    machine: &Machine,
) -> Result<Plan, PlanError> {
    let is_length = |len_bytes: u64| len_bytes > 0 && len_bytes.is_multiple_of(BUFFER_ALIGN_BYTES);
    assert!(is_length(machine.buffer_len_bytes));
    assert!(machine.in_place.routes.iter().all(|route| is_length(route.read_len_bytes_max)));
    assert!(machine.buffer_count > 0);
    assert!(machine.direct_align_bytes.is_power_of_two() && machine.direct_align_bytes <= BUFFER_ALIGN_BYTES);
    let over_read_max = request.over_read_max;
    if !(over_read_max.is_finite() && over_read_max >= 1.0) {
        return Err(PlanError::BadOverReadMax { found: over_read_max.to_string() });
    }
    let wanted = wanted(checkpoint, request, machine)?;
    let lifetimes = Lifetimes::new(request, &wanted);
    let Placed { mut tensors, mut arenas, mut segments, names, dims } =
        place(checkpoint, request, &wanted, &lifetimes, machine);
    let Scratch { mut operations, payloads, mut small, mut large } =
        scratch(checkpoint, request, &wanted, &tensors, &mut arenas, machine)?;
    drop((wanted, lifetimes)); // Reads take as much again.
    let mut lists = [&mut segments, &mut small, &mut large];
    let mut vain = route(&mut lists, over_read_max, machine);
    let is_in_order = |a: &Segment, b: &Segment| (a.file, a.begin) <= (b.file, b.begin);
    if !segments.is_sorted_by(is_in_order) {
        segments.sort_by_key(|segment| (segment.file, segment.begin, segment.end));
    }
    if !operations.is_empty() {
        segments = in_order(checkpoint, small, segments, large, &payloads);
    }
    let requests = requests(checkpoint, &segments, over_read_max, machine);
    let Reads { reads, copies, brought } =
        reads(checkpoint, &segments, &requests, &mut tensors, &mut operations, machine);

    let mut plan = Plan {
        checkpoint: Arc::clone(checkpoint),
        tensors,
        arenas,
        operations,
        reads,
        copies,
        brought,
        names,
        dims,
        vain: Vec::new(),
        over_reads: OnceLock::new(),
        unfused: request.assembly.as_ref().map_or(Vec::new(), |assembly| assembly.unfused.clone()),
        unused_rules: request.assembly.as_ref().map_or(Vec::new(), |assembly| assembly.unused_rules.clone()),
        machine: machine.clone(),
        promised: Promised::default(),
    };
    plan.promised = promise(&plan, requests.alignment_bytes);
    plan.vain = over_reads(over_read_max, &plan.promised, || {
        vain.extend(requests.aligned(checkpoint, &segments, machine));
        vain
    });
    match request.target_bytes_max {
        Some(max_bytes) if plan.promised.target_bytes > max_bytes => {
            Err(PlanError::OverBudget { needed_bytes: plan.promised.target_bytes, max_bytes })
        }
        _ => Ok(plan),
    }
}

/// Puts small sources first, and the sources of each operation together where its payload stands among what arrives as stored.
fn in_order(
    checkpoint: &Checkpoint,
    mut small: Vec<Segment>,
    stored: Vec<Segment>,
    large: Vec<Segment>,
    payloads: &[TensorId],
) -> Vec<Segment> {
    small.reserve(stored.len() + large.len());
    let mut stored = stored.into_iter().peekable();
    let mut last = None;
    for source in large {
        if source.operation != last
            && let Some(operation) = source.operation
        {
            let payload = checkpoint.tensor(payloads[operation as usize]);
            let payload = (payload.file, payload.file_offset_bytes);
            while let Some(segment) = stored.next_if(|segment| (segment.file, segment.begin) < payload) {
                small.push(segment);
            }
        }
        last = source.operation;
        small.push(source);
    }
    small.extend(stored);
    small
}

fn promise(plan: &Plan, alignment_bytes: u64) -> Promised {
    let is_staged = |target: &Target| matches!(target, Target::Staged { .. });
    let in_place = plan.reads.iter().filter(|read| !is_staged(&read.target));
    let staged = plan.staged();
    let buffer_len_bytes = staged.read_len_bytes_max.next_multiple_of(BUFFER_ALIGN_BYTES);
    let peak_staging_bytes = staged.reads.min(plan.machine.buffer_count.into()) * buffer_len_bytes;
    let own = |is_scratch| {
        plan.arenas.iter().filter(move |arena| !arena.is_external && arena.is_scratch == is_scratch)
    };
    let is_hosts = |device| plan.machine.in_place.is_hosts(device);
    let on_host = plan.arenas.iter().filter(|arena| !arena.is_external && is_hosts(arena.device));
    Promised {
        payload_bytes: plan.tensors.iter().map(|tensor| tensor.len_bytes).sum(),
        needed_bytes: plan.reads.iter().map(|read| read.payload_bytes).sum(),
        read_bytes: plan.reads.iter().map(Read::len_bytes).sum(),
        alignment_bytes,
        reads: plan.reads.len() as u64,
        copies: plan.copies.len() as u64,
        operations: plan.operations.len() as u64,
        in_place_bytes: in_place.map(Read::len_bytes).sum(),
        peak_staging_bytes,
        target_bytes: own(false).map(|arena| arena.len_bytes).sum(),
        transient_bytes: own(true).map(|arena| arena.len_bytes).sum(),
        peak_host_bytes: peak_staging_bytes + on_host.map(|arena| arena.len_bytes).sum::<u64>(),
    }
}

/// Staging buffers and reads are cut at multiples of this, the strictest alignment of direct reads
/// that common file systems report.
const BUFFER_ALIGN_BYTES: u64 = 4096;
