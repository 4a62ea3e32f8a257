//! What one rank has: the tensors of its assembly, with every part they are made of.

use std::collections::HashMap;
use std::ops::Range;

use super::cut::Cut;
use super::fuse::Fused;
use super::packed::{self, MemberShare};
use super::partition::{Entry, Origin, Partition};
use super::pattern::Stage;
use super::{ParallelError, Ranks};
use crate::assembly::{Assembled, Assembly, Part, Source};
use crate::checkpoint::TensorRef;
use crate::placement::DeviceId;
use crate::quant::Group;
use crate::slice::Slice;

/// A rank's share of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Whose it is.
    pub ranks: Ranks,
    /// What is loaded: tensors in the order of the checkpoint, a fused one where its first member is.
    pub assembly: Assembly,
    /// Rows that the rank has past the end of a vocabulary. They are in no file and in no tensor of the assembly.
    pub padding: Vec<Padding>,
    /// For each tensor of the assembly the entry that its rule is from.
    pub(super) entries: Vec<u32>,
}

/// Rows that a rank has past the end of a vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Padding {
    /// Which tensor, by its place in the assembly.
    pub tensor: u32,
    /// Rows behind those of the tensor.
    pub rows: u64,
}

impl Share {
    pub(super) fn new(
        partition: &Partition<'_>,
        ranks: &Ranks,
        device: DeviceId,
    ) -> Result<Share, ParallelError> {
        ranks.check()?;
        let mut building = Building {
            partition,
            ranks,
            device,
            layers: partition.layers_of(ranks)?,
            layer_count: partition.config.layers.unwrap_or(u64::MAX),
            experts: partition.experts(ranks)?,
            packed: HashMap::new(),
            share: Share {
                ranks: ranks.clone(),
                assembly: Assembly { tensors: Vec::with_capacity(partition.entries.len()) },
                padding: Vec::new(),
                entries: Vec::with_capacity(partition.entries.len()),
            },
        };
        let mut is_built = vec![false; partition.fused.len()];
        for (number, entry) in (0u32..).zip(&partition.entries) {
            if !building.has(entry) {
                continue;
            }
            match entry.fused.map(|fused| fused as usize) {
                None => building.one(number, entry)?,
                Some(fused) if !std::mem::replace(&mut is_built[fused], true) => {
                    building.fused(&partition.fused[fused])?;
                }
                Some(_) => {}
            }
        }
        Ok(building.share)
    }
}

impl Partition<'_> {
    fn layers_of(&self, ranks: &Ranks) -> Result<Range<u64>, ParallelError> {
        let is_all = ranks.layers == Ranks::alone().layers;
        match self.config.layers {
            Some(layers) => ranks.layers.range(layers),
            None if is_all => Ok(0..u64::MAX),
            None => Err(ParallelError::Config {
                what: "num_hidden_layers is not there, and stages count it".to_owned(),
            }),
        }
    }

    /// Returns the experts that a rank has by their number.
    fn experts(&self, ranks: &Ranks) -> Result<Range<u64>, ParallelError> {
        let Some(entry) = self.entries.iter().find(|entry| entry.expert.is_some()) else {
            return Ok(0..u64::MAX);
        };
        match self.config.experts {
            Some(experts) => self.experts_of(entry, experts, ranks),
            None if ranks.ep_size == 1 => Ok(0..u64::MAX),
            None => {
                let what = "the number of experts is not there, and ranks share them".to_owned();
                Err(ParallelError::Config { what })
            }
        }
    }
}

/// A share while it is put together.
struct Building<'p, 'a> {
    partition: &'p Partition<'a>,
    ranks: &'p Ranks,
    device: DeviceId,
    layers: Range<u64>,
    layer_count: u64,
    experts: Range<u64>,
    /// By their rule, the last quantized tensor that was cut.
    packed: HashMap<Option<u32>, Option<Known<'a>>>,
    share: Share,
}

