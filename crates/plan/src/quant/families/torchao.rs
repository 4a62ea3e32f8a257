//! torchao: a header's `__metadata__` says which tensors make up which, and how.

use std::collections::BTreeMap;

use super::mx::{self, BLOCK, Packing};
use super::nvfp4::{self, Convention};
use super::{fp8, swizzled};
use crate::checkpoint::{Checkpoint, TensorRef};
use crate::dtype::Dtype;
use crate::quant::config::Json;
use crate::quant::scene::{
    Matrices, Scene, check_dtype, float_number, grid, group_size, matrices, members, numel, two_dims,
    unsupported, wrong_shape,
};
use crate::quant::{
    Codes, Element, Family, Grid, Group, Number, QuantError, Recipe, Role, Scale, ZeroOffset, ZeroPoint,
};

/// A quantized tensor that metadata describes.
#[derive(Clone, Debug)]
pub(in crate::quant) struct Entry {
    /// The name of the result.
    pub(in crate::quant) name: String,
    kind: String,
    data: Json,
}

impl Entry {
    /// Returns the beginning of the stored tensors' names: `a.weight` is stored as `a._weight_qdata` and others.
    fn base(&self) -> String {
        let (module, parameter) = crate::quant::scene::split(&self.name);
        format!("{module}_{parameter}_")
    }

    /// Returns the codes, under the name that tells that there are some.
    pub(in crate::quant) fn payload<'c>(&self, checkpoint: &'c Checkpoint) -> Option<TensorRef<'c>> {
        checkpoint.find(&(self.base() + "qdata"))
    }

    fn flag(&self, key: &str) -> bool {
        self.data.get(key).and_then(Json::as_flag).unwrap_or(false)
    }

    /// Returns rows and columns that share a scale; `None` where it is not said, or an empty list says all.
    fn block(&self) -> Option<[u64; 2]> {
        let side = |side: &Json| side.as_whole().map(|side| u64::try_from(side).unwrap_or(u64::MAX).max(1));
        match self.data.get("block_size")?.as_list()? {
            [rows, cols] => Some([side(rows)?, side(cols)?]),
            _ => None,
        }
    }
}

