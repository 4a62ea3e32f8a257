//! ComfyUI: single files whose header, or a small tensor beside each weight, names the format of each layer.

use std::collections::{BTreeMap, HashMap};

use super::nvfp4::{self, Convention};
use super::{compressed_tensors, fp8, plain, torchao};
use crate::checkpoint::{TensorId, TensorRef};
use crate::dtype::Dtype;
use crate::quant::config::Json;
use crate::quant::scene::{Scene, check_dtype, module, split, unsupported};
use crate::quant::values::Values;
use crate::quant::{Family, Group, QuantError};

/// The formats of layers, by module; for a layer whose description cannot be read, what is wrong with it. Such a layer is refused,
/// because others store NVFP4 under the same names in another order.
#[derive(Clone, Debug, Default)]
pub(in crate::quant) struct Layers {
    formats: HashMap<String, Result<String, QuantError>>,
}

impl Layers {
    /// Adds the layers that a file's metadata lists.
    pub(in crate::quant) fn add_metadata(
        &mut self,
        file: &str,
        metadata: &BTreeMap<String, String>,
    ) -> Result<(), QuantError> {
        let Some(text) = metadata.get(METADATA) else { return Ok(()) };
        let file = format!("{file}: __metadata__.{METADATA}");
        let json = Json::parse(&file, text.as_bytes())?;
        for (layer, value) in json.get("layers").and_then(Json::as_map).into_iter().flatten() {
            self.formats.insert(layer.clone(), format_of(&file, layer, value));
        }
        Ok(())
    }

    /// Adds the layer that a `comfy_quant` tensor describes.
    pub(in crate::quant) fn add_tensor(&mut self, name: &str, id: TensorId, values: &Values) {
        let layer = module(split(name).0);
        let json = match values.get(id) {
            Some(bytes) => Json::parse(name, bytes),
            None => Err(QuantError::NotRead { tensor: name.to_owned() }),
        };
        let format = json.and_then(|json| format_of(name, layer, &json));
        self.formats.insert(layer.to_owned(), format);
    }

    /// Returns the format of a module, if it is a layer that is described.
    pub(in crate::quant) fn format(&self, module: &str) -> Option<Result<&str, QuantError>> {
        let format = self.formats.get(module)?;
        Some(format.as_deref().map_err(QuantError::clone))
    }
}

fn format_of(file: &str, layer: &str, json: &Json) -> Result<String, QuantError> {
    let format = json.get("format");
    format.and_then(Json::as_text).map(str::to_owned).ok_or_else(|| QuantError::ConfigValue {
        file: file.to_owned(),
        key: format!("{layer}.format"),
        found: format.map_or("missing".to_owned(), Json::to_string),
        expected: "a format's name".to_owned(),
    })
}

/// The key of a header's `__metadata__`.
const METADATA: &str = "_quantization_metadata";

/// Joins a `weight` whose module has a format. Rows and columns of NVFP4 that writers padded to 16 stay.
///
/// # Source
/// ComfyUI, `QUANTIZATION.md`; comfy-kitchen 0.2.40, `backends/eager/quantization.py`.
pub(in crate::quant) fn recognize(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    format: &str,
) -> Result<Group, QuantError> {
    let (base, _) = split(payload.info.name);
    let name = || payload.info.name.to_owned();
    match format {
        "float8_e4m3fn" | "float8_e5m2" => {
            check_dtype(payload, &[Dtype::F8E4m3, Dtype::F8E5m2])?;
            match scene.find_any(base, &["weight_scale", "scale_weight"]) {
                Some(scale) => fp8::join(scene, payload, &scale, None),
                None => plain::recognize(payload),
            }
        }
        "nvfp4" => {
            check_dtype(payload, &[Dtype::U8])?;
            let scale = scene.need(payload, base, "weight_scale", "scales")?;
            let global = scene.need(payload, base, "weight_scale_2", "global scale")?;
            let convention = Convention { is_high_first: true, is_swizzled: true, is_divisor: false };
            nvfp4::join(scene, payload, &scale, Some(&global), convention, name())
        }
        "mxfp8" => {
            let scale = scene.need(payload, base, "weight_scale", "scales")?;
            torchao::mxfp8(payload, &scale, true, name())
        }
        "int8_tensorwise" => {
            let scale = scene.need(payload, base, "weight_scale", "scale")?;
            compressed_tensors::int8(payload, &scale, None, None, Family::Comfy, name())
        }
        other => Err(unsupported("ComfyUI", payload, other)),
    }
}
