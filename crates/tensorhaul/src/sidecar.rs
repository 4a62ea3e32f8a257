//! The files that belong to a checkpoint but hold no tensors: configuration, tokenizer.

use std::fs;
use std::io::Read;
use std::path::Path;

use tensorhaul_io::OpenFile;
use tensorhaul_plan::Dtype;

use crate::atomic::NewFile;
use crate::convert::LeftOut;
use crate::error::{Error, Result};
use crate::locate::{check_inside, read_limited};
use crate::model::Model;
use crate::save::OutFolder;

/// What changes for the configuration.
#[derive(Clone, Copy)]
pub(crate) struct Change {
    /// The dtype that most tensors have now.
    pub(crate) dtype: Option<Dtype>,
    /// Whether nothing is quantized any more.
    pub(crate) plain: bool,
}

/// Copies a model's sidecar files, and writes into `config.json` what changes. Nothing has its name yet.
pub(crate) fn copy(
    model: &Model,
    folder: &OutFolder,
    change: Change,
    left_out: &mut Vec<LeftOut>,
) -> Result<Vec<NewFile>> {
    let source = model.folder();
    if !has_sidecars(model) {
        return Ok(Vec::new());
    }
    let listing = |error| Error::io("listing it", source, error);
    let (mut names, mut strangers) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(source).map_err(listing)? {
        // A name that is no UTF-8 is none of these.
        if let Ok(name) = entry.map_err(listing)?.file_name().into_string() {
            if change.plain && QUANTIZATION_NAMES.contains(&&*name) {
                let why = "it describes the quantization, and nothing is quantized any more";
                left_out.push(LeftOut { what: name, why: why.to_owned() });
            } else if is_sidecar(&name) {
                names.push(name);
            } else if !is_weights(&name) {
                strangers.push(name);
            }
        }
    }
    names.sort();
    strangers.sort();
    let why = "it is no configuration or tokenizer file";
    left_out.extend(strangers.into_iter().map(|what| LeftOut { what, why: why.to_owned() }));
    let mut files = Vec::new();
    for name in names {
        let path = source.join(&name);
        match obstacle(&path, source) {
            Some(why) => left_out.push(LeftOut { what: name, why: why.to_owned() }),
            None => files.push(copy_one(&path, &folder.new_path(&name)?, change)?),
        }
    }
    Ok(files)
}

/// A folder is a model's own. A single file may lie among strangers, unless a configuration is beside it.
fn has_sidecars(model: &Model) -> bool {
    match model.inner.files() {
        [] => false,
        [only] if only.path() == model.path() => model.folder().join(CONFIG_NAME).is_file(),
        _ => true,
    }
}

fn is_sidecar(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let is_text =
        matches!(extension, "json" | "txt" | "model" | "jinja" | "tiktoken") || name.starts_with("tokenizer");
    is_text && !name.starts_with('.') && !name.ends_with(".index.json") && !name.ends_with(".safetensors")
}

/// Tells whether a file is what was converted, or the list of it.
fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".index.json")
}

/// Returns why a file is not copied, if it is not.
fn obstacle(path: &Path, folder: &Path) -> Option<&'static str> {
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => Some("it is no regular file"),
        Ok(_) if check_inside(path, folder).is_err() => {
            Some("it is a symbolic link that leaves the model's folder")
        }
        Ok(_) => None,
        Err(_) => Some("it is a symbolic link to nothing"),
    }
}

fn copy_one(source: &Path, target: &Path, change: Change) -> Result<NewFile> {
    let mut file = NewFile::create(target)?;
    match change.dtype {
        Some(dtype) if source.ends_with(CONFIG_NAME) => {
            let config = read_limited(source, CONFIG_LEN_BYTES_MAX)?;
            match std::str::from_utf8(&config) {
                Ok(config) if change.plain => {
                    file.write(with_dtype(&without_quantization(config), dtype).as_bytes())?;
                }
                Ok(config) => file.write(with_dtype(config, dtype).as_bytes())?,
                Err(_) => file.write(&config)?,
            }
        }
        _ => copy_bytes(source, &mut file)?,
    }
    file.sync()?;
    Ok(file)
}

fn copy_bytes(source: &Path, file: &mut NewFile) -> Result<()> {
    let open = OpenFile::open(source)?;
    let mut buffer = vec![0; BUFFER_LEN_BYTES];
    loop {
        match open.cached().read(&mut buffer).map_err(|error| Error::io("reading it", source, error))? {
            0 => return Ok(()),
            read => file.write(&buffer[..read])?,
        }
    }
}

/// Puts a dtype in the place of every `"torch_dtype"` and `"dtype"` that is a floating-point type, those of
/// nested configurations too. Every other byte stays, whatever dialect of JSON it is: Python writes `NaN`.
fn with_dtype(config: &str, dtype: Dtype) -> String {
    let name = match dtype {
        Dtype::F64 => "float64",
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        _ => "bfloat16",
    };
    let (mut out, mut rest, mut key) = (String::with_capacity(config.len()), config, "");
    while let Some((begin, end)) = next_string(rest) {
        let (between, text) = (&rest[..begin], &rest[begin + 1..end]);
        let is_value = between.trim() == ":" && matches!(key, "torch_dtype" | "dtype");
        let float = text.strip_prefix("torch.").unwrap_or(text);
        if is_value && matches!(float, "float64" | "float32" | "float16" | "bfloat16") {
            out.push_str(&rest[..end - float.len()]);
            out.push_str(name);
            out.push('"');
        } else {
            out.push_str(&rest[..=end]);
        }
        key = text;
        rest = &rest[end + 1..];
    }
    out + rest
}

