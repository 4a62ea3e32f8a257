//! From segments to reads: what shares a request, where requests are cut, what each brings.

use std::ops::Range;

use super::place::{IN_PLACE_LEN_BYTES_MIN, Segment};
use crate::checkpoint::Checkpoint;
use crate::extent::Extent;
use crate::in_place::Route;
use crate::placement::{DeviceId, Place};
use crate::plan::{Brought, Copy, Machine, Operation, PlacedTensor, Read, Steps, Target};

/// Reads in the order of their segments, the copies of staged ones, and the tensors that each brings bytes of.
#[derive(Default)]
pub(super) struct Reads {
    pub(super) reads: Vec<Read>,
    pub(super) copies: Vec<Copy>,
    pub(super) brought: Vec<Brought>,
}

pub(super) fn reads(
    checkpoint: &Checkpoint,
    device: DeviceId,
    segments: &[Segment],
    tensors: &mut [PlacedTensor],
    operations: &mut [Operation],
    machine: &Machine,
) -> Reads {
    let mut reads = Reads::default();
    let mut tally = Tally::new(tensors, operations);
    let mut rest = segments;
    while let [segment, ..] = rest {
        let count = if segment.in_place { 1 } else { together(rest) };
        let (now, later) = rest.split_at(count);
        let (first, last) = (&now[0], &now[count - 1]);
        let file_len = checkpoint.files()[segment.file as usize].len_bytes();
        let whole = Extent { file: first.file, offset_bytes: first.begin, len_bytes: last.end - first.begin };
        let cover = whole.cover(machine.direct_align_bytes, file_len);
        let route = machine.in_place.route(device, segment.file).filter(|_| segment.in_place);
        let (max, phase) = match route {
            // Cut at multiples of the read length in the *arena*: neighbours then share no huge page.
            Some(Route { read_len_bytes_max: max, .. }) => {
                (*max, (segment.target.offset_bytes + max - segment.begin % max) % max)
            }
            // The first read fills its buffer.
            None => (
                machine.buffer_len_bytes,
                machine.buffer_len_bytes - cover.offset_bytes % machine.buffer_len_bytes,
            ),
        };
        let mut next = 0; // The first segment that reaches into the extent at hand.
        for extent in cover.split(max, phase) {
            while now.get(next).is_some_and(|segment| segment.end <= extent.offset_bytes) {
                next += 1;
            }
            let reaches = now[next..].iter().take_while(|segment| segment.begin < extent.end_bytes());
            let inside = &now[next..next + reaches.count()];
            reads.add(checkpoint, extent, inside, &mut tally);
        }
        rest = later;
    }
    reads
}

/// Counts the staged segments from the first on that one request is cheaper for than several.
fn together(segments: &[Segment]) -> usize {
    let (mut count, mut first_operation) = (1, segments[0].operation.unwrap_or(u32::MAX));
    for pair in segments.windows(2) {
        let (first, second) = (&pair[0], &pair[1]);
        let gap_is_cheap = second.begin >= first.end && second.begin - first.end <= GAP_LEN_BYTES_MAX;
        // A request must not wait for an operation that waits for it.
        let waits_for_itself = second.after.end > first_operation;
        if first.file != second.file || !gap_is_cheap || second.in_place || waits_for_itself {
            break;
        }
        first_operation = first_operation.min(second.operation.unwrap_or(u32::MAX));
        count += 1;
    }
    count
}

/// Counts the reads of each tensor and of each operation, each read once for all it brings of one.
struct Tally<'t> {
    tensors: &'t mut [PlacedTensor],
    operations: &'t mut [Operation],
    /// The read that was counted last, for each.
    last_of_tensors: Vec<u32>,
    last_of_operations: Vec<u32>,
}

