//! Quantized tensors that stay as they are stored: every member follows the cut of the result.

use std::ops::Range;

use super::ParallelError;
use super::cut::Cut;
use crate::checkpoint::{Checkpoint, TensorId};
use crate::quant::{Group, Role};
use crate::slice::Slice;

/// A member of a quantized tensor as a rank has it.
pub(super) struct MemberShare {
    pub(super) shape: Vec<u64>,
    /// What is kept, and at which index of the share it lies.
    pub(super) slices: Vec<(Slice, Vec<u64>)>,
}

/// Returns what a rank has of each member, in their order.
///
/// Where the cut has several pieces, what is kept of a member for each lies one after the other, along the only dimension in which they
/// differ.
///
/// # Errors
/// [`ParallelError::StoredCut`] where the cut falls inside of what is stored in one piece.
pub(super) fn members(
    checkpoint: &Checkpoint,
    group: &Group,
    cut: &Cut,
) -> Result<Vec<MemberShare>, ParallelError> {
    let bad = |what: String| ParallelError::StoredCut { tensor: group.name.clone(), what };
    if cut.is_whole(&group.shape) {
        return Ok(group.members.iter().map(|(_, id)| whole(checkpoint, *id)).collect());
    }
    let windows =
        windows(group, cut).ok_or_else(|| bad("only matrices can be cut as they are stored".to_owned()))?;
    let mut shares: Vec<MemberShare> = Vec::new();
    for window in &windows {
        let slices = stored_slices(group, checkpoint, window).map_err(bad)?;
        for (place, (id, slice)) in slices.into_iter().enumerate() {
            let kept = kept(&slice, checkpoint.tensor(id).info.shape);
            let Some(share) = shares.get_mut(place) else {
                let at = vec![0; kept.len()];
                shares.push(MemberShare { shape: kept, slices: vec![(slice, at)] });
                continue;
            };
            let name = checkpoint.tensor(id).info.name;
            let other =
                || bad(format!("the sections that a rank has of {name:?} do not lie one after the other"));
            share.append(slice, &kept).ok_or_else(other)?;
        }
    }
    Ok(shares)
}

impl MemberShare {
    /// Puts one more slice behind the others. One that is there already stays there once.
    fn append(&mut self, slice: Slice, kept: &[u64]) -> Option<()> {
        if self.slices.iter().any(|(other, _)| *other == slice) {
            return Some(());
        }
        let first = self.slices[0].0.ranges();
        let differs = |dim: &usize| first.get(*dim) != slice.ranges().get(*dim);
        let mut dims = (0..kept.len()).filter(differs);
        let (dim, None) = (dims.next()?, dims.next()) else { return None };
        let mut at = vec![0; kept.len()];
        at[dim] = self.shape[dim];
        self.shape[dim] += kept[dim];
        self.slices.push((slice, at));
        Some(())
    }
}

fn whole(checkpoint: &Checkpoint, id: TensorId) -> MemberShare {
    let shape = checkpoint.tensor(id).info.shape.to_vec();
    let at = vec![0; shape.len()];
    MemberShare { shape, slices: vec![(Slice::new(Vec::new()), at)] }
}

/// Returns the shape of what a slice keeps.
fn kept(slice: &Slice, whole: &[u64]) -> Vec<u64> {
    let mut shape = whole.to_vec();
    for (len, range) in shape.iter_mut().zip(slice.ranges()) {
        *len = range.end - range.start;
    }
    shape
}

/// A part of a result, seen as `[batch, rows, cols]`.
struct Window {
    batch: Range<u64>,
    rows: Range<u64>,
    cols: Range<u64>,
}

fn windows(group: &Group, cut: &Cut) -> Option<Vec<Window>> {
    let (batch, rows, cols, behind) = match *group.shape {
        [rows, cols] => (1, rows, cols, 0),
        [batch, rows, cols] => (batch, rows, cols, 1),
        _ => return None,
    };
    let window = |piece: &Range<u64>| {
        let of = |dim: Option<usize>, len: u64| if dim == Some(cut.dim) { piece.clone() } else { 0..len };
        let batch = cut.experts.clone().unwrap_or_else(|| of((behind == 1).then_some(0), batch));
        Window { batch, rows: of(Some(behind), rows), cols: of(Some(behind + 1), cols) }
    };
    Some(cut.pieces.iter().map(window).collect())
}

/// Returns the part of every member that a window of the result is made of.
///
/// Answers for floats with scales in blocks, one byte or half a byte an element, which is what models that are served in parallel are
/// mostly stored as.
fn stored_slices(
    group: &Group,
    checkpoint: &Checkpoint,
    window: &Window,
) -> Result<Vec<(TensorId, Slice)>, String> {
    let slice = |(role, id): &(Role, TensorId)| {
        let info = checkpoint.tensor(*id).info;
        let grid = group.recipe.scale.map(|scale| scale.grid).filter(|grid| !grid.is_swizzled);
        let (rows, cols) = (group.recipe.rows, group.recipe.cols);
        let blocks = match role {
            Role::Payload if info.shape == group.shape => Some([1, 1]),
            Role::Payload if info.shape.ends_with(&[rows, cols / 32, 16]) && info.shape.len() > 3 => {
                Some([1, 32])
            }
            Role::Scale if info.shape.iter().product::<u64>() == 1 => {
                return Ok((*id, Slice::new(Vec::new())));
            }
            Role::Scale => grid
                .map(|grid| [u64::from(grid.rows_per_group), u64::from(grid.cols_per_group)])
                .filter(|[r, c]| info.shape.ends_with(&[rows.div_ceil(*r), cols.div_ceil(*c)])),
            _ => None,
        };
        let [row_block, col_block] = blocks.ok_or_else(|| {
            format!("{:?} {:?} is not cut as it is stored; dequantize it", info.name, info.shape)
        })?;
        let rows = aligned(&window.rows, row_block, rows, "rows")?;
        let cols = aligned(&window.cols, col_block, cols, "columns")?;
        let batch = (group.shape.len() == 3).then(|| window.batch.clone());
        Ok((*id, Slice::new(batch.into_iter().chain([rows, cols]).collect::<Vec<_>>())))
    };
    group.members.iter().map(slice).collect()
}

/// Returns a range in blocks, if it begins and ends with whole ones, or with the last.
fn aligned(range: &Range<u64>, block: u64, len: u64, what: &str) -> Result<Range<u64>, String> {
    let is_cut = |at: u64| !at.is_multiple_of(block) && at != len;
    match is_cut(range.start) || is_cut(range.end) {
        false => Ok(range.start / block..range.end.div_ceil(block)),
        true => {
            let Range { start, end } = range;
            Err(format!(
                "{what} {start}..{end} of {len} cut blocks of {block} that share a scale; dequantize it, or keep experts whole"
            ))
        }
    }
}
