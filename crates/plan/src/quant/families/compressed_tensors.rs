//! compressed-tensors: `weight_packed` of integers, NVFP4 or MX; and 8-bit integers in `weight`, which others write alike.

use super::gptq::columns_per_group;
use super::mx::{self, Packing};
use super::nvfp4::{self, Convention};
use crate::checkpoint::TensorRef;
use crate::dtype::Dtype;
use crate::quant::config::{CtScheme, GroupSize, Method, PackedRule, Strategy};
use crate::quant::scene::{
    Scene, ambiguous, check_dtype, check_shape, contradiction, float_number, grid, group_size, matrices,
    members, missing, module, numel, split, two_dims, unsupported, wrong_shape, wrong_value,
};
use crate::quant::{
    Codes, Element, Family, Grid, Group, QuantError, Recipe, Role, Scale, ZeroOffset, ZeroPoint,
};

/// Joins a module with a `weight_packed`.
///
/// # Source
/// compressed-tensors 0.9.3 to 0.20.0: `compressors/pack_quantized/{base,helpers}.py`, `quantization/lifecycle/forward_helpers.py`.
pub(in crate::quant) fn recognize(scene: &Scene<'_>, payload: &TensorRef<'_>) -> Result<Group, QuantError> {
    let (base, _) = split(payload.info.name);
    let scheme = match &scene.config.method {
        Method::CompressedTensors(config) => config.scheme(module(base)),
        _ => None,
    };
    check_format(scene, payload, scheme)?;
    let scale = scene.need(payload, base, "weight_scale", "scales")?;
    match payload.info.dtype {
        Dtype::I32 | Dtype::U32 => integers(scene, payload, &scale, scheme),
        Dtype::U8 | Dtype::I8 | Dtype::F4 => floats(scene, payload, &scale),
        _ => Err(check_dtype(payload, &[Dtype::I32, Dtype::U8]).expect_err("it is neither")),
    }
}

/// Holds the format that the configuration names against the dtype of the codes.
fn check_format(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    scheme: Option<&CtScheme>,
) -> Result<(), QuantError> {
    let Some(format) = scheme.and_then(|scheme| scheme.format.as_deref()) else { return Ok(()) };
    let is_words = matches!(payload.info.dtype, Dtype::I32 | Dtype::U32);
    let fits = match format {
        "pack-quantized" => is_words,
        "nvfp4-pack-quantized" | "mxfp4-pack-quantized" | "mxfp6-pack-quantized" => !is_words,
        other => {
            return Err(unsupported(
                "compressed-tensors",
                payload,
                format!("weight_packed of format {other:?}"),
            ));
        }
    };
    if fits {
        return Ok(());
    }
    let config = format!("{} says {format:?}", scene.config.source);
    Err(contradiction(payload, config, format!("its dtype is {}", payload.info.dtype)))
}

fn floats(scene: &Scene<'_>, payload: &TensorRef<'_>, scale: &TensorRef<'_>) -> Result<Group, QuantError> {
    let (base, _) = split(payload.info.name);
    let name = [base, "weight"].concat();
    if scale.info.dtype == Dtype::F8E4m3 {
        let global = scene.need(payload, base, "weight_global_scale", "global scale")?;
        let convention = Convention { is_divisor: true, ..Convention::default() };
        return nvfp4::join(scene, payload, scale, Some(&global), convention, name);
    }
    let packing = match (payload.info.shape.last(), scale.info.shape.last()) {
        // 24 bytes for 32 codes.
        (Some(bytes), Some(groups)) if groups.checked_mul(24) == Some(*bytes) => Packing::FP6_E2M3,
        _ => Packing::FP4,
    };
    mx::join(scene, payload, scale, packing, name)
}

