//! From a request to a plan, in three steps: runs of tensors, their places, the reads.

use std::collections::HashMap;
use std::sync::Arc;

use crate::checkpoint::{Checkpoint, TensorId};
use crate::extent::{Extent, align_up};
use crate::placement::{ARENA_LEN_BYTES_MIN, Arena, GROUP_DEPTH_MAX, Place, lifetime_groups};
use crate::plan::{Copy, Machine, PlacedTensor, Plan, PlanError, Promised, Read, Target};
use crate::request::Request;
use crate::slice::{Pieces, Slice};

pub(crate) fn plan(
    checkpoint: &Arc<Checkpoint>,
    request: &Request,
    machine: &Machine,
) -> Result<Plan, PlanError> {
    assert!(machine.buffer_len_bytes > 0 && machine.buffer_len_bytes.is_multiple_of(BUFFER_ALIGN_BYTES));
    assert!(machine.buffer_count > 0);
    assert!(machine.direct_align_bytes.is_power_of_two() && machine.direct_align_bytes <= BUFFER_ALIGN_BYTES);
    let wanted = wanted(checkpoint, request)?;
    let groups = Groups::new(checkpoint, &wanted);
    let runs = runs(checkpoint, &wanted, &groups, machine);
    let Placed { mut tensors, arenas, segments } =
        place(checkpoint, request, &wanted, &runs, &groups, machine);
    let (reads, copies) = reads(checkpoint, &segments, &mut tensors, machine);

    let promised = promise(&tensors, &arenas, &reads, &copies, machine);
    if let Some(max_bytes) = request.target_bytes_max
        && promised.target_bytes > max_bytes
    {
        return Err(PlanError::OverBudget { needed_bytes: promised.target_bytes, max_bytes });
    }
    Ok(Plan {
        checkpoint: Arc::clone(checkpoint),
        tensors,
        arenas,
        reads,
        copies,
        machine: *machine,
        promised,
    })
}

/// A tensor asked for: whole or in pieces, into an arena or into memory of the caller's own.
struct Wanted {
    id: TensorId,
    pieces: Option<Pieces>,
    is_external: bool,
}

fn wanted(checkpoint: &Checkpoint, request: &Request) -> Result<Vec<Wanted>, PlanError> {
    let whole = |id| Wanted { id, pieces: None, is_external: false };
    let mut wanted: Vec<Wanted> = request.tensors(checkpoint)?.into_iter().map(whole).collect();
    let find = |name: &str| {
        let unknown = || PlanError::UnknownTensor { name: name.to_owned(), tensor_count: checkpoint.len() };
        checkpoint.find(name).ok_or_else(unknown)
    };
    for name in &request.external {
        let id = find(name)?.id;
        let index = wanted.binary_search_by_key(&id, |wanted| wanted.id);
        let index = index.map_err(|_| PlanError::ExternalNotSelected { name: name.clone() })?;
        wanted[index].is_external = true;
    }
    for (name, slice) in &request.slices {
        let tensor = find(name)?;
        let index = wanted.binary_search_by_key(&tensor.id, |wanted| wanted.id);
        let index = index.map_err(|_| PlanError::SliceNotSelected { name: name.clone() })?;
        let of = |slice: &Slice| slice.pieces(tensor.info.dtype, tensor.info.shape);
        let pieces = of(slice).map_err(|source| PlanError::Slice { name: name.clone(), source })?;
        wanted[index].pieces = Some(pieces);
    }
    Ok(wanted)
}

/// Which arena each tensor belongs to: the caller's own memory, or that of the smallest lifetime group around the
/// tensor that is worth one.
struct Groups {
    /// Name, and whether it is the caller's own.
    arenas: Vec<(String, bool)>,
    of_wanted: Vec<u32>,
}

impl Groups {
    fn new(checkpoint: &Checkpoint, wanted: &[Wanted]) -> Groups {
        let mut len_bytes: HashMap<&str, u64> = HashMap::new();
        // Neighbours mostly share their groups: sums stay here until a name leaves them, which spares most look-ups.
        let mut open = [("", 0); GROUP_DEPTH_MAX];
        for wanted in wanted.iter().filter(|wanted| !wanted.is_external) {
            let info = checkpoint.tensor(wanted.id).info;
            for (open, group) in open.iter_mut().zip(lifetime_groups(info.name)) {
                if open.0 != group {
                    *len_bytes.entry(open.0).or_default() += open.1;
                    *open = (group, 0);
                }
                open.1 += info.len_bytes();
            }
        }
        for (group, len) in open {
            *len_bytes.entry(group).or_default() += len;
        }
        let mut numbers: HashMap<&str, u32> = HashMap::new();
        let mut last: Option<(&str, u32)> = None;
        let mut arenas: Vec<(String, bool)> = Vec::new();
        let mut add = |name: &str, is_external| {
            arenas.push((name.to_owned(), is_external));
            arenas.len() as u32 - 1
        };
        let arena = |wanted: &Wanted| {
            let name = checkpoint.tensor(wanted.id).info.name;
            if wanted.is_external {
                return add(name, true);
            }
            let smallest = lifetime_groups(name).next().unwrap_or("");
            if let Some((_, arena)) = last.filter(|(group, _)| *group == smallest) {
                return arena;
            }
            let worth_one = |group: &&str| len_bytes[*group] >= ARENA_LEN_BYTES_MIN;
            let group = lifetime_groups(name).find(worth_one).unwrap_or("");
            let arena = *numbers.entry(group).or_insert_with(|| add(group, false));
            last = Some((smallest, arena));
            arena
        };
        let of_wanted = wanted.iter().map(arena).collect();
        Groups { arenas, of_wanted }
    }
}

