//! Parts of tensors: which bytes of a row-major tensor a slice keeps.

use std::fmt;
use std::ops::Range;

use serde::Serialize;

use crate::dtype::{Dtype, numel};

/// A part of a tensor: one `start..stop` of elements for each leading dimension; the dimensions
/// behind them are kept whole. `[0..4]` of a `[8, 16]` tensor is its first four rows.
///
/// An empty range is allowed and gives an empty tensor; `start > stop` and `stop` past the
/// dimension are errors, never clamped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Slice {
    ranges: Vec<Range<u64>>,
}

impl Slice {
    /// Keeps `ranges[d]` of dimension `d`.
    pub fn new(ranges: impl Into<Vec<Range<u64>>>) -> Slice {
        Slice { ranges: ranges.into() }
    }

    /// Keeps these rows: a range of dimension 0.
    pub fn rows(range: Range<u64>) -> Slice {
        Slice { ranges: vec![range] }
    }

    /// Returns the ranges as given.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// Works out which bytes of a tensor the slice keeps.
    ///
    /// # Errors
    /// [`SliceError`] when the slice has more dimensions than the tensor, a range is backwards or
    /// leaves its dimension, or packed elements (F4, F6) would be cut inside a byte.
    pub fn pieces(&self, dtype: Dtype, shape: &[u64]) -> Result<Pieces, SliceError> {
        if self.ranges.len() > shape.len() {
            return Err(SliceError::TooManyDims { found: self.ranges.len(), ndim: shape.len() });
        }
        let mut kept = shape.to_vec();
        for (dim, range) in self.ranges.iter().enumerate() {
            if range.start > range.end || range.end > shape[dim] {
                return Err(SliceError::OutOfRange { dim, range: range.clone(), len: shape[dim] });
            }
            kept[dim] = range.end - range.start;
        }
        let pieces = Pieces::new(dtype, shape, kept, &self.ranges)?;
        if pieces.count > PIECE_COUNT_MAX {
            return Err(SliceError::TooManyPieces { found: pieces.count, max: PIECE_COUNT_MAX });
        }
        Ok(pieces)
    }
}

/// The bytes a slice keeps: equal pieces in ascending order, back to back in the result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pieces {
    shape: Vec<u64>,
    piece_len_bytes: u64,
    /// For each cut dimension, outermost first: number of steps, bytes a step, bytes before the first.
    loops: Vec<(u64, u64)>,
    first_offset_bytes: u64,
    count: u64,
}

impl Pieces {
    fn new(dtype: Dtype, whole: &[u64], kept: Vec<u64>, ranges: &[Range<u64>]) -> Result<Pieces, SliceError> {
        // The last dimension that is cut decides the piece: everything inside it is contiguous.
        let cut = (0..ranges.len()).rev().find(|&dim| kept[dim] != whole[dim]).unwrap_or(0);
        let stride_bytes = |dim: usize| bytes(dtype, whole.get(dim + 1..).unwrap_or(&[]));
        let mut pieces = Pieces {
            piece_len_bytes: bytes(dtype, &kept[cut.min(kept.len())..])?,
            loops: Vec::with_capacity(cut),
            first_offset_bytes: 0,
            count: kept[..cut.min(kept.len())].iter().product(),
            shape: kept,
        };
        if numel(&pieces.shape) == Some(0) {
            return Ok(Pieces { piece_len_bytes: 0, loops: Vec::new(), count: 0, ..pieces });
        }
        for (dim, range) in ranges.iter().enumerate().take(cut + 1) {
            let stride = match stride_bytes(dim) {
                Ok(stride) => stride,
                // Packed elements: only an offset of whole bytes has an address.
                Err(_) if dim == cut => {
                    pieces.first_offset_bytes +=
                        bytes(dtype, &[range.start, numel(&whole[dim + 1..]).unwrap_or(1)])?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            pieces.first_offset_bytes += range.start * stride;
            if dim < cut {
                pieces.loops.push((pieces.shape[dim], stride));
            }
        }
        Ok(pieces)
    }

    /// Returns the shape of the result.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Returns the length of each piece.
    pub fn piece_len_bytes(&self) -> u64 {
        self.piece_len_bytes
    }

    /// Returns the number of pieces; 0 when the result is empty.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Returns the bytes of the result.
    pub fn len_bytes(&self) -> u64 {
        self.count * self.piece_len_bytes
    }

    /// Walks the offsets of the pieces from the tensor's first byte, ascending.
    pub fn offsets_bytes(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.count).map(|mut index| {
            let mut offset = self.first_offset_bytes;
            for (steps, stride) in self.loops.iter().rev() {
                offset += index % steps * stride;
                index /= steps;
            }
            offset
        })
    }
}

/// Bytes of packed elements in this shape; the header has checked that the whole tensor's bits fit.
fn bytes(dtype: Dtype, shape: &[u64]) -> Result<u64, SliceError> {
    numel(shape).and_then(|numel| dtype.len_bytes(numel)).ok_or(SliceError::InsideByte { dtype })
}

/// Why a slice of a tensor does not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SliceError {
    /// More ranges than the tensor has dimensions.
    TooManyDims {
        /// Ranges given.
        found: usize,
        /// Dimensions of the tensor.
        ndim: usize,
    },
    /// A range that is backwards or leaves its dimension.
    OutOfRange {
        /// Which dimension, from 0.
        dim: usize,
        /// The range asked for.
        range: Range<u64>,
        /// Elements the dimension has.
        len: u64,
    },
    /// More pieces than a plan can hold.
    TooManyPieces {
        /// Pieces that the slice keeps.
        found: u64,
        /// The limit.
        max: u64,
    },
    /// Packed elements cut at an address inside a byte.
    InsideByte {
        /// The packed element type.
        dtype: Dtype,
    },
}

