//! The text of rules: JSON tables, embedded or given.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::config::Count;
use super::fuse::Fusion;
use super::rules::{How, Rule, Sections, Split};
use super::{ModelConfig, ParallelError};

/// A table as it is written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Table {
    #[serde(skip)]
    pub(super) name: String,
    /// Whose rules these are; [`architectures`] asks for them alone.
    #[serde(default, rename = "architectures")]
    _architectures: Vec<String>,
    /// The table whose lines hold as well, by its name or an architecture's.
    #[serde(default)]
    extends: Option<String>,
    #[serde(default)]
    pub(super) prefixes: Vec<String>,
    #[serde(default)]
    pub(super) layers: Vec<String>,
    #[serde(default)]
    pub(super) experts: Vec<String>,
    #[serde(default)]
    pub(super) first: Vec<String>,
    #[serde(default)]
    pub(super) last: Vec<String>,
    #[serde(default)]
    pub(super) tied: Option<Tied>,
    /// Numbers that a `config.json` may leave out, by its own keys.
    #[serde(default)]
    numbers: serde_json::Map<String, Value>,
    #[serde(skip)]
    pub(super) defaults: ModelConfig,
    #[serde(rename = "rules")]
    lines: Lines<Value>,
    #[serde(skip)]
    pub(super) rules: Vec<(String, Rule)>,
    /// For each line of the text itself the rules that it stands for, of which the last has its pattern.
    #[serde(skip)]
    pub(super) own: Vec<Range<usize>>,
    #[serde(default)]
    pub(super) fuse: Vec<Fusion>,
}

/// A tensor that is the head as well where the head is not there.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tied {
    pub(super) embeddings: String,
    pub(super) head: String,
}

impl Table {
    /// Reads a table and those it extends.
    pub(super) fn parse(name: &str, text: &str) -> Result<Table, ParallelError> {
        Table::parse_at(name, text, 0)
    }

    fn parse_at(name: &str, text: &str, depth: u32) -> Result<Table, ParallelError> {
        let bad = |what: String| ParallelError::Rules { table: name.to_owned(), what };
        // A list would be taken for the fields of a table in their order.
        if !text.trim_start().starts_with('{') {
            return Err(bad("not a JSON object".to_owned()));
        }
        let mut table: Table = serde_json::from_str(text).map_err(|error| bad(error.to_string()))?;
        table.name = name.to_owned();
        let numbers = serde_json::to_vec(&table.numbers).expect("a JSON object is written as one");
        table.defaults = ModelConfig::parse(&numbers)?;
        for (pattern, line) in std::mem::take(&mut table.lines).0 {
            let rule = rule(line).map_err(|what| bad(format!("{pattern:?}: {what}")))?;
            table.rules.push((pattern, rule));
        }
        table.own = (0..table.rules.len()).map(|line| line..line + 1).collect();
        if let Some(base) = table.extends.take() {
            if depth == EXTENDS_MAX {
                return Err(bad(format!("more than {EXTENDS_MAX} tables extend one another")));
            }
            let (base_name, text) = embedded(&base)
                .ok_or_else(|| bad(format!("extends {base:?}, which there is no table for")))?;
            table.extend(Table::parse_at(base_name, text, depth + 1)?);
        }
        if let Some(fusion) = table.fuse.iter().find(|fusion| fusion.rows.is_empty()) {
            return Err(bad(format!("fuse {:?}: no rows", fusion.name)));
        }
        if table.prefixes.is_empty() && depth == 0 {
            table.prefixes.push(String::new());
        }
        Ok(table)
    }

    /// Adds the lines of another table, but for those whose pattern is here.
    fn extend(&mut self, base: Table) {
        let own = |pattern: &String, rules: &[(String, Rule)]| rules.iter().any(|(own, _)| own == pattern);
        let lines: Vec<_> =
            base.rules.into_iter().filter(|(pattern, _)| !own(pattern, &self.rules)).collect();
        self.rules.extend(lines);
        self.fuse.extend(base.fuse);
        for (own, base) in [
            (&mut self.layers, base.layers),
            (&mut self.experts, base.experts),
            (&mut self.first, base.first),
            (&mut self.last, base.last),
        ] {
            own.extend(base);
        }
        if self.prefixes.is_empty() {
            self.prefixes = base.prefixes;
        }
        self.tied = self.tied.take().or(base.tied);
        self.defaults = std::mem::take(&mut self.defaults).or(&base.defaults);
    }
}

/// Returns the table for an architecture.
pub(super) fn of_architecture(architecture: &str) -> Result<Option<Table>, ParallelError> {
    let table =
        EMBEDDED.into_iter().find(|(_, text)| architectures(text).iter().any(|own| own == architecture));
    table.map(|(name, text)| Table::parse(name, text)).transpose()
}

/// Returns the architectures that an embedded table is for.
pub(super) fn architectures(text: &str) -> Vec<String> {
    #[derive(Deserialize)]
    struct Heading {
        architectures: Vec<String>,
    }
    serde_json::from_str::<Heading>(text).map_or_else(|_| Vec::new(), |heading| heading.architectures)
}

/// Finds a table's text by its name or an architecture's.
fn embedded(name: &str) -> Option<(&'static str, &'static str)> {
    let is_for = |text: &str| architectures(text).iter().any(|own| own == name);
    EMBEDDED.into_iter().find(|(own, text)| *own == name || is_for(text))
}

