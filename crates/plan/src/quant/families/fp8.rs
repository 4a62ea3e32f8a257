//! FP8: one scale for a tensor, a row, a column, or a block; scales always multiply, whatever they are called.

use super::{fold, plain};
use crate::checkpoint::TensorRef;
use crate::dtype::Dtype;
use crate::quant::config::{Algorithm, GroupSize, Method, Strategy};
use crate::quant::scene::{
    Matrices, Scene, ambiguous, float_number, grid, group_size, matrices, members, missing, module, numel,
    split, wrong_dtype, wrong_shape,
};
use crate::quant::{Codes, Element, Family, Grid, Group, Number, QuantError, Recipe, Role, Scale};

/// Joins a tensor of an 8-bit float dtype with its scale; one without is a cast, unless the configuration promises a scale.
///
/// # Source
/// DeepSeek-V3, `inference/kernel.py` (`weight_dequant`); transformers, `integrations/{finegrained_fp8,fbgemm_fp8}.py`;
/// compressed-tensors 0.20.0, `entrypoints/convert/converters/fp8block_dequantizer.py`.
pub(in crate::quant) fn recognize(scene: &Scene<'_>, payload: &TensorRef<'_>) -> Result<Group, QuantError> {
    let (base, leaf) = split(payload.info.name);
    let scale = match leaf {
        "weight" => scene.find_any(base, SCALES_OF_WEIGHT),
        _ => SUFFIXES_OF_EXPERTS.iter().find_map(|suffix| scene.find(payload.info.name, suffix)),
    };
    let Some(scale) = scale else {
        // Experts in one tensor have names of their own.
        let is_weight = leaf == "weight" || payload.info.shape.len() > 2;
        if is_weight && !scene.config.is_excluded(module(base)) && is_promised(scene, module(base)) {
            return Err(missing(payload, &[payload.info.name, "_scale"].concat(), "scale"));
        }
        return plain::recognize(payload);
    };
    scene.config.check_excluded(module(base), payload.info.name)?;
    join(scene, payload, &scale, block(scene, module(base)))
}

/// Joins a payload with its scale. `block` is what the configuration says.
pub(super) fn join(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    block: Option<[u64; 2]>,
) -> Result<Group, QuantError> {
    let (base, _) = split(payload.info.name);
    let number = number(scale)?;
    let size = sizes(payload)?;
    let (size, grid) = granularity(scene, payload, scale, size, number, block)?;
    let is_mx = number == Number::E8m0 && grid.cols_per_group == 32 && grid.col_stride != 0;
    let (fold, fold_id) = fold(scene, base, size.cols)?;
    Ok(Group {
        name: payload.info.name.to_owned(),
        shape: payload.info.shape.to_vec(),
        family: if is_mx { Family::Mx } else { Family::Fp8 },
        bits: 8,
        group_size: group_size(u64::from(grid.cols_per_group), size.cols)
            .filter(|_| grid.rows_per_group == 1),
        is_plain_transposed: false,
        is_symmetric: None,
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(scale.id)),
            (Role::Fold, fold_id),
        ]),
        recipe: Recipe {
            batch: size.batch,
            scale: Some(Scale { grid, global: None }),
            fold,
            ..Recipe::of(
                size.rows,
                size.cols,
                Codes::Rows { bits: 8, row_stride_bytes: size.cols },
                element(payload)?,
            )
        }
        .into(),
    })
}

/// Returns the matrices that a payload's scales may differ by: experts; the rows of a convolution.
fn sizes(payload: &TensorRef<'_>) -> Result<Matrices, QuantError> {
    match *payload.info.shape {
        // Convolutions: a row for each output channel.
        [rows, ref rest @ ..] if rest.len() > 2 => {
            Ok(Matrices { batch: 1, rows, cols: rest.iter().product() })
        }
        _ => matrices(payload),
    }
}

