//! GPTQ's, AWQ's and AutoRound's configurations.

use super::{GroupSize, Method, Patterns, Section, Syntax};
use crate::quant::QuantError;
use crate::quant::config::{CtConfig, Fp8Config, Json};

/// What GPTQ and its relatives say.
#[derive(Clone, Debug)]
pub(in crate::quant) struct PackedConfig {
    pub(in crate::quant) layout: Layout,
    /// Rule 0, for modules that no pattern matches.
    default: PackedRule,
    patterns: Patterns,
    /// For each pattern its rule; `None` where it excludes.
    overrides: Vec<Option<PackedRule>>,
    pub(in crate::quant) overrides_key: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::quant) enum Layout {
    Gptq,
    Awq(AwqLayout),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::quant) enum AwqLayout {
    Gemm,
    Gemv,
    Fast,
}

/// What holds for a module.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::quant) struct PackedRule {
    pub(in crate::quant) bits: Option<u8>,
    pub(in crate::quant) group_size: Option<GroupSize>,
    pub(in crate::quant) is_symmetric: Option<bool>,
    pub(in crate::quant) zeros: Option<StoredZeros>,
}

/// How zero-points are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::quant) enum StoredZeros {
    /// One less than they are: the first GPTQ format.
    MinusOne,
    /// As they are: the second.
    Plain,
    /// As they are, in planes, as the codes.
    Planes,
}

impl PackedConfig {
    pub(in crate::quant) fn is_gptq(&self) -> bool {
        self.layout == Layout::Gptq
    }

    /// Returns the number of the module's rule, 0 for the default.
    pub(in crate::quant) fn rule_index(&self, module: &str) -> usize {
        self.patterns.first(module).map_or(0, |place| place + 1)
    }

    /// Returns a rule by its number.
    pub(in crate::quant) fn rule(&self, index: usize) -> PackedRule {
        match index.checked_sub(1) {
            None => self.default,
            Some(place) => self.overrides[place].unwrap_or(self.default),
        }
    }

    /// Returns the pattern that excludes the module.
    pub(super) fn excluding(&self, module: &str) -> Option<&str> {
        let place = self.patterns.first(module)?;
        self.overrides[place].is_none().then(|| self.patterns.text(place))
    }
}

pub(super) fn gptq(section: &Section<'_>) -> Result<Method, QuantError> {
    let mut default = rule(section)?;
    default.zeros = match section.text(&["checkpoint_format", "format"])? {
        None | Some("gptq" | "gemm") => Some(StoredZeros::MinusOne),
        Some("gptq_v2") => Some(StoredZeros::Plain),
        Some("gptq_p") => Some(StoredZeros::Planes),
        Some(other) => return Ok(Method::Foreign(format!("GPTQ in the {other:?} layout"))),
    };
    let (mut patterns, mut overrides) = (Vec::new(), Vec::new());
    if let Some(dynamic) = section.section("dynamic")? {
        for (pattern, value) in dynamic.map {
            let (text, is_excluded) = match (pattern.strip_prefix("-:"), pattern.strip_prefix("+:")) {
                (Some(text), _) => (text, true),
                (None, Some(text)) => (text, false),
                (None, None) => (pattern.as_str(), false),
            };
            patterns.push((Syntax::Regex, text));
            overrides.push(match value {
                _ if is_excluded => None,
                Json::Map(map) => {
                    let own = Section { file: section.file, path: dynamic.key(pattern), map };
                    Some(rule(&own)?.or(default))
                }
                _ => Some(default),
            });
        }
    }
    let patterns = Patterns::new(section.file, &section.key("dynamic"), patterns)?;
    Ok(Method::Packed(PackedConfig {
        layout: Layout::Gptq,
        default,
        patterns,
        overrides,
        overrides_key: "dynamic",
    }))
}

pub(super) fn awq(section: &Section<'_>) -> Result<Method, QuantError> {
    let version = match section.text(&["backend"])? {
        Some("llm-awq") => Some("gemv_fast"),
        _ => section.text(&["version", "checkpoint_format", "format"])?,
    };
    let layout = match version.unwrap_or("gemm").to_ascii_lowercase().as_str() {
        "gemm" | "exllama" | "ipex" => AwqLayout::Gemm,
        "gemv" => AwqLayout::Gemv,
        "gemv_fast" | "gemvfast" => AwqLayout::Fast,
        other => return Ok(Method::Foreign(format!("AWQ in the {other:?} layout"))),
    };
    let mut default = rule(section)?;
    default.is_symmetric = section.flag(&["zero_point"])?.map(|has_zero_point| !has_zero_point);
    Ok(Method::Packed(PackedConfig {
        layout: Layout::Awq(layout),
        default,
        patterns: Patterns::none(),
        overrides: Vec::new(),
        overrides_key: "modules_to_not_convert",
    }))
}

/// AutoRound writes the layouts of others, which `packing_format` names.
pub(super) fn auto_round(section: &Section<'_>) -> Result<Method, QuantError> {
    let packing = section.text(&["packing_format"])?.unwrap_or("auto_round");
    let (layout, zeros) = match packing {
        _ if packing.contains("awq") => (Layout::Awq(AwqLayout::Gemm), None),
        _ if packing.contains("fp8") => {
            let block = section.block(&["weight_block_size"])?;
            return Ok(Method::Fp8(Fp8Config { block, is_fbgemm: false }));
        }
        _ if packing.contains("llm_compressor") => {
            return Ok(Method::CompressedTensors(CtConfig::unspecified()));
        }
        _ if packing.contains("gptq") => (Layout::Gptq, Some(StoredZeros::MinusOne)),
        // Its own: as GPTQ, but which of the two zero-points is written changed between versions.
        _ => (Layout::Gptq, None),
    };
    let default = PackedRule { zeros, ..rule(section)? };
    let (mut patterns, mut overrides) = (Vec::new(), Vec::new());
    if let Some(extra) = section.section("extra_config")? {
        for (module, value) in extra.map {
            let Json::Map(map) = value else { continue };
            let own = Section { file: section.file, path: extra.key(module), map };
            let rule = rule(&own)?.or(default);
            // Names hold dots; what else is special makes a pattern.
            let is_pattern = module.contains(['*', '\\', '[', '(', '|', '+', '^', '$']);
            patterns.push((if is_pattern { Syntax::Regex } else { Syntax::Exact }, module.as_str()));
            overrides.push((rule.bits.is_none_or(|bits| bits < 16)).then_some(rule));
        }
    }
    let patterns = Patterns::new(section.file, &section.key("extra_config"), patterns)?;
    Ok(Method::Packed(PackedConfig { layout, default, patterns, overrides, overrides_key: "extra_config" }))
}

fn rule(section: &Section<'_>) -> Result<PackedRule, QuantError> {
    Ok(PackedRule {
        bits: section.bits(&["bits", "w_bit", "wbits"])?,
        group_size: section.group_size(&["group_size", "q_group_size"])?,
        is_symmetric: section.flag(&["sym"])?,
        zeros: None,
    })
}

impl PackedRule {
    /// Fills in what this rule leaves open.
    fn or(self, default: PackedRule) -> PackedRule {
        PackedRule {
            bits: self.bits.or(default.bits),
            group_size: self.group_size.or(default.group_size),
            is_symmetric: self.is_symmetric.or(default.is_symmetric),
            zeros: self.zeros.or(default.zeros),
        }
    }
}