impl<'a> Building<'_, 'a> {
    fn has(&self, entry: &Entry) -> bool {
        let of_stage = match entry.stage {
            Stage::Every => true,
            stage => stage.is_in(entry.layer, &self.layers, self.layer_count),
        };
        of_stage && entry.expert.is_none_or(|expert| self.experts.contains(&u64::from(expert)))
    }

    /// Adds a tensor that keeps its name.
    fn one(&mut self, number: u32, entry: &Entry) -> Result<(), ParallelError> {
        let Some(cut) = self.partition.cut(entry, self.ranks)? else { return Ok(()) };
        if cut.padding > 0 {
            // Of a packed one the first member, which holds the codes.
            let tensor = self.share.assembly.tensors.len() as u32;
            self.share.padding.push(Padding { tensor, rows: cut.padding });
        }
        let Some(source) = source(entry.origin) else { return self.packed(number, entry, &cut) };
        let whole = self.partition.shape(entry);
        let shape = cut.shape(whole);
        let mut parts = Vec::with_capacity(cut.pieces.len().max(1));
        parts.extend(cut.slices(whole).map(|(slice, before)| {
            let mut at = vec![0; shape.len()];
            if let Some(at) = at.get_mut(cut.dim) {
                *at = before;
            }
            Part { source, slice, at }
        }));
        self.push(number, self.partition.name(entry).to_owned(), shape, parts);
        Ok(())
    }

    /// Adds the members of a quantized tensor, each under its own name.
    fn packed(&mut self, number: u32, entry: &Entry, cut: &Cut) -> Result<(), ParallelError> {
        let Origin::Packed(group) = entry.origin else { unreachable!("others have one source") };
        let (checkpoint, group) = (self.partition.checkpoint, &self.partition.groups[group as usize]);
        let members: Vec<TensorRef<'_>> =
            group.members.iter().map(|(_, id)| checkpoint.tensor(*id)).collect();
        // Experts by the thousand are cut alike.
        let known = self.packed.entry(entry.rule).or_default();
        let alike = known.as_ref().filter(|known| known.is_like(group, &members, cut));
        if alike.is_none() {
            let shares = packed::members(checkpoint, group, cut)?;
            *known = Some(Known {
                group,
                cut: cut.clone(),
                shapes: members.iter().map(|own| own.info.shape).collect(),
                shares,
            });
        }
        let shares = known.iter().flat_map(|known| &known.shares);
        for (member, MemberShare { shape, slices }) in members.iter().zip(shares) {
            let source = Source::Stored(member.id);
            let part =
                |(slice, at): &(Slice, Vec<u64>)| Part { source, slice: slice.clone(), at: at.clone() };
            let parts = slices.iter().map(part).collect();
            let (name, shape, device) = (member.info.name.to_owned(), shape.clone(), self.device);
            self.share.assembly.tensors.push(Assembled { name, shape, device, parts });
            self.share.entries.push(number);
        }
        Ok(())
    }

    /// Adds a fused tensor: the members' rows one after the other, for each of the rank's experts where they are stacked.
    fn fused(&mut self, fused: &Fused) -> Result<(), ParallelError> {
        let mut stack = Stack::default();
        for members in fused.members.chunks(fused.rows) {
            if self.has_all(fused, members)? && !self.expert(fused, members, &mut stack)? {
                return Ok(());
            }
        }
        let Some(first) = stack.first else { return Ok(()) };
        let mut shape = stack.rows[0].clone();
        shape[0] = stack.rows.iter().map(|rows| rows[0]).sum();
        if fused.is_stacked {
            shape.insert(0, stack.height);
        }
        self.push(first, fused.name.clone(), shape, stack.parts);
        Ok(())
    }

    /// Tells whether the rank has the members of one expert.
    fn has_all(&self, fused: &Fused, members: &[Option<u32>]) -> Result<bool, ParallelError> {
        let (here, elsewhere): (Vec<u32>, Vec<u32>) =
            members.iter().flatten().partition(|number| self.has(&self.partition.entries[**number as usize]));
        match (here.as_slice(), elsewhere.first()) {
            ([], _) => Ok(false),
            (_, None) => Ok(true),
            (_, Some(other)) => {
                let missing = self.partition.name(&self.partition.entries[*other as usize]).to_owned();
                Err(ParallelError::MissingMember { target: fused.name.clone(), missing })
            }
        }
    }

    /// Puts the members of one expert on the stack; tells whether the rank has them at all.
    fn expert(
        &self,
        fused: &Fused,
        members: &[Option<u32>],
        stack: &mut Stack,
    ) -> Result<bool, ParallelError> {
        let behind = usize::from(fused.is_stacked);
        let mut row = 0;
        for (place, number) in members.iter().flatten().enumerate() {
            let entry = &self.partition.entries[*number as usize];
            let Some(cut) = self.partition.cut(entry, self.ranks)? else { return Ok(false) };
            let name = || self.partition.name(entry).to_owned();
            let stored = || ParallelError::StoredMember { target: fused.name.clone(), member: name() };
            let source = source(entry.origin).ok_or_else(stored)?;
            let whole = self.partition.shape(entry);
            let kept = cut.shape(whole);
            let first = *stack.first.get_or_insert(*number);
            self.check_alike(fused, (first, *number), &kept, &stack.rows, place)?;
            for (slice, before) in cut.slices(whole) {
                let mut at = vec![0; behind + kept.len()];
                at[0] = stack.height * behind as u64;
                at[behind + cut.dim] = before;
                at[behind] += row;
                stack.parts.push(Part { source, slice, at });
            }
            row += kept[0];
            if stack.height == 0 {
                stack.rows.push(kept);
            }
        }
        stack.height += 1;
        Ok(true)
    }

    /// Checks that a member has the dtype of the first, its dimensions but for the rows, and as many rows as in the first expert.
    fn check_alike(
        &self,
        fused: &Fused,
        (first, second): (u32, u32),
        kept: &[u64],
        rows: &[Vec<u64>],
        place: usize,
    ) -> Result<(), ParallelError> {
        let partition = self.partition;
        let [first, second] = [first, second].map(|number| &partition.entries[number as usize]);
        let is_like_first = rows.first().is_none_or(|first| first.get(1..) == kept.get(1..));
        let is_as_high = rows.get(place).is_none_or(|rows| rows.first() == kept.first());
        if partition.dtype(first) == partition.dtype(second)
            && !kept.is_empty()
            && is_like_first
            && is_as_high
        {
            return Ok(());
        }
        let is = |entry| format!("{} {:?}", partition.dtype(entry), partition.shape(entry));
        Err(ParallelError::UnlikeMembers {
            target: fused.name.clone(),
            first: partition.name(first).to_owned(),
            first_is: is(first),
            second: partition.name(second).to_owned(),
            second_is: is(second),
        })
    }

    fn push(&mut self, entry: u32, name: String, shape: Vec<u64>, parts: Vec<Part>) {
        self.share.assembly.tensors.push(Assembled { name, shape, device: self.device, parts });
        self.share.entries.push(entry);
    }
}

