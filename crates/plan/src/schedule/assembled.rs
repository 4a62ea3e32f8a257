//! From an assembly to the tensors of the result.

use super::wanted::{Making, Parts, StoredPart, Wanted, What, cut};
use crate::assembly::{Assembled, Assembly, Source};
use crate::checkpoint::Checkpoint;
use crate::dtype::numel;
use crate::plan::PlanError;
use crate::request::{Globs, Request, Select};
use crate::slice::row_major;

/// Returns the tensors of an assembly that the request selects by the names of the result.
pub(super) fn assembled<'r>(
    checkpoint: &Checkpoint,
    request: &'r Request,
    assembly: &'r Assembly,
) -> Result<Vec<Wanted<'r>>, PlanError> {
    if let Some((name, _)) = request.slices.first() {
        return Err(PlanError::SliceOfAssembled { name: name.clone() });
    }
    let kept = kept(checkpoint, request, assembly)?;
    kept.into_iter().map(|tensor| one(checkpoint, request, tensor)).collect()
}

fn kept<'r>(
    checkpoint: &Checkpoint,
    request: &Request,
    assembly: &'r Assembly,
) -> Result<Vec<&'r Assembled>, PlanError> {
    let all = assembly.tensors.iter();
    match &request.select {
        Select::All => Ok(all.collect()),
        Select::Names(names) => {
            let unknown = |name: &&String| !assembly.tensors.iter().any(|tensor| tensor.name == **name);
            if let Some(name) = names.iter().find(unknown) {
                let tensor_count = assembly.tensors.len();
                return Err(PlanError::UnknownTensor { name: name.clone(), tensor_count });
            }
            Ok(all.filter(|tensor| names.contains(&tensor.name)).collect())
        }
        Select::Globs(globs) => {
            let mut globs = Globs::new(globs)?;
            let kept = all.filter(|tensor| globs.is_hit(&tensor.name)).collect();
            globs.check_each_hit(checkpoint)?;
            Ok(kept)
        }
        Select::Predicate(keep) => {
            // A predicate sees stored tensors: an assembled one is kept with the first of its sources.
            let first = |tensor: &Assembled| tensor.parts.first().map(|part| id(request, part.source));
            let is_kept =
                |tensor: &&Assembled| first(tensor).is_none_or(|id| keep.keeps(&checkpoint.tensor(id)));
            Ok(all.filter(is_kept).collect())
        }
    }
}

fn id(request: &Request, source: Source) -> crate::checkpoint::TensorId {
    match source {
        Source::Stored(id) => id,
        Source::Made(group) => group_of(request, group).payload(),
    }
}

fn group_of(request: &Request, group: u32) -> &crate::quant::Group {
    let dequantize =
        request.dequantize.as_ref().expect("an assembly with made parts comes with their groups");
    &dequantize.groups[group as usize]
}

fn one<'r>(
    checkpoint: &Checkpoint,
    request: &'r Request,
    tensor: &'r Assembled,
) -> Result<Wanted<'r>, PlanError> {
    let name = || tensor.name.clone();
    let Some(first) = tensor.parts.first() else {
        return Err(PlanError::NoParts { name: name() });
    };
    let strides = row_major(&tensor.shape);
    let (mut stored, mut made, mut dtype, mut have) = (Vec::new(), Vec::new(), None, 0u64);
    for part in &tensor.parts {
        let (part_dtype, shape) = match part.source {
            Source::Stored(id) => {
                let info = checkpoint.tensor(id).info;
                (info.dtype, part.slice.shape(info.shape))
            }
            Source::Made(group) => {
                let dequantize = request.dequantize.as_ref().expect("as above");
                (dequantize.dtype, part.slice.shape(&group_of(request, group).shape))
            }
        };
        let shape = shape.map_err(|source| PlanError::Slice { name: name(), source })?;
        let dtype = *dtype.get_or_insert(part_dtype);
        if dtype != part_dtype {
            return Err(PlanError::MixedDtypes { name: name(), first: dtype, other: part_dtype });
        }
        if !is_inside(&shape, &part.at, &tensor.shape) {
            let (at, whole) = (part.at.clone(), tensor.shape.clone());
            return Err(PlanError::PartOutside { name: name(), part: shape, at, whole });
        }
        let elements = numel(&shape).unwrap_or(u64::MAX);
        have = have.saturating_add(elements);
        if elements == 0 {
            continue;
        }
        let first: u64 = part.at.iter().zip(&strides).map(|(at, stride)| at * stride).sum();
        match part.source {
            Source::Stored(id) => {
                let whole = checkpoint.tensor(id).info;
                let strides = &strides[strides.len() - shape.len()..];
                let pieces = part
                    .slice
                    .pieces_into(whole.dtype, whole.shape, strides, first)
                    .map_err(|source| PlanError::Slice { name: name(), source })?;
                stored.push(StoredPart { id, slice: &part.slice, at: &part.at, pieces });
            }
            Source::Made(group) => {
                let group = group_of(request, group);
                if !is_run(&shape, &tensor.shape) {
                    let (at, whole) = (part.at.clone(), tensor.shape.clone());
                    return Err(PlanError::MadeInColumns { name: name(), part: shape, at, whole });
                }
                let cut = cut(checkpoint, group, &part.slice)?;
                made.push(Making { group, cut, offset_bytes: first * (dtype.bits() / 8) });
            }
        }
    }
    let (dtype, need) = (dtype.expect("it has a part"), numel(&tensor.shape).unwrap_or(u64::MAX));
    if have != need {
        return Err(PlanError::PartsDoNotCover { name: name(), have, need });
    }
    let shape = tensor.shape.clone();
    let span_bytes =
        dtype.len_bytes(need).ok_or_else(|| PlanError::PartsDoNotCover { name: name(), have, need })?;
    let parts = Parts { dtype, shape, span_bytes, stored, made };
    Ok(Wanted {
        name: Some(&tensor.name),
        what: What::Parts(Box::new(parts)),
        ..Wanted::stored(id(request, first.source), tensor.device)
    })
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