/// Tensors that lie back to back in one file and belong to one group: one copy moves them all.
struct Run {
    file: u32,
    begin: u64,
    end: u64,
    group: u32,
    /// Range of the wanted tensors.
    first: u32,
    last: u32,
    how: How,
}

/// How a run's bytes get to their place.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// Read straight into the arena.
    InPlace,
    /// Staged and copied, keeping the file offset modulo the congruence.
    Congruent,
    /// Staged and gathered to an aligned place: a misaligned tensor, one in pieces, or one for the caller's own memory.
    Gathered,
}

fn runs(checkpoint: &Checkpoint, wanted: &[Wanted], groups: &Groups, machine: &Machine) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (index, wanted) in wanted.iter().enumerate() {
        let tensor = checkpoint.tensor(wanted.id);
        let (begin, len) = (tensor.file_offset_bytes, tensor.info.len_bytes());
        let end = begin + len;
        let (index, group) = (index as u32, groups.of_wanted[index]);
        let aligned = begin.is_multiple_of(tensor.info.dtype.align_bytes());
        let in_run = aligned && wanted.pieces.is_none() && !wanted.is_external;
        let how = if in_run { How::Congruent } else { How::Gathered };
        if len == 0 || wanted.pieces.as_ref().is_some_and(|pieces| pieces.count() == 0) {
            continue; // No bytes to move; its place is decided below.
        }
        if let Some(run) = runs.last_mut()
            && (run.file, run.end, run.group) == (tensor.file, begin, group)
            && (run.how, how) == (How::Congruent, How::Congruent)
        {
            (run.end, run.last) = (end, index + 1);
            continue;
        }
        runs.push(Run { file: tensor.file, begin, end, group, first: index, last: index + 1, how });
    }
    for run in &mut runs {
        if machine.in_place && run.how == How::Congruent && run.end - run.begin >= IN_PLACE_LEN_BYTES_MIN {
            run.how = How::InPlace;
        }
    }
    runs
}

/// A stretch of a file and where it goes; ascending by file and offset.
struct Segment {
    file: u32,
    begin: u64,
    end: u64,
    target: Place,
    in_place: bool,
    first: u32,
    last: u32,
}

struct Placed {
    tensors: Vec<PlacedTensor>,
    arenas: Vec<Arena>,
    segments: Vec<Segment>,
}

fn place(
    checkpoint: &Checkpoint,
    request: &Request,
    wanted: &[Wanted],
    runs: &[Run],
    groups: &Groups,
    machine: &Machine,
) -> Placed {
    // In place, the aligned cover of a run must fit around it: that many bytes before and behind are its own.
    let congruence =
        if machine.in_place { machine.direct_align_bytes.max(CONGRUENCE_BYTES) } else { CONGRUENCE_BYTES };
    let mut ends = vec![0u64; groups.arenas.len()];
    let unplaced = |(wanted, arena): (_, &u32)| unplaced(checkpoint, wanted, *arena);
    let mut tensors: Vec<_> = wanted.iter().zip(&groups.of_wanted).map(unplaced).collect();
    let mut segments = Vec::with_capacity(runs.len());

    for run in runs {
        let end = &mut ends[run.group as usize];
        let own = match run.how {
            How::InPlace => congruence,
            How::Congruent | How::Gathered => CONGRUENCE_BYTES,
        };
        let phase = if run.how == How::Gathered { 0 } else { run.begin % own };
        let target = Place { arena: run.group, offset_bytes: align_up(*end, own) + phase };
        let tensors = &mut tensors[run.first as usize..run.last as usize];
        for (tensor, wanted) in tensors.iter_mut().zip(&wanted[run.first as usize..]) {
            if tensor.len_bytes > 0 {
                let from_run = checkpoint.tensor(wanted.id).file_offset_bytes - run.begin;
                tensor.place = Place { offset_bytes: target.offset_bytes + from_run, ..target };
            }
        }
        let segment = Segment {
            file: run.file,
            begin: run.begin,
            end: run.end,
            target,
            in_place: run.how == How::InPlace,
            first: run.first,
            last: run.last,
        };
        let len = match &wanted[run.first as usize].pieces {
            Some(pieces) => gather(pieces, &segment, &mut segments),
            None => {
                segments.push(segment);
                run.end - run.begin
            }
        };
        *end = target.offset_bytes + len;
        if run.how == How::InPlace {
            *end = align_up(*end, congruence);
        }
    }

    let arena = |((group, is_external), end): (&(String, bool), &u64)| Arena {
        device: request.device,
        group: group.clone(),
        is_external: *is_external,
        len_bytes: if *is_external { *end } else { align_up(*end, congruence) },
    };
    let arenas = groups.arenas.iter().zip(&ends).map(arena).collect();
    Placed { tensors, arenas, segments }
}