/// Decides by the scale's shape, and by the configuration where there are blocks.
fn granularity(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    size: Matrices,
    number: Number,
    block: Option<[u64; 2]>,
) -> Result<(Matrices, Grid), QuantError> {
    let Matrices { batch, rows, cols } = size;
    let is_fused = matches!(&scene.config.method, Method::Fp8(config) if config.is_fbgemm);
    if let Some([block_rows, block_cols]) = block {
        let groups = [rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
        if is_grid(scale.info.shape, batch, groups) {
            return Ok((size, block_grid(number, [block_rows, block_cols], groups, batch)));
        }
    }
    let mx_groups = [rows, cols.div_ceil(32)];
    if number == Number::E8m0 && is_grid(scale.info.shape, batch, mx_groups) && cols > 32 {
        return Ok((size, block_grid(number, [1, 32], mx_groups, batch)));
    }
    if let Some([block_rows, block_cols]) = block {
        let groups = [rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
        let expected = format!("{groups:?}, blocks of {block_rows} rows by {block_cols} columns,");
        return Err(wrong_shape(scale, expected));
    }
    if numel(scale) == 1 {
        let whole = Matrices { batch: 1, rows: batch * rows, cols };
        return Ok((whole, grid(number, [batch * rows, cols], [0, 0])));
    }
    let strided = |batch_stride, grid: Grid| (size, Grid { batch_stride, ..grid });
    let by_matrix = || strided(1, grid(number, [rows, cols], [0, 0]));
    let by_row = || strided(if batch > 1 { rows } else { 0 }, grid(number, [1, cols], [1, 0]));
    let by_column = || strided(if batch > 1 { cols } else { 0 }, grid(number, [rows, 1], [0, 1]));
    Ok(match (scale.info.shape, payload.info.shape.len()) {
        ([n], 0..=2 | 4..) | ([n, 1], 0..=2) if *n == rows => by_row(),
        ([n, rest @ ..], 4..) if *n == rows && rest.iter().all(|dim| *dim == 1) => by_row(),
        ([1, k], 0..=2) if *k == cols => by_column(),
        ([e] | [e, 1] | [e, 1, 1], 3) if *e == batch => by_matrix(),
        ([e, 1, k], 3) if *e == batch && *k == cols => by_column(),
        // FBGEMM's fused experts are stored `[E, K, N]`, with a scale for each of the last dimension.
        ([e, k, 1], 3) if *e == batch && *k == cols && (is_fused || rows != cols) => by_column(),
        ([e, n, 1] | [e, n], 3) if *e == batch && *n == rows => by_row(),
        ([_, _] | [_, 1, _, 1] | [_, _, _], _) => {
            let readings = "FP8 with blocks of any size";
            return Err(ambiguous(payload, readings, scene.config.key("weight_block_size")));
        }
        _ => return Err(wrong_shape(scale, format!("one number, or [{rows}]"))),
    })
}

/// Tells whether a scale's shape is `[batch, groups]`; ModelOpt writes `[rows, 1, cols, 1]`.
fn is_grid(shape: &[u64], batch: u64, [rows, cols]: [u64; 2]) -> bool {
    match *shape {
        [r, c] => batch == 1 && [r, c] == [rows, cols],
        [e, r, c] => [e, r, c] == [batch, rows, cols],
        [r, 1, c, 1] => batch == 1 && [r, c] == [rows, cols],
        _ => false,
    }
}

fn block_grid(number: Number, block: [u64; 2], groups: [u64; 2], batch: u64) -> Grid {
    let batch_stride = if batch > 1 { groups[0] * groups[1] } else { 0 };
    Grid { batch_stride, ..grid(number, block, [groups[1], 1]) }
}

/// Returns the rows and columns of a block that the configuration says.
fn block(scene: &Scene<'_>, module: &str) -> Option<[u64; 2]> {
    let wide = |block: [u32; 2]| block.map(u64::from);
    let of_group = |size| match size {
        Some(GroupSize::Columns(size)) => Some([1, u64::from(size)]),
        _ => None,
    };
    match &scene.config.method {
        Method::Fp8(config) => config.block.map(wide),
        Method::CompressedTensors(config) => {
            let scheme = config.scheme(module)?;
            match scheme.strategy {
                Some(Strategy::Block) => scheme.block.map(wide),
                Some(Strategy::Group) => of_group(scheme.group_size),
                _ => None,
            }
        }
        Method::Modelopt(config) => match config.algorithm(module)? {
            Algorithm::Fp8Blocks => Some([128, 128]),
            Algorithm::Mxfp8 => Some([1, 32]),
            _ => None,
        },
        Method::Quark(config) => {
            let weight = config.weight(module)?;
            let of_group = || weight.is_per_group.then(|| of_group(weight.group_size)).flatten();
            weight.block.map(wide).or_else(of_group)
        }
        _ => None,
    }
}

/// Tells whether the configuration says that this module has a scale.
fn is_promised(scene: &Scene<'_>, module: &str) -> bool {
    match &scene.config.method {
        Method::Fp8(_) => true,
        Method::CompressedTensors(config) => config.scheme(module).is_some_and(|scheme| scheme.is_float),
        Method::Modelopt(config) => config.algorithm(module).is_some(),
        Method::Quark(config) => config.weight(module).is_some(),
        _ => false,
    }
}

fn number(scale: &TensorRef<'_>) -> Result<Number, QuantError> {
    match scale.info.dtype {
        Dtype::F8E8m0 | Dtype::U8 => Ok(Number::E8m0),
        _ => float_number(scale).map_err(|_| wrong_dtype(scale, "F32, F16, BF16, F8_E8M0 or U8")),
    }
}

/// Returns what the codes of a dtype are.
pub(super) fn element(payload: &TensorRef<'_>) -> Result<Element, QuantError> {
    match payload.info.dtype {
        Dtype::F8E4m3 => Ok(Element::E4m3),
        Dtype::F8E5m2 => Ok(Element::E5m2),
        Dtype::F8E4m3Fnuz => Ok(Element::E4m3Fnuz),
        Dtype::F8E5m2Fnuz => Ok(Element::E5m2Fnuz),
        Dtype::F8E8m0 => Ok(Element::E8m0),
        _ => Err(wrong_dtype(payload, "F8_E4M3 or F8_E5M2")),
    }
}

const SCALES_OF_WEIGHT: &[&str] =
    &["weight_scale_inv", "weight_scale", "scale_weight", "qscale_weight", "scale"];
const SUFFIXES_OF_EXPERTS: &[&str] = &["_scale_inv", "_scale", "_weight_scale_inv", "_weight_scale"];
