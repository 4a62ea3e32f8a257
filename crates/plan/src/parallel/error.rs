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
    /// Experts to be shared, and the model has none.
    NoExperts {
        /// What `config.json` names it.
        model: String,
        /// Ranks that would share them.
        ep_size: u32,
    },
    /// Whole experts for groups that do not fit one another.
    UnlikeGroups {
        /// Ranks that share each matrix.
        tp_size: u32,
        /// Ranks that share the experts.
        ep_size: u32,
    },
    /// A range of layers that is empty, backwards, or leaves the model.
    LayerRange {
        /// First layer asked for.
        start: u64,
        /// The layer behind the last one.
        end: u64,
        /// Layers of the model.
        layers: u64,
        /// Layers behind those, which predict further tokens.
        predict_layers: u64,
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
    /// A fused tensor that was asked for by its name cannot be made.
    CannotFuse {
        /// The name asked for.
        fusion: String,
        /// The tensor that would be fused.
        target: String,
        /// Why it cannot.
        why: Box<Unfit>,
    },
    /// No tensor of the model is a member of a fused tensor that was asked for by its name.
    FusesNothing {
        /// The name asked for.
        fusion: String,
    },
    /// A fused tensor that no name of this kind was found for.
    UnknownFusion {
        /// The name asked for.
        name: String,
        /// Those that the rules have.
        known: Vec<String>,
    },
    /// A quantized tensor that cannot be cut there and stay as it is stored.
    StoredCut {
        /// Where it would be cut.
        error: Box<CutError>,
        /// Sizes of the tensor-parallel group that cut it elsewhere; empty where nobody knows.
        works: Vec<u64>,
        /// Whether it is an expert, which could stay whole.
        is_of_expert: bool,
    },
    /// A rank has several sections of a quantized tensor that stays as it is stored, and what is kept of a stored tensor for them does not
    /// lie one after the other.
    StoredSections {
        /// The quantized tensor, by the name of its result.
        tensor: String,
        /// The stored tensor.
        member: String,
    },
    /// A tensor that should become numbers cannot be dequantized.
    Quantized(QuantError),
}

/// Why members are not made one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unfit {
    /// One of them is not there.
    Missing {
        /// Its name.
        member: String,
    },
    /// One of them is quantized and stays as it is stored, with scales of its own.
    Stored {
        /// Its name.
        member: String,
    },
    /// Two of them do not fit one another.
    Unlike {
        /// One.
        first: String,
        /// Its dtype, shape and rule.
        first_is: String,
        /// The other.
        second: String,
        /// Its dtype, shape and rule.
        second_is: String,
    },
    /// Two of them are not always on the same rank.
    Apart {
        /// One.
        first: String,
        /// The other.
        second: String,
    },
    /// Another tensor of the result has the name.
    Taken,
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unfit::Missing { member } => write!(f, "its member {member:?} is not there"),
            Unfit::Stored { member } => {
                write!(f, "{member:?} stays quantized, with scales of its own; dequantized it would fit")
            }
            Unfit::Unlike { first, first_is, second, second_is } => {
                write!(f, "{first:?} is {first_is}, {second:?} is {second_is}")
            }
            Unfit::Apart { first, second } => {
                write!(f, "{first:?} and {second:?} are of different stages or experts")
            }
            Unfit::Taken => f.write_str("another tensor has that name"),
        }
    }
}

/// The most names that one error lists.
pub const NAMED_MAX: usize = 20;

impl ParallelError {
    /// Says of a range of layers how many lie behind those that it may name.
    pub(super) fn with_predict_layers(self, predict_layers: u64) -> ParallelError {
        match self {
            ParallelError::LayerRange { start, end, layers, .. } => {
                ParallelError::LayerRange { start, end, layers, predict_layers }
            }
            other => other,
        }
    }
}

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
            E::NoExperts { model, ep_size } => {
                write!(f, "{model} has no experts for {ep_size} ranks to share; leave expert parallelism out")
            }
            E::UnlikeGroups { tp_size, ep_size } => {
                write!(
                    f,
                    "experts that stay whole are shared by the ranks of tensor and data parallelism together: \
                     {ep_size} that share experts and {tp_size} that share matrices must be a multiple of one another"
                )
            }
            E::LayerRange { start, end, layers, .. } if start >= end => {
                let all = layers.max(&1);
                write!(
                    f,
                    "layers {start}..{end} are none; give the first and the one behind the last: 0..{all}"
                )
            }
            E::LayerRange { start, end, layers: 0, .. } => {
                write!(f, "layers {start}..{end} are not the model's, which has none")
            }
            E::LayerRange { start, end, layers, predict_layers } => {
                let last = layers - 1;
                write!(f, "layers {start}..{end} are not all among the model's {layers} (0 to {last})")?;
                match predict_layers {
                    0 => Ok(()),
                    _ => write!(
                        f,
                        "; those from {layers} on, which predict further tokens, come with layer {last}"
                    ),
                }
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
            E::CannotFuse { fusion, target, why } => {
                write!(
                    f,
                    "fused tensor {target:?}: {why}; leave {fusion:?} out, or fuse what can be (--fuse alone)"
                )
            }
            E::FusesNothing { fusion } => {
                write!(f, "no tensor of the model goes into a fused {fusion:?}; leave it out")
            }
            E::UnknownFusion { name, known } => {
                write!(f, "the rules fuse no {name:?}; they fuse {}", known.join(", "))
            }
            E::StoredCut { works, is_of_expert, .. } => {
                f.write_str("a tensor that stays as it is stored cannot be cut so; ")?;
                if !works.is_empty() {
                    let works: Vec<String> = works.iter().map(u64::to_string).collect();
                    write!(f, "tp sizes that can: {}; ", works.join(", "))?;
                }
                f.write_str(if *is_of_expert { "whole experts (--whole-experts) or " } else { "" })?;
                f.write_str("dequantizing (--dequantize) would work, too")
            }
            E::StoredSections { tensor, member } => {
                write!(
                    f,
                    "tensor {tensor:?}: its sections are not one after the other in {member:?}; dequantize it"
                )
            }
            E::Quantized(_) => f.write_str("what is to be cut must become numbers first"),
        }
    }
}

impl std::error::Error for ParallelError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ParallelError::Quantized(error) => Some(error),
            ParallelError::StoredCut { error, .. } => Some(&**error),
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
