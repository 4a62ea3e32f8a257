//! What cannot be shared is refused with the numbers and with what would work.

use tensorhaul_plan::parallel::{
    Fuse, ModelConfig, ParallelError, Partition, Ranks, Rules, Setup, Share, Unmatched,
};
use tensorhaul_plan::quant::{Quantization, Values};
use tensorhaul_plan::{DeviceId, Dtype, Part, Slice};

use crate::golden::{all, recognize};
use crate::models::{self, Model, Sizes, TINY, Tensor};

/// Shares a model by the table of its architecture.
fn share(model: &Model, ranks: Ranks, fuse: Fuse) -> Result<Share, ParallelError> {
    let config = ModelConfig::parse(model.config.as_bytes())?;
    share_by(model, &Rules::of(&config)?, ranks, fuse)
}

fn share_by(model: &Model, rules: &Rules, ranks: Ranks, fuse: Fuse) -> Result<Share, ParallelError> {
    let checkpoint = model.checkpoint();
    let config = ModelConfig::parse(model.config.as_bytes())?;
    Partition::new(&checkpoint, &config, rules, &Setup { fuse, ..Setup::default() })?
        .share(&ranks, DeviceId::Host)
}

fn refused(model: &Model, ranks: Ranks) -> String {
    share(model, ranks, Fuse::No).unwrap_err().to_string()
}

fn llama() -> Model {
    models::llama("LlamaForCausalLM", &Sizes { kv_heads: 6, ..TINY })
}

fn with(mut model: Model, name: &str, dtype: Dtype, shape: &[u64]) -> Model {
    model.tensors.push(Tensor { name: name.to_owned(), dtype, shape: shape.to_vec() });
    model
}

#[test]
fn sizes_that_share_nothing_evenly_name_those_that_would() {
    let tp = |size| Ranks::alone().tp(0, size);
    assert_eq!(
        refused(&llama(), tp(5)),
        "tensor \"lm_head.weight\": 5 ranks cannot share 24 heads evenly; 1, 2, 3, 6, 12, 24 can"
            .replace("lm_head.weight", "model.layers.0.self_attn.q_proj.weight")
    );
    assert_eq!(
        refused(&llama(), tp(4)),
        "tensor \"model.layers.0.self_attn.k_proj.weight\": 4 ranks cannot share 6 kv heads evenly; 1, 2, 3, 6, 12, 24 can"
    );
    let narrow = models::llama("LlamaForCausalLM", &Sizes { intermediate: 20, ..TINY });
    assert_eq!(
        refused(&narrow, tp(8)),
        "tensor \"model.layers.0.mlp.gate_proj.weight\": 8 ranks cannot share 20 rows evenly; 1, 2, 4 can"
    );
    let by_columns = narrow.without("gate_proj").without("up_proj");
    assert_eq!(
        refused(&by_columns, tp(8)),
        "tensor \"model.layers.0.mlp.down_proj.weight\": 8 ranks cannot share 20 columns evenly; 1, 2, 4 can"
    );
    let experts = models::qwen_moe("Qwen3MoeForCausalLM", &TINY);
    assert_eq!(
        refused(&experts, Ranks::alone().ep(1, 3)),
        "3 ranks cannot share 8 experts evenly; 1, 2, 4, 8 can"
    );
}

#[test]
fn stages_and_layers_that_are_not_there_are_refused_with_the_numbers() {
    assert_eq!(
        refused(&llama(), Ranks::alone().pp(0, 6)),
        "6 pipeline stages need as many layers, the model has 5"
    );
    assert_eq!(
        refused(&llama(), Ranks::alone().layers(2..6)),
        "layers 2..6 are not all among the model's 5 (0 to 4)"
    );
    let predicting = models::deepseek("DeepseekV3ForCausalLM", &TINY);
    assert_eq!(
        refused(&predicting, Ranks::alone().layers(4..6)),
        "layers 4..6 are not all among the model's 5 (0 to 4); those from 5 on, which predict further tokens, come with layer 4"
    );
    share(&predicting, Ranks::alone().layers(4..5), Fuse::No).unwrap();
    assert_eq!(
        refused(&llama(), Ranks::alone().tp(2, 2)),
        "tensor-parallel rank 2 is outside its group of 2 (0 to 1)"
    );
    let more = with(llama(), "model.layers.5.input_layernorm.weight", Dtype::Bf16, &[8]);
    assert_eq!(
        refused(&more, Ranks::alone()),
        "tensor \"model.layers.5.input_layernorm.weight\" is of layer 5, config.json counts 5 (from 0)"
    );
    let mut without_count = llama();
    without_count.config = without_count.config.replace("num_hidden_layers", "n");
    assert_eq!(
        refused(&without_count, Ranks::alone().pp(0, 2)),
        "config.json: num_hidden_layers is not there, and stages count it"
    );
    share(&without_count, Ranks::alone().tp(0, 2), Fuse::No).unwrap();
}

