//! A result whose tensors are put together from parts of stored ones.

use serde::Serialize;

use crate::checkpoint::TensorId;
use crate::placement::DeviceId;
use crate::slice::Slice;

/// Tensors of the result, each put together from parts of others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Assembly {
    /// The tensors; their names are distinct.
    pub tensors: Vec<Assembled>,
}

/// A tensor of the result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Assembled {
    /// Its name in the result.
    pub name: String,
    /// Its shape in elements, outermost first.
    pub shape: Vec<u64>,
    /// The memory it is handed over in.
    pub device: DeviceId,
    /// What it is made of: disjoint parts that cover the shape. One at least, which says the dtype: an empty one where the shape has no
    /// elements.
    pub parts: Vec<Part>,
}

/// A part of a stored or dequantized tensor, and where it lies in the result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// What it is cut from.
    pub source: Source,
    /// Which part of the source; of the *result* where a quantized tensor is made into numbers. Keeps its dimensions.
    pub slice: Slice,
    /// Index of its first element in the assembled tensor, one number a dimension of that tensor. Where that has one dimension more than
    /// the source, the first number is the place in the stack.
    pub at: Vec<u64>,
}

/// What a part is cut from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Source {
    /// A tensor as it is stored.
    Stored(TensorId),
    /// A quantized tensor made into numbers, by its place in [`Quantization::groups`](crate::quant::Quantization::groups).
    Made(u32),
}
