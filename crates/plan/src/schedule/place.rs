//! Where tensors lie in the result's arenas, and which stretches of the files go there.

use std::ops::Range;

use super::lifetimes::{Lifetimes, Owner};
use super::segment::{Destination, Segment, Way, gather};
use super::wanted::Wanted;
use crate::checkpoint::{Checkpoint, TensorId};
use crate::extent::align_up;
use crate::machine::Machine;
use crate::placement::{Arena, DeviceId, Place};
use crate::plan::{PlacedTensor, Steps};
use crate::request::Request;

/// Tensors and arenas of the result; the segments of what lands in it as stored; the names and the dims that are not the checkpoint's.
pub(super) struct Placed {
    pub(super) tensors: Vec<PlacedTensor>,
    pub(super) arenas: Vec<Arena>,
    pub(super) segments: Vec<Segment>,
    pub(super) names: Vec<String>,
    pub(super) dims: Vec<u64>,
}

pub(super) fn place(
    checkpoint: &Checkpoint,
    request: &Request,
    wanted: &[Wanted<'_>],
    lifetimes: &Lifetimes,
    machine: &Machine,
) -> Placed {
    let runs = runs(checkpoint, request, wanted, lifetimes, machine);
    let mut ends = vec![0u64; lifetimes.arenas.len()];
    let (mut names, mut dims) = (Vec::new(), Vec::new());
    let unplaced = |(wanted, arena): (_, &u32)| unplaced(request, wanted, *arena, &mut names, &mut dims);
    let mut tensors: Vec<_> = wanted.iter().zip(&lifetimes.of_wanted).map(unplaced).collect();
    let mut segments = Vec::with_capacity(runs.len());

    for run in runs {
        let end = &mut ends[run.arena as usize];
        let device = lifetimes.arenas[run.arena as usize].device;
        let Some(stored) = run.stored else {
            let index = run.tensors.start as usize;
            let (tensor, wanted) = (&mut tensors[index], &wanted[index]);
            tensor.place.offset_bytes = align_up(*end, CONGRUENCE_BYTES);
            *end = tensor.place.offset_bytes + wanted.span_bytes(request);
            let to = Destination {
                device,
                target: tensor.place,
                tensors: run.tensors,
                operation: None,
                after: 0..0,
            };
            for part in wanted.parts() {
                gather(checkpoint, part.id, &part.pieces, &to, &mut segments);
            }
            continue;
        };
        let congruence = congruence_bytes(machine, device);
        let offset_bytes = stored.how.start(*end, stored.begin, congruence);
        let target = Place { arena: run.arena, offset_bytes };
        let range = run.tensors.start as usize..run.tensors.end as usize;
        for (tensor, wanted) in tensors[range.clone()].iter_mut().zip(&wanted[range]) {
            if tensor.len_bytes > 0
                && let Some((_, begin, _)) = wanted.run()
            {
                tensor.place = Place { offset_bytes: offset_bytes + (begin - stored.begin), ..target };
            }
        }
        let len_bytes = stored.end - stored.begin;
        *end = stored.how.end(offset_bytes + len_bytes, congruence);
        segments.push(Segment {
            id: wanted[run.tensors.start as usize].stored.id,
            file: stored.file,
            begin: stored.begin,
            end: stored.end,
            piece_len_bytes: len_bytes,
            steps: Steps::ONCE,
            device,
            target,
            way: if stored.how == How::InPlace { Way::InPlace } else { Way::Staged },
            tensors: run.tensors,
            operation: None,
            after: 0..0,
        });
    }

    let arena = |(owner, end): (&Owner, &u64)| Arena {
        device: owner.device,
        group: owner.name.clone(),
        is_external: owner.is_external,
        is_scratch: false,
        len_bytes: match owner.is_external {
            true => *end,
            false => align_up(*end, congruence_bytes(machine, owner.device)),
        },
    };
    let arenas = lifetimes.arenas.iter().zip(&ends).map(arena).collect();
    Placed { tensors, arenas, segments, names, dims }
}

/// Tensors of one arena that are placed together.
struct Run {
    arena: u32,
    /// Range of the wanted tensors.
    tensors: Range<u32>,
    /// `None` for one that is put together, made or copied: it is placed by itself.
    stored: Option<Stored>,
}

/// Bytes that lie back to back in one file: one copy moves them all.
struct Stored {
    file: u32,
    begin: u64,
    end: u64,
    how: How,
}

/// How stored bytes get to their place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// Read straight into the arena.
    InPlace,
    /// Staged and copied, keeping the file offset modulo the congruence.
    Congruent,
    /// As `Congruent`, of bytes that are for several tensors: never in place.
    Shared,
    /// Staged and gathered to an aligned place: a misaligned tensor, one for the caller's own memory, or a source of an operation.
    Gathered,
}

impl How {
    /// Returns where bytes that begin there in their file start, behind what ends at `end`.
    pub(super) fn start(self, end: u64, begin: u64, congruence: u64) -> u64 {
        match self {
            How::InPlace => align_up(end, congruence) + begin % congruence,
            How::Congruent | How::Shared => align_up(end, CONGRUENCE_BYTES) + begin % CONGRUENCE_BYTES,
            How::Gathered => align_up(end, CONGRUENCE_BYTES),
        }
    }

