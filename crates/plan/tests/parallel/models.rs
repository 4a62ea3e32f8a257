//! Headers of models as they are published: names, dtypes and shapes, no data; in full size and in tiny.

// Shared with measurements, which use a part of it.
#![allow(dead_code, clippy::unwrap_used, reason = "test support")]

use std::collections::BTreeMap;
use std::fmt::Write as _;

use tensorhaul_plan::header::{NewTensor, encode};
use tensorhaul_plan::{Checkpoint, Dtype, File, Header};

/// A model: what its `config.json` says, and its tensors in the order of their files.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) config: String,
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) files: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
}

/// The numbers of a model. What a family has no use for is not looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) layers: u64,
    pub(crate) hidden: u64,
    pub(crate) heads: u64,
    pub(crate) kv_heads: u64,
    pub(crate) head_dim: u64,
    pub(crate) intermediate: u64,
    pub(crate) moe_intermediate: u64,
    pub(crate) experts: u64,
    pub(crate) vocab: u64,
    /// Layers before the first with experts.
    pub(crate) dense_layers: u64,
    pub(crate) q_lora: u64,
    pub(crate) kv_lora: u64,
    pub(crate) nope: u64,
    pub(crate) rope: u64,
    /// Rows and columns that share a scale; 0: not quantized.
    pub(crate) block: u64,
}

/// Small, and shared by 1, 2, 3, 4 and 8 ranks.
pub(crate) const TINY: Sizes = Sizes {
    layers: 5,
    hidden: 8,
    heads: 24,
    kv_heads: 24,
    head_dim: 2,
    intermediate: 48,
    moe_intermediate: 24,
    experts: 8,
    vocab: 259,
    dense_layers: 2,
    q_lora: 6,
    kv_lora: 4,
    nope: 3,
    rope: 2,
    block: 0,
};

pub(crate) fn llama_3_8b() -> Model {
    let sizes = Sizes {
        layers: 32,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        intermediate: 14336,
        vocab: 128_256,
        ..TINY
    };
    Model { files: 4, ..llama("LlamaForCausalLM", &sizes) }
}

pub(crate) fn mixtral_8x7b() -> Model {
    let sizes = Sizes {
        layers: 32,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        moe_intermediate: 14336,
        experts: 8,
        vocab: 32000,
        ..TINY
    };
    Model { files: 19, ..mixtral(&sizes) }
}

pub(crate) fn deepseek_v3() -> Model {
    let sizes = Sizes {
        layers: 61,
        hidden: 7168,
        heads: 128,
        kv_heads: 128,
        intermediate: 18432,
        moe_intermediate: 2048,
        experts: 256,
        vocab: 129_280,
        dense_layers: 3,
        q_lora: 1536,
        kv_lora: 512,
        nope: 128,
        rope: 64,
        head_dim: 128,
        block: 128,
    };
    Model { files: 163, ..deepseek("DeepseekV3ForCausalLM", &sizes) }
}

pub(crate) fn gpt_oss_120b() -> Model {
    let sizes = Sizes {
        layers: 36,
        hidden: 2880,
        heads: 64,
        kv_heads: 8,
        head_dim: 64,
        moe_intermediate: 2880,
        experts: 128,
        vocab: 201_088,
        block: 32,
        ..TINY
    };
    Model { files: 15, ..gpt_oss(&sizes) }
}

/// The Llama family: also Mistral, and with biases or norms of heads Qwen2 and Qwen3, with norms around the MLP Gemma.
pub(crate) fn llama(architecture: &str, sizes: &Sizes) -> Model {
    let mut building = Building::new(architecture, sizes);
    building.outside();
    for layer in 0..sizes.layers {
        let at = format!("model.layers.{layer}");
        building.attention(&at);
        building.mlp(&format!("{at}.mlp"), ["gate_proj", "up_proj", "down_proj"], sizes.intermediate);
        if architecture.starts_with("Gemma") {
            building.norm(&format!("{at}.pre_feedforward_layernorm"), sizes.hidden);
        }
        if architecture.starts_with("Gemma") || architecture.starts_with("Olmo") {
            building.norm(&format!("{at}.post_feedforward_layernorm"), sizes.hidden);
        }
    }
    building.finish(&[("intermediate_size", sizes.intermediate)])
}