impl fmt::Display for SliceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SliceError::TooManyDims { found, ndim } => {
                write!(f, "the slice has {found} dimensions, the tensor {ndim}")
            }
            SliceError::OutOfRange { dim, range, len } if range.start > range.end => {
                write!(
                    f,
                    "{}..{} of dimension {dim} is backwards (it has {len} elements)",
                    range.start, range.end
                )
            }
            SliceError::OutOfRange { dim, range, len } => {
                write!(f, "{}..{} leaves dimension {dim}, which has {len} elements", range.start, range.end)
            }
            SliceError::TooManyPieces { found, max } => {
                write!(f, "the slice is {found} pieces, a plan holds {max}; slice fewer rows at a time")
            }
            SliceError::InsideByte { dtype } => {
                write!(
                    f,
                    "the slice cuts packed {dtype} elements inside a byte; cut at a multiple of {}",
                    8 / gcd(dtype.bits())
                )
            }
        }
    }
}

impl std::error::Error for SliceError {}

/// The most pieces of one slice: each is planned as a copy of its own, of about 80 bytes, so that this many take 20 MiB.
/// The longest inner slice of a known model is a vocabulary's, with 262,144 rows.
pub const PIECE_COUNT_MAX: u64 = 1 << 18;

/// Greatest common divisor with 8 of a width below 8 bits.
fn gcd(bits: u64) -> u64 {
    1 << bits.trailing_zeros().min(3)
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a slice of one dimension is one range")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kept(shape: &[u64], ranges: &[Range<u64>]) -> (u64, Vec<u64>) {
        let pieces = Slice::new(ranges).pieces(Dtype::U8, shape).unwrap();
        (pieces.piece_len_bytes(), pieces.offsets_bytes().collect())
    }

    #[test]
    fn leading_rows_are_one_piece_and_inner_columns_one_per_row() {
        assert_eq!(kept(&[4, 6], &[1..3]), (12, vec![6]));
        assert_eq!(kept(&[4, 6], &[0..4, 2..5]), (3, vec![2, 8, 14, 20]));
        assert_eq!(kept(&[4, 6], &[]), (24, vec![0]));
        assert_eq!(kept(&[], &[]), (1, vec![0]));
        assert_eq!(kept(&[4, 6], &[2..2]), (0, vec![]));
    }

    #[test]
    fn a_slice_outside_its_tensor_says_what_the_tensor_has() {
        let error =
            |ranges: &[Range<u64>]| Slice::new(ranges).pieces(Dtype::F32, &[4, 6]).unwrap_err().to_string();
        #[expect(clippy::reversed_empty_ranges, reason = "the error is about one")]
        let backwards = 5..3;
        assert_eq!(error(&[backwards]), "5..3 of dimension 0 is backwards (it has 4 elements)");
        assert_eq!(error(&[0..4, 0..7]), "0..7 leaves dimension 1, which has 6 elements");
        assert_eq!(error(&[0..1, 0..1, 0..1]), "the slice has 3 dimensions, the tensor 2");
    }

    #[test]
    fn a_slice_of_too_many_pieces_says_so_before_it_takes_memory() {
        let column = Slice::new([0..PIECE_COUNT_MAX + 1, 0..1]);
        let error = column.pieces(Dtype::U8, &[1 << 40, 2]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the slice is 262145 pieces, a plan holds 262144; slice fewer rows at a time"
        );
    }

    #[test]
    fn packed_elements_are_cut_at_whole_bytes_only() {
        let pieces = |range| Slice::new([0..2, range]).pieces(Dtype::F4, &[2, 8]);
        assert_eq!(pieces(2..6).unwrap().offsets_bytes().collect::<Vec<_>>(), [1, 5]);
        assert!(matches!(pieces(1..5), Err(SliceError::InsideByte { .. })));
        assert!(matches!(pieces(2..5), Err(SliceError::InsideByte { .. })));
    }

    proptest! {
        #[test]
        fn pieces_are_the_elements_that_a_naive_walk_keeps(
            dims in proptest::collection::vec((1u64..5, 0u64..5, 0u64..5), 0..4),
        ) {
            let shape: Vec<u64> = dims.iter().map(|dim| dim.0).collect();
            let ranges: Vec<Range<u64>> = dims.iter().map(|&(len, a, b)| a.min(b).min(len)..a.max(b).min(len)).collect();
            let pieces = Slice::new(ranges.clone()).pieces(Dtype::U8, &shape).unwrap();
            let found: Vec<u64> = pieces
                .offsets_bytes()
                .flat_map(|offset| offset..offset + pieces.piece_len_bytes())
                .collect();
            let naive: Vec<u64> = (0..shape.iter().product())
                .filter(|flat| {
                    let mut rest = *flat;
                    (0..shape.len()).rev().all(|dim| {
                        let index = rest % shape[dim];
                        rest /= shape[dim];
                        ranges[dim].contains(&index)
                    })
                })
                .collect();
            prop_assert_eq!(found, naive);
        }
    }
}