/// How a quantized tensor is cut that stays as it is stored.
struct Known<'a> {
    group: &'a Group,
    cut: Cut,
    shapes: Vec<&'a [u64]>,
    shares: Vec<MemberShare>,
}

impl Known<'_> {
    /// Tells whether another is cut the same way.
    fn is_like(&self, group: &Group, members: &[TensorRef<'_>], cut: &Cut) -> bool {
        let shapes = members.iter().map(|member| member.info.shape);
        self.cut == *cut
            && self.group.shape == group.shape
            && self.group.recipe == group.recipe
            && self.shapes.iter().copied().eq(shapes)
            && self.group.members.iter().map(|(role, _)| role).eq(group.members.iter().map(|(role, _)| role))
    }
}

/// A fused tensor while it is put together.
#[derive(Default)]
struct Stack {
    /// The entry of its first member.
    first: Option<u32>,
    /// Experts so far; 1 where nothing is stacked.
    height: u64,
    /// What is kept of each member of the first expert.
    rows: Vec<Vec<u64>>,
    parts: Vec<Part>,
}

/// Returns what a part of it is cut from; nothing for what stays packed, which is several tensors.
fn source(origin: Origin) -> Option<Source> {
    match origin {
        Origin::Stored(id) => Some(Source::Stored(id)),
        Origin::Made(group) => Some(Source::Made(group)),
        Origin::Packed(_) => None,
    }
}
