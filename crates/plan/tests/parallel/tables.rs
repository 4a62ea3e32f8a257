//! Every table against models of each of its architectures: nothing is left unnamed, and no line is for nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use serde_json::Value;
use tensorhaul_plan::DeviceId;
use tensorhaul_plan::parallel::{ModelConfig, Partition, Ranks, Rules, Setup};

use crate::golden::recognize;
use crate::models::{self, Model, TINY};
use crate::property::zoo;

/// Lines that no model here has a tensor for, and why they are there.
const FOR_RARE_FILES: &[(&str, &str, &str)] = &[
    ("bert", "cls.predictions.decoder", "files that do not tie it to the embeddings"),
    ("bert", "cls.seq_relationship", "files of the pretraining, with both of its heads"),
    ("llama", "layers.*.self_attn.rotary_emb.inv_freq", "early files store what is computed today"),
];

/// Models of every architecture.
fn models() -> Vec<Model> {
    let llama = |architecture: &&str| models::llama(architecture, &TINY);
    let seeing = |(architecture, others): &(&str, [&str; 2])| {
        let language = models::llama("MistralForCausalLM", &TINY);
        models::seeing(architecture, language, ["", "language_model."], others)
    };
    let eyes = ["vision_tower.layers.0.mlp.fc1.weight", "multi_modal_projector.linear_1.weight"];
    let qwen = models::llama("Qwen2ForCausalLM", &TINY);
    let mut models: Vec<Model> = zoo().into_iter().map(|(model, _)| model).collect();
    models.extend(
        [
            "Cohere2ForCausalLM",
            "Ernie4_5ForCausalLM",
            "GraniteForCausalLM",
            "Olmo2ForCausalLM",
            "Olmo3ForCausalLM",
            "SeedOssForCausalLM",
        ]
        .iter()
        .map(llama),
    );
    models.extend(
        [("LlavaForConditionalGeneration", eyes), ("Mistral3ForConditionalGeneration", eyes)]
            .iter()
            .map(seeing),
    );
    models.extend([
        models::llama4_language(&TINY),
        models::seeing("Qwen2VLForConditionalGeneration", qwen, ["", ""], &["visual.merger.mlp.0.weight"]),
        models::deepseek("Glm4MoeLiteForCausalLM", &TINY),
        models::deepseek("GlmMoeDsaForCausalLM", &TINY),
    ]);
    models
}

/// A table as it is written.
struct Written {
    name: String,
    architectures: BTreeSet<String>,
    extends: Option<String>,
    patterns: Vec<String>,
}

fn tables() -> Vec<Written> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/parallel/rules");
    let read = |path: std::path::PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        let table: Value = serde_json::from_str(&text).unwrap();
        let architectures = table["architectures"].as_array().unwrap().iter();
        Written {
            name: path.file_stem().unwrap().to_str().unwrap().to_owned(),
            architectures: architectures.map(|name| name.as_str().unwrap().to_owned()).collect(),
            extends: table["extends"].as_str().map(str::to_owned),
            patterns: table["rules"].as_object().unwrap().keys().cloned().collect(),
        }
    };
    let mut tables: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| read(entry.unwrap().path())).collect();
    tables.sort_by(|one, other| one.name.cmp(&other.name));
    tables
}

/// Tells whether a table is another, or takes its lines over.
fn has_lines_of(tables: &[Written], own: &Written, of: &Written) -> bool {
    let base = own.extends.as_ref().and_then(|base| tables.iter().find(|table| table.name == *base));
    own.name == of.name || base.is_some_and(|base| has_lines_of(tables, base, of))
}

#[test]
fn every_architecture_is_shared_by_two_and_every_line_of_its_table_names_something() {
    let tables = tables();
    let written: BTreeSet<_> = tables.iter().flat_map(|table| table.architectures.clone()).collect();
    assert_eq!(written, Rules::architectures().into_iter().collect());
    // By table and pattern, whether a tensor was found that has it.
    let mut is_used: BTreeMap<(&str, &str), bool> = BTreeMap::new();
    let mut planned = BTreeSet::new();
    for model in models() {
        let config = ModelConfig::parse(model.config.as_bytes()).unwrap();
        let architecture = &config.architectures[0];
        let (checkpoint, rules) = (model.checkpoint(), Rules::of(&config).unwrap());
        let quantization = recognize(&checkpoint, &model);
        let setup = Setup { quantization: Some(&quantization), ..Setup::default() };
        // Tensors that no rule names are an error here.
        let partition = Partition::new(&checkpoint, &config, &rules, &setup)
            .unwrap_or_else(|error| panic!("{architecture}: {error}"));
        // One KV head is shared by both.
        for rank in [0, 1] {
            let share = partition.share(&Ranks::alone().tp(rank, 2), DeviceId::Host);
            share.unwrap_or_else(|error| panic!("{architecture}, rank {rank}: {error}"));
        }
        planned.insert(architecture.clone());
        let unused: BTreeSet<&str> = partition.unused().collect();
        let own = tables.iter().find(|table| table.architectures.contains(architecture)).unwrap();
        for table in tables.iter().filter(|table| has_lines_of(&tables, own, table)) {
            for pattern in &table.patterns {
                *is_used.entry((&table.name, pattern)).or_default() |= !unused.contains(pattern.as_str());
            }
        }
    }
    assert_eq!(planned, written, "every architecture has a model");
    let unused: Vec<_> = is_used.iter().filter(|(_, is_used)| !**is_used).map(|(line, _)| *line).collect();
    let expected: Vec<_> = FOR_RARE_FILES.iter().map(|(table, pattern, _)| (*table, *pattern)).collect();
    assert_eq!(unused, expected);
}