/// Reads the quantized tensors that a file's metadata lists.
pub(in crate::quant) fn entries(
    file: &str,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<Entry>, QuantError> {
    let Some(names) = metadata.get("tensor_names") else { return Ok(Vec::new()) };
    let parse = |key: &str, text: &str| Json::parse(&format!("{file}: __metadata__.{key}"), text.as_bytes());
    // Writers of other kinds may have a key of this name, which then holds no list.
    let Ok(Json::List(names)) = parse("tensor_names", names) else { return Ok(Vec::new()) };
    let mut entries = Vec::new();
    for name in names.iter().filter_map(Json::as_text) {
        let Some(text) = metadata.get(name) else { continue };
        let json = parse(name, text)?;
        let Some(kind) = json.get("_type").and_then(Json::as_text) else { continue };
        if kind == "Tensor" || kind == "Parameter" {
            continue;
        }
        let data = json.get("_data").cloned().unwrap_or(Json::Null);
        entries.push(Entry { name: name.to_owned(), kind: kind.to_owned(), data });
    }
    Ok(entries)
}

/// Joins the tensors of an entry.
///
/// # Source
/// pytorch/ao, commit 36027d82: `torchao/prototype/safetensors/`, `torchao/quantization/quantize_/workflows/`.
pub(in crate::quant) fn recognize(
    scene: &Scene<'_>,
    entry: &Entry,
    payload: &TensorRef<'_>,
) -> Result<Group, QuantError> {
    let base = entry.base();
    let find = |field: &str| scene.find(&base, field);
    let need = |field: &str, what| scene.need(payload, &base, field, what);
    match &*entry.kind {
        "Float8Tensor" => {
            let scale = need("scale", "scale")?;
            let mut group = fp8::join(scene, payload, &scale, float8_block(entry, payload, &scale)?)?;
            group.name.clone_from(&entry.name);
            Ok(group)
        }
        "Int8Tensor" | "IntxUnpackedToInt8Tensor" => {
            int8(entry, payload, &need("scale", "scale")?, find("zero_point"))
        }
        "Int4Tensor" => int4(entry, payload, &need("scale", "scales")?, &need("zero_point", "zero-points")?),
        "MXTensor" => {
            if !matches!(entry.data.get("block_size").and_then(Json::as_whole), None | Some(32)) {
                return Err(unsupported("torchao MX", payload, "blocks other than 32"));
            }
            mx(scene, entry, payload, &need("scale", "scales")?)
        }
        "NVFP4Tensor" => {
            let convention =
                Convention { is_swizzled: entry.flag("is_swizzled_scales"), ..Convention::default() };
            let scale = need("scale", "scales")?;
            let global = find("per_tensor_scale");
            nvfp4::join(scene, payload, &scale, global.as_ref(), convention, entry.name.clone())
        }
        other => Err(unsupported("torchao", payload, other)),
    }
}

/// Returns the block of a float: what is said, or a row where scales are one a row. An empty list is the whole tensor.
fn float8_block(
    entry: &Entry,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
) -> Result<Option<[u64; 2]>, QuantError> {
    let Some([rows, cols]) = entry.block() else { return Ok(None) };
    let size = matrices(payload)?;
    let block = [rows.min(size.rows.max(1)), cols.min(size.cols.max(1))];
    // One number, of whatever shape, needs no block.
    Ok((numel(scale) > 1).then_some(block))
}

/// `qdata` I8 `[N, K]`, `scale` and `zero_point` `[N / rows, K / cols]` of a block.
fn int8(
    entry: &Entry,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    zeros: Option<TensorRef<'_>>,
) -> Result<Group, QuantError> {
    check_dtype(payload, &[Dtype::I8])?;
    let number = float_number(scale)?;
    let [rows, cols] = two_dims(payload)?;
    let (rows_max, cols_max) = (rows.max(1), cols.max(1));
    let [block_rows, block_cols] = match (entry.block(), numel(scale)) {
        (Some(block), _) => block,
        (None, 1) => [rows_max, cols_max],
        (None, count) if count == rows => [1, cols_max],
        (None, _) => return Err(wrong_shape(scale, format!("one number or [{rows}, 1]"))),
    };
    let block = [block_rows.min(rows_max), block_cols.min(cols_max)];
    let groups = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
    if numel(scale) != groups[0] * groups[1] {
        return Err(wrong_shape(scale, format!("{groups:?}")));
    }
    let strides = [if groups[0] > 1 { groups[1] } else { 0 }, u64::from(groups[1] > 1)];
    let grid = |number| grid(number, block, strides);
    let zero_point = match &zeros {
        None => ZeroPoint::None,
        Some(zeros) => {
            if numel(zeros) != numel(scale) {
                return Err(wrong_shape(zeros, format!("{groups:?}, as the scales have,")));
            }
            match zeros.info.dtype {
                Dtype::I8 if block[0] == 1 => ZeroPoint::Packed {
                    codes: Codes::Rows { bits: 8, row_stride_bytes: strides[0] },
                    is_swapped: false,
                    is_signed: true,
                    offset: ZeroOffset::Constant(0),
                },
                Dtype::I8 => ZeroPoint::Float(grid(Number::I8)),
                _ => ZeroPoint::Float(grid(float_number(zeros)?)),
            }
        }
    };
    Ok(Group {
        name: entry.name.clone(),
        shape: vec![rows, cols],
        family: Family::Torchao,
        bits: 8,
        group_size: group_size(block[1], cols),
        is_plain_transposed: false,
        is_symmetric: Some(zeros.is_none()),
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(scale.id)),
            (Role::ZeroPoint, zeros.map(|zeros| zeros.id)),
        ]),
        recipe: Recipe {
            zero_point,
            scale: Some(Scale { grid: grid(number), global: None }),
            ..Recipe::of(rows, cols, Codes::Rows { bits: 8, row_stride_bytes: cols }, Element::Signed)
        }
        .into(),
    })
}

