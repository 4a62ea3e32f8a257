//! The writing side.

use std::collections::{BTreeMap, HashMap};

use super::parse::len_bytes;
use super::{HEADER_LEN_BYTES_MAX, HeaderError, LEN_PREFIX_BYTES};
use crate::dtype::Dtype;

/// A tensor to be written.
#[derive(Clone, Copy, Debug)]
pub struct NewTensor<'a> {
    /// The name; any string but `__metadata__`, once per file.
    pub name: &'a str,
    /// The element type.
    pub dtype: Dtype,
    /// The dims in elements, outermost first; empty for a scalar.
    pub shape: &'a [u64],
}

/// Returns the length prefix and the JSON of a file that holds these tensors back to back in this order.
///
/// The JSON is padded with spaces so that the data starts at a multiple of `data_align_bytes`: 4096 lets
/// direct reads begin with the first tensor, 0 and 1 pad nothing. Within the data nothing is padded, because
/// the format allows no holes; writers list wide dtypes first to keep each tensor aligned for its own.
///
/// # Errors
/// [`HeaderError::ReservedName`], [`HeaderError::DuplicateTensor`], [`HeaderError::ShapeOverflow`],
/// [`HeaderError::PartialByte`] and [`HeaderError::DataTooLong`] name the first tensor that no reader would
/// accept; [`HeaderError::TooLong`] when the padded JSON exceeds [`HEADER_LEN_BYTES_MAX`].
pub fn encode(
    tensors: &[NewTensor<'_>],
    metadata: &BTreeMap<String, String>,
    data_align_bytes: u64,
) -> Result<Vec<u8>, HeaderError> {
    let mut out = vec![0; LEN_PREFIX_BYTES as usize];
    let mut separator = b'{';
    let mut push_key = |out: &mut Vec<u8>, key: &str| {
        out.push(separator);
        separator = b',';
        push_json(out, key);
        out.push(b':');
    };
    if !metadata.is_empty() {
        push_key(&mut out, "__metadata__");
        push_json(&mut out, metadata);
    }
    let mut written = HashMap::with_capacity(tensors.len());
    let mut start_bytes = 0u64;
    for &NewTensor { name, dtype, shape } in tensors {
        if name == "__metadata__" {
            return Err(HeaderError::ReservedName);
        }
        let end_bytes = start_bytes
            .checked_add(len_bytes(name, dtype, shape)?)
            .ok_or_else(|| HeaderError::DataTooLong { tensor: name.to_owned() })?;
        let data_offsets = (start_bytes, end_bytes);
        if let Some(other) = written.insert(name, data_offsets) {
            let tensor = name.to_owned();
            return Err(HeaderError::DuplicateTensor { tensor, data_offsets: [other, data_offsets] });
        }
        push_key(&mut out, name);
        out.extend_from_slice(b"{\"dtype\":\"");
        out.extend_from_slice(dtype.name().as_bytes());
        out.extend_from_slice(b"\",\"shape\":");
        push_json(&mut out, shape);
        out.extend_from_slice(b",\"data_offsets\":");
        push_json(&mut out, &data_offsets);
        out.push(b'}');
        start_bytes = end_bytes;
    }
    if out.len() == LEN_PREFIX_BYTES as usize {
        out.push(b'{');
    }
    out.push(b'}');
    pad(&mut out, data_align_bytes)?;
    Ok(out)
}

/// Appends spaces up to the alignment, then fills in the prefix.
fn pad(out: &mut Vec<u8>, data_align_bytes: u64) -> Result<(), HeaderError> {
    let data_start_bytes =
        (out.len() as u64).checked_next_multiple_of(data_align_bytes.max(1)).unwrap_or(u64::MAX);
    let header_len_bytes = data_start_bytes - LEN_PREFIX_BYTES;
    if header_len_bytes > HEADER_LEN_BYTES_MAX {
        return Err(HeaderError::TooLong { header_len_bytes });
    }
    // Below `HEADER_LEN_BYTES_MAX + 8`, which fits every `usize` the standard library runs on.
    out.resize(data_start_bytes as usize, b' ');
    out[..LEN_PREFIX_BYTES as usize].copy_from_slice(&header_len_bytes.to_le_bytes());
    Ok(())
}

fn push_json<T: serde::Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(out, value)
        .expect("strings and numbers always serialize, and a Vec takes every write");
}
