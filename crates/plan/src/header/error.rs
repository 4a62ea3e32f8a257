//! What can be wrong with a header.

use std::fmt;

use super::json::Quoted;
use super::{HEADER_LEN_BYTES_MAX, LEN_PREFIX_BYTES};
use crate::dtype::{Dtype, numel};

/// What is wrong with a header, without the name of its file.
///
/// Byte positions named `at_bytes` count from the start of the file, `data_offsets` from the start of its data.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeaderError {
    /// The file is shorter than the eight bytes of the length prefix.
    FileTooShort {
        /// The file's length.
        file_len_bytes: u64,
    },
    /// The JSON is longer than [`HEADER_LEN_BYTES_MAX`]; so say the first eight bytes of most files
    /// that are no safetensors at all.
    TooLong {
        /// The JSON's length.
        header_len_bytes: u64,
    },
    /// The JSON would end beyond the file.
    Truncated {
        /// The JSON's length, without the prefix.
        header_len_bytes: u64,
        /// The file's length.
        file_len_bytes: u64,
    },
    /// The JSON isn't UTF-8.
    NotUtf8 {
        /// The first byte that is no UTF-8.
        at_bytes: u64,
    },
    /// The JSON has a syntax error, or something else stands where the format wants a value.
    Json {
        /// The tensor whose entry was being read, if any.
        tensor: Option<String>,
        /// Where the parser stopped: the first or last byte of what is wrong, or the byte before it.
        at_bytes: u64,
        /// What was found and what was expected.
        message: String,
    },
    /// The dtype is none of the 22 that the format names.
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// The name found.
        dtype: String,
        /// The last byte of the name found.
        at_bytes: u64,
    },
    /// Two entries have the same name.
    DuplicateTensor {
        /// The name, unescaped.
        tensor: String,
        /// Start and end of one and the other.
        data_offsets: [(u64, u64); 2],
    },
    /// The data ends before it begins.
    ReversedOffsets {
        /// The tensor.
        tensor: String,
        /// Start and end as found.
        data_offsets: (u64, u64),
        /// Where the data begins in the file.
        data_start_bytes: u64,
    },
    /// Bytes before the tensor belong to no tensor.
    Gap {
        /// The tensor.
        tensor: String,
        /// Start and end as found.
        data_offsets: (u64, u64),
        /// Where the tensor before it ends, and this one should begin.
        expected_start_bytes: u64,
        /// Where the data begins in the file.
        data_start_bytes: u64,
    },
    /// The tensor begins inside the one before it.
    Overlap {
        /// The tensor.
        tensor: String,
        /// Start and end as found.
        data_offsets: (u64, u64),
        /// Where the tensor before it ends, and this one should begin.
        expected_start_bytes: u64,
        /// Where the data begins in the file.
        data_start_bytes: u64,
    },
    /// The shape needs more bits than a `u64` counts.
    ShapeOverflow {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its dims.
        shape: Vec<u64>,
    },
    /// The elements are narrower than a byte and don't fill whole bytes.
    PartialByte {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its dims.
        shape: Vec<u64>,
    },
    /// The data is longer or shorter than dtype and shape need.
    LenMismatch {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its dims.
        shape: Vec<u64>,
        /// What dtype and shape need.
        expected_len_bytes: u64,
        /// Start and end as found.
        data_offsets: (u64, u64),
        /// Where the data begins in the file.
        data_start_bytes: u64,
    },
    /// The file ends inside the data.
    DataTruncated {
        /// The first tensor that isn't whole.
        tensor: String,
        /// Its start and end.
        data_offsets: (u64, u64),
        /// Where the data begins in the file.
        data_start_bytes: u64,
        /// The file's length.
        file_len_bytes: u64,
    },
    /// The file goes on after the last tensor.
    TrailingBytes {
        /// Where the last tensor ends in the file.
        data_end_bytes: u64,
        /// The file's length.
        file_len_bytes: u64,
    },
    /// A tensor to be written is called `__metadata__`, which no reader would take for a tensor.
    ReservedName,
    /// The tensors to be written have more bytes than a `u64` counts.
    DataTooLong {
        /// The first tensor beyond.
        tensor: String,
    },
}

impl HeaderError {
    /// Returns the name of the tensor whose entry is at fault.
    pub fn tensor(&self) -> Option<&str> {
        match self {
            Self::Json { tensor, .. } => tensor.as_deref(),
            Self::UnknownDtype { tensor, .. }
            | Self::DuplicateTensor { tensor, .. }
            | Self::ReversedOffsets { tensor, .. }
            | Self::Gap { tensor, .. }
            | Self::Overlap { tensor, .. }
            | Self::ShapeOverflow { tensor, .. }
            | Self::PartialByte { tensor, .. }
            | Self::LenMismatch { tensor, .. }
            | Self::DataTruncated { tensor, .. }
            | Self::DataTooLong { tensor } => Some(tensor),
            Self::ReservedName => Some("__metadata__"),
            Self::FileTooShort { .. }
            | Self::TooLong { .. }
            | Self::Truncated { .. }
            | Self::NotUtf8 { .. }
            | Self::TrailingBytes { .. } => None,
        }
    }

