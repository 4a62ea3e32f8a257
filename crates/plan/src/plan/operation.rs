//! Operations: what is made of bytes that have arrived.

use std::sync::Arc;

use serde::Serialize;

use crate::checkpoint::TensorId;
use crate::placement::Place;
use crate::quant::{Family, Recipe, Role};

/// Dequantization of one tensor, or of a part of one, when its sources have arrived.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Operation {
    /// The name of the quantized tensor.
    pub name: String,
    /// What people call the format.
    pub family: Family,
    /// The shape of what it makes.
    pub shape: Vec<u64>,
    /// Whether the result is `[.., K, N]` instead of `[.., N, K]`.
    pub is_transposed: bool,
    /// How bytes become numbers.
    pub recipe: Arc<Recipe>,
    /// Where they are.
    pub sources: Vec<Source>,
    /// The tensor it makes, or makes a part of, by its place in [`Plan::tensors`](crate::Plan::tensors), which says of which dtype.
    pub tensor: u32,
    /// Where the first byte it makes lands; the others follow without gaps.
    pub place: Place,
    /// Bytes it makes; 0 where there is nothing to do.
    pub len_bytes: u64,
    /// How many reads bring its sources; it can begin when all of them are done.
    pub read_count: u32,
}

/// A stored tensor that an operation reads, in scratch memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Source {
    /// What it is to the operation.
    pub role: Role,
    /// Which tensor.
    pub id: TensorId,
    /// Where its first byte lies when all reads are done.
    pub place: Place,
    /// Its bytes.
    pub len_bytes: u64,
}
