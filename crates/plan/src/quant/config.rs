//! Configurations of quantized checkpoints: texts in, one typed description out.
//!
//! Read from, the first that is there: `config.json` (`quantization_config`, `compression_config`, either also in nested objects such
//! as `text_config`; MLX's `quantization`), `quantize_config.json`, `quant_config.json`, `hf_quant_config.json`. What a header's
//! `__metadata__` says is read with the families that write it.

mod compressed_tensors;
mod json;
mod modelopt;
mod packed;
mod patterns;
mod quark;
mod section;

pub(super) use compressed_tensors::{CtConfig, CtScheme, Strategy};
pub(super) use json::Json;
pub(super) use modelopt::{Algorithm, ModeloptConfig};
pub(super) use packed::{AwqLayout, Layout, PackedConfig, PackedRule, StoredZeros};
pub(super) use patterns::{Patterns, Syntax};
pub(super) use quark::{QuarkConfig, QuarkWeight};
pub(super) use section::{GroupSize, Section};

use std::collections::HashMap;

use super::QuantError;

/// The texts that may describe how a checkpoint is quantized, by file name. The caller reads them; absent ones are left out.
#[derive(Clone, Debug, Default)]
pub struct Configs {
    texts: Vec<(String, Vec<u8>)>,
}

impl Configs {
    /// The names of the files to look for beside the tensors, in the order in which they are asked.
    pub const FILES: [&'static str; 4] =
        ["config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"];

    /// The longest text that is accepted, for a caller that would rather not read more.
    pub const LEN_BYTES_MAX: u64 = json::CONFIG_LEN_BYTES_MAX;

    /// Returns no texts: tensors alone, and the headers' metadata, must say what they are.
    pub fn none() -> Configs {
        Configs::default()
    }

    /// Adds a file's text. Names other than [`Configs::FILES`] are not looked at.
    pub fn insert(&mut self, file: impl Into<String>, bytes: impl Into<Vec<u8>>) {
        self.texts.push((file.into(), bytes.into()));
    }

    fn text(&self, file: &str) -> Option<&[u8]> {
        self.texts.iter().find(|(name, _)| name == file).map(|(_, bytes)| &**bytes)
    }
}

/// What the configurations say.
#[derive(Clone, Debug)]
pub(super) struct Config {
    /// The file and key it is from, for errors; empty where there is none.
    pub(super) source: String,
    pub(super) method: Method,
    /// Modules that are not quantized.
    excluded: Patterns,
    /// The file and key of those.
    excluded_source: String,
    pub(super) warnings: Vec<String>,
}

/// How a checkpoint is quantized, as far as its configuration says.
#[derive(Clone, Debug)]
pub(super) enum Method {
    /// Nothing says it.
    None,
    /// GPTQ, AWQ, AutoRound.
    Packed(PackedConfig),
    Fp8(Fp8Config),
    CompressedTensors(CtConfig),
    Modelopt(ModeloptConfig),
    /// gpt-oss.
    Mxfp4,
    Bitsandbytes,
    Torchao,
    Hqq,
    Quark(QuarkConfig),
    Mlx(MlxConfig),
    /// One that cannot be dequantized here, by its name.
    Foreign(String),
}

#[derive(Clone, Debug)]
pub(super) struct Fp8Config {
    pub(super) block: Option<[u32; 2]>,
    /// FBGEMM's fused experts have a scale for each of the last dimension.
    pub(super) is_fbgemm: bool,
}

#[derive(Clone, Debug)]
pub(super) struct MlxConfig {
    pub(super) default: MlxRule,
    /// By module; `None` where it is excluded.
    pub(super) overrides: HashMap<String, Option<MlxRule>>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct MlxRule {
    pub(super) bits: Option<u8>,
    pub(super) group_size: Option<GroupSize>,
    pub(super) mode: MlxMode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MlxMode {
    Affine,
    Mxfp4,
    Mxfp8,
    Nvfp4,
}

impl Config {
    /// Reads the first configuration that is there.
    pub(super) fn read(configs: &Configs) -> Result<Config, QuantError> {
        for file in Configs::FILES {
            let Some(bytes) = configs.text(file) else { continue };
            let json = Json::parse(file, bytes)?;
            let Json::Map(map) = &json else {
                return Err(QuantError::ConfigValue {
                    file: file.to_owned(),
                    key: "(top)".to_owned(),
                    found: json.to_string(),
                    expected: "an object".to_owned(),
                });
            };
            let top = Section { file, path: String::new(), map };
            let section = match file {
                "config.json" => quantization(&top, 0)?,
                "hf_quant_config.json" => top.section("quantization")?,
                _ => Some(top),
            };
            if let Some(section) = section {
                return Config::of(&section);
            }
        }
        Ok(Config::none())
    }

    fn none() -> Config {
        Config {
            source: String::new(),
            method: Method::None,
            excluded: Patterns::none(),
            excluded_source: String::new(),
            warnings: Vec::new(),
        }
    }

    fn of(section: &Section<'_>) -> Result<Config, QuantError> {
        let mut config = Config::none();
        config.source = match section.path.as_str() {
            "" => section.file.to_owned(),
            path => format!("{}: {path}", section.file),
        };
        let name = match method_name(section)? {
            Some(name) => name,
            None => return Ok(config),
        };
        let is_marlin = section.flag(&["is_marlin_format"])?.unwrap_or(false);
        config.method = match name {
            _ if is_marlin => Method::Foreign("Marlin".to_owned()),
            "gptq" | "gptqmodel" => packed::gptq(section)?,
            "awq" => packed::awq(section)?,
            "auto-round" | "auto_round" | "intel/auto-round" | "inc" => packed::auto_round(section)?,
            "fp8" | "fbgemm_fp8" => Method::Fp8(Fp8Config {
                block: section.block(&["weight_block_size"])?,
                is_fbgemm: name == "fbgemm_fp8",
            }),
            "compressed-tensors" | "compressed_tensors" => compressed_tensors::read(section)?,
            "modelopt" | "modelopt_fp4" | "modelopt_mixed" | "modelopt_mxfp8" => modelopt::read(section)?,
            "mxfp4" | "gpt_oss_mxfp4" => Method::Mxfp4,
            "bitsandbytes" => Method::Bitsandbytes,
            "torchao" => Method::Torchao,
            "hqq" => Method::Hqq,
            "quark" => Method::Quark(quark::read(section)?),
            "mlx" | "metal" => Method::Mlx(mlx(section)?),
            other => Method::Foreign(other.to_owned()),
        };
        config.read_excluded(section)?;
        Ok(config)
    }

    /// Reads which modules are not quantized. Of formats whose files describe themselves the list says nothing that the files do not.
    fn read_excluded(&mut self, section: &Section<'_>) -> Result<(), QuantError> {
        let (keys, syntax): (&[&'static str], Syntax) = match &self.method {
            Method::Packed(config) if !config.is_gptq() => (&["modules_to_not_convert"], Syntax::Part),
            Method::Fp8(_) => (&["ignored_layers", "modules_to_not_convert"], Syntax::Exact),
            Method::CompressedTensors(_) => (&["ignore"], Syntax::Exact),
            Method::Modelopt(_) => (&["exclude_modules", "ignore"], Syntax::Wildcards),
            Method::Mxfp4 => (&["modules_to_not_convert"], Syntax::Wildcards),
            Method::Quark(_) => (&["exclude"], Syntax::Wildcards),
            _ => return Ok(()),
        };
        let Some((key, _)) = section.get(keys) else { return Ok(()) };
        let texts = section.texts(keys)?;
        let patterns = texts.iter().map(|text| match text.strip_prefix("re:") {
            Some(regex) => (Syntax::Regex, regex),
            None => (syntax, *text),
        });
        self.excluded_source = format!("{}: {}", section.file, section.key(key));
        match Patterns::new(section.file, &section.key(key), patterns) {
            Ok(patterns) => self.excluded = patterns,
            // The tensors themselves say which are quantized; the list is a check on them.
            Err(error) => self.warnings.push(format!("{error}; the list is not checked against the tensors")),
        }
        Ok(())
    }

    /// Returns an error if the module is excluded.
    pub(super) fn check_excluded(&self, module: &str, tensor: &str) -> Result<(), QuantError> {
        let excluded = |config: &str, pattern: &str| {
            let (tensor, config, pattern) = (tensor.to_owned(), config.to_owned(), pattern.to_owned());
            Err(QuantError::Excluded { tensor, config, pattern })
        };
        if let Some(place) = self.excluded.first(module) {
            return excluded(&self.excluded_source, self.excluded.text(place));
        }
        match &self.method {
            Method::Packed(config) => match config.excluding(module) {
                Some(pattern) => excluded(&format!("{}.{}", self.source, config.overrides_key), pattern),
                None => Ok(()),
            },
            Method::Mlx(config) if matches!(config.overrides.get(module), Some(None)) => {
                excluded(&self.source, module)
            }
            _ => Ok(()),
        }
    }

    /// Tells whether the module is excluded.
    pub(super) fn is_excluded(&self, module: &str) -> bool {
        self.check_excluded(module, "").is_err()
    }

    /// Names a key of this configuration for errors that ask for it.
    pub(super) fn key(&self, key: &str) -> String {
        match self.source.as_str() {
            "" => format!("quantization_config.{key} in config.json"),
            source => format!("{key} in {source}"),
        }
    }
}

/// Finds the object that describes the quantization.
fn quantization<'j>(section: &Section<'j>, depth: usize) -> Result<Option<Section<'j>>, QuantError> {
    let found = match section.section("quantization_config")? {
        Some(found) => Some(found),
        None => section.section("compression_config")?,
    };
    // MLX writes its own under both keys, the first without a method.
    let is_complete = found.as_ref().is_some_and(|found| method_name(found).is_ok_and(|name| name.is_some()));
    if !is_complete && section.get(&["quantization"]).is_some_and(|(_, value)| value.get("bits").is_some()) {
        return section.section("quantization");
    }
    if found.as_ref().is_some_and(|found| !found.map.is_empty()) || depth == CONFIG_DEPTH_MAX {
        return Ok(found);
    }
    for (key, value) in section.map {
        if let Json::Map(map) = value {
            let nested = Section { file: section.file, path: section.key(key), map };
            if let Some(found) = quantization(&nested, depth + 1)? {
                return Ok(Some(found));
            }
        }
    }
    Ok(None)
}

/// Returns the method's name, or what the keys of a configuration without one leave no doubt about.
fn method_name<'j>(section: &Section<'j>) -> Result<Option<&'j str>, QuantError> {
    if let Some(name) = section.text(&["quant_method", "method"])? {
        return Ok(Some(name));
    }
    let has = |key| section.has(key);
    let producer = section.get(&["producer"]).and_then(|(_, producer)| producer.get("name")?.as_text());
    Ok(if has("quant_algo") || has("quantized_layers") || producer == Some("modelopt") {
        Some("modelopt")
    } else if has("global_quant_config") {
        Some("quark")
    } else if has("config_groups") || has("sparsity_config") {
        Some("compressed-tensors")
    } else if has("load_in_4bit") || has("load_in_8bit") {
        Some("bitsandbytes")
    } else if section.path.ends_with("quantization") {
        Some("mlx")
    } else if has("zero_point") || has("w_bit") {
        Some("awq")
    } else if has("desc_act") || has("sym") || has("damp_percent") {
        Some("gptq")
    } else {
        None
    })
}

