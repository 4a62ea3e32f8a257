//! What one rank has: the tensors of its assembly, with every part they are made of.

use std::ops::Range;

use super::cut::Cut;
use super::partition::{Entry, Origin, Partition};
use super::pattern::Stage;
use super::{ParallelError, Ranks, packed};
use crate::assembly::{Assembled, Assembly, Part, Source};
use crate::placement::DeviceId;

use super::fuse::Fused;
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
    share: Share,
}

impl Building<'_, '_> {
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
        let Some(source) = source(entry.origin) else { return self.packed(number, entry, &cut) };
        let whole = self.partition.shape(entry);
        let shape = cut.shape(whole);
        let mut parts = Vec::new();
        if !is_empty(&shape) {
            parts.reserve_exact(cut.pieces.len().max(1));
            parts.extend(cut.slices(whole).map(|(slice, before)| {
                let mut at = vec![0; shape.len()];
                if let Some(at) = at.get_mut(cut.dim) {
                    *at = before;
                }
                Part { source, slice, at }
            }));
        }
        if cut.padding > 0 {
            let tensor = self.share.assembly.tensors.len() as u32;
            self.share.padding.push(Padding { tensor, rows: cut.padding });
        }
        self.push(number, self.partition.name(entry).to_owned(), shape, parts);
        Ok(())
    }

    /// Adds the members of a quantized tensor, each under its own name.
    fn packed(&mut self, number: u32, entry: &Entry, cut: &Cut) -> Result<(), ParallelError> {
        let Origin::Packed(group) = entry.origin else { unreachable!("others have one source") };
        let (checkpoint, group) = (self.partition.checkpoint, &self.partition.groups[group as usize]);
        for member in packed::members(checkpoint, group, cut)? {
            let source = Source::Stored(member.id);
            let part = |(slice, at): (Slice, Vec<u64>)| Part { source, slice, at };
            let is_empty = is_empty(&member.shape);
            let parts = member.slices.into_iter().filter(|_| !is_empty).map(part).collect();
            self.push(number, checkpoint.tensor(member.id).info.name.to_owned(), member.shape, parts);
        }
        Ok(())
    }

    /// Adds a fused tensor: the members' rows one after the other, for each of the rank's experts where they are stacked.
    fn fused(&mut self, fused: &Fused) -> Result<(), ParallelError> {
        let members =
            fused.members.iter().flatten().map(|number| (*number, &self.partition.entries[*number as usize]));
        let members: Vec<_> = members.filter(|(_, entry)| self.has(entry)).collect();
        let height = fused.is_stacked.then_some((members.len() / fused.rows) as u64);
        let Some((first, _)) = members.first().copied() else { return Ok(()) };
        let (mut shape, mut parts) = (Vec::new(), Vec::with_capacity(members.len()));
        for (expert, of_expert) in (0u64..).zip(members.chunks(fused.rows)) {
            let mut row = 0;
            let mut own_shape: Vec<u64> = Vec::new();
            for (number, entry) in of_expert {
                let Some(cut) = self.partition.cut(entry, self.ranks)? else { return Ok(()) };
                let stored = || ParallelError::StoredMember {
                    target: fused.name.clone(),
                    member: self.partition.name(entry).to_owned(),
                };
                let source = source(entry.origin).ok_or_else(stored)?;
                let whole = self.partition.shape(entry);
                let kept = cut.shape(whole);
                self.check_alike(fused, (first, *number), &kept)?;
                for (slice, before) in cut.slices(whole).filter(|_| !is_empty(&kept)) {
                    let mut at = Vec::with_capacity(kept.len() + 1);
                    at.extend(height.map(|_| expert));
                    at.resize(at.capacity(), 0);
                    let behind = usize::from(height.is_some());
                    at[behind + cut.dim] = before;
                    at[behind] += row;
                    parts.push(Part { source, slice, at });
                }
                row += kept[0];
                own_shape = kept;
            }
            own_shape[0] = row;
            shape = height.into_iter().chain(own_shape).collect();
        }
        self.push(first, fused.name.clone(), shape, parts);
        Ok(())
    }

    /// Checks that a member has the dtype of the first, and its dimensions but for the rows.
    fn check_alike(
        &self,
        fused: &Fused,
        (first, second): (u32, u32),
        kept: &[u64],
    ) -> Result<(), ParallelError> {
        let partition = self.partition;
        let is = |number: u32| {
            let entry = &partition.entries[number as usize];
            let (dtype, shape) = (partition.dtype(entry), partition.shape(entry));
            (dtype, shape, partition.name(entry))
        };
        let ((dtype, shape, name), (other_dtype, other_shape, other)) = (is(first), is(second));
        if dtype == other_dtype && !kept.is_empty() && shape.get(1..) == other_shape.get(1..) {
            return Ok(());
        }
        Err(ParallelError::UnlikeMembers {
            target: fused.name.clone(),
            first: name.to_owned(),
            first_is: format!("{dtype} {shape:?}"),
            second: other.to_owned(),
            second_is: format!("{other_dtype} {other_shape:?}"),
        })
    }

    fn push(&mut self, entry: u32, name: String, shape: Vec<u64>, parts: Vec<Part>) {
        self.share.assembly.tensors.push(Assembled { name, shape, device: self.device, parts });
        self.share.entries.push(entry);
    }
}

/// Returns what a part of it is cut from; nothing for what stays packed, which is several tensors.
fn source(origin: Origin) -> Option<Source> {
    match origin {
        Origin::Stored(id) => Some(Source::Stored(id)),
        Origin::Made(group) => Some(Source::Made(group)),
        Origin::Packed(_) => None,
    }
}

fn is_empty(shape: &[u64]) -> bool {
    shape.contains(&0)
}
