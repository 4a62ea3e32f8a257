//! Quark: 4-bit integers in words of 8 rows, and MX blocks that hold their own scale.

use super::gptq::columns_per_group;
use super::mx::BLOCK;
use crate::checkpoint::TensorRef;
use crate::dtype::Dtype;
use crate::quant::config::{GroupSize, Method, PackedRule, QuarkWeight};
use crate::quant::scene::{
    Matrices, Scene, ambiguous, check_dtype, check_shape, float_number, grid, group_size, matrices, members,
    missing, module, numel, split, two_dims, unsupported, wrong_shape,
};
use crate::quant::{
    Codes, Element, Family, Grid, Group, Number, QuantError, Recipe, Role, Scale, ZeroOffset, ZeroPoint,
};

/// Joins a `weight` of I32 with its `weight_scale`.
///
/// # Source
/// amd-quark 0.13, `torch/utils/pack.py`.
pub(in crate::quant) fn integers(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
) -> Result<Group, QuantError> {
    let (base, _) = split(payload.info.name);
    scene.config.check_excluded(module(base), payload.info.name)?;
    let undecided = || {
        ambiguous(payload, "signed or unsigned codes", scene.config.key("global_quant_config.weight.dtype"))
    };
    let Method::Quark(config) = &scene.config.method else { return Err(undecided()) };
    let weight = config.weight(module(base)).ok_or_else(undecided)?;
    let is_signed = match &*weight.dtype {
        "int4" => true,
        "uint4" => false,
        other => return Err(unsupported("Quark", payload, format!("{other} in words of 32 bits"))),
    };
    // Signed codes of a symmetric layer have no zero-point, whatever is stored; unsigned ones always have one.
    let is_symmetric = is_signed && weight.is_symmetric == Some(true);
    let zeros = scene.find(base, "weight_zero_point").filter(|_| !is_symmetric);
    if zeros.is_none() && (!is_signed || weight.is_symmetric == Some(false)) {
        return Err(missing(payload, &[base, "weight_zero_point"].concat(), "zero-points"));
    }
    let parts = Parts { scene, payload, scale, zeros, is_signed };
    let (rows, cols, per_group, recipe) = match weight.is_per_group {
        true => parts.grouped(weight, config.is_reordered)?,
        false if config.is_reordered => {
            return Err(unsupported("Quark", payload, "reordered words along rows"));
        }
        false => parts.by_row()?,
    };
    Ok(Group {
        name: payload.info.name.to_owned(),
        shape: vec![rows, cols],
        family: Family::Quark,
        bits: 4,
        group_size: per_group.and_then(|size| group_size(size, cols)),
        is_plain_transposed: false,
        is_symmetric: Some(zeros.is_none()),
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(scale.id)),
            (Role::ZeroPoint, zeros.map(|zeros| zeros.id)),
        ]),
        recipe: recipe.into(),
    })
}

struct Parts<'p, 's> {
    scene: &'p Scene<'s>,
    payload: &'p TensorRef<'p>,
    scale: &'p TensorRef<'p>,
    zeros: Option<TensorRef<'s>>,
    is_signed: bool,
}

impl Parts<'_, '_> {
    fn element(&self) -> Element {
        if self.is_signed { Element::Signed } else { Element::Unsigned }
    }

    /// `weight` `[K, ceil(N / 8)]`, `weight_scale` `[G, N]`, `weight_zero_point` `[G, ceil(N / 8)]`.
    fn grouped(
        &self,
        weight: &QuarkWeight,
        is_interleaved: bool,
    ) -> Result<(u64, u64, Option<u64>, Recipe), QuantError> {
        let number = float_number(self.scale)?;
        let ([cols, words], [groups, rows]) = (two_dims(self.payload)?, two_dims(self.scale)?);
        if rows.div_ceil(8) != words {
            return Err(wrong_shape(self.scale, format!("{} rows, 8 for each word,", words * 8)));
        }
        let rule = PackedRule { group_size: weight.group_size, ..PackedRule::default() };
        let per_group = columns_per_group(self.scene, self.scale, &rule, cols, groups, false)?;
        let codes = Codes::Words { words_per_row: words, is_interleaved };
        let zero_point = match &self.zeros {
            None => ZeroPoint::None,
            Some(zeros) => {
                check_dtype(zeros, &[Dtype::I32])?;
                check_shape(zeros, &[groups, words])?;
                let offset = ZeroOffset::Constant(0);
                ZeroPoint::Packed { codes, is_swapped: false, is_signed: self.is_signed, offset }
            }
        };
        let recipe = Recipe {
            zero_point,
            scale: Some(Scale { grid: grid(number, [1, per_group], [1, rows]), global: None }),
            is_column_major: true,
            ..Recipe::of(rows, cols, codes, self.element())
        };
        Ok((rows, cols, Some(per_group), recipe))
    }

    /// `weight` `[N, K / 8]`, a scale for each row or for all.
    fn by_row(&self) -> Result<(u64, u64, Option<u64>, Recipe), QuantError> {
        if let Some(zeros) = &self.zeros {
            return Err(unsupported("Quark", zeros, "zero-points of rows"));
        }
        let number = float_number(self.scale)?;
        let [rows, words] = two_dims(self.payload)?;
        let cols = words * 8;
        let grid = match numel(self.scale) {
            1 => grid(number, [rows, cols], [0, 0]),
            count if count == rows => grid(number, [1, cols], [1, 0]),
            _ => return Err(wrong_shape(self.scale, format!("one number or [{rows}]"))),
        };
        let recipe = Recipe {
            scale: Some(Scale { grid, global: None }),
            ..Recipe::of(rows, cols, Codes::Rows { bits: 4, row_stride_bytes: words * 4 }, self.element())
        };
        Ok((rows, cols, None, recipe))
    }
}

/// Joins nothing: blocks of 17 bytes, the first an exponent without bias, then 32 4-bit floats.
pub(super) fn inline_scales(payload: &TensorRef<'_>, weight: &QuarkWeight) -> Result<Group, QuantError> {
    if weight.dtype != "mx" {
        return Err(unsupported("Quark", payload, weight.dtype.as_str()));
    }
    check_dtype(payload, &[Dtype::U8, Dtype::I8])?;
    if !matches!(weight.group_size, None | Some(GroupSize::Columns(32))) {
        return Err(unsupported("Quark", payload, "inline scales of blocks other than 32"));
    }
    let Matrices { batch, rows, cols: bytes } = matrices(payload)?;
    if bytes % 17 != 0 {
        return Err(wrong_shape(payload, "rows of whole blocks of 17 bytes"));
    }
    let cols = bytes / 17 * BLOCK;
    let mut shape = payload.info.shape.to_vec();
    if let Some(last) = shape.last_mut() {
        *last = cols;
    }
    // The exponents' distances are those of bytes in the payload.
    let grid = grid(Number::SignedExponent, [1, BLOCK], [bytes, 17]);
    let batch_stride = if batch > 1 { rows * bytes } else { 0 };
    Ok(Group {
        name: payload.info.name.to_owned(),
        shape,
        family: Family::Mx,
        bits: 4,
        group_size: Some(BLOCK as u32),
        is_plain_transposed: false,
        is_symmetric: None,
        members: members([(Role::Payload, Some(payload.id))]),
        recipe: Recipe {
            batch,
            scale: Some(Scale { grid: Grid { batch_stride, ..grid }, global: None }),
            ..Recipe::of(rows, cols, Codes::RowsWithScales { row_stride_bytes: bytes }, Element::E2m1)
        }
        .into(),
    })
}