/// Models that see: the language model is one of their parts, and has a configuration of its own. Its names stand behind `prefix`, those of
/// other parts in the list.
pub(crate) fn seeing(architecture: &str, mut language: Model, prefix: [&str; 2], others: &[&str]) -> Model {
    for tensor in &mut language.tensors {
        let [from, to] = prefix;
        tensor.name = match tensor.name.strip_prefix(from) {
            Some(rest) => format!("{to}{rest}"),
            None => tensor.name.clone(),
        };
    }
    for name in others {
        let tensor = Tensor { name: (*name).to_owned(), dtype: Dtype::Bf16, shape: vec![6, 4] };
        language.tensors.push(tensor);
    }
    let (start, end) = (language.config.find("\"arch").unwrap(), language.config.find("],").unwrap() + 2);
    language.config.replace_range(start..end, "");
    let config = format!("{{\"architectures\":[\"{architecture}\"],\"text_config\":{}}}", language.config);
    Model { config, ..language }
}

pub(crate) fn gemma3_vision(sizes: &Sizes) -> Model {
    let others = [
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "multi_modal_projector.mm_soft_emb_norm.weight",
    ];
    let language = llama("Gemma3ForCausalLM", sizes);
    seeing("Gemma3ForConditionalGeneration", language, ["", "language_model."], &others)
}

/// Qwen that sees, as its files are named today, and as they were.
pub(crate) fn qwen_vision(sizes: &Sizes) -> [Model; 2] {
    let language = || llama("Qwen2ForCausalLM", sizes);
    [
        seeing(
            "Qwen2_5_VLForConditionalGeneration",
            language(),
            ["", ""],
            &["visual.blocks.0.mlp.gate_proj.weight"],
        ),
        seeing(
            "Qwen3VLForConditionalGeneration",
            language(),
            ["model.", "model.language_model."],
            &["model.visual.blocks.0.mlp.linear_fc1.weight"],
        ),
    ]
}

/// Llama 4 that sees.
pub(crate) fn llama4(sizes: &Sizes) -> Model {
    let others = ["vision_model.model.layers.0.mlp.fc1.weight", "multi_modal_projector.linear_1.weight"];
    seeing("Llama4ForConditionalGeneration", llama4_language(sizes), ["", "language_model."], &others)
}

/// Llama 4: layers with stacked experts, `[experts, in, out]`, gate before up, in turns with dense ones.
pub(crate) fn llama4_language(sizes: &Sizes) -> Model {
    let Sizes { hidden, moe_intermediate, experts, .. } = *sizes;
    let mut building = Building::new("Llama4ForCausalLM", sizes);
    building.outside();
    for layer in 0..sizes.layers {
        let at = format!("model.layers.{layer}");
        building.attention(&at);
        let at = format!("{at}.feed_forward");
        if layer % 2 == 0 {
            building.mlp(&at, MLP, sizes.intermediate);
            continue;
        }
        building.linear(&format!("{at}.router"), experts, hidden);
        building.mlp(&format!("{at}.shared_expert"), MLP, moe_intermediate);
        building.push(
            format!("{at}.experts.gate_up_proj"),
            Dtype::Bf16,
            &[experts, hidden, 2 * moe_intermediate],
        );
        building.push(format!("{at}.experts.down_proj"), Dtype::Bf16, &[experts, moe_intermediate, hidden]);
    }
    building.finish(&[("intermediate_size", moe_intermediate), ("num_local_experts", experts)])
}

