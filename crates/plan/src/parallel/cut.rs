//! What a rule leaves a rank of one tensor: ranges of its dimensions.

use std::ops::Range;

use smallvec::{SmallVec, smallvec};

use super::config::Count;
use super::error::divisors;
use super::partition::{Entry, Origin, Partition};
use super::rules::{How, Sections, Split};
use super::{ParallelError, Ranks};
use crate::dims::Dims;
use crate::quant::CutError;
use crate::slice::Slice;

/// Ranges of elements: mostly of one or two dimensions, or one piece of one.
pub(super) type Ranges = SmallVec<[Range<u64>; 2]>;

/// The elements of a tensor that a rank has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Of dimension 0, where that counts experts.
    pub(super) experts: Option<Range<u64>>,
    /// The dimension that is cut, and what is kept of it: ascending, disjoint, one after the other in the result. One piece at least, unless
    /// the tensor has no dimensions.
    pub(super) dim: usize,
    pub(super) pieces: Ranges,
    /// Rows that the rank has past the end of the tensor.
    pub(super) padding: u64,
}

impl Cut {
    /// Everything.
    fn whole(shape: &[u64]) -> Cut {
        Cut {
            experts: None,
            dim: 0,
            pieces: shape.first().map(|len| 0..*len).into_iter().collect(),
            padding: 0,
        }
    }

    /// Tells whether nothing is left out.
    pub(super) fn is_whole(&self, shape: &[u64]) -> bool {
        let is_all = |dim: usize, range: &Range<u64>| *range == (0..shape[dim]);
        self.experts.as_ref().is_none_or(|experts| is_all(0, experts))
            && (shape.is_empty() || matches!(self.pieces.as_slice(), [piece] if is_all(self.dim, piece)))
    }

    /// Returns the shape of what is left.
    pub(super) fn shape(&self, whole: &[u64]) -> Dims {
        let mut shape = Dims::from_slice(whole);
        if let Some(len) = shape.get_mut(self.dim) {
            *len = self.pieces.iter().map(|piece| piece.end - piece.start).sum();
        }
        if let Some(experts) = &self.experts {
            shape[0] = experts.end - experts.start;
        }
        shape
    }

    /// Walks the slices of a tensor of this shape, and how many elements of the cut dimension lie before each.
    pub(super) fn slices<'c>(&'c self, whole: &'c [u64]) -> impl Iterator<Item = (Slice, u64)> + 'c {
        let is_whole = self.is_whole(whole);
        let all = is_whole.then_some((Slice::whole(), 0)).into_iter();
        let befores = self.pieces.iter().scan(0, |before, piece| {
            *before += piece.end - piece.start;
            Some(*before - (piece.end - piece.start))
        });
        let cut = self.ranges(whole).map(Slice::new).zip(befores);
        all.chain(cut.take(if is_whole { 0 } else { usize::MAX }))
    }

    /// Walks the ranges of leading dimensions that are kept, for each piece.
    pub(super) fn ranges<'c>(&'c self, whole: &'c [u64]) -> impl Iterator<Item = Ranges> + 'c {
        let range = |dim: usize, piece: &Range<u64>| match &self.experts {
            _ if dim == self.dim => piece.clone(),
            Some(experts) if dim == 0 => experts.clone(),
            _ => 0..whole[dim],
        };
        self.pieces.iter().map(move |piece| (0..=self.dim).map(|dim| range(dim, piece)).collect())
    }
}

