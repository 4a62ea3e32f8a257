//! A share as text: a line for all tensors that differ by numbers alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::partition::Partition;
use super::share::Share;
use crate::assembly::{Assembled, Source};
use crate::dtype::{Dtype, numel};
use crate::slice::{Slice, SliceRange};

impl Partition<'_> {
    /// Prints a share: for all tensors whose names differ by their numbers alone, and which are alike, a line `name  rule  dtype [stored shape][what is
    /// kept] -> [shape] xcount  bytes`. A dequantized tensor has the dtype it becomes; what is fused lists its members.
    pub fn text<'p>(&'p self, share: &'p Share) -> impl fmt::Display + 'p {
        Text { partition: self, share }
    }

    /// Returns the bytes of a tensor of a share.
    pub fn len_bytes(&self, tensor: &Assembled) -> u64 {
        let Some(part) = tensor.parts.first() else { return 0 };
        let dtype = self.dtype_of(part.source);
        numel(&tensor.shape).and_then(|numel| dtype.len_bytes(numel)).unwrap_or(0)
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

struct Text<'p> {
    partition: &'p Partition<'p>,
    share: &'p Share,
}

/// Tensors that differ by numbers alone.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    /// With `*` for each number.
    name: String,
    rule: String,
    stored: String,
    shape: Vec<u64>,
    padding: u64,
}

/// How many there are of a kind.
#[derive(Default)]
struct Tally {
    /// The numbers at each star.
    numbers: Vec<BTreeSet<u64>>,
    count: u64,
    len_bytes: u64,
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = self.kinds();
        let (count, len_bytes) = kinds
            .values()
            .fold((0, 0), |(count, len_bytes), tally| (count + tally.count, len_bytes + tally.len_bytes));
        writeln!(f, "{}: {count} tensors, {len_bytes} bytes", self.share.ranks)?;
        let names: Vec<String> = kinds.iter().map(|(kind, tally)| tally.name(kind)).collect();
        let width = names.iter().map(String::len).max().unwrap_or(0);
        let rule_width = kinds.keys().map(|kind| kind.rule.len()).max().unwrap_or(0);
        for (name, (kind, tally)) in names.iter().zip(&kinds) {
            let Kind { rule, stored, shape, padding, .. } = kind;
            write!(f, "  {name:width$}  {rule:rule_width$}  {stored} -> {shape:?}")?;
            if *padding > 0 {
                write!(f, " + {padding} rows of padding")?;
            }
            if tally.count > 1 {
                write!(f, " x{}", tally.count)?;
            }
            writeln!(f, "  {} bytes", tally.len_bytes)?;
        }
        Ok(())
    }
}

impl Text<'_> {
    fn kinds(&self) -> BTreeMap<Kind, Tally> {
        let mut kinds: BTreeMap<Kind, Tally> = BTreeMap::new();
        let mut padding = self.share.padding.iter().peekable();
        for (number, (tensor, entry)) in
            (0u32..).zip(self.share.assembly.tensors.iter().zip(&self.share.entries))
        {
            let padding =
                padding.next_if(|padding| padding.tensor == number).map_or(0, |padding| padding.rows);
            let entry = &self.partition.entries[*entry as usize];
            let rule = self.partition.rule_of(entry).to_string();
            let (name, numbers) = starred(&tensor.name);
            let shape = tensor.shape.clone();
            let stored = self.stored(tensor);
            let tally = kinds.entry(Kind { name, rule, stored, shape, padding }).or_default();
            tally.numbers.resize_with(numbers.len(), BTreeSet::new);
            for (all, number) in tally.numbers.iter_mut().zip(numbers) {
                all.insert(number);
            }
            tally.count += 1;
            tally.len_bytes += self.partition.len_bytes(tensor);
        }
        kinds
    }

    /// Says what a tensor is cut from: the dtype and the shapes of its sources, what is kept of each, and alike ones counted.
    fn stored(&self, tensor: &Assembled) -> String {
        let dtype = tensor
            .parts
            .first()
            .map_or(self.partition.made_dtype, |part| self.partition.dtype_of(part.source));
        let mut cuts: Vec<((&[u64], &Slice), u64)> = Vec::new();
        for part in &tensor.parts {
            let cut = (self.partition.shape_of(part.source), &part.slice);
            match cuts.iter_mut().find(|(other, _)| *other == cut) {
                Some((_, count)) => *count += 1,
                None => cuts.push((cut, 1)),
            }
        }
        let counted = |((shape, slice), count): &((&[u64], &Slice), u64)| match count {
            1 => format!("{shape:?}{}", kept(shape, slice)),
            _ => format!("{count} x {shape:?}{}", kept(shape, slice)),
        };
        let cuts: Vec<String> = cuts.iter().map(counted).collect();
        format!("{dtype} {}", cuts.join(" + "))
    }
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
    /// Returns the name with all numbers in the place of each star: `model.layers.0-31.mlp.up_proj.weight`.
    fn name(&self, kind: &Kind) -> String {
        let mut numbers = self.numbers.iter();
        let mut name = String::new();
        for word in kind.name.split('.') {
            let numbers = if word == "*" { numbers.next() } else { None };
            name.push_str(if name.is_empty() { "" } else { "." });
            name.push_str(&numbers.map_or_else(|| word.to_owned(), ranges));
        }
        name
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
