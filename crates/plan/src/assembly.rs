//! A result whose tensors are put together from parts of stored ones.

use std::fmt;

use serde::Serialize;
use smallvec::SmallVec;

use crate::checkpoint::TensorId;
use crate::dims::Dims;
use crate::placement::DeviceId;
use crate::slice::Slice;

/// Tensors of the result, each put together from parts of others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Assembly {
    /// The tensors; their names are distinct.
    pub tensors: Vec<Assembled>,
    /// Rows that tensors have behind their end where they are used, ascending by tensor. They are in no file, and no load writes them.
    pub padding: Vec<Padding>,
    /// What was to be fused and is not, which plans and reports tell.
    pub unfused: Vec<Unfused>,
    /// Patterns of the caller's own rules that no tensor of the model has, which plans and reports tell.
    pub unused_rules: Vec<String>,
}

/// Rows that a rank has past the end of a vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Padding {
    /// Which tensor, by its place in the assembly.
    pub tensor: u32,
    /// Rows behind those of the tensor.
    pub rows: u64,
}

/// A kind of fused tensor that some modules of the model cannot have, for one kind of reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unfused {
    /// What it is asked for by, such as `qkv`.
    pub fusion: String,
    /// The first tensor that would have been fused.
    pub target: String,
    /// How many modules keep their members apart.
    pub modules: u64,
    /// Why the first does.
    pub why: String,
}

impl fmt::Display for Unfused {
    /// Prints `qkv of 27 modules, such as "model.layers.0.self_attn.qkv_proj.weight": why`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Unfused { fusion, target, modules, why } = self;
        let (of, first) = if *modules == 1 { ("module", "") } else { ("modules", "such as ") };
        write!(f, "{fusion} of {modules} {of}, {first}{target:?}: {why}")
    }
}

/// A tensor of the result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Assembled {
    /// Its name in the result.
    pub name: String,
    /// Its shape in elements, outermost first.
    pub shape: Dims,
    /// The memory it is handed over in.
    pub device: DeviceId,
    /// What it is made of: disjoint parts that cover the shape. One at least, which says the dtype: an empty one where the shape has no
    /// elements.
    pub parts: SmallVec<[Part; 1]>,
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
    pub at: Dims,
}

/// What a part is cut from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Source {
    /// A tensor as it is stored.
    Stored(TensorId),
    /// A quantized tensor made into numbers, by its place in [`Quantization::groups`](crate::quant::Quantization::groups).
    Made(u32),
}