impl Partition<'_> {
    /// Returns what a rank has of a tensor, or `None` where it has nothing of it, not even the name.
    pub(super) fn cut(&self, entry: &Entry, ranks: &Ranks) -> Result<Option<Cut>, ParallelError> {
        let (rule, shape) = (self.rule_of(entry), self.shape(entry));
        let of_expert = rule.is_stacked || entry.expert.is_some();
        let tp = match of_expert && ranks.has_whole_experts {
            true => Part { rank: 0, size: 1 },
            false => Part { rank: ranks.tp_rank, size: ranks.tp_size },
        };
        let is_row_bias = entry.is_bias && matches!(rule.how, How::Row(_));
        if is_row_bias && tp.rank > 0 && !rule.has_bias_everywhere {
            return Ok(None);
        }
        let mut cut = match self.dim(entry, shape)? {
            None => Cut::whole(shape),
            Some(dim) => match &rule.how {
                How::Vocab { pad_to } => vocab(shape[dim], *pad_to, tp),
                How::Column(split) | How::Row(split) => {
                    let pieces = self.share_of(entry, split, dim, shape[dim], tp)?;
                    Cut { experts: None, dim, pieces, padding: 0 }
                }
                How::Replicated => Cut::whole(shape),
            },
        };
        if rule.is_stacked {
            let experts = self.experts_of(entry, shape[0], ranks)?;
            match cut.dim {
                0 => cut.pieces = smallvec![experts], // Nothing but whole experts is shared.
                _ => cut.experts = Some(experts),
            }
        }
        Ok(Some(cut))
    }

    /// Returns a rank's experts out of `count`.
    pub(super) fn experts_of(
        &self,
        entry: &Entry,
        count: u64,
        ranks: &Ranks,
    ) -> Result<Range<u64>, ParallelError> {
        let tensor = || self.name(entry).to_owned();
        if let Some(experts) = self.config.experts.filter(|experts| *experts != count) {
            return Err(ParallelError::UnknownExpert { tensor: tensor(), expert: count, experts });
        }
        let ep = Part { rank: ranks.ep_rank, size: ranks.ep_size };
        let uneven = |works| ParallelError::Uneven {
            tensor: String::new(),
            what: "experts",
            count,
            size: ep.size,
            works,
        };
        ep.even(count).ok_or_else(|| uneven(divisors(count)))
    }

    /// Returns the dimension that the tensor's rule cuts.
    pub(super) fn dim(&self, entry: &Entry, shape: &[u64]) -> Result<Option<usize>, ParallelError> {
        let (rule, ndim) = (self.rule_of(entry), shape.len());
        let behind = usize::from(rule.is_stacked); // Dimensions before the matrix or vector.
        let is_swapped = rule.is_transposed && matches!(entry.origin, Origin::Stored(_));
        let (from_end, needs) = match &rule.how {
            How::Replicated => (None, 0),
            // One number a column of the weight, however these are counted.
            How::Row(_) if matches!(entry.origin, Origin::Factor(_)) => (Some(1), 1),
            How::Vocab { .. } | How::Column(_) if matches!(entry.origin, Origin::Factor(_)) => (None, 0),
            How::Vocab { .. } => (Some(ndim), 1),
            How::Row(_) if entry.is_bias => (None, 0),
            How::Row(split) if ndim == 1 && split.sections != Sections::Equal(1) => (None, 0),
            How::Column(_) | How::Row(_) if entry.is_bias || ndim - behind.min(ndim) == 1 => (Some(1), 1),
            How::Column(_) if !is_swapped => (Some(2), 2),
            How::Row(_) if is_swapped => (Some(2), 2),
            How::Column(_) | How::Row(_) => (Some(1), 2),
        };
        if ndim < needs + behind {
            return Err(ParallelError::TooFewDims {
                tensor: self.name(entry).to_owned(),
                shape: shape.to_vec(),
                pattern: entry
                    .rule
                    .map_or_else(String::new, |rule| self.rules.rules[rule as usize].0.clone()),
                rule: rule.to_string(),
            });
        }
        Ok(from_end.map(|from_end| ndim - from_end))
    }

    /// Returns what a rank has of a dimension of `len` elements.
    fn share_of(
        &self,
        entry: &Entry,
        split: &Split,
        dim: usize,
        len: u64,
        tp: Part,
    ) -> Result<Ranges, ParallelError> {
        let tensor = || self.name(entry).to_owned();
        let not_counted = |counted: String| ParallelError::NotCounted { tensor: tensor(), dim, len, counted };
        let mut pieces = Ranges::new();
        let mut keep = |piece: Range<u64>| match pieces.last_mut() {
            Some(last) if last.end == piece.start => last.end = piece.end,
            _ if piece.is_empty() => {}
            _ => pieces.push(piece),
        };
        match &split.sections {
            Sections::Equal(sections) => {
                if !len.is_multiple_of(*sections) {
                    return Err(not_counted(format!("{sections} equal sections")));
                }
                let count = len / sections;
                let what = if dim + 1 == self.shape(entry).len() && dim > 0 { "columns" } else { "rows" };
                for section in 0..*sections {
                    let own = match (self.block_of(split), split.is_uneven) {
                        (Some(block), _) => tp.blocks(count, block),
                        (None, true) => tp.chunk(count),
                        (None, false) => {
                            let size = tp.size;
                            let uneven =
                                |works| ParallelError::Uneven { tensor: tensor(), what, count, size, works };
                            tp.even(count).ok_or_else(|| uneven(self.works(count)))?
                        }
                    };
                    keep(section * count + own.start..section * count + own.end);
                }
            }
            Sections::Counted(counts) => {
                let numbers = counts.iter().map(|count| self.config.count(*count));
                let numbers = numbers.collect::<Result<Vec<u64>, _>>()?;
                if tp.size > 1 && counts.contains(&Count::KvHeads) {
                    self.check_kv_heads(entry, len, numbers.iter().sum())?;
                }
                let unit = len / numbers.iter().sum::<u64>();
                let of_heads = self.config.head_dim.filter(|_| counts.contains(&Count::KvHeads));
                if unit * numbers.iter().sum::<u64>() != len
                    || of_heads.is_some_and(|head_dim| head_dim != unit)
                {
                    let words = counts
                        .iter()
                        .zip(&numbers)
                        .map(|(count, number)| format!("{number} {}", count.word()));
                    let of = of_heads.map_or_else(String::new, |head_dim| format!(" of {head_dim}"));
                    return Err(not_counted(words.collect::<Vec<_>>().join(" + ") + &of));
                }
                let mut before = 0;
                for (count, number) in counts.iter().zip(&numbers) {
                    let own = match self.block_of(split) {
                        Some(block) => Some(tp.blocks(*number, block)),
                        None => tp.of_counted(*count, *number),
                    };
                    let own = own.ok_or_else(|| ParallelError::Uneven {
                        tensor: tensor(),
                        what: count.word(),
                        count: *number,
                        size: tp.size,
                        works: self.works_for(*count, *number),
                    })?;
                    keep((before + own.start) * unit..(before + own.end) * unit);
                    before += number;
                }
            }
        }
        Ok(at_least_one(pieces))
    }

    /// Holds a number of KV heads that is a guess against the length of the other heads of the model: `count` heads, KV heads among them, are
    /// `len` elements.
    ///
    /// A configuration without the number means as many as queries have, or a number that was forgotten: then a head would be cut in two.
    fn check_kv_heads(&self, entry: &Entry, len: u64, count: u64) -> Result<(), ParallelError> {
        if self.config.kv_heads.is_some() || self.config.head_dim.is_some() {
            return Ok(()); // A number that is given, or heads whose length is checked already.
        }
        let mut head_lens = self.entries.iter().filter_map(|entry| self.len_of_head(entry)).peekable();
        let Some(other_len) = head_lens.peek().copied() else { return Ok(()) };
        if head_lens.any(|head_len| head_len.checked_mul(count) == Some(len)) {
            return Ok(());
        }
        Err(ParallelError::Config {
            what: format!(
                "num_key_value_heads is not there, and is not num_attention_heads: tensor {:?} has {len} elements for \
                 {count} heads, others have {other_len} for each; add the key",
                self.name(entry)
            ),
        })
    }

    /// Returns the length of a head of a tensor that is counted by heads alone.
    fn len_of_head(&self, entry: &Entry) -> Option<u64> {
        let Sections::Counted(counts) = &self.rule_of(entry).split()?.sections else { return None };
        let is_of_heads = counts.iter().all(|count| *count == Count::Heads);
        let shape = self.shape(entry);
        let len = shape[self.dim(entry, shape).ok()??];
        let count = self.config.heads.filter(|_| is_of_heads)? * counts.len() as u64;
        len.is_multiple_of(count).then(|| len / count)
    }

    /// Says which sizes would cut a packed tensor between what is together, where its rule shares a single section evenly.
    pub(super) fn with_what_works(&self, entry: &Entry, cut: &Cut, error: ParallelError) -> ParallelError {
        let ParallelError::StoredCut { error, .. } = error else { return error };
        let rule = self.rule_of(entry);
        let of_section = |sections: &Sections| {
            let len = *self.shape(entry).get(cut.dim)?;
            match sections {
                Sections::Equal(1) => Some((len, 1, self.works(len))),
                Sections::Counted(counts) => {
                    let [count] = counts[..] else { return None };
                    let number = self.config.count(count).ok()?;
                    Some((number, len / number, self.works_for(count, number)))
                }
                Sections::Equal(_) => None,
            }
        };
        let section = rule.split().and_then(|split| of_section(&split.sections));
        let works = match (&*error, section) {
            (CutError::InsideUnit { multiple, .. }, Some((number, unit, mut sizes))) => {
                sizes.retain(|size| {
                    number.is_multiple_of(*size) && (number / size * unit).is_multiple_of(*multiple)
                });
                sizes
            }
            _ => Vec::new(),
        };
        let is_of_expert = rule.is_stacked || entry.expert.is_some();
        ParallelError::StoredCut { error, works, is_of_expert }
    }

    /// Returns how many are together of what is shared.
    ///
    /// # Source
    /// vLLM and SGLang cut gpt-oss so (`_load_weights_mxfp4`, `_load_mxfp4_experts_weights` of their `models/gpt_oss.py`): 2880 features are 90
    /// blocks of 32, of which 8 ranks have 12 each and the last 6. Dense experts are cut evenly there, too.
    pub(super) fn block_of(&self, split: &Split) -> Option<u64> {
        split.packed_block.filter(|_| self.is_in_blocks)
    }

    /// Returns the sizes that share a number evenly, and all that the model's rules count as well.
    fn works(&self, number: u64) -> Vec<u64> {
        let counted = self.counted();
        let fits = |size: &u64| {
            let part = Part { rank: 0, size: u32::try_from(*size).unwrap_or(u32::MAX) };
            counted.iter().all(|(count, number)| part.of_counted(*count, *number).is_some())
        };
        divisors(number).into_iter().filter(fits).collect()
    }

    /// As [`works`](Partition::works), of what the configuration counts. More ranks than there are KV heads share the heads.
    fn works_for(&self, count: Count, number: u64) -> Vec<u64> {
        match count {
            Count::Intermediate => self.works(number),
            Count::Heads | Count::KvHeads => self.works(self.config.heads.unwrap_or(number)),
        }
    }

    /// Returns what rules of the model's tensors count and share evenly, where the configuration has the number.
    fn counted(&self) -> Vec<(Count, u64)> {
        let mut counted = Vec::new();
        for split in self.entries.iter().filter_map(|entry| self.rule_of(entry).split()) {
            let Sections::Counted(counts) = &split.sections else { continue };
            for count in counts.iter().filter(|_| self.block_of(split).is_none()) {
                let known = self.config.count(*count).ok().map(|number| (*count, number));
                counted.extend(known.filter(|known| !counted.contains(known)));
            }
        }
        counted
    }
}