#[test]
fn kv_heads_that_the_configuration_does_not_count_are_as_long_as_the_others() {
    let without = |sizes: &Sizes, model: fn(&Sizes) -> Model, keys: &[&str]| {
        let mut model = model(sizes);
        for key in keys {
            model.config = model.config.replace(key, "other");
        }
        model
    };
    let (llama, few) =
        (|sizes: &Sizes| models::llama("LlamaForCausalLM", sizes), Sizes { kv_heads: 6, ..TINY });
    let both = ["num_key_value_heads", "head_dim"];
    let tp = Ranks::alone().tp(1, 2);
    let half = Sizes { kv_heads: 12, ..TINY };
    let line = |tensor: &str, has: &str| {
        format!(
            "config.json: num_key_value_heads is not there, and is not num_attention_heads: tensor \"model.layers.0.self_attn.{tensor}.weight\" \
             has {has} heads, others have 2 for each; add the key"
        )
    };
    assert_eq!(refused(&without(&half, llama, &both), tp.clone()), line("k_proj", "24 elements for 24"));
    assert_eq!(refused(&without(&few, llama, &both), tp.clone()), line("k_proj", "12 elements for 24"));
    // q, k and v in one: 24 + 2 * 6 heads of 2, which could be 72 of 1.
    assert_eq!(
        refused(&without(&few, models::phi3, &both), tp.clone()),
        line("qkv_proj", "72 elements for 72")
    );
    let with_length = refused(&without(&half, llama, &both[..1]), tp.clone());
    assert!(with_length.ends_with("dimension 0 of 24 is not made of 24 kv heads of 2"), "{with_length}");
    for model in [llama, models::phi3] {
        share(&without(&TINY, model, &both), tp.clone(), Fuse::No).unwrap();
        share(&without(&half, model, &both[1..]), tp.clone(), Fuse::No).unwrap();
    }
    share(&without(&half, llama, &both), Ranks::alone().pp(0, 2), Fuse::No).unwrap(); // No head is cut.
}

#[test]
fn a_number_of_0_is_not_one_that_is_missing() {
    let with = |from: &str, to: &str| {
        let mut model = llama();
        model.config = model.config.replace(from, to);
        refused(&model, Ranks::alone().tp(0, 2))
    };
    let (heads, kv_heads) = ("\"num_attention_heads\":24", "\"num_key_value_heads\":6");
    let line = |what: &str| format!("config.json: {what}, and a rule counts it");
    assert_eq!(with(heads, "\"num_attention_heads\":0"), line("num_attention_heads is 0"));
    assert_eq!(with(heads, "\"other\":0"), line("num_attention_heads is not there"));
    assert_eq!(with(kv_heads, "\"num_key_value_heads\":0"), line("num_key_value_heads is 0"));
}

#[test]
fn a_range_of_layers_brings_the_ends_that_belong_to_it() {
    let names = |ranks: Ranks| -> Vec<String> {
        let share = share(&llama(), ranks, Fuse::No).unwrap();
        let names = share.assembly.tensors.into_iter().map(|tensor| tensor.name);
        names.filter(|name| name.ends_with("norm.weight") || !name.contains("layers")).collect()
    };
    let of_layers = |layers: std::ops::Range<u64>, more: &[&str]| -> Vec<String> {
        let norms = ["input_layernorm", "post_attention_layernorm"];
        let of = |layer: u64| norms.map(|norm| format!("model.layers.{layer}.{norm}.weight"));
        more.iter().map(|name| name.to_string()).chain(layers.flat_map(of)).collect()
    };
    assert_eq!(names(Ranks::alone().layers(0..2)), of_layers(0..2, &["model.embed_tokens.weight"]));
    assert_eq!(names(Ranks::alone().layers(2..4)), of_layers(2..4, &[]));
    assert_eq!(names(Ranks::alone().layers(4..5)), of_layers(4..5, &["model.norm.weight", "lm_head.weight"]));
}

#[test]
fn embeddings_that_are_the_head_as_well_are_on_both_ends_unless_the_configuration_says_no() {
    let count = |model: &Model, stage| {
        let share = share(model, Ranks::alone().pp(stage, 3), Fuse::No).unwrap();
        share.assembly.tensors.iter().filter(|tensor| tensor.name == "model.embed_tokens.weight").count()
    };
    let mut tied = llama().without("lm_head");
    assert_eq!([0, 1, 2].map(|stage| count(&tied, stage)), [1, 0, 1]);
    assert_eq!([0, 1, 2].map(|stage| count(&llama(), stage)), [1, 0, 0]);
    tied.config = tied.config.replace("\"torch_dtype\"", "\"tie_word_embeddings\":false,\"torch_dtype\"");
    assert_eq!([0, 1, 2].map(|stage| count(&tied, stage)), [1, 0, 0]);
}

#[test]
fn experts_and_sections_that_the_configuration_does_not_count_are_refused() {
    let moe = models::qwen_moe("Qwen3MoeForCausalLM", &TINY);
    let more = with(moe, "model.layers.0.mlp.experts.8.up_proj.weight", Dtype::Bf16, &[24, 8]);
    assert_eq!(
        refused(&more, Ranks::alone()),
        "tensor \"model.layers.0.mlp.experts.8.up_proj.weight\" is of expert 8, config.json counts 8"
    );
    let phi = models::phi3(&TINY);
    let odd = Model {
        config: phi.config.replace("\"num_key_value_heads\":24", "\"num_key_value_heads\":12"),
        ..phi
    };
    assert_eq!(
        refused(&odd, Ranks::alone().tp(0, 2)),
        "tensor \"model.layers.0.self_attn.qkv_proj.weight\": dimension 0 of 144 is not made of 24 heads + 12 kv heads + 12 kv heads of 2"
    );
    let flat =
        with(llama().without("layers.0.mlp.up_proj"), "model.layers.0.mlp.up_proj.weight", Dtype::Bf16, &[]);
    assert_eq!(
        refused(&flat, Ranks::alone()),
        "tensor \"model.layers.0.mlp.up_proj.weight\" [] has no dimension for rule \"layers.*.mlp.up_proj\", column"
    );
    let mut silent = llama();
    silent.config = silent.config.replace("num_attention_heads", "h").replace("num_key_value_heads", "k");
    assert_eq!(
        refused(&silent, Ranks::alone()),
        "config.json: num_attention_heads is not there, and a rule counts it"
    );
}