/// Returns the tensor at the start of its arena, which is where one without bytes stays.
fn unplaced(checkpoint: &Checkpoint, wanted: &Wanted, arena: u32) -> PlacedTensor {
    let info = checkpoint.tensor(wanted.id).info;
    let pieces = wanted.pieces.as_ref();
    PlacedTensor {
        id: wanted.id,
        dtype: info.dtype,
        sliced_shape: pieces.map(|pieces| pieces.shape().into()),
        place: Place { arena, offset_bytes: 0 },
        len_bytes: pieces.map_or(info.len_bytes(), Pieces::len_bytes),
        read_count: 0,
    }
}

/// Adds one segment for each piece, back to back in the target; returns their length together.
fn gather(pieces: &Pieces, whole: &Segment, segments: &mut Vec<Segment>) -> u64 {
    let mut gathered = 0;
    for offset in pieces.offsets_bytes() {
        let begin = whole.begin + offset;
        let target = Place { offset_bytes: whole.target.offset_bytes + gathered, ..whole.target };
        segments.push(Segment { begin, end: begin + pieces.piece_len_bytes(), target, ..*whole });
        gathered += pieces.piece_len_bytes();
    }
    gathered
}

fn reads(
    checkpoint: &Checkpoint,
    segments: &[Segment],
    tensors: &mut [PlacedTensor],
    machine: &Machine,
) -> (Vec<Read>, Vec<Copy>) {
    let (mut reads, mut copies) = (Vec::new(), Vec::new());
    let mut rest = segments;
    while let [segment, ..] = rest {
        let file_len = checkpoint.files()[segment.file as usize].len_bytes();
        if segment.in_place {
            read_in_place(segment, file_len, machine, &mut reads);
            rest = &rest[1..];
        } else {
            let count = 1 + rest.windows(2).take_while(|pair| bridges(&pair[0], &pair[1])).count();
            let (together, behind) = rest.split_at(count);
            read_staged(together, file_len, machine, &mut reads, &mut copies);
            rest = behind;
        }
    }
    narrow_to_tensors(checkpoint, &mut reads, tensors);
    (reads, copies)
}

/// Tells whether one request for both segments is cheaper than two.
fn bridges(first: &Segment, second: &Segment) -> bool {
    let gap_is_cheap = second.begin.saturating_sub(first.end) <= GAP_LEN_BYTES_MAX;
    first.file == second.file && gap_is_cheap && !second.in_place
}

fn read_in_place(segment: &Segment, file_len: u64, machine: &Machine, reads: &mut Vec<Read>) {
    let whole =
        Extent { file: segment.file, offset_bytes: segment.begin, len_bytes: segment.end - segment.begin };
    let cover = whole.cover(machine.direct_align_bytes, file_len);
    let max = machine.buffer_len_bytes;
    // Cut at multiples of the read length in the *arena*: neighbours then share no huge page.
    let phase = (segment.target.offset_bytes + max - segment.begin % max) % max;
    reads.extend(cover.split(max, phase).map(|extent| {
        let offset_bytes = segment.target.offset_bytes + extent.offset_bytes - segment.begin;
        let target = Target::InPlace(Place { offset_bytes, ..segment.target });
        Read { extent, target, tensors: segment.first..segment.last }
    }));
}

