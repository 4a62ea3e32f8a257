//! What a conversion did.

use std::fmt;

use serde::Serialize;
use tensorhaul_plan::{Dtype, Unfused};

/// What a conversion did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ConvertReport {
    /// The names of the files that hold tensors, in order.
    pub files: Vec<String>,
    /// The name of the index, where there is more than one of them.
    pub index: Option<String>,
    /// The names of the files copied beside them: configuration, tokenizer.
    pub sidecars: Vec<String>,
    /// Number of tensors.
    pub tensors: u64,
    /// Bytes of the tensors as they were.
    pub bytes_before: u64,
    /// Bytes of the tensors as written.
    pub bytes: u64,
    /// Number of tensors that were cast.
    pub tensors_cast: u64,
    /// Number of tensors that were dequantized.
    pub tensors_dequantized: u64,
    /// Floating-point tensors that were not cast, and why.
    pub kept: Vec<Kept>,
    /// Tensors in which the cast made finite numbers infinite.
    pub overflowed: Vec<Overflowed>,
    /// What was not copied, and why: files, and keys of `__metadata__`.
    pub left_out: Vec<LeftOut>,
    /// What was to be fused and is not.
    pub unfused: Vec<Unfused>,
    /// Patterns of the caller's own rules that no tensor of the model has.
    pub unused_rules: Vec<String>,
    /// From the call until the files had their names.
    pub seconds: f64,
    /// `bytes` by `seconds`, in 1e9 bytes a second.
    pub gb_per_s: f64,
}

/// A floating-point tensor that was not cast.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// Its name.
    pub tensor: String,
    /// Its element type, before and after.
    pub dtype: Dtype,
    /// Why.
    pub why: String,
}

/// A tensor in which the cast made finite numbers infinite.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Overflowed {
    /// Its name.
    pub tensor: String,
    /// How many.
    pub elements: u64,
}

/// Something of the source that the copy has not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// The file's name, or `__metadata__` and the key.
    pub what: String,
    /// Why.
    pub why: String,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} stays {}: {}", self.tensor, self.dtype, self.why)
    }
}
