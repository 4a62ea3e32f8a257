//! Patterns on tensor names, matched together.
//!
//! A pattern is a name with `*` for any component that is a number, and `**` at its end for one component or more. All patterns of a table
//! are one trie over the dot-separated components, so that a name is walked once, whatever the number of rules.

use super::ParallelError;
use std::ops::Range;

/// What a tensor's name says, by the marks of all patterns on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Match {
    /// The most specific rule, by its place in the table, and which leaf it has.
    pub(super) rule: Option<(u32, Leaf)>,
    /// Another one just as specific that means something else.
    pub(super) rival: Option<u32>,
    /// The fused tensor it belongs to.
    pub(super) member: Option<Member>,
    pub(super) stage: Stage,
    /// The numbers that `*` stood for in the member's pattern.
    pub(super) numbers: Numbers,
    pub(super) layer: Option<u32>,
    pub(super) expert: Option<u32>,
}

/// Up to three numbers of a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Numbers {
    len: u8,
    numbers: [u32; 3],
}

impl Numbers {
    pub(super) fn as_slice(&self) -> &[u32] {
        &self.numbers[..usize::from(self.len)]
    }

    /// Returns the same without the last.
    pub(super) fn without_last(self) -> Numbers {
        let len = self.len.saturating_sub(1);
        let mut numbers = self.numbers;
        numbers[usize::from(len)..].fill(0);
        Numbers { len, numbers }
    }

    fn with(mut self, number: u32) -> Numbers {
        if let Some(place) = self.numbers.get_mut(usize::from(self.len)) {
            (*place, self.len) = (number, self.len + 1);
        }
        self
    }
}

/// What of a module a tensor is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Leaf {
    /// The pattern names the tensor itself.
    #[default]
    Itself,
    /// The pattern names a module, this is its weight.
    Weight,
    /// The pattern names a module, this is its bias.
    Bias,
}

impl Leaf {
    /// Returns what is appended to a module's name.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Leaf::Itself => "",
            Leaf::Weight => ".weight",
            Leaf::Bias => ".bias",
        }
    }
}

/// A place in a fused tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) fusion: u32,
    /// Which of the row ranges.
    pub(super) row: u32,
    pub(super) prefix: u32,
    pub(super) leaf: Leaf,
}

/// Which pipeline stages have a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// Every stage.
    #[default]
    Every,
    First,
    Last,
    /// The first and the last: embeddings that are the head as well.
    Ends,
    /// The one that has the layer.
    Layer,
}

impl Stage {
    /// Tells whether a stage with `layers` out of `count` has a tensor. Layers behind the counted ones belong to the last.
    pub(super) fn is_in(self, layer: Option<u32>, layers: &Range<u64>, count: u64) -> bool {
        let (is_first, is_last) = (layers.start == 0, layers.end == count);
        match (self, layer) {
            (Stage::Layer, Some(layer)) if u64::from(layer) >= count => is_last,
            (Stage::Layer, Some(layer)) => layers.contains(&u64::from(layer)),
            (Stage::Every | Stage::Layer, _) => true,
            (Stage::First, _) => is_first,
            (Stage::Last, _) => is_last,
            (Stage::Ends, _) => is_first || is_last,
        }
    }
}

/// What a pattern says of the names it matches, or begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Mark {
    Rule(u32, Leaf),
    Member(Member),
    /// Also of every name below.
    Stage(Stage),
    /// The last component numbers an expert; also of every name below.
    Expert,
}

/// Patterns as a trie.
#[derive(Clone, Debug)]
pub(super) struct Trie {
    nodes: Vec<Node>,
}

#[derive(Clone, Debug, Default)]
struct Node {
    words: Vec<(Box<str>, u32)>,
    number: Option<u32>,
    /// Rules whose pattern ends with `**` here.
    rest: Vec<u32>,
    rules: Vec<(u32, Leaf)>,
    members: Vec<Member>,
    stage: Option<Stage>,
    is_expert: bool,
}

impl Trie {
    pub(super) fn new() -> Trie {
        Trie { nodes: vec![Node::default()] }
    }

