//! Which tensors are worth a look, by name and dtype alone: one pass over all, no look-ups.

use super::QuantError;
use super::families::bitsandbytes::STATE;
use super::families::torchao::Entry;
use super::families::{
    bitsandbytes, bytes, comfy, compressed_tensors, fp8, hqq, mlx, mx, plain, quark, qweight, torchao,
};
use super::quantization::pass;
use super::scene::{Scene, module, split, unsupported};
use super::{Group, config::Method};
use crate::checkpoint::TensorRef;
use crate::dtype::Dtype;

/// What a tensor's name and dtype say it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Signature {
    /// `qweight`: GPTQ or AWQ.
    Qweight,
    /// `weight_packed`: compressed-tensors.
    WeightPacked,
    /// `blocks`: gpt-oss.
    Blocks,
    /// The description of a 4-bit weight of bitsandbytes.
    BnbState,
    /// `W_q`: HQQ.
    Hqq,
    /// A float of 8 bits, of any name.
    Float8,
    /// `weight` of bytes, or of floats below 8 bits.
    Bytes,
    /// `weight` of 32-bit words: MLX or Quark.
    Words,
    /// A float below 8 bits, of another name.
    SubByte,
    /// An entry of torchao's metadata, by its place.
    Torchao(u32),
    /// A ComfyUI layer's description, which is no payload.
    ComfyLayer,
    /// Experts in one tensor of bytes, which ModelOpt writes for some models.
    FusedExperts,
    /// A tensor that only a format that cannot be dequantized has, by its place in [`FOREIGN`].
    Foreign(u8),
}

/// Returns what a tensor may be.
pub(super) fn signature(name: &str, dtype: Dtype) -> Option<Signature> {
    let (_, leaf) = split(name);
    let is_weight = leaf == "weight";
    match dtype {
        Dtype::F8E4m3 | Dtype::F8E5m2 | Dtype::F8E4m3Fnuz | Dtype::F8E5m2Fnuz | Dtype::F8E8m0 => {
            return (!is_scale(leaf) && pass(leaf).is_none()).then_some(Signature::Float8);
        }
        Dtype::F4 | Dtype::F6E2m3 | Dtype::F6E3m2 => {
            return match leaf {
                "weight" => Some(Signature::Bytes),
                "weight_packed" => Some(Signature::WeightPacked),
                _ => Some(Signature::SubByte),
            };
        }
        Dtype::U8 | Dtype::I8 if is_weight => return Some(Signature::Bytes),
        Dtype::U32 | Dtype::I32 if is_weight => return Some(Signature::Words),
        Dtype::U8 if leaf.ends_with("blocks") && (leaf == "blocks" || leaf.ends_with("_blocks")) => {
            return Some(Signature::Blocks);
        }
        Dtype::U8 if matches!(leaf, "gate_up_proj" | "down_proj") => return Some(Signature::FusedExperts),
        Dtype::U8 if leaf == "comfy_quant" => return Some(Signature::ComfyLayer),
        Dtype::U8 if leaf.starts_with("bitsandbytes__") && name.contains(STATE) => {
            return Some(Signature::BnbState);
        }
        _ => {}
    }
    match leaf {
        "qweight" => Some(Signature::Qweight),
        "weight_packed" => Some(Signature::WeightPacked),
        "W_q" => Some(Signature::Hqq),
        _ => FOREIGN
            .iter()
            .position(|(foreign, ..)| *foreign == leaf)
            .map(|place| Signature::Foreign(place as u8)),
    }
}

/// Tells names that scales have: those are never weights, whatever their dtype.
fn is_scale(leaf: &str) -> bool {
    ["scale", "scales", "scale_inv", "scale_2"].iter().any(|end| {
        leaf.strip_suffix(end).is_some_and(|start| start.is_empty() || start.ends_with(['_', '.']))
    })
}

