//! Whether rows of pieces are read whole, or piece by piece.

use std::ops::Range;

use super::over_reads::allowed_bytes;
use super::segment::{Segment, Way};
use crate::checkpoint::TensorId;
use crate::extent::{align_down, align_up};
use crate::machine::Machine;
use crate::plan::{OverReadReason, Steps, Vain};

/// Decides for every row of pieces; returns what is read in vain of rows that are read whole.
///
/// Reading the gaps costs their bytes, leaving them out costs a request a piece. Whichever is cheaper is done, but where all gaps that
/// would be read pass what the request allows, the widest are left out first. Pieces that several tensors take from the same rows (the
/// slices of neighbouring ranks) fill each other's gaps.
pub(super) fn route(lists: &mut [&mut Vec<Segment>], over_read_max: f64, machine: &Machine) -> Vec<Vain> {
    if lists.iter().all(|list| list.iter().all(|segment| segment.steps.is_once())) {
        return Vec::new();
    }
    let all: Vec<&Segment> = lists.iter().flat_map(|list| list.iter()).collect();
    let (whole, by_pieces) = decide(&all, over_read_max, machine.direct_align_bytes);
    let all = lists.iter_mut().flat_map(|list| list.iter_mut());
    all.zip(by_pieces).filter(|(_, by_pieces)| *by_pieces).for_each(|(segment, _)| segment.way = Way::Pieces);
    lists.iter_mut().for_each(|list| apart(list, machine));
    whole
}

/// Returns what is read in vain of rows that are read whole, and for every segment whether it is read by its pieces.
fn decide(segments: &[&Segment], over_read_max: f64, align_bytes: u64) -> (Vec<Vain>, Vec<bool>) {
    let mut by_pieces = vec![false; segments.len()];
    let staged = staged(segments);
    let Clusters { clusters, needed_bytes, aligned_bytes } = Clusters::new(segments, &staged, align_bytes);
    let (anyway, clusters): (Vec<_>, Vec<_>) = clusters.into_iter().partition(Cluster::is_whole_anyway);
    let (mut narrow, wide): (Vec<_>, Vec<_>) =
        clusters.into_iter().partition(|cluster| cluster.gap_len_bytes() <= REQUEST_BYTES);
    let sum_bytes = |clusters: &[Cluster]| clusters.iter().map(|cluster| cluster.cost_bytes).sum::<u64>();
    // What is read whole in any case is paid for before the others.
    let mut left_bytes = allowed_bytes(over_read_max, needed_bytes)
        .saturating_sub(aligned_bytes)
        .saturating_sub(sum_bytes(&anyway));
    if sum_bytes(&narrow) > left_bytes {
        // The widest gaps last, so that they are the first to go.
        narrow.sort_by_key(|cluster| (cluster.gap_len_bytes(), cluster.id));
    }
    let is_paid = |cluster: &Cluster| {
        let is_paid = cluster.cost_bytes <= left_bytes;
        left_bytes -= if is_paid { cluster.cost_bytes } else { 0 };
        is_paid
    };
    let (paid, dear): (Vec<_>, Vec<_>) = narrow.into_iter().partition(is_paid);
    for cluster in wide.iter().chain(&dear) {
        for member in &staged[cluster.members.clone()] {
            by_pieces[*member as usize] = !segments[*member as usize].steps.is_once();
        }
    }
    let whole = anyway.iter().chain(&paid).map(Cluster::vain).collect();
    (whole, by_pieces)
}

/// Rows of pieces by where they lie, and what all segments take together.
struct Clusters {
    /// Those with something between their pieces.
    clusters: Vec<Cluster>,
    /// Bytes of all segments; what several take counts once.
    needed_bytes: u64,
    /// Bytes that whole blocks add around everything else.
    aligned_bytes: u64,
}

/// Rows of pieces that lie among each other.
struct Cluster {
    /// The tensor of the first.
    id: TensorId,
    /// Range of the staged segments.
    members: Range<usize>,
    piece_len_bytes: u64,
    piece_count: u64,
    /// Bytes between the pieces.
    over_bytes: u64,
    /// As above, with what whole blocks add at the ends.
    cost_bytes: u64,
}

impl Cluster {
    /// Returns the bytes read in vain for each piece.
    fn gap_len_bytes(&self) -> u64 {
        self.over_bytes / self.piece_count
    }

    /// Tells whether its pieces are too short, and too close together, to be worth a request each.
    fn is_whole_anyway(&self) -> bool {
        self.piece_len_bytes < PIECE_LEN_BYTES_MIN && self.gap_len_bytes() <= REQUEST_BYTES
    }