/// Removes the keys that describe quantization, with their values, at any depth. Every other byte stays.
fn without_quantization(config: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(config.len()), config);
    while let Some((begin, end)) = next_string(rest) {
        let behind = rest[end + 1..].trim_start();
        let is_key = behind.starts_with(':') && QUANTIZATION_KEYS.contains(&&rest[begin + 1..end]);
        if !is_key {
            out.push_str(&rest[..=end]);
            rest = &rest[end + 1..];
            continue;
        }
        out.push_str(&rest[..begin]);
        rest = behind_value(&behind[1..]).trim_start();
        match rest.strip_prefix(',') {
            Some(next) => rest = next.trim_start(),
            // It was the last of its object: the comma before it goes, too.
            None => {
                let kept = out.trim_end().trim_end_matches(',').len();
                out.truncate(kept);
            }
        }
    }
    out + rest
}

/// Returns what stands behind the value that the text begins with.
fn behind_value(text: &str) -> &str {
    let (mut depth, mut rest) = (0usize, text);
    loop {
        let Some(place) = rest.find(['"', '{', '[', '}', ']', ',']) else { return "" };
        let (mark, next) = (rest.as_bytes()[place], &rest[place + 1..]);
        match mark {
            b'"' => match next_string(rest) {
                Some((_, end)) => rest = &rest[end + 1..],
                None => return "",
            },
            b'{' | b'[' => (depth, rest) = (depth + 1, next),
            // The end of the object around it.
            b'}' | b']' if depth == 0 => return &rest[place..],
            b'}' | b']' => (depth, rest) = (depth - 1, next),
            _ if depth == 0 => return &rest[place..],
            _ => rest = next,
        }
        if depth == 0 && matches!(mark, b'}' | b']') {
            return rest;
        }
    }
}

/// Finds the quotes around the next string.
fn next_string(json: &str) -> Option<(usize, usize)> {
    let begin = json.find('"')?;
    let mut escaped = false;
    for (place, byte) in json.bytes().enumerate().skip(begin + 1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some((begin, place)),
            _ => {}
        }
    }
    None
}

const CONFIG_NAME: &str = "config.json";

/// Files that describe quantization and nothing else.
const QUANTIZATION_NAMES: [&str; 3] = ["quantize_config.json", "quant_config.json", "hf_quant_config.json"];

/// Keys of a configuration that do.
const QUANTIZATION_KEYS: [&str; 3] = ["quantization_config", "compression_config", "quantization"];

/// Far beyond any; a configuration is a few kilobytes.
const CONFIG_LEN_BYTES_MAX: u64 = 16 << 20;

/// Tokenizers have up to some tens of megabytes.
const BUFFER_LEN_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sidecars_are_told_by_their_names() {
        for name in [
            "config.json",
            "tokenizer.model",
            "merges.txt",
            "chat_template.jinja",
            "tokenizer.bin",
            "vocab.json",
        ] {
            assert!(is_sidecar(name), "{name}");
        }
        for name in [
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin.index.json",
            "pytorch_model.bin",
            ".config.json",
            "modeling.py",
            "tokenizer.safetensors",
        ] {
            assert!(!is_sidecar(name), "{name}");
        }
    }

    #[test]
    fn quantization_is_taken_out_of_a_configuration_and_nothing_else() {
        let with = r#"{"a": NaN, "quantization_config": {"bits": 4, "x": ["}", {"y": "\"}"}]}, "b": 1}"#;
        assert_eq!(without_quantization(with), r#"{"a": NaN, "b": 1}"#);
        let last = "{\n  \"b\": [1, 2],\n  \"quantization\": null\n}";
        assert_eq!(without_quantization(last), "{\n  \"b\": [1, 2]}");
        let only = r#"{"text_config": {"compression_config": "none"}, "say": "quantization"}"#;
        assert_eq!(without_quantization(only), r#"{"text_config": {}, "say": "quantization"}"#);
        for cut in 0..with.len() {
            without_quantization(&with[..cut]); // Whatever it is, it does not panic.
        }
    }

    #[test]
    fn the_dtype_of_a_configuration_changes_and_nothing_else() {
        let config = r#"{ "a": NaN, "torch_dtype" : "bfloat16",
            "text_config": {"dtype":"torch.float32", "say": "\"dtype\": \"float16\""},
            "quantization_config": {"dtype": "fp8"}, "dtype": null, "x": ["dtype", "float32"]}"#;
        let expected =
            config.replace("\"bfloat16\"", "\"float16\"").replace("torch.float32", "torch.float16");
        assert_eq!(with_dtype(config, Dtype::F16), expected);
        assert_eq!(with_dtype("{\"dtype\": \"float16", Dtype::F32), "{\"dtype\": \"float16");
    }
}
