//! Parts of tensors: which bytes of a row-major tensor a slice keeps.

use std::fmt;
use std::ops::Range;

use serde::Serialize;
use smallvec::{SmallVec, smallvec};

use crate::dims::Dims;
use crate::dtype::Dtype;
use crate::plan::Steps;

/// A part of a tensor: one range of elements for each leading dimension; the dimensions behind them are kept whole. `[0..4]`
/// of a `[8, 16]` tensor is its first four rows.
///
/// An empty range is allowed and gives an empty tensor; `start > stop` and `stop` past the
/// dimension are errors, never clamped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Slice {
    ranges: SmallVec<[SliceRange; 2]>,
}

/// Elements `start`, `start + step`, ... below `stop` of one dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SliceRange {
    /// The first element kept.
    pub start: u64,
    /// Behind the last that may be kept.
    pub stop: u64,
    /// From one kept element to the next; 1 or more.
    pub step: u64,
}

impl SliceRange {
    /// Returns the number of elements kept; 0 where the range is backwards or the step 0.
    pub fn len(&self) -> u64 {
        if self.step == 0 { 0 } else { self.stop.saturating_sub(self.start).div_ceil(self.step) }
    }

    /// Tells whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl From<Range<u64>> for SliceRange {
    fn from(range: Range<u64>) -> SliceRange {
        SliceRange { start: range.start, stop: range.end, step: 1 }
    }
}

impl fmt::Display for SliceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.step {
            1 => write!(f, "{}..{}", self.start, self.stop),
            step => write!(f, "{}..{} by {step}", self.start, self.stop),
        }
    }
}

impl Slice {
    /// Keeps `ranges[d]` of dimension `d`.
    pub fn new(ranges: impl IntoIterator<Item = Range<u64>>) -> Slice {
        Slice::with_steps(ranges.into_iter().map(SliceRange::from))
    }

    /// Keeps every `step`-th element of a range, for each dimension.
    pub fn with_steps(ranges: impl IntoIterator<Item = SliceRange>) -> Slice {
        Slice { ranges: ranges.into_iter().collect() }
    }

    /// Keeps these rows: a range of dimension 0.
    pub fn rows(range: Range<u64>) -> Slice {
        Slice { ranges: smallvec![range.into()] }
    }

    /// Keeps everything.
    pub const fn whole() -> Slice {
        Slice { ranges: SmallVec::new_const() }
    }

    /// Returns the ranges as given.
    pub fn ranges(&self) -> &[SliceRange] {
        &self.ranges
    }

    /// Returns the shape of what is kept.
    ///
    /// # Errors
    /// [`SliceError`] when the slice has more dimensions than the tensor, a step is 0, or a range is backwards or leaves its
    /// dimension.
    pub fn shape(&self, whole: &[u64]) -> Result<Dims, SliceError> {
        self.check(whole)?;
        Ok((0..whole.len()).map(|dim| self.range(dim, whole).len()).collect())
    }

    fn check(&self, whole: &[u64]) -> Result<(), SliceError> {
        if self.ranges.len() > whole.len() {
            return Err(SliceError::TooManyDims { found: self.ranges.len(), ndim: whole.len() });
        }
        for (dim, range) in self.ranges.iter().enumerate() {
            if range.step == 0 {
                return Err(SliceError::NoStep { dim });
            }
            if range.start > range.stop || range.stop > whole[dim] {
                return Err(SliceError::OutOfRange { dim, range: range.start..range.stop, len: whole[dim] });
            }
        }
        Ok(())
    }

    /// Returns what is kept of a dimension.
    fn range(&self, dim: usize, whole: &[u64]) -> SliceRange {
        self.ranges.get(dim).copied().unwrap_or(SliceRange { start: 0, stop: whole[dim], step: 1 })
    }

