//! AWQ: `qweight`, `qzeros`, `scales`, in three layouts.

use super::gptq::columns_per_group;
use crate::checkpoint::TensorRef;
use crate::dtype::Dtype;
use crate::quant::config::{AwqLayout, Method, PackedRule};
use crate::quant::scene::{
    Scene, check_dtype, check_shape, float_number, grid, group_size, members, module, split, two_dims,
    unsupported, wrong_shape,
};
use crate::quant::{Codes, Element, Family, Group, QuantError, Recipe, Role, Scale, ZeroOffset, ZeroPoint};

/// Joins an AWQ module.
///
/// # Source
/// AutoAWQ, commit 88e4c76b: `awq/modules/linear/{gemm,gemv,gemv_fast}.py`, `awq/utils/packing_utils.py`.
pub(in crate::quant) fn recognize(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    layout: AwqLayout,
) -> Result<Group, QuantError> {
    let (base, _) = split(payload.info.name);
    let rule = match &scene.config.method {
        Method::Packed(packed) => packed.rule(packed.rule_index(module(base))),
        _ => PackedRule::default(),
    };
    if let Some(bits) = rule.bits.filter(|bits| *bits != 4) {
        return Err(unsupported("AWQ", payload, format!("codes of {bits} bits")));
    }
    let scales = scene.need(payload, base, "scales", "scales")?;
    // AutoAWQ's fast layout has called the products so.
    let products = scene.find(base, "scaled_zeros").filter(|_| matches!(layout, AwqLayout::Fast));
    let zeros = match products.or_else(|| scene.find(base, "qzeros")) {
        Some(zeros) => zeros,
        None if rule.is_symmetric == Some(true) => {
            return Err(unsupported("AWQ", payload, "codes without zero-points"));
        }
        None => scene.need(payload, base, "qzeros", "zero-points")?,
    };
    let module = Module { scene, payload, scales, zeros, rule };
    let (shape, per_group, zeros_role, recipe) = match layout {
        AwqLayout::Gemm => module.gemm()?,
        AwqLayout::Gemv => module.gemv()?,
        AwqLayout::Fast => module.fast()?,
    };
    Ok(Group {
        name: [base, "weight"].concat(),
        shape,
        family: Family::Awq,
        bits: 4,
        group_size: group_size(per_group, recipe.cols),
        is_plain_transposed: false,
        is_symmetric: Some(false),
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(module.scales.id)),
            (zeros_role, Some(module.zeros.id)),
        ]),
        recipe: recipe.into(),
    })
}

struct Module<'m, 's> {
    scene: &'m Scene<'s>,
    payload: &'m TensorRef<'m>,
    scales: TensorRef<'s>,
    zeros: TensorRef<'s>,
    rule: PackedRule,
}

type Layout = (Vec<u64>, u64, Role, Recipe);

impl Module<'_, '_> {
    /// `qweight` `[K, N / 8]`, `qzeros` `[G, N / 8]`, `scales` `[G, N]`; eight rows in a word, interleaved.
    fn gemm(&self) -> Result<Layout, QuantError> {
        check_dtype(self.payload, &[Dtype::I32, Dtype::U32])?;
        check_dtype(&self.zeros, &[Dtype::I32, Dtype::U32])?;
        let number = float_number(&self.scales)?;
        let [cols, words] = two_dims(self.payload)?;
        let rows = words * 8;
        let [groups, _] = two_dims(&self.scales)?;
        check_shape(&self.scales, &[groups, rows])?;
        check_shape(&self.zeros, &[groups, words])?;
        let per_group = columns_per_group(self.scene, &self.scales, &self.rule, cols, groups, false)?;
        let codes = Codes::Words { words_per_row: words, is_interleaved: true };
        let recipe = Recipe {
            zero_point: unsigned(codes),
            scale: Some(Scale { grid: grid(number, [1, per_group], [1, rows]), global: None }),
            is_column_major: true,
            ..Recipe::of(rows, cols, codes, Element::Unsigned)
        };
        Ok((vec![rows, cols], per_group, Role::ZeroPoint, recipe))
    }