pub(crate) fn phi3(sizes: &Sizes) -> Model {
    let mut building = Building::new("Phi3ForCausalLM", sizes);
    let Sizes { hidden, intermediate, .. } = *sizes;
    building.outside();
    for layer in 0..sizes.layers {
        let at = format!("model.layers.{layer}");
        building.norms(&at);
        let rows = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim;
        building.linear(&format!("{at}.self_attn.qkv_proj"), rows, hidden);
        building.linear(&format!("{at}.self_attn.o_proj"), hidden, sizes.heads * sizes.head_dim);
        building.linear(&format!("{at}.mlp.gate_up_proj"), 2 * intermediate, hidden);
        building.linear(&format!("{at}.mlp.down_proj"), hidden, intermediate);
    }
    building.finish(&[("intermediate_size", intermediate)])
}

pub(crate) fn mixtral(sizes: &Sizes) -> Model {
    with_experts_of_mixtral("MixtralForCausalLM", sizes)
}

/// MiniMax M2: Mixtral's names, and norms over all heads.
pub(crate) fn minimax_m2(sizes: &Sizes) -> Model {
    let mut model = with_experts_of_mixtral("MiniMaxM2ForCausalLM", sizes);
    for layer in 0..sizes.layers {
        let at = format!("model.layers.{layer}");
        for (name, len) in [
            ("self_attn.q_norm.weight", sizes.heads * sizes.head_dim),
            ("self_attn.k_norm.weight", sizes.kv_heads * sizes.head_dim),
            ("block_sparse_moe.e_score_correction_bias", sizes.experts),
        ] {
            model.tensors.push(Tensor { name: format!("{at}.{name}"), dtype: Dtype::F32, shape: vec![len] });
        }
    }
    model
}

fn with_experts_of_mixtral(architecture: &str, sizes: &Sizes) -> Model {
    let mut building = Building::new(architecture, sizes);
    building.outside();
    for layer in 0..sizes.layers {
        let at = format!("model.layers.{layer}");
        building.attention(&at);
        building.linear(&format!("{at}.block_sparse_moe.gate"), sizes.experts, sizes.hidden);
        for expert in 0..sizes.experts {
            let at = format!("{at}.block_sparse_moe.experts.{expert}");
            building.mlp(&at, ["w1", "w3", "w2"], sizes.moe_intermediate);
        }
    }
    building.finish(&[("intermediate_size", sizes.moe_intermediate), ("num_local_experts", sizes.experts)])
}

/// Qwen2 with a shared expert, Qwen3 without.
pub(crate) fn qwen_moe(architecture: &str, sizes: &Sizes) -> Model {
    let mut building = Building::new(architecture, sizes);
    building.outside();
    for layer in 0..sizes.layers {
        let at = format!("model.layers.{layer}");
        building.attention(&at);
        building.linear(&format!("{at}.mlp.gate"), sizes.experts, sizes.hidden);
        for expert in 0..sizes.experts {
            building.mlp(&format!("{at}.mlp.experts.{expert}"), MLP, sizes.moe_intermediate);
        }
        if architecture.starts_with("Qwen2") {
            building.mlp(&format!("{at}.mlp.shared_expert"), MLP, sizes.intermediate);
            building.linear(&format!("{at}.mlp.shared_expert_gate"), 1, sizes.hidden);
        }
    }
    building.finish(&[("intermediate_size", sizes.intermediate), ("num_experts", sizes.experts)])
}

