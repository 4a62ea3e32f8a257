//! From an assembly to the tensors of the result.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

use smallvec::SmallVec;

use super::wanted::{Cut, Making, Parts, StoredPart, Wanted, What, cut};
use crate::assembly::{Assembled, Assembly, Source};
use crate::checkpoint::{Checkpoint, TensorId, TensorRef};
use crate::dims::row_major;
use crate::dtype::{Dtype, numel};
use crate::plan::PlanError;
use crate::quant::{Group, Role};
use crate::request::{Globs, Request, Select};
use crate::slice::Slice;

/// Returns the tensors of an assembly that the request selects by the names of the result.
pub(super) fn assembled<'r>(
    checkpoint: &'r Checkpoint,
    request: &'r Request,
    assembly: &'r Assembly,
) -> Result<Vec<Wanted<'r>>, PlanError> {
    if let Some((name, _)) = request.slices.first() {
        return Err(PlanError::SliceOfAssembled { name: name.clone() });
    }
    let kept = assembly.selected(checkpoint, request)?;
    let mut assembling = Assembling { checkpoint, request, known: Vec::new() };
    let mut wanted = Vec::with_capacity(kept.len());
    for place in kept {
        wanted.push(assembling.one(&assembly.tensors[place])?);
    }
    Ok(wanted)
}

impl Assembly {
    /// Returns the places of the tensors that a request selects, ascending.
    pub(crate) fn selected(
        &self,
        checkpoint: &Checkpoint,
        request: &Request,
    ) -> Result<Vec<usize>, PlanError> {
        let all = self.tensors.iter().enumerate();
        let places = |kept: &mut dyn FnMut(&Assembled) -> bool| {
            all.clone().filter(|(_, tensor)| kept(tensor)).map(|(place, _)| place).collect::<Vec<_>>()
        };
        match &request.select {
            Select::All => Ok((0..self.tensors.len()).collect()),
            Select::Names(names) => {
                let mut missing: HashSet<&str> = names.iter().map(String::as_str).collect();
                let asked = missing.clone();
                let kept = places(&mut |tensor| {
                    missing.remove(&*tensor.name);
                    asked.contains(&*tensor.name)
                });
                match names.iter().find(|name| missing.contains(&***name)) {
                    Some(name) => {
                        let tensor_count = self.tensors.len();
                        Err(PlanError::UnknownTensor { name: name.clone(), tensor_count })
                    }
                    None => Ok(kept),
                }
            }
            Select::Globs(globs) => {
                let mut globs = Globs::new(globs)?;
                let kept = places(&mut |tensor| globs.is_hit(&tensor.name));
                globs.check_each_hit(checkpoint)?;
                Ok(kept)
            }
            Select::Predicate(keep) => {
                // A predicate sees stored tensors: an assembled one is kept with the first of its sources.
                let first = |tensor: &Assembled| tensor.parts.first().map(|part| id(request, part.source));
                Ok(places(&mut |tensor| first(tensor).is_none_or(|id| keep.keeps(&checkpoint.tensor(id)))))
            }
        }
    }
}

fn id(request: &Request, source: Source) -> TensorId {
    match source {
        Source::Stored(id) => id,
        Source::Made(group) => group_of(request, group).payload(),
    }
}

fn group_of(request: &Request, group: u32) -> &Group {
    let dequantize =
        request.dequantize.as_ref().expect("an assembly with made parts comes with their groups");
    &dequantize.groups[group as usize]
}

/// The tensors of a result while they are put together.
struct Assembling<'r> {
    checkpoint: &'r Checkpoint,
    request: &'r Request,
    /// The last cuts, the latest first: experts by the thousand are cut alike.
    known: Vec<Known<'r>>,
}

