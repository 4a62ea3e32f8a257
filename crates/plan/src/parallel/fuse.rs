//! Fused tensors: which stored ones belong together, as row ranges or a stack of one.

use std::collections::HashMap;

use serde::Deserialize;

use super::ParallelError;
use super::pattern::{Leaf, Match, Member, Numbers};
use super::rules::{How, Rule, Rules, Sections, Split};

/// A kind of fused tensor, as data.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fusion {
    /// What a caller asks for it by.
    pub(super) name: String,
    /// The pattern of the result's name: numbers are those of the members.
    pub(super) target: String,
    /// The patterns of the members, from the first rows to the last.
    pub(super) rows: Vec<String>,
    /// Whether the last number of the members counts experts: the result is `[experts, rows, cols]`.
    #[serde(default)]
    pub(super) stacked: bool,
}

impl Fusion {
    /// Returns the rule of the fused tensor where it is stored, by those of its members: what a rank has of each lies one after the other there, too. None
    /// where it has a rule already, or members are not cut alike.
    pub(super) fn stored(&self, rules: &[(String, Rule)]) -> Option<(String, Rule)> {
        let rule_of = |pattern: &str| rules.iter().find(|(own, _)| own == pattern).map(|(_, rule)| rule);
        let member = |row: &String| rule_of(row).or_else(|| rule_of(row.strip_suffix(".weight")?));
        let members = self.rows.iter().map(member).collect::<Option<Vec<&Rule>>>()?;
        let first = members[0];
        let is_alike = |rule: &&Rule| Rule { how: first.how.clone(), ..(*rule).clone() } == *first;
        if rule_of(&self.target).is_some() || !members.iter().all(is_alike) {
            return None;
        }
        let how = match (&first.how, &members[1..]) {
            (how, []) => how.clone(),
            (How::Replicated, others) if others.iter().all(|rule| rule.how == How::Replicated) => {
                How::Replicated
            }
            (How::Column(split), _) => {
                let sections = members.iter().map(|rule| match &rule.how {
                    How::Column(own) if own.is_like(split) => Some(&own.sections),
                    _ => None,
                });
                let sections = Sections::one_after_the_other(&sections.collect::<Option<Vec<_>>>()?)?;
                How::Column(Split { sections, ..split.clone() })
            }
            _ => return None,
        };
        let is_stacked = self.stacked || first.is_stacked;
        Some((self.target.clone(), Rule { how, is_stacked, ..first.clone() }))
    }
}

/// Which fused tensors to make.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Fuse {
    /// None: every tensor keeps its name.
    #[default]
    No,
    /// All that the rules have, as far as the model has them: what [cannot be fused](super::Unfit) keeps its members, and is
    /// [told](crate::Assembly::unfused).
    All,
    /// These, by [name](Rules::fusions), such as `qkv`; one that cannot be fused is an error.
    Only(Vec<String>),
}

impl Fuse {
    /// Tells for each kind of fused tensor whether it is wanted.
    ///
    /// # Errors
    /// [`ParallelError::UnknownFusion`] for a name that the rules do not have.
    pub(super) fn wanted(&self, rules: &Rules) -> Result<Vec<bool>, ParallelError> {
        let names = if let Fuse::Only(names) = self { &names[..] } else { &[] };
        if let Some(name) = names.iter().find(|name| rules.fusions().all(|own| own != *name)) {
            let known = rules.fusions().map(str::to_owned).collect();
            return Err(ParallelError::UnknownFusion { name: name.clone(), known });
        }
        let is_wanted = |name: &str| match self {
            Fuse::No => false,
            Fuse::All => true,
            Fuse::Only(names) => names.iter().any(|own| own == name),
        };
        Ok(rules.fusions().map(is_wanted).collect())
    }
}

/// A fused tensor and who its members are.
#[derive(Clone, Debug)]
pub(super) struct Fused {
    pub(super) name: String,
    pub(super) key: Key,
    /// By row range for each expert, or once: the entries of the members.
    pub(super) members: Vec<Option<u32>>,
    /// Number of row ranges.
    pub(super) rows: usize,
    /// Whether its first dimension counts experts.
    pub(super) is_stacked: bool,
}

/// What the members of one fused tensor have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) fusion: u32,
    prefix: u32,
    leaf: Leaf,
    numbers: Numbers,
}

/// Fused tensors while their members are found.
#[derive(Debug, Default)]
pub(super) struct Gathering {
    by_key: HashMap<Key, u32>,
    pub(super) fused: Vec<Fused>,
}

impl Gathering {
    /// Adds a member and returns its fused tensor's place.
    pub(super) fn add(&mut self, rules: &Rules, found: &Match, member: Member, entry: u32) -> u32 {
        let fusion = &rules.fusions[member.fusion as usize];
        let (numbers, expert) = match (fusion.stacked, found.numbers.as_slice().last()) {
            (true, Some(expert)) => (found.numbers.without_last(), *expert as usize),
            _ => (found.numbers, 0),
        };
        let key = Key { fusion: member.fusion, prefix: member.prefix, leaf: member.leaf, numbers };
        let rows = fusion.rows.len();
        let place = *self.by_key.entry(key).or_insert_with(|| {
            let name = key.name(rules, &fusion.target, numbers.as_slice());
            let is_stacked = fusion.stacked;
            self.fused.push(Fused { name, key, members: vec![None; rows], rows, is_stacked });
            (self.fused.len() - 1) as u32 // At most one a tensor, of which there are at most 2^24.
        });
        let members = &mut self.fused[place as usize].members;
        let slot = expert * rows + member.row as usize;
        if members.len() <= slot {
            members.resize((expert + 1) * rows, None);
        }
        members[slot] = Some(entry);
        place
    }
}

impl Fused {
    /// Returns the name of a member that is not there.
    pub(super) fn missing(&self, rules: &Rules, experts: Option<u64>) -> Option<String> {
        let fusion = &rules.fusions[self.key.fusion as usize];
        let height = experts.filter(|_| fusion.stacked).map_or(0, |experts| experts as usize * self.rows);
        let hole = self.members.iter().position(Option::is_none);
        let slot = hole.or((self.members.len() < height).then_some(self.members.len()))?;
        let expert = fusion.stacked.then_some((slot / self.rows) as u32);
        let numbers: Vec<u32> = self.key.numbers.as_slice().iter().copied().chain(expert).collect();
        Some(self.key.name(rules, &fusion.rows[slot % self.rows], &numbers))
    }
}

impl Key {
    /// Returns what weight and bias of a module have in common.
    pub(super) fn module(self) -> Key {
        Key { leaf: Leaf::Itself, ..self }
    }

    /// Puts numbers in the place of a pattern's stars.
    fn name(&self, rules: &Rules, pattern: &str, numbers: &[u32]) -> String {
        let mut name = rules.prefixes[self.prefix as usize].clone();
        let mut numbers = numbers.iter();
        for (place, word) in pattern.split('.').enumerate() {
            name.push_str(if place > 0 { "." } else { "" });
            match (word, numbers.len()) {
                ("*", 1..) => name.push_str(&numbers.next().expect("there is one").to_string()),
                _ => name.push_str(word),
            }
        }
        name.push_str(self.leaf.suffix());
        name
    }
}
