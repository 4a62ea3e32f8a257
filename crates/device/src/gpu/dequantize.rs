//! Dequantization as kernels: which one a recipe takes, on how many threads.

use std::time::Duration;

use tensorhaul_plan::quant::{Codes, Grid, Recipe, ZeroPoint};

use super::Shared;
use super::dequantize_params::DequantizeParams;
use super::driver::{Driver, LaunchShape, StreamHandle};
use super::kernels::BLOCK_THREADS;
use super::params::Kernel;
use crate::contract::DeviceError;
use crate::dequantize::{Layout, Output};
use crate::operation::Dequantize;

impl<D: Driver> Shared<D> {
    /// Loads every kernel that a recipe may take. The device is current.
    pub(super) fn prepare_dequantize(&self) -> Result<Duration, DeviceError> {
        Way::ALL.iter().map(|way| self.load(way.kernel()).map(|(_, time)| time)).sum()
    }

    /// Queues a dequantization. The device is current.
    ///
    /// # Safety
    /// As for [`Shared::run`].
    pub(super) unsafe fn run_dequantize(
        &self,
        operation: &Dequantize<'_>,
        stream: StreamHandle,
    ) -> Result<(), DeviceError> {
        let recipe = operation.recipe;
        if [recipe.batch, recipe.rows, recipe.cols].contains(&0) {
            return Ok(());
        }
        let mut params = DequantizeParams::new(operation);
        let way = Way::of(recipe, operation.output, &params);
        let (outer, inner) = way.items(recipe, operation.output.layout);
        params.count(recipe.batch, outer, inner);
        let blocks = params.item_count.div_ceil(way.items_per_block());
        let shape = LaunchShape {
            block_count: blocks.clamp(1, self.threads_max() / BLOCK_THREADS) as u32,
            block_threads: BLOCK_THREADS as u32,
            shared_bytes: 0, // What kernels share they declare themselves.
        };
        // SAFETY: all these kernels take these parameters, whose ranges were checked; that they live is the caller's promise.
        unsafe { self.queue(way.kernel(), shape, params.bytes(), stream) }
    }
}

/// A kernel, chosen by what the recipe and the addresses allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// `dequantize_any`: one number at a time, everything goes.
    Any,
    /// `dequantize_rows`: eight neighbouring columns at a time, from rows to rows.
    Rows,
    /// `dequantize_tiles`: from columns to rows or columns.
    Tiles,
}

impl Way {
    const ALL: [Way; 3] = [Way::Any, Way::Rows, Way::Tiles];

    fn of(recipe: &Recipe, output: Output, params: &DequantizeParams) -> Way {
        let is_plain = recipe.group_index.is_none() && recipe.fold.is_none();
        let is_from_start = (recipe.first_row, recipe.first_col) == (0, 0);
        let is_aligned = params.target.is_multiple_of(VECTOR_LEN_BYTES) && params.table.is_multiple_of(4);
        match output.layout {
            _ if !is_plain || !is_from_start || !is_aligned => Way::Any,
            Layout::Rows if allows_rows(recipe, params) => Way::Rows,
            layout if allows_tiles(recipe, layout, params) => Way::Tiles,
            _ => Way::Any,
        }
    }

    fn kernel(self) -> Kernel {
        match self {
            Way::Any => Kernel { module: "dequantize_any", name: c"dequantize_any" },
            Way::Rows => Kernel { module: "dequantize_rows", name: c"dequantize_rows" },
            Way::Tiles => Kernel { module: "dequantize_tiles", name: c"dequantize_tiles" },
        }
    }

    /// Returns into how many rows of items a matrix falls, and how many items a row of those has.
    fn items(self, recipe: &Recipe, layout: Layout) -> (u64, u64) {
        match (self, layout) {
            (Way::Any, Layout::Rows) => (recipe.rows, recipe.cols),
            (Way::Any, Layout::Columns) => (recipe.cols, recipe.rows),
            (Way::Rows, _) => (recipe.rows, recipe.cols.div_ceil(CHUNK)),
            (Way::Tiles, _) => (recipe.rows.div_ceil(TILE_ROWS), recipe.cols.div_ceil(TILE_COLS)),
        }
    }

    fn items_per_block(self) -> u64 {
        match self {
            Way::Any | Way::Rows => BLOCK_THREADS,
            Way::Tiles => 1,
        }
    }
}

/// Tells whether every chunk is one load and whole stores, and of one group.
fn allows_rows(recipe: &Recipe, params: &DequantizeParams) -> bool {
    // Eight codes of so many bits are as many bytes.
    let chunk_bytes = match recipe.codes {
        Codes::Rows { bits: bits @ (4 | 8), .. } => u64::from(bits),
        Codes::RowsHighFirst { .. } => 4,
        _ => return false,
    };
    let codes = &params.codes;
    let rows_are_aligned = codes.stride.is_multiple_of(chunk_bytes) && recipe.cols.is_multiple_of(CHUNK);
    codes.address.is_multiple_of(chunk_bytes)
        && (recipe.batch == 1 || codes.batch_stride.is_multiple_of(chunk_bytes))
        && (recipe.batch * recipe.rows == 1 || rows_are_aligned)
        && grids(recipe).all(|grid| has_groups_of(grid, recipe, CHUNK))
}

