//! What one rank has: the tensors of its assembly, with every part they are made of.

use std::collections::HashMap;
use std::ops::Range;

use smallvec::{SmallVec, smallvec};

use super::cut::Cut;
use super::fuse::Fused;
use super::packed::{self, MemberShare};
use super::partition::{Entry, Origin, Partition};
use super::pattern::Stage;
use super::{ParallelError, Ranks};
use crate::assembly::{Assembled, Assembly, Padding, Part, Source};
use crate::checkpoint::{Checkpoint, TensorRef};
use crate::dims::Dims;
use crate::placement::DeviceId;
use crate::plan::PlanError;
use crate::quant::Group;
use crate::request::Request;
use crate::slice::Slice;

/// A rank's share of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Whose it is.
    pub ranks: Ranks,
    /// What is loaded: tensors in the order of the checkpoint, a fused one where its first member is.
    pub assembly: Assembly,
    /// For each tensor of the assembly the entry that its rule is from.
    pub(super) entries: Vec<u32>,
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
                assembly: Assembly {
                    tensors: Vec::with_capacity(partition.checkpoint.len()),
                    padding: Vec::new(),
                    unfused: partition.unfused.clone(),
                    unused_rules: partition.unused_of_caller(),
                },
                entries: Vec::with_capacity(partition.checkpoint.len()),
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

    /// Keeps what a request selects of it, by the names of the result.
    ///
    /// # Errors
    /// [`PlanError::UnknownTensor`] for a name that the rank does not have, and what globs that match nothing are.
    pub fn select(mut self, checkpoint: &Checkpoint, request: &Request) -> Result<Share, PlanError> {
        let kept = self.assembly.selected(checkpoint, request)?;
        let mut places = vec![None; self.assembly.tensors.len()];
        for (number, place) in (0u32..).zip(&kept) {
            places[*place] = Some(number);
        }
        let mut is_kept = places.iter().map(Option::is_some);
        self.assembly.tensors.retain(|_| is_kept.next() == Some(true));
        self.entries = kept.iter().map(|place| self.entries[*place]).collect();
        let moved =
            |padding: &Padding| Some(Padding { tensor: places[padding.tensor as usize]?, ..*padding });
        self.assembly.padding = self.assembly.padding.iter().filter_map(moved).collect();
        Ok(self)
    }
}