fn mlx(section: &Section<'_>) -> Result<MlxConfig, QuantError> {
    let mut overrides = HashMap::new();
    for (module, value) in section.map {
        match value {
            Json::Map(map) => {
                let own = Section { file: section.file, path: section.key(module), map };
                overrides.insert(module.clone(), Some(mlx_rule(&own)?));
            }
            Json::Flag(false) => _ = overrides.insert(module.clone(), None),
            _ => {}
        }
    }
    Ok(MlxConfig { default: mlx_rule(section)?, overrides })
}

fn mlx_rule(section: &Section<'_>) -> Result<MlxRule, QuantError> {
    let mode = match section.text(&["mode"])? {
        None | Some("affine") => MlxMode::Affine,
        Some("mxfp4") => MlxMode::Mxfp4,
        Some("mxfp8") => MlxMode::Mxfp8,
        Some("nvfp4") => MlxMode::Nvfp4,
        Some(other) => {
            let found = Json::Text(other.to_owned());
            return Err(section.error("mode", &found, "affine, mxfp4, mxfp8 or nvfp4"));
        }
    };
    Ok(MlxRule { bits: section.bits(&["bits"])?, group_size: section.group_size(&["group_size"])?, mode })
}

/// How deep `quantization_config` may be nested: `thinker_config.text_config` is two.
const CONFIG_DEPTH_MAX: usize = 3;