/// DeepSeek V2, V3 and V3.2, and GLM with their attention, with a layer that predicts a further token; FP8 with scales in blocks where `block` is not 0.
pub(crate) fn deepseek(architecture: &str, sizes: &Sizes) -> Model {
    let Sizes { hidden, heads, q_lora, kv_lora, nope, rope, head_dim, .. } = *sizes;
    let mut building = Building::new(architecture, sizes);
    building.outside();
    for layer in 0..=sizes.layers {
        let at = format!("model.layers.{layer}");
        building.norms(&at);
        let attention = format!("{at}.self_attn");
        building.scaled(&format!("{attention}.q_a_proj"), q_lora, hidden);
        building.norm(&format!("{attention}.q_a_layernorm"), q_lora);
        building.scaled(&format!("{attention}.q_b_proj"), heads * (nope + rope), q_lora);
        building.scaled(&format!("{attention}.kv_a_proj_with_mqa"), kv_lora + rope, hidden);
        building.norm(&format!("{attention}.kv_a_layernorm"), kv_lora);
        building.scaled(&format!("{attention}.kv_b_proj"), heads * (nope + head_dim), kv_lora);
        building.scaled(&format!("{attention}.o_proj"), hidden, heads * head_dim);
        if matches!(architecture, "DeepseekV32ForCausalLM" | "GlmMoeDsaForCausalLM") {
            building.scaled(&format!("{attention}.indexer.wq_b"), heads * head_dim, q_lora);
            building.norm(&format!("{attention}.indexer.k_norm"), head_dim);
        }
        building.routed_mlp(&at, layer);
    }
    building.predicting()
}

/// GLM 4.5 to 4.7: Llama's attention, DeepSeek's experts and layer that predicts a further token.
pub(crate) fn glm4_moe(sizes: &Sizes) -> Model {
    let mut building = Building::new("Glm4MoeForCausalLM", sizes);
    building.outside();
    for layer in 0..=sizes.layers {
        let at = format!("model.layers.{layer}");
        building.attention(&at);
        building.routed_mlp(&at, layer);
    }
    building.predicting()
}

/// gpt-oss: experts in stacks, MXFP4 where `block` is not 0, else as its BF16 exports have them, `[experts, in, out]`.
pub(crate) fn gpt_oss(sizes: &Sizes) -> Model {
    let Sizes { hidden, heads, kv_heads, head_dim, moe_intermediate, experts, block, .. } = *sizes;
    let mut building = Building::new("GptOssForCausalLM", sizes);
    building.outside();
    for layer in 0..sizes.layers {
        let at = format!("model.layers.{layer}");
        building.norms(&at);
        let attention = format!("{at}.self_attn");
        for (name, rows, cols) in [
            ("q_proj", heads * head_dim, hidden),
            ("k_proj", kv_heads * head_dim, hidden),
            ("v_proj", kv_heads * head_dim, hidden),
            ("o_proj", hidden, heads * head_dim),
        ] {
            building.linear(&format!("{attention}.{name}"), rows, cols);
            building.push(format!("{attention}.{name}.bias"), Dtype::Bf16, &[rows]);
        }
        building.push(format!("{attention}.sinks"), Dtype::Bf16, &[heads]);
        building.linear(&format!("{at}.mlp.router"), experts, hidden);
        building.push(format!("{at}.mlp.router.bias"), Dtype::Bf16, &[experts]);
        for (name, rows, cols) in
            [("gate_up_proj", 2 * moe_intermediate, hidden), ("down_proj", hidden, moe_intermediate)]
        {
            let name = format!("{at}.mlp.experts.{name}");
            if block == 0 {
                building.push(name.clone(), Dtype::Bf16, &[experts, cols, rows]);
            } else {
                building.push(format!("{name}_blocks"), Dtype::U8, &[experts, rows, cols / 32, 16]);
                building.push(format!("{name}_scales"), Dtype::U8, &[experts, rows, cols / 32]);
            }
            building.push(format!("{name}_bias"), Dtype::Bf16, &[experts, rows]);
        }
    }
    building.finish(&[("intermediate_size", moe_intermediate), ("num_local_experts", experts)])
}

