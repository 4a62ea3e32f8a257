//! `weight` of bytes, or of 4-bit and 6-bit floats: which of the formats that store it so, by the scale's dtype and shape.

use super::mx::{self, Packing};
use super::nvfp4::{self, Convention};
use super::{bitsandbytes, compressed_tensors, fold, plain, quark};
use crate::checkpoint::TensorRef;
use crate::dtype::Dtype;
use crate::quant::config::{Algorithm, GroupSize, Method, Strategy};
use crate::quant::scene::{
    Scene, ambiguous, contradiction, float_number, grid, group_size, members, missing, module, split,
    two_dims, unsupported, wrong_shape,
};
use crate::quant::{Codes, Element, Family, Group, QuantError, Recipe, Role, Scale};

/// Joins a `weight`; `None` where it is no quantized one.
pub(in crate::quant) fn recognize(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
) -> Result<Option<Group>, QuantError> {
    let (base, _) = split(payload.info.name);
    let module = module(base);
    let is_plain_float = !matches!(payload.info.dtype, Dtype::U8 | Dtype::I8);
    if payload.info.dtype == Dtype::I8 && scene.find(base, "SCB").is_some() {
        return bitsandbytes::int8(scene, payload).map(Some);
    }
    let Some(scale) = scene.find_any(base, &["weight_scale", "scale"]) else {
        if is_plain_float {
            return plain::recognize(payload).map(Some);
        }
        return without_scale(scene, payload, module);
    };
    scene.config.check_excluded(module, payload.info.name)?;
    check_supported(scene, payload, module)?;
    let name = || payload.info.name.to_owned();
    let global = scene.find(base, "weight_scale_2");
    let is_tiles = scale.info.shape.len() == 1 && scale.info.dtype == Dtype::U8 && global.is_some();
    let group = match (scale.info.dtype, payload.info.dtype) {
        (Dtype::F8E4m3, Dtype::U8 | Dtype::F4) => {
            let global = scene.need(payload, base, "weight_scale_2", "global scale")?;
            nvfp4::join(scene, payload, &scale, Some(&global), Convention::default(), name())
        }
        (_, Dtype::U8) if is_tiles => {
            nvfp4::join(scene, payload, &scale, global.as_ref(), Convention::default(), name())
        }
        (Dtype::U8 | Dtype::F8E8m0, _) => {
            let packing = mx_packing(scene, payload, &scale, module)?;
            mx::join(scene, payload, &scale, packing, name())
        }
        (_, Dtype::I8) => {
            let zeros = scene.find(base, "weight_zero_point");
            let (family, size, is_asymmetric) = match &scene.config.method {
                Method::Modelopt(config) => (Family::Modelopt, config.group_size(module), false),
                Method::Quark(config) => {
                    let weight = config.weight(module);
                    let size =
                        weight.filter(|weight| weight.is_per_group).and_then(|weight| weight.group_size);
                    (Family::Quark, size, weight.is_some_and(|weight| weight.is_symmetric == Some(false)))
                }
                Method::CompressedTensors(config) => {
                    let scheme = config.scheme(module);
                    let size = scheme.filter(|scheme| scheme.strategy == Some(Strategy::Group));
                    let size = size.and_then(|scheme| scheme.group_size);
                    (Family::CompressedTensors, size, scheme.is_some_and(|scheme| !scheme.is_symmetric))
                }
                _ => (Family::CompressedTensors, None, false),
            };
            if is_asymmetric && zeros.is_none() {
                return Err(missing(payload, &[base, "weight_zero_point"].concat(), "zero-points"));
            }
            compressed_tensors::int8(payload, &scale, zeros.as_ref(), size, family, name())
        }
        (_, Dtype::U8) => int4(scene, payload, &scale, global.as_ref(), module),
        _ => Err(unsupported("scaled floats", payload, format!("scales of dtype {}", scale.info.dtype))),
    };
    group.map(Some)
}

fn without_scale(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    module: &str,
) -> Result<Option<Group>, QuantError> {
    let name = payload.info.name;
    if scene.config.is_excluded(module) || scene.find(name, ".absmax").is_some() {
        return Ok(None); // In the second case the tensor that describes it is what is recognised.
    }
    let lacks = |name: String, what| Err(missing(payload, &name, what));
    let missing = |leaf: &str, what| lacks([name, leaf].concat(), what);
    let beside = |leaf: &str, what| lacks([split(name).0, leaf].concat(), what);
    match &scene.config.method {
        Method::Quark(config) => match config.weight(module) {
            Some(weight) if weight.dtype == "mx" || weight.dtype == "mx6" || weight.dtype == "mx9" => {
                quark::inline_scales(payload, weight).map(Some)
            }
            Some(_) => missing("_scale", "scale"),
            None => Ok(None),
        },
        Method::Modelopt(config) if config.algorithm(module).is_some() => {
            check_supported(scene, payload, module)?;
            missing("_scale", "scale")
        }
        Method::CompressedTensors(config) if config.scheme(module).is_some() => missing("_scale", "scale"),
        Method::Bitsandbytes if payload.info.dtype == Dtype::U8 => missing(".absmax", "scales"),
        Method::Bitsandbytes => beside("SCB", "scale"),
        Method::Fp8(_) if payload.info.dtype == Dtype::I8 => beside("scale", "scale"),
        _ => Ok(None),
    }
}

