//! The tensors of the result, in order: stored ones, and ones that operations make.

use std::collections::HashMap;

use crate::checkpoint::{Checkpoint, TensorId};
use crate::plan::PlanError;
use crate::quant::{Group, Role};
use crate::request::{Dequantize, Globs, Request, Select};
use crate::slice::{Pieces, Slice};

/// A tensor of the result.
pub(super) struct Wanted<'r> {
    /// The stored tensor, or the payload of the group: what orders the result.
    pub(super) id: TensorId,
    pub(super) what: What<'r>,
    pub(super) is_external: bool,
}

/// How a tensor of the result comes to be.
pub(super) enum What<'r> {
    /// As stored: whole, or in pieces.
    Stored(Option<Pieces>),
    /// By an operation on several stored ones.
    Made(&'r Group),
}

impl Wanted<'_> {
    pub(super) fn name<'w>(&'w self, checkpoint: &'w Checkpoint) -> &'w str {
        match &self.what {
            What::Stored(_) => checkpoint.tensor(self.id).info.name,
            What::Made(group) => &group.name,
        }
    }

    /// Returns the bytes it takes in the result.
    pub(super) fn len_bytes(&self, checkpoint: &Checkpoint, request: &Request) -> u64 {
        match (&self.what, &request.dequantize) {
            (What::Stored(Some(pieces)), _) => pieces.len_bytes(),
            (What::Made(group), Some(dequantize)) => made_len_bytes(group, dequantize),
            _ => checkpoint.tensor(self.id).info.len_bytes(),
        }
    }
}

/// Returns the bytes of a dequantized tensor. Recognition has checked that the product fits.
pub(super) fn made_len_bytes(group: &Group, dequantize: &Dequantize) -> u64 {
    group.shape.iter().product::<u64>() * (dequantize.dtype.bits() / 8)
}

/// Returns the tensors that making a group uses up: all but a factor that is not to be folded in.
pub(super) fn members<'g>(
    group: &'g Group,
    dequantize: &Dequantize,
) -> impl Iterator<Item = (Role, TensorId)> + use<'g> {
    let fold = dequantize.fold;
    group.members.iter().copied().filter(move |(role, _)| fold || *role != Role::Fold)
}

/// Finds what the request asks for, in the order of the checkpoint's table.
pub(super) fn wanted<'r>(
    checkpoint: &Checkpoint,
    request: &'r Request,
) -> Result<Vec<Wanted<'r>>, PlanError> {
    let stored = |id| Wanted { id, what: What::Stored(None), is_external: false };
    let Some(dequantize) = &request.dequantize else {
        let mut wanted: Vec<_> = request.tensors(checkpoint)?.into_iter().map(stored).collect();
        give_targets(checkpoint, request, &mut wanted)?;
        return Ok(wanted);
    };
    let made = made(checkpoint, dequantize)?;
    let (ids, groups) = selected(checkpoint, request, dequantize, &made)?;
    let mut wanted: Vec<_> = ids.into_iter().map(stored).collect();
    wanted.extend(groups.into_iter().map(|group| Wanted {
        id: group.payload(),
        what: What::Made(group),
        is_external: false,
    }));
    // A payload that was asked for by its stored name stands beside what is made of it.
    wanted.sort_by_key(|wanted| wanted.id);
    give_targets(checkpoint, request, &mut wanted)?;
    Ok(wanted)
}

/// Returns the groups that are to be dequantized.
fn made<'r>(checkpoint: &Checkpoint, dequantize: &'r Dequantize) -> Result<Vec<&'r Group>, PlanError> {
    let Some(globs) = &dequantize.globs else { return Ok(dequantize.groups.iter().collect()) };
    let mut globs = Globs::new(globs)?;
    let made = dequantize.groups.iter().filter(|group| globs.is_hit(&group.name)).collect();
    globs.check_each_hit(checkpoint)?;
    Ok(made)
}