    /// Returns where the next bytes may start: in place, the aligned cover is a run's own.
    pub(super) fn end(self, end: u64, congruence: u64) -> u64 {
        if self == How::InPlace { align_up(end, congruence) } else { end }
    }
}

/// In place, the aligned cover of a run must fit around it: that many bytes before and behind are its own.
pub(super) fn congruence_bytes(machine: &Machine, device: DeviceId) -> u64 {
    if machine.in_place.is_any(device) {
        machine.direct_align_bytes.max(CONGRUENCE_BYTES)
    } else {
        CONGRUENCE_BYTES
    }
}

fn runs(
    checkpoint: &Checkpoint,
    request: &Request,
    wanted: &[Wanted<'_>],
    lifetimes: &Lifetimes,
    machine: &Machine,
) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let shared = Shared::new(checkpoint, request, wanted);
    for (index, wanted) in wanted.iter().enumerate() {
        let (index, arena) = (index as u32, lifetimes.of_wanted[index]);
        let run = wanted.run().filter(|_| wanted.copy_of.is_none());
        let Some((file, begin, end)) = run else {
            if wanted.len_bytes(request) > 0 {
                runs.push(Run { arena, tensors: index..index + 1, stored: None });
            }
            continue;
        };
        if begin == end {
            continue; // No bytes to move; it stays at the start of its arena.
        }
        let is_aligned = begin.is_multiple_of(wanted.stored.info.dtype.align_bytes());
        let in_run = is_aligned && wanted.external.is_none();
        let how = match in_run {
            false => How::Gathered,
            true if shared.is_shared(wanted.stored.id) => How::Shared,
            true => How::Congruent,
        };
        if let Some(Run { arena: last, tensors, stored: Some(stored) }) = runs.last_mut()
            && (stored.file, stored.end, *last) == (file, begin, arena)
            && (stored.how, in_run) == (how, true)
        {
            (stored.end, tensors.end) = (end, index + 1);
            continue;
        }
        runs.push(Run { arena, tensors: index..index + 1, stored: Some(Stored { file, begin, end, how }) });
    }
    for Run { arena, stored, .. } in &mut runs {
        let Some(stored) = stored else { continue };
        let device = lifetimes.arenas[*arena as usize].device;
        let is_long = stored.end - stored.begin >= IN_PLACE_LEN_BYTES_MIN;
        let can_land = || machine.in_place.route(device, stored.file).is_some();
        if stored.how == How::Congruent && is_long && can_land() {
            stored.how = How::InPlace;
        }
    }
    runs
}

/// Knows which stored tensors several of the result's take bytes of: they share reads, which go through the staging ring.
struct Shared {
    /// By the tensor's place in the table, up to 2; empty where no two can.
    takers: Vec<u8>,
}

impl Shared {
    fn new(checkpoint: &Checkpoint, request: &Request, wanted: &[Wanted<'_>]) -> Shared {
        if request.assembly.is_none() && request.device_map.is_none() {
            return Shared { takers: Vec::new() };
        }
        let mut takers = vec![0u8; checkpoint.len()];
        for wanted in wanted.iter().filter(|wanted| wanted.copy_of.is_none()) {
            let parts = wanted.parts();
            let whole = parts.is_empty().then_some(wanted.stored.id);
            for id in parts.iter().map(|part| part.id).chain(whole) {
                let count = &mut takers[id.0 as usize];
                *count = (*count + 1).min(2);
            }
        }
        Shared { takers }
    }

    fn is_shared(&self, id: TensorId) -> bool {
        self.takers.get(id.0 as usize).is_some_and(|count| *count > 1)
    }
}

/// Returns the tensor at the start of its arena, which is where one without bytes stays.
fn unplaced(
    request: &Request,
    wanted: &Wanted<'_>,
    arena: u32,
    names: &mut Vec<String>,
    dims: &mut Vec<u64>,
) -> PlacedTensor {
    let name = wanted.name.map(|name| {
        names.push(name.to_owned());
        names.len() as u32 - 1
    });
    let shape = wanted.own_shape().map(|shape| {
        let start = dims.len();
        dims.extend_from_slice(&shape);
        start..dims.len()
    });
    PlacedTensor {
        id: wanted.stored.id,
        dtype: wanted.dtype(request),
        name,
        shape,
        place: Place { arena, offset_bytes: 0 },
        len_bytes: wanted.len_bytes(request),
        read_count: 0,
        operation_count: wanted.makings().len() as u32,
        copy_of: wanted.copy_of,
    }
}

/// Arena offsets equal file offsets modulo this: the strictest alignment that device kernels and
/// allocators of either vendor ask for.
pub(super) const CONGRUENCE_BYTES: u64 = 256;

/// A shorter run is staged even where it could be read in place: neighbours then share one request,
/// and copying 64 KiB (about 10 us) costs less than a request of its own (about 100 us cold).
pub(super) const IN_PLACE_LEN_BYTES_MIN: u64 = 64 << 10;
