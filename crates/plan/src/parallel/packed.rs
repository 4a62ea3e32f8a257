//! Quantized tensors that stay as they are stored: every member follows the cut of the result.

use std::ops::Range;

use smallvec::{SmallVec, smallvec};

use super::ParallelError;
use super::cut::Cut;
use crate::checkpoint::{Checkpoint, TensorId};
use crate::dims::Dims;
use crate::quant::{CutError, Group, Role};
use crate::slice::{Slice, SliceRange};

/// A member of a quantized tensor as a rank has it.
pub(super) struct MemberShare {
    pub(super) shape: Dims,
    /// What is kept, and at which index of the share it lies.
    pub(super) slices: SmallVec<[(Slice, Dims); 1]>,
}

/// Returns what a rank has of each member, in their order.
///
/// An index that is in order goes with the scales of the rank's own groups: `in_order` is the group without it. Of the index itself the rank has
/// the first entries, which count from its own first group. Where groups straddle the cut, or it has several pieces, the rank has the
/// scales of all groups and the index of its columns, as with an index in any order.
///
/// Where the cut has several pieces, what is kept of a member for each lies one after the other, along the only dimension in which they
/// differ.
///
/// # Errors
/// [`ParallelError::StoredCut`] where the cut falls inside of what is stored in one piece, [`ParallelError::StoredSections`] where pieces
/// are not one after the other in a member.
pub(super) fn members(
    checkpoint: &Checkpoint,
    group: &Group,
    in_order: Option<&Group>,
    cut: &Cut,
) -> Result<Vec<MemberShare>, ParallelError> {
    if cut.is_whole(&group.shape) {
        let shape = |id: TensorId| checkpoint.tensor(id).info.shape;
        let whole = |id| MemberShare::new(Slice::whole(), shape(id).into());
        return Ok(group.members.iter().map(|(_, id)| whole(*id)).collect());
    }
    if cut.pieces.iter().all(Range::is_empty) {
        return nothing(checkpoint, group, cut);
    }
    let in_order = in_order.filter(|_| cut.pieces.len() == 1);
    match in_order.map(|in_order| pieces(checkpoint, in_order, cut)) {
        None => pieces(checkpoint, group, cut),
        Some(Err(ParallelError::StoredCut { error, .. }))
            if matches!(*error, CutError::InsideUnit { .. }) =>
        {
            pieces(checkpoint, group, cut)
        }
        Some(shares) => {
            let mut shares = shares?;
            for (share, (role, _)) in shares.iter_mut().zip(&group.members) {
                if *role == Role::GroupIndex {
                    let len = share.shape[0];
                    *share = MemberShare::new(Slice::rows(0..len), smallvec![len]);
                }
            }
            Ok(shares)
        }
    }
}

/// Returns what a rank has that has nothing: each member without elements along the dimension that is cut, where it has that, and with those of all others.
fn nothing(checkpoint: &Checkpoint, group: &Group, cut: &Cut) -> Result<Vec<MemberShare>, ParallelError> {
    let of = |len: u64| pieces(checkpoint, group, &Cut { pieces: smallvec![0..len], ..cut.clone() });
    let whole_len = group.shape[cut.dim];
    // What some rank may have: the dimensions in which that differs from the whole are cut.
    let some = of(1).or_else(|error| match &error {
        ParallelError::StoredCut { error: cut, .. } => match **cut {
            CutError::InsideUnit { multiple, .. } => of(multiple.min(whole_len)),
            _ => Err(error),
        },
        _ => Err(error),
    });
    let (mut shares, wholes) = (some?, of(whole_len)?);
    for (share, whole) in shares.iter_mut().zip(wholes) {
        let is_cut = |dim: usize| share.shape[dim] != whole.shape[dim];
        let range =
            |(dim, range): (usize, &SliceRange)| if is_cut(dim) { SliceRange::from(0..0) } else { *range };
        let slice = Slice::with_steps(share.slices[0].0.ranges().iter().enumerate().map(range));
        let shape =
            (0..share.shape.len()).map(|dim| if is_cut(dim) { 0 } else { share.shape[dim] }).collect();
        *share = MemberShare::new(slice, shape);
    }
    Ok(shares)
}

fn pieces(checkpoint: &Checkpoint, group: &Group, cut: &Cut) -> Result<Vec<MemberShare>, ParallelError> {
    let mut shares: Vec<MemberShare> = Vec::new();
    for ranges in cut.ranges(&group.shape) {
        let window = group.window(&ranges).map_err(cannot_cut)?;
        let slices = group.stored_slices(checkpoint, &window).map_err(cannot_cut)?;
        for (place, (id, slice)) in slices.into_iter().enumerate() {
            let info = checkpoint.tensor(id).info;
            let kept = slice.shape(info.shape).expect("a slice of a member is inside of it");
            match shares.get_mut(place) {
                None => shares.push(MemberShare::new(slice, kept)),
                Some(share) => share.append(slice, &kept).ok_or_else(|| ParallelError::StoredSections {
                    tensor: group.name.clone(),
                    member: info.name.to_owned(),
                })?,
            }
        }
    }
    Ok(shares)
}

/// What would work depends on the rule, which is not known here.
fn cannot_cut(error: CutError) -> ParallelError {
    ParallelError::StoredCut { error: Box::new(error), works: Vec::new(), is_of_expert: false }
}

impl MemberShare {
    fn new(slice: Slice, shape: Dims) -> MemberShare {
        let at = smallvec![0; shape.len()];
        MemberShare { shape, slices: smallvec![(slice, at)] }
    }

    /// Puts one more slice behind the others. One that is there already stays there once.
    fn append(&mut self, slice: Slice, kept: &[u64]) -> Option<()> {
        if self.slices.iter().any(|(other, _)| *other == slice) {
            return Some(());
        }
        let first = self.slices[0].0.ranges();
        let differs = |dim: &usize| first.get(*dim) != slice.ranges().get(*dim);
        let mut dims = (0..kept.len()).filter(differs);
        let (dim, None) = (dims.next()?, dims.next()) else { return None };
        let mut at: Dims = smallvec![0; kept.len()];
        at[dim] = self.shape[dim];
        self.shape[dim] += kept[dim];
        self.slices.push((slice, at));
        Some(())
    }
}
