//! Parts of scales, of zero-points, of whatever there is one of for a group.

use std::ops::Range;

use super::codes::{Packing, cut_codes};
use super::lines::Lines;
use super::window::Window;
use crate::quant::{Codes, Grid, Number, Recipe, ZeroOffset, ZeroPoint};

/// Groups that cannot be told apart by an address, along rows and along columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Units {
    rows: u64,
    cols: u64,
}

impl Units {
    pub(super) const ONE: Units = Units { rows: 1, cols: 1 };

    /// Returns the groups whose zero-points are packed together.
    pub(super) fn of(zero_point: &ZeroPoint) -> Units {
        let ZeroPoint::Packed { codes, is_swapped, offset, .. } = *zero_point else { return Units::ONE };
        let packing = Packing::of(in_whole_words(codes, offset));
        // Chunks begin where they begin.
        let rows = if matches!(codes, Codes::RowChunks { .. }) { u64::MAX } else { packing.rows.codes };
        match is_swapped {
            false => Units { rows, cols: packing.cols.codes },
            true => Units { rows: packing.cols.codes, cols: rows },
        }
    }
}

/// Words to which one is added are not cut; they are as the padded layout has them.
pub(super) fn in_whole_words(codes: Codes, offset: ZeroOffset) -> Codes {
    match (codes, offset) {
        (Codes::Rows { bits: bits @ (2 | 4 | 8), row_stride_bytes }, ZeroOffset::WordWise) => {
            Codes::RowsPadded { bits, row_stride_bytes }
        }
        _ => codes,
    }
}

/// A part of a grid.
pub(super) struct CutGrid {
    pub(super) lines: Lines,
    /// Where the numbers lie in these lines, back to back.
    pub(super) grid: Grid,
    /// The stretch of the tensor's numbers that these are, where they must be one.
    pub(super) numbers: Range<u64>,
}

/// The groups that a window falls into, along one index.
struct Groups {
    range: Range<u64>,
    /// Rows or columns of the first of them before the window.
    first: u32,
}

/// What grids are cut to.
pub(super) struct Cutter<'c> {
    pub(super) recipe: &'c Recipe,
    pub(super) window: &'c Window,
    pub(super) units: Units,
    /// Length of the tensor that the numbers lie in.
    pub(super) len_bytes: u64,
}