#[test]
fn tensors_that_no_rule_names_are_listed_or_replicated() {
    let mut model = with(llama(), "model.layers.0.mlp.extra.weight", Dtype::Bf16, &[6]);
    assert_eq!(
        refused(&model, Ranks::alone()),
        "no rule names model.layers.0.mlp.extra.weight; replicate what is unmatched (--unmatched replicate), or add rules"
    );
    for number in 0..30 {
        model = with(model, &format!("more.{number}"), Dtype::Bf16, &[1]);
    }
    let text = refused(&model, Ranks::alone());
    assert!(
        text.ends_with(
            "more.17, more.18 and 11 more; replicate what is unmatched (--unmatched replicate), or add rules"
        ),
        "{text}"
    );

    let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
    let rules = Rules::of(&config).unwrap().unmatched(Unmatched::Replicate);
    let on = |stage| {
        let share = share_by(&model, &rules, Ranks::alone().tp(1, 2).pp(stage, 2), Fuse::No).unwrap();
        let shape = |name: &str| {
            share
                .assembly
                .tensors
                .iter()
                .find(|tensor| tensor.name == name)
                .map(|tensor| tensor.shape.to_vec())
        };
        (shape("model.layers.0.mlp.extra.weight"), shape("more.3"))
    };
    assert_eq!(on(0), (Some(vec![6]), Some(vec![1])));
    assert_eq!(on(1), (None, Some(vec![1])));
}

