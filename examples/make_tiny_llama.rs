//! Writes `examples/models/tiny-llama`, a Llama checkpoint of 261 KB that has the shape of a real one.
//!
//! Two files with an index, the names and shapes of `LlamaForCausalLM` with grouped-query attention, BF16 weights,
//! F32 norms, and `down_proj` quantized to F8_E4M3 with one F32 scale per tensor. It also holds what loaders stumble
//! on: a scalar, an empty tensor, a quantized weight whose scale lies in the other file, and a width (176) that is no
//! power of two. The weights are random, so the model says nothing sensible.
//!
//! ```text
//! cargo run -p tensorhaul-examples --example make_tiny_llama [OUT_DIR]
//! ```
//!
//! Every run writes the same bytes on every machine; `cargo xtask test` compares them with those in the repository.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use half::bf16;
use serde_json::{Value, json};

const LAYERS: usize = 2;
const HIDDEN: usize = 64;
const HEADS: usize = 8;
const KV_HEADS: usize = 4; // Tensor-parallel groups of 2 and 4 get whole heads.
const HEAD_DIM: usize = HIDDEN / HEADS;
const INTERMEDIATE: usize = 176;
const VOCAB: usize = 384;
const INIT_STD: f32 = 0.02;

/// The first tensor of the second file: halves the checkpoint, and parts a quantized weight from its scale.
const SPLIT_AT: &str = "model.layers.0.mlp.down_proj.weight_scale";

fn main() -> io::Result<()> {
    let repository_own = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama");
    let out_dir = env::args_os().nth(1).map_or_else(|| PathBuf::from(repository_own), PathBuf::from);
    fs::create_dir_all(&out_dir)?;

    let mut first = tensors(&mut Random(0));
    let split = first.iter().position(|tensor| tensor.name == SPLIT_AT).expect("SPLIT_AT names a tensor");
    let second = first.split_off(split);

    let mut weight_map = BTreeMap::new();
    let mut total_len_bytes = 0;
    for (file_index, tensors) in [first, second].into_iter().enumerate() {
        let file_name = format!("model-{:05}-of-00002.safetensors", file_index + 1);
        weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), file_name.clone())));
        total_len_bytes += tensors.iter().map(|tensor| tensor.bytes.len()).sum::<usize>();
        fs::write(out_dir.join(file_name), file(tensors))?;
    }
    let index = json!({ "metadata": { "total_size": total_len_bytes }, "weight_map": weight_map });
    write_json(&out_dir.join("model.safetensors.index.json"), &index)?;
    write_json(&out_dir.join("config.json"), &config())
}

struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// The dtypes made here, in the order that tensors have in a file: widest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(non_camel_case_types, reason = "spelled as in a header")]
enum Dtype {
    F32,
    BF16,
    F8_E4M3,
}

/// Makes every tensor of the model, in the model's own order.
fn tensors(random: &mut Random) -> Vec<Tensor> {
    let mut all = vec![
        weight("model.embed_tokens.weight".into(), [VOCAB, HIDDEN], random),
        // The rows of tokens added after training: none were.
        weight("model.added_tokens.weight".into(), [0, HIDDEN], random),
    ];
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        all.push(weight(name("self_attn.q_proj.weight"), [HEADS * HEAD_DIM, HIDDEN], random));
        all.push(weight(name("self_attn.k_proj.weight"), [KV_HEADS * HEAD_DIM, HIDDEN], random));
        all.push(weight(name("self_attn.v_proj.weight"), [KV_HEADS * HEAD_DIM, HIDDEN], random));
        all.push(weight(name("self_attn.o_proj.weight"), [HIDDEN, HEADS * HEAD_DIM], random));
        all.push(weight(name("mlp.gate_proj.weight"), [INTERMEDIATE, HIDDEN], random));
        all.push(weight(name("mlp.up_proj.weight"), [INTERMEDIATE, HIDDEN], random));
        all.extend(quantized_weight(name("mlp.down_proj.weight"), [HIDDEN, INTERMEDIATE], random));
        all.push(norm(name("input_layernorm.weight"), random));
        all.push(norm(name("post_attention_layernorm.weight"), random));
    }
    all.push(norm("model.norm.weight".into(), random));
    all.push(weight("lm_head.weight".into(), [VOCAB, HIDDEN], random));
    all
}

/// Makes a BF16 weight, rounded to nearest, ties to even.
fn weight(name: String, shape: [usize; 2], random: &mut Random) -> Tensor {
    let bytes = initial_values(shape, random).flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect();
    Tensor { name, dtype: Dtype::BF16, shape: shape.into(), bytes }
}

/// Makes an F8_E4M3 weight and the scalar to multiply it by, which maps the largest magnitude to the largest code.
fn quantized_weight(name: String, shape: [usize; 2], random: &mut Random) -> [Tensor; 2] {
    let values: Vec<f32> = initial_values(shape, random).collect();
    let magnitude_max = values.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
    let scale = magnitude_max / F8_E4M3_MAX;
    let scale_tensor = Tensor {
        name: format!("{name}_scale"),
        dtype: Dtype::F32,
        shape: vec![],
        bytes: scale.to_le_bytes().to_vec(),
    };
    let bytes = values.iter().map(|value| f8_e4m3(value / scale)).collect();
    [Tensor { name, dtype: Dtype::F8_E4M3, shape: shape.into(), bytes }, scale_tensor]
}

