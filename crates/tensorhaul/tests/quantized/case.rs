//! A checkpoint made of chosen codes, and the numbers that must come out of it.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tensorhaul::Dtype;

use crate::common::{Dice, Stored, stored};
use crate::numbers;

/// A checkpoint, and what must come out of it.
pub(crate) struct Case {
    /// What it is, for messages.
    pub(crate) name: String,
    /// How well the results must agree.
    pub(crate) tolerance: Tolerance,
    /// Whether per-column factors are to be folded into the weights.
    pub(crate) is_folded: bool,
    pub(crate) tensors: Vec<Stored>,
    /// Configuration files beside the tensors.
    pub(crate) configs: Vec<(&'static str, Value)>,
    /// The `__metadata__` of each header.
    pub(crate) metadata: HashMap<String, String>,
    /// Number of files to spread the tensors over, aux tensors away from their weights.
    pub(crate) file_count: usize,
    pub(crate) expected: Vec<Expected>,
    /// Names of stored tensors that must come out as they are.
    pub(crate) dense: Vec<String>,
    /// Names of stored tensors that may come out or not: they say something about the checkpoint, to whoever asks.
    pub(crate) optional: Vec<String>,
    pub(crate) dice: Dice,
}

/// How well results must agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tolerance {
    /// In every bit, but for the sign of zero and the payload of NaN.
    Bits,
    /// As BF16, to the next number up or down: where a format leaves the order of roundings open.
    Bf16Ulp,
}

/// A tensor that must come out.
pub(crate) struct Expected {
    pub(crate) name: String,
    pub(crate) shape: Vec<u64>,
    pub(crate) values: Vec<f32>,
}

/// Floats as a file holds them, and what they are.
#[derive(Clone)]
pub(crate) struct Floats {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    pub(crate) bytes: Vec<u8>,
    pub(crate) values: Vec<f32>,
}

impl Case {
    /// A checkpoint whose `config.json` has this `quantization_config`.
    pub(crate) fn new(name: impl Into<String>, quantization_config: Value) -> Case {
        Case::bare(name).config("config.json", model_config(quantization_config))
    }

