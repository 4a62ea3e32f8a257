//! The bytes of small tensors that recognition asks for.

use std::collections::HashMap;

use crate::checkpoint::TensorId;

/// The first bytes of a tensor, which recognition wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Need {
    /// The tensor.
    pub tensor: TensorId,
    /// How many bytes from its first one: never more than the tensor has, nor than [`NEED_LEN_BYTES_MAX`], or of a group index
    /// [`INDEX_LEN_BYTES_MAX`].
    pub len_bytes: u64,
}

/// The most bytes that are asked for of one tensor: a description in JSON takes a few hundred, samples this much.
pub const NEED_LEN_BYTES_MAX: u64 = 4096;

/// The most bytes that are asked for of a group index, 4 a column: more columns than any layer has, of one index for each rule of a
/// configuration.
pub const INDEX_LEN_BYTES_MAX: u64 = 256 << 10;

/// What was read for [`Need`]s.
#[derive(Clone, Debug, Default)]
pub struct Values {
    bytes: HashMap<TensorId, Vec<u8>>,
}

impl Values {
    /// Returns no bytes, for a survey that needs none.
    pub fn none() -> Values {
        Values::default()
    }

    /// Adds the first bytes of a tensor, as many as its need says.
    pub fn insert(&mut self, tensor: TensorId, bytes: impl Into<Vec<u8>>) {
        self.bytes.insert(tensor, bytes.into());
    }

    /// Returns the bytes of a tensor.
    pub(crate) fn get(&self, tensor: TensorId) -> Option<&[u8]> {
        self.bytes.get(&tensor).map(|bytes| &**bytes)
    }
}