    fn vain(&self) -> Vain {
        let reason = OverReadReason::ShortPieces { piece_len_bytes: self.piece_len_bytes };
        Vain { id: self.id, over_bytes: self.over_bytes, reason }
    }
}

/// Returns the staged segments, by file and offset.
fn staged(segments: &[&Segment]) -> Vec<u32> {
    let is_staged = |index: &u32| segments[*index as usize].way == Way::Staged;
    let mut staged: Vec<u32> = (0..segments.len() as u32).filter(is_staged).collect();
    staged.sort_by_key(|index| {
        let segment = &segments[*index as usize];
        (segment.file, segment.begin)
    });
    staged
}

impl Clusters {
    fn new(segments: &[&Segment], staged: &[u32], align_bytes: u64) -> Clusters {
        let cover =
            |segment: &Segment| align_down(segment.begin, align_bytes)..align_up(segment.end, align_bytes);
        let in_place = segments.iter().filter(|segment| segment.way == Way::InPlace);
        let (mut covered_bytes, mut needed_bytes) = in_place.fold((0, 0), |(covered, needed), segment| {
            let cover = cover(segment);
            (covered + cover.end - cover.start, needed + segment.len_bytes())
        });
        let (mut clusters, mut once_bytes) = (Vec::new(), needed_bytes);
        let mut last_block = (0, 0); // Of neighbours the block between them counts once.
        let mut rest = 0..staged.len();
        while let Some(index) = rest.next() {
            let first = segments[staged[index] as usize];
            let mut cluster = Cluster {
                id: first.id,
                members: index..index + 1,
                piece_len_bytes: first.piece_len_bytes,
                piece_count: first.steps.count,
                over_bytes: 0,
                cost_bytes: 0,
            };
            let (mut end, mut needed) = (first.end, first.len_bytes());
            while let Some(next) = staged.get(rest.start).map(|next| segments[*next as usize])
                && next.file == first.file
                && next.begin < end
            {
                rest.start += 1;
                cluster.members.end = rest.start;
                end = end.max(next.end);
                cluster.piece_len_bytes = cluster.piece_len_bytes.min(next.piece_len_bytes);
                cluster.piece_count += next.steps.count;
                needed += next.len_bytes();
            }
            // Of pieces that several tensors take, at most as much is needed as there is.
            let len_bytes = end - first.begin;
            let needed = needed.min(len_bytes);
            needed_bytes += needed;
            let cover = align_down(first.begin, align_bytes)..align_up(end, align_bytes);
            if needed < len_bytes {
                cluster.over_bytes = len_bytes - needed;
                cluster.cost_bytes = cover.end - cover.start - needed;
                clusters.push(cluster);
                continue;
            }
            let begin = if last_block.0 == first.file { cover.start.max(last_block.1) } else { cover.start };
            covered_bytes += cover.end.saturating_sub(begin);
            once_bytes += needed;
            last_block = (first.file, cover.end);
        }
        Clusters { clusters, needed_bytes, aligned_bytes: covered_bytes.saturating_sub(once_bytes) }
    }
}

/// Makes long pieces segments of their own: each is worth a request that may pass the page cache.
fn apart(segments: &mut Vec<Segment>, machine: &Machine) {
    let long_bytes = LONG_LEN_BYTES.min(machine.buffer_len_bytes);
    let is_long = |segment: &Segment| segment.way == Way::Pieces && segment.piece_len_bytes >= long_bytes;
    if !segments.iter().any(is_long) {
        return;
    }
    let mut all = Vec::with_capacity(segments.len());
    for segment in segments.drain(..) {
        if !is_long(&segment) {
            all.push(segment);
            continue;
        }
        let Steps { count, source_stride_bytes, target_stride_bytes } = segment.steps;
        for step in 0..count {
            let mut piece = segment.clone();
            piece.begin = segment.begin + step * source_stride_bytes;
            piece.end = piece.begin + segment.piece_len_bytes;
            piece.target.offset_bytes += step * target_stride_bytes;
            (piece.steps, piece.way) = (Steps::ONCE, Way::Alone);
            all.push(piece);
        }
    }
    *segments = all;
}

/// What a request for a piece costs, in bytes: about 4 us of one of several threads, at 2 GB/s.
const REQUEST_BYTES: u64 = 8 << 10;

/// A shorter piece among narrow gaps is not worth a request of its own, whatever is read along: system calls would take ten times as
/// long as the bytes.
const PIECE_LEN_BYTES_MIN: u64 = 512;

/// Alignment of direct reads adds at most two blocks of 4 KiB to a piece: below this that is more than 1.6%, and the piece is read
/// through the page cache, exactly.
const LONG_LEN_BYTES: u64 = 512 << 10;