impl<'r> Assembling<'r> {
    fn one(&mut self, tensor: &'r Assembled) -> Result<Wanted<'r>, PlanError> {
        let (checkpoint, request) = (self.checkpoint, self.request);
        let name = || tensor.name.clone();
        let Some(first) = tensor.parts.first() else {
            return Err(PlanError::NoParts { name: name() });
        };
        let wanted = Wanted::stored(checkpoint.tensor(id(request, first.source)), tensor.device);
        let wanted = wanted.named(&tensor.name);
        let strides = row_major(&tensor.shape);
        let (mut stored, mut made, mut dtype, mut have) = (SmallVec::new(), Vec::new(), None, 0u64);
        for part in &tensor.parts {
            let (part_dtype, whole) = match part.source {
                Source::Stored(id) if id == wanted.stored.id => whole(wanted.stored),
                Source::Stored(id) => whole(checkpoint.tensor(id)),
                Source::Made(group) => {
                    let dequantize = request.dequantize.as_ref().expect("as above");
                    (dequantize.dtype, &*group_of(request, group).shape)
                }
            };
            let bad_slice = |source| PlanError::Slice { name: name(), source };
            let shape = part.slice.shape(whole).map_err(bad_slice)?;
            let dtype = *dtype.get_or_insert(part_dtype);
            if dtype != part_dtype {
                return Err(PlanError::MixedDtypes { name: name(), first: dtype, other: part_dtype });
            }
            if !is_inside(&shape, &part.at, &tensor.shape) {
                return Err(PlanError::PartOutside {
                    name: name(),
                    part: shape.into_vec(),
                    at: part.at.to_vec(),
                    whole: tensor.shape.to_vec(),
                });
            }
            let is_all = tensor.parts.len() == 1 && shape == tensor.shape;
            if is_all && *shape == *whole && matches!(part.source, Source::Stored(_)) {
                return Ok(wanted);
            }
            let elements = numel(&shape).unwrap_or(u64::MAX);
            have = have.saturating_add(elements);
            if elements == 0 {
                continue;
            }
            let first: u64 = part.at.iter().zip(&strides).map(|(at, stride)| at * stride).sum();
            match part.source {
                Source::Stored(id) => {
                    let strides = &strides[strides.len() - shape.len()..];
                    let pieces = part.slice.pieces_into(dtype, whole, strides, first).map_err(bad_slice)?;
                    stored.push(StoredPart { id, slice: &part.slice, at: &part.at, pieces });
                }
                Source::Made(group) => {
                    let group = group_of(request, group);
                    if !is_run(&shape, &tensor.shape) {
                        return Err(PlanError::MadeInColumns {
                            name: name(),
                            part: shape.into_vec(),
                            at: part.at.to_vec(),
                            whole: tensor.shape.to_vec(),
                        });
                    }
                    let cut = self.cut(group, &part.slice)?;
                    if is_all {
                        let dequantize = request.dequantize.as_ref().expect("as above");
                        let making = Making::alone(group, cut, dequantize);
                        return Ok(Wanted { what: What::Made(making), ..wanted });
                    }
                    made.push(Making::part(group, cut, first * (dtype.bits() / 8)));
                }
            }
        }
        let (dtype, need) = (dtype.expect("it has a part"), numel(&tensor.shape).unwrap_or(u64::MAX));
        let not_covered = || PlanError::PartsDoNotCover { name: name(), have, need };
        if have != need {
            return Err(not_covered());
        }
        let (shape, len_bytes) =
            (Cow::Borrowed(&*tensor.shape), dtype.len_bytes(need).ok_or_else(not_covered)?);
        let parts = Parts { dtype, shape, len_bytes, span_bytes: len_bytes, stored, made };
        Ok(Wanted { what: What::Parts(Box::new(parts)), ..wanted })
    }

    /// Cuts a group, or finds one that was cut alike.
    fn cut(&mut self, group: &'r Group, slice: &'r Slice) -> Result<Option<Arc<Cut>>, PlanError> {
        let members = members(self.checkpoint, group);
        if let Some(known) = self.known.iter().find(|known| known.is_like(group, slice, &members)) {
            return Ok(known.cut.clone());
        }
        let cut = cut(self.checkpoint, group, slice)?;
        self.known.truncate(KNOWN_MAX - 1);
        self.known.insert(0, Known { group, slice, members, cut: cut.clone() });
        Ok(cut)
    }
}

/// A group that was cut, and how.
struct Known<'r> {
    group: &'r Group,
    slice: &'r Slice,
    members: Members<'r>,
    cut: Option<Arc<Cut>>,
}

/// What the members of a group are, and how they are stored.
type Members<'r> = SmallVec<[(Role, (Dtype, &'r [u64])); 4]>;

fn members<'r>(checkpoint: &'r Checkpoint, group: &Group) -> Members<'r> {
    group.members.iter().map(|(role, id)| (*role, whole(checkpoint.tensor(*id)))).collect()
}

impl Known<'_> {
    /// Tells whether the same part of another group is made of the same parts of its members.
    fn is_like(&self, group: &Group, slice: &Slice, members: &Members<'_>) -> bool {
        self.slice == slice
            && self.group.shape == group.shape
            && *self.members == **members
            && self.group.has_recipe_of(group)
    }
}

fn whole(stored: TensorRef<'_>) -> (Dtype, &[u64]) {
    (stored.info.dtype, stored.info.shape)
}

/// Tells whether a part lies inside its tensor.
fn is_inside(shape: &[u64], at: &[u64], whole: &[u64]) -> bool {
    let outer = whole.len().wrapping_sub(shape.len());
    if at.len() != whole.len() || outer > 1 {
        return false;
    }
    (0..whole.len()).all(|dim| {
        let len = if dim < outer { 1 } else { shape[dim - outer] };
        at[dim].checked_add(len).is_some_and(|end| end <= whole[dim])
    })
}

/// Tells whether a part is one run of its tensor's elements: operations write without gaps.
fn is_run(shape: &[u64], whole: &[u64]) -> bool {
    let whole = &whole[whole.len() - shape.len()..];
    let cut = (0..shape.len()).rev().find(|dim| shape[*dim] != whole[*dim]).unwrap_or(0);
    shape[..cut].iter().all(|len| *len == 1)
}

/// A layer has about as many kinds of quantized tensors.
const KNOWN_MAX: usize = 8;