/// Chooses among the names of the *result*: those of groups that are made, and those of stored tensors that no such group
/// uses up. What a group uses up is still handed over where it is named.
fn selected<'r>(
    checkpoint: &Checkpoint,
    request: &Request,
    dequantize: &Dequantize,
    made: &[&'r Group],
) -> Result<(Vec<TensorId>, Vec<&'r Group>), PlanError> {
    let mut is_used = vec![false; checkpoint.len()];
    for (_, id) in made.iter().flat_map(|group| members(group, dequantize)) {
        is_used[id.0 as usize] = true;
    }
    let is_left = |id: &TensorId| !is_used[id.0 as usize];
    if let Select::All = request.select {
        let left = checkpoint.tensors().map(|tensor| tensor.id).filter(is_left);
        return Ok((left.collect(), made.to_vec()));
    }
    let mut stored: Vec<TensorId> = Vec::new();
    let mut groups: Vec<&Group> = Vec::new();
    match &request.select {
        Select::Names(names) => {
            let by_name: HashMap<&str, &'r Group> =
                made.iter().map(|group| (group.name.as_str(), *group)).collect();
            for name in names {
                match (by_name.get(name.as_str()), checkpoint.find(name)) {
                    (Some(group), _) => groups.push(group),
                    (None, Some(tensor)) => stored.push(tensor.id),
                    (None, None) => {
                        let tensor_count = checkpoint.len();
                        return Err(PlanError::UnknownTensor { name: name.clone(), tensor_count });
                    }
                }
            }
        }
        Select::Globs(globs) => {
            let mut globs = Globs::new(globs)?;
            groups.extend(made.iter().filter(|group| globs.is_hit(&group.name)));
            let left = checkpoint.tensors().filter(|tensor| is_left(&tensor.id));
            stored.extend(left.filter(|tensor| globs.is_hit(tensor.info.name)).map(|tensor| tensor.id));
            globs.check_each_hit(checkpoint)?;
        }
        Select::All | Select::Predicate(_) => {
            // A predicate sees stored tensors: a group is wanted with its payload.
            let kept = request.tensors(checkpoint)?;
            groups.extend(made.iter().filter(|group| kept.binary_search(&group.payload()).is_ok()));
            stored.extend(kept.into_iter().filter(is_left));
        }
    }
    stored.sort_unstable();
    stored.dedup();
    groups.sort_by_key(|group| group.payload());
    groups.dedup_by_key(|group| group.payload());
    Ok((stored, groups))
}

/// Notes the caller's own memory and the parts asked for.
fn give_targets(
    checkpoint: &Checkpoint,
    request: &Request,
    wanted: &mut [Wanted<'_>],
) -> Result<(), PlanError> {
    if request.external.is_empty() && request.slices.is_empty() {
        return Ok(());
    }
    let made: HashMap<&str, usize> = wanted
        .iter()
        .enumerate()
        .filter_map(|(index, wanted)| match &wanted.what {
            What::Made(group) => Some((group.name.as_str(), index)),
            What::Stored(_) => None,
        })
        .collect();
    let find = |name: &String, wanted: &[Wanted<'_>]| {
        if let Some(index) = made.get(name.as_str()) {
            return Ok(Some(*index));
        }
        let unknown = || PlanError::UnknownTensor { name: name.clone(), tensor_count: checkpoint.len() };
        let id = checkpoint.find(name).ok_or_else(unknown)?.id;
        let first = wanted.partition_point(|wanted| wanted.id < id);
        let is_it = |index: &usize| matches!(wanted[*index].what, What::Stored(_));
        Ok((first..wanted.len()).take_while(|index| wanted[*index].id == id).find(is_it))
    };
    for name in &request.external {
        let index =
            find(name, wanted)?.ok_or_else(|| PlanError::ExternalNotSelected { name: name.clone() })?;
        wanted[index].is_external = true;
    }
    for (name, slice) in &request.slices {
        let index = find(name, wanted)?.ok_or_else(|| PlanError::SliceNotSelected { name: name.clone() })?;
        let info = checkpoint.tensor(wanted[index].id).info;
        let What::Stored(pieces) = &mut wanted[index].what else {
            return Err(PlanError::SliceOfMade { name: name.clone() });
        };
        let of = |slice: &Slice| slice.pieces(info.dtype, info.shape);
        *pieces = Some(of(slice).map_err(|source| PlanError::Slice { name: name.clone(), source })?);
    }
    Ok(())
}