/// Makes an F32 norm weight near one.
fn norm(name: String, random: &mut Random) -> Tensor {
    let bytes = (0..HIDDEN).flat_map(|_| (1.0 + 0.1 * random.normal()).to_le_bytes()).collect();
    Tensor { name, dtype: Dtype::F32, shape: vec![HIDDEN], bytes }
}

fn initial_values(shape: [usize; 2], random: &mut Random) -> impl Iterator<Item = f32> {
    (0..shape[0] * shape[1]).map(move |_| INIT_STD * random.normal())
}

const F8_E4M3_MAX: f32 = 448.0;

/// Rounds to the nearest F8_E4M3 code, ties to even; magnitudes beyond 448 become 448.
///
/// A code is `sign:1 exponent:4 mantissa:3`. Codes of one sign are consecutive integers in the order of their values,
/// also where the exponent changes, so a mantissa that rounds up to 16 steps carries into the next exponent by itself.
///
/// # Source
/// "FP8 Formats for Deep Learning", arXiv:2209.05433, section 3: bias 7, no infinities, `S.1111.111` is NaN.
fn f8_e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs().min(F8_E4M3_MAX);
    // Below 2^-6 all codes are subnormal, spaced like those of 2^-6.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let step = f32::from_bits(((exponent - 3 + 127) as u32) << 23); // 2^(exponent - 3), so the division is exact.
    let steps = (magnitude / step).round_ties_even() as u8; // 8..=16 when normal, 0..=8 when subnormal.
    sign | (((exponent + 6) as u8) * 8 + steps)
}

/// SplitMix64, for numbers that are the same everywhere.
///
/// # Source
/// Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 17.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Draws from nearly the standard normal distribution: the sum of twelve uniforms of variance 1/12, less its mean.
    ///
    /// Box-Muller would need `ln` and `cos`, whose last bit differs between C libraries. This is exact integers up to
    /// one conversion.
    fn normal(&mut self) -> f32 {
        let sum: i64 = (0..12).map(|_| (self.next() >> 40) as i64).sum(); // Twelve times 24 bits.
        (sum - (6 << 24)) as f32 / (1 << 24) as f32
    }
}

/// Lays out one file as the reference writer does: tensors by dtype, widest first, then by name.
///
/// # Source
/// The `safetensors` crate 0.8.0, `tensor.rs`, `prepare`.
fn file(mut tensors: Vec<Tensor>) -> Vec<u8> {
    tensors.sort_by(|a, b| (a.dtype, &a.name).cmp(&(b.dtype, &b.name)));
    let mut header = r#"{"__metadata__":{"format":"pt"}"#.to_owned();
    let mut data = Vec::new();
    for Tensor { name, dtype, shape, bytes } in &tensors {
        let (begin, end) = (data.len(), data.len() + bytes.len());
        header += &format!(r#","{name}":{{"dtype":"{dtype:?}","shape":{},"#, json!(shape));
        header += &format!(r#""data_offsets":[{begin},{end}]}}"#);
        data.extend_from_slice(bytes);
    }
    header += "}";
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len()); // Keeps the data 8-byte aligned.

    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

fn config() -> Value {
    // AutoFP8's and vLLM's way to say it: every linear layer that is not ignored has an F8 weight and a scale.
    let ignored_layers: Vec<String> = (0..LAYERS)
        .flat_map(|layer| {
            let parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"];
            let parts = parts.into_iter().chain(["mlp.gate_proj", "mlp.up_proj"]);
            parts.map(move |part| format!("model.layers.{layer}.{part}"))
        })
        .chain(["lm_head".to_owned()])
        .collect();
    json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 256,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "ignored_layers": ignored_layers,
            "quant_method": "fp8"
        },
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "vocab_size": VOCAB
    })
}

fn write_json(path: &Path, value: &Value) -> io::Result<()> {
    fs::write(path, format!("{value:#}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f8_code_and_every_tie_between_two_rounds_as_the_format_says() {
        // The value of a non-negative code, by the format's definition.
        let value = |code: u8| match (code >> 3, f32::from(code & 7)) {
            (0, mantissa) => mantissa * 2_f32.powi(-9),
            (exponent, mantissa) => (8.0 + mantissa) * 2_f32.powi(i32::from(exponent) - 10),
        };
        for code in 0..=0x7E {
            assert_eq!(f8_e4m3(value(code)), code);
            assert_eq!(f8_e4m3(-value(code)), code | 0x80);
        }
        for code in 0..0x7E {
            let tie = (value(code) + value(code + 1)) / 2.0;
            assert_eq!(f8_e4m3(tie), code + code % 2, "the tie above code {code}");
            assert_eq!(f8_e4m3(tie.next_down()), code, "just below the tie above code {code}");
            assert_eq!(f8_e4m3(tie.next_up()), code + 1, "just above the tie above code {code}");
        }
        assert_eq!(f8_e4m3(1e9), 0x7E);
    }
}
