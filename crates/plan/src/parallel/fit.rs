//! Which of the fused tensors asked for can be made, on whatever rank.

use std::collections::hash_map::Entry as Slot;
use std::collections::{HashMap, HashSet};
use std::mem::{Discriminant, discriminant};

use super::error::Unfit;
use super::fuse::{Fuse, Fused, Key};
use super::partition::{Entry, Origin, Partition};
use super::{ParallelError, Rules};
use crate::assembly::Unfused;

impl Partition<'_> {
    /// Keeps the fused tensors that can be made, and notes why others cannot: their members keep their names.
    ///
    /// A module is fused whole or not at all, so that no bias is in one piece whose weights are in three. What is decided here holds for
    /// every rank: members that fit are cut alike.
    ///
    /// # Errors
    /// [`ParallelError::CannotFuse`] and [`ParallelError::FusesNothing`] for what was asked for by its name.
    pub(super) fn fit(&mut self, fuse: &Fuse) -> Result<(), ParallelError> {
        let rules = self.rules;
        if let Fuse::Only(names) = fuse {
            let is_member = |name: &String| self.fused.iter().any(|fused| rules.fusion_of(fused) == name);
            if let Some(fusion) = names.iter().find(|name| !is_member(name)) {
                return Err(ParallelError::FusesNothing { fusion: fusion.clone() });
            }
        }
        let mut unfit = Unfits::default();
        let taken = self.taken_names();
        for (fused, is_taken) in self.fused.iter().zip(taken) {
            let Some(why) = self.unfit(fused, is_taken) else { continue };
            let (fusion, target) = (rules.fusion_of(fused), &fused.name);
            if let Fuse::Only(_) = fuse {
                return Err(ParallelError::CannotFuse {
                    fusion: fusion.to_owned(),
                    target: target.clone(),
                    why: Box::new(why),
                });
            }
            unfit.add(fused.key, fusion, target, &why);
        }
        if unfit.modules.is_empty() {
            return Ok(());
        }
        let (mut places, mut kept) = (Vec::with_capacity(self.fused.len()), 0u32..);
        self.fused.retain(|fused| {
            let place = (!unfit.modules.contains(&fused.key.module())).then(|| kept.next()).flatten();
            places.push(place);
            place.is_some()
        });
        for entry in &mut self.entries {
            entry.fused = entry.fused.and_then(|fused| places[fused as usize]);
        }
        self.unfused = unfit.told;
        Ok(())
    }

    /// Tells for each fused tensor whether its name is another tensor's.
    fn taken_names(&self) -> Vec<bool> {
        if self.fused.is_empty() {
            return Vec::new();
        }
        let mut names: HashSet<&str> = self.groups.iter().map(|group| group.name.as_str()).collect();
        let is_taken = |fused: &'_ Fused| self.checkpoint.find(&fused.name).is_some();
        self.fused.iter().map(|fused| !names.insert(&fused.name) || is_taken(fused)).collect()
    }

    /// Returns why a fused tensor cannot be made.
    fn unfit(&self, fused: &Fused, is_taken: bool) -> Option<Unfit> {
        if let Some(member) = fused.missing(self.rules, self.config.experts) {
            return Some(Unfit::Missing { member });
        }
        let name = |entry: &Entry| self.name(entry).to_owned();
        let members: Vec<&Entry> =
            fused.members.iter().flatten().map(|member| &self.entries[*member as usize]).collect();
        if let Some(packed) = members.iter().find(|member| matches!(member.origin, Origin::Packed(_))) {
            return Some(Unfit::Stored { member: name(packed) });
        }
        for of_expert in members.chunks(fused.rows) {
            for (place, member) in of_expert.iter().enumerate() {
                let first = members[0];
                let is_apart = |one: &Entry, other: &Entry| {
                    (one.stage, one.layer, one.expert) != (other.stage, other.layer, other.expert)
                };
                if is_apart(of_expert[0], member) || of_expert[0].stage != first.stage {
                    return Some(Unfit::Apart { first: name(of_expert[0]), second: name(member) });
                }
                // Rows of a stack are as many in every expert.
                let is_as_high = self.shape(members[place]).first() == self.shape(member).first();
                let unlike = match is_as_high {
                    true => Some(first).filter(|first| !self.is_alike(first, member)),
                    false => Some(members[place]),
                };
                if let Some(first) = unlike {
                    return Some(Unfit::Unlike {
                        first: name(first),
                        first_is: self.describe(first),
                        second: name(member),
                        second_is: self.describe(member),
                    });
                }
            }
        }
        is_taken.then_some(Unfit::Taken)
    }

    /// Tells whether one lies beneath the other on every rank: they differ in their rows alone, and are cut along these, or alike.
    fn is_alike(&self, one: &Entry, other: &Entry) -> bool {
        let (shape, other_shape) = (self.shape(one), self.shape(other));
        let (rule, other_rule) = (self.rule_of(one), self.rule_of(other));
        let dims = (self.dim(one, shape), self.dim(other, other_shape));
        self.dtype(one) == self.dtype(other)
            && !shape.is_empty()
            && shape.len() == other_shape.len()
            && shape[1..] == other_shape[1..]
            && match dims {
                (Ok(Some(0)), Ok(Some(0))) => rule.is_stacked == other_rule.is_stacked,
                (Ok(dim), Ok(other_dim)) => dim == other_dim && rule == other_rule,
                _ => false, // A dimension that is not there is told where the tensor is cut.
            }
    }

    fn describe(&self, entry: &Entry) -> String {
        format!("{} {:?}, {}", self.dtype(entry), self.shape(entry), self.rule_of(entry))
    }
}

impl Rules {
    /// Returns what a fused tensor is asked for by.
    fn fusion_of(&self, fused: &Fused) -> &str {
        &self.fusions[fused.key.fusion as usize].name
    }
}

/// Modules whose members stay apart.
#[derive(Default)]
struct Unfits {
    modules: HashSet<Key>,
    told: Vec<Unfused>,
    /// By fusion and kind of reason: which of those told.
    by_kind: HashMap<(u32, Discriminant<Unfit>), usize>,
}

impl Unfits {
    fn add(&mut self, key: Key, fusion: &str, target: &str, why: &Unfit) {
        if !self.modules.insert(key.module()) {
            return; // Told with its weight, or its bias.
        }
        match self.by_kind.entry((key.fusion, discriminant(why))) {
            Slot::Occupied(told) => self.told[*told.get()].modules += 1,
            Slot::Vacant(first) => {
                first.insert(self.told.len());
                self.told.push(Unfused {
                    fusion: fusion.to_owned(),
                    target: target.to_owned(),
                    modules: 1,
                    why: why.to_string(),
                });
            }
        }
    }
}
