//! MLX: `weight` of U32 words, `scales`, and `biases` that are added.

use super::{blocks, mx, nvfp4};
use crate::checkpoint::TensorRef;
use crate::dtype::Dtype;
use crate::quant::config::{GroupSize, Method, MlxMode, MlxRule};
use crate::quant::scene::{
    Matrices, Scene, ambiguous, check_dtype, float_number, group_size, members, missing, module, split,
    unsupported, wrong_shape,
};
use crate::quant::{Codes, Element, Family, Group, Number, QuantError, Recipe, Role, Scale};

/// Joins a `weight` of U32 with its `scales`.
///
/// # Source
/// mlx 0.32.4, `mlx/backend/cpu/quantized.cpp`.
pub(in crate::quant) fn recognize(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
) -> Result<Group, QuantError> {
    let (base, _) = split(payload.info.name);
    scene.config.check_excluded(module(base), payload.info.name)?;
    let [ref leading @ .., rows, words] = *payload.info.shape else {
        return Err(wrong_shape(payload, "two dims or more"));
    };
    let bias = scene.find_any(base, &["biases", "qbiases"]);
    let rule = rule(scene, payload, scale, module(base), words, bias.is_some())?;
    let bits = match rule.bits {
        Some(bits @ (2 | 3 | 4 | 5 | 6 | 8)) => bits,
        Some(bits) => return Err(unsupported("MLX", payload, format!("codes of {bits} bits"))),
        None => return Err(ambiguous(payload, "MLX of several widths", scene.config.key("bits"))),
    };
    let row_bits = words * 32;
    if !row_bits.is_multiple_of(u64::from(bits)) {
        return Err(wrong_shape(payload, format!("rows of whole {bits}-bit codes")));
    }
    let size = Matrices { batch: leading.iter().product(), rows, cols: row_bits / u64::from(bits) };
    let (per_group, number, element, family) = match rule.mode {
        MlxMode::Affine => {
            let number = float_number(scale)?;
            (columns(scene, payload, scale, &rule, size.cols)?, number, Element::Unsigned, Family::Mlx)
        }
        MlxMode::Mxfp4 => (mx::BLOCK, byte(scale, Number::E8m0)?, Element::E2m1, Family::Mx),
        MlxMode::Mxfp8 => (mx::BLOCK, byte(scale, Number::E8m0)?, Element::E4m3, Family::Mx),
        MlxMode::Nvfp4 => (nvfp4::BLOCK, byte(scale, Number::E4m3)?, Element::E2m1, Family::Nvfp4),
    };
    let scales = blocks(scale, leading, size, [1, per_group], number)?;
    let bias = match (rule.mode, bias) {
        (MlxMode::Affine, None) => return Err(missing(payload, &[base, "biases"].concat(), "biases")),
        (MlxMode::Affine, Some(bias)) => {
            let grid = blocks(&bias, leading, size, [1, per_group], float_number(&bias)?)?;
            Some((bias, grid))
        }
        (_, _) => None,
    };
    let mut shape = leading.to_vec();
    shape.extend([rows, size.cols]);
    Ok(Group {
        name: payload.info.name.to_owned(),
        shape,
        family,
        bits,
        group_size: group_size(per_group, size.cols),
        is_plain_transposed: false,
        is_symmetric: (rule.mode == MlxMode::Affine).then_some(false),
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(scale.id)),
            (Role::Bias, bias.as_ref().map(|(bias, _)| bias.id)),
        ]),
        recipe: Recipe {
            batch: size.batch,
            scale: Some(Scale { grid: scales, global: None }),
            bias: bias.map(|(_, grid)| grid),
            ..Recipe::of(rows, size.cols, Codes::Rows { bits, row_stride_bytes: words * 4 }, element)
        }
        .into(),
    })
}

/// Returns what the configuration says, or what the shapes leave no doubt about.
fn rule(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    module: &str,
    words: u64,
    has_bias: bool,
) -> Result<MlxRule, QuantError> {
    if let Method::Mlx(config) = &scene.config.method {
        let own = config.overrides.get(module).copied().flatten();
        let rule = own.unwrap_or(config.default);
        let default_bits = match rule.mode {
            MlxMode::Affine => None,
            MlxMode::Mxfp8 => Some(8),
            MlxMode::Mxfp4 | MlxMode::Nvfp4 => Some(4),
        };
        return Ok(MlxRule { bits: default_bits.or(rule.bits).or(config.default.bits), ..rule });
    }
    let groups = scale.info.shape.last().copied().unwrap_or(0);
    let fits =
        |(bits, size): &(u8, u32)| u64::from(*bits) * u64::from(*size) * groups == words.saturating_mul(32);
    let all = [2, 3, 4, 5, 6, 8].into_iter().flat_map(|bits| [32, 64, 128].map(|size| (bits, size)));
    let mut fitting = all.filter(fits);
    match (fitting.next(), fitting.next()) {
        (Some((bits, size)), None) if has_bias && groups < u64::from(u32::MAX) => Ok(MlxRule {
            bits: Some(bits),
            group_size: Some(GroupSize::Columns(size)),
            mode: MlxMode::Affine,
        }),
        _ => Err(ambiguous(payload, "MLX of several widths and group sizes", "quantization in config.json")),
    }
}

fn columns(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    rule: &MlxRule,
    cols: u64,
) -> Result<u64, QuantError> {
    let groups = scale.info.shape.last().copied().unwrap_or(0);
    match rule.group_size {
        Some(GroupSize::Columns(size)) => Ok(u64::from(size).max(1)),
        Some(GroupSize::AllColumns) => Ok(cols.max(1)),
        None if groups > 0 && cols.is_multiple_of(groups) => Ok((cols / groups).max(1)),
        None => Err(ambiguous(payload, "MLX of several group sizes", scene.config.key("group_size"))),
    }
}

fn byte(scale: &TensorRef<'_>, number: Number) -> Result<Number, QuantError> {
    check_dtype(scale, &[Dtype::U8, Dtype::F8E8m0, Dtype::F8E4m3])?;
    Ok(number)
}