impl Cutter<'_> {
    /// Cuts a grid, or returns `None` where the tensor does not hold it as lines.
    pub(super) fn grid(&self, grid: Grid) -> Option<CutGrid> {
        match (grid.is_swizzled, grid.number) {
            (true, _) => self.tiles(grid),
            (false, Number::Nested { per_scale, .. }) => self.nested(grid, per_scale.into()),
            (false, _) => {
                self.straight(grid, self.rows(&grid, self.units.rows)?, self.cols(&grid, self.units.cols)?)
            }
        }
    }

    /// Cuts packed zero-points to the groups of the scale's grid.
    pub(super) fn zero_points(&self, codes: Codes, is_swapped: bool) -> Option<(Lines, Codes)> {
        let ZeroPoint::Packed { offset, .. } = self.recipe.zero_point else { return None };
        let grid = &self.recipe.scale?.grid;
        let rows = self.rows(grid, self.units.rows)?.range;
        let cols = self.cols(grid, self.units.cols)?.range;
        let counts = (self.recipe.row_group_count(grid)?, self.recipe.col_group_count(grid)?);
        let (size, rows, cols) = match is_swapped {
            false => (counts, rows, cols),
            true => ((counts.1, counts.0), cols, rows),
        };
        let batch = self.recipe.batch;
        let packed = in_whole_words(codes, offset);
        let cut = cut_codes(packed, size, &rows, &cols, self.len_bytes / batch)?;
        let lines = Lines::of(batch, &self.window.batch, cut.shape, cut.ranges, self.len_bytes)?;
        let codes = match (codes, cut.codes) {
            (Codes::Rows { bits, .. }, Codes::RowsPadded { row_stride_bytes, .. }) => {
                Codes::Rows { bits, row_stride_bytes }
            }
            (_, cut) => cut,
        };
        // Groups begin with a unit, so that nothing comes before.
        ((cut.first_row, cut.first_col) == (0, 0)).then_some((lines, codes))
    }

    fn rows(&self, grid: &Grid, unit: u64) -> Option<Groups> {
        let count = self.recipe.row_group_count(grid)?;
        groups(&self.window.rows, grid.row_first, grid.rows_per_group, count, unit)
    }

    fn cols(&self, grid: &Grid, unit: u64) -> Option<Groups> {
        let count = self.recipe.col_group_count(grid)?;
        match self.recipe.group_index {
            // Indices are those of the whole tensor.
            Some(_) => Some(Groups { range: 0..count, first: 0 }),
            None => groups(&self.window.cols, grid.col_first, grid.cols_per_group, count, unit),
        }
    }

    /// Numbers at distances: lines of row groups, or of column groups.
    fn straight(&self, grid: Grid, rows: Groups, cols: Groups) -> Option<CutGrid> {
        let row_count = self.recipe.row_group_count(&grid)?;
        let col_count = self.recipe.col_group_count(&grid)?;
        let differs_by_row = row_count > 1 && grid.row_stride > 0;
        let differs_by_col = col_count > 1 && grid.col_stride > 0;
        // Each time: lines, numbers of a line, which of them are taken; then the distances of row groups and column groups. A line
        // of which all groups are taken is taken with its padding, so that lines stay together.
        let (shape, ranges, strides) = match (differs_by_row, differs_by_col) {
            (false, false) => ([1, grid.batch_stride.max(1)], [0..1, 0..1], [0, 0]),
            (true, false) if grid.row_stride == 1 => ([1, row_count], [0..1, rows.range], [1, 0]),
            (true, false) => ([row_count, grid.row_stride], [rows.range, 0..1], [1, 0]),
            (false, true) if grid.col_stride == 1 => ([1, col_count], [0..1, cols.range], [0, 1]),
            (false, true) => ([col_count, grid.col_stride], [cols.range, 0..1], [0, 1]),
            (true, true) if grid.col_stride == 1 && grid.row_stride >= col_count => {
                let taken = self.padded(cols.range, col_count, row_count, grid);
                let width = taken.end - taken.start;
                ([row_count, grid.row_stride], [rows.range, taken], [width, 1])
            }
            (true, true) if grid.row_stride == 1 && grid.col_stride >= row_count => {
                let taken = self.padded(rows.range, row_count, col_count, grid);
                let width = taken.end - taken.start;
                ([col_count, grid.col_stride], [cols.range, taken], [1, width])
            }
            (true, true) => return None,
        };
        let taken: u64 = ranges.iter().map(|range| range.end - range.start).product();
        let numbers = ranges[0].start * shape[1] + ranges[1].start;
        let lines = self.lines(&grid, shape, ranges)?;
        let grid = Grid {
            batch_stride: self.batch_stride(&grid, taken),
            row_stride: strides[0],
            col_stride: strides[1],
            row_first: rows.first,
            col_first: cols.first,
            ..grid
        };
        Some(CutGrid { lines, grid, numbers: numbers..numbers + taken })
    }

    /// Extends a line's groups by what lies behind the last, if all lines have so much.
    fn padded(&self, range: Range<u64>, count: u64, line_count: u64, grid: Grid) -> Range<u64> {
        let width = grid.row_stride.max(grid.col_stride);
        let is_long = (line_count.checked_mul(width))
            .and_then(|len| len.checked_mul(grid.number.len_bytes()))
            .is_some_and(|len_bytes| len_bytes <= self.len_bytes);
        if range.end == count && is_long { range.start..width } else { range }
    }

    /// Numbers whose own scale goes by their place in the tensor: from one that begins a scale on, without a hole.
    fn nested(&self, grid: Grid, per_scale: u64) -> Option<CutGrid> {
        if self.recipe.batch != 1 || per_scale == 0 {
            return None;
        }
        let (row_count, col_count) =
            (self.recipe.row_group_count(&grid)?, self.recipe.col_group_count(&grid)?);
        let is_matrix = row_count > 1 && col_count > 1 && grid.row_stride > 0 && grid.col_stride > 0;
        let rows_of = |unit| self.rows(&grid, unit);
        if !is_matrix {
            return self.straight(grid, rows_of(per_scale)?, self.cols(&grid, per_scale)?);
        }
        // Whole rows, or whole columns where those are neighbours.
        let unit = |line_len| per_scale / gcd(per_scale, line_len);
        match (grid.row_stride, grid.col_stride) {
            (len, 1) if len == col_count => {
                let cols = Groups { range: 0..col_count, ..self.cols(&grid, u64::MAX)? };
                self.straight(grid, rows_of(unit(len))?, cols)
            }
            (1, len) if len == row_count => {
                let rows = Groups { range: 0..row_count, ..rows_of(u64::MAX)? };
                self.straight(grid, rows, self.cols(&grid, unit(len))?)
            }
            _ => None,
        }
    }

    /// Tiles of 128 by 4.
    fn tiles(&self, grid: Grid) -> Option<CutGrid> {
        let (rows, cols) = (self.rows(&grid, 128)?, self.cols(&grid, 4)?);
        let row_count = self.recipe.row_group_count(&grid)?;
        let shape = [row_count.div_ceil(128), grid.row_stride / 4 * TILE_LEN];
        let tile_cols = cols.range.start / 4..cols.range.end.div_ceil(4);
        let tile_rows = rows.range.start / 128..rows.range.end.div_ceil(128);
        let row_stride = (tile_cols.end - tile_cols.start) * 4;
        let taken = (tile_rows.end - tile_rows.start) * 128 * row_stride;
        let ranges = [tile_rows, tile_cols.start * TILE_LEN..tile_cols.end * TILE_LEN];
        let lines = self.lines(&grid, shape, ranges)?;
        let batch_stride = self.batch_stride(&grid, taken);
        let grid = Grid { batch_stride, row_stride, row_first: rows.first, col_first: cols.first, ..grid };
        Some(CutGrid { lines, grid, numbers: 0..taken })
    }

    fn lines(&self, grid: &Grid, [count, len]: [u64; 2], [lines, numbers]: [Range<u64>; 2]) -> Option<Lines> {
        let bytes = grid.number.len_bytes();
        let in_bytes = numbers.start.checked_mul(bytes)?..numbers.end.checked_mul(bytes)?;
        // Matrices that share their numbers are one.
        let (batch, matrices) = match grid.batch_stride {
            0 => (1, 0..1),
            stride if self.recipe.batch > 1 && count.checked_mul(len)? != stride => return None,
            _ => (self.recipe.batch, self.window.batch.clone()),
        };
        Lines::of(batch, &matrices, [count, len.checked_mul(bytes)?], [lines, in_bytes], self.len_bytes)
    }

    fn batch_stride(&self, grid: &Grid, taken: u64) -> u64 {
        if grid.batch_stride == 0 { 0 } else { taken }
    }
}

/// Finds the groups of a range, from a multiple of a unit on.
fn groups(range: &Range<u64>, first: u32, per_group: u32, count: u64, unit: u64) -> Option<Groups> {
    if count <= 1 {
        return Some(Groups { range: 0..1, first: 0 });
    }
    let (per_group, before) = (u64::from(per_group), u64::from(first));
    let start = (range.start + before) / per_group / unit * unit;
    let end = (range.end + before).div_ceil(per_group);
    let first = u32::try_from(range.start + before - start * per_group).ok()?;
    Some(Groups { range: start..end, first })
}

pub(super) fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Numbers of a tile.
const TILE_LEN: u64 = 512;
