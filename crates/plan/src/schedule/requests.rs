//! Which neighbouring segments share a request.

use super::over_reads::allowed_bytes;
use super::place::IN_PLACE_LEN_BYTES_MIN;
use super::segment::{Segment, Way};
use crate::checkpoint::Checkpoint;
use crate::extent::{Extent, align_down, align_up};
use crate::machine::Machine;
use crate::plan::{OverReadReason, Steps, Vain};

/// The segments of each request, and what they cost.
#[derive(Default)]
pub(super) struct Requests {
    /// How many segments each takes, from the first segment on.
    pub(super) counts: Vec<u32>,
    /// Bytes that are read for direct reads to begin and end at whole blocks.
    pub(super) alignment_bytes: u64,
    needed_bytes: u64,
    read_bytes: u64,
    /// What bridging each gap adds to what is read, where it adds anything.
    bridges_bytes: Vec<u64>,
}

/// Decides for all segments.
///
/// A gap costs the whole blocks that lie in it: where its ends are in the same block or in neighbouring ones, they would be read anyway, and
/// reading along costs nothing. Where the others cost more than the bound leaves, the narrowest are read along.
pub(super) fn requests(
    checkpoint: &Checkpoint,
    segments: &[Segment],
    over_read_max: f64,
    machine: &Machine,
) -> Requests {
    let mut all = Requests::new(checkpoint, segments, Means::unbounded(), machine);
    let allowed_bytes = allowed_bytes(over_read_max, all.needed_bytes);
    let over_bytes = all.read_bytes.saturating_sub(all.needed_bytes);
    if over_bytes <= allowed_bytes || all.bridges_bytes.is_empty() {
        return all;
    }
    let unspared_bytes = over_bytes.saturating_sub(all.bridges_bytes.iter().sum());
    let left_bytes = allowed_bytes.saturating_sub(unspared_bytes);
    all.bridges_bytes.sort_unstable();
    let mut spent_bytes = 0;
    let is_paid = |bridge: &&u64| {
        spent_bytes += **bridge;
        spent_bytes <= left_bytes
    };
    let bridge_bytes_max = all.bridges_bytes.iter().take_while(is_paid).last().copied().unwrap_or(0);
    Requests::new(checkpoint, segments, Means { bridge_bytes_max, left_bytes }, machine)
}

/// What may be spent on bridges.
#[derive(Clone, Copy)]
struct Means {
    bridge_bytes_max: u64,
    left_bytes: u64,
}

impl Means {
    fn unbounded() -> Means {
        Means { bridge_bytes_max: u64::MAX, left_bytes: u64::MAX }
    }
}

impl Requests {
    fn new(checkpoint: &Checkpoint, segments: &[Segment], mut means: Means, machine: &Machine) -> Requests {
        let mut requests = Requests { counts: Vec::with_capacity(segments.len()), ..Requests::default() };
        let mut rest = segments;
        while let [segment, ..] = rest {
            let count = match segment.way {
                Way::InPlace => 1,
                Way::Pieces => alike(rest),
                Way::Staged | Way::Alone => {
                    together(rest, machine.direct_align_bytes, &mut means, &mut requests.bridges_bytes)
                }
            };
            let (now, later) = rest.split_at(count);
            requests.counts.push(count as u32);
            let (whole, cover) = extents(checkpoint, now, machine);
            match segment.way {
                Way::Pieces => {
                    requests.needed_bytes += segment.len_bytes();
                    requests.read_bytes += segment.len_bytes();
                }
                _ => {
                    requests.needed_bytes += needed_bytes(now).min(whole.len_bytes);
                    requests.read_bytes += cover.len_bytes;
                    requests.alignment_bytes += alignment_bytes(now, cover, machine);
                }
            }
            rest = later;
        }
        requests
    }

    /// Walks the segments of each request.
    pub(super) fn of<'s>(&self, segments: &'s [Segment]) -> impl Iterator<Item = &'s [Segment]> {
        let mut rest = segments;
        self.counts.iter().map(move |count| {
            let (now, later) = rest.split_at(*count as usize);
            rest = later;
            now
        })
    }

    /// Returns where whole blocks add to what is read.
    pub(super) fn aligned(
        &self,
        checkpoint: &Checkpoint,
        segments: &[Segment],
        machine: &Machine,
    ) -> Vec<Vain> {
        let align_bytes = machine.direct_align_bytes;
        let aligned = self.of(segments).filter(|now| now[0].way != Way::Pieces).map(|now| {
            let (_, cover) = extents(checkpoint, now, machine);
            Vain {
                id: now[0].id,
                over_bytes: alignment_bytes(now, cover, machine),
                reason: OverReadReason::Alignment { align_bytes },
            }
        });
        aligned.filter(|vain| vain.over_bytes > 0).collect()
    }
}

