//! From requests to reads: where requests are cut, what each brings.

use std::ops::Range;

use super::requests::{Requests, extents};
use super::segment::{Segment, Way};
use crate::checkpoint::Checkpoint;
use crate::extent::{Extent, Stride};
use crate::in_place::Route;
use crate::machine::Machine;
use crate::placement::Place;
use crate::plan::{Brought, Copy, Operation, PlacedTensor, Read, Steps, Target};

/// Reads in the order of their segments, the copies of staged ones, and the tensors that each brings bytes of.
#[derive(Default)]
pub(super) struct Reads {
    pub(super) reads: Vec<Read>,
    pub(super) copies: Vec<Copy>,
    pub(super) brought: Vec<Brought>,
}

pub(super) fn reads(
    checkpoint: &Checkpoint,
    segments: &[Segment],
    requests: &Requests,
    tensors: &mut [PlacedTensor],
    operations: &mut [Operation],
    machine: &Machine,
) -> Reads {
    let mut reads = Reads::default();
    // A segment that ends in another read than it begins in has a copy in each: a few more, for which lists would double.
    let count = segments.len() + segments.len() / 8;
    reads.reads.reserve(requests.counts.len());
    reads.copies.reserve(count);
    reads.brought.reserve(count.max(tensors.len() + tensors.len() / 8));
    let mut tally = Tally::new(tensors, operations);
    for now in requests.of(segments) {
        match now[0].way {
            Way::Pieces => reads.add_pieces(now, machine, &mut tally),
            _ => reads.add_all(checkpoint, now, machine, &mut tally),
        }
    }
    reads
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
    /// Adds the reads of segments that share requests, or of one that is read in place.
    fn add_all(
        &mut self,
        checkpoint: &Checkpoint,
        now: &[Segment],
        machine: &Machine,
        tally: &mut Tally<'_>,
    ) {
        let first = &now[0];
        let (_, cover) = extents(checkpoint, now, machine);
        let in_place = first.way == Way::InPlace;
        let route = machine.in_place.route(first.device, first.file).filter(|_| in_place);
        let (max, phase) = match route {
            // Cut at multiples of the read length in the *arena*: neighbours then share no huge page.
            Some(Route { read_len_bytes_max: max, .. }) => {
                (*max, (first.target.offset_bytes + max - first.begin % max) % max)
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
            let reaches = |segment: &&Segment| segment.end > extent.offset_bytes;
            let before_end = |segment: &&Segment| segment.begin < extent.end_bytes();
            self.add(checkpoint, extent, now[next..].iter().take_while(before_end).filter(reaches), tally);
        }
    }

    /// Adds the read of an extent for the segments that reach into it. A long gap between two of them can leave an extent without
    /// payload: that is not read.
    fn add<'s>(
        &mut self,
        checkpoint: &Checkpoint,
        extent: Extent,
        inside: impl Iterator<Item = &'s Segment>,
        tally: &mut Tally<'_>,
    ) {
        let (first_copy, first_brought) = (self.copies.len() as u32, self.brought.len() as u32);
        let bytes = extent.offset_bytes..extent.end_bytes();
        let (mut payload_bytes, mut covered_end, mut in_place) = (0, bytes.start, None);
        let mut after: Range<u32> = 0..0;
        for segment in inside {
            let within = segment.begin.max(bytes.start)..segment.end.min(bytes.end);
            let len_bytes = if segment.way == Way::InPlace {
                // The cover may begin before the segment; there is room around it.
                let offset_bytes = segment.target.offset_bytes + extent.offset_bytes - segment.begin;
                in_place = Some(Place { offset_bytes, ..segment.target });
                within.end - within.start
            } else {
                let before = self.copies.len();
                self.copies.extend(segment.copies(&bytes));
                self.copies[before..].iter().map(|copy| copy.len_bytes * copy.steps.count).sum()
            };
            if len_bytes == 0 {
                continue; // A gap between its pieces.
            }
            // What several take counts once. Rows of pieces lie in each other's gaps, as those of neighbouring ranks do.
            payload_bytes += if segment.steps.is_once() {
                let fresh_bytes = within.end.saturating_sub(covered_end.max(within.start));
                covered_end = covered_end.max(within.end);
                fresh_bytes
            } else {
                len_bytes
            };
            after = join(&after, &segment.after);
            let read = self.reads.len() as u32;
            match segment.operation {
                Some(operation) => self.brought.extend(tally.operation(operation, read)),
                None => {
                    let inside = inside_of(checkpoint, segment, &within, tally.tensors);
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
        let payload_bytes = payload_bytes.min(extent.len_bytes); // Of pieces that several take.
        self.reads.push(Read { extent, stride: None, target, brought, payload_bytes, after });
    }

    /// Adds the reads of pieces that segments have in common: as many in each as fill a buffer, back to back.
    fn add_pieces(&mut self, segments: &[Segment], machine: &Machine, tally: &mut Tally<'_>) {
        let first_segment = &segments[0];
        let (piece, steps) = (first_segment.piece_len_bytes, first_segment.steps);
        let step_max = (machine.buffer_len_bytes / piece).max(1);
        for first in (0..steps.count).step_by(step_max as usize) {
            let count = step_max.min(steps.count - first);
            let (stride, read) = (steps.source_stride_bytes, self.reads.len() as u32);
            let (first_copy, first_brought) = (self.copies.len() as u32, self.brought.len() as u32);
            let mut in_place = None;
            for segment in segments {
                let target_stride_bytes = segment.steps.target_stride_bytes;
                let offset_bytes = segment.target.offset_bytes + first * target_stride_bytes;
                let target = Place { offset_bytes, ..segment.target };
                let is_dense = target_stride_bytes == piece;
                // Only engines that read on threads leave gaps out, and those write to host memory.
                let route = machine.in_place.route(segment.device, segment.file);
                let can_land = route.is_some_and(|route| route.is_hosts);
                if can_land && is_dense && segments.len() == 1 {
                    in_place = Some(target);
                } else {
                    let (len_bytes, steps) = match is_dense {
                        true => (piece * count, Steps::ONCE),
                        false => (piece, Steps { count, source_stride_bytes: piece, target_stride_bytes }),
                    };
                    self.copies.push(Copy { source_offset_bytes: 0, target, len_bytes, steps });
                }
                match segment.operation {
                    Some(operation) => self.brought.extend(tally.operation(operation, read)),
                    None => self.brought.extend(tally.tensor(segment.tensors.start, read)),
                }
            }
            let target = match in_place {
                Some(place) => Target::InPlace(place),
                None => Target::Staged { copies: first_copy..self.copies.len() as u32 },
            };
            self.reads.push(Read {
                extent: Extent {
                    file: first_segment.file,
                    offset_bytes: first_segment.begin + first * stride,
                    len_bytes: (count - 1) * stride + piece,
                },
                stride: Some(Stride { piece_len_bytes: piece, piece_count: count, stride_bytes: stride }),
                target,
                brought: first_brought..self.brought.len() as u32,
                payload_bytes: count * piece,
                after: first_segment.after.clone(),
            });
        }
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