pub(crate) fn gpt_neox(sizes: &Sizes) -> Model {
    let Sizes { heads, head_dim, intermediate, vocab, .. } = *sizes;
    let hidden = heads * head_dim;
    let mut building = Building::new("GPTNeoXForCausalLM", sizes);
    building.linear("gpt_neox.embed_in", vocab, hidden);
    for layer in 0..sizes.layers {
        let at = format!("gpt_neox.layers.{layer}");
        building.push(format!("{at}.attention.bias"), Dtype::Bool, &[1, 1, 4, 4]);
        building.push(format!("{at}.attention.masked_bias"), Dtype::F16, &[]);
        building.push(format!("{at}.attention.rotary_emb.inv_freq"), Dtype::F16, &[head_dim / 2]);
        for (name, rows, cols) in [
            ("attention.query_key_value", 3 * hidden, hidden),
            ("attention.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", intermediate, hidden),
            ("mlp.dense_4h_to_h", hidden, intermediate),
        ] {
            building.linear(&format!("{at}.{name}"), rows, cols);
            building.push(format!("{at}.{name}.bias"), Dtype::Bf16, &[rows]);
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            building.norm(&format!("{at}.{name}"), hidden);
            building.push(format!("{at}.{name}.bias"), Dtype::Bf16, &[hidden]);
        }
    }
    building.norm("gpt_neox.final_layer_norm", hidden);
    building.push("gpt_neox.final_layer_norm.bias".to_owned(), Dtype::Bf16, &[hidden]);
    building.linear("embed_out", vocab, hidden);
    building.finish(&[("intermediate_size", intermediate)])
}

/// BERT with its masked-language head, or without.
pub(crate) fn bert(architecture: &str, sizes: &Sizes) -> Model {
    let Sizes { heads, head_dim, intermediate, vocab, .. } = *sizes;
    let hidden = heads * head_dim;
    let is_masked = architecture == "BertForMaskedLM";
    let root = if is_masked { "bert." } else { "" };
    let mut building = Building::new(architecture, sizes);
    let full = |building: &mut Building<'_>, name: &str, rows: u64, cols: u64| {
        building.linear(name, rows, cols);
        building.push(format!("{name}.bias"), Dtype::Bf16, &[rows]);
    };
    let norm = |building: &mut Building<'_>, name: &str| {
        building.push(format!("{name}.gamma"), Dtype::Bf16, &[hidden]);
        building.push(format!("{name}.beta"), Dtype::Bf16, &[hidden]);
    };
    building.linear(&format!("{root}embeddings.word_embeddings"), vocab, hidden);
    building.linear(&format!("{root}embeddings.position_embeddings"), 16, hidden);
    building.linear(&format!("{root}embeddings.token_type_embeddings"), 2, hidden);
    norm(&mut building, &format!("{root}embeddings.LayerNorm"));
    for layer in 0..sizes.layers {
        let at = format!("{root}encoder.layer.{layer}");
        for name in
            ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
        {
            full(&mut building, &format!("{at}.{name}"), hidden, hidden);
        }
        norm(&mut building, &format!("{at}.attention.output.LayerNorm"));
        full(&mut building, &format!("{at}.intermediate.dense"), intermediate, hidden);
        full(&mut building, &format!("{at}.output.dense"), hidden, intermediate);
        norm(&mut building, &format!("{at}.output.LayerNorm"));
    }
    if is_masked {
        full(&mut building, "cls.predictions.transform.dense", hidden, hidden);
        norm(&mut building, "cls.predictions.transform.LayerNorm");
        building.push("cls.predictions.bias".to_owned(), Dtype::Bf16, &[vocab]);
    } else {
        full(&mut building, "pooler.dense", hidden, hidden);
    }
    building.finish(&[("intermediate_size", intermediate)])
}

const MLP: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

