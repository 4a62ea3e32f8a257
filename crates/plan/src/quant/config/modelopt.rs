//! ModelOpt's configuration.

use std::collections::HashMap;

use super::{GroupSize, Json, Method, Section};
use crate::quant::QuantError;

/// What ModelOpt says.
#[derive(Clone, Debug)]
pub(in crate::quant) struct ModeloptConfig {
    /// `None` where each layer has its own.
    default: Option<Layer>,
    layers: HashMap<String, Layer>,
}

#[derive(Clone, Debug)]
struct Layer {
    algorithm: Algorithm,
    group_size: Option<GroupSize>,
}

/// What `quant_algo` says about weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::quant) enum Algorithm {
    Fp8,
    Fp8Blocks,
    Nvfp4,
    Mxfp4,
    Mxfp8,
    Int4,
    Int8,
    /// Not one that can be dequantized.
    Other(String),
}

impl ModeloptConfig {
    /// Returns what a module is quantized with.
    pub(in crate::quant) fn algorithm(&self, module: &str) -> Option<&Algorithm> {
        Some(&self.layer(module)?.algorithm)
    }

    pub(in crate::quant) fn group_size(&self, module: &str) -> Option<GroupSize> {
        self.layer(module)?.group_size
    }

    fn layer(&self, module: &str) -> Option<&Layer> {
        self.layers.get(module).or(self.default.as_ref())
    }
}

pub(super) fn read(section: &Section<'_>) -> Result<Method, QuantError> {
    // The first versions nested what matters.
    let nested = section.section("quantization")?;
    let section = nested.as_ref().unwrap_or(section);
    let mut config = ModeloptConfig { default: None, layers: HashMap::new() };
    match section.text(&["quant_algo"])? {
        None | Some("MIXED_PRECISION") => {}
        Some(algorithm) => config.default = Some(layer(section, algorithm)?),
    }
    if let Some(layers) = section.section("quantized_layers")? {
        for (module, value) in layers.map {
            let Json::Map(map) = value else { continue };
            let own = Section { file: section.file, path: layers.key(module), map };
            if let Some(algorithm) = own.text(&["quant_algo"])? {
                config.layers.insert(module.clone(), layer(&own, algorithm)?);
            }
        }
    }
    Ok(Method::Modelopt(config))
}

fn layer(section: &Section<'_>, algorithm: &str) -> Result<Layer, QuantError> {
    let algorithm = match algorithm.to_ascii_uppercase().as_str() {
        "FP8" | "FP8_PER_CHANNEL_PER_TOKEN" => Algorithm::Fp8,
        "FP8_PB_WO" | "FP8_PB_REAL" | "FP8_BLOCK_SCALES" => Algorithm::Fp8Blocks,
        "NVFP4" | "W4A16_NVFP4" | "W4A8_NVFP4_FP8" | "NVFP4_AWQ" | "NVFP4_SVD" | "NVFP4_SVDQUANT" => {
            Algorithm::Nvfp4
        }
        "MXFP4" | "W4A8_MXFP4_FP8" | "W4A16_MXFP4" => Algorithm::Mxfp4,
        "MXFP8" => Algorithm::Mxfp8,
        "W4A16_AWQ" | "W4A8_AWQ" | "INT4_AWQ" | "W4A16" => Algorithm::Int4,
        "W8A16" | "W8A8_SQ_PER_CHANNEL" | "INT8_SQ" | "INT8" => Algorithm::Int8,
        _ => Algorithm::Other(algorithm.to_owned()),
    };
    Ok(Layer { algorithm, group_size: section.group_size(&["group_size"])? })
}
