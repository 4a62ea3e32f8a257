//! Plans in the words of transformers: what each word does to the weights.
//!
//! Most words say how activations are exchanged, which is none of a loader's business; what is left of them is one of four cuts. Unlike the tables
//! of this crate they count elements, never heads: a cut may fall inside a head, and the last ranks may have less.
//!
//! # Source
//! transformers 5.23.0, `distributed/tensor_parallel.py` and `distributed/expert_parallel.py`; 4.57.1, `integrations/tensor_parallel.py`
//! for the words that went.

use super::ParallelError;
use super::rules::{How, Rule, Sections, Split};
use super::table::{Lines, Table};

/// Reads a plan, or tells that the text is none: an object of strings.
pub(super) fn parse(text: &str) -> Result<Option<Table>, ParallelError> {
    let Ok(Lines(lines)) = serde_json::from_str::<Lines<String>>(text) else { return Ok(None) };
    let mut table = Table::parse("of transformers' words", FRAME)?;
    for (pattern, word) in lines {
        let Some(rule) = rule(&word) else {
            let known = WORDS.iter().flat_map(|(words, _)| *words).copied().collect();
            return Err(ParallelError::UnknownWord { pattern, word, known });
        };
        let first = table.rules.len();
        for (name, of_one) in saved_names(&pattern) {
            table.rules.push((name, if of_one { unpacked(&rule) } else { rule.clone() }));
        }
        // What is whole may stand for a module without a tensor, whose activations the word is about.
        let is_of_tensors = rule.how != How::Replicated || rule.is_stacked;
        table.rules.push((pattern, rule));
        table.own.extend(is_of_tensors.then_some(first..table.rules.len()));
    }
    Ok(Some(table))
}

/// Returns the names under which files have what transformers packs when it loads a model: experts one by one. The second is whether a rule for
/// the packed tensor is to be one for a single matrix.
fn saved_names(pattern: &str) -> Vec<(String, bool)> {
    let names: &[&str] = match pattern.rsplit('.').next() {
        Some("gate_up_proj") => &["gate_proj", "up_proj", "w1", "w3"],
        Some("down_proj") => &["down_proj", "w2"],
        _ => return Vec::new(),
    };
    let Some((stem, _)) = pattern.rsplit_once('.').filter(|(stem, _)| stem.ends_with(".experts")) else {
        return Vec::new();
    };
    let mixtral = stem.strip_suffix("mlp.experts").map(|stem| [stem, "block_sparse_moe.experts"].concat());
    let stems = [Some(stem.to_owned()), mixtral].into_iter().flatten();
    stems.flat_map(|stem| names.iter().map(move |name| (format!("{stem}.*.{name}"), true))).collect()
}

/// Returns the rule of one matrix from that of a stack or a pack.
fn unpacked(rule: &Rule) -> Rule {
    let one = |split: &Split| Split { sections: Sections::Equal(1), ..split.clone() };
    let how = match &rule.how {
        How::Column(split) => How::Column(one(split)),
        How::Row(split) => How::Row(one(split)),
        other => other.clone(),
    };
    // The number in the name gives an expert to its rank.
    Rule { how, is_stacked: false, ..rule.clone() }
}

fn rule(word: &str) -> Option<Rule> {
    let (_, effect) = WORDS.iter().find(|(words, _)| words.contains(&word))?;
    let split = |sections| Split {
        sections: Sections::Equal(sections),
        is_uneven: sections == 1,
        packed_block: None,
    };
    let rule = match effect {
        Effect::Column => Rule::of(How::Column(split(1))),
        Effect::Row => Rule::of(How::Row(split(1))),
        Effect::PackedColumn => Rule::of(How::Column(split(2))),
        Effect::PackedRow => Rule::of(How::Row(split(2))),
        Effect::Experts => Rule { is_stacked: true, ..Rule::REPLICATED },
        Effect::Whole => Rule::REPLICATED,
    };
    Some(Rule { has_bias_everywhere: true, ..rule })
}

/// What a word does to the weight of its module; a bias goes with a column and is whole otherwise.
enum Effect {
    /// Shares the last dimension but one; the only one of a vector.
    Column,
    /// Shares the last dimension.
    Row,
    /// Shares each half of the last dimension but one.
    PackedColumn,
    /// Shares each half of the last dimension.
    PackedRow,
    /// Shares the first dimension between the expert-parallel ranks.
    Experts,
    /// Nothing: the word is about activations, gradients or routing.
    Whole,
}

const WORDS: [(&[&str], Effect); 6] = [
    (
        &["colwise", "colwise_rep", "colwise_gather_output", "local_colwise", "embedding_rowwise"],
        Effect::Column,
    ),
    (&["rowwise", "rowwise_rep", "rowwise_split_input", "local_rowwise", "embedding_colwise"], Effect::Row),
    (&["packed_colwise", "local_packed_colwise"], Effect::PackedColumn),
    (&["packed_rowwise", "local_packed_rowwise"], Effect::PackedRow),
    (&["grouped_gemm"], Effect::Experts),
    (
        &[
            "replicate",
            "replicated_with_grad_allreduce",
            "sequence_parallel",
            "local",
            "local_params",
            "gather",
            "all_reduce",
            "mla_kv_a_proj",
            "moe_tp_experts",
            "moe_identity_expert",
            "megamoe_experts",
            "megamoe_router",
            "ep_router",
            "ep_dispatch_experts",
        ],
        Effect::Whole,
    ),
];

/// Where the layers, experts and ends of models in the library's own naming are; the plan brings the rules.
const FRAME: &str = r#"{
    "prefixes": ["", "model.", "model.language_model.", "language_model.model.", "language_model."],
    "layers": ["layers.*"],
    "experts": ["layers.*.mlp.experts.*", "layers.*.block_sparse_moe.experts.*"],
    "first": ["embed_tokens", "vision_tower", "multi_modal_projector"],
    "last": ["norm", "lm_head"],
    "tied": {"embeddings": "embed_tokens.weight", "head": "lm_head.weight"},
    "rules": {}
}"#;
