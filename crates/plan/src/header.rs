//! The header of one safetensors file: its tensors, checked against each other and the file.
//!
//! [`Header::parse`] accepts what `SafeTensors::read_metadata` of the `safetensors` crate 0.8.0 accepts on
//! a 64-bit machine, whatever the pointer width of this one. It needs the header's bytes and the file's
//! length, never the data.
//!
//! # What is accepted beyond the format's description
//! The reference reads these, so files in the wild may hold them:
//! - white space around the JSON (files are padded with spaces), and inside it;
//! - unknown fields in an entry, with any JSON value up to 128 levels deep;
//! - an entry as an array `["F32", [2], [0, 8]]`, and a dtype as a map `{"F32": null}`;
//! - entries in any order; the data must be covered without holes once they are sorted by offset;
//! - data that begins at any byte, so that a tensor may be misaligned for its dtype;
//! - `"__metadata__": null`, and keys that occur twice in `__metadata__`: the last one counts;
//! - any string as a tensor's name, the empty one included. `__metadata__` is never a tensor.
//!
//! # What differs from the reference
//! The differential test holds exactly this list:
//! - **A name twice.** Two entries whose names are equal after unescaping are an error; the reference keeps the
//!   last one. It would leave either a hole that the reference then refuses, or, for two empty or two
//!   identical entries, a file whose meaning depends on its reader.
//!
//! # Source
//! <https://github.com/huggingface/safetensors>, crate version 0.8.0, `tensor.rs`.

mod encode;
mod error;
pub(crate) mod json;
mod parse;

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

use crate::dtype::Dtype;

pub use encode::{NewTensor, encode};
pub use error::HeaderError;

/// Bytes before the JSON: its length, little-endian.
pub const LEN_PREFIX_BYTES: u64 = 8;

/// The longest JSON accepted, in bytes, the reference's own limit: about a million tensors.
///
/// A parsed header keeps at most four times its JSON's bytes (a dim, `0,`, becomes a `u64`), and as much
/// again while its arenas grow; about once for real checkpoints. `__metadata__` comes on top, with a string
/// for each key and value.
pub const HEADER_LEN_BYTES_MAX: u64 = 100_000_000;

/// Returns the length of the JSON from a file's first eight bytes, checked against
/// [`HEADER_LEN_BYTES_MAX`] and the file's length.
///
/// # Errors
/// [`HeaderError::FileTooShort`] when the file is shorter than the prefix, [`HeaderError::TooLong`]
/// beyond the maximum, [`HeaderError::Truncated`] when the JSON would end beyond the file.
pub fn header_len_bytes(prefix: [u8; 8], file_len_bytes: u64) -> Result<u64, HeaderError> {
    if file_len_bytes < LEN_PREFIX_BYTES {
        return Err(HeaderError::FileTooShort { file_len_bytes });
    }
    let header_len_bytes = u64::from_le_bytes(prefix);
    if header_len_bytes > HEADER_LEN_BYTES_MAX {
        return Err(HeaderError::TooLong { header_len_bytes });
    }
    if header_len_bytes > file_len_bytes - LEN_PREFIX_BYTES {
        return Err(HeaderError::Truncated { header_len_bytes, file_len_bytes });
    }
    Ok(header_len_bytes)
}

/// One file's tensors, in the order of their data, which they cover without holes.
///
/// Names and dims lie in one allocation each; a tensor costs 40 bytes beside them.
#[derive(Clone)]
pub struct Header {
    names: String,
    dims: Vec<u64>,
    entries: Vec<Entry>,
    /// Indices into `entries` by name. SipHash with random keys: names come from strangers.
    by_name: HashTable<u32>,
    hasher: RandomState,
    metadata: BTreeMap<String, String>,
    data_start_bytes: u64,
}

