//! Which part of a quantized tensor's result is meant.

use std::ops::Range;

use super::error::CutError;
use super::reshape::reshaped;
use crate::quant::Group;

/// A part of the matrices `[batch, rows, cols]` that a group's [recipe](super::Recipe) makes: of the result, with its
/// leading dims folded as the recipe has them.
///
/// Where recipes see the result's numbers as other rows (HQQ's groups, one row of everything), those rows are meant:
/// [`Group::window`] finds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Matrices, such as experts.
    pub batch: Range<u64>,
    /// Rows of each, out features.
    pub rows: Range<u64>,
    /// Columns of each, in features.
    pub cols: Range<u64>,
}

impl Window {
    /// Returns the window of all of a group's result.
    pub fn all(group: &Group) -> Window {
        let recipe = &group.recipe;
        Window { batch: 0..recipe.batch, rows: 0..recipe.rows, cols: 0..recipe.cols }
    }

    /// Returns its matrices, rows and columns; 0 for a range that is backwards.
    pub fn shape(&self) -> [u64; 3] {
        [&self.batch, &self.rows, &self.cols].map(|range| range.end.saturating_sub(range.start))
    }

    pub(super) fn check(&self, group: &Group) -> Result<(), CutError> {
        let recipe = &group.recipe;
        let dims = [
            ("matrices", &self.batch, recipe.batch),
            ("rows", &self.rows, recipe.rows),
            ("columns", &self.cols, recipe.cols),
        ];
        for (what, range, len) in dims {
            if range.start > range.end || range.end > len {
                let group = group.name.clone();
                return Err(CutError::OutOfRange { group, what: what.to_owned(), range: range.clone(), len });
            }
        }
        Ok(())
    }
}

impl Group {
    /// Finds the window of a slice of the result: a range for each leading dimension of [its shape](Group::shape), the
    /// others whole. The window's numbers are the slice's, in the same order.
    ///
    /// # Errors
    /// [`CutError::OutOfRange`] and [`CutError::TooManyDims`] when it is no slice of the shape; [`CutError::NotARectangle`] when the recipe
    /// sees the numbers as other rows, of which the slice is none: HQQ's groups of columns, bitsandbytes' blocks that run on
    /// across the ends of rows.
    pub fn window(&self, ranges: &[Range<u64>]) -> Result<Window, CutError> {
        if ranges.len() > self.shape.len() {
            let group = self.name.clone();
            return Err(CutError::TooManyDims { group, found: ranges.len(), ndim: self.shape.len() });
        }
        let whole = |at: usize| ranges.get(at).cloned().unwrap_or(0..self.shape[at]);
        let ranges: Vec<Range<u64>> = (0..self.shape.len()).map(whole).collect();
        for (dim, (range, len)) in ranges.iter().zip(&self.shape).enumerate() {
            if range.start > range.end || range.end > *len {
                let (group, what) = (self.name.clone(), format!("elements of dimension {dim}"));
                return Err(CutError::OutOfRange { group, what, range: range.clone(), len: *len });
            }
        }
        if ranges.iter().any(Range::is_empty) {
            return Ok(Window { batch: 0..0, rows: 0..0, cols: 0..0 });
        }
        let recipe = &self.recipe;
        let from = self.shape.iter().copied().zip(ranges.iter().cloned());
        let folded = reshaped(from, &[recipe.batch, recipe.rows, recipe.cols]);
        let folded = folded.and_then(|ranges| <[Range<u64>; 3]>::try_from(ranges).ok());
        match folded {
            Some([batch, rows, cols]) => Ok(Window { batch, rows, cols }),
            None => Err(CutError::NotARectangle {
                group: self.name.clone(),
                ranges,
                rows: recipe.rows,
                cols: recipe.cols,
                multiple: self.rows_multiple(),
            }),
        }
    }

    /// Slices of the first dimension alone that begin and end at multiples of this always are windows.
    fn rows_multiple(&self) -> u64 {
        let inner = self.shape.iter().skip(1).product();
        let cols = self.recipe.cols;
        if self.recipe.rows == 1 { 1 } else { cols / super::grid::gcd(cols, inner).max(1) }
    }
}