    /// Works out which bytes of a tensor the slice keeps, to lie back to back.
    ///
    /// # Errors
    /// As [`Slice::shape`]; also when packed elements (F4, F6) would be cut inside a byte, or when there are more
    /// pieces than a plan holds.
    pub fn pieces(&self, dtype: Dtype, whole: &[u64]) -> Result<Pieces, SliceError> {
        self.nested(dtype, whole, None, 0)
    }

    /// As [`Slice::pieces`], to lie in a tensor of other strides: the first element at `first`, the others by `strides`, both in
    /// elements of the target, one stride a dimension of the slice's result.
    ///
    /// # Errors
    /// As [`Slice::pieces`].
    pub fn pieces_into(
        &self,
        dtype: Dtype,
        whole: &[u64],
        strides: &[u64],
        first: u64,
    ) -> Result<Pieces, SliceError> {
        assert_eq!(strides.len(), whole.len(), "one stride a dimension");
        self.nested(dtype, whole, Some(strides), first)
    }

    /// As [`Slice::pieces_into`]; without strides the elements lie back to back.
    fn nested(
        &self,
        dtype: Dtype,
        whole: &[u64],
        strides: Option<&[u64]>,
        first: u64,
    ) -> Result<Pieces, SliceError> {
        self.check(whole)?;
        if (0..whole.len()).any(|dim| self.range(dim, whole).is_empty()) {
            return Ok(Pieces::default());
        }
        let bits = dtype.bits();
        let (mut piece, mut inner, mut outer) = (bits, Loop::ONCE, Vec::new());
        let (mut source_first, mut source_stride, mut dense_stride) = (0, 1u64, 1u64);
        // Counted in bits, from the innermost dimension out.
        for dim in (0..whole.len()).rev() {
            let range = self.range(dim, whole);
            let (stride, count) = (source_stride, range.len());
            let target_stride = strides.map_or(dense_stride, |strides| strides[dim]);
            source_first += range.start * stride;
            (source_stride, dense_stride) =
                (stride.saturating_mul(whole[dim]), dense_stride.saturating_mul(count));
            if count == 1 {
                continue;
            }
            let step = Loop { count, source: stride * range.step * bits, target: target_stride * bits };
            if inner == Loop::ONCE && (step.source, step.target) == (piece, piece) {
                piece *= count;
            } else if inner == Loop::ONCE {
                inner = step;
            } else {
                let last = outer.last_mut().unwrap_or(&mut inner);
                match last.ends() == (step.source, step.target) {
                    true => last.count *= count, // It goes on where the inner one ends.
                    false => outer.push(step),
                }
            }
        }
        let bytes = |bits: u64| match bits % 8 {
            0 => Ok(bits / 8),
            _ => Err(SliceError::InsideByte { dtype }),
        };
        for step in outer.iter_mut().chain([&mut inner]) {
            (step.source, step.target) = (bytes(step.source)?, bytes(step.target)?);
        }
        let pieces = Pieces {
            piece_len_bytes: bytes(piece)?,
            inner,
            outer,
            source_offset_bytes: bytes(source_first * bits)?,
            target_offset_bytes: bytes(first * bits)?,
        };
        let rows = pieces.rows().len();
        if rows > ROW_COUNT_MAX {
            return Err(SliceError::TooManyPieces { found: rows, max: ROW_COUNT_MAX });
        }
        Ok(pieces)
    }
}

/// The bytes a slice keeps, as nested loops over equal pieces, and where they go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pieces {
    piece_len_bytes: u64,
    inner: Loop,
    /// The loops around it, from the inside out; mostly none.
    outer: Vec<Loop>,
    source_offset_bytes: u64,
    target_offset_bytes: u64,
}

/// How often something is repeated, and the distances between its repetitions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Loop {
    count: u64,
    source: u64,
    target: u64,
}

impl Loop {
    const ONCE: Loop = Loop { count: 1, source: 0, target: 0 };

    /// Returns the distances from the first repetition to the one behind the last.
    fn ends(&self) -> (u64, u64) {
        (self.source * self.count, self.target * self.count)
    }
}

