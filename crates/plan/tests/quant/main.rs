//! Recognition of quantized checkpoints: from headers, configurations and small tensors to groups, recipes and refusals.

mod cuts;
mod decode;
mod errors;
mod families;
mod property;
mod vectors;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use tensorhaul_plan::header::{NewTensor, encode};
use tensorhaul_plan::quant::{Configs, Group, Part, QuantError, Quantization, Survey, Values};
use tensorhaul_plan::{Checkpoint, Dtype, File, Header};

/// A checkpoint of one file, made of names, dtypes and shapes; of its bytes only those that are asked for exist.
#[derive(Default)]
struct Model {
    tensors: Vec<(String, Dtype, Vec<u64>)>,
    metadata: BTreeMap<String, String>,
    configs: Configs,
    values: HashMap<String, Vec<u8>>,
}

impl Model {
    fn new(tensors: &[(&str, Dtype, &[u64])]) -> Model {
        let owned = |(name, dtype, shape): &(&str, Dtype, &[u64])| (name.to_string(), *dtype, shape.to_vec());
        Model { tensors: tensors.iter().map(owned).collect(), ..Model::default() }
    }

    /// Sets `quantization_config` of `config.json`.
    fn config(self, quantization_config: &str) -> Model {
        self.file("config.json", &format!(r#"{{"quantization_config": {quantization_config}}}"#))
    }

    fn file(mut self, name: &str, text: &str) -> Model {
        self.configs.insert(name, text);
        self
    }

    fn metadata(mut self, key: &str, value: &str) -> Model {
        self.metadata.insert(key.to_owned(), value.to_owned());
        self
    }

    fn value(mut self, name: &str, bytes: impl Into<Vec<u8>>) -> Model {
        self.values.insert(name.to_owned(), bytes.into());
        self
    }

    fn checkpoint(&self) -> Checkpoint {
        let list: Vec<NewTensor<'_>> = self
            .tensors
            .iter()
            .map(|(name, dtype, shape)| NewTensor { name, dtype: *dtype, shape })
            .collect();
        let bytes = encode(&list, &self.metadata, 0).expect("a header");
        let bits =
            |(_, dtype, shape): &(String, Dtype, Vec<u64>)| shape.iter().product::<u64>() * dtype.bits();
        let data_len_bytes: u64 = self.tensors.iter().map(|tensor| bits(tensor) / 8).sum();
        let header =
            Header::parse(&bytes[8..], bytes.len() as u64 + data_len_bytes).expect("what was encoded");
        Checkpoint::new(vec![File::new("model.safetensors", header)]).expect("one file")
    }

    fn try_recognize(&self) -> Result<Found, QuantError> {
        let checkpoint = self.checkpoint();
        let survey = Survey::new(&checkpoint, &self.configs)?;
        let mut values = Values::none();
        for need in survey.needs() {
            let tensor = checkpoint.tensor(need.tensor);
            let mut bytes = self.values.get(tensor.info.name).cloned().unwrap_or_default();
            bytes.resize(tensor.info.len_bytes() as usize, 0);
            bytes.truncate(need.len_bytes as usize);
            values.insert(need.tensor, bytes);
        }
        let quantization = survey.recognize(&checkpoint, &values);
        Ok(Found { checkpoint, quantization })
    }

    fn recognize(&self) -> Found {
        self.try_recognize().expect("a readable configuration")
    }

    /// Returns the text of the only refusal, or of the error that kept everything from being recognised.
    fn error(&self) -> String {
        match self.try_recognize() {
            Err(error) => error.to_string(),
            Ok(found) => match found.quantization.refused() {
                [refusal] => refusal.error.to_string(),
                other => panic!("{} refusals: {}", other.len(), found.text()),
            },
        }
    }
}

/// What was recognised.
struct Found {
    checkpoint: Checkpoint,
    quantization: Quantization,
}

impl Found {
    /// Returns the only group.
    fn group(&self) -> &Group {
        match self.quantization.groups() {
            [group] => group,
            _ => panic!("not one group: {}", self.text()),
        }
    }

    /// Prints groups, recipes, and what is no plain tensor.
    fn text(&self) -> String {
        let mut text = String::new();
        let name = |id| self.checkpoint.tensor(id).info.name;
        for group in self.quantization.groups() {
            let Group { name: result, shape, family, bits, group_size, is_symmetric, .. } = group;
            writeln!(
                text,
                "{result} {shape:?} {family:?} {bits} bits, group {group_size:?}, symmetric {is_symmetric:?}"
            )
            .expect("a String takes every write");
            for (role, id) in &group.members {
                writeln!(text, "  {role:?} {}", name(*id)).expect("a String takes every write");
            }
            let recipe = serde_json::to_value(&group.recipe).expect("recipes serialize");
            for (key, value) in
                recipe.as_object().expect("an object").iter().filter(|(_, value)| !is_default(value))
            {
                writeln!(text, "  {key} = {value}").expect("a String takes every write");
            }
        }
        for tensor in self.checkpoint.tensors() {
            if let Part::PassedThrough(why) = self.quantization.role_of(tensor.id) {
                writeln!(text, "passed through: {} {why:?}", tensor.info.name)
                    .expect("a String takes every write");
            }
        }
        for refusal in self.quantization.refused() {
            writeln!(text, "refused: {}", refusal.error).expect("a String takes every write");
        }
        for warning in self.quantization.warnings() {
            writeln!(text, "warning: {warning}").expect("a String takes every write");
        }
        text
    }
}

fn is_default(value: &serde_json::Value) -> bool {
    value.is_null() || *value == false || *value == "None"
}