fn integers(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    scheme: Option<&CtScheme>,
) -> Result<Group, QuantError> {
    let (base, _) = split(payload.info.name);
    let shape = scene.need(payload, base, "weight_shape", "shape")?;
    let zeros = scene.find(base, "weight_zero_point");
    let indices = scene.find(base, "weight_g_idx");
    let [packed_rows, words] = two_dims(payload)?;
    let [rows, cols] = stored_shape(scene, &shape)?;
    if rows != packed_rows {
        return Err(wrong_value(&shape, format!("{rows} rows"), format!("{packed_rows}, as many as codes,")));
    }
    let (bits, codes) = codes(scene, payload, &shape, scheme, [rows, cols], words)?;
    let (groups, per_group, grid) = scales(scene, scale, scheme, [rows, cols], indices.is_some())?;
    if zeros.is_none() && scheme.is_some_and(|scheme| !scheme.is_symmetric) {
        return Err(missing(payload, &[base, "weight_zero_point"].concat(), "zero-points"));
    }
    let zero_point = match &zeros {
        Some(zeros) => zero_point(zeros, codes, bits, [rows, groups])?,
        None => ZeroPoint::Constant(1 << (bits - 1)),
    };
    if let Some(indices) = &indices {
        check_dtype(indices, &[Dtype::I32])?;
        check_shape(indices, &[cols])?;
    }
    let is_indexed = indices.is_some() && groups > 1;
    let indices_role = if is_indexed { Role::GroupIndex } else { Role::Description };
    Ok(Group {
        name: [base, "weight"].concat(),
        shape: vec![rows, cols],
        family: Family::CompressedTensors,
        bits,
        group_size: per_group.and_then(|size| group_size(size, cols)),
        is_plain_transposed: false,
        is_symmetric: Some(zeros.is_none()),
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(scale.id)),
            (Role::ZeroPoint, zeros.map(|zeros| zeros.id)),
            (indices_role, indices.map(|indices| indices.id)),
            (Role::Description, Some(shape.id)),
        ]),
        recipe: Recipe {
            zero_point,
            scale: Some(Scale { grid, global: None }),
            group_index: if is_indexed { Some(u32::try_from(groups).unwrap_or(u32::MAX)) } else { None },
            ..Recipe::of(rows, cols, codes, Element::Unsigned)
        }
        .into(),
    })
}

/// Reads `weight_shape`, two whole numbers.
fn stored_shape(scene: &Scene<'_>, shape: &TensorRef<'_>) -> Result<[u64; 2], QuantError> {
    check_dtype(shape, &[Dtype::I64, Dtype::I32])?;
    check_shape(shape, &[2])?;
    let bytes = scene.value(shape)?;
    let numbers: Vec<i64> = match shape.info.dtype {
        Dtype::I64 => {
            bytes.chunks_exact(8).map(|word| i64::from_le_bytes(word.try_into().expect("8 bytes"))).collect()
        }
        _ => (bytes.chunks_exact(4))
            .map(|word| i64::from(i32::from_le_bytes(word.try_into().expect("4 bytes"))))
            .collect(),
    };
    match *numbers {
        [rows, cols] if rows > 0 && cols > 0 => Ok([rows as u64, cols as u64]),
        _ => Err(wrong_value(shape, format!("{numbers:?}"), "two positive numbers")),
    }
}

