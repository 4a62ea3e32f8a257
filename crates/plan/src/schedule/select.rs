//! Which tensors of the checkpoint a request selects, and which are made of them.

use std::collections::HashMap;

use super::wanted::{Wanted, members};
use crate::checkpoint::{Checkpoint, TensorId};
use crate::plan::PlanError;
use crate::quant::Group;
use crate::request::{Dequantize, Globs, Request, Select};

/// Returns what the request selects, in the order of the checkpoint's table.
pub(super) fn selected<'r>(
    checkpoint: &'r Checkpoint,
    request: &'r Request,
) -> Result<Vec<Wanted<'r>>, PlanError> {
    let stored = |id| Wanted::stored(checkpoint.tensor(id), request.device);
    let Some(dequantize) = &request.dequantize else {
        return Ok(request.tensors(checkpoint)?.into_iter().map(stored).collect());
    };
    let (ids, groups) = chosen(checkpoint, request, dequantize, &dequantize.made(checkpoint)?)?;
    let mut wanted: Vec<_> = ids.into_iter().map(stored).collect();
    let made = |group| Wanted::made(checkpoint, group, dequantize, request.device);
    wanted.extend(groups.into_iter().map(made));
    // A payload that was asked for by its stored name stands beside what is made of it.
    wanted.sort_by_key(|wanted| wanted.stored.id);
    Ok(wanted)
}

impl Dequantize {
    /// Returns the groups that are to be dequantized.
    ///
    /// # Errors
    /// What globs that match nothing are.
    pub fn made(&self, checkpoint: &Checkpoint) -> Result<Vec<&Group>, PlanError> {
        let Some(globs) = &self.globs else { return Ok(self.groups.iter().collect()) };
        let mut globs = Globs::new(globs)?;
        let made = self.groups.iter().filter(|group| globs.is_hit(&group.name)).collect();
        globs.check_each_hit(checkpoint)?;
        Ok(made)
    }
}

/// Chooses among the names of the *result*: those of groups that are made, and those of stored tensors that no such group
/// uses up. What a group uses up is still handed over where it is named.
fn chosen<'r>(
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
