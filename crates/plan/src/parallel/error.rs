//! Why a model cannot be shared as asked.

use std::fmt;

use crate::quant::{CutError, QuantError};

/// Why there is no assembly for a rank. Every variant names the tensor, the key or the numbers, and what would work.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ParallelError {
    /// A group without ranks.
    EmptyGroup {
        /// Which kind of rank.
        what: &'static str,
    },
    /// A rank that its group does not have.
    RankOutside {
        /// Which kind of rank.
        what: &'static str,
        /// The rank.
        rank: u32,
        /// Ranks in the group.
        size: u32,
    },
    /// More stages than layers.
    EmptyStage {
        /// Layers of the model.
        layers: u64,
        /// Stages asked for.
        pp_size: u32,
    },
    /// A range of layers that is empty, backwards, or leaves the model.
    LayerRange {
        /// First layer asked for.
        start: u64,
        /// The layer behind the last one.
        end: u64,
        /// Layers of the model.
        layers: u64,
    },
    /// `config.json` does not say what is needed.
    Config {
        /// The key, and what is wrong with it.
        what: String,
    },
    /// No table has rules for this model.
    UnknownArchitecture {
        /// What `config.json` names.
        found: Vec<String>,
        /// What there are tables for.
        known: Vec<String>,
    },
    /// A text with rules says something that rules cannot say.
    Rules {
        /// The table or text.
        table: String,
        /// Where, and what is wrong.
        what: String,
    },
    /// A plan in the words of transformers has one that is not known.
    UnknownWord {
        /// The key of the plan.
        pattern: String,
        /// The word.
        word: String,
        /// Every known word.
        known: Vec<&'static str>,
    },
    /// Tensors that no rule names.
    Unmatched {
        /// The first of them, at most [`NAMED_MAX`].
        tensors: Vec<String>,
        /// How many there are.
        count: usize,
    },
    /// Two rules of the same weight that mean different things.
    Overlap {
        /// The tensor that both name.
        tensor: String,
        /// One pattern.
        first: String,
        /// The other.
        second: String,
    },
    /// Something that ranks cannot share evenly.
    Uneven {
        /// The tensor; empty where it concerns the model.
        tensor: String,
        /// What is shared, in the plural.
        what: &'static str,
        /// How many there are.
        count: u64,
        /// Ranks that would share them.
        size: u32,
        /// Sizes that would work.
        works: Vec<u64>,
    },
    /// A dimension that is not made of what the configuration counts.
    NotCounted {
        /// The tensor.
        tensor: String,
        /// Which dimension, from 0.
        dim: usize,
        /// Its length in elements.
        len: u64,
        /// What it should be made of, such as `32 heads + 8 kv heads`.
        counted: String,
    },
    /// A tensor without the dimension that its rule cuts.
    TooFewDims {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// The pattern of its rule.
        pattern: String,
        /// The rule.
        rule: String,
    },
    /// A layer that the model does not have.
    UnknownLayer {
        /// The tensor.
        tensor: String,
        /// Its layer.
        layer: u64,
        /// Layers that the configuration counts, predicting ones included.
        layers: u64,
    },
    /// An expert that the model does not have, or a stack of another height.
    UnknownExpert {
        /// The tensor.
        tensor: String,
        /// Its expert, or the height of its stack.
        expert: u64,
        /// Experts that the configuration counts.
        experts: u64,
    },
    /// A fused tensor lacks a member.
    MissingMember {
        /// The tensor that would be fused.
        target: String,
        /// The member that is not there.
        missing: String,
    },
    /// Members of a fused tensor that do not fit one another.
    UnlikeMembers {
        /// The tensor that would be fused.
        target: String,
        /// A member.
        first: String,
        /// Its dtype and shape on this rank.
        first_is: String,
        /// One that does not fit it.
        second: String,
        /// Its dtype and shape on this rank.
        second_is: String,
    },
    /// A fused tensor that no name of this kind was found for.
    UnknownFusion {
        /// The name asked for.
        name: String,
        /// Those that the rules have.
        known: Vec<String>,
    },
    /// A fused tensor of quantized members that stay as they are stored.
    StoredMember {
        /// The tensor that would be fused.
        target: String,
        /// The quantized member.
        member: String,
    },
    /// A quantized tensor that cannot be cut there and stay as it is stored.
    StoredCut(CutError),
    /// A rank has several sections of a quantized tensor that stays as it is stored, and what is kept of a stored tensor for them does not
    /// lie one after the other.
    StoredSections {
        /// The quantized tensor, by the name of its result.
        tensor: String,
        /// The stored tensor.
        member: String,
    },
    /// Two tensors of the result have one name.
    SameName {
        /// The name.
        name: String,
    },
    /// A tensor that should become numbers cannot be dequantized.
    Quantized(QuantError),
}

