//! Rules as data: which tensors ranks cut, and how.

use std::fmt;
use std::ops::Range;

use super::config::Count;
use super::fuse::Fusion;
use super::pattern::{Leaf, Mark, Member, Stage, Trie};
use super::table::{self, Table};
use super::{ModelConfig, ParallelError, huggingface};

/// Rules for the tensors of a model: patterns on their names, and for each what its ranks have.
///
/// There are [tables](Rules::architectures) for common architectures; others are [given](Rules::parse) as text of the same kind, or as a plan
/// in the words of transformers. A table is a JSON object:
///
/// ```json
/// {
///   "extends": "LlamaForCausalLM",
///   "prefixes": ["model.", ""],
///   "layers": ["layers.*"], "experts": ["layers.*.mlp.experts.*"],
///   "first": ["embed_tokens"], "last": ["norm", "lm_head"],
///   "rules": {
///     "layers.*.self_attn.q_proj": {"rule": "column", "by": "heads"},
///     "layers.*.self_attn.q_norm": "replicated"
///   },
///   "fuse": [{"name": "gate_up", "target": "layers.*.mlp.gate_up_proj",
///             "rows": ["layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"]}]
/// }
/// ```
///
/// In a pattern `*` stands for a number, `**` at the end for anything behind. It names a tensor, or a module: then its `weight` and `bias`. The one with more
/// words wins; two that are as specific as one another and differ are an error. Every pattern holds behind each of the prefixes.
///
/// The rules, for weights `[out, in]`, stacks `[experts, out, in]`, and vectors:
///
/// | rule | weight | bias |
/// |---|---|---|
/// | `column` | each rank its share of `out` | the same share |
/// | `row` | each rank its share of `in` | whole on tensor-parallel rank 0, not there on the others, which add their results to its |
/// | `vocab` | its share of the rows, padded | the same |
/// | `replicated` | whole on each rank | whole |
///
/// With them: `by` (`heads`, `kv_heads`, `intermediate`, or a list of these for sections one after the other) is what is shared: a share is a whole
/// number of them, and ranks beyond the number of KV heads share a head, so that rank `r` of `n` has head `r * kv_heads / n`; `sections` is a number of equal sections,
/// of each of which a rank has a share; `uneven` gives ranks `ceil(n / size)` each for as long as there are any, as `torch.chunk` does; `packed_block` gives them whole blocks of so many in that
/// way, wherever one of the tensors whose rule has it stays packed, so that no block of codes with one scale is cut; `stacked` says that dimension 0 counts
/// experts, which go to the expert-parallel ranks; `transposed` that a weight that is *not* quantized is stored `[in, out]`; `pad_to` (64) that a
/// vocabulary is padded to a multiple of that, and of `tp_size`.
///
/// A tensor that is stored fused already, under the name that `fuse` gives it, is cut as its members would be: its sections are theirs.
#[derive(Clone, Debug)]
pub struct Rules {
    pub(super) name: String,
    /// The table's own lines, then those of tensors that are stored fused.
    pub(super) rules: Vec<(String, Rule)>,
    pub(super) line_count: usize,
    /// For each line that a caller gave the rules that it stands for, of which the last has its pattern.
    pub(super) given: Vec<Range<usize>>,
    pub(super) fusions: Vec<Fusion>,
    pub(super) prefixes: Vec<String>,
    pub(super) defaults: ModelConfig,
    /// The tensor that is the head as well, where there is no head.
    pub(super) tied: Option<table::Tied>,
    pub(super) unmatched: Unmatched,
    pub(super) trie: Trie,
}

/// What becomes of a tensor that no rule names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unmatched {
    /// An error that lists them.
    #[default]
    Refuse,
    /// Each rank has it whole.
    Replicate,
}

impl Rules {
    /// Returns the rules for the model's architecture.
    ///
    /// # Errors
    /// [`ParallelError::UnknownArchitecture`] where there is no table for it.
    pub fn of(config: &ModelConfig) -> Result<Rules, ParallelError> {
        let unknown = || ParallelError::UnknownArchitecture {
            found: config.architectures.clone(),
            known: Rules::architectures(),
        };
        Rules::of_architecture(config.architectures.first().ok_or_else(unknown)?)?.ok_or_else(unknown)
    }

    /// Reads rules from JSON: a table, or a plan in the words of transformers, such as `{"layers.*.self_attn.q_proj": "colwise"}`, whose
    /// [unmatched](Unmatched) tensors are replicated, as there.
    ///
    /// # Errors
    /// [`ParallelError::Rules`] for a text that is neither, [`ParallelError::UnknownWord`] for a word that no version of transformers has.
    pub fn parse(text: &str) -> Result<Rules, ParallelError> {
        match Table::parse("given", text) {
            Ok(table) => Rules::compile(table),
            Err(error) => match huggingface::parse(text)? {
                Some(table) => Ok(Rules::compile(table)?.unmatched(Unmatched::Replicate)),
                None => Err(error),
            },
        }
    }

    /// Returns the name of the table.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Says what becomes of tensors that no rule names.
    pub fn unmatched(self, unmatched: Unmatched) -> Rules {
        Rules { unmatched, ..self }
    }

    /// Returns the architectures there are tables for.
    pub fn architectures() -> Vec<String> {
        let mut all: Vec<String> =
            table::EMBEDDED.iter().flat_map(|(_, text)| table::architectures(text)).collect();
        all.sort_unstable();
        all
    }

    /// Returns the names of the fused tensors that the rules can make.
    pub fn fusions(&self) -> impl Iterator<Item = &str> {
        self.fusions.iter().map(|fusion| fusion.name.as_str())
    }

