//! NVFP4: blocks of 16 columns with an E4M3 scale, and a global scale that multiplies or, in compressed-tensors, divides.

use super::{blocks, fold, swizzled};
use crate::checkpoint::TensorRef;
use crate::dtype::Dtype;
use crate::quant::scene::{Matrices, Scene, check_dtype, members, numel, split, wrong_shape};
use crate::quant::{Codes, Element, Family, Global, Group, Number, QuantError, Recipe, Role, Scale};

/// The columns that share a scale.
pub(super) const BLOCK: u64 = 16;

/// Which of the writers' conventions hold.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Convention {
    /// Whether the global scale is divided by.
    pub(super) is_divisor: bool,
    /// Whether the high nibble comes first.
    pub(super) is_high_first: bool,
    /// Whether scales lie in tiles.
    pub(super) is_swizzled: bool,
}

/// Joins a payload of bytes `[.., N, K / 2]`, its scales `[.., N, K / 16]` and its global scale.
pub(super) fn join(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    global: Option<&TensorRef<'_>>,
    convention: Convention,
    name: String,
) -> Result<Group, QuantError> {
    check_dtype(scale, &[Dtype::F8E4m3, Dtype::U8])?;
    let [ref leading @ .., rows, last] = *payload.info.shape else {
        return Err(wrong_shape(payload, "two dims or more"));
    };
    // The dtype F4 counts codes, not bytes.
    let bytes = if payload.info.dtype == Dtype::F4 { last / 2 } else { last };
    let size = Matrices { batch: leading.iter().product(), rows, cols: bytes * 2 };
    // An older writer stored tiles as bytes of one dimension.
    let is_swizzled = convention.is_swizzled || scale.info.shape.len() == 1;
    let grid = match is_swizzled {
        true => swizzled(scale, size, [1, BLOCK], Number::E4m3)?,
        false => blocks(scale, leading, size, [1, BLOCK], Number::E4m3)?,
    };
    let global_scale =
        global.map(|global| second_level(global, size.batch, convention.is_divisor)).transpose()?;
    let (fold, fold_id) = fold(scene, split(payload.info.name).0, size.cols)?;
    let row_stride_bytes = bytes;
    let codes = match convention.is_high_first {
        true => Codes::RowsHighFirst { row_stride_bytes },
        false => Codes::Rows { bits: 4, row_stride_bytes },
    };
    let mut shape = leading.to_vec();
    shape.extend([rows, size.cols]);
    Ok(Group {
        name,
        shape,
        family: Family::Nvfp4,
        bits: 4,
        group_size: Some(BLOCK as u32),
        is_plain_transposed: false,
        is_symmetric: None,
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(scale.id)),
            (Role::Global, global.map(|global| global.id)),
            (Role::Fold, fold_id),
        ]),
        recipe: Recipe {
            batch: size.batch,
            scale: Some(Scale { grid, global: global_scale }),
            fold,
            ..Recipe::of(rows, size.cols, codes, Element::E2m1)
        }
        .into(),
    })
}

/// Reads how the global scale is stored: one number, or one for each expert.
fn second_level(global: &TensorRef<'_>, batch: u64, is_divisor: bool) -> Result<Global, QuantError> {
    check_dtype(global, &[Dtype::F32, Dtype::F16, Dtype::Bf16])?;
    let batch_stride = match numel(global) {
        1 => 0,
        count if count == batch => 1,
        _ => return Err(wrong_shape(global, format!("one number, or one for each of {batch} matrices,"))),
    };
    Ok(Global { dtype: global.info.dtype, is_divisor, batch_stride })
}
