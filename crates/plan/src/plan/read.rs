//! Reads: which bytes, and where they land.

use std::ops::Range;

use serde::Serialize;

use crate::extent::{Extent, Stride};
use crate::placement::Place;

/// One read of one file, at most as long as a staging buffer, or as its route in place allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// The bytes read; a whole multiple of the file's direct alignment, except at its end and where only pieces of them are read.
    pub extent: Extent,
    /// The pieces of the extent that are read, where the rest is left out: they land back to back.
    pub stride: Option<Stride>,
    /// Where they land.
    pub target: Target,
    /// Range of the plan's list of tensors brought; see [`Plan::brought`](crate::Plan::brought).
    pub brought: Range<u32>,
    /// How many of its bytes are of tensors asked for, or of sources; the rest is alignment and bridged gaps.
    pub payload_bytes: u64,
    /// The operations that must have been started before the read begins, and be over before its bytes land: their sources lay in the
    /// same place. Mostly none.
    pub after: Range<u32>,
}

impl Read {
    /// Returns the bytes that land in memory.
    pub fn len_bytes(&self) -> u64 {
        self.stride.map_or(self.extent.len_bytes, |stride| stride.len_bytes())
    }
}

/// Where the bytes of a read land.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Straight in the arena: the first byte read lands at this place.
    InPlace(Place),
    /// In a staging buffer, from which these copies of the plan take them.
    Staged {
        /// Range of the plan's copies; see [`Plan::copies`](crate::Plan::copies).
        copies: Range<u32>,
    },
}

/// One copy from a staging buffer into an arena: of one piece, or of equal pieces at equal distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Copy {
    /// Distance from the first byte of the read.
    pub source_offset_bytes: u64,
    /// Where the first byte lands.
    pub target: Place,
    /// Number of bytes of each piece.
    pub len_bytes: u64,
    /// Further pieces.
    #[serde(skip_serializing_if = "Steps::is_once")]
    pub steps: Steps,
}

impl Copy {
    /// Walks the pieces: for each, where it begins in the read and in the arena.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let (source, target, steps) = (self.source_offset_bytes, self.target.offset_bytes, self.steps);
        (0..steps.count).map(move |step| {
            (source + step * steps.source_stride_bytes, target + step * steps.target_stride_bytes)
        })
    }
}

/// How many pieces, and how far apart they begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Steps {
    /// Number of pieces; 1 or more.
    pub count: u64,
    /// From a piece to the next in the read.
    pub source_stride_bytes: u64,
    /// From a piece to the next in the arena.
    pub target_stride_bytes: u64,
}

impl Steps {
    /// One piece.
    pub const ONCE: Steps = Steps { count: 1, source_stride_bytes: 0, target_stride_bytes: 0 };

    /// Tells whether there is one piece only.
    pub fn is_once(&self) -> bool {
        self.count == 1
    }
}

/// What a read brings bytes of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Brought {
    /// A tensor of the result, by its place in [`Plan::tensors`](crate::Plan::tensors).
    Tensor(u32),
    /// The sources of an operation, by its place in [`Plan::operations`](crate::Plan::operations).
    Operation(u32),
}