/// Joins the tensors of a candidate; `None` where it is no quantized tensor after all.
pub(super) fn recognize(
    scene: &Scene<'_>,
    signature: Signature,
    anchor: &TensorRef<'_>,
    entries: &[Entry],
) -> Result<Option<Group>, QuantError> {
    let name = anchor.info.name;
    let (base, leaf) = split(name);
    if leaf == "weight"
        && let Some(format) = scene.comfy.format(module(base))
    {
        return comfy::recognize(scene, anchor, format?).map(Some);
    }
    match signature {
        Signature::Qweight => {
            scene.config.check_excluded(module(base), name)?;
            qweight::recognize(scene, anchor).map(Some)
        }
        Signature::WeightPacked => {
            scene.config.check_excluded(module(base), name)?;
            compressed_tensors::recognize(scene, anchor).map(Some)
        }
        Signature::Blocks => blocks(scene, anchor),
        Signature::BnbState => bitsandbytes::four_bits(scene, anchor).map(Some),
        Signature::Hqq => hqq::recognize(scene, anchor).map(Some),
        Signature::Float8 => fp8::recognize(scene, anchor).map(Some),
        Signature::Bytes => bytes::recognize(scene, anchor),
        Signature::Words => words(scene, anchor),
        Signature::SubByte => plain::recognize(anchor).map(Some),
        Signature::Torchao(place) => torchao::recognize(scene, &entries[place as usize], anchor).map(Some),
        Signature::ComfyLayer => Ok(None),
        Signature::FusedExperts => match scene.find(name, "_weight_scale") {
            Some(_) => Err(unsupported("ModelOpt", anchor, "experts fused in one tensor of packed codes")),
            None => Ok(None),
        },
        Signature::Foreign(place) => {
            let (_, beside, family) = FOREIGN[usize::from(place)];
            match scene.find(base, beside) {
                Some(_) => Err(unsupported(family, anchor, "its layout")),
                None => Ok(None),
            }
        }
    }
}

/// gpt-oss' blocks have scales beside them; other tensors may be called blocks too.
fn blocks(scene: &Scene<'_>, anchor: &TensorRef<'_>) -> Result<Option<Group>, QuantError> {
    let name = anchor.info.name;
    let is_marked = matches!(scene.config.method, Method::Mxfp4) || anchor.info.shape.last() == Some(&16);
    if !is_marked || anchor.info.shape.len() < 3 {
        return Ok(None);
    }
    let stem = name.strip_suffix("_blocks").or_else(|| name.strip_suffix(".blocks")).unwrap_or(name);
    scene.config.check_excluded(stem, name)?;
    mx::gpt_oss(scene, anchor).map(Some)
}

fn words(scene: &Scene<'_>, anchor: &TensorRef<'_>) -> Result<Option<Group>, QuantError> {
    let (base, _) = split(anchor.info.name);
    if let Some(scales) = scene.find(base, "scales") {
        return mlx::recognize(scene, anchor, &scales).map(Some);
    }
    if let Some(scale) = scene.find(base, "weight_scale") {
        return quark::integers(scene, anchor, &scale).map(Some);
    }
    match &scene.config.method {
        Method::Mlx(_) if !scene.config.is_excluded(module(base)) => {
            scene.need(anchor, base, "scales", "scales").map(|_| None)
        }
        Method::Quark(config)
            if !scene.config.is_excluded(module(base)) && config.weight(module(base)).is_some() =>
        {
            scene.need(anchor, base, "weight_scale", "scale").map(|_| None)
        }
        _ => Ok(None),
    }
}

/// Names that only formats have that cannot be dequantized: of a tensor, of one beside it, of the format.
const FOREIGN: &[(&str, &str, &str)] = &[
    ("trellis", "suh", "EXL3"),
    ("codebooks", "codes", "AQLM"),
    ("Qidxs", "SU", "QuIP#"),
    ("q_weight", "q_scale", "EXL2"),
    ("B", "s", "Marlin"),
    ("B_24", "s", "Marlin 2:4"),
    ("compressed", "bitmask", "sparse compressed-tensors"),
    ("_data", "_scale", "quanto"),
    ("svdquant_lora_a", "svdquant_lora_b", "SVDQuant"),
    ("dense_weights", "row_offsets", "SpQR"),
    ("qweight_type", "qweight", "GGUF"),
];
