//! What a rank has, summed up: a line for all tensors that differ by numbers alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use super::Ranks;
use super::partition::{Entry, Partition};
use super::share::Share;
use crate::assembly::{Assembled, Source, Unfused};
use crate::dtype::{Dtype, numel};
use crate::slice::{Slice, SliceRange};

/// What a rank has of each tensor, and by which rule.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Summary {
    /// Whose it is.
    pub ranks: Ranks,
    /// Number of tensors.
    pub tensors: u64,
    /// Bytes of the tensors.
    pub bytes: u64,
    /// The tensors, by the names of their kinds.
    pub kinds: Vec<Kind>,
    /// What was to be fused and is not.
    pub unfused: Vec<Unfused>,
    /// Patterns of the caller's own rules that no tensor of the model has.
    pub unused_rules: Vec<String>,
}

/// Tensors whose names differ by their numbers alone, and which are alike.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Kind {
    /// Their names, with all numbers in the place of each: `model.layers.0-31.mlp.up_proj.weight`.
    pub names: String,
    /// The rule that cuts them.
    pub rule: String,
    /// Their element type; of a dequantized tensor the one that it becomes.
    pub dtype: Dtype,
    /// What each is made of; of a fused tensor its members.
    pub from: Vec<Kept>,
    /// The shape of each.
    pub shape: Vec<u64>,
    /// Rows that each has past the end of a vocabulary, which are in no file.
    pub padding_rows: u64,
    /// How many there are.
    pub tensors: u64,
    /// Their bytes together.
    pub bytes: u64,
}

/// What is kept of a stored or dequantized tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Kept {
    /// The whole tensor's shape.
    pub shape: Vec<u64>,
    /// The part of it.
    pub slice: Slice,
    /// How many tensors this is kept of.
    pub count: u64,
}

impl fmt::Display for Summary {
    /// Prints for each kind a line `names  rule  dtype [stored shape][what is kept] -> [shape] xcount  bytes`, what could not be
    /// fused, and which rules are not used.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {} tensors, {} bytes", self.ranks, self.tensors, self.bytes)?;
        let width = self.kinds.iter().map(|kind| kind.names.len()).max().unwrap_or(0);
        let rule_width = self.kinds.iter().map(|kind| kind.rule.len()).max().unwrap_or(0);
        for kind in &self.kinds {
            let Kind { names, rule, shape, padding_rows, .. } = kind;
            write!(f, "  {names:width$}  {rule:rule_width$}  {} -> {shape:?}", kind.stored())?;
            if *padding_rows > 0 {
                write!(f, " + {padding_rows} rows of padding")?;
            }
            if kind.tensors > 1 {
                write!(f, " x{}", kind.tensors)?;
            }
            writeln!(f, "  {} bytes", kind.bytes)?;
        }
        self.unfused.iter().try_for_each(|unfused| writeln!(f, "  not fused: {unfused}"))?;
        self.unused_rules
            .iter()
            .try_for_each(|rule| writeln!(f, "  not used: rule {rule:?}, which no tensor has"))
    }
}

impl Kind {
    /// Says what each is cut from.
    fn stored(&self) -> String {
        let one = |Kept { shape, slice, count }: &Kept| match count {
            1 => format!("{shape:?}{}", kept(shape, slice)),
            _ => format!("{count} x {shape:?}{}", kept(shape, slice)),
        };
        let all: Vec<String> = self.from.iter().map(one).collect();
        format!("{} {}", self.dtype, all.join(" + "))
    }
}