/// Decides the width of codes and whether they straddle words. Writers before 0.18 filled words with whole codes, without a word
/// about it, so the number of words tells.
fn codes(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    shape: &TensorRef<'_>,
    scheme: Option<&CtScheme>,
    [_, cols]: [u64; 2],
    words: u64,
) -> Result<(u8, Codes), QuantError> {
    let row_stride_bytes = words * 4;
    let dense = |bits: u8| cols.checked_mul(u64::from(bits)).map(|bits| bits.div_ceil(32));
    let padded = |bits: u8| cols.div_ceil(u64::from(32 / bits));
    let bits = match scheme.and_then(|scheme| scheme.bits) {
        Some(bits @ 1..=8) => bits,
        Some(bits) => {
            return Err(unsupported("compressed-tensors", payload, format!("codes of {bits} bits")));
        }
        None => {
            let mut fitting = (1..=8).filter(|bits| dense(*bits) == Some(words));
            match (fitting.next(), fitting.next()) {
                (Some(bits), None) => bits,
                _ => {
                    let readings = "compressed-tensors of several widths";
                    return Err(ambiguous(
                        payload,
                        readings,
                        scene.config.key("config_groups.*.weights.num_bits"),
                    ));
                }
            }
        }
    };
    let is_dense = dense(bits) == Some(words);
    match (is_dense, padded(bits) == words) {
        // A single word, or codes that fill words: the same bits.
        (true, true) if words > 1 && 32 % bits != 0 => {
            let readings = format!("{cols} codes of {bits} bits packed densely or in whole words");
            Err(ambiguous(payload, readings, "nothing in the files"))
        }
        (true, _) => Ok((bits, Codes::Rows { bits, row_stride_bytes })),
        (false, true) => Ok((bits, Codes::RowsPadded { bits, row_stride_bytes })),
        (false, false) => {
            let name = shape.info.name;
            let needed = dense(bits).map_or("more".to_owned(), |words| words.to_string());
            Err(wrong_shape(
                payload,
                format!("{needed} words a row for {cols} codes of {bits} bits, as {name} says,"),
            ))
        }
    }
}

/// Returns the number of groups, the columns of one where it is less than a row, and where scales lie.
fn scales(
    scene: &Scene<'_>,
    scale: &TensorRef<'_>,
    scheme: Option<&CtScheme>,
    [rows, cols]: [u64; 2],
    is_indexed: bool,
) -> Result<(u64, Option<u64>, Grid), QuantError> {
    let number = float_number(scale)?;
    let size = match scheme.and_then(|scheme| scheme.strategy) {
        Some(Strategy::Tensor | Strategy::Channel) => Some(GroupSize::AllColumns),
        Some(Strategy::Block) => return block_scales(scale, scheme, [rows, cols]),
        _ => scheme.and_then(|scheme| scheme.group_size),
    };
    match *scale.info.shape {
        [] | [1] if rows > 1 => Ok((1, None, grid(number, [rows, cols], [0, 0]))),
        [n] if n == rows => Ok((1, None, grid(number, [1, cols], [1, 0]))),
        [n, groups] if n == rows => {
            let rule = PackedRule { group_size: size, ..PackedRule::default() };
            let per_group = columns_per_group(scene, scale, &rule, cols, groups, is_indexed)?;
            Ok((groups, Some(per_group), grid(number, [1, per_group], [groups, 1])))
        }
        _ => Err(wrong_shape(scale, format!("[{rows}, groups]"))),
    }
}