impl<'t> Tally<'t> {
    fn new(tensors: &'t mut [PlacedTensor], operations: &'t mut [Operation]) -> Tally<'t> {
        let last_of_tensors = vec![u32::MAX; tensors.len()];
        let last_of_operations = vec![u32::MAX; operations.len()];
        Tally { tensors, operations, last_of_tensors, last_of_operations }
    }

    fn tensor(&mut self, tensor: u32, read: u32) -> Option<Brought> {
        let index = tensor as usize;
        let is_new = self.tensors[index].len_bytes > 0 && self.last_of_tensors[index] != read;
        is_new.then(|| {
            self.last_of_tensors[index] = read;
            self.tensors[index].read_count += 1;
            Brought::Tensor(tensor)
        })
    }

    fn operation(&mut self, operation: u32, read: u32) -> Option<Brought> {
        let index = operation as usize;
        let is_new = self.operations[index].len_bytes > 0 && self.last_of_operations[index] != read;
        is_new.then(|| {
            self.last_of_operations[index] = read;
            self.operations[index].read_count += 1;
            Brought::Operation(operation)
        })
    }
}

impl Reads {
    /// Adds the read of an extent for the segments that reach into it. A long gap between two of them can leave an extent without
    /// payload: that is not read.
    fn add(&mut self, checkpoint: &Checkpoint, extent: Extent, inside: &[Segment], tally: &mut Tally<'_>) {
        let (first_copy, first_brought) = (self.copies.len() as u32, self.brought.len() as u32);
        let (mut payload_bytes, mut in_place) = (0, None);
        let mut after: Range<u32> = 0..0;
        for segment in inside {
            let (begin, end) = (segment.begin.max(extent.offset_bytes), segment.end.min(extent.end_bytes()));
            payload_bytes += end - begin;
            after = join(&after, &segment.after);
            if segment.in_place {
                // The cover may begin before the segment; there is room around it.
                let offset_bytes = segment.target.offset_bytes + extent.offset_bytes - segment.begin;
                in_place = Some(Place { offset_bytes, ..segment.target });
            } else {
                let offset_bytes = segment.target.offset_bytes + (begin - segment.begin);
                self.copies.push(Copy {
                    source_offset_bytes: begin - extent.offset_bytes,
                    target: Place { offset_bytes, ..segment.target },
                    len_bytes: end - begin,
                    steps: Steps::ONCE,
                });
            }
            let read = self.reads.len() as u32;
            match segment.operation {
                Some(operation) => self.brought.extend(tally.operation(operation, read)),
                None => {
                    let inside = inside_of(checkpoint, segment, &(begin..end), tally.tensors);
                    self.brought.extend(inside.filter_map(|tensor| tally.tensor(tensor, read)));
                }
            }
        }
        if payload_bytes == 0 {
            return;
        }
        let target = match in_place {
            Some(place) => Target::InPlace(place),
            None => Target::Staged { copies: first_copy..self.copies.len() as u32 },
        };
        let brought = first_brought..self.brought.len() as u32;
        self.reads.push(Read { extent, stride: None, target, brought, payload_bytes, after });
    }
}

/// Returns the tensors of a segment whose bytes lie in the range.
fn inside_of(
    checkpoint: &Checkpoint,
    segment: &Segment,
    bytes: &Range<u64>,
    tensors: &[PlacedTensor],
) -> Range<u32> {
    let Range { start, end } = segment.tensors;
    if end - start == 1 {
        return start..end;
    }
    let bytes_of = |index: u32| {
        let tensor = checkpoint.tensor(tensors[index as usize].id);
        (tensor.file_offset_bytes, tensor.file_offset_bytes + tensor.info.len_bytes())
    };
    let first = start + partition(start..end, |index| bytes_of(index).1 <= bytes.start);
    first..first + partition(first..end, |index| bytes_of(index).0 < bytes.end)
}

/// Returns how many of the range, which is sorted by `is_before`, stand before the boundary.
fn partition(range: Range<u32>, is_before: impl Fn(u32) -> bool) -> u32 {
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

/// Returns the smallest range that holds both.
fn join(a: &Range<u32>, b: &Range<u32>) -> Range<u32> {
    match (a.is_empty(), b.is_empty()) {
        (true, _) => b.clone(),
        (_, true) => a.clone(),
        _ => a.start.min(b.start)..a.end.max(b.end),
    }
}

/// Gaps up to this are read along and dropped: at 2 GB/s that is 16 us, less than a request.
const GAP_LEN_BYTES_MAX: u64 = 32 << 10;
const _: () = assert!(GAP_LEN_BYTES_MAX < IN_PLACE_LEN_BYTES_MIN, "a run in place is never read along");