impl Model {
    /// Returns the checkpoint, its tensors dealt to the files by their bytes.
    pub(crate) fn checkpoint(&self) -> Checkpoint {
        let len_bytes = |tensor: &Tensor| tensor.dtype.len_bytes(tensor.shape.iter().product()).unwrap();
        let total: u64 = self.tensors.iter().map(len_bytes).sum();
        let mut files: Vec<Vec<&Tensor>> = vec![Vec::new(); self.files];
        let mut before = 0;
        for tensor in &self.tensors {
            let file = before as u128 * self.files as u128 / u128::from(total.max(1));
            files[(file as usize).min(self.files - 1)].push(tensor);
            before += len_bytes(tensor);
        }
        let file = |(number, tensors): (usize, Vec<&Tensor>)| {
            let new = |tensor: &&'_ Tensor| -> (String, Dtype, Vec<u64>) {
                (tensor.name.clone(), tensor.dtype, tensor.shape.clone())
            };
            let owned: Vec<_> = tensors.iter().map(new).collect();
            let new: Vec<_> =
                owned.iter().map(|(name, dtype, shape)| NewTensor { name, dtype: *dtype, shape }).collect();
            let bytes = encode(&new, &BTreeMap::new(), 1).unwrap();
            let data: u64 = tensors.iter().map(|tensor| len_bytes(tensor)).sum();
            let header = Header::parse(&bytes[8..], bytes.len() as u64 + data).unwrap();
            File::new(format!("model-{:05}-of-{:05}.safetensors", number + 1, self.files), header)
        };
        Checkpoint::new(files.into_iter().enumerate().map(file).collect()).unwrap()
    }

    /// The same without some tensors.
    pub(crate) fn without(mut self, part_of_name: &str) -> Model {
        self.tensors.retain(|tensor| !tensor.name.contains(part_of_name));
        self
    }
}

struct Building<'s> {
    architecture: String,
    sizes: &'s Sizes,
    tensors: Vec<Tensor>,
}