impl Partition<'_> {
    /// Sums a share up.
    pub fn summary(&self, share: &Share) -> Summary {
        let mut alike: BTreeMap<Alike, Tally> = BTreeMap::new();
        let mut padding = share.assembly.padding.iter().peekable();
        for (number, (tensor, entry)) in (0u32..).zip(share.assembly.tensors.iter().zip(&share.entries)) {
            let padding =
                padding.next_if(|padding| padding.tensor == number).map_or(0, |padding| padding.rows);
            let entry = &self.entries[*entry as usize];
            let (name, numbers) = starred(&tensor.name);
            let kind = Kind {
                names: String::new(),
                rule: self.rule_text(entry),
                dtype: tensor.parts.first().map_or(self.made_dtype, |part| self.dtype_of(part.source)),
                from: self.kept(tensor),
                shape: tensor.shape.to_vec(),
                padding_rows: padding,
                tensors: 0,
                bytes: 0,
            };
            let key = Alike {
                name,
                rule: kind.rule.clone(),
                stored: kind.stored(),
                shape: kind.shape.clone(),
                padding,
            };
            let tally = alike.entry(key).or_insert_with(|| Tally { numbers: Vec::new(), kind });
            tally.numbers.resize_with(numbers.len(), BTreeSet::new);
            for (all, number) in tally.numbers.iter_mut().zip(numbers) {
                all.insert(number);
            }
            tally.kind.tensors += 1;
            tally.kind.bytes += self.len_bytes(tensor);
        }
        let kinds: Vec<Kind> = alike
            .into_iter()
            .map(|(key, tally)| Kind { names: tally.names(&key.name), ..tally.kind })
            .collect();
        Summary {
            ranks: share.ranks.clone(),
            tensors: kinds.iter().map(|kind| kind.tensors).sum(),
            bytes: kinds.iter().map(|kind| kind.bytes).sum(),
            kinds,
            unfused: share.assembly.unfused.clone(),
            unused_rules: share.assembly.unused_rules.clone(),
        }
    }

    fn rule_text(&self, entry: &Entry) -> String {
        let rule = self.rule_of(entry);
        match rule.split().and_then(|split| self.block_of(split)) {
            Some(block) => format!("{rule}, in blocks of {block}"),
            None => rule.to_string(),
        }
    }

    /// Returns the bytes of a tensor of a share.
    pub fn len_bytes(&self, tensor: &Assembled) -> u64 {
        let Some(part) = tensor.parts.first() else { return 0 };
        let dtype = self.dtype_of(part.source);
        numel(&tensor.shape).and_then(|numel| dtype.len_bytes(numel)).unwrap_or(0)
    }

    /// Says what a tensor is cut from, alike parts counted.
    fn kept(&self, tensor: &Assembled) -> Vec<Kept> {
        let mut all: Vec<Kept> = Vec::new();
        for part in &tensor.parts {
            let shape = self.shape_of(part.source);
            match all.iter_mut().find(|other| other.shape == shape && other.slice == part.slice) {
                Some(alike) => alike.count += 1,
                None => all.push(Kept { shape: shape.to_vec(), slice: part.slice.clone(), count: 1 }),
            }
        }
        all
    }

    fn dtype_of(&self, source: Source) -> Dtype {
        match source {
            Source::Stored(id) => self.checkpoint.tensor(id).info.dtype,
            Source::Made(_) => self.made_dtype,
        }
    }

    fn shape_of(&self, source: Source) -> &[u64] {
        match source {
            Source::Stored(id) => self.checkpoint.tensor(id).info.shape,
            Source::Made(group) => &self.groups[group as usize].shape,
        }
    }
}

/// What tensors of a kind have in common, in the order in which kinds are listed.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Alike {
    /// With `*` for each number.
    name: String,
    rule: String,
    stored: String,
    shape: Vec<u64>,
    padding: u64,
}

/// A kind while its tensors are counted.
struct Tally {
    /// The numbers at each star.
    numbers: Vec<BTreeSet<u64>>,
    kind: Kind,
}

/// Prints what a slice keeps, `..` for a whole dimension before one that is not; nothing where it keeps everything.
fn kept(shape: &[u64], slice: &Slice) -> String {
    let one = |(range, len): (&SliceRange, &u64)| match *range == SliceRange::from(0..*len) {
        true => "..".to_owned(),
        false => range.to_string(),
    };
    let mut ranges: Vec<String> = slice.ranges().iter().zip(shape).map(one).collect();
    ranges.truncate(ranges.iter().rposition(|range| range != "..").map_or(0, |last| last + 1));
    if ranges.is_empty() { String::new() } else { format!("[{}]", ranges.join(", ")) }
}

impl Tally {
    /// Puts all numbers in the place of each star.
    fn names(&self, starred: &str) -> String {
        let mut numbers = self.numbers.iter();
        let word = |word: &str| match word {
            "*" => numbers.next().map_or_else(|| word.to_owned(), ranges),
            _ => word.to_owned(),
        };
        starred.split('.').map(word).collect::<Vec<_>>().join(".")
    }
}

/// Puts a star in the place of each number of a name.
fn starred(name: &str) -> (String, Vec<u64>) {
    let mut numbers = Vec::new();
    let mut star = |word: &'_ str| match word.parse() {
        Ok(number) if word.bytes().all(|byte| byte.is_ascii_digit()) => {
            numbers.push(number);
            "*".to_owned()
        }
        _ => word.to_owned(),
    };
    let words: Vec<String> = name.split('.').map(&mut star).collect();
    (words.join("."), numbers)
}

/// Prints numbers as `0-3,7`.
fn ranges(numbers: &BTreeSet<u64>) -> String {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => ranges.push((*number, *number)),
        }
    }
    let text = |(first, last): &(u64, u64)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    ranges.iter().map(text).collect::<Vec<_>>().join(",")
}