impl Header {
    /// Parses the JSON that follows the length prefix. `file_len_bytes` is the length of the whole file.
    ///
    /// # Errors
    /// The first of: [`HeaderError::TooLong`], [`HeaderError::Truncated`], [`HeaderError::NotUtf8`]; what
    /// is wrong with the JSON ([`HeaderError::Json`], [`HeaderError::UnknownDtype`]);
    /// [`HeaderError::DuplicateTensor`]; in order of the data, an entry that does not begin where the one
    /// before ends ([`HeaderError::Gap`], [`HeaderError::Overlap`], [`HeaderError::ReversedOffsets`]) or
    /// whose shape needs another number of bytes ([`HeaderError::ShapeOverflow`],
    /// [`HeaderError::PartialByte`], [`HeaderError::LenMismatch`]); and a file that is shorter or longer
    /// than described ([`HeaderError::DataTruncated`], [`HeaderError::TrailingBytes`]).
    ///
    /// # Example
    /// ```
    /// use tensorhaul_plan::{dtype::Dtype, header::Header};
    ///
    /// let json = br#"{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#;
    /// let header = Header::parse(json, 8 + json.len() as u64 + 16)?;
    /// let w = header.tensor(header.find("w").unwrap());
    /// assert_eq!((w.dtype, w.shape, w.data_offsets), (Dtype::F32, &[2, 2][..], (0, 16)));
    /// # Ok::<(), tensorhaul_plan::header::HeaderError>(())
    /// ```
    pub fn parse(json: &[u8], file_len_bytes: u64) -> Result<Header, HeaderError> {
        parse::parse(json, file_len_bytes)
    }

    /// Returns where the data begins in the file: after the prefix and the JSON.
    pub fn data_start_bytes(&self) -> u64 {
        self.data_start_bytes
    }

    /// Returns the length of the data, which ends with the file.
    pub fn data_len_bytes(&self) -> u64 {
        self.entries.last().map_or(0, |entry| entry.data_offsets.1)
    }

    /// Returns the free-form strings of `__metadata__`; empty when the header has none.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Returns the number of tensors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns whether the file holds no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the tensor at this index in the order of the data. Tensors at the same offset (all but the last
    /// are empty) keep the order in which the header lists them.
    ///
    /// # Panics
    /// When `index` isn't below [`Header::len`].
    pub fn tensor(&self, index: usize) -> TensorInfo<'_> {
        self.info(&self.entries[index])
    }

    /// Finds a tensor's index by its name.
    pub fn find(&self, name: &str) -> Option<usize> {
        let hash = self.hasher.hash_one(name);
        let index = self.by_name.find(hash, |&index| self.name(&self.entries[index as usize]) == name)?;
        Some(*index as usize)
    }

    /// Returns the tensors in the order of the data.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> {
        self.entries.iter().map(|entry| self.info(entry))
    }

    fn info(&self, entry: &Entry) -> TensorInfo<'_> {
        TensorInfo {
            name: self.name(entry),
            dtype: entry.dtype,
            shape: &self.dims[entry.dims_start as usize..][..entry.ndim as usize],
            data_offsets: entry.data_offsets,
        }
    }

    fn name(&self, entry: &Entry) -> &str {
        &self.names[entry.name_start as usize..][..entry.name_len_bytes as usize]
    }
}

impl fmt::Debug for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Header")
            .field("tensors", &self.len())
            .field("data_start_bytes", &self.data_start_bytes())
            .field("data_len_bytes", &self.data_len_bytes())
            .field("metadata", &self.metadata)
            .finish_non_exhaustive()
    }
}

/// One tensor of a [`Header`].
#[derive(Clone, Copy, Debug)]
pub struct TensorInfo<'h> {
    /// The name, unescaped; any string but `__metadata__`.
    pub name: &'h str,
    /// The element type.
    pub dtype: Dtype,
    /// The dims in elements, outermost first; empty for a scalar.
    pub shape: &'h [u64],
    /// First byte and end of the data, relative to [`Header::data_start_bytes`].
    pub data_offsets: (u64, u64),
}

impl TensorInfo<'_> {
    /// Returns the length of the data, which is what `dtype` and `shape` need.
    pub fn len_bytes(&self) -> u64 {
        self.data_offsets.1 - self.data_offsets.0
    }
}

/// A tensor's place in the arenas of its [`Header`]. Both arenas are shorter than `u32::MAX`, because
/// each name byte and each dim takes at least one byte of JSON.
#[derive(Clone, Copy)]
struct Entry {
    data_offsets: (u64, u64),
    name_start: u32,
    name_len_bytes: u32,
    dims_start: u32,
    ndim: u32,
    dtype: Dtype,
}

const _: () = assert!(HEADER_LEN_BYTES_MAX < u32::MAX as u64);
const _: () = assert!(size_of::<Entry>() == 40);