/// `qdata` `[N, K / 2]` of two's complement, `scale` and `zero_point` `[K / g, N]`: `q * scale + zero_point`.
fn int4(
    entry: &Entry,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    zeros: &TensorRef<'_>,
) -> Result<Group, QuantError> {
    check_dtype(payload, &[Dtype::I8, Dtype::U8])?;
    let (number, zero_number) = (float_number(scale)?, float_number(zeros)?);
    let ([rows, bytes], [groups, scale_rows]) = (two_dims(payload)?, two_dims(scale)?);
    let cols = bytes * 2;
    let per_group = match entry.block() {
        Some([1, size]) => size,
        _ if groups > 0 && cols % groups == 0 => cols / groups,
        _ => 0,
    };
    if per_group == 0 || scale_rows != rows || cols.div_ceil(per_group) != groups {
        return Err(wrong_shape(scale, format!("[groups, {rows}] of {cols} columns")));
    }
    if zeros.info.shape != scale.info.shape {
        return Err(wrong_shape(zeros, format!("{:?}, as the scales have,", scale.info.shape)));
    }
    let grid = |number| grid(number, [1, per_group], [1, rows]);
    Ok(Group {
        name: entry.name.clone(),
        shape: vec![rows, cols],
        family: Family::Torchao,
        bits: 4,
        group_size: group_size(per_group, cols),
        is_plain_transposed: false,
        is_symmetric: Some(false),
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(scale.id)),
            (Role::Bias, Some(zeros.id)),
        ]),
        recipe: Recipe {
            scale: Some(Scale { grid: grid(number), global: None }),
            bias: Some(grid(zero_number)),
            ..Recipe::of(rows, cols, Codes::Rows { bits: 4, row_stride_bytes: bytes }, Element::Signed)
        }
        .into(),
    })
}

/// `qdata` of 8-bit floats or packed 4-bit ones, `scale` of exponents, in rows or in tiles.
fn mx(
    scene: &Scene<'_>,
    entry: &Entry,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
) -> Result<Group, QuantError> {
    let is_swizzled = entry.flag("is_swizzled_scales");
    if matches!(payload.info.dtype, Dtype::U8 | Dtype::F4) {
        let name = entry.name.clone();
        return mx::join_laid_out(scene, payload, scale, Packing::FP4, is_swizzled, name);
    }
    mxfp8(payload, scale, is_swizzled, entry.name.clone())
}

/// 8-bit floats `[N, K]` with a scale for each 32 columns.
pub(super) fn mxfp8(
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    is_swizzled: bool,
    name: String,
) -> Result<Group, QuantError> {
    check_dtype(scale, &[Dtype::F8E8m0, Dtype::U8])?;
    let size = matrices(payload)?;
    let grid: Grid = match is_swizzled {
        true => swizzled(scale, size, [1, BLOCK], Number::E8m0)?,
        false => {
            let leading = &payload.info.shape[..payload.info.shape.len().saturating_sub(2)];
            super::blocks(scale, leading, size, [1, BLOCK], Number::E8m0)?
        }
    };
    let Matrices { batch, rows, cols } = size;
    Ok(Group {
        name,
        shape: payload.info.shape.to_vec(),
        family: Family::Mx,
        bits: 8,
        group_size: Some(BLOCK as u32),
        is_plain_transposed: false,
        is_symmetric: None,
        members: members([(Role::Payload, Some(payload.id)), (Role::Scale, Some(scale.id))]),
        recipe: Recipe {
            batch,
            scale: Some(Scale { grid, global: None }),
            ..Recipe::of(rows, cols, Codes::Rows { bits: 8, row_stride_bytes: cols }, fp8::element(payload)?)
        }
        .into(),
    })
}

/// Says that an entry's codes are in none of the files.
pub(in crate::quant) fn missing_payload(entry: &Entry) -> QuantError {
    let tensor = entry.name.clone();
    QuantError::Missing { tensor, missing: entry.base() + "qdata", what: "codes" }
}
