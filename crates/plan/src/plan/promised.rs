//! What a plan says of its cost.

use std::fmt;
use std::mem::discriminant;

use serde::Serialize;

use crate::checkpoint::TensorId;

/// What a plan promises to cost. A run reports what it used beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Promised {
    /// Bytes of the tensors asked for.
    pub payload_bytes: u64,
    /// Bytes of the files that are needed for them: their own as stored, and sources of operations; what several take counts once.
    pub needed_bytes: u64,
    /// Bytes asked of storage: those needed, alignment and bridged gaps.
    pub read_bytes: u64,
    /// Those of them that only alignment adds: direct reads are of whole blocks. What is left beside these and those needed are gaps.
    pub alignment_bytes: u64,
    /// Number of reads.
    pub reads: u64,
    /// Number of copies out of staging buffers.
    pub copies: u64,
    /// Number of tensors that are dequantized.
    pub operations: u64,
    /// Bytes that land in the tensors' own memory at once.
    pub in_place_bytes: u64,
    /// The most host memory between storage and device.
    pub peak_staging_bytes: u64,
    /// Memory of the result, rounding included; the caller's own memory is not counted.
    pub target_bytes: u64,
    /// Device memory for sources of operations, which is free again when the load is over.
    pub transient_bytes: u64,
    /// The most host memory of the run: staging, and what is on the host of the result and of sources.
    pub peak_host_bytes: u64,
}

/// A tensor for which more is read than the request allows on the whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OverRead {
    /// The stored tensor; the first of several that share a request.
    pub name: String,
    /// Bytes that are read and not kept.
    pub over_bytes: u64,
    /// Why they cannot be spared.
    #[serde(flatten)]
    pub reason: OverReadReason,
}

/// As [`OverRead`], before anybody asks for names.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vain {
    pub(crate) id: TensorId,
    pub(crate) over_bytes: u64,
    pub(crate) reason: OverReadReason,
}

/// The over-reads of one kind.
#[derive(Clone, Copy, Debug)]
pub struct OverReadSum<'o> {
    /// Number of tensors.
    pub tensors: u64,
    /// Bytes that are read and not kept, of all of them.
    pub over_bytes: u64,
    /// The worst of them.
    pub worst: &'o OverRead,
}

impl OverRead {
    /// Sums over-reads, of which the worst come first, by their kind.
    pub fn sums(over_reads: &[OverRead]) -> Vec<OverReadSum<'_>> {
        let mut sums: Vec<OverReadSum<'_>> = Vec::new();
        for over in over_reads {
            let is_alike =
                |sum: &&mut OverReadSum<'_>| discriminant(&sum.worst.reason) == discriminant(&over.reason);
            match sums.iter_mut().find(is_alike) {
                Some(sum) => {
                    sum.tensors += 1;
                    sum.over_bytes += over.over_bytes;
                }
                None => sums.push(OverReadSum { tensors: 1, over_bytes: over.over_bytes, worst: over }),
            }
        }
        sums
    }
}

impl fmt::Display for OverReadSum<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OverReadSum { tensors, over_bytes, worst: OverRead { name, .. } } = self;
        match tensors {
            1 => write!(f, "{over_bytes} bytes are read in vain for {name:?}"),
            _ => write!(f, "{over_bytes} bytes are read in vain for {tensors} tensors, most for {name:?}"),
        }
    }
}

/// Why more is read than is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
#[non_exhaustive]
pub enum OverReadReason {
    /// What is kept of its rows are pieces that are not worth a request each: rows are read whole.
    ShortPieces {
        /// Length of the pieces.
        piece_len_bytes: u64,
    },
    /// Direct reads begin and end at whole blocks, which are long beside what is kept.
    Alignment {
        /// Length of a block.
        align_bytes: u64,
    },
}

impl fmt::Display for OverReadReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OverReadReason::ShortPieces { piece_len_bytes } => {
                write!(f, "pieces of {piece_len_bytes} bytes are too short to be read apart")
            }
            OverReadReason::Alignment { align_bytes } => {
                write!(f, "direct reads are whole blocks of {align_bytes} bytes")
            }
        }
    }
}

/// The reads of a plan that go through the staging ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Staged {
    /// Number of reads.
    pub reads: u64,
    /// Length of the longest; at most one buffer of the machine.
    pub read_len_bytes_max: u64,
}
