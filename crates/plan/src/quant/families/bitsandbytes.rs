//! bitsandbytes: 4-bit tables with scales for runs of numbers, and 8-bit integers.

use crate::checkpoint::TensorRef;
use crate::dtype::Dtype;
use crate::quant::config::Json;
use crate::quant::scene::{
    Scene, check_dtype, check_shape, grid, members, missing, split, two_dims, unsupported, wrong_shape,
    wrong_value,
};
use crate::quant::{Codes, Element, Family, Group, Number, QuantError, Recipe, Role, Scale};

/// What the name of a description holds between the weight's name and the kind of codes.
pub(in crate::quant) const STATE: &str = ".quant_state.bitsandbytes__";

/// Joins a 4-bit weight, which is found by the tensor that describes it.
///
/// # Source
/// bitsandbytes 0.50.2, `functional.py` (`QuantState`, `dequantize_4bit`).
pub(in crate::quant) fn four_bits(scene: &Scene<'_>, state: &TensorRef<'_>) -> Result<Group, QuantError> {
    let name = state.info.name.split(STATE).next().unwrap_or_default();
    let find = |leaf: &str, what| {
        let name = [name, leaf].concat();
        scene.checkpoint.find(&name).ok_or_else(|| missing(state, &name, what))
    };
    let payload = find("", "codes")?;
    let absmax = find(".absmax", "scales")?;
    let table = find(".quant_map", "table of codes")?;
    let description = Description::read(scene, state)?;
    check_dtype(&table, &[Dtype::F32])?;
    check_shape(&table, &[16])?;

    let numel = description.shape.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim));
    let numel = numel.filter(|numel| *numel > 0);
    let Some(numel) = numel.filter(|numel| is_padded(payload.info.len_bytes(), numel.div_ceil(2))) else {
        let expected = format!("the shape of {} bytes of two codes each", payload.info.len_bytes());
        return Err(wrong_value(state, format!("shape {:?}", description.shape), expected));
    };
    let block = u64::from(description.block);
    check_shape(&absmax, &[numel.div_ceil(block)])?;
    let nested = match absmax.info.dtype {
        Dtype::F32 => None,
        Dtype::U8 => {
            Some((find(".nested_absmax", "scales of scales")?, find(".nested_quant_map", "table of scales")?))
        }
        _ => return Err(check_dtype(&absmax, &[Dtype::F32, Dtype::U8]).expect_err("it is neither")),
    };
    let number = match &nested {
        None => Number::F32,
        Some((scales, table)) => {
            let Some((per_scale, offset)) = description.nested else {
                return Err(wrong_value(
                    state,
                    "no nested_blocksize and nested_offset",
                    "both, as scales are nested,",
                ));
            };
            check_dtype(scales, &[Dtype::F32])?;
            check_dtype(table, &[Dtype::F32])?;
            check_shape(table, &[256])?;
            check_shape(scales, &[numel.div_ceil(block).div_ceil(u64::from(per_scale))])?;
            Number::Nested { per_scale, offset }
        }
    };
    let (rows, cols, grid) = layout(&description.shape, numel, block, number);
    Ok(Group {
        name: name.to_owned(),
        shape: description.shape,
        family: Family::Bitsandbytes,
        bits: 4,
        group_size: Some(description.block),
        is_plain_transposed: false,
        is_symmetric: None,
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(absmax.id)),
            (Role::Table, Some(table.id)),
            (Role::NestedScale, nested.map(|(scales, _)| scales.id)),
            (Role::NestedTable, nested.map(|(_, table)| table.id)),
            (Role::Description, Some(state.id)),
        ]),
        recipe: Recipe {
            scale: Some(Scale { grid, global: None }),
            ..Recipe::of(
                rows,
                cols,
                Codes::RowsHighFirst { row_stride_bytes: cols.div_ceil(2) },
                Element::Table,
            )
        }
        .into(),
    })
}

