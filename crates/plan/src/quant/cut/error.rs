//! What keeps a part of a quantized tensor from being cut.

use std::fmt;
use std::ops::Range;

use crate::header::json::Quoted;

/// What keeps a part of a quantized tensor from being cut, or from being handed over as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CutError {
    /// A range is backwards, or leaves what it is a range of.
    OutOfRange {
        /// The group's name.
        group: String,
        /// What the range counts.
        what: String,
        /// The range.
        range: Range<u64>,
        /// How many there are.
        len: u64,
    },
    /// More ranges than the result has dimensions.
    TooManyDims {
        /// The group's name.
        group: String,
        /// Ranges given.
        found: usize,
        /// Dimensions of the result.
        ndim: usize,
    },
    /// The slice is no rectangle of the rows that the format packs.
    NotARectangle {
        /// The group's name.
        group: String,
        /// The slice.
        ranges: Vec<Range<u64>>,
        /// Rows that the format sees.
        rows: u64,
        /// Columns that the format sees.
        cols: u64,
        /// Slices of the first dimension at multiples of this are rectangles.
        multiple: u64,
    },
    /// A member is not laid out as the recipe says.
    Layout {
        /// The group's name.
        group: String,
        /// The stored tensor.
        tensor: String,
        /// Its length.
        len_bytes: u64,
        /// What the recipe reads of it.
        least_len_bytes: u64,
    },
    /// A stored tensor would be cut inside what is packed, or scaled, together.
    InsideUnit {
        /// The group's name.
        group: String,
        /// The stored tensor.
        tensor: String,
        /// `row` or `column`.
        dim: &'static str,
        /// Where the cut would be.
        at: u64,
        /// Rows or columns that are together.
        unit: u64,
        /// What they are together: `packed` or `scaled`.
        what: &'static str,
        /// Rows or columns that are together in any tensor of the group: where it could be cut.
        multiple: u64,
        /// The nearest such cuts below and above.
        nearest: [u64; 2],
    },
    /// The bytes are no slice of the shape that the tensor is stored with.
    NotASlice {
        /// The group's name.
        group: String,
        /// The stored tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
    },
}

impl fmt::Display for CutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CutError::OutOfRange { group, what, range, len } if range.start > range.end => {
                write!(
                    f,
                    "tensor {}: {}..{} of {len} {what} is backwards",
                    Quoted(group),
                    range.start,
                    range.end
                )
            }
            CutError::OutOfRange { group, what, range, len } => {
                write!(f, "tensor {}: {}..{} leaves its {len} {what}", Quoted(group), range.start, range.end)
            }
            CutError::TooManyDims { group, found, ndim } => {
                write!(f, "tensor {}: the slice has {found} dimensions, the tensor {ndim}", Quoted(group))
            }
            CutError::NotARectangle { group, ranges, rows, cols, multiple } => write!(
                f,
                "tensor {}: {ranges:?} is no rectangle of its {rows} by {cols} packed codes; \
                 whole rows at multiples of {multiple} would work, or cutting the dequantized tensor",
                Quoted(group)
            ),
            CutError::Layout { group, tensor, len_bytes, least_len_bytes } => write!(
                f,
                "tensor {}: its {len_bytes} bytes are not laid out as {} needs them ({least_len_bytes} bytes, in lines of equal length)",
                Quoted(tensor),
                Quoted(group)
            ),
            CutError::InsideUnit { group, tensor, dim, at, unit, what, nearest: [below, above], .. } => {
                write!(
                    f,
                    "tensor {}: {dim} {at} of {} is inside {unit} {dim}s that are {what} together; \
                 cutting at {below} or {above} would work, or dequantizing",
                    Quoted(tensor),
                    Quoted(group)
                )
            }
            CutError::NotASlice { group, tensor, shape } => write!(
                f,
                "tensor {}: the part of {} is no slice of its shape {shape:?}; dequantizing works",
                Quoted(tensor),
                Quoted(group)
            ),
        }
    }
}

impl std::error::Error for CutError {}