/// The most names that one error lists.
pub const NAMED_MAX: usize = 20;

impl fmt::Display for ParallelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use ParallelError as E;
        match self {
            E::EmptyGroup { what } => write!(f, "{what}: a group of 0 has no ranks; 1 is the least"),
            E::RankOutside { what, rank, size } => {
                write!(f, "{what} {rank} is outside its group of {size} (0 to {})", size - 1)
            }
            E::EmptyStage { layers, pp_size } => {
                write!(f, "{pp_size} pipeline stages need as many layers, the model has {layers}")
            }
            E::LayerRange { start, end, layers } => {
                write!(f, "layers {start}..{end} are none of the model's {layers} (0..{layers})")
            }
            E::Config { what } => write!(f, "config.json: {what}"),
            E::UnknownArchitecture { found, known } => {
                let known = known.join(", ");
                match found.first() {
                    Some(first) => {
                        write!(f, "no rules for {first}; there are for {known}; others can be given")?
                    }
                    None => write!(f, "config.json names no architecture; there are rules for {known}")?,
                }
                Ok(())
            }
            E::Rules { table, what } => write!(f, "rules {table}: {what}"),
            E::UnknownWord { pattern, word, known } => {
                write!(f, "{pattern:?}: {word:?} is none of {}", known.join(", "))
            }
            E::Unmatched { tensors, count } => {
                write!(f, "no rule names {}", tensors.join(", "))?;
                match count - tensors.len() {
                    0 => f.write_str("; replicate what is unmatched (--unmatched replicate), or add rules"),
                    more => write!(
                        f,
                        " and {more} more; replicate what is unmatched (--unmatched replicate), or add rules"
                    ),
                }
            }
            E::Overlap { tensor, first, second } => {
                write!(f, "tensor {tensor:?}: rules {first:?} and {second:?} name it alike, and differ")
            }
            E::Uneven { tensor, what, count, size, works } => {
                if !tensor.is_empty() {
                    write!(f, "tensor {tensor:?}: ")?;
                }
                let works: Vec<String> = works.iter().map(u64::to_string).collect();
                write!(f, "{size} ranks cannot share {count} {what} evenly; {} can", works.join(", "))
            }
            E::NotCounted { tensor, dim, len, counted } => {
                write!(f, "tensor {tensor:?}: dimension {dim} of {len} is not made of {counted}")
            }
            E::TooFewDims { tensor, shape, pattern, rule } => {
                write!(f, "tensor {tensor:?} {shape:?} has no dimension for rule {pattern:?}, {rule}")
            }
            E::UnknownLayer { tensor, layer, layers } => {
                write!(f, "tensor {tensor:?} is of layer {layer}, config.json counts {layers} (from 0)")
            }
            E::UnknownExpert { tensor, expert, experts } => {
                write!(f, "tensor {tensor:?} is of expert {expert}, config.json counts {experts}")
            }
            E::MissingMember { target, missing } => {
                write!(f, "fused tensor {target:?}: its member {missing:?} is not there; leave it unfused")
            }
            E::UnlikeMembers { target, first, first_is, second, second_is } => {
                write!(f, "fused tensor {target:?}: {first:?} is {first_is}, {second:?} is {second_is}")
            }
            E::UnknownFusion { name, known } => {
                write!(f, "the rules fuse no {name:?}; they fuse {}", known.join(", "))
            }
            E::StoredMember { target, member } => {
                write!(
                    f,
                    "fused tensor {target:?}: {member:?} is quantized; dequantize it or leave it unfused"
                )
            }
            E::StoredCut(_) => f.write_str("a tensor that stays as it is stored cannot be cut so"),
            E::StoredSections { tensor, member } => {
                write!(
                    f,
                    "tensor {tensor:?}: its sections are not one after the other in {member:?}; dequantize it"
                )
            }
            E::SameName { name } => write!(f, "two tensors of the result would be named {name:?}"),
            E::Quantized(_) => f.write_str("what is to be cut must become numbers first"),
        }
    }
}

impl std::error::Error for ParallelError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ParallelError::Quantized(error) => Some(error),
            ParallelError::StoredCut(error) => Some(error),
            _ => None,
        }
    }
}

/// Returns the divisors of a number, ascending: the sizes that share it evenly, as far as anybody has that many ranks.
pub(super) fn divisors(number: u64) -> Vec<u64> {
    (1..=number.min(SIZE_NAMED_MAX)).filter(|size| number.is_multiple_of(*size)).collect()
}

/// The largest size that an error proposes.
const SIZE_NAMED_MAX: u64 = 1024;