/// Returns the extent of segments that share a request, and the whole blocks around it.
pub(super) fn extents(checkpoint: &Checkpoint, now: &[Segment], machine: &Machine) -> (Extent, Extent) {
    let first = &now[0];
    let end = now.iter().map(|segment| segment.end).max().unwrap_or(first.end);
    let whole = Extent { file: first.file, offset_bytes: first.begin, len_bytes: end - first.begin };
    let file_len_bytes = checkpoint.files()[first.file as usize].len_bytes();
    (whole, whole.cover(machine.direct_align_bytes, file_len_bytes))
}

/// Sums what whole blocks add to segments that share a request: around them, and at both ends of each gap.
fn alignment_bytes(now: &[Segment], cover: Extent, machine: &Machine) -> u64 {
    let (mut alignment_bytes, mut end) = (0, cover.offset_bytes);
    for segment in now {
        let gap_len_bytes = segment.begin.saturating_sub(end);
        alignment_bytes += gap_len_bytes - bridge_bytes(end, segment.begin, machine.direct_align_bytes);
        end = end.max(segment.end);
    }
    alignment_bytes + cover.end_bytes() - end
}

/// Returns the bytes of the whole blocks between the ends of a gap, which reading it along costs.
fn bridge_bytes(begin: u64, end: u64, align_bytes: u64) -> u64 {
    align_down(end, align_bytes).saturating_sub(align_up(begin, align_bytes))
}

/// Sums what is needed of segments that ascend; what several take counts once. Rows of pieces lie in each other's gaps, as those of
/// neighbouring ranks do.
fn needed_bytes(segments: &[Segment]) -> u64 {
    let mut covered_end = 0;
    let fresh = segments.iter().map(|segment| match segment.steps.is_once() {
        true => {
            let fresh_bytes = segment.end.saturating_sub(covered_end.max(segment.begin));
            covered_end = covered_end.max(segment.end);
            fresh_bytes
        }
        false => segment.len_bytes(),
    });
    fresh.sum()
}

/// Counts the staged segments from the first on that one request is cheaper for than several, and adds what their gaps cost.
fn together(
    segments: &[Segment],
    align_bytes: u64,
    means: &mut Means,
    bridges_bytes: &mut Vec<u64>,
) -> usize {
    let first = &segments[0];
    let (mut count, mut first_operation) = (1, first.operation.unwrap_or(u32::MAX));
    let (mut end, mut is_long) = (first.end, first.is_long());
    for pair in segments.windows(2) {
        let (before, next) = (&pair[0], &pair[1]);
        let is_staged = matches!(next.way, Way::Staged | Way::Alone);
        if first.file != next.file || next.begin < before.begin || !is_staged {
            break;
        }
        let gap_len_bytes = next.begin.saturating_sub(end);
        let is_apart = next.begin >= end;
        let stands_alone = before.way == Way::Alone || next.way == Way::Alone;
        // Each device has a lane of its own: what is worth a request does not wait for another's.
        let is_elsewhere = before.device != next.device && (is_long || next.is_long());
        // A request must not wait for an operation that waits for it.
        let waits_for_itself = next.after.end > first_operation;
        if gap_len_bytes > GAP_LEN_BYTES_MAX
            || (gap_len_bytes > 0 && stands_alone)
            || (is_apart && is_elsewhere)
            || waits_for_itself
        {
            break;
        }
        let bridge_bytes = bridge_bytes(end, next.begin, align_bytes);
        if bridge_bytes > 0 {
            if bridge_bytes > means.bridge_bytes_max.min(means.left_bytes) {
                break;
            }
            means.left_bytes -= bridge_bytes;
            bridges_bytes.push(bridge_bytes);
        }
        first_operation = first_operation.min(next.operation.unwrap_or(u32::MAX));
        (end, is_long) = (end.max(next.end), is_long || next.is_long());
        count += 1;
    }
    count
}

/// Counts the segments from the first on that are the same pieces of the same file, for tensors on several devices.
fn alike(segments: &[Segment]) -> usize {
    let pieces = |segment: &Segment| {
        let Steps { count, source_stride_bytes, .. } = segment.steps;
        (segment.file, segment.begin, segment.end, segment.piece_len_bytes, count, source_stride_bytes)
    };
    let first = &segments[0];
    // Those for operations may have to wait for each other.
    let is_alike = |segment: &&Segment| {
        segment.way == Way::Pieces && segment.operation.is_none() && pieces(segment) == pieces(first)
    };
    if first.operation.is_some() { 1 } else { 1 + segments[1..].iter().take_while(is_alike).count() }
}

impl Segment {
    /// Tells whether it is worth a request of its own.
    fn is_long(&self) -> bool {
        self.end - self.begin >= IN_PLACE_LEN_BYTES_MIN
    }
}

/// Gaps up to this may be read along and dropped: at 2 GB/s that is 16 us, less than a request.
const GAP_LEN_BYTES_MAX: u64 = 32 << 10;
const _: () = assert!(GAP_LEN_BYTES_MAX < IN_PLACE_LEN_BYTES_MIN, "a run in place is never read along");
