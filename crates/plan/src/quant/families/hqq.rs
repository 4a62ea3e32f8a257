//! HQQ: `W_q` with float zero-points and scales, described by a small tensor for each parameter.

use crate::checkpoint::TensorRef;
use crate::dtype::Dtype;
use crate::quant::scene::{
    Scene, float_number, grid, group_size, members, numel, split, unsupported, wrong_shape, wrong_value,
};
use crate::quant::{Codes, Element, Family, Group, QuantError, Recipe, Role, Scale, ZeroPoint};

/// Parameters that are read.
pub(in crate::quant) const READ: &[&str] =
    &["nbits", "group_size", "shape", "axis", "packing", "quant_scale", "quant_zero"];
/// Parameters that say nothing about the numbers.
const UNREAD: &[&str] = &[
    "unpack_view_dtype",
    "compute_dtype",
    "view_as_float",
    "channel_wise",
    "optimize",
    "round_zero",
    "encoded_state_dict",
    "offload_meta",
    "stores_quant_config",
];

/// Joins an HQQ module. Its codes are those of the weight reshaped to groups, which is how the recipe sees it: `rows` and `cols` are
/// not those of the result, whose numbers are in the same order.
///
/// # Source
/// hqq, commit e0b1d00e: `hqq/core/quantize.py`, `hqq/core/bitpack.py`.
pub(in crate::quant) fn recognize(scene: &Scene<'_>, payload: &TensorRef<'_>) -> Result<Group, QuantError> {
    let (base, _) = split(payload.info.name);
    let scale = scene.need(payload, base, "scale", "scale")?;
    let zeros = scene.need(payload, base, "zero", "zero-points")?;
    let meta = Meta::read(scene, payload, base)?;
    let Meta { bits, axis, .. } = meta;
    let all = meta.shape.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim));
    let Some(all) = all.filter(|all| *all > 0 && *all <= NUMEL_MAX) else {
        return Err(wrong_value(&meta.shape_tensor, format!("{:?}", meta.shape), "a shape"));
    };
    // Without a group size, a group is a row or a column of the weight.
    let last = meta.shape.last().copied().unwrap_or(1);
    let per_group = meta.group_size.unwrap_or(if axis == 1 { last } else { all / last.max(1) });
    if per_group == 0 || all % per_group != 0 {
        let expected = format!("a group size that divides {all}");
        return Err(wrong_value(
            &meta.shape_tensor,
            format!("{:?} with groups of {per_group}", meta.shape),
            expected,
        ));
    }
    let groups = all / per_group;
    let (rows, cols) = if axis == 1 { (groups, per_group) } else { (per_group, groups) };
    for tensor in [&scale, &zeros] {
        if numel(tensor) != groups {
            return Err(wrong_shape(tensor, format!("{groups} numbers, one a group,")));
        }
    }
    let chunks = u64::from(meta.unit_bytes) * 8 / u64::from(meta.field_bits);
    let unit_rows = rows.div_ceil(chunks);
    let len_bytes = unit_rows * cols * u64::from(meta.unit_bytes);
    if payload.info.len_bytes() != len_bytes {
        return Err(wrong_shape(
            payload,
            format!("{len_bytes} bytes for {rows} by {cols} codes of {bits} bits"),
        ));
    }
    let grid = |number| match axis {
        1 => grid(number, [1, cols], [1, 0]),
        _ => grid(number, [rows, 1], [0, 1]),
    };
    let codes = match (meta.field_bits, meta.unit_bytes) {
        (8, _) => Codes::Rows { bits: 8, row_stride_bytes: cols },
        (bits, unit_bytes) => Codes::RowChunks { bits, unit_bytes, unit_rows },
    };
    let (scale_number, zero_number) = (float_number(&scale)?, float_number(&zeros)?);
    let mut list = members([
        (Role::Payload, Some(payload.id)),
        (Role::Scale, Some(scale.id)),
        (Role::ZeroPoint, Some(zeros.id)),
    ]);
    let described = READ.iter().chain(UNREAD).filter_map(|leaf| scene.find(base, leaf));
    list.extend(described.map(|tensor| (Role::Description, tensor.id)));
    Ok(Group {
        name: [base, "weight"].concat(),
        shape: meta.shape,
        family: Family::Hqq,
        bits,
        group_size: group_size(per_group, last),
        is_plain_transposed: false,
        is_symmetric: Some(false),
        members: list,
        recipe: Recipe {
            zero_point: ZeroPoint::Float(grid(zero_number)),
            scale: Some(Scale { grid: grid(scale_number), global: None }),
            ..Recipe::of(rows, cols, codes, Element::Unsigned)
        }
        .into(),
    })
}