/// A rule as it is written, when it is more than a word.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    rule: Word,
    #[serde(default)]
    by: Option<OneOrMore>,
    #[serde(default)]
    sections: Option<u64>,
    #[serde(default)]
    uneven: bool,
    #[serde(default)]
    packed_block: Option<u64>,
    #[serde(default)]
    stacked: bool,
    #[serde(default)]
    transposed: bool,
    #[serde(default)]
    pad_to: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Word {
    Column,
    Row,
    Vocab,
    Replicated,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(Count),
    More(Vec<Count>),
}

/// Reads a rule from its line, or says what is wrong with it.
fn rule(line: Value) -> Result<Rule, String> {
    let line = match line {
        Value::String(word) => serde_json::json!({ "rule": word }),
        object @ Value::Object(_) => object,
        other => return Err(format!("{other} is neither a rule's name nor an object")),
    };
    let Line { rule, by, sections, uneven, packed_block, stacked, transposed, pad_to } =
        serde_json::from_value(line).map_err(|error| error.to_string())?;
    let is_cut = matches!(rule, Word::Column | Word::Row);
    if !is_cut && (by.is_some() || sections.is_some() || uneven || packed_block.is_some() || transposed) {
        return Err("by, sections, uneven, packed_block and transposed are of column and row".to_owned());
    }
    if rule != Word::Vocab && pad_to.is_some() || rule == Word::Vocab && stacked {
        return Err("pad_to is of vocab, stacked of all others".to_owned());
    }
    let sections = match (by, sections) {
        (Some(_), Some(_)) => return Err("by and sections exclude one another".to_owned()),
        (Some(OneOrMore::One(count)), None) => Sections::Counted(vec![count]),
        (Some(OneOrMore::More(counts)), None) if (1..=SECTIONS_MAX).contains(&(counts.len() as u64)) => {
            Sections::Counted(counts)
        }
        (None, None) => Sections::Equal(1),
        (None, Some(sections @ 1..=SECTIONS_MAX)) => Sections::Equal(sections),
        _ => return Err(format!("1 to {SECTIONS_MAX} sections")),
    };
    if uneven && sections != Sections::Equal(1) {
        return Err("sections and what is counted are shared evenly".to_owned());
    }
    if packed_block.is_some_and(|block| !(1..=PACKED_BLOCK_MAX).contains(&block)) {
        return Err(format!("packed_block is 1 to {PACKED_BLOCK_MAX}"));
    }
    let split = Split { sections, is_uneven: uneven, packed_block };
    let how = match rule {
        Word::Column => How::Column(split),
        Word::Row => How::Row(split),
        Word::Replicated => How::Replicated,
        Word::Vocab => match pad_to.unwrap_or(PAD_TO) {
            pad_to @ 1..=PAD_TO_MAX => How::Vocab { pad_to },
            other => return Err(format!("pad_to is {other}, not 1 to {PAD_TO_MAX}")),
        },
    };
    Ok(Rule { is_stacked: stacked, is_transposed: transposed, ..Rule::of(how) })
}

/// The entries of a JSON object in their order, repeated keys too: two rules for one pattern are to be told, not merged.
#[derive(Clone, Debug)]
pub(super) struct Lines<T>(pub(super) Vec<(String, T)>);

impl<T> Default for Lines<T> {
    fn default() -> Lines<T> {
        Lines(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Lines<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Lines<T>, D::Error> {
        struct Entries<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Lines<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of patterns")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Lines<T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Lines(entries))
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

/// Rows of a whole vocabulary, before it is cut.
///
/// # Source
/// vLLM 0.11, `vllm/model_executor/layers/vocab_parallel_embedding.py`: `DEFAULT_VOCAB_PADDING_SIZE`; the padded rows are then divided among the ranks,
/// and ranks that do not divide them are refused, which here get rows enough for all. Megatron-LM, `_vocab_size_with_padding` of its `tokenizer.py`: a multiple of
/// `make_vocab_size_divisible_by` (128) times the ranks, which rules can say as a `pad_to` of that.
pub(super) const PAD_TO: u64 = 64;

/// Keeps `pad_to * tp_size` in 64 bits.
const PAD_TO_MAX: u64 = 1 << 20;

/// The most sections of a dimension: each is a part of its own.
const SECTIONS_MAX: u64 = 64;

/// The largest blocks of a packed tensor, far past any format's.
const PACKED_BLOCK_MAX: u64 = 1 << 16;

/// Tables that extend one another: more is a circle.
const EXTENDS_MAX: u32 = 4;

/// The tables, by name.
pub(super) const EMBEDDED: [(&str, &str); 13] = [
    ("llama", include_str!("rules/llama.json")),
    ("mixtral", include_str!("rules/mixtral.json")),
    ("minimax_m2", include_str!("rules/minimax_m2.json")),
    ("qwen_moe", include_str!("rules/qwen_moe.json")),
    ("gemma", include_str!("rules/gemma.json")),
    ("llama4", include_str!("rules/llama4.json")),
    ("multimodal", include_str!("rules/multimodal.json")),
    ("phi3", include_str!("rules/phi3.json")),
    ("deepseek", include_str!("rules/deepseek.json")),
    ("gpt_oss", include_str!("rules/gpt_oss.json")),
    ("gpt_neox", include_str!("rules/gpt_neox.json")),
    ("bert", include_str!("rules/bert.json")),
    ("bert_masked", include_str!("rules/bert_masked.json")),
];
