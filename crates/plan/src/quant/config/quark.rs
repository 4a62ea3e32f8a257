//! Quark's configuration.

use super::{GroupSize, Json, Patterns, Section, Syntax};
use crate::quant::QuantError;

/// What Quark says.
#[derive(Clone, Debug)]
pub(in crate::quant) struct QuarkConfig {
    default: Option<QuarkWeight>,
    patterns: Patterns,
    /// For each pattern of `layer_quant_config` its weights; `None` where it leaves them alone.
    layers: Vec<Option<QuarkWeight>>,
    /// Whether 32-bit words are in AWQ's order.
    pub(in crate::quant) is_reordered: bool,
}

/// How weights are quantized.
#[derive(Clone, Debug)]
pub(in crate::quant) struct QuarkWeight {
    pub(in crate::quant) dtype: String,
    pub(in crate::quant) is_per_group: bool,
    pub(in crate::quant) is_symmetric: Option<bool>,
    pub(in crate::quant) group_size: Option<GroupSize>,
    pub(in crate::quant) block: Option<[u32; 2]>,
}

impl QuarkConfig {
    pub(in crate::quant) fn weight(&self, module: &str) -> Option<&QuarkWeight> {
        match self.patterns.first(module) {
            Some(place) => self.layers[place].as_ref(),
            None => self.default.as_ref(),
        }
    }
}

pub(super) fn read(section: &Section<'_>) -> Result<QuarkConfig, QuantError> {
    let default = section.section("global_quant_config")?;
    let default = default.map(|default| weight(&default)).transpose()?.flatten();
    let (mut patterns, mut layers) = (Vec::new(), Vec::new());
    if let Some(list) = section.section("layer_quant_config")? {
        for (pattern, value) in list.map {
            let own = match value {
                Json::Map(map) => weight(&Section { file: section.file, path: list.key(pattern), map })?,
                _ => None,
            };
            patterns.push((Syntax::Wildcards, pattern.as_str()));
            layers.push(own);
        }
    }
    let patterns = Patterns::new(section.file, &section.key("layer_quant_config"), patterns)?;
    let export = section.section("export")?;
    let pack_method = export.map(|export| export.text(&["pack_method"])).transpose()?.flatten();
    let is_reordered = pack_method.is_none_or(|method| method == "reorder");
    Ok(QuarkConfig { default, patterns, layers, is_reordered })
}

fn weight(section: &Section<'_>) -> Result<Option<QuarkWeight>, QuantError> {
    let (path, map) = match section.get(&["weight"]) {
        Some((key, Json::Map(map))) => (section.key(key), map),
        // Two levels of scales: the first describes the codes.
        Some((key, Json::List(list))) => match list.first() {
            Some(Json::Map(map)) => (format!("{}[0]", section.key(key)), map),
            _ => return Ok(None),
        },
        _ => return Ok(None),
    };
    let own = Section { file: section.file, path, map };
    let Some(dtype) = own.text(&["dtype"])? else { return Ok(None) };
    Ok(Some(QuarkWeight {
        dtype: dtype.to_owned(),
        is_per_group: own.text(&["qscheme"])? == Some("per_group"),
        is_symmetric: own.flag(&["symmetric"])?,
        group_size: own.group_size(&["group_size"])?,
        block: own.block(&["block_size"])?,
    }))
}