fn read_staged(
    segments: &[Segment],
    file_len: u64,
    machine: &Machine,
    reads: &mut Vec<Read>,
    copies: &mut Vec<Copy>,
) {
    let (first, last) = (&segments[0], &segments[segments.len() - 1]);
    let whole = Extent { file: first.file, offset_bytes: first.begin, len_bytes: last.end - first.begin };
    let cover = whole.cover(machine.direct_align_bytes, file_len);
    let max = machine.buffer_len_bytes;
    let phase = max - cover.offset_bytes % max; // The first read fills its buffer.
    let mut next = 0; // The first segment that reaches into the extent at hand.
    for extent in cover.split(max, phase) {
        let first_copy = copies.len() as u32;
        while segments.get(next).is_some_and(|segment| segment.end <= extent.offset_bytes) {
            next += 1;
        }
        let inside = segments[next..].iter().take_while(|segment| segment.begin < extent.end_bytes());
        let (mut first_tensor, mut last_tensor) = (u32::MAX, 0);
        for segment in inside {
            let begin = segment.begin.max(extent.offset_bytes);
            let end = segment.end.min(extent.end_bytes());
            copies.push(Copy {
                source_offset_bytes: begin - extent.offset_bytes,
                target: Place {
                    offset_bytes: segment.target.offset_bytes + (begin - segment.begin),
                    ..segment.target
                },
                len_bytes: end - begin,
            });
            (first_tensor, last_tensor) = (first_tensor.min(segment.first), last_tensor.max(segment.last));
        }
        // A long gap between two pieces of one request can leave a buffer without payload.
        if copies.len() as u32 > first_copy {
            let target = Target::Staged { copies: first_copy..copies.len() as u32 };
            reads.push(Read { extent, target, tensors: first_tensor..last_tensor });
        }
    }
}

/// Narrows each read's tensors from its run to those whose bytes it brings, and counts reads per tensor.
fn narrow_to_tensors(checkpoint: &Checkpoint, reads: &mut [Read], tensors: &mut [PlacedTensor]) {
    for read in reads {
        let bytes_of = |index: u32| {
            let tensor = checkpoint.tensor(tensors[index as usize].id);
            (tensor.file_offset_bytes, tensor.file_offset_bytes + tensor.info.len_bytes())
        };
        let (mut first, mut last) = (read.tensors.start, read.tensors.end);
        first += partition(first..last, |index| bytes_of(index).1 <= read.extent.offset_bytes);
        last = first + partition(first..last, |index| bytes_of(index).0 < read.extent.end_bytes());
        read.tensors = first..last;
        for tensor in &mut tensors[first as usize..last as usize] {
            tensor.read_count += u32::from(tensor.len_bytes > 0);
        }
    }
}

/// Returns how many of the range, which is sorted by `is_before`, stand before the boundary.
fn partition(range: std::ops::Range<u32>, is_before: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (range.start, range.end);
    while low < high {
        let middle = low + (high - low) / 2;
        if is_before(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low - range.start
}

fn promise(
    tensors: &[PlacedTensor],
    arenas: &[Arena],
    reads: &[Read],
    copies: &[Copy],
    machine: &Machine,
) -> Promised {
    let in_place = reads.iter().filter(|read| matches!(read.target, Target::InPlace(_)));
    let staged = reads.iter().filter(|read| matches!(read.target, Target::Staged { .. })).count() as u64;
    let peak_staging_bytes = staged.min(machine.buffer_count.into()) * machine.buffer_len_bytes;
    let own = || arenas.iter().filter(|arena| !arena.is_external);
    let target_bytes = own().map(|arena| arena.len_bytes).sum::<u64>();
    let on_host = own().filter(|arena| arena.device == crate::DeviceId::Host);
    Promised {
        payload_bytes: tensors.iter().map(|tensor| tensor.len_bytes).sum(),
        read_bytes: reads.iter().map(|read| read.extent.len_bytes).sum(),
        reads: reads.len() as u64,
        copies: copies.len() as u64,
        in_place_bytes: in_place.map(|read| read.extent.len_bytes).sum(),
        peak_staging_bytes,
        target_bytes,
        peak_host_bytes: peak_staging_bytes + on_host.map(|arena| arena.len_bytes).sum::<u64>(),
    }
}

/// Arena offsets equal file offsets modulo this: the strictest alignment that device kernels and
/// allocators of either vendor ask for.
const CONGRUENCE_BYTES: u64 = 256;

/// Staging buffers and reads are cut at multiples of this, the strictest alignment of direct reads
/// that common file systems report.
const BUFFER_ALIGN_BYTES: u64 = 4096;

/// A shorter run is staged even where it could be read in place: neighbours then share one request,
/// and copying 64 KiB (about 10 us) costs less than a request of its own (about 100 us cold).
const IN_PLACE_LEN_BYTES_MIN: u64 = 64 << 10;

/// Gaps up to this are read along and dropped: at 2 GB/s that is 16 us, less than a request.
const GAP_LEN_BYTES_MAX: u64 = 32 << 10;
const _: () = assert!(GAP_LEN_BYTES_MAX < IN_PLACE_LEN_BYTES_MIN, "a run in place is never read along");