impl Partition<'_> {
    fn layers_of(&self, ranks: &Ranks) -> Result<Range<u64>, ParallelError> {
        let is_all = ranks.layers == Ranks::alone().layers;
        let predict_layers = self.config.predict_layers;
        match self.config.layers {
            Some(layers) => {
                ranks.layers.range(layers).map_err(|error| error.with_predict_layers(predict_layers))
            }
            None if is_all => Ok(0..u64::MAX),
            None => Err(ParallelError::Config {
                what: "num_hidden_layers is not there, and stages count it".to_owned(),
            }),
        }
    }

    /// Returns the experts that a rank has by their number.
    fn experts(&self, ranks: &Ranks) -> Result<Range<u64>, ParallelError> {
        let Some(entry) = self.entries.iter().find(|entry| entry.expert.is_some()) else {
            let is_stacked = |entry: &Entry| self.rule_of(entry).is_stacked;
            if ranks.ep_size > 1 && !self.entries.iter().any(is_stacked) {
                let named = self.config.architectures.first();
                let model = named.map_or_else(|| "the model".to_owned(), String::clone);
                return Err(ParallelError::NoExperts { model, ep_size: ranks.ep_size });
            }
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
            self.share.assembly.padding.push(Padding { tensor, rows: cut.padding });
        }
        let Some(source) = source(entry.origin) else { return self.packed(number, entry, &cut) };
        let whole = self.partition.shape(entry);
        let shape = cut.shape(whole);
        let parts = cut.slices(whole).map(|(slice, before)| {
            let mut at: Dims = smallvec![0; shape.len()];
            if let Some(at) = at.get_mut(cut.dim) {
                *at = before;
            }
            Part { source, slice, at }
        });
        let parts = parts.collect();
        self.push(number, self.partition.name(entry).to_owned(), shape, parts);
        Ok(())
    }

    /// Adds the members of a quantized tensor, each under its own name.
    fn packed(&mut self, number: u32, entry: &Entry, cut: &Cut) -> Result<(), ParallelError> {
        let Origin::Packed(group) = entry.origin else { unreachable!("others have one source") };
        let (checkpoint, in_order) = (self.partition.checkpoint, self.partition.in_order.get(&group));
        let group = &self.partition.groups[group as usize];
        let members: SmallVec<[TensorRef<'_>; 4]> =
            group.members.iter().map(|(_, id)| checkpoint.tensor(*id)).collect();
        // Experts by the thousand are cut alike.
        let known = self.packed.entry(entry.rule).or_default();
        let alike = known.as_ref().filter(|known| known.is_like(group, in_order.is_some(), &members, cut));
        if alike.is_none() {
            let shares = packed::members(checkpoint, group, in_order, cut)
                .map_err(|error| self.partition.with_what_works(entry, cut, error))?;
            *known = Some(Known {
                group,
                is_in_order: in_order.is_some(),
                cut: cut.clone(),
                shapes: members.iter().map(|own| own.info.shape).collect(),
                shares,
            });
        }
        let shares = known.iter().flat_map(|known| &known.shares);
        for (member, MemberShare { shape, slices }) in members.iter().zip(shares) {
            let source = Source::Stored(member.id);
            let part = |(slice, at): &(Slice, Dims)| Part { source, slice: slice.clone(), at: at.clone() };
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
            // Members that fit one another are on the same ranks.
            let first = members.iter().flatten().next().map(|first| &self.partition.entries[*first as usize]);
            if first.is_some_and(|first| self.has(first)) && !self.expert(fused, members, &mut stack)? {
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

    /// Puts the members of one expert on the stack; tells whether the rank has them at all.
    fn expert(
        &self,
        fused: &Fused,
        members: &[Option<u32>],
        stack: &mut Stack,
    ) -> Result<bool, ParallelError> {
        let behind = usize::from(fused.is_stacked);
        let mut row = 0;
        for number in members.iter().flatten() {
            let entry = &self.partition.entries[*number as usize];
            let Some(cut) = self.partition.cut(entry, self.ranks)? else { return Ok(false) };
            let source = source(entry.origin).expect("what stays packed does not fit");
            let whole = self.partition.shape(entry);
            let kept = cut.shape(whole);
            stack.first.get_or_insert(*number);
            for (slice, before) in cut.slices(whole) {
                let mut at: Dims = smallvec![0; behind + kept.len()];
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

    fn push(&mut self, entry: u32, name: String, shape: Dims, parts: SmallVec<[Part; 1]>) {
        self.share.assembly.tensors.push(Assembled { name, shape, device: self.device, parts });
        self.share.entries.push(entry);
    }
}

/// How a quantized tensor is cut that stays as it is stored.
struct Known<'a> {
    group: &'a Group,
    is_in_order: bool,
    cut: Cut,
    shapes: Vec<&'a [u64]>,
    shares: Vec<MemberShare>,
}

impl Known<'_> {
    /// Tells whether another is cut the same way.
    fn is_like(&self, group: &Group, is_in_order: bool, members: &[TensorRef<'_>], cut: &Cut) -> bool {
        let shapes = members.iter().map(|member| member.info.shape);
        self.cut == *cut
            && self.is_in_order == is_in_order
            && self.group.shape == group.shape
            && self.group.has_recipe_of(group)
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
    rows: Vec<Dims>,
    parts: SmallVec<[Part; 1]>,
}

/// Returns what a part of it is cut from; nothing for what stays packed, which is several tensors.
fn source(origin: Origin) -> Option<Source> {
    match origin {
        Origin::Stored(id) | Origin::Factor(id) => Some(Source::Stored(id)),
        Origin::Made(group) => Some(Source::Made(group)),
        Origin::Packed(_) => None,
    }
}