    /// `qweight` `[N, K / 8]`, `qzeros` `[N, words]`, `scales` `[N, 8 * words]`, padded with zeros.
    fn gemv(&self) -> Result<Layout, QuantError> {
        check_dtype(self.payload, &[Dtype::I32, Dtype::U32])?;
        check_dtype(&self.zeros, &[Dtype::I32, Dtype::U32])?;
        let number = float_number(&self.scales)?;
        let [rows, words] = two_dims(self.payload)?;
        let cols = words * 8;
        let [_, zero_words] = two_dims(&self.zeros)?;
        check_shape(&self.zeros, &[rows, zero_words])?;
        check_shape(&self.scales, &[rows, zero_words.saturating_mul(8)])?;
        let per_group = self.padded_group(cols, zero_words)?;
        let recipe = Recipe {
            zero_point: unsigned(Codes::Rows { bits: 4, row_stride_bytes: zero_words * 4 }),
            scale: Some(Scale { grid: grid(number, [1, per_group], [zero_words * 8, 1]), global: None }),
            ..Recipe::of(rows, cols, Codes::Rows { bits: 4, row_stride_bytes: words * 4 }, Element::Unsigned)
        };
        Ok((vec![rows, cols], per_group, Role::ZeroPoint, recipe))
    }

    /// `qweight` I16 `[N / 4, K]`, `scales` and `qzeros` F16 `[8 * words, N]`; zero-points times scales, negated.
    fn fast(&self) -> Result<Layout, QuantError> {
        check_dtype(self.payload, &[Dtype::I16, Dtype::U16])?;
        let (number, zero_number) = (float_number(&self.scales)?, float_number(&self.zeros)?);
        let [quads, cols] = two_dims(self.payload)?;
        let rows = quads * 4;
        if cols % 64 != 0 {
            return Err(wrong_shape(self.payload, "a multiple of 64 columns"));
        }
        let [groups, _] = two_dims(&self.scales)?;
        check_shape(&self.scales, &[groups, rows])?;
        check_shape(&self.zeros, &[groups, rows])?;
        let per_group = self.padded_group(cols, groups / 8)?;
        let recipe = Recipe {
            scale: Some(Scale { grid: grid(number, [1, per_group], [1, rows]), global: None }),
            bias: Some(grid(zero_number, [1, per_group], [1, rows])),
            ..Recipe::of(rows, cols, Codes::AwqFast, Element::Unsigned)
        };
        Ok((vec![rows, cols], per_group, Role::Bias, recipe))
    }

    /// Returns the columns that share a scale, where scales are padded to words of 8 groups, and those for small groups more.
    fn padded_group(&self, cols: u64, words: u64) -> Result<u64, QuantError> {
        use crate::quant::config::GroupSize;
        let key = || self.scene.config.key("group_size");
        let per_group = match self.rule.group_size {
            Some(GroupSize::AllColumns) => cols,
            Some(GroupSize::Columns(size)) => u64::from(size).min(cols).max(1),
            None => {
                let fits = |size: &u64| padded_words(cols, *size) == words;
                let mut sizes = [32, 64, 128].into_iter().filter(fits);
                match (sizes.next(), sizes.next()) {
                    (Some(size), None) => size,
                    _ => {
                        let readings = "AWQ of several group sizes";
                        return Err(crate::quant::scene::ambiguous(self.payload, readings, key()));
                    }
                }
            }
        };
        match padded_words(cols, per_group) == words {
            true => Ok(per_group),
            false => {
                let expected = format!("scales for {} groups", padded_words(cols, per_group) * 8);
                Err(wrong_shape(&self.scales, expected))
            }
        }
    }
}

/// Words of 8 zero-points for all groups of a row, as the writers pad them.
fn padded_words(cols: u64, per_group: u64) -> u64 {
    let multiple = match per_group {
        0..64 => 4,
        64..128 => 2,
        _ => 1,
    };
    cols.div_ceil(per_group).div_ceil(8).next_multiple_of(multiple)
}

fn unsigned(codes: Codes) -> ZeroPoint {
    ZeroPoint::Packed { codes, is_swapped: false, is_signed: false, offset: ZeroOffset::Constant(0) }
}
