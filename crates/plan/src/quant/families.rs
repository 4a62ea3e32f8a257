//! One file for each family: from the tensors of a module to a group.

pub(super) mod awq;
pub(super) mod bitsandbytes;
pub(super) mod bytes;
pub(super) mod comfy;
pub(super) mod compressed_tensors;
pub(super) mod fp8;
pub(super) mod gptq;
pub(super) mod hqq;
pub(super) mod mlx;
pub(super) mod mx;
pub(super) mod nvfp4;
pub(super) mod plain;
pub(super) mod quark;
pub(super) mod qweight;
pub(super) mod torchao;

use super::scene::{Matrices, Scene, check_shape, float_number, grid, numel, wrong_shape};
use super::{Grid, Number, QuantError};
use crate::checkpoint::{TensorId, TensorRef};
use crate::dtype::Dtype;

/// Returns the grid of scales `[leading, rows / r, cols / c]` in row-major order, after checking that this is their shape.
fn blocks(
    scale: &TensorRef<'_>,
    leading: &[u64],
    size: Matrices,
    per_group: [u64; 2],
    number: Number,
) -> Result<Grid, QuantError> {
    let groups = [size.rows.div_ceil(per_group[0]), size.cols.div_ceil(per_group[1])];
    check_shape(scale, &[leading, &groups].concat())?;
    let batch_stride = if size.batch > 1 { groups[0] * groups[1] } else { 0 };
    Ok(Grid { batch_stride, ..grid(number, per_group, [groups[1], 1]) })
}

/// As [`blocks`] for one matrix, with scales in tiles of 128 by 4.
///
/// # Source
/// cuBLAS, "1D block scaling factors layout".
fn swizzled(
    scale: &TensorRef<'_>,
    size: Matrices,
    per_group: [u64; 2],
    number: Number,
) -> Result<Grid, QuantError> {
    let rows = size.rows.div_ceil(per_group[0]).next_multiple_of(128);
    let cols = size.cols.div_ceil(per_group[1]).next_multiple_of(4);
    if size.batch != 1 || numel(scale) != rows * cols {
        return Err(wrong_shape(scale, format!("[{rows}, {cols}], tiles of 128 by 4 for one matrix,")));
    }
    Ok(Grid { is_swizzled: true, ..grid(number, per_group, [cols, 1]) })
}

/// Finds the vector that may be folded into the weight's columns.
fn fold(scene: &Scene<'_>, base: &str, cols: u64) -> Result<(Option<Dtype>, Option<TensorId>), QuantError> {
    let Some(tensor) = scene.find(base, "pre_quant_scale") else { return Ok((None, None)) };
    float_number(&tensor)?;
    match numel(&tensor) == cols {
        true => Ok((Some(tensor.info.dtype), Some(tensor.id))),
        false => Err(wrong_shape(&tensor, format!("[{cols}], a number for each column,"))),
    }
}