    /// A checkpoint without any configuration.
    pub(crate) fn bare(name: impl Into<String>) -> Case {
        let name = name.into();
        let seed =
            name.bytes().fold(1, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
        Case {
            name,
            tolerance: Tolerance::Bits,
            is_folded: false,
            tensors: Vec::new(),
            configs: Vec::new(),
            metadata: HashMap::new(),
            file_count: 1,
            expected: Vec::new(),
            dense: Vec::new(),
            optional: Vec::new(),
            dice: Dice(seed),
        }
    }

    pub(crate) fn config(mut self, file: &'static str, config: Value) -> Case {
        self.configs.push((file, config));
        self
    }

    /// Spreads the tensors over files, so that no scale lies beside its weight.
    pub(crate) fn scattered(mut self) -> Case {
        self.file_count = 3;
        self
    }

    pub(crate) fn store(&mut self, name: impl Into<String>, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        let (name, shape) = (name.into(), dims(shape));
        let len_bytes = dtype.len_bytes(shape.iter().product()).unwrap();
        assert_eq!(bytes.len() as u64, len_bytes, "{}: {name}: {dtype} {shape:?}", self.name);
        self.tensors.push(Stored { name, dtype, shape, bytes });
    }

    pub(crate) fn store_words(&mut self, name: impl Into<String>, shape: &[usize], words: &[u32]) {
        self.store(name, Dtype::I32, shape, crate::pack::bytes_of(words));
    }

    pub(crate) fn store_floats(&mut self, name: impl Into<String>, floats: &Floats) {
        self.tensors.push(Stored {
            name: name.into(),
            dtype: floats.dtype,
            shape: floats.shape.clone(),
            bytes: floats.bytes.clone(),
        });
    }

    /// Stores a tensor of noise that dequantization must leave alone.
    pub(crate) fn keep(&mut self, name: impl Into<String>, dtype: Dtype, shape: &[usize]) {
        let name = name.into();
        self.tensors.push(stored(&name, dtype, &dims(shape)));
        self.dense.push(name);
    }

    /// Stores floats that dequantization must leave alone.
    pub(crate) fn keep_floats(&mut self, name: impl Into<String>, floats: &Floats) {
        let name = name.into();
        self.dense.push(name.clone());
        self.store_floats(name, floats);
    }

    /// Stores what a language model has around its quantized layers.
    pub(crate) fn keep_the_usual(&mut self) {
        self.keep("model.embed_tokens.weight", Dtype::Bf16, &[37, 24]);
        self.keep("model.layers.0.input_layernorm.weight", Dtype::Bf16, &[24]);
        self.keep("model.norm.weight", Dtype::F32, &[24]);
        self.keep("lm_head.weight", Dtype::F16, &[37, 24]);
    }

    /// Expects a matrix of `value(row, column)`.
    pub(crate) fn expect(
        &mut self,
        name: impl Into<String>,
        [rows, cols]: [usize; 2],
        value: impl Fn(usize, usize) -> f32,
    ) {
        let values = (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col)));
        let values = values.map(|(row, col)| value(row, col)).collect();
        self.expect_values(name, &[rows, cols], values);
    }

    pub(crate) fn expect_values(&mut self, name: impl Into<String>, shape: &[usize], values: Vec<f32>) {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        self.expected.push(Expected { name: name.into(), shape: dims(shape), values });
    }

    /// Rolls codes of `bits` bits.
    pub(crate) fn codes(&mut self, count: usize, bits: u32) -> Vec<u32> {
        (0..count).map(|_| self.dice.below(1 << bits) as u32).collect()
    }

    /// Rolls numbers from 2^-9 to 2^-4, rounded to their dtype; some of them are negative where `is_signed`.
    fn floats(&mut self, dtype: Dtype, shape: &[usize], is_signed: bool) -> Floats {
        let count: usize = shape.iter().product();
        let mut roll = || {
            let mantissa = 1.0 + self.dice.below(1 << 24) as f64 / f64::from(1 << 24);
            let sign = if is_signed && self.dice.below(2) == 0 { -1.0 } else { 1.0 };
            (sign * mantissa * 2f64.powi(self.dice.below(5) as i32 - 9)) as f32
        };
        let values = (0..count).map(|_| roll()).collect();
        Floats::of(dtype, shape, values)
    }

    /// Rolls positive scales.
    pub(crate) fn scales(&mut self, dtype: Dtype, shape: &[usize]) -> Floats {
        self.floats(dtype, shape, false)
    }

    /// Rolls numbers of both signs.
    pub(crate) fn offsets(&mut self, dtype: Dtype, shape: &[usize]) -> Floats {
        self.floats(dtype, shape, true)
    }

    /// Rolls scales that are powers of two, stored as `dtype` (F8_E8M0 or U8), the smallest one and NaN among them.
    pub(crate) fn power_scales(&mut self, dtype: Dtype, shape: &[usize]) -> Floats {
        let count: usize = shape.iter().product();
        let mut codes: Vec<u32> = (0..count).map(|_| 110 + self.dice.below(30) as u32).collect();
        for (place, code) in [(1, 0), (3, 255), (4, 254), (6, 1)] {
            if count > 8 {
                codes[place] = code;
            }
        }
        Floats::of_codes(dtype, shape, &codes, numbers::e8m0)
    }

    /// Rolls scales that are 8-bit floats, stored as `dtype` (F8_E4M3 or U8).
    pub(crate) fn e4m3_scales(&mut self, dtype: Dtype, shape: &[usize]) -> Floats {
        let count: usize = shape.iter().product();
        let codes: Vec<u32> = (0..count).map(|_| self.dice.below(0x7f) as u32).collect();
        Floats::of_codes(dtype, shape, &codes, numbers::e4m3)
    }

    /// Writes the checkpoint into a folder.
    pub(crate) fn write(&self, folder: &Path) {
        for (file, config) in &self.configs {
            fs::write(folder.join(file), serde_json::to_vec_pretty(config).unwrap()).unwrap();
        }
        if self.file_count == 1 {
            let all: Vec<&Stored> = self.tensors.iter().collect();
            return fs::write(folder.join("model.safetensors"), self.file(&all)).unwrap();
        }
        let mut weight_map = BTreeMap::new();
        for number in 0..self.file_count {
            let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, self.file_count);
            let part: Vec<&Stored> = self.tensors.iter().skip(number).step_by(self.file_count).collect();
            fs::write(folder.join(&name), self.file(&part)).unwrap();
            weight_map.extend(part.iter().map(|tensor| (tensor.name.clone(), name.clone())));
        }
        let index = json!({"metadata": {}, "weight_map": weight_map});
        fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }

    /// A file, as the format's own crate writes it.
    fn file(&self, tensors: &[&Stored]) -> Vec<u8> {
        let views: Vec<_> = tensors.iter().map(|tensor| view(tensor)).collect();
        let metadata = (!self.metadata.is_empty()).then(|| self.metadata.clone());
        safetensors::serialize(views, metadata).unwrap()
    }
}

impl Floats {
    /// Rounds numbers to a dtype.
    pub(crate) fn of(dtype: Dtype, shape: &[usize], exact: Vec<f32>) -> Floats {
        let (bytes, values): (Vec<Vec<u8>>, Vec<f32>) = exact
            .into_iter()
            .map(|value| match dtype {
                Dtype::F16 => (f16::from_f32(value).to_le_bytes().to_vec(), f16::from_f32(value).to_f32()),
                Dtype::Bf16 => (bf16::from_f32(value).to_le_bytes().to_vec(), bf16::from_f32(value).to_f32()),
                _ => (value.to_le_bytes().to_vec(), value),
            })
            .unzip();
        Floats { dtype, shape: dims(shape), bytes: bytes.concat(), values }
    }

    /// Takes codes of a byte, and says what they stand for.
    pub(crate) fn of_codes(dtype: Dtype, shape: &[usize], codes: &[u32], value: numbers::Number) -> Floats {
        let bytes = codes.iter().map(|code| *code as u8).collect();
        Floats { dtype, shape: dims(shape), bytes, values: codes.iter().map(|code| value(*code)).collect() }
    }
}

/// A `config.json` of a small model.
pub(crate) fn model_config(quantization_config: Value) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "quantization_config": quantization_config,
    })
}

/// The bytes of codes of a byte each.
pub(crate) fn low_bytes(codes: &[u32]) -> Vec<u8> {
    codes.iter().map(|code| *code as u8).collect()
}

fn view(tensor: &Stored) -> (&str, TensorView<'_>) {
    let dtype = serde_json::from_value(json!(tensor.dtype.name())).unwrap();
    let shape = tensor.shape.iter().map(|dim| *dim as usize).collect();
    (&tensor.name, TensorView::new(dtype, shape, &tensor.bytes).unwrap())
}

fn dims(shape: &[usize]) -> Vec<u64> {
    shape.iter().map(|dim| *dim as u64).collect()
}
