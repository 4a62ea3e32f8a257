//! Where tensors lie in the result's arenas, and which stretches of the files go there.

use std::ops::Range;

use super::lifetimes::Lifetimes;
use super::wanted::{Wanted, What};
use crate::checkpoint::Checkpoint;
use crate::extent::align_up;
use crate::placement::{Arena, DeviceId, Place};
use crate::plan::{Machine, PlacedTensor};
use crate::request::Request;
use crate::slice::Pieces;

/// A stretch of a file and where it goes.
#[derive(Clone)]
pub(super) struct Segment {
    pub(super) file: u32,
    pub(super) begin: u64,
    pub(super) end: u64,
    pub(super) target: Place,
    pub(super) in_place: bool,
    /// The tensors of the result it brings bytes of, or is needed for.
    pub(super) tensors: Range<u32>,
    /// The operation it is a source of, and the ones that must be over before it may land.
    pub(super) operation: Option<u32>,
    pub(super) after: Range<u32>,
}

/// Tensors and arenas of the result; the segments of what lands in it as stored, ascending by file and offset.
pub(super) struct Placed {
    pub(super) tensors: Vec<PlacedTensor>,
    pub(super) arenas: Vec<Arena>,
    pub(super) segments: Vec<Segment>,
}

pub(super) fn place(
    checkpoint: &Checkpoint,
    request: &Request,
    wanted: &[Wanted<'_>],
    lifetimes: &Lifetimes,
    machine: &Machine,
) -> Placed {
    let runs = runs(checkpoint, request, wanted, lifetimes, machine);
    let congruence = congruence_bytes(machine, request.device);
    let mut ends = vec![0u64; lifetimes.arenas.len()];
    let unplaced = |(wanted, arena): (_, &u32)| unplaced(checkpoint, request, wanted, *arena);
    let mut tensors: Vec<_> = wanted.iter().zip(&lifetimes.of_wanted).map(unplaced).collect();
    let mut segments = Vec::with_capacity(runs.len());

    for run in runs {
        let end = &mut ends[run.arena as usize];
        let Some(stored) = run.stored else {
            let tensor = &mut tensors[run.tensors.start as usize];
            tensor.place.offset_bytes = align_up(*end, CONGRUENCE_BYTES);
            *end = tensor.place.offset_bytes + tensor.len_bytes;
            continue;
        };
        let offset_bytes = stored.how.start(*end, stored.begin, congruence);
        let target = Place { arena: run.arena, offset_bytes };
        let range = run.tensors.start as usize..run.tensors.end as usize;
        for (tensor, wanted) in tensors[range.clone()].iter_mut().zip(&wanted[range]) {
            if tensor.len_bytes > 0 {
                let from_run = checkpoint.tensor(wanted.id).file_offset_bytes - stored.begin;
                tensor.place = Place { offset_bytes: target.offset_bytes + from_run, ..target };
            }
        }
        let segment = Segment {
            file: stored.file,
            begin: stored.begin,
            end: stored.end,
            target,
            in_place: stored.how == How::InPlace,
            tensors: run.tensors.clone(),
            operation: None,
            after: 0..0,
        };
        let len = match &wanted[run.tensors.start as usize].what {
            What::Stored(Some(pieces)) => gather(pieces, &segment, &mut segments),
            _ => {
                segments.push(segment);
                stored.end - stored.begin
            }
        };
        *end = stored.how.end(target.offset_bytes + len, congruence);
    }

    let arena = |((group, is_external), end): (&(String, bool), &u64)| Arena {
        device: request.device,
        group: group.clone(),
        is_external: *is_external,
        is_scratch: false,
        len_bytes: if *is_external { *end } else { align_up(*end, congruence) },
    };
    let arenas = lifetimes.arenas.iter().zip(&ends).map(arena).collect();
    Placed { tensors, arenas, segments }
}

/// Tensors of one arena that are placed together.
struct Run {
    arena: u32,
    /// Range of the wanted tensors.
    tensors: Range<u32>,
    /// `None` for one that an operation makes.
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
    /// Staged and gathered to an aligned place: a misaligned tensor, one in pieces, one for the caller's own memory, or a source of an
    /// operation.
    Gathered,
}

impl How {
    /// Returns where bytes that begin there in their file start, behind what ends at `end`.
    pub(super) fn start(self, end: u64, begin: u64, congruence: u64) -> u64 {
        match self {
            How::InPlace => align_up(end, congruence) + begin % congruence,
            How::Congruent => align_up(end, CONGRUENCE_BYTES) + begin % CONGRUENCE_BYTES,
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
    for (index, wanted) in wanted.iter().enumerate() {
        let (index, arena) = (index as u32, lifetimes.of_wanted[index]);
        let What::Stored(pieces) = &wanted.what else {
            runs.push(Run { arena, tensors: index..index + 1, stored: None });
            continue;
        };
        let tensor = checkpoint.tensor(wanted.id);
        let (begin, len) = (tensor.file_offset_bytes, tensor.info.len_bytes());
        if len == 0 || pieces.as_ref().is_some_and(|pieces| pieces.count() == 0) {
            continue; // No bytes to move; it stays at the start of its arena.
        }
        let aligned = begin.is_multiple_of(tensor.info.dtype.align_bytes());
        let in_run = aligned && pieces.is_none() && !wanted.is_external;
        let how = if in_run { How::Congruent } else { How::Gathered };
        if let Some(Run { arena: last, tensors, stored: Some(stored) }) = runs.last_mut()
            && (stored.file, stored.end, *last) == (tensor.file, begin, arena)
            && (stored.how, how) == (How::Congruent, How::Congruent)
        {
            (stored.end, tensors.end) = (begin + len, index + 1);
            continue;
        }
        let stored = Stored { file: tensor.file, begin, end: begin + len, how };
        runs.push(Run { arena, tensors: index..index + 1, stored: Some(stored) });
    }
    for stored in runs.iter_mut().filter_map(|run| run.stored.as_mut()) {
        let is_long = stored.end - stored.begin >= IN_PLACE_LEN_BYTES_MIN;
        let can_land = || machine.in_place.route(request.device, stored.file).is_some();
        if stored.how == How::Congruent && is_long && can_land() {
            stored.how = How::InPlace;
        }
    }
    runs
}

/// Returns the tensor at the start of its arena, which is where one without bytes stays.
fn unplaced(checkpoint: &Checkpoint, request: &Request, wanted: &Wanted<'_>, arena: u32) -> PlacedTensor {
    let shape = match &wanted.what {
        What::Stored(Some(pieces)) => Some(pieces.shape().into()),
        _ => None,
    };
    let dtype = match (&wanted.what, &request.dequantize) {
        (What::Made(_), Some(dequantize)) => dequantize.dtype,
        _ => checkpoint.tensor(wanted.id).info.dtype,
    };
    PlacedTensor {
        id: wanted.id,
        dtype,
        name: None,
        shape,
        place: Place { arena, offset_bytes: 0 },
        len_bytes: wanted.len_bytes(checkpoint, request),
        read_count: 0,
        operation_count: 0,
        copy_of: None,
    }
}

/// Adds one segment for each piece, back to back in the target; returns their length together.
fn gather(pieces: &Pieces, whole: &Segment, segments: &mut Vec<Segment>) -> u64 {
    let mut gathered = 0;
    for offset in pieces.offsets_bytes() {
        let begin = whole.begin + offset;
        let target = Place { offset_bytes: whole.target.offset_bytes + gathered, ..whole.target };
        segments.push(Segment { begin, end: begin + pieces.piece_len_bytes(), target, ..whole.clone() });
        gathered += pieces.piece_len_bytes();
    }
    gathered
}

/// Arena offsets equal file offsets modulo this: the strictest alignment that device kernels and
/// allocators of either vendor ask for.
pub(super) const CONGRUENCE_BYTES: u64 = 256;

/// A shorter run is staged even where it could be read in place: neighbours then share one request,
/// and copying 64 KiB (about 10 us) costs less than a request of its own (about 100 us cold).
pub(super) const IN_PLACE_LEN_BYTES_MIN: u64 = 64 << 10;
