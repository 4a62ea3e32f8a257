//! Bytes of a tensor as lines, and the part of them that is taken.

use std::ops::Range;

use crate::checkpoint::TensorId;
use crate::dtype::Dtype;
use crate::quant::Role;
use crate::slice::{Pieces, Slice, SliceError};

/// The part of a stored tensor that becomes part of a quantized one.
///
/// Its bytes are not always a slice of the shape that the tensor is stored with: bitsandbytes stores `[n, 1]`, gpt-oss blocks of 16 bytes.
/// So the tensor is seen as bytes `[matrices, lines, bytes of a line]`, the same bytes in the same order; a line is a row of
/// packed codes, or of words, or of scales.
#[derive(Clone, Debug, PartialEq)]
pub struct CutMember {
    /// What it is to the group.
    pub role: Role,
    /// The stored tensor.
    pub tensor: TensorId,
    /// The tensor as bytes; where it is longer, the rest is padding that nobody reads.
    pub shape: [u64; 3],
    /// The part of these bytes that is taken.
    pub slice: Slice,
    ranges: [Range<u64>; 3],
}

impl CutMember {
    /// Returns the length of the part.
    pub fn len_bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).product()
    }

    /// Returns the ranges that the slice is of.
    pub(super) fn ranges(&self) -> [Range<u64>; 3] {
        self.ranges.clone()
    }

    /// Works out where in the tensor its bytes lie.
    ///
    /// # Errors
    /// [`SliceError::TooManyPieces`] when it is more pieces than a plan holds; no other, because it lies inside.
    pub fn pieces(&self) -> Result<Pieces, SliceError> {
        self.slice.pieces(Dtype::U8, &self.shape)
    }
}

/// Bytes as `[matrices, lines, bytes of a line]`, and a range of each.
#[derive(Clone, Debug)]
pub(super) struct Lines {
    shape: [u64; 3],
    ranges: [Range<u64>; 3],
}

impl Lines {
    /// Takes `ranges` of lines and bytes of each matrix that `matrices` names, or `None` where the tensor is not so many
    /// matrices of such lines. A last matrix may lack what is not taken of its last line.
    pub(super) fn of(
        batch: u64,
        matrices: &Range<u64>,
        [line_count, line_len_bytes]: [u64; 2],
        [lines, bytes]: [Range<u64>; 2],
        len_bytes: u64,
    ) -> Option<Lines> {
        let taken =
            Lines { shape: [batch, line_count, line_len_bytes], ranges: [matrices.clone(), lines, bytes] };
        let matrix_len_bytes = line_count.checked_mul(line_len_bytes)?;
        // Matrices lie one behind the other, without anything between them.
        let is_dense = batch <= 1 || matrix_len_bytes.checked_mul(batch)? == len_bytes;
        (is_dense && taken.end_bytes()? <= len_bytes).then_some(taken)
    }

    /// Takes a stretch of a tensor's bytes.
    pub(super) fn stretch(bytes: Range<u64>, len_bytes: u64) -> Option<Lines> {
        Lines::of(1, &(0..1), [1, len_bytes], [0..1, bytes], len_bytes)
    }

    /// Takes nothing.
    pub(super) fn nothing(len_bytes: u64) -> Lines {
        Lines { shape: [1, 1, len_bytes], ranges: [0..1, 0..1, 0..0] }
    }

    /// Returns it as a group's member.
    pub(super) fn member(self, role: Role, tensor: TensorId) -> CutMember {
        let Lines { shape, ranges } = self;
        CutMember { role, tensor, shape, slice: Slice::new(ranges.clone()), ranges }
    }

    /// The end of the last byte that is taken, or `None` where a range leaves the shape.
    fn end_bytes(&self) -> Option<u64> {
        let is_inside = self
            .ranges
            .iter()
            .zip(self.shape)
            .all(|(range, len)| range.start < range.end && range.end <= len);
        let last = |at: usize| self.ranges[at].end.checked_sub(1);
        let line = last(0)?.checked_mul(self.shape[1])?.checked_add(last(1)?)?;
        let end = line.checked_mul(self.shape[2])?.checked_add(self.ranges[2].end)?;
        is_inside.then_some(end)
    }
}
