//! Recipes to begin from.

use tensorhaul_plan::quant::{Codes, Element, Grid, Number, Recipe, ZeroPoint};

/// A recipe of one matrix without scales.
pub(crate) fn plain(rows: u64, cols: u64, codes: Codes, element: Element) -> Recipe {
    Recipe {
        batch: 1,
        rows,
        cols,
        codes,
        first_row: 0,
        first_col: 0,
        element,
        zero_point: ZeroPoint::None,
        scale: None,
        factor: None,
        bias: None,
        fold: None,
        group_index: None,
        is_column_major: matches!(
            codes,
            Codes::Columns { .. } | Codes::ColumnPlanes { .. } | Codes::Words { .. }
        ),
    }
}

/// A grid of one number for each element.
pub(crate) fn grid(number: Number, row_stride: u64, col_stride: u64) -> Grid {
    Grid {
        number,
        rows_per_group: 1,
        cols_per_group: 1,
        batch_stride: 0,
        row_stride,
        col_stride,
        row_first: 0,
        col_first: 0,
        is_swizzled: false,
    }
}
