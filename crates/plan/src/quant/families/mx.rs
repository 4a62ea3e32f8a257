//! OCP microscaling: blocks of 32 columns that share a power of two; packed 4-bit and 6-bit floats.

use super::{blocks, fold, swizzled};
use crate::checkpoint::TensorRef;
use crate::dtype::Dtype;
use crate::quant::scene::{Matrices, Scene, check_dtype, members, split, wrong_shape};
use crate::quant::{Codes, Element, Family, Group, Number, QuantError, Recipe, Role, Scale};

/// The columns that share a scale.
pub(super) const BLOCK: u64 = 32;

/// How the payload of an MX tensor is packed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packing {
    pub(super) element: Element,
    pub(super) bits: u8,
}

impl Packing {
    pub(super) const FP4: Packing = Packing { element: Element::E2m1, bits: 4 };
    pub(super) const FP6_E2M3: Packing = Packing { element: Element::E2m3, bits: 6 };
    pub(super) const FP6_E3M2: Packing = Packing { element: Element::E3m2, bits: 6 };

    /// Returns the columns that so many bytes of a row hold.
    pub(super) fn cols(self, bytes: u64) -> Option<u64> {
        let bits = bytes * 8;
        bits.is_multiple_of(u64::from(self.bits)).then_some(bits / u64::from(self.bits))
    }
}

/// Joins a payload of bytes `[.., N, K * bits / 8]` with its scales `[.., N, K / 32]`.
pub(super) fn join(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    packing: Packing,
    name: String,
) -> Result<Group, QuantError> {
    join_laid_out(scene, payload, scale, packing, false, name)
}

/// As [`join`]; with `is_swizzled` scales lie in tiles of 128 by 4.
pub(super) fn join_laid_out(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    packing: Packing,
    is_swizzled: bool,
    name: String,
) -> Result<Group, QuantError> {
    check_dtype(scale, &[Dtype::U8, Dtype::F8E8m0])?;
    let [ref leading @ .., rows, last] = *payload.info.shape else {
        return Err(wrong_shape(payload, "two dims or more"));
    };
    let batch = leading.iter().product();
    // Dtypes of 4 and 6 bits count codes, not bytes.
    let bytes = last * payload.info.dtype.bits() / 8;
    let cols = packing
        .cols(bytes)
        .ok_or_else(|| wrong_shape(payload, format!("rows of whole {}-bit codes", packing.bits)))?;
    let size = Matrices { batch, rows, cols };
    let grid = match is_swizzled {
        true => swizzled(scale, size, [1, BLOCK], Number::E8m0)?,
        false => blocks(scale, leading, size, [1, BLOCK], Number::E8m0)?,
    };
    let (fold, fold_id) = fold(scene, split(payload.info.name).0, cols)?;
    let mut shape = leading.to_vec();
    shape.extend([rows, cols]);
    Ok(Group {
        name,
        shape,
        family: Family::Mx,
        bits: packing.bits,
        group_size: Some(BLOCK as u32),
        is_plain_transposed: false,
        is_symmetric: None,
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(scale.id)),
            (Role::Fold, fold_id),
        ]),
        recipe: Recipe {
            batch,
            scale: Some(Scale { grid, global: None }),
            fold,
            ..Recipe::of(
                rows,
                cols,
                Codes::Rows { bits: packing.bits, row_stride_bytes: bytes },
                packing.element,
            )
        }
        .into(),
    })
}

/// Joins gpt-oss' experts: `X_blocks` `[E, N, K / 32, 16]` and `X_scales` `[E, N, K / 32]`, or `X.blocks` and `X.scales`.
///
/// Plain checkpoints in transformers' names have `X` as `[E, K, N]`, those in OpenAI's as `[E, N, K]`.
///
/// # Source
/// openai/gpt-oss, commit 7b583341, `gpt_oss/torch/weights.py`; transformers, `integrations/mxfp4.py`.
pub(in crate::quant) fn gpt_oss(scene: &Scene<'_>, payload: &TensorRef<'_>) -> Result<Group, QuantError> {
    let name = payload.info.name;
    let is_transformers = name.ends_with("_blocks");
    let (stem, scales) = match (name.strip_suffix("_blocks"), name.strip_suffix(".blocks")) {
        (Some(stem), _) => (stem, "_scales"),
        (None, stem) => (stem.unwrap_or(name), ".scales"),
    };
    check_dtype(payload, &[Dtype::U8])?;
    let scale = scene.need(payload, stem, scales, "scales")?;
    check_dtype(&scale, &[Dtype::U8, Dtype::F8E8m0])?;
    let [ref leading @ .., rows, groups, 16] = *payload.info.shape else {
        return Err(wrong_shape(payload, "[experts, rows, blocks, 16]"));
    };
    let size = Matrices { batch: leading.iter().product(), rows, cols: groups * BLOCK };
    let grid = blocks(&scale, leading, size, [1, BLOCK], Number::E8m0)?;
    let mut shape = leading.to_vec();
    shape.extend([rows, size.cols]);
    Ok(Group {
        name: stem.to_owned(),
        shape,
        family: Family::Mx,
        bits: 4,
        group_size: Some(BLOCK as u32),
        is_plain_transposed: is_transformers,
        is_symmetric: None,
        members: members([(Role::Payload, Some(payload.id)), (Role::Scale, Some(scale.id))]),
        recipe: Recipe {
            batch: size.batch,
            scale: Some(Scale { grid, global: None }),
            ..Recipe::of(
                rows,
                size.cols,
                Codes::Rows { bits: 4, row_stride_bytes: size.cols / 2 },
                Element::E2m1,
            )
        }
        .into(),
    })
}