fn block_scales(
    scale: &TensorRef<'_>,
    scheme: Option<&CtScheme>,
    [rows, cols]: [u64; 2],
) -> Result<(u64, Option<u64>, Grid), QuantError> {
    let [block_rows, block_cols] =
        scheme.and_then(|scheme| scheme.block).unwrap_or([128, 128]).map(u64::from);
    let groups = [rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
    check_shape(scale, &groups)?;
    Ok((groups[1], None, grid(float_number(scale)?, [block_rows, block_cols], [groups[1], 1])))
}

/// Decides how zero-points are stored: packed along rows, in offset binary as codes are; or as single bytes, before 0.9.4.
fn zero_point(
    zeros: &TensorRef<'_>,
    codes: Codes,
    bits: u8,
    [rows, groups]: [u64; 2],
) -> Result<ZeroPoint, QuantError> {
    match zeros.info.dtype {
        Dtype::I8 => {
            check_shape(zeros, &[rows, groups])?;
            Ok(ZeroPoint::Packed {
                codes: Codes::Rows { bits: 8, row_stride_bytes: groups },
                is_swapped: false,
                is_signed: true,
                offset: ZeroOffset::Constant(1 << (bits - 1)),
            })
        }
        Dtype::I32 | Dtype::U32 => {
            // Packed as the codes are: densely, or as many as fit whole into a word.
            let (codes, words) = match codes {
                Codes::RowsPadded { .. } => {
                    (Codes::ColumnsPadded { bits }, rows.div_ceil(32 / u64::from(bits)))
                }
                _ => (Codes::Columns { bits }, (rows * u64::from(bits)).div_ceil(32)),
            };
            check_shape(zeros, &[words, groups])?;
            Ok(ZeroPoint::Packed {
                codes,
                is_swapped: true,
                is_signed: false,
                offset: ZeroOffset::Constant(0),
            })
        }
        _ => Err(check_dtype(zeros, &[Dtype::I32, Dtype::I8]).expect_err("it is neither")),
    }
}

/// Joins I8 codes `[.., N, K]` with scales for the tensor, rows, or groups of columns, and zero-points of the same shape.
pub(super) fn int8(
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    zeros: Option<&TensorRef<'_>>,
    configured: Option<GroupSize>,
    family: Family,
    name: String,
) -> Result<Group, QuantError> {
    check_dtype(payload, &[Dtype::I8])?;
    let number = float_number(scale)?;
    let size = matrices(payload)?;
    let (batch, rows, cols) = (size.batch, size.rows, size.cols);
    let (groups, per_row) = match *scale.info.shape {
        _ if numel(scale) == 1 && rows > 1 => (1, 0),
        [ref leading @ .., n, groups]
            if n == rows && leading.iter().product::<u64>() == batch && groups > 0 =>
        {
            (groups, groups)
        }
        [ref leading @ .., n] if n == rows && leading.iter().product::<u64>() == batch => (1, 1),
        _ => return Err(wrong_shape(scale, format!("one number, [{rows}] or [{rows}, groups]"))),
    };
    // The last group may be short, so the quotient is the size only where nothing says another.
    let size = match configured {
        Some(GroupSize::Columns(size)) if groups > 1 => u64::from(size).max(1),
        _ if cols.is_multiple_of(groups) => cols / groups,
        _ => return Err(wrong_shape(scale, format!("a number of groups that {cols} columns fall into"))),
    };
    if cols.div_ceil(size) != groups {
        let expected = format!("{} groups, as {cols} columns by {size} have,", cols.div_ceil(size));
        return Err(wrong_shape(scale, expected));
    }
    let per_group = [if per_row == 0 { rows } else { 1 }, size];
    let batch_stride = if batch > 1 { rows * per_row } else { 0 };
    let col_stride = u64::from(groups > 1);
    let grid = Grid { batch_stride, ..grid(number, per_group, [per_row, col_stride]) };
    let zero_point = match zeros {
        None => ZeroPoint::None,
        Some(zeros) => {
            check_dtype(zeros, &[Dtype::I8])?;
            if numel(zeros) != numel(scale) {
                return Err(wrong_shape(zeros, format!("{:?}, as the scales have,", scale.info.shape)));
            }
            if batch > 1 {
                return Err(unsupported("int8", payload, "zero-points of more than one matrix"));
            }
            ZeroPoint::Packed {
                codes: Codes::Rows { bits: 8, row_stride_bytes: per_row },
                is_swapped: false,
                is_signed: true,
                offset: ZeroOffset::Constant(0),
            }
        }
    };
    Ok(Group {
        name,
        shape: payload.info.shape.to_vec(),
        family,
        bits: 8,
        group_size: group_size(size, cols),
        is_plain_transposed: false,
        is_symmetric: Some(zeros.is_none()),
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(scale.id)),
            (Role::ZeroPoint, zeros.map(|zeros| zeros.id)),
        ]),
        recipe: Recipe {
            batch,
            zero_point,
            scale: Some(Scale { grid, global: None }),
            ..Recipe::of(rows, cols, Codes::Rows { bits: 8, row_stride_bytes: cols }, Element::Signed)
        }
        .into(),
    })
}
