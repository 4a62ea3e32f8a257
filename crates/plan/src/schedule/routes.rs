//! Whether rows of pieces are read whole, or piece by piece.

use std::cmp::Reverse;
use std::ops::Range;

use super::segment::{Segment, Way};
use crate::checkpoint::Checkpoint;
use crate::machine::Machine;
use crate::plan::{OverRead, Steps};

/// Decides for every row of pieces; returns the tensors for which more has to be read than the request allows.
///
/// Reading the gaps costs their bytes, leaving them out costs a request a piece. Whichever is cheaper is done, but where all gaps that
/// would be read pass what the request allows, the widest are left out first. Pieces that several tensors take from the same rows (the
/// slices of neighbouring ranks) fill each other's gaps.
pub(super) fn route(
    checkpoint: &Checkpoint,
    lists: &mut [&mut Vec<Segment>],
    over_read_max: f64,
    machine: &Machine,
) -> Vec<OverRead> {
    if lists.iter().all(|list| list.iter().all(|segment| segment.steps.is_once())) {
        return Vec::new();
    }
    let all: Vec<&Segment> = lists.iter().flat_map(|list| list.iter()).collect();
    let (over_reads, by_pieces) = decide(checkpoint, &all, over_read_max);
    let all = lists.iter_mut().flat_map(|list| list.iter_mut());
    all.zip(by_pieces).filter(|(_, by_pieces)| *by_pieces).for_each(|(segment, _)| segment.way = Way::Pieces);
    lists.iter_mut().for_each(|list| apart(list, machine));
    over_reads
}

/// Returns for every segment whether it is read by its pieces.
fn decide(checkpoint: &Checkpoint, segments: &[&Segment], over_read_max: f64) -> (Vec<OverRead>, Vec<bool>) {
    let mut by_pieces = vec![false; segments.len()];
    let payload_bytes: u64 = segments.iter().map(|segment| segment.len_bytes()).sum();
    let mut over_reads = Vec::new();
    let staged = staged(segments);
    let mut clusters = clusters(segments, &staged);
    if !clusters.is_empty() {
        let allowed_bytes = ((over_read_max - 1.0).max(0.0) * payload_bytes as f64) as u64;
        // The widest gaps last, so that they are the first to go.
        clusters.sort_by_key(|cluster| (cluster.gap_len_bytes(), cluster.first));
        let mut over_bytes: u64 = 0;
        for cluster in &clusters {
            let is_cheaper = cluster.gap_len_bytes() <= REQUEST_BYTES;
            let is_allowed = over_bytes + cluster.over_bytes <= allowed_bytes;
            let is_short = cluster.piece_len_bytes < PIECE_LEN_BYTES_MIN;
            if is_cheaper && (is_allowed || is_short) {
                over_bytes += cluster.over_bytes;
                if !is_allowed {
                    over_reads.push(cluster);
                }
                continue;
            }
            for member in &staged[cluster.members.clone()] {
                by_pieces[*member as usize] = !segments[*member as usize].steps.is_once();
            }
        }
    }
    over_reads.sort_by_key(|cluster| (Reverse(cluster.over_bytes), cluster.first));
    (over_reads.into_iter().map(|cluster| cluster.over_read(checkpoint)).collect(), by_pieces)
}

/// Rows of pieces that lie among each other.
struct Cluster {
    /// Where the first begins.
    first: (u32, u64),
    end: u64,
    /// Range of the staged segments.
    members: Range<usize>,
    piece_len_bytes: u64,
    piece_count: u64,
    over_bytes: u64,
}

impl Cluster {
    /// Returns the bytes read in vain for each piece.
    fn gap_len_bytes(&self) -> u64 {
        self.over_bytes / self.piece_count
    }

    fn over_read(&self, checkpoint: &Checkpoint) -> OverRead {
        let (file, begin) = self.first;
        let header = checkpoint.files()[file as usize].header();
        let starts_before =
            |index: &usize| header.data_start_bytes() + header.tensor(*index).data_offsets.0 <= begin;
        // The last tensor that begins before the cluster.
        let (mut low, mut high) = (0, header.len());
        while low < high {
            let middle = low + (high - low) / 2;
            if starts_before(&middle) { low = middle + 1 } else { high = middle }
        }
        OverRead {
            name: header.tensor(low - 1).name.to_owned(),
            over_bytes: self.over_bytes,
            piece_len_bytes: self.piece_len_bytes,
        }
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

/// Returns the clusters with something between their pieces.
fn clusters(segments: &[&Segment], staged: &[u32]) -> Vec<Cluster> {
    let mut clusters: Vec<Cluster> = Vec::new();
    let mut rest = 0..staged.len();
    while let Some(index) = rest.next() {
        let first = segments[staged[index] as usize];
        let mut cluster = Cluster {
            first: (first.file, first.begin),
            end: first.end,
            members: index..index + 1,
            piece_len_bytes: first.piece_len_bytes,
            piece_count: first.steps.count,
            over_bytes: 0,
        };
        let mut needed = first.len_bytes();
        while let Some(next) = staged.get(rest.start).map(|next| segments[*next as usize])
            && next.file == first.file
            && next.begin < cluster.end
        {
            rest.start += 1;
            cluster.members.end = rest.start;
            cluster.end = cluster.end.max(next.end);
            cluster.piece_len_bytes = cluster.piece_len_bytes.min(next.piece_len_bytes);
            cluster.piece_count += next.steps.count;
            needed += next.len_bytes();
        }
        // Of pieces that several tensors take, at most as much is needed as there is.
        cluster.over_bytes = (cluster.end - first.begin).saturating_sub(needed);
        if cluster.over_bytes > 0 {
            clusters.push(cluster);
        }
    }
    clusters
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