/// Tells whether lines of words can be fetched in vectors, and groups are whole in what a tile keeps of them.
fn allows_tiles(recipe: &Recipe, layout: Layout, params: &DequantizeParams) -> bool {
    let codes = &params.codes;
    matches!(recipe.codes, Codes::Columns { bits: 4 | 8 } | Codes::Words { .. })
        && recipe.cols.is_multiple_of(CHUNK)
        && (layout == Layout::Rows || recipe.rows.is_multiple_of(CHUNK))
        && codes.address.is_multiple_of(VECTOR_LEN_BYTES)
        && (4 * codes.stride).is_multiple_of(VECTOR_LEN_BYTES)
        && (recipe.batch == 1 || codes.batch_stride.is_multiple_of(VECTOR_LEN_BYTES))
        && grids(recipe).all(|grid| has_groups_of(grid, recipe, GROUP_COLS))
}

/// The grids that are asked with rows and columns; packed zero-points go by the scale's.
fn grids(recipe: &Recipe) -> impl Iterator<Item = &Grid> {
    let zero_point = match &recipe.zero_point {
        ZeroPoint::Float(grid) => Some(grid),
        _ => None,
    };
    recipe.scale.iter().map(|scale| &scale.grid).chain(zero_point).chain(&recipe.bias)
}

/// Tells whether groups begin and end at multiples of so many columns, or there is only one.
fn has_groups_of(grid: &Grid, recipe: &Recipe, cols: u64) -> bool {
    let (first, per_group) = (u64::from(grid.col_first), u64::from(grid.cols_per_group));
    first.is_multiple_of(cols) && per_group.is_multiple_of(cols) || first + recipe.cols <= per_group
}

/// Numbers that a thread takes at once, `CHUNK` of `kernels/dequantize.h`.
const CHUNK: u64 = 8;

/// A tile of `kernels/dequantize_tiles.cc`, and the columns for which it keeps a group.
const TILE_ROWS: u64 = 64;
const TILE_COLS: u64 = 128;
const GROUP_COLS: u64 = 32;

const VECTOR_LEN_BYTES: u64 = 16;

#[cfg(test)]
mod tests {
    use tensorhaul_plan::Dtype;
    use tensorhaul_plan::quant::{Element, Number, Role, Scale};

    use super::*;
    use crate::contract::Device;
    use crate::host::Host;
    use crate::operation::{Location, Source};

    /// 64 rows of 256 columns in groups of 128, as most files have them.
    fn recipe(codes: Codes) -> Recipe {
        let grid = Grid {
            number: Number::F16,
            rows_per_group: 1,
            cols_per_group: 128,
            batch_stride: 0,
            row_stride: 2,
            col_stride: 1,
            row_first: 0,
            col_first: 0,
            is_swizzled: false,
        };
        Recipe {
            batch: 1,
            rows: 64,
            cols: 256,
            codes,
            first_row: 0,
            first_col: 0,
            element: Element::Unsigned,
            zero_point: ZeroPoint::Constant(8),
            scale: Some(Scale { grid, global: None }),
            factor: None,
            bias: None,
            fold: None,
            group_index: None,
            is_column_major: false,
        }
    }

    /// The way of a recipe whose payload starts at a byte of aligned memory.
    fn way(recipe: &Recipe, layout: Layout, payload_offset_bytes: u64) -> Way {
        let allocation = Host.allocate(1 << 20).unwrap();
        let source = |role| Source {
            role,
            start: Location {
                allocation: &allocation,
                offset_bytes: if role == Role::Payload { payload_offset_bytes } else { 0 },
            },
            len_bytes: 1 << 16,
        };
        let sources = [Role::Payload, Role::Scale, Role::GroupIndex].map(source);
        let target = Location { allocation: &allocation, offset_bytes: 0 };
        let output = Output { dtype: Dtype::Bf16, layout };
        let operation = Dequantize { recipe, sources: &sources, target, output };
        Way::of(recipe, output, &DequantizeParams::new(&operation))
    }

    const ROWS: Codes = Codes::Rows { bits: 4, row_stride_bytes: 128 };
    const WORDS: Codes = Codes::Words { words_per_row: 8, is_interleaved: true };

    #[test]
    fn what_most_files_have_takes_a_fast_way() {
        let bytes = Codes::Rows { bits: 8, row_stride_bytes: 256 };
        for codes in [ROWS, bytes, Codes::RowsHighFirst { row_stride_bytes: 128 }] {
            assert_eq!(way(&recipe(codes), Layout::Rows, 0), Way::Rows, "{codes:?}");
        }
        for codes in [Codes::Columns { bits: 4 }, Codes::Columns { bits: 8 }, WORDS] {
            for layout in [Layout::Rows, Layout::Columns] {
                assert_eq!(way(&recipe(codes), layout, 0), Way::Tiles, "{codes:?}");
            }
        }
    }

    #[test]
    fn what_fast_ways_cannot_do_takes_the_one_that_can() {
        assert_eq!(way(&recipe(Codes::Rows { bits: 3, row_stride_bytes: 96 }), Layout::Rows, 0), Way::Any);
        assert_eq!(way(&recipe(ROWS), Layout::Columns, 0), Way::Any);
        assert_eq!(way(&recipe(ROWS), Layout::Rows, 4), Way::Rows);
        assert_eq!(way(&recipe(ROWS), Layout::Rows, 2), Way::Any);
        assert_eq!(way(&recipe(WORDS), Layout::Rows, 4), Way::Any);
        assert_eq!(way(&Recipe { group_index: Some(2), ..recipe(WORDS) }, Layout::Rows, 0), Way::Any);
        assert_eq!(way(&Recipe { cols: 250, ..recipe(ROWS) }, Layout::Rows, 0), Way::Any);
        let mut small_groups = recipe(ROWS);
        if let Some(scale) = &mut small_groups.scale {
            scale.grid.cols_per_group = 132;
        }
        assert_eq!(way(&small_groups, Layout::Rows, 0), Way::Any);
    }
}
