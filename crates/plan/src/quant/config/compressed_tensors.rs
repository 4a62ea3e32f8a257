//! compressed-tensors' configuration.

use super::{GroupSize, Json, Method, Patterns, Section, Syntax};
use crate::quant::QuantError;

/// What compressed-tensors says.
#[derive(Clone, Debug)]
pub(in crate::quant) struct CtConfig {
    schemes: Vec<CtScheme>,
    targets: Patterns,
    /// For each target the scheme it selects.
    target_schemes: Vec<usize>,
    /// The scheme of modules that no name and no pattern selects; targets by class cannot be told from files.
    default: Option<usize>,
}

/// How the weights of a group of modules are quantized.
#[derive(Clone, Debug)]
pub(in crate::quant) struct CtScheme {
    pub(in crate::quant) bits: Option<u8>,
    pub(in crate::quant) is_float: bool,
    pub(in crate::quant) is_symmetric: bool,
    pub(in crate::quant) strategy: Option<Strategy>,
    pub(in crate::quant) group_size: Option<GroupSize>,
    pub(in crate::quant) block: Option<[u32; 2]>,
    pub(in crate::quant) format: Option<String>,
}

/// What shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::quant) enum Strategy {
    Tensor,
    Channel,
    Group,
    Block,
}

impl CtConfig {
    /// A configuration that leaves everything to the tensors.
    pub(in crate::quant) fn unspecified() -> CtConfig {
        CtConfig { schemes: Vec::new(), targets: Patterns::none(), target_schemes: Vec::new(), default: None }
    }

    /// Returns the scheme of a module.
    pub(in crate::quant) fn scheme(&self, module: &str) -> Option<&CtScheme> {
        let named = self.targets.first(module).map(|place| self.target_schemes[place]);
        named.or(self.default).map(|scheme| &self.schemes[scheme])
    }
}

pub(super) fn read(section: &Section<'_>) -> Result<Method, QuantError> {
    let format = section.text(&["format"])?;
    let sparsity = section.section("sparsity_config")?;
    let sparsity_format = sparsity.map(|sparsity| sparsity.text(&["format"])).transpose()?.flatten();
    for format in [format, sparsity_format].into_iter().flatten() {
        if matches!(format, "marlin-24" | "sparse-24-bitmask" | "sparse-bitmask") {
            return Ok(Method::Foreign(format!("compressed-tensors {format:?}")));
        }
    }
    let mut config = CtConfig::unspecified();
    let Some(groups) = section.section("config_groups")? else {
        return Ok(Method::CompressedTensors(config));
    };
    let mut targets = Vec::new();
    for (name, value) in groups.map {
        let Json::Map(map) = value else { continue };
        let group = Section { file: section.file, path: groups.key(name), map };
        let Some(weights) = group.section("weights")? else { continue };
        let own_format = group.text(&["format"])?.or(format).filter(|format| *format != "mixed-precision");
        let index = config.schemes.len();
        config.schemes.push(scheme(&weights, own_format)?);
        for target in group.texts(&["targets"])? {
            match target.strip_prefix("re:") {
                Some(regex) => targets.push((Syntax::Regex, regex, index)),
                None if is_class(target) => {
                    if config.default.is_none() || target == "Linear" {
                        config.default = Some(index);
                    }
                }
                None => targets.push((Syntax::Exact, target, index)),
            }
        }
    }
    if let ([_], None, true) = (&*config.schemes, config.default, targets.is_empty()) {
        config.default = Some(0);
    }
    // Names come before patterns.
    targets.sort_by_key(|(syntax, ..)| *syntax != Syntax::Exact);
    config.target_schemes = targets.iter().map(|(.., index)| *index).collect();
    let patterns = targets.iter().map(|(syntax, text, _)| (*syntax, *text));
    config.targets = Patterns::new(section.file, &groups.path, patterns)?;
    Ok(Method::CompressedTensors(config))
}

fn scheme(weights: &Section<'_>, format: Option<&str>) -> Result<CtScheme, QuantError> {
    let strategy = match weights.text(&["strategy"])? {
        Some("tensor") => Some(Strategy::Tensor),
        Some("channel") => Some(Strategy::Channel),
        Some("group" | "tensor_group") => Some(Strategy::Group),
        Some("block") => Some(Strategy::Block),
        _ => None,
    };
    Ok(CtScheme {
        bits: weights.bits(&["num_bits"])?,
        is_float: weights.text(&["type"])? == Some("float"),
        is_symmetric: weights.flag(&["symmetric"])?.unwrap_or(true),
        strategy,
        group_size: weights.group_size(&["group_size"])?,
        block: weights.block(&["block_structure"])?,
        format: format.map(str::to_owned),
    })
}

/// Tells a class such as `Linear` from a module's name.
fn is_class(target: &str) -> bool {
    !target.contains('.') && target.starts_with(|first: char| first.is_ascii_uppercase())
}