/// Refuses what the configuration names and nothing here reads.
fn check_supported(scene: &Scene<'_>, payload: &TensorRef<'_>, module: &str) -> Result<(), QuantError> {
    match &scene.config.method {
        Method::Modelopt(config) => match config.algorithm(module) {
            Some(Algorithm::Other(name)) => Err(unsupported("ModelOpt", payload, name.as_str())),
            _ => Ok(()),
        },
        Method::Quark(config) => match config.weight(module) {
            Some(weight) if matches!(&*weight.dtype, "int3" | "uint3" | "int2" | "uint2") => {
                Err(unsupported("Quark", payload, weight.dtype.as_str()))
            }
            _ => Ok(()),
        },
        _ => Ok(()),
    }
}

/// Decides between 4 and 6 bits by how many bytes 32 columns take, and between the kinds of 6 bits by the configuration.
fn mx_packing(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    module: &str,
) -> Result<Packing, QuantError> {
    match payload.info.dtype {
        Dtype::F4 => return Ok(Packing::FP4),
        Dtype::F6E2m3 => return Ok(Packing::FP6_E2M3),
        Dtype::F6E3m2 => return Ok(Packing::FP6_E3M2),
        _ => {}
    }
    let (Some(bytes), Some(groups)) = (payload.info.shape.last(), scale.info.shape.last()) else {
        return Err(wrong_shape(scale, "a scale for each 32 columns"));
    };
    let is_six = groups.checked_mul(24) == Some(*bytes);
    let dtype = match &scene.config.method {
        Method::Quark(config) => config.weight(module).map(|weight| &*weight.dtype),
        _ => None,
    };
    match (is_six, dtype) {
        (false, Some(dtype)) if dtype.starts_with("fp6") => Err(contradiction(
            payload,
            format!("{} says {dtype}", scene.config.source),
            "its rows are not of 6-bit codes",
        )),
        (false, _) => Ok(Packing::FP4),
        (true, Some("fp6_e2m3")) => Ok(Packing::FP6_E2M3),
        (true, Some("fp6_e3m2")) => Ok(Packing::FP6_E3M2),
        (true, _) => {
            let key = scene.config.key("global_quant_config.weight.dtype");
            Err(ambiguous(payload, "MXFP6 of E2M3 or E3M2", key))
        }
    }
}

/// Joins ModelOpt's INT4: bytes `[N / 2, K]` of two rows each, scales `[N, K / g]`.
///
/// W4A8_AWQ adds a second scale for the 8-bit floats that its kernels compute in; whether the first has it in already is written
/// nowhere, so that it is refused.
///
/// # Source
/// nvidia-modelopt 0.47.0, `torch/export/quant_utils.py` (`pack_int4_in_uint8`).
fn int4(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    second: Option<&TensorRef<'_>>,
    module: &str,
) -> Result<Group, QuantError> {
    if second.is_some() {
        return Err(unsupported("ModelOpt INT4", payload, "a second scale (W4A8_AWQ)"));
    }
    let number = float_number(scale)?;
    let ([pairs, cols], [scale_rows, groups]) = (two_dims(payload)?, two_dims(scale)?);
    let rows = pairs * 2;
    if scale_rows != rows {
        return Err(wrong_shape(scale, format!("[{rows}, groups], for two rows a byte,")));
    }
    let configured = match &scene.config.method {
        Method::Modelopt(config) => config.group_size(module),
        _ => None,
    };
    let per_group = match configured {
        Some(GroupSize::Columns(size)) => u64::from(size).max(1),
        Some(GroupSize::AllColumns) => cols,
        None if groups > 0 && cols.is_multiple_of(groups) => cols / groups,
        None => {
            return Err(ambiguous(payload, "INT4 of several group sizes", scene.config.key("group_size")));
        }
    };
    if cols.div_ceil(per_group) != groups {
        return Err(wrong_shape(scale, format!("[{rows}, {}]", cols.div_ceil(per_group))));
    }
    let (fold, fold_id) = fold(scene, split(payload.info.name).0, cols)?;
    Ok(Group {
        name: payload.info.name.to_owned(),
        shape: vec![rows, cols],
        family: Family::Modelopt,
        bits: 4,
        group_size: group_size(per_group, cols),
        is_plain_transposed: false,
        is_symmetric: Some(true),
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(scale.id)),
            (Role::Fold, fold_id),
        ]),
        recipe: Recipe {
            scale: Some(Scale { grid: grid(number, [1, per_group], [groups, 1]), global: None }),
            fold,
            ..Recipe::of(rows, cols, Codes::RowPairs, Element::Signed)
        }
        .into(),
    })
}