/// Equal pieces at equal distances: where the first begins, in the tensor and in what it goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) source_offset_bytes: u64,
    pub(crate) target_offset_bytes: u64,
    pub(crate) len_bytes: u64,
    pub(crate) steps: Steps,
}

impl Pieces {
    /// Returns the length of each piece.
    pub fn piece_len_bytes(&self) -> u64 {
        self.piece_len_bytes
    }

    /// Returns the number of pieces; 0 when the result is empty.
    pub fn count(&self) -> u64 {
        self.rows().len() * self.inner.count
    }

    /// Returns the bytes of the result.
    pub fn len_bytes(&self) -> u64 {
        self.count() * self.piece_len_bytes
    }

    /// Returns where the first piece goes, from the start of the target.
    pub fn target_offset_bytes(&self) -> u64 {
        self.target_offset_bytes
    }

    /// Returns the bytes of the tensor from its first on, if the result is one run of them that goes to the start of its target.
    pub fn run(&self) -> Option<Range<u64>> {
        let begin = self.source_offset_bytes;
        (self.count() == 1 && self.target_offset_bytes == 0).then(|| begin..begin + self.piece_len_bytes)
    }

    /// Walks the offsets of the pieces from the tensor's first byte, in the order of the result's elements.
    pub fn offsets_bytes(&self) -> impl Iterator<Item = u64> + '_ {
        self.rows().flat_map(|row| {
            (0..row.steps.count)
                .map(move |step| row.source_offset_bytes + step * row.steps.source_stride_bytes)
        })
    }

    /// Walks rows of equal pieces: all loops but the innermost.
    pub(crate) fn rows(&self) -> impl ExactRows + '_ {
        let Pieces { inner, outer, .. } = self;
        let count = if self.piece_len_bytes == 0 { 0 } else { outer.iter().map(|step| step.count).product() };
        let steps = Steps {
            count: inner.count,
            source_stride_bytes: inner.source,
            target_stride_bytes: inner.target,
        };
        let row = move |mut index: u64| {
            let (mut source, mut target) = (self.source_offset_bytes, self.target_offset_bytes);
            for step in outer {
                source += index % step.count * step.source;
                target += index % step.count * step.target;
                index /= step.count;
            }
            let len_bytes = self.piece_len_bytes;
            Row { source_offset_bytes: source, target_offset_bytes: target, len_bytes, steps }
        };
        Rows { indices: 0..count, row }
    }
}

/// Rows and how many of them there are, which may pass what a `usize` holds.
pub(crate) trait ExactRows: Iterator<Item = Row> {
    fn len(&self) -> u64;
}

struct Rows<F> {
    indices: Range<u64>,
    row: F,
}

impl<F: Fn(u64) -> Row> Iterator for Rows<F> {
    type Item = Row;

    fn next(&mut self) -> Option<Row> {
        self.indices.next().map(&self.row)
    }
}

