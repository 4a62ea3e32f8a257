//! What a device does with its own memory: operations, described once for all backends.
//!
//! The host backend runs each as a plain loop; GPUs run it as a kernel and are held to the loop's bits.

use std::fmt;
use std::sync::Arc;

use tensorhaul_plan::Dtype;
use tensorhaul_plan::quant::{Recipe, Role};

use crate::contract::Allocation;
use crate::dequantize::Output;

/// One operation on memory of one device.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum Operation<'a> {
    /// Elements of one type become elements of another.
    Cast(Cast<'a>),
    /// Equal pieces at equal distances are copied.
    Strided(Strided<'a>),
    /// The tensors of a quantized one become its numbers.
    Dequantize(Dequantize<'a>),
}

/// What kind of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OperationKind {
    /// [`Operation::Cast`].
    Cast,
    /// [`Operation::Strided`].
    Strided,
    /// [`Operation::Dequantize`].
    Dequantize,
}

/// Casts elements as [`crate::cast::cast`] does, for every pair of [`crate::cast::can_cast`]. Source and
/// target may start at any byte; multiples of 16 are fastest.
#[derive(Clone, Copy)]
pub struct Cast<'a> {
    /// Where the elements are.
    pub source: Location<'a>,
    /// What they are.
    pub source_dtype: Dtype,
    /// Where they go.
    pub target: Location<'a>,
    /// What they become.
    pub target_dtype: Dtype,
    /// Number of elements.
    pub numel: u64,
}

/// Copies equal pieces at equal distances: the part of its rows that a slice keeps. Everything may start at any byte.
#[derive(Clone, Copy)]
pub struct Strided<'a> {
    /// Where the first piece is.
    pub source: Location<'a>,
    /// From the start of one piece to the start of the next, in the source.
    pub source_stride_bytes: u64,
    /// Where the first piece goes.
    pub target: Location<'a>,
    /// From the start of one piece to the start of the next, in the target; pieces do not overlap there.
    pub target_stride_bytes: u64,
    /// Length of each piece.
    pub piece_len_bytes: u64,
    /// Number of pieces.
    pub piece_count: u64,
}

/// Dequantizes as [`crate::dequantize::dequantize`] does, but for the bits of results that are NaN. Everything may start at any
/// byte; multiples of 16 are fastest.
#[derive(Clone, Copy)]
pub struct Dequantize<'a> {
    /// How bytes become numbers.
    pub recipe: &'a Recipe,
    /// The tensors that the recipe reads, each role once; others may be among them.
    pub sources: &'a [Source<'a>],
    /// Where the numbers go.
    pub target: Location<'a>,
    /// What they become, and in which order.
    pub output: Output,
}

/// A tensor that a recipe reads.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// What it is to the recipe.
    pub role: Role,
    /// Where it starts.
    pub start: Location<'a>,
    /// All of it: matrices of a batch lie at equal parts of this.
    pub len_bytes: u64,
}

/// A byte of an allocation.
#[derive(Clone, Copy)]
pub struct Location<'a> {
    /// The allocation.
    pub allocation: &'a Arc<dyn Allocation>,
    /// Distance from its first byte.
    pub offset_bytes: u64,
}

impl Operation<'_> {
    /// Returns what kind of operation this is.
    pub fn kind(&self) -> OperationKind {
        match self {
            Operation::Cast(_) => OperationKind::Cast,
            Operation::Strided(_) => OperationKind::Strided,
            Operation::Dequantize(_) => OperationKind::Dequantize,
        }
    }
}

impl fmt::Display for OperationKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OperationKind::Cast => "cast",
            OperationKind::Strided => "strided copy",
            OperationKind::Dequantize => "dequantization",
        })
    }
}

impl Cast<'_> {
    /// Returns the number of bytes read.
    pub fn source_len_bytes(&self) -> u64 {
        self.numel * (self.source_dtype.bits() / 8)
    }

    /// Returns the number of bytes written.
    pub fn target_len_bytes(&self) -> u64 {
        self.numel * (self.target_dtype.bits() / 8)
    }
}

impl Strided<'_> {
    /// Returns the number of bytes from the start of the first piece to the end of the last, in the source.
    pub fn source_reach_bytes(&self) -> u64 {
        self.reach_bytes(self.source_stride_bytes)
    }

    /// Returns the number of bytes from the start of the first piece to the end of the last, in the target.
    pub fn target_reach_bytes(&self) -> u64 {
        self.reach_bytes(self.target_stride_bytes)
    }

    fn reach_bytes(&self, stride_bytes: u64) -> u64 {
        self.piece_count.checked_sub(1).map_or(0, |last| last * stride_bytes + self.piece_len_bytes)
    }
}

impl Dequantize<'_> {
    /// Returns the number of bytes written.
    ///
    /// # Panics
    /// When they overflow: no allocation is as long.
    pub fn target_len_bytes(&self) -> u64 {
        self.recipe.target_len_bytes(self.output.dtype).expect("a result that fits into memory")
    }
}

impl Location<'_> {
    /// Returns the address of a range that starts here.
    ///
    /// # Panics
    /// When the range leaves the allocation: the caller broke the contract, and going on would read or write
    /// somebody else's memory.
    pub fn range(&self, len_bytes: u64) -> u64 {
        let end = self.offset_bytes.checked_add(len_bytes);
        assert!(
            end.is_some_and(|end| end <= self.allocation.len_bytes()),
            "an operation stays inside its allocations"
        );
        self.allocation.address() + self.offset_bytes
    }
}
