//! Quantized checkpoints: which tensors belong together, and how their bytes become numbers.
//!
//! Recognition takes two steps, because some formats describe themselves in small tensors. A [`Survey`] of the headers and the
//! [`Configs`] says which bytes it [needs](Survey::needs); with these [`Values`] it [recognises](Survey::recognize) a
//! [`Quantization`]: a [`Group`] for each quantized tensor, and for each that cannot be dequantized the reason, as data. Loading a
//! checkpoint as stored needs none of this.
//!
//! What the configuration says comes first, and is held against names, dtypes and shapes; what tensors alone leave no doubt about
//! needs no configuration. A guess is never made: where two readings fit, a [`QuantError`] names the key that would decide.
//!
//! # Example
//! ```
//! use tensorhaul_plan::quant::{Configs, Family, Survey, Values};
//! use tensorhaul_plan::{Checkpoint, File, Header};
//!
//! let json = br#"{"a.weight":{"dtype":"F8_E4M3","shape":[2,4],"data_offsets":[0,8]},
//!     "a.weight_scale":{"dtype":"F32","shape":[2,1],"data_offsets":[8,16]}}"#;
//! let header = Header::parse(json, 8 + json.len() as u64 + 16)?;
//! let checkpoint = Checkpoint::new(vec![File::new("model.safetensors", header)])?;
//!
//! let survey = Survey::new(&checkpoint, &Configs::none())?;
//! assert!(survey.needs().is_empty());
//! let quantization = survey.recognize(&checkpoint, &Values::none());
//! assert_eq!(quantization.groups()[0].family, Family::Fp8);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod cut;
mod dispatch;
mod error;
mod families;
mod quantization;
mod recipe;
mod scene;
mod sizes;
mod survey;
mod values;

pub use config::Configs;
pub use cut::{CutError, CutGroup, CutMember, Window};
pub use error::QuantError;
pub use quantization::{Part, Pass, Quantization, Refusal};
pub use recipe::{Codes, Element, Global, Grid, Number, Recipe, Role, Scale, ZeroOffset, ZeroPoint};
pub use survey::Survey;
pub use values::{INDEX_LEN_BYTES_MAX, NEED_LEN_BYTES_MAX, Need, Values};

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::checkpoint::TensorId;

/// A quantized tensor: the stored tensors that make it up, and what they become.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// The name of the result, such as `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// The shape of the result.
    pub shape: Vec<u64>,
    /// What people call the format.
    pub family: Family,
    /// Bits of a code.
    pub bits: u8,
    /// Columns that share a scale; `None` where a scale is for a row, a block of rows and columns, or the whole tensor.
    pub group_size: Option<u32>,
    /// Whether plain checkpoints of the model have it as `[.., K, N]`, which its shape here is not.
    pub is_plain_transposed: bool,
    /// Whether zero-points are constant; `None` where the element is a float.
    pub is_symmetric: Option<bool>,
    /// The stored tensors, each once; exactly one is the payload.
    pub members: Vec<(Role, TensorId)>,
    /// How their bytes become numbers; one for all that are read the same way.
    pub recipe: Arc<Recipe>,
}

impl Group {
    /// Returns the tensor that holds the codes.
    pub fn payload(&self) -> TensorId {
        let payload = self.members.iter().find(|(role, _)| *role == Role::Payload);
        payload.expect("a group has one payload").1
    }

    /// Returns what a stored tensor is to the group.
    pub(crate) fn role_of(&self, id: TensorId) -> Option<Role> {
        self.members.iter().find(|(_, member)| *member == id).map(|(role, _)| *role)
    }

    /// Tells whether another's bytes become numbers the same way.
    pub(crate) fn has_recipe_of(&self, other: &Group) -> bool {
        Arc::ptr_eq(&self.recipe, &other.recipe) || self.recipe == other.recipe
    }
}

/// A family of formats, as people call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[non_exhaustive]
pub enum Family {
    /// GPTQ, any version.
    Gptq,
    /// AWQ, any version.
    Awq,
    /// FP8 with scales for tensors, channels or blocks.
    Fp8,
    /// compressed-tensors' integers.
    CompressedTensors,
    /// bitsandbytes' 4-bit and 8-bit formats.
    Bitsandbytes,
    /// OCP microscaling: MXFP4, MXFP6, MXFP8.
    Mx,
    /// NVFP4.
    Nvfp4,
    /// ModelOpt's integers.
    Modelopt,
    /// Quark's integers.
    Quark,
    /// torchao's integers.
    Torchao,
    /// HQQ.
    Hqq,
    /// MLX.
    Mlx,
    /// ComfyUI's integers.
    Comfy,
    /// A tensor of a dtype below 16 bits, without scales: a cast.
    Plain,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Gptq => "GPTQ",
            Family::Awq => "AWQ",
            Family::Fp8 => "FP8",
            Family::CompressedTensors => "compressed-tensors",
            Family::Bitsandbytes => "bitsandbytes",
            Family::Mx => "MX",
            Family::Nvfp4 => "NVFP4",
            Family::Modelopt => "ModelOpt",
            Family::Quark => "Quark",
            Family::Torchao => "torchao",
            Family::Hqq => "HQQ",
            Family::Mlx => "MLX",
            Family::Comfy => "ComfyUI",
            Family::Plain => "cast",
        })
    }
}
