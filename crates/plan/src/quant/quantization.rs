//! What recognition found.

use std::sync::Arc;

use super::{Group, QuantError};
use crate::checkpoint::TensorId;

/// The quantized tensors of a checkpoint, and those that cannot be dequantized.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Quantization {
    pub(super) groups: Arc<[Group]>,
    pub(super) refused: Vec<Refusal>,
    pub(super) warnings: Vec<String>,
    /// One for each tensor; empty where all are plain.
    pub(super) parts: Vec<Part>,
}

/// Why a tensor cannot be dequantized. Loading it as stored works all the same.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// The stored tensor that would be the payload; `None` where the whole checkpoint is refused, or the payload is missing.
    pub tensor: Option<TensorId>,
    /// The reason.
    pub error: QuantError,
}

/// What a stored tensor is to a quantized checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Part {
    /// A tensor like any other.
    #[default]
    Plain,
    /// Belongs to a group, by its place in [`Quantization::groups`].
    Member(u32),
    /// Belongs to quantization, but not to any weight: it is handed over as it is, and never multiplied in.
    PassedThrough(Pass),
}

/// Why a tensor is passed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pass {
    /// A scale or zero-point of activations.
    Activation,
    /// A scale of keys or values.
    KvCache,
    /// Says that a file or a layer is quantized.
    Marker,
}

impl Quantization {
    /// Returns the quantized tensors, in the order of their payloads' ids.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Returns the same, to be kept.
    pub fn shared_groups(&self) -> Arc<[Group]> {
        Arc::clone(&self.groups)
    }

    /// Returns what cannot be dequantized, in the order of the tensors' ids; what concerns the whole checkpoint comes first.
    pub fn refused(&self) -> &[Refusal] {
        &self.refused
    }

    /// Returns what is odd about the checkpoint, but decided.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns what a stored tensor is.
    pub fn role_of(&self, tensor: TensorId) -> Part {
        self.parts.get(tensor.0 as usize).copied().unwrap_or_default()
    }

    /// Returns the group that a stored tensor belongs to.
    pub fn group_of(&self, tensor: TensorId) -> Option<&Group> {
        match self.role_of(tensor) {
            Part::Member(group) => Some(&self.groups[group as usize]),
            Part::Plain | Part::PassedThrough(_) => None,
        }
    }

    /// Returns why this tensor, or the checkpoint as a whole, cannot be dequantized.
    pub fn refusal_of(&self, tensor: TensorId) -> Option<&QuantError> {
        let own = self.refused.binary_search_by_key(&Some(tensor), |refusal| refusal.tensor);
        own.ok().map(|place| &self.refused[place].error)
    }

    /// Tells whether nothing is quantized, as far as this crate can tell.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.refused.is_empty()
    }
}

/// Returns why a tensor of this name is passed through.
pub(super) fn pass(leaf: &str) -> Option<Pass> {
    Some(match leaf {
        "input_scale" | "input_scale_2" | "input_global_scale" | "input_zero_point" | "input_scale_inv"
        | "activation_scale" | "qscale_act" | "scale_input" | "output_scale" | "output_zero_point"
        | "act_scale" | "input_amax" => Pass::Activation,
        "k_scale" | "v_scale" | "q_scale" | "kv_scale" | "prob_scale" | "k_zero_point" | "v_zero_point"
        | "k_bmm_quantizer" | "v_bmm_quantizer" => Pass::KvCache,
        "scaled_fp8" | "comfy_quant" => Pass::Marker,
        _ => return None,
    })
}