/// Blocks run on across the ends of rows. Where they divide rows, or rows them, the matrix is kept; else it is one row of everything.
fn layout(shape: &[u64], numel: u64, block: u64, number: Number) -> (u64, u64, crate::quant::Grid) {
    let cols = shape.last().copied().unwrap_or(1);
    let rows = numel / cols.max(1);
    if cols.is_multiple_of(2) && cols.is_multiple_of(block) {
        (rows, cols, grid(number, [1, block], [cols / block, 1]))
    } else if cols.is_multiple_of(2) && block.is_multiple_of(cols) {
        (rows, cols, grid(number, [block / cols, cols], [1, 0]))
    } else {
        (1, numel, grid(number, [1, block], [0, 1]))
    }
}

/// Tells whether bytes that a storage dtype rounds up hold so many.
fn is_padded(len_bytes: u64, needed: u64) -> bool {
    len_bytes >= needed && len_bytes - needed < 8
}

/// What `quant_state` says.
struct Description {
    shape: Vec<u64>,
    block: u32,
    /// Scales that share a scale, and what is added to them.
    nested: Option<(u32, f32)>,
}

impl Description {
    fn read(scene: &Scene<'_>, state: &TensorRef<'_>) -> Result<Description, QuantError> {
        let json = Json::parse(state.info.name, scene.value(state)?)?;
        let bad = |key: &str, expected: &str| {
            let found = json.get(key).map_or("nothing".to_owned(), |value| value.to_string());
            wrong_value(state, format!("{key} {found}"), expected)
        };
        let positive = |value: &Json| {
            value.as_whole().and_then(|value| u32::try_from(value).ok()).filter(|value| *value > 0)
        };
        let quant_type = json.get("quant_type").and_then(Json::as_text);
        if !matches!(quant_type, Some("nf4" | "fp4")) {
            return Err(bad("quant_type", "nf4 or fp4"));
        }
        let block =
            json.get("blocksize").and_then(positive).ok_or_else(|| bad("blocksize", "a positive number"))?;
        let dim = |dim: &Json| dim.as_whole().and_then(|dim| u64::try_from(dim).ok());
        let shape = json.get("shape").and_then(|shape| shape.as_list()?.iter().map(dim).collect());
        let shape = shape.ok_or_else(|| bad("shape", "a list of dims"))?;
        let nested = match json.get("nested_blocksize") {
            None => None,
            Some(per_scale) => {
                let per_scale =
                    positive(per_scale).ok_or_else(|| bad("nested_blocksize", "a positive number"))?;
                let offset = json.get("nested_offset").and_then(Json::as_real);
                Some((per_scale, offset.ok_or_else(|| bad("nested_offset", "a number"))? as f32))
            }
        };
        Ok(Description { shape, block, nested })
    }
}

/// Joins an 8-bit weight: I8 `[N, K]`, `SCB` F32 `[N]`, `weight_format` that says rows are in order.
pub(super) fn int8(scene: &Scene<'_>, payload: &TensorRef<'_>) -> Result<Group, QuantError> {
    let (base, _) = split(payload.info.name);
    let scale = scene.need(payload, base, "SCB", "scale")?;
    let format = scene.find(base, "weight_format");
    let [rows, cols] = two_dims(payload)?;
    check_dtype(&scale, &[Dtype::F32])?;
    if !matches!(*scale.info.shape, [n] | [n, 1] if n == rows) {
        return Err(wrong_shape(&scale, format!("[{rows}]")));
    }
    if let Some(format) = &format
        && scene.value(format)?.iter().any(|byte| *byte != 0)
    {
        return Err(unsupported("bitsandbytes int8", format, "a weight_format other than 0 (row)"));
    }
    Ok(Group {
        name: payload.info.name.to_owned(),
        shape: vec![rows, cols],
        family: Family::Bitsandbytes,
        bits: 8,
        group_size: None,
        is_plain_transposed: false,
        is_symmetric: Some(true),
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(scale.id)),
            (Role::Description, format.map(|format| format.id)),
        ]),
        recipe: Recipe {
            scale: Some(Scale { grid: grid(Number::F32, [1, cols], [1, 0]), global: None }),
            factor: Some(1.0 / 127.0),
            ..Recipe::of(rows, cols, Codes::Rows { bits: 8, row_stride_bytes: cols }, Element::Signed)
        }
        .into(),
    })
}
