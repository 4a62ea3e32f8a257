//! Rules matched with a checkpoint, once for all ranks.

use super::error::NAMED_MAX;
use super::fuse::{Fuse, Fused, Gathering};
use super::pattern::{Leaf, Stage};
use super::rules::{How, Rule, Rules, Unmatched};
use super::share::Share;
use super::{ModelConfig, ParallelError, Ranks};
use crate::assembly::Unfused;
use crate::checkpoint::{Checkpoint, TensorId};
use crate::dtype::Dtype;
use crate::placement::DeviceId;
use crate::quant::{self, Group, Quantization, Role, Values};
use crate::request::{Dequantize, matcher};

use std::collections::HashMap;

/// How the tensors of a partition are wanted.
#[derive(Clone, Debug, Default)]
pub struct Setup<'a> {
    /// The checkpoint's quantized tensors. Without it each stored tensor stands for itself, and scales need rules of their own.
    pub quantization: Option<&'a Quantization>,
    /// Which of them become numbers. Cuts are those of `[out, in]`, whatever its layout. Default: none, all stay as they are stored.
    pub dequantize: Option<&'a Dequantize>,
    /// Which tensors are fused. Default: none.
    pub fuse: Fuse,
}

/// The tensors of a checkpoint and the rule of each.
#[derive(Clone, Debug)]
pub struct Partition<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) rules: &'a Rules,
    pub(super) groups: &'a [Group],
    /// With the table's own numbers where the text has none.
    pub(super) config: ModelConfig,
    pub(super) entries: Vec<Entry>,
    pub(super) fused: Vec<Fused>,
    pub(super) unfused: Vec<Unfused>,
    /// Of what is made into numbers.
    pub(super) made_dtype: Dtype,
    /// Whether a tensor stays packed whose rule shares whole blocks of such ones: then all that are shared with it are.
    pub(super) is_in_blocks: bool,
    /// Groups that stay as they are stored and whose index is in order, as if they had none.
    pub(super) in_order: HashMap<u32, Group>,
}

/// A tensor that ranks share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) origin: Origin,
    /// Its place in the table; none for what is replicated because no rule names it.
    pub(super) rule: Option<u32>,
    pub(super) is_bias: bool,
    pub(super) stage: Stage,
    pub(super) layer: Option<u32>,
    pub(super) expert: Option<u32>,
    /// The fused tensor that it goes into.
    pub(super) fused: Option<u32>,
}

/// What an entry is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A tensor as it is stored.
    Stored(TensorId),
    /// A quantized tensor made into numbers, by its group.
    Made(u32),
    /// A quantized tensor that stays as it is stored, by its group.
    Packed(u32),
    /// A factor for each column of a quantized tensor made into numbers, which is handed over beside it.
    Factor(TensorId),
}