#[test]
fn an_architecture_without_a_table_names_those_with_one() {
    let config = ModelConfig::parse(br#"{"architectures":["OtherForCausalLM"]}"#).unwrap();
    let text = Rules::of(&config).unwrap_err().to_string();
    assert!(
        text.starts_with("no rules for OtherForCausalLM; there are for BertForMaskedLM, BertModel, "),
        "{text}"
    );
    let text = Rules::of(&ModelConfig::default()).unwrap_err().to_string();
    assert!(text.starts_with("config.json names no architecture; there are rules for BertFor"), "{text}");
    assert_eq!(Rules::architectures().len(), 36);
}

#[test]
fn rules_that_overlap_and_differ_are_refused_by_name() {
    let share = |rules: &str| {
        let model = with(Model { tensors: Vec::new(), ..llama() }, "a.0.b.weight", Dtype::F32, &[4, 4]);
        share_by(&model, &Rules::parse(rules).unwrap(), Ranks::alone().tp(1, 2), Fuse::No)
            .map(|share| share.assembly.tensors[0].shape.to_vec())
            .map_err(|error| error.to_string())
    };
    // The same pattern twice, with and without a prefix, as a module and by its tensor.
    for rules in [
        r#"{"rules":{"a.*.b":"column","a.*.b":"row"}}"#,
        r#"{"rules":{"a.*.b.weight":"column","a.*.b":"row"}}"#,
        r#"{"prefixes":["","a."],"rules":{"a.*.b":"column","*.b":"row","a.0.b":"column","0.b":"row"}}"#,
    ] {
        let text = share(rules).unwrap_err();
        assert!(
            text.starts_with("tensor \"a.0.b.weight\": rules \"")
                && text.ends_with("name it alike, and differ"),
            "{text}"
        );
    }
    assert_eq!(
        share(r#"{"rules":{"a.*.b":"column","a.*.b.weight":"row"}}"#).unwrap_err(),
        "tensor \"a.0.b.weight\": rules \"a.*.b\" and \"a.*.b.weight\" name it alike, and differ"
    );
    // Those that mean the same, or are less specific, are no matter.
    assert_eq!(share(r#"{"rules":{"a.*.b":"column","a.*.b.weight":"column"}}"#).unwrap(), [2, 4]);
    assert_eq!(share(r#"{"rules":{"a.*.b":"column","a.0.b":"row","a.**":"replicated"}}"#).unwrap(), [4, 2]);
    assert_eq!(share(r#"{"rules":{"a.**":"replicated","**":"row"}}"#).unwrap(), [4, 4]);
}

#[test]
fn rules_that_say_nothing_sensible_are_refused_with_the_place() {
    let error = |rules: &str| Rules::parse(rules).unwrap_err().to_string();
    for (rules, expected) in [
        (r#"{"rules":{"a*.b":"row"}}"#, "\"a*.b\": * is a component of its own; ** stands at the end"),
        (r#"{"rules":{"a.**.b":"row"}}"#, "* is a component of its own; ** stands at the end"),
        (r#"{"rules":{"a..b":"row"}}"#, "a component is empty"),
        (r#"{"rules":{"a.b**":"row"}}"#, "** is a component of its own"),
        (r#"{"rules":{"a":"diagonal"}}"#, "\"a\": unknown variant `diagonal`, expected one of `column`"),
        (
            r#"{"rules":{"a":{"rule":"vocab","by":"heads"}}}"#,
            "by, sections, uneven, packed_block and transposed are of column and row",
        ),
        (
            r#"{"rules":{"a":{"rule":"column","by":"heads","sections":2}}}"#,
            "by and sections exclude one another",
        ),
        (r#"{"rules":{"a":{"rule":"column","sections":0}}}"#, "1 to 64 sections"),
        (r#"{"rules":{"a":{"rule":"column","by":[]}}}"#, "1 to 64 sections"),
        (r#"{"rules":{"a":{"rule":"row","pad_to":8}}}"#, "pad_to is of vocab, stacked of all others"),
        (r#"{"rules":{"a":{"rule":"vocab","pad_to":0}}}"#, "pad_to is 0, not 1 to 1048576"),
        (r#"{"rules":{"a":{"rule":"row","packed_block":0}}}"#, "packed_block is 1 to 65536"),
        (
            r#"{"rules":{"a":{"rule":"row","sections":2,"uneven":true}}}"#,
            "sections and what is counted are shared evenly",
        ),
        (r#"{"rules":{},"fuse":[{"name":"x","target":"t","rows":[]}]}"#, "fuse \"x\": no rows"),
        (r#"{"rules":{},"extends":"nothing"}"#, "extends \"nothing\", which there is no table for"),
        (r#"{"rules":{},"colour":1}"#, "unknown field `colour`"),
        ("[]", "not a JSON object"),
        (r#""rules""#, "not a JSON object"),
        (r#"{"rules":{"a":["column"]}}"#, "\"a\": [\"column\"] is neither a rule's name nor an object"),
        (r#"{"rules":{"a":2}}"#, "\"a\": 2 is neither a rule's name nor an object"),
    ] {
        let text = error(rules);
        assert!(text.contains(expected) && text.starts_with("rules given: "), "{rules}: {text}");
    }
    Rules::parse(r#"{"extends":"LlamaForCausalLM","rules":{"layers.*.more":"replicated"}}"#).unwrap();
}

fn only(name: &str) -> Fuse {
    Fuse::Only(vec![name.to_owned()])
}

fn names(share: &Share) -> Vec<&str> {
    share.assembly.tensors.iter().map(|tensor| tensor.name.as_str()).collect()
}

/// What fusing all leaves apart, and what asking for it by its name is refused with; on every rank the same.
fn unfused(model: &Model, name: &str) -> (Vec<String>, String) {
    let told = |ranks| {
        let share = share(model, ranks, Fuse::All).unwrap();
        share.assembly.unfused.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(told(Ranks::alone()), told(Ranks::alone().tp(1, 2)));
    (told(Ranks::alone()), share(model, Ranks::alone(), only(name)).unwrap_err().to_string())
}

#[test]
fn what_cannot_be_fused_keeps_its_members_and_is_told_unless_it_was_named() {
    let model = llama().without("layers.3.self_attn.k_proj");
    let (told, refused) = unfused(&model, "qkv");
    assert_eq!(
        told,
        [
            "qkv of 1 module, \"model.layers.3.self_attn.qkv_proj.weight\": its member \"model.layers.3.self_attn.k_proj.weight\" is not there"
        ]
    );
    assert_eq!(
        refused,
        "fused tensor \"model.layers.3.self_attn.qkv_proj.weight\": its member \"model.layers.3.self_attn.k_proj.weight\" is not there; leave \"qkv\" out, or fuse what can be (--fuse alone)"
    );
    let rest = share(&model, Ranks::alone().tp(1, 2), Fuse::All).unwrap();
    let names = names(&rest);
    assert!(names.contains(&"model.layers.2.self_attn.qkv_proj.weight"));
    assert!(names.contains(&"model.layers.3.self_attn.q_proj.weight"));
    assert!(!names.contains(&"model.layers.2.self_attn.q_proj.weight"));
    assert!(names.contains(&"model.layers.3.mlp.gate_up_proj.weight"));

    let other = with(
        llama().without("layers.0.mlp.up_proj"),
        "model.layers.0.mlp.up_proj.weight",
        Dtype::F32,
        &[48, 8],
    );
    assert_eq!(
        unfused(&other, "gate_up").0,
        [
            "gate_up of 1 module, \"model.layers.0.mlp.gate_up_proj.weight\": \"model.layers.0.mlp.gate_proj.weight\" is BF16 [48, 8], column, \"model.layers.0.mlp.up_proj.weight\" is F32 [48, 8], column"
        ]
    );
    assert_eq!(
        share(&llama(), Ranks::alone(), only("kv")).unwrap_err().to_string(),
        "the rules fuse no \"kv\"; they fuse qkv, gate_up"
    );
    let attention = share(&llama(), Ranks::alone(), only("qkv")).unwrap();
    let names = self::names(&attention);
    assert!(
        names.contains(&"model.layers.4.self_attn.qkv_proj.weight")
            && names.contains(&"model.layers.4.mlp.up_proj.weight")
    );
}

#[test]
fn a_module_is_fused_whole_or_not_at_all() {
    // Biases of q and v alone.
    let mut model = llama();
    for layer in 0..5 {
        for (name, rows) in [("q", 48), ("v", 12)] {
            let name = format!("model.layers.{layer}.self_attn.{name}_proj.bias");
            model = with(model, &name, Dtype::Bf16, &[rows]);
        }
    }
    let (told, _) = unfused(&model, "qkv");
    assert_eq!(
        told,
        [
            "qkv of 5 modules, such as \"model.layers.0.self_attn.qkv_proj.bias\": its member \"model.layers.0.self_attn.k_proj.bias\" is not there"
        ]
    );
    let share = share(&model, Ranks::alone(), Fuse::All).unwrap();
    assert!(!names(&share).iter().any(|name| name.contains("qkv_proj")));
    assert_eq!(names(&share).len(), model.tensors.len() - 5);
}

#[test]
fn stacks_that_lack_an_expert_stay_apart_on_every_rank() {
    let moe = models::qwen_moe("Qwen3MoeForCausalLM", &TINY);
    for expert in [2, 7] {
        let missing = format!("model.layers.1.mlp.experts.{expert}.up_proj");
        let model = moe.clone().without(&missing);
        let told = [0, 1].map(|rank| {
            let share = share(&model, Ranks::alone().ep(rank, 2), Fuse::All).unwrap();
            assert!(names(&share).contains(&"model.layers.0.mlp.experts.w13_weight"));
            assert!(!names(&share).contains(&"model.layers.1.mlp.experts.w13_weight"));
            share.assembly.unfused
        });
        assert_eq!(told[0], told[1]);
        assert!(told[0][0].why.contains(&format!("member \"{missing}.weight\" is not there")), "{told:?}");
    }
    let (told, refused) = unfused(&moe.without("experts.7."), "experts_w13");
    assert_eq!(told.len(), 2);
    assert!(told[0].starts_with("experts_w13 of 5 modules, such as "), "{told:?}");
    assert!(
        refused.contains("experts_w13\" out")
            || refused.contains("member \"model.layers.0.mlp.experts.7.gate_proj.weight\""),
        "{refused}"
    );
}

#[test]
fn a_fused_tensor_does_not_take_anothers_name() {
    let taken = with(llama(), "model.layers.0.mlp.gate_up_proj.weight", Dtype::F32, &[2]);
    let config = ModelConfig::parse(taken.config.as_bytes()).unwrap();
    let rules = Rules::of(&config).unwrap().unmatched(Unmatched::Replicate);
    let share = share_by(&taken, &rules, Ranks::alone(), Fuse::All).unwrap();
    assert_eq!(
        share.assembly.unfused[0].to_string(),
        "gate_up of 1 module, \"model.layers.0.mlp.gate_up_proj.weight\": another tensor has that name"
    );
    let names = names(&share);
    assert_eq!(names.iter().filter(|name| **name == "model.layers.0.mlp.gate_up_proj.weight").count(), 1);
    let refused = share_by(&taken, &rules, Ranks::alone(), only("gate_up")).unwrap_err().to_string();
    assert!(refused.contains("another tensor has that name"), "{refused}");
}

#[test]
fn latent_attention_without_low_rank_queries_has_no_fused_attention() {
    // DeepSeek-V2-Lite: q_proj and kv_a_proj_with_mqa are there, q_a_proj and k_proj are not.
    let sizes = Sizes { nope: 2, hidden: 12, q_lora: 8, ..TINY };
    let mut model = models::deepseek("DeepseekV2ForCausalLM", &sizes).without("self_attn.q_");
    for layer in 0..=sizes.layers {
        let name = format!("model.layers.{layer}.self_attn.q_proj.weight");
        model = with(model, &name, Dtype::Bf16, &[24 * (2 + 2), 12]);
    }
    let (told, _) = unfused(&model, "qkv");
    assert_eq!(told.len(), 2, "{told:?}");
    for name in ["qkv_a of 6 modules, such as ", "qkv of 6 modules, such as "] {
        assert!(told.iter().any(|line| line.starts_with(name)), "{told:?}");
    }
    let share = share(&model, Ranks::alone().tp(1, 2), Fuse::All).unwrap();
    assert!(names(&share).contains(&"model.layers.2.mlp.experts.w13_weight"));
    assert!(names(&share).contains(&"model.layers.0.mlp.gate_up_proj.weight"));
    let refused = self::share(&llama(), Ranks::alone(), Fuse::Only(vec!["qkv".into(), "kv".into()]));
    assert!(refused.is_err());
    let nothing = models::deepseek("DeepseekV3ForCausalLM", &sizes);
    assert_eq!(
        self::share(&nothing, Ranks::alone(), only("qkv")).unwrap_err().to_string(),
        "no tensor of the model goes into a fused \"qkv\"; leave it out"
    );
}

#[test]
fn what_stays_packed_is_not_fused_and_not_cut_inside_a_block() {
    let blocks = Sizes { nope: 2, hidden: 12, q_lora: 8, block: 2, ..TINY };
    let model = models::deepseek("DeepseekV3ForCausalLM", &blocks);
    let checkpoint = model.checkpoint();
    let quantization = recognize(&checkpoint, &model);
    let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
    let rules = Rules::of(&config).unwrap();
    let stored = |fuse| Setup { quantization: Some(&quantization), dequantize: None, fuse };
    let partition = Partition::new(&checkpoint, &config, &rules, &stored(Fuse::All)).unwrap();
    let share = partition.share(&Ranks::alone(), DeviceId::Host).unwrap();
    assert_eq!(share.assembly.unfused.len(), 5, "{:?}", share.assembly.unfused);
    assert_eq!(names(&share).len(), model.tensors.len());
    assert!(partition.summary(&share).to_string().contains("\n  not fused: qkv_a of 6 modules, such as "));
    assert_eq!(
        Partition::new(&checkpoint, &config, &rules, &stored(only("qkv_a"))).unwrap_err().to_string(),
        "fused tensor \"model.layers.0.self_attn.fused_qkv_a_proj.weight\": \"model.layers.0.self_attn.q_a_proj.weight\" stays quantized, with scales of its own; dequantized it would fit; leave \"qkv_a\" out, or fuse what can be (--fuse alone)"
    );
    // Without recognition a scale is a tensor like any other, and has no rule.
    let unseen = Setup::default();
    let text = Partition::new(&checkpoint, &config, &rules, &unseen).unwrap_err().to_string();
    assert!(text.starts_with("no rule names model.layers.0.self_attn.q_a_proj.weight_scale_inv, "), "{text}");

    let wide = Sizes { hidden: 32, moe_intermediate: 96, block: 32, ..TINY };
    let model = models::gpt_oss(&wide);
    let checkpoint = model.checkpoint();
    let quantization = recognize(&checkpoint, &model);
    let setup = Setup { quantization: Some(&quantization), dequantize: None, fuse: Fuse::No };
    let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
    let rules = Rules::of(&config).unwrap();
    let partition = Partition::new(&checkpoint, &config, &rules, &setup).unwrap();
    partition.share(&Ranks::alone().tp(2, 3), DeviceId::Host).unwrap();
    // By rules that know of no blocks.
    let text = r#"{"extends":"GptOssForCausalLM","rules":{
        "layers.*.mlp.experts.gate_up_proj": {"rule":"column","by":"intermediate","stacked":true},
        "layers.*.mlp.experts.gate_up_proj_bias": {"rule":"column","by":"intermediate","stacked":true},
        "layers.*.mlp.experts.down_proj": {"rule":"row","by":"intermediate","stacked":true}}}"#;
    let even = Rules::parse(text).unwrap();
    let partition = Partition::new(&checkpoint, &config, &even, &setup).unwrap();
    let error = partition.share(&Ranks::alone().tp(1, 2), DeviceId::Host).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a tensor that stays as it is stored cannot be cut so; tp sizes that can: 1, 3; whole experts (--whole-experts) or dequantizing (--dequantize) would work, too"
    );
    assert_eq!(
        std::error::Error::source(&error).unwrap().to_string(),
        "tensor \"model.layers.0.mlp.experts.down_proj_scales\": column 48 of \"model.layers.0.mlp.experts.down_proj\" is inside 32 columns that are scaled together; cutting at 32 or 64 would work, or dequantizing"
    );
    partition.share(&Ranks::alone().tp(1, 2).whole_experts(), DeviceId::Host).unwrap();
}

#[test]
fn packed_experts_are_shared_in_whole_blocks_and_their_biases_with_them() {
    let sizes = Sizes { hidden: 32, moe_intermediate: 96, block: 32, layers: 1, ..TINY };
    let model = models::gpt_oss(&sizes);
    let checkpoint = model.checkpoint();
    let quantization = recognize(&checkpoint, &model);
    let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
    let rules = Rules::of(&config).unwrap();
    let dequantize = all(&quantization);
    let widths = |dequantize, tp_size: u32| -> Vec<[u64; 5]> {
        let setup = Setup { quantization: Some(&quantization), dequantize, fuse: Fuse::No };
        let partition = Partition::new(&checkpoint, &config, &rules, &setup).unwrap();
        let of_rank = |rank| {
            let share = partition.share(&Ranks::alone().tp(rank, tp_size), DeviceId::Host).unwrap();
            let len = |name: &str, dim: usize| {
                let name = format!("model.layers.0.mlp.experts.{name}");
                let find = |tensor: &&tensorhaul_plan::Assembled| tensor.name == name;
                let found = share.assembly.tensors.iter().find(find);
                found.map_or(0, |tensor| if tensor.shape.contains(&0) { 0 } else { tensor.shape[dim] })
            };
            match dequantize {
                None => [
                    len("gate_up_proj_blocks", 1),
                    len("gate_up_proj_scales", 1),
                    len("gate_up_proj_bias", 1),
                    len("down_proj_blocks", 2) * 32,
                    len("down_proj_scales", 2) * 32,
                ],
                Some(_) => {
                    let rows = len("gate_up_proj", 1);
                    [rows, rows, len("gate_up_proj_bias", 1), len("down_proj", 2), len("down_proj", 2)]
                }
            }
        };
        (0..tp_size).map(of_rank).collect()
    };
    let features = |counts: &[u64]| counts.iter().map(|n| [2 * n, 2 * n, 2 * n, *n, *n]).collect::<Vec<_>>();
    // 3 blocks of 32: as many as go around, then none.
    assert_eq!(widths(None, 1), features(&[96]));
    assert_eq!(widths(None, 2), features(&[64, 32]));
    assert_eq!(widths(None, 3), features(&[32, 32, 32]));
    assert_eq!(widths(None, 4), features(&[32, 32, 32, 0]));
    let setup = Setup { quantization: Some(&quantization), ..Setup::default() };
    let partition = Partition::new(&checkpoint, &config, &rules, &setup).unwrap();
    let share = partition.share(&Ranks::alone().tp(3, 4), DeviceId::Host).unwrap();
    for (name, shape) in [
        ("gate_up_proj_blocks", &[8, 0, 1, 16][..]),
        ("gate_up_proj_scales", &[8, 0, 1]),
        ("gate_up_proj_bias", &[8, 0]),
        ("down_proj_blocks", &[8, 32, 0, 16]),
        ("down_proj_scales", &[8, 32, 0]),
    ] {
        let find = |tensor: &&tensorhaul_plan::Assembled| tensor.name.ends_with(name);
        assert_eq!(*share.assembly.tensors.iter().find(find).unwrap().shape, *shape, "{name}");
    }
    assert_eq!(widths(Some(&dequantize), 2), features(&[48, 48]));
    assert_eq!(widths(Some(&dequantize), 4), features(&[24; 4]));
}

#[test]
fn experts_that_a_model_does_not_have_are_not_shared() {
    assert_eq!(
        refused(&llama(), Ranks::alone().ep(0, 2)),
        "LlamaForCausalLM has no experts for 2 ranks to share; leave expert parallelism out"
    );
    share(&llama(), Ranks::alone().whole_experts(), Fuse::No).unwrap();
    let stacked = models::gpt_oss(&Sizes { hidden: 32, ..TINY });
    share(&stacked, Ranks::alone().ep(0, 2), Fuse::No).unwrap();
}

#[test]
fn scales_of_whole_tensors_are_replicated_and_sections_are_put_together_packed() {
    let mut model = models::phi3(&TINY);
    for tensor in model.tensors.clone() {
        if tensor.name.contains("proj") {
            let own = model.tensors.iter_mut().find(|own| own.name == tensor.name).unwrap();
            own.dtype = Dtype::F8E4m3;
            model = with(model, &format!("{}_scale", tensor.name), Dtype::F32, &[]);
            model = with(model, &tensor.name.replace("weight", "input_scale"), Dtype::F32, &[]);
        }
    }
    model.config = model
        .config
        .replace("\"torch_dtype\"", r#""quantization_config":{"quant_method":"fp8"},"torch_dtype""#);
    let checkpoint = model.checkpoint();
    let quantization: Quantization = recognize(&checkpoint, &model);
    assert_eq!(quantization.groups().len(), 4 * 5);
    let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
    let rules = Rules::of(&config).unwrap();
    let dequantize = all(&quantization);
    let [stored, made] = [None, Some(&dequantize)].map(|dequantize| {
        let setup = Setup { quantization: Some(&quantization), dequantize, fuse: Fuse::No };
        let partition = Partition::new(&checkpoint, &config, &rules, &setup).unwrap();
        partition.share(&Ranks::alone().tp(1, 2), DeviceId::Host).unwrap().assembly.tensors
    });
    assert_eq!(stored.len(), checkpoint.len());
    for tensor in &made {
        let other = stored.iter().find(|other| other.name == tensor.name).unwrap();
        assert_eq!((&tensor.shape, tensor.parts.len()), (&other.shape, other.parts.len()));
        for (part, other) in tensor.parts.iter().zip(&other.parts) {
            let pieces = |slice: &Slice, name: &str| {
                let info = checkpoint.find(name).unwrap().info;
                slice.pieces(info.dtype, info.shape).unwrap()
            };
            assert_eq!(pieces(&part.slice, &tensor.name), pieces(&other.slice, &tensor.name));
            assert_eq!(part.at, other.at);
        }
    }
    let find = |name: &str| stored.iter().find(|tensor| tensor.name == name).unwrap();
    let qkv = find("model.layers.0.self_attn.qkv_proj.weight");
    assert_eq!((qkv.shape.as_slice(), qkv.parts.len()), (&[72, 8][..], 3));
    for scale in ["weight_scale", "input_scale"] {
        let scale = find(&format!("model.layers.0.self_attn.qkv_proj.{scale}"));
        assert_eq!((scale.shape.len(), scale.parts.len()), (0, 1));
    }
}

/// Phi-3 in GPTQ, with the indices of an act-order: four linear layers of one layer.
fn phi3_gptq() -> Model {
    let sizes =
        Sizes { layers: 1, hidden: 64, heads: 4, kv_heads: 4, head_dim: 16, intermediate: 64, ..TINY };
    let mut model = models::phi3(&sizes);
    for tensor in std::mem::take(&mut model.tensors) {
        let Some(at) = tensor.name.strip_suffix("proj.weight") else {
            model.tensors.push(tensor);
            continue;
        };
        let [rows, cols] = *tensor.shape else { unreachable!("linear layers are matrices") };
        for (name, dtype, shape) in [
            ("qweight", Dtype::I32, &[cols / 8, rows][..]),
            ("qzeros", Dtype::I32, &[cols / 16, rows / 8]),
            ("scales", Dtype::F16, &[cols / 16, rows]),
            ("g_idx", Dtype::I32, &[cols]),
        ] {
            model = with(model, &format!("{at}proj.{name}"), dtype, shape);
        }
    }
    let gptq = r#""quantization_config":{"quant_method":"gptq","bits":4,"group_size":16,"desc_act":true,"sym":false},"torch_dtype""#;
    model.config = model.config.replace("\"torch_dtype\"", gptq);
    model
}

#[test]
fn sections_of_packed_columns_lie_side_by_side_and_a_group_index_keeps_all_groups() {
    let model = phi3_gptq();
    let checkpoint = model.checkpoint();
    let quantization = recognize(&checkpoint, &model);
    assert_eq!(quantization.groups().len(), 4);
    let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
    let rules = Rules::of(&config).unwrap();
    let setup = Setup { quantization: Some(&quantization), ..Setup::default() };
    let partition = Partition::new(&checkpoint, &config, &rules, &setup).unwrap();
    let share = partition.share(&Ranks::alone().tp(1, 2), DeviceId::Host).unwrap();
    let find = |name: &str| {
        let tensor = share.assembly.tensors.iter().find(|tensor| tensor.name.ends_with(name)).unwrap();
        let at = tensor.parts.iter().map(|part| part.at.to_vec()).collect::<Vec<_>>();
        let start = |part: &Part| part.slice.ranges().iter().map(|range| range.start).collect::<Vec<_>>();
        (tensor.shape.to_vec(), at, tensor.parts.iter().map(start).collect::<Vec<_>>())
    };
    // Column-parallel in three sections of 64 rows: the words of rows 32.., 96.. and 160.. of each.
    let three = |step: u64| [[0, 0], [0, step], [0, 2 * step]].map(Vec::from).to_vec();
    let starts = |unit: u64| [[0, unit], [0, 3 * unit], [0, 5 * unit]].map(Vec::from).to_vec();
    assert_eq!(find("qkv_proj.qweight"), (vec![8, 96], three(32), starts(32)));
    assert_eq!(find("qkv_proj.qzeros"), (vec![4, 12], three(4), starts(4)));
    assert_eq!(find("qkv_proj.scales"), (vec![4, 96], three(32), starts(32)));
    assert_eq!(find("qkv_proj.g_idx").0, [64]);
    // Row-parallel: words of columns 32.., and the scales of all groups, which the index counts.
    assert_eq!(find("o_proj.qweight"), (vec![4, 64], vec![vec![0, 0]], vec![vec![4, 0]]));
    assert_eq!(find("o_proj.g_idx"), (vec![32], vec![vec![0]], vec![vec![32]]));
    assert_eq!(find("o_proj.scales").0, [4, 64]);
    let error = partition.share(&Ranks::alone().tp(1, 8), DeviceId::Host).unwrap_err().to_string();
    assert!(error.contains("8 ranks cannot share 4 heads evenly; 1, 2, 4 can"), "{error}");
}

#[test]
fn an_index_in_order_leaves_a_rank_the_scales_of_its_own_groups() {
    let model = phi3_gptq();
    let checkpoint = model.checkpoint();
    let quantization = recognize(&checkpoint, &model);
    let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
    let rules = Rules::of(&config).unwrap();
    let setup = Setup { quantization: Some(&quantization), ..Setup::default() };
    let share = |index: &dyn Fn(u32) -> u32, tp_rank, tp_size| {
        let partition = Partition::new(&checkpoint, &config, &rules, &setup).unwrap();
        let indices = partition.indices(tp_size);
        let names: Vec<&str> = indices.iter().map(|id| checkpoint.tensor(*id).info.name).collect();
        assert_eq!(
            names,
            ["model.layers.0.self_attn.o_proj.g_idx", "model.layers.0.mlp.down_proj.g_idx"],
            "columns of others are not cut"
        );
        assert_eq!(partition.indices(1), []);
        let mut values = Values::none();
        for id in indices {
            let bytes: Vec<u8> = (0..64).flat_map(|col| index(col).to_le_bytes()).collect();
            values.insert(id, bytes);
        }
        partition.with_indices(&values).share(&Ranks::alone().tp(tp_rank, tp_size), DeviceId::Host).unwrap()
    };
    let find = |share: &Share, name: &str| {
        let tensor = share.assembly.tensors.iter().find(|tensor| tensor.name.ends_with(name)).unwrap();
        let starts: Vec<u64> = tensor.parts[0].slice.ranges().iter().map(|range| range.start).collect();
        (tensor.shape.to_vec(), starts)
    };
    let in_order = share(&|col| col / 16, 1, 2);
    assert_eq!(find(&in_order, "o_proj.qweight"), (vec![4, 64], vec![4, 0]));
    assert_eq!(find(&in_order, "o_proj.scales"), (vec![2, 64], vec![2, 0]));
    assert_eq!(find(&in_order, "o_proj.qzeros"), (vec![2, 8], vec![2, 0]));
    // The first entries count from the rank's own first group.
    assert_eq!(find(&in_order, "o_proj.g_idx"), (vec![32], vec![0]));
    let by_activation = share(&|col| (col + 1) % 64 / 16, 1, 2);
    assert_eq!(find(&by_activation, "o_proj.scales").0, [4, 64]);
    assert_eq!(find(&by_activation, "o_proj.g_idx"), (vec![32], vec![32]));
    // Down's columns in 8 are half a group: the index of these columns, and all scales.
    let sizes = r#"{"extends":"Phi3ForCausalLM","rules":{"layers.*.self_attn.o_proj":"row","layers.*.self_attn.qkv_proj":{"rule":"column","sections":3}}}"#;
    let rules = Rules::parse(sizes).unwrap();
    let partition = Partition::new(&checkpoint, &config, &rules, &setup).unwrap();
    let mut values = Values::none();
    for id in partition.indices(8) {
        values.insert(id, (0..64u32).flat_map(|col| (col / 16).to_le_bytes()).collect::<Vec<u8>>());
    }
    let straddling = partition.with_indices(&values).share(&Ranks::alone().tp(3, 8), DeviceId::Host).unwrap();
    assert_eq!(find(&straddling, "down_proj.scales").0, [4, 64]);
    assert_eq!(find(&straddling, "down_proj.g_idx"), (vec![8], vec![24]));
    // Two stretches of columns are not one beginning of the index.
    let sections =
        r#"{"extends":"Phi3ForCausalLM","rules":{"layers.*.mlp.down_proj":{"rule":"row","sections":2}}}"#;
    let rules = Rules::parse(sections).unwrap();
    let partition = Partition::new(&checkpoint, &config, &rules, &setup).unwrap().with_indices(&values);
    let in_sections = partition.share(&Ranks::alone().tp(1, 2), DeviceId::Host).unwrap();
    assert_eq!(find(&in_sections, "down_proj.scales").0, [4, 64]);
    assert_eq!(find(&in_sections, "down_proj.g_idx"), (vec![32], vec![16]));
}

#[test]
fn hostile_sizes_are_refused_before_they_take_memory_or_time() {
    let deep = vec!["a"; 100].join(".");
    let text = Rules::parse(&format!(r#"{{"rules":{{"{deep}":"row"}}}}"#)).unwrap_err().to_string();
    assert!(text.ends_with("more than 32 components"), "{text}");
    // A tensor without elements may have any length in the other dimension.
    let long = with(
        llama().without("layers.0.mlp.up_proj"),
        "model.layers.0.mlp.up_proj.weight",
        Dtype::Bf16,
        &[(1 << 62) + 1, 0],
    );
    let text = refused(&long, Ranks::alone().tp(1, 2));
    assert!(text.contains("2 ranks cannot share 4611686018427387905 rows evenly; 1 can"), "{text}");
    let longer = with(llama().without("lm_head"), "lm_head.weight", Dtype::Bf16, &[u64::MAX, 0]);
    let shared = share(&longer, Ranks::alone().tp(1, 2), Fuse::No).unwrap();
    let head = shared.assembly.tensors.iter().find(|tensor| tensor.name == "lm_head.weight").unwrap();
    assert_eq!(*head.shape, [(1 << 63) - 1, 0]);
    // An expert's number is held against the configuration before anything is stacked by it.
    let moe = models::qwen_moe("Qwen3MoeForCausalLM", &TINY);
    let many = Model { config: moe.config.replace("\"num_experts\":8,", ""), ..moe };
    let name = "model.layers.0.mlp.experts.4294967295.up_proj.weight";
    let text =
        share(&with(many, name, Dtype::Bf16, &[24, 8]), Ranks::alone(), Fuse::All).unwrap_err().to_string();
    assert!(
        text.starts_with(&format!("tensor \"{name}\" is of expert 4294967295, config.json counts ")),
        "{text}"
    );
}