/// What the small tensors say.
struct Meta<'s> {
    bits: u8,
    /// Bits of a field, which are more than those of a code for 5 and 6.
    field_bits: u8,
    unit_bytes: u8,
    axis: u64,
    group_size: Option<u64>,
    shape: Vec<u64>,
    shape_tensor: TensorRef<'s>,
}

impl<'s> Meta<'s> {
    fn read(scene: &Scene<'s>, payload: &TensorRef<'_>, base: &str) -> Result<Meta<'s>, QuantError> {
        let shape_tensor = scene.need(payload, base, "shape", "shape")?;
        let shape = numbers(scene, &shape_tensor)?;
        let positive = shape.iter().map(|dim| u64::try_from(*dim).ok()).collect::<Option<Vec<u64>>>();
        let shape = positive.ok_or_else(|| wrong_value(&shape_tensor, format!("{shape:?}"), "dims"))?;
        let one = |leaf: &str| match scene.find(base, leaf) {
            None => Ok(None),
            Some(tensor) => match *numbers(scene, &tensor)? {
                [number] => Ok(Some((number, tensor))),
                ref other => Err(wrong_value(&tensor, format!("{} numbers", other.len()), "one")),
            },
        };
        for nested in ["quant_scale", "quant_zero"] {
            if one(nested)?.is_some_and(|(number, _)| number != 0) {
                return Err(unsupported(
                    "HQQ",
                    payload,
                    "scales or zero-points that are quantized themselves",
                ));
            }
        }
        let axis = match one("axis")? {
            None => 1,
            Some((axis @ (0 | 1), _)) => axis as u64,
            Some((axis, tensor)) => return Err(wrong_value(&tensor, axis.to_string(), "0 or 1")),
        };
        let group_size = match one("group_size")? {
            None | Some((-1 | 0, _)) => None,
            Some((size, tensor)) => Some(
                u64::try_from(size)
                    .map_err(|_| wrong_value(&tensor, size.to_string(), "a number of columns"))?,
            ),
        };
        let nbits = scene.need(payload, base, "nbits", "number of bits")?;
        let bits = match *numbers(scene, &nbits)? {
            [bits @ (1..=6 | 8)] => bits as u8,
            ref other => return Err(wrong_value(&nbits, format!("{other:?}"), "1, 2, 3, 4, 5, 6 or 8")),
        };
        let packing = match scene.find(base, "packing") {
            None => None,
            Some(tensor) => Some((String::from_utf8_lossy(scene.value(&tensor)?).into_owned(), tensor)),
        };
        let by_bits = match bits {
            3 => "3bit_32bit",
            5 | 6 => "8bit_u8",
            _ => "",
        };
        let packing_name = packing.as_ref().map_or(by_bits, |(name, _)| name);
        let (field_bits, unit_bytes) = match (packing_name, bits) {
            ("" | "8bit_u8", 8) | ("8bit_u8", 5 | 6) => (8, 1),
            ("" | "4bit_u8", 4) => (4, 1),
            ("3bit_32" | "3bit_32bit", 3) => (3, 4),
            ("" | "2bit_u8", 2) => (2, 1),
            ("" | "1bit_u8", 1) => (1, 1),
            (name, bits) => {
                let tensor = packing.as_ref().map_or(&nbits, |(_, tensor)| tensor);
                return Err(wrong_value(
                    tensor,
                    format!("{name:?} for {bits} bits"),
                    "a packing of that many bits",
                ));
            }
        };
        Ok(Meta { bits, field_bits, unit_bytes, axis, group_size, shape, shape_tensor })
    }
}

/// Reads a small tensor of whole numbers or flags.
fn numbers(scene: &Scene<'_>, tensor: &TensorRef<'_>) -> Result<Vec<i64>, QuantError> {
    let bytes = scene.value(tensor)?;
    Ok(match tensor.info.dtype {
        Dtype::U8 | Dtype::Bool => bytes.iter().map(|byte| i64::from(*byte)).collect(),
        Dtype::I32 => {
            let word = |word: &[u8]| i64::from(i32::from_le_bytes(word.try_into().expect("4 bytes")));
            bytes.chunks_exact(4).map(word).collect()
        }
        Dtype::I64 => {
            let word = |word: &[u8]| i64::from_le_bytes(word.try_into().expect("8 bytes"));
            bytes.chunks_exact(8).map(word).collect()
        }
        dtype => return Err(wrong_value(tensor, format!("numbers of dtype {dtype}"), "I32, I64 or U8")),
    })
}

/// The most numbers of one weight; beyond every file, and small enough to be multiplied by a unit's bytes.
const NUMEL_MAX: u64 = 1 << 56;