impl<F: Fn(u64) -> Row> ExactRows for Rows<F> {
    fn len(&self) -> u64 {
        self.indices.end - self.indices.start
    }
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
    /// A range that goes nowhere.
    NoStep {
        /// Which dimension, from 0.
        dim: usize,
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
    /// More rows of equal pieces than a plan can hold.
    TooManyPieces {
        /// Rows of pieces that the slice keeps.
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
            SliceError::NoStep { dim } => {
                write!(f, "the step of dimension {dim} is 0; 1 keeps every element")
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
                write!(f, "the slice is {found} rows of pieces, a plan holds {max}; slice fewer at a time")
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

/// The most rows of equal pieces of one slice: each is planned as a copy of its own, of about 80 bytes, so that this many take
/// 20 MiB. A slice of two dimensions is one row, however many pieces that has.
pub const ROW_COUNT_MAX: u64 = 1 << 18;

/// Greatest common divisor with 8 of a width below 8 bits.
fn gcd(bits: u64) -> u64 {
    1 << bits.trailing_zeros().min(3)
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a slice of one dimension is one range")]
mod tests {
    use super::*;
    use crate::dims::row_major;
    use proptest::prelude::*;

    fn kept(shape: &[u64], ranges: &[Range<u64>]) -> (u64, Vec<u64>) {
        let pieces = Slice::new(ranges.to_vec()).pieces(Dtype::U8, shape).unwrap();
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
        let error = |ranges: &[Range<u64>]| {
            Slice::new(ranges.to_vec()).pieces(Dtype::F32, &[4, 6]).unwrap_err().to_string()
        };
        #[expect(clippy::reversed_empty_ranges, reason = "the error is about one")]
        let backwards = 5..3;
        assert_eq!(error(&[backwards]), "5..3 of dimension 0 is backwards (it has 4 elements)");
        assert_eq!(error(&[0..4, 0..7]), "0..7 leaves dimension 1, which has 6 elements");
        assert_eq!(error(&[0..1, 0..1, 0..1]), "the slice has 3 dimensions, the tensor 2");
    }

    #[test]
    fn a_slice_of_too_many_rows_says_so_before_it_takes_memory() {
        let corners = Slice::new([0..ROW_COUNT_MAX + 1, 0..1, 0..1]);
        let error = corners.pieces(Dtype::U8, &[1 << 40, 2, 2]).map(|pieces| pieces.count());
        assert_eq!(error, Ok(ROW_COUNT_MAX + 1), "one row of pieces");
        let corners = Slice::new([0..ROW_COUNT_MAX + 1, 0..2, 0..1]);
        assert_eq!(
            corners.pieces(Dtype::U8, &[1 << 40, 3, 2]).unwrap_err().to_string(),
            "the slice is 262145 rows of pieces, a plan holds 262144; slice fewer at a time"
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
            dims in proptest::collection::vec((1u64..5, 0u64..5, 0u64..5, 1u64..4), 0..4),
            gaps in proptest::collection::vec(0u64..3, 4),
        ) {
            let shape: Vec<u64> = dims.iter().map(|dim| dim.0).collect();
            let range = |&(len, a, b, step): &(u64, u64, u64, u64)| SliceRange {
                start: a.min(b).min(len),
                stop: a.max(b).min(len),
                step,
            };
            let ranges: Vec<SliceRange> = dims.iter().map(range).collect();
            let slice = Slice::with_steps(ranges.clone());
            // The target's rows have gaps behind them.
            let kept = slice.shape(&shape).unwrap();
            let mut strides = row_major(&kept);
            for dim in (0..kept.len().saturating_sub(1)).rev() {
                strides[dim] = strides[dim + 1] * kept[dim + 1].max(1) + gaps[dim];
            }
            let pieces = slice.pieces_into(Dtype::U16, &shape, &strides, 7).unwrap();
            let mut found = Vec::new();
            for row in pieces.rows() {
                for step in 0..row.steps.count {
                    let source = row.source_offset_bytes + step * row.steps.source_stride_bytes;
                    let target = row.target_offset_bytes + step * row.steps.target_stride_bytes;
                    found.extend((0..row.len_bytes).map(|byte| (source + byte, target + byte)));
                }
            }
            let mut naive = Vec::new();
            for flat in 0..shape.iter().product::<u64>() {
                let (mut rest, mut target, mut is_kept) = (flat, 7, true);
                for dim in (0..shape.len()).rev() {
                    let (index, range) = (rest % shape[dim], ranges[dim]);
                    rest /= shape[dim];
                    is_kept &= (range.start..range.stop).contains(&index)
                        && (index - range.start).is_multiple_of(range.step);
                    target += index.saturating_sub(range.start) / range.step * strides[dim];
                }
                if is_kept {
                    naive.extend((0..2).map(|byte| (2 * flat + byte, 2 * target + byte)));
                }
            }
            prop_assert_eq!(&found, &naive);
            prop_assert_eq!(pieces.len_bytes(), naive.len() as u64);
        }
    }
}
