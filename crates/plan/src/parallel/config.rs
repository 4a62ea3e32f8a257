//! The numbers of a model that cutting it needs, out of its `config.json`.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::ParallelError;

/// What `config.json` says about a model's sizes. Models that see or hear keep the numbers of their language model in `text_config`, which
/// comes first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelConfig {
    /// The classes that the model was saved from; the first chooses the [rules](super::Rules::of).
    pub architectures: Vec<String>,
    /// `num_hidden_layers`.
    pub layers: Option<u64>,
    /// `num_nextn_predict_layers`: layers behind those, which predict further tokens.
    pub predict_layers: u64,
    /// `num_attention_heads`.
    pub heads: Option<u64>,
    /// `num_key_value_heads`; as many as `heads` where it is not there.
    pub kv_heads: Option<u64>,
    /// `head_dim`, where it is there.
    pub head_dim: Option<u64>,
    /// `hidden_size`.
    pub hidden: Option<u64>,
    /// `intermediate_size`: of the dense layers where experts have a size of their own.
    pub intermediate: Option<u64>,
    /// `vocab_size`.
    pub vocab: Option<u64>,
    /// `n_routed_experts`, `num_local_experts` or `num_experts`.
    pub experts: Option<u64>,
    /// `tie_word_embeddings`, where it is there.
    pub is_tied: Option<bool>,
}

/// A number of a [`ModelConfig`] that rules count in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Count {
    Heads,
    KvHeads,
    Intermediate,
}

impl Count {
    /// Returns the word that texts use.
    pub(super) fn word(self) -> &'static str {
        match self {
            Count::Heads => "heads",
            Count::KvHeads => "kv heads",
            Count::Intermediate => "features",
        }
    }
}

impl ModelConfig {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// [`ParallelError::Config`] for a text that is no JSON object, or a number that is none.
    pub fn parse(text: &[u8]) -> Result<ModelConfig, ParallelError> {
        let bad = |what: String| ParallelError::Config { what };
        let top: Map<String, Value> =
            serde_json::from_slice(text).map_err(|error| bad(format!("not a JSON object: {error}")))?;
        let text_config = top.get("text_config").and_then(Value::as_object);
        Fields { places: [text_config, Some(&top)] }.read(&top)
    }

    /// Fills in what is not there.
    pub(super) fn or(mut self, defaults: &ModelConfig) -> ModelConfig {
        for (own, default) in [
            (&mut self.layers, defaults.layers),
            (&mut self.heads, defaults.heads),
            (&mut self.kv_heads, defaults.kv_heads),
            (&mut self.head_dim, defaults.head_dim),
            (&mut self.intermediate, defaults.intermediate),
            (&mut self.vocab, defaults.vocab),
        ] {
            *own = own.or(default);
        }
        self
    }

    pub(super) fn count(&self, count: Count) -> Result<u64, ParallelError> {
        let (number, key) = match count {
            Count::KvHeads if self.kv_heads.is_some() || self.heads.is_none() => {
                (self.kv_heads, "num_key_value_heads")
            }
            Count::Heads | Count::KvHeads => (self.heads, "num_attention_heads"),
            Count::Intermediate => (self.intermediate, "intermediate_size"),
        };
        let what = match number {
            Some(0) => format!("{key} is 0, and a rule counts it"),
            Some(number) => return Ok(number),
            None => format!("{key} is not there, and a rule counts it"),
        };
        Err(ParallelError::Config { what })
    }
}

/// The objects that may hold a field, the first first.
struct Fields<'j> {
    places: [Option<&'j Map<String, Value>>; 2],
}

impl Fields<'_> {
    fn read(&self, top: &Map<String, Value>) -> Result<ModelConfig, ParallelError> {
        let architectures = match top.get("architectures") {
            None | Some(Value::Null) => Vec::new(),
            Some(value) => serde_json::from_value(value.clone())
                .map_err(|error| ParallelError::Config { what: format!("architectures: {error}") })?,
        };
        Ok(ModelConfig {
            architectures,
            layers: self.number(&["num_hidden_layers"])?,
            predict_layers: self.number(&["num_nextn_predict_layers"])?.unwrap_or(0),
            heads: self.number(&["num_attention_heads"])?,
            kv_heads: self.number(&["num_key_value_heads"])?,
            head_dim: self.number(&["head_dim"])?,
            hidden: self.number(&["hidden_size"])?,
            intermediate: self.number(&["intermediate_size"])?,
            vocab: self.number(&["vocab_size"])?,
            experts: self.number(&["n_routed_experts", "num_local_experts", "num_experts"])?,
            is_tied: self.find("tie_word_embeddings").and_then(Value::as_bool),
        })
    }

    fn number(&self, keys: &[&str]) -> Result<Option<u64>, ParallelError> {
        let Some((key, value)) = keys.iter().find_map(|key| Some((key, self.find(key)?))) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(number) if number <= NUMBER_MAX => Ok(Some(number)),
            _ => Err(ParallelError::Config {
                what: format!("{key} is {value}, not a number up to {NUMBER_MAX}"),
            }),
        }
    }

    fn find(&self, key: &str) -> Option<&Value> {
        self.places.iter().flatten().find_map(|place| place.get(key)).filter(|value| !value.is_null())
    }
}

/// The largest number believed: far past any model, and small enough that sums and products of two stay in 64 bits.
const NUMBER_MAX: u64 = 1 << 31;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_the_language_model_come_first() {
        let config = ModelConfig::parse(
            br#"{"architectures":["Gemma3ForConditionalGeneration"],"hidden_size":7,"vocab_size":9,
                "text_config":{"hidden_size":2560,"num_hidden_layers":34,"num_key_value_heads":null}}"#,
        )
        .unwrap();
        assert_eq!(config.architectures, ["Gemma3ForConditionalGeneration"]);
        assert_eq!((config.hidden, config.vocab, config.layers), (Some(2560), Some(9), Some(34)));
        assert_eq!((config.kv_heads, config.is_tied), (None, None));
    }

    #[test]
    fn what_is_no_number_is_refused() {
        let error = |text: &str| ModelConfig::parse(text.as_bytes()).unwrap_err().to_string();
        assert_eq!(
            error(r#"{"num_attention_heads":-1}"#),
            "config.json: num_attention_heads is -1, not a number up to 2147483648"
        );
        assert!(error("[]").starts_with("config.json: not a JSON object: "));
        assert!(error(r#"{"architectures":1}"#).starts_with("config.json: architectures: "));
    }
}