impl<'a> Partition<'a> {
    /// Finds the rule of every tensor.
    ///
    /// # Errors
    /// [`ParallelError::Unmatched`] for tensors that no rule names, unless the rules [replicate](Rules::unmatched) them, [`ParallelError::Overlap`] for
    /// one that two rules name; [`ParallelError::UnknownLayer`] and [`ParallelError::UnknownExpert`] for what the configuration does not count;
    /// [`ParallelError::UnknownFusion`], and for what was [named](Fuse::Only) [`ParallelError::CannotFuse`] and [`ParallelError::FusesNothing`];
    /// [`ParallelError::Quantized`] for a tensor that is to become numbers and cannot.
    pub fn new(
        checkpoint: &'a Checkpoint,
        config: &ModelConfig,
        rules: &'a Rules,
        setup: &Setup<'a>,
    ) -> Result<Partition<'a>, ParallelError> {
        let mut partition = Partition {
            checkpoint,
            rules,
            groups: setup.quantization.map_or(&[], Quantization::groups),
            config: config.clone().or(&rules.defaults),
            entries: Vec::with_capacity(checkpoint.len()),
            fused: Vec::new(),
            unfused: Vec::new(),
            made_dtype: setup.dequantize.map_or(Dtype::F32, |dequantize| dequantize.dtype),
            is_in_blocks: false,
            in_order: HashMap::new(),
        };
        partition.match_all(setup)?;
        partition.is_in_blocks = partition.has_packed_blocks();
        partition.tie();
        partition.fit(&setup.fuse)?;
        Ok(partition)
    }

    /// Returns the group indices (GPTQ's `g_idx`) of packed tensors that `tp_size` ranks cut along their columns.
    ///
    /// What such a rank needs depends on what they say: without an act-order it has the scales of its own groups, with one those of all
    /// groups. Files say in their configuration whether they have one, and some are wrong, so the indices themselves decide, 4 bytes a
    /// column, for whoever reads them and gives them to [`Partition::with_indices`].
    pub fn indices(&self, tp_size: u32) -> Vec<TensorId> {
        if tp_size == 1 {
            return Vec::new();
        }
        let by_columns = self.entries.iter().filter(|entry| matches!(self.rule_of(entry).how, How::Row(_)));
        by_columns.filter_map(|entry| self.index(entry).map(|(_, index)| index)).collect()
    }

    /// Completes it with the bytes of [its indices](Partition::indices). Without them every index is taken for one in any order.
    pub fn with_indices(mut self, values: &Values) -> Partition<'a> {
        let groups = self.groups;
        let in_order =
            self.entries.iter().filter_map(|entry| self.index(entry)).filter_map(|(number, index)| {
                let group = &groups[number as usize];
                let is_in_order = group.is_index_in_order(values.get(index)?);
                is_in_order.then(|| (number, group.without_index()))
            });
        self.in_order = in_order.collect();
        self
    }

    /// Returns the number of the group of a packed tensor, and the index that its recipe reads.
    fn index(&self, entry: &Entry) -> Option<(u32, TensorId)> {
        let Origin::Packed(number) = entry.origin else { return None };
        let mut members = self.groups[number as usize].members.iter();
        Some((number, members.find(|(role, _)| *role == Role::GroupIndex)?.1))
    }

    /// Returns what one rank has.
    ///
    /// # Errors
    /// What [`Ranks::check`] and [`Layers::range`](super::Layers::range) refuse; [`ParallelError::Uneven`], [`ParallelError::NotCounted`] and
    /// [`ParallelError::TooFewDims`] for a tensor that cannot be cut so; [`ParallelError::StoredCut`] and [`ParallelError::StoredSections`] for a quantized tensor that cannot be cut and stay as it is stored.
    pub fn share(&self, ranks: &Ranks, device: DeviceId) -> Result<Share, ParallelError> {
        Share::new(self, ranks, device)
    }

    /// Returns the patterns of rules that no tensor has. Tables have many, because families share them.
    pub fn unused(&self) -> impl Iterator<Item = &'a str> {
        let rules = self.rules.rules.iter().take(self.rules.line_count).zip(self.is_used());
        rules.filter(|(_, is_used)| !is_used).map(|((pattern, _), _)| pattern.as_str())
    }

    /// Returns the patterns that no tensor has of rules that the caller [gave](Rules::parse): one may be a slip.
    pub fn unused_of_caller(&self) -> Vec<String> {
        if self.rules.given.is_empty() {
            return Vec::new();
        }
        let is_used = self.is_used();
        let unused = self.rules.given.iter().filter(|rules| !is_used[(*rules).clone()].contains(&true));
        unused.map(|rules| self.rules.rules[rules.end - 1].0.clone()).collect()
    }

    /// Tells for each rule whether a tensor has it.
    fn is_used(&self) -> Vec<bool> {
        let mut is_used = vec![false; self.rules.rules.len()];
        self.entries.iter().filter_map(|entry| entry.rule).for_each(|rule| is_used[rule as usize] = true);
        is_used
    }

    /// Tells whether no tensor has any of the rules.
    pub fn is_unused(&self) -> bool {
        self.entries.iter().all(|entry| entry.rule.is_none())
    }

    fn match_all(&mut self, setup: &Setup<'_>) -> Result<(), ParallelError> {
        let wanted = setup.fuse.wanted(self.rules)?;
        let globs = setup.dequantize.map(|dequantize| dequantize.globs.as_deref());
        let is_folded = setup.dequantize.is_some_and(|dequantize| dequantize.fold);
        let mut is_hit = globs.flatten().map(matcher);
        let mut is_made =
            |name: &str| globs.is_some() && is_hit.as_mut().is_none_or(|is_hit| is_hit(&[name]));
        let mut unmatched = Unnamed::default();
        let mut gathering = Gathering::default();
        for tensor in self.checkpoint.tensors() {
            let (mut name, mut origin) = (tensor.info.name, Origin::Stored(tensor.id));
            let mut is_passed = false;
            if let Some(quantization) = setup.quantization {
                match quantization.role_of(tensor.id) {
                    quant::Part::Member(group) => {
                        let number = group;
                        let group = &self.groups[group as usize];
                        name = &group.name;
                        let is_made = is_made(name);
                        origin = match group.role_of(tensor.id) {
                            Some(Role::Payload) if is_made => Origin::Made(number),
                            Some(Role::Payload) => Origin::Packed(number),
                            Some(Role::Fold) if is_made && !is_folded => Origin::Factor(tensor.id),
                            _ => continue, // It goes where its payload goes.
                        };
                    }
                    quant::Part::PassedThrough(_) => is_passed = true,
                    quant::Part::Plain => {}
                }
                if let Some(error) = quantization.refusal_of(tensor.id).filter(|_| is_made(name)) {
                    return Err(ParallelError::Quantized(error.clone()));
                }
            }
            let found = self.rules.trie.find(name, |one, other| self.rule(one) == self.rule(other));
            if let Some((rule, rival)) = found.rule.zip(found.rival) {
                let pattern = |rule: u32| self.rules.rules[rule as usize].0.clone();
                let (first, second) = (pattern(rule.0), pattern(rival));
                return Err(ParallelError::Overlap { tensor: name.to_owned(), first, second });
            }
            if found.rule.is_none() && !is_passed && self.rules.unmatched == Unmatched::Refuse {
                unmatched.add(name);
                continue;
            }
            self.check_numbers(name, found.layer, found.expert)?;
            let entry = self.entries.len() as u32; // At most one a tensor, of which there are at most 2^24.
            let is_alone = matches!(origin, Origin::Factor(_));
            let member = found.member.filter(|member| wanted[member.fusion as usize] && !is_alone);
            let is_bias = match found.rule {
                Some((_, Leaf::Itself)) => name.ends_with("bias"),
                Some((_, leaf)) => leaf == Leaf::Bias,
                None => false,
            };
            self.entries.push(Entry {
                origin,
                rule: found.rule.map(|(rule, _)| rule),
                is_bias,
                stage: found.stage,
                layer: found.layer,
                expert: found.expert,
                fused: member.map(|member| gathering.add(self.rules, &found, member, entry)),
            });
        }
        unmatched.check()?;
        self.fused = gathering.fused;
        Ok(())
    }

    /// Holds a name's numbers against the configuration's.
    fn check_numbers(
        &self,
        name: &str,
        layer: Option<u32>,
        expert: Option<u32>,
    ) -> Result<(), ParallelError> {
        let tensor = || name.to_owned();
        if let Some((layer, layers)) = layer.map(u64::from).zip(self.config.layers) {
            let layers = layers + self.config.predict_layers;
            if layer >= layers {
                return Err(ParallelError::UnknownLayer { tensor: tensor(), layer, layers });
            }
        }
        if let Some(expert) = expert.map(u64::from) {
            // Without a number in the configuration: more experts than tensors there are not.
            let experts = self.config.experts.unwrap_or(self.checkpoint.len() as u64);
            if expert >= experts {
                return Err(ParallelError::UnknownExpert { tensor: tensor(), expert, experts });
            }
        }
        Ok(())
    }

    fn has_packed_blocks(&self) -> bool {
        self.entries.iter().any(|entry| {
            let is_packed = matches!(entry.origin, Origin::Packed(_));
            is_packed && self.rule_of(entry).split().is_some_and(|split| split.packed_block.is_some())
        })
    }

    /// Gives the embeddings to the last stage as well, where there is no head of its own.
    fn tie(&mut self) {
        let Some(tied) = self.rules.tied.as_ref().filter(|_| self.config.is_tied != Some(false)) else {
            return;
        };
        let is = |name: &str, what: &str| {
            let mut prefixes = self.rules.prefixes.iter();
            prefixes.any(|prefix| name.strip_prefix(prefix.as_str()) == Some(what))
        };
        let named = |stage: Stage, name: &str| -> Vec<usize> {
            let of_stage = (0..self.entries.len()).filter(|at| self.entries[*at].stage == stage);
            of_stage.filter(|at| is(self.name(&self.entries[*at]), name)).collect()
        };
        if !named(Stage::Last, &tied.head).is_empty() {
            return;
        }
        for at in named(Stage::First, &tied.embeddings) {
            self.entries[at].stage = Stage::Ends;
        }
    }

    pub(super) fn rule(&self, rule: u32) -> &Rule {
        &self.rules.rules[rule as usize].1
    }

    pub(super) fn rule_of(&self, entry: &Entry) -> &Rule {
        entry.rule.map_or(&REPLICATED, |rule| self.rule(rule))
    }

    /// Returns the name that rules see.
    pub(super) fn name(&self, entry: &Entry) -> &'a str {
        match entry.origin {
            Origin::Stored(id) | Origin::Factor(id) => self.checkpoint.tensor(id).info.name,
            Origin::Made(group) | Origin::Packed(group) => &self.groups[group as usize].name,
        }
    }

    /// Returns the dtype of what is cut.
    pub(super) fn dtype(&self, entry: &Entry) -> Dtype {
        match entry.origin {
            Origin::Stored(id) | Origin::Factor(id) => self.checkpoint.tensor(id).info.dtype,
            Origin::Packed(group) => self.checkpoint.tensor(self.groups[group as usize].payload()).info.dtype,
            Origin::Made(_) => self.made_dtype,
        }
    }

    /// Returns the shape that rules see.
    pub(super) fn shape(&self, entry: &Entry) -> &'a [u64] {
        match entry.origin {
            Origin::Stored(id) | Origin::Factor(id) => self.checkpoint.tensor(id).info.shape,
            Origin::Made(group) | Origin::Packed(group) => &self.groups[group as usize].shape,
        }
    }
}

/// The rule of what no rule names.
static REPLICATED: Rule = Rule::REPLICATED;

/// The tensors that no rule names.
#[derive(Default)]
struct Unnamed {
    tensors: Vec<String>,
    count: usize,
}

impl Unnamed {
    fn add(&mut self, name: &str) {
        self.count += 1;
        if self.tensors.len() < NAMED_MAX {
            self.tensors.push(name.to_owned());
        }
    }

    fn check(self) -> Result<(), ParallelError> {
        let Unnamed { tensors, count } = self;
        if count == 0 { Ok(()) } else { Err(ParallelError::Unmatched { tensors, count }) }
    }
}