    /// Returns the bytes of the file that are at fault, start and end; they may lie beyond the file.
    pub fn bytes(&self) -> Option<(u64, u64)> {
        match *self {
            Self::FileTooShort { file_len_bytes } => Some((0, file_len_bytes)),
            Self::TooLong { .. } => Some((0, LEN_PREFIX_BYTES)),
            Self::Truncated { header_len_bytes, .. } => {
                Some((LEN_PREFIX_BYTES, LEN_PREFIX_BYTES.saturating_add(header_len_bytes)))
            }
            Self::NotUtf8 { at_bytes }
            | Self::Json { at_bytes, .. }
            | Self::UnknownDtype { at_bytes, .. } => Some((at_bytes, at_bytes + 1)),
            Self::ReversedOffsets { data_offsets, data_start_bytes, .. }
            | Self::Gap { data_offsets, data_start_bytes, .. }
            | Self::Overlap { data_offsets, data_start_bytes, .. }
            | Self::LenMismatch { data_offsets, data_start_bytes, .. }
            | Self::DataTruncated { data_offsets, data_start_bytes, .. } => Some((
                data_start_bytes.saturating_add(data_offsets.0),
                data_start_bytes.saturating_add(data_offsets.1),
            )),
            Self::TrailingBytes { data_end_bytes, file_len_bytes } => Some((data_end_bytes, file_len_bytes)),
            Self::DuplicateTensor { .. }
            | Self::ShapeOverflow { .. }
            | Self::PartialByte { .. }
            | Self::ReservedName
            | Self::DataTooLong { .. } => None,
        }
    }
}

impl fmt::Display for HeaderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(tensor) = self.tensor() {
            write!(f, "tensor {}: ", Quoted(tensor))?;
        }
        match self {
            Self::FileTooShort { file_len_bytes } => {
                write!(f, "the file has {file_len_bytes} bytes, a safetensors file has at least 8")
            }
            Self::TooLong { header_len_bytes } => write!(
                f,
                "the first 8 bytes announce a header of {header_len_bytes} bytes, \
                 the maximum is {HEADER_LEN_BYTES_MAX}; is this a safetensors file?"
            ),
            Self::Truncated { header_len_bytes, file_len_bytes } => write!(
                f,
                "the header ends at byte {} of the file, which has {file_len_bytes}",
                LEN_PREFIX_BYTES.saturating_add(*header_len_bytes)
            ),
            Self::NotUtf8 { at_bytes } => write!(f, "the header isn't UTF-8 at byte {at_bytes} of the file"),
            Self::Json { message, at_bytes, .. } => write!(f, "{message}, at byte {at_bytes} of the file"),
            Self::UnknownDtype { dtype, .. } => {
                write!(f, "dtype {} isn't one of the format's 22", Quoted(dtype))
            }
            Self::DuplicateTensor { data_offsets: [(start, end), (other_start, other_end)], .. } => {
                write!(f, "listed twice, with data_offsets [{start}, {end}] and [{other_start}, {other_end}]")
            }
            Self::ReversedOffsets { data_offsets: (start, end), .. } => {
                write!(f, "data_offsets [{start}, {end}] end before they begin")
            }
            Self::Gap { data_offsets: (start, _), expected_start_bytes, .. } => write!(
                f,
                "data_offsets begin at {start}, the data before ends at {expected_start_bytes}: \
                 what lies between belongs to no tensor"
            ),
            Self::Overlap { data_offsets: (start, _), expected_start_bytes, .. } => write!(
                f,
                "data_offsets begin at {start}, inside the tensor before, which ends at {expected_start_bytes}"
            ),
            Self::ShapeOverflow { dtype, shape, .. } => {
                write!(f, "{dtype} {} needs more bits than a 64-bit number counts", Shape(shape))
            }
            Self::PartialByte { dtype, shape, .. } => {
                // Its bits fit, or it would be a `ShapeOverflow`.
                let bits = numel(shape).unwrap_or(u64::MAX).saturating_mul(dtype.bits());
                write!(f, "{dtype} {} needs {bits} bits, which are no whole bytes", Shape(shape))
            }
            Self::LenMismatch { dtype, shape, expected_len_bytes, data_offsets: (start, end), .. } => write!(
                f,
                "data_offsets span {} bytes, {dtype} {} needs {expected_len_bytes}",
                end - start,
                Shape(shape)
            ),
            Self::DataTruncated { data_offsets: (_, end), data_start_bytes, file_len_bytes, .. } => write!(
                f,
                "its data ends at byte {} of the file, which has {file_len_bytes}",
                u128::from(*data_start_bytes) + u128::from(*end)
            ),
            Self::TrailingBytes { data_end_bytes, file_len_bytes } => {
                write!(f, "the data ends at byte {data_end_bytes} of the file, which has {file_len_bytes}")
            }
            Self::ReservedName => f.write_str("this name is reserved by the format; choose another"),
            Self::DataTooLong { .. } => f.write_str("the data ends beyond what a 64-bit number counts"),
        }
    }
}

impl std::error::Error for HeaderError {}

/// A shape as `[4, 8]`, shortened after [`SHOWN_NDIM_MAX`] dims.
struct Shape<'a>(&'a [u64]);

impl fmt::Display for Shape<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (axis, dim) in self.0.iter().take(SHOWN_NDIM_MAX).enumerate() {
            write!(f, "{}{dim}", if axis == 0 { "" } else { ", " })?;
        }
        if self.0.len() > SHOWN_NDIM_MAX {
            write!(f, ", ... {} dims", self.0.len())?;
        }
        f.write_str("]")
    }
}

const SHOWN_NDIM_MAX: usize = 16;