/// A rank among those that share something.
#[derive(Clone, Copy)]
struct Part {
    rank: u32,
    size: u32,
}

impl Part {
    /// Returns an even share, if there is one.
    fn even(self, count: u64) -> Option<Range<u64>> {
        let each = count / u64::from(self.size);
        let first = each * u64::from(self.rank);
        (each * u64::from(self.size) == count).then_some(first..first + each)
    }

    /// Returns `ceil(count / size)`, or what the ranks before have left.
    fn chunk(self, count: u64) -> Range<u64> {
        let each = count.div_ceil(u64::from(self.size));
        let first = (each * u64::from(self.rank)).min(count);
        first..(first + each).min(count)
    }

    /// As [`Part::chunk`], of blocks; the last of them may be short.
    fn blocks(self, count: u64, block: u64) -> Range<u64> {
        let own = self.chunk(count.div_ceil(block));
        (own.start * block).min(count)..(own.end * block).min(count)
    }

    /// As [`Part::even`], but fewer KV heads than ranks are shared by `size / count` ranks each.
    fn of_counted(self, count: Count, number: u64) -> Option<Range<u64>> {
        let size = u64::from(self.size);
        if count == Count::KvHeads && number < size && size % number == 0 {
            let head = u64::from(self.rank) * number / size;
            return Some(head..head + 1);
        }
        self.even(number)
    }
}

/// Returns a rank's rows of a padded vocabulary: `rows` rounded up to a multiple of `pad_to` that ranks can share, in equal shares.
fn vocab(rows: u64, pad_to: u64, tp: Part) -> Cut {
    let size = u64::from(tp.size);
    let unit = pad_to / gcd(pad_to, size); // Of each rank: `unit * size` is the least common multiple.
    let each = rows.div_ceil(unit.saturating_mul(size)).saturating_mul(unit);
    let first = each.saturating_mul(u64::from(tp.rank));
    let own = first.min(rows)..first.saturating_add(each).min(rows);
    let padding = each - (own.end - own.start);
    let pieces = if own.is_empty() { Ranges::new() } else { smallvec![own] };
    Cut { experts: None, dim: 0, pieces: at_least_one(pieces), padding }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A rank that has nothing of a tensor has an empty piece of it, which says its dtype.
fn at_least_one(pieces: Ranges) -> Ranges {
    if pieces.is_empty() { smallvec![0..0] } else { pieces }
}