    fn of_architecture(architecture: &str) -> Result<Option<Rules>, ParallelError> {
        let rules = table::of_architecture(architecture)?.map(Rules::compile).transpose()?;
        Ok(rules.map(|rules| Rules { given: Vec::new(), ..rules }))
    }

    fn compile(table: Table) -> Result<Rules, ParallelError> {
        let Table {
            name, prefixes, layers, experts, first, last, tied, defaults, mut rules, own, fuse, ..
        } = table;
        let line_count = rules.len();
        rules.extend(fuse.iter().filter_map(|fusion| fusion.stored(&rules)).collect::<Vec<_>>());
        let mut trie = Trie::new();
        for (number, prefix) in (0u32..).zip(&prefixes) {
            let mut insert = |pattern: &str, leaf: Leaf, mark| {
                trie.insert(&name, &[prefix, pattern, leaf.suffix()].concat(), mark)
            };
            for (stage, patterns) in [(Stage::Layer, &layers), (Stage::First, &first), (Stage::Last, &last)] {
                for pattern in patterns {
                    insert(pattern, Leaf::Itself, Mark::Stage(stage))?;
                }
            }
            for pattern in &experts {
                insert(pattern, Leaf::Itself, Mark::Expert)?;
            }
            for (rule, (pattern, _)) in (0u32..).zip(&rules) {
                for leaf in leaves(pattern) {
                    insert(pattern, *leaf, Mark::Rule(rule, *leaf))?;
                }
            }
            for (fusion, of) in (0u32..).zip(&fuse) {
                for (row, pattern) in (0u32..).zip(&of.rows) {
                    for leaf in leaves(pattern) {
                        let member = Member { fusion, row, prefix: number, leaf: *leaf };
                        insert(pattern, *leaf, Mark::Member(member))?;
                    }
                }
            }
        }
        let unmatched = Unmatched::default();
        Ok(Rules {
            name,
            rules,
            line_count,
            given: own,
            fusions: fuse,
            prefixes,
            defaults,
            tied,
            unmatched,
            trie,
        })
    }
}

/// A pattern names a tensor, or a module's weight and bias; what ends with `**` names everything already.
fn leaves(pattern: &str) -> &'static [Leaf] {
    if pattern.ends_with("**") { &[Leaf::Itself] } else { &[Leaf::Itself, Leaf::Weight, Leaf::Bias] }
}

/// What ranks have of the tensors of a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) how: How,
    /// Whether dimension 0 counts experts.
    pub(super) is_stacked: bool,
    /// Whether a weight that is not quantized is `[.., in, out]`.
    pub(super) is_transposed: bool,
    /// Whether every rank has the bias of a row-parallel weight, as transformers adds it behind the sum.
    pub(super) has_bias_everywhere: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum How {
    Replicated,
    Column(Split),
    Row(Split),
    Vocab { pad_to: u64 },
}

/// How a dimension is shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Split {
    pub(super) sections: Sections,
    /// Whether later ranks may have less, or nothing.
    pub(super) is_uneven: bool,
    /// How many are together where the tensor, or another that is shared in blocks, stays packed.
    pub(super) packed_block: Option<u64>,
}

/// What a dimension is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sections {
    /// Single elements, in so many equal sections.
    Equal(u64),
    /// So many of each one after the other, all of the same length.
    Counted(Vec<Count>),
}

impl Split {
    /// Tells whether another differs in its sections alone.
    pub(super) fn is_like(&self, other: &Split) -> bool {
        (self.is_uneven, self.packed_block) == (other.is_uneven, other.packed_block)
    }
}

impl Sections {
    /// Returns the sections of several dimensions as one, unless their elements are not counted alike.
    pub(super) fn one_after_the_other(all: &[&Sections]) -> Option<Sections> {
        let equal = all.iter().map(|sections| match sections {
            Sections::Equal(1) => Some(1),
            _ => None,
        });
        let counted = all.iter().map(|sections| match sections {
            Sections::Counted(counts) => Some(counts.as_slice()),
            Sections::Equal(_) => None,
        });
        let equal = equal.sum::<Option<u64>>().map(Sections::Equal);
        equal.or_else(|| Some(Sections::Counted(counted.collect::<Option<Vec<_>>>()?.concat())))
    }
}

impl Rule {
    pub(super) const REPLICATED: Rule = Rule::of(How::Replicated);

    pub(super) const fn of(how: How) -> Rule {
        Rule { how, is_stacked: false, is_transposed: false, has_bias_everywhere: false }
    }

    /// Returns how a dimension is shared, if one is.
    pub(super) fn split(&self) -> Option<&Split> {
        match &self.how {
            How::Column(split) | How::Row(split) => Some(split),
            How::Replicated | How::Vocab { .. } => None,
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let split = match &self.how {
            How::Replicated => return f.write_str(if self.is_stacked { "experts" } else { "replicated" }),
            How::Vocab { pad_to } => return write!(f, "vocab, padded by {pad_to}"),
            How::Column(split) => {
                f.write_str("column")?;
                split
            }
            How::Row(split) => {
                f.write_str("row")?;
                split
            }
        };
        match &split.sections {
            Sections::Equal(1) => {}
            Sections::Equal(sections) => write!(f, " in {sections} sections")?,
            Sections::Counted(counts) => {
                let words: Vec<&str> = counts.iter().map(|count| count.word()).collect();
                write!(f, " by {}", words.join(" + "))?;
            }
        }
        f.write_str(if self.is_stacked { " of experts" } else { "" })?;
        f.write_str(if split.is_uneven { ", uneven" } else { "" })
    }
}