impl<'s> Building<'s> {
    fn new(architecture: &str, sizes: &'s Sizes) -> Building<'s> {
        Building { architecture: architecture.to_owned(), sizes, tensors: Vec::new() }
    }

    fn push(&mut self, name: String, dtype: Dtype, shape: &[u64]) {
        self.tensors.push(Tensor { name, dtype, shape: shape.to_vec() });
    }

    fn linear(&mut self, name: &str, rows: u64, cols: u64) {
        self.push(format!("{name}.weight"), Dtype::Bf16, &[rows, cols]);
    }

    fn norm(&mut self, name: &str, len: u64) {
        self.push(format!("{name}.weight"), Dtype::Bf16, &[len]);
    }

    /// A linear layer, in FP8 with scales of blocks where the model is quantized.
    fn scaled(&mut self, name: &str, rows: u64, cols: u64) {
        let block = self.sizes.block;
        if block == 0 {
            return self.linear(name, rows, cols);
        }
        self.push(format!("{name}.weight"), Dtype::F8E4m3, &[rows, cols]);
        let blocks = [rows.div_ceil(block), cols.div_ceil(block)];
        self.push(format!("{name}.weight_scale_inv"), Dtype::F32, &blocks);
    }

    fn outside(&mut self) {
        self.linear("model.embed_tokens", self.sizes.vocab, self.sizes.hidden);
        self.norm("model.norm", self.sizes.hidden);
        if !self.architecture.starts_with("Gemma") {
            self.linear("lm_head", self.sizes.vocab, self.sizes.hidden);
        }
    }

    fn norms(&mut self, at: &str) {
        self.norm(&format!("{at}.input_layernorm"), self.sizes.hidden);
        self.norm(&format!("{at}.post_attention_layernorm"), self.sizes.hidden);
    }

    fn attention(&mut self, at: &str) {
        self.norms(at);
        let Sizes { hidden, heads, kv_heads, head_dim, .. } = *self.sizes;
        for (name, heads) in [("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)] {
            self.linear(&format!("{at}.self_attn.{name}"), heads * head_dim, hidden);
            if self.architecture.starts_with("Qwen2") {
                self.push(format!("{at}.self_attn.{name}.bias"), Dtype::Bf16, &[heads * head_dim]);
            }
        }
        self.linear(&format!("{at}.self_attn.o_proj"), hidden, heads * head_dim);
        if self.architecture.starts_with("Qwen3") || self.architecture.starts_with("Gemma3") {
            self.norm(&format!("{at}.self_attn.q_norm"), head_dim);
            self.norm(&format!("{at}.self_attn.k_norm"), head_dim);
        }
        if self.architecture.starts_with("Olmo") {
            self.norm(&format!("{at}.self_attn.q_norm"), heads * head_dim);
            self.norm(&format!("{at}.self_attn.k_norm"), kv_heads * head_dim);
        }
    }

    /// The first two names are column-parallel, the last row-parallel.
    fn mlp(&mut self, at: &str, names: [&str; 3], intermediate: u64) {
        let hidden = self.sizes.hidden;
        self.scaled(&format!("{at}.{}", names[0]), intermediate, hidden);
        self.scaled(&format!("{at}.{}", names[1]), intermediate, hidden);
        self.scaled(&format!("{at}.{}", names[2]), hidden, intermediate);
    }

    /// DeepSeek's: dense in the first layers, then experts beside a shared one.
    fn routed_mlp(&mut self, at: &str, layer: u64) {
        let Sizes { hidden, experts, intermediate, moe_intermediate, dense_layers, .. } = *self.sizes;
        if layer < dense_layers {
            return self.mlp(&format!("{at}.mlp"), MLP, intermediate);
        }
        self.linear(&format!("{at}.mlp.gate"), experts, hidden);
        self.push(format!("{at}.mlp.gate.e_score_correction_bias"), Dtype::F32, &[experts]);
        for expert in 0..experts {
            self.mlp(&format!("{at}.mlp.experts.{expert}"), MLP, moe_intermediate);
        }
        self.mlp(&format!("{at}.mlp.shared_experts"), MLP, moe_intermediate);
    }

    /// Ends with what the layer that predicts a further token has beside an ordinary one.
    fn predicting(mut self) -> Model {
        let Sizes { hidden, vocab, layers, intermediate, experts, .. } = *self.sizes;
        let at = format!("model.layers.{layers}");
        self.linear(&format!("{at}.embed_tokens"), vocab, hidden);
        self.norm(&format!("{at}.enorm"), hidden);
        self.norm(&format!("{at}.hnorm"), hidden);
        self.linear(&format!("{at}.eh_proj"), hidden, 2 * hidden);
        self.norm(&format!("{at}.shared_head.norm"), hidden);
        self.linear(&format!("{at}.shared_head.head"), vocab, hidden);
        self.finish(&[
            ("intermediate_size", intermediate),
            ("n_routed_experts", experts),
            ("num_nextn_predict_layers", 1),
        ])
    }

    fn finish(self, more: &[(&str, u64)]) -> Model {
        let Sizes { layers, hidden, heads, kv_heads, head_dim, vocab, block, .. } = *self.sizes;
        let mut config = format!("{{\"architectures\":[\"{}\"],", self.architecture);
        let is_deepseek = self.architecture.starts_with("Deepseek");
        for (key, number) in [
            ("num_hidden_layers", layers),
            ("hidden_size", hidden),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
            ("vocab_size", vocab),
        ] {
            write!(config, "\"{key}\":{number},").unwrap();
        }
        if !is_deepseek {
            write!(config, "\"head_dim\":{head_dim},").unwrap();
        }
        for (key, number) in more {
            write!(config, "\"{key}\":{number},").unwrap();
        }
        match (block, self.architecture.as_str()) {
            (0, _) => {}
            (_, "GptOssForCausalLM") => config.push_str(
                r#""quantization_config":{"quant_method":"mxfp4","modules_to_not_convert":["model.layers.*.self_attn","model.layers.*.mlp.router","model.embed_tokens","lm_head"]},"#,
            ),
            _ => write!(
                config,
                r#""quantization_config":{{"quant_method":"fp8","fmt":"e4m3","weight_block_size":[{block},{block}]}},"#
            )
            .unwrap(),
        }
        config.push_str("\"torch_dtype\":\"bfloat16\"}");
        Model { config, tensors: self.tensors, files: 1 }
    }
}