    /// Adds a mark for the names that a pattern matches.
    ///
    /// # Errors
    /// [`ParallelError::Rules`] for an empty component, `*` beside letters, `**` anywhere but at the end of a rule, or
    /// too many components.
    pub(super) fn insert(&mut self, table: &str, pattern: &str, mark: Mark) -> Result<(), ParallelError> {
        let bad = |what: &str| ParallelError::Rules {
            table: table.to_owned(),
            what: format!("{pattern:?}: {what}"),
        };
        let (path, has_rest) = match pattern.strip_suffix("**") {
            Some("") => ("", true),
            Some(path) => (path.strip_suffix('.').ok_or_else(|| bad("** is a component of its own"))?, true),
            None => (pattern, false),
        };
        if path.split('.').count() > DEPTH_MAX {
            return Err(bad(&format!("more than {DEPTH_MAX} components")));
        }
        let mut node = 0;
        for word in path.split('.').filter(|_| !path.is_empty()) {
            node = match word {
                "" => return Err(bad("a component is empty")),
                "*" => self.number_below(node),
                word if word.contains('*') => {
                    return Err(bad("* is a component of its own; ** stands at the end"));
                }
                word => self.word_below(node, word),
            };
        }
        let node = &mut self.nodes[node];
        match mark {
            Mark::Rule(rule, _) if has_rest => node.rest.push(rule),
            _ if has_rest => return Err(bad("only a rule ends with **")),
            _ if pattern.is_empty() => return Err(bad("an empty pattern")),
            Mark::Rule(rule, leaf) => node.rules.push((rule, leaf)),
            Mark::Member(member) => node.members.push(member),
            Mark::Stage(stage) => node.stage = Some(stage),
            Mark::Expert => node.is_expert = true,
        }
        Ok(())
    }

    /// Walks a name. `is_same` tells whether two rules mean the same, so that it does not matter which is taken.
    pub(super) fn find(&self, name: &str, is_same: impl Fn(u32, u32) -> bool) -> Match {
        let mut walk = Walk { trie: self, is_same, best: (0, 0), stage_depth: 0, found: Match::default() };
        walk.visit(0, Some(name), At::default());
        walk.found
    }

    fn number_below(&mut self, node: usize) -> usize {
        if let Some(next) = self.nodes[node].number {
            return next as usize;
        }
        let next = self.push();
        self.nodes[node].number = Some(next);
        next as usize
    }

    fn word_below(&mut self, node: usize, word: &str) -> usize {
        if let Some((_, next)) = self.nodes[node].words.iter().find(|(own, _)| **own == *word) {
            return *next as usize;
        }
        let next = self.push();
        self.nodes[node].words.push((word.into(), next));
        next as usize
    }

    fn push(&mut self) -> u32 {
        self.nodes.push(Node::default());
        (self.nodes.len() - 1) as u32 // A few nodes for each line of a table.
    }
}

/// How a walk came to a node.
#[derive(Clone, Copy, Debug, Default)]
struct At {
    depth: u32,
    words: u32,
    stars: u32,
    numbers: Numbers,
    last: Option<u32>,
}

struct Walk<'t, F> {
    trie: &'t Trie,
    is_same: F,
    /// Words and numbers of the best rule's pattern: the more words, the more specific.
    best: (u32, u32),
    stage_depth: u32,
    found: Match,
}

impl<F: Fn(u32, u32) -> bool> Walk<'_, F> {
    /// `rest` is what of the name lies below the node; `None` at its end.
    fn visit(&mut self, node: u32, rest: Option<&str>, at: At) {
        let node = &self.trie.nodes[node as usize];
        self.mark(node, at);
        let Some(rest) = rest else {
            for (rule, leaf) in &node.rules {
                self.offer((*rule, *leaf), at);
            }
            if let Some(member) = node.members.first() {
                (self.found.member, self.found.numbers) = (Some(*member), at.numbers);
            }
            return;
        };
        for rule in &node.rest {
            self.offer((*rule, Leaf::Itself), at);
        }
        let (word, behind) = rest.split_once('.').map_or((rest, None), |(word, behind)| (word, Some(behind)));
        let below = At { depth: at.depth + 1, last: None, ..at };
        if let Some((_, next)) = node.words.iter().find(|(own, _)| **own == *word) {
            self.visit(*next, behind, At { words: at.words + 1, ..below });
        }
        if let Some((next, number)) = node.number.zip(number(word)) {
            let numbers = at.numbers.with(number);
            self.visit(next, behind, At { stars: at.stars + 1, numbers, last: Some(number), ..below });
        }
    }

    /// Takes down what holds for every name below a node; the deepest wins.
    fn mark(&mut self, node: &Node, at: At) {
        if let Some(stage) = node.stage.filter(|_| at.depth > self.stage_depth) {
            self.stage_depth = at.depth;
            self.found.stage = stage;
            self.found.layer = at.last;
        }
        if node.is_expert {
            self.found.expert = at.last;
        }
    }

    fn offer(&mut self, rule: (u32, Leaf), at: At) {
        let weight = (at.words, at.stars);
        match self.found.rule {
            Some(_) if weight < self.best => {}
            Some((other, _)) if weight == self.best => {
                if !(self.is_same)(other, rule.0) {
                    self.found.rival = Some(rule.0);
                }
            }
            _ => {
                self.best = weight;
                (self.found.rule, self.found.rival) = (Some(rule), None);
            }
        }
    }
}

fn number(word: &str) -> Option<u32> {
    let is_number = word.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| word.parse().ok()).flatten()
}

/// The most components of a pattern, three times what names have; a walk is as deep.
const DEPTH_MAX: usize = 32;
