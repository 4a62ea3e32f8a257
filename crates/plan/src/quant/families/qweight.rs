//! `qweight`, which GPTQ and AWQ share: which of them, by the configuration and confirmed by shapes.

use super::{awq, gptq};
use crate::checkpoint::TensorRef;
use crate::dtype::Dtype;
use crate::quant::config::{AwqLayout, Layout, Method};
use crate::quant::scene::{Scene, ambiguous, contradiction, split, two_dims, unsupported};
use crate::quant::{Group, QuantError};

pub(in crate::quant) fn recognize(scene: &Scene<'_>, payload: &TensorRef<'_>) -> Result<Group, QuantError> {
    let configured = match &scene.config.method {
        Method::Packed(packed) => Some(packed.layout),
        Method::None => None,
        // AutoRound's and others' mixtures name another method; the tensors are what they are.
        _ => None,
    };
    let found = by_shape(scene, payload)?;
    let layout = match (configured, found.as_slice()) {
        // Writers of GPTQ may use other words than 32 bits, which shapes do not tell.
        (Some(layout), found) if found.contains(&layout) || found.is_empty() => layout,
        (Some(layout), found) => {
            let config = format!("{} says {}", scene.config.source, name(layout));
            return Err(contradiction(
                payload,
                config,
                format!("its shapes are those of {}", name(found[0])),
            ));
        }
        (None, [layout]) => *layout,
        (None, []) => {
            return Err(unsupported("qweight", payload, "a layout that is neither GPTQ's nor AWQ's"));
        }
        (None, _) => return Err(ambiguous(payload, "GPTQ or AWQ", scene.config.key("quant_method"))),
    };
    match layout {
        Layout::Gptq => gptq::recognize(scene, payload),
        Layout::Awq(layout) => awq::recognize(scene, payload, layout),
    }
}

/// Returns the layouts that the shapes of `qweight` and `scales` fit.
fn by_shape(scene: &Scene<'_>, payload: &TensorRef<'_>) -> Result<Vec<Layout>, QuantError> {
    let (base, _) = split(payload.info.name);
    let scales = scene.need(payload, base, "scales", "scales")?;
    let ([rows, cols], [scale_rows, scale_cols]) = (two_dims(payload)?, two_dims(&scales)?);
    let has_float_zeros = scene
        .find(base, "qzeros")
        .is_some_and(|zeros| matches!(zeros.info.dtype, Dtype::F16 | Dtype::Bf16 | Dtype::F32));
    let mut found = Vec::new();
    if matches!(payload.info.dtype, Dtype::I16 | Dtype::U16) && has_float_zeros {
        if scale_cols == rows * 4 {
            found.push(Layout::Awq(AwqLayout::Fast));
        }
        return Ok(found);
    }
    if scale_cols == cols {
        found.push(Layout::Gptq);
    }
    if scale_cols == cols.saturating_mul(8) && !has_group_index(scene, base) {
        found.push(Layout::Awq(AwqLayout::Gemm));
    }
    let zero_cols = scene.find(base, "qzeros").and_then(|zeros| zeros.info.shape.last().copied());
    let is_padded = zero_cols.is_some_and(|words| words.checked_mul(8) == Some(scale_cols));
    if scale_rows == rows && is_padded && !has_group_index(scene, base) {
        found.push(Layout::Awq(AwqLayout::Gemv));
    }
    Ok(found)
}

/// AWQ never has one.
fn has_group_index(scene: &Scene<'_>, base: &str) -> bool {
    scene.find(base, "g_idx").is_some()
}

fn name(layout: Layout) -> &'static str {
    match layout {
        Layout::Gptq => "GPTQ",
        Layout::Awq(AwqLayout::Gemm) => "AWQ's GEMM layout",
        Layout::Awq(AwqLayout::Gemv) => "AWQ's GEMV layout",
        Layout::Awq(AwqLayout::Fast) => "AWQ's GEMVFast layout",
    }
}
