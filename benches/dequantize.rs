//! Dequantizing on the host: GB of BF16 written a second, for each family of formats, on one thread and on two.
//!
//! A row is the best of several short rounds: other processes only ever make a round slower. *A core* is by the processor's
//! time of one thread, which is nearly the same on a busy machine; the others are by the clock. Bytes are random, scales are of a
//! model's size. Before it is timed, each format is compared with the reference on a small matrix.
//!
//!     cargo bench -p tensorhaul-benches --bench dequantize -- [PART OF A FORMAT'S NAME] [--test]
//!
//! Asked: 1 GB/s a core for formats of 4 bits and FP8, so that four cores keep up with a disk of 1 GB/s.
//!
//! `peers/dequantize_numpy.py` does the same for four of the formats as numpy can do it.

use comfy_table::{Cell, CellAlignment, Table};
use tensorhaul_benches::meter::Meter;
use tensorhaul_device::dequantize::{Layout, Output, Sources, dequantize, reference};
use tensorhaul_plan::Dtype;
use tensorhaul_plan::quant::{
    Codes, Element, Global, Grid, Number, Recipe, Role, Scale, ZeroOffset, ZeroPoint,
};

const SHAPES: [(u64, u64); 2] = [(4096, 4096), (4096, 14336)];
const SMALL: (u64, u64) = (160, 384);
const ROUNDS: usize = 7;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_test = arguments.iter().any(|argument| argument == "--test");
    let wanted = arguments.iter().find(|argument| !argument.starts_with("--"));
    let mut table = Table::new();
    table.set_header(["format", "rows x cols", "layout", "a core, GB/s", "1 thread", "2 threads"]);
    for family in families().iter().filter(|family| wanted.is_none_or(|wanted| family.name.contains(wanted)))
    {
        compare(family);
        if is_test {
            continue;
        }
        for (rows, cols) in SHAPES {
            let recipe = (family.recipe)(rows, cols);
            let layouts: &[Layout] =
                if recipe.is_column_major { &[Layout::Rows, Layout::Columns] } else { &[Layout::Rows] };
            for &layout in layouts {
                let mut line = vec![
                    Cell::new(family.name),
                    Cell::new(format!("{rows} x {cols}")),
                    Cell::new(format!("{layout:?}")),
                ];
                for gb_per_s in time(&recipe, layout) {
                    line.push(Cell::new(format!("{gb_per_s:.2}")).set_alignment(CellAlignment::Right));
                }
                table.add_row(line);
            }
        }
    }
    if !is_test {
        println!("{table}");
    }
}

/// GB/s of a core, of one thread and of two.
fn time(recipe: &Recipe, layout: Layout) -> [f64; 3] {
    let bytes = Bytes::new(recipe);
    let output = Output { dtype: Dtype::Bf16, layout };
    let mut target = vec![0; recipe.target_len_bytes(output.dtype).unwrap_or(0) as usize];
    let mut best_seconds = [f64::INFINITY; 3];
    for _ in 0..ROUNDS {
        let mut cost = |thread_count| {
            let meter = Meter::start();
            dequantize(recipe, &bytes.sources(), output, &mut target, thread_count);
            meter.stop()
        };
        let (one, two) = (cost(1), cost(2));
        for (best, seconds) in best_seconds.iter_mut().zip([one.cpu_seconds, one.seconds, two.seconds]) {
            *best = best.min(seconds);
        }
    }
    best_seconds.map(|seconds| target.len() as f64 / 1e9 / seconds)
}

fn compare(family: &Family) {
    let recipe = (family.recipe)(SMALL.0, SMALL.1);
    let bytes = Bytes::new(&recipe);
    for layout in [Layout::Rows, Layout::Columns] {
        let output = Output { dtype: Dtype::F32, layout };
        let len_bytes = recipe.target_len_bytes(output.dtype).unwrap_or(0) as usize;
        let (mut found, mut expected) = (vec![0; len_bytes], vec![0; len_bytes]);
        dequantize(&recipe, &bytes.sources(), output, &mut found, 2);
        reference::dequantize(&recipe, &bytes.sources(), output, &mut expected);
        for (found, expected) in found.as_chunks().0.iter().zip(expected.as_chunks().0) {
            let (found, expected) = (f32::from_le_bytes(*found), f32::from_le_bytes(*expected));
            let is_same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
            assert!(is_same, "{}: {found:e} instead of {expected:e}", family.name);
        }
    }
}

struct Family {
    name: &'static str,
    recipe: fn(u64, u64) -> Recipe,
}

fn families() -> Vec<Family> {
    let family = |name, recipe| Family { name, recipe };
    vec![
        family("gptq int4 g128", |rows, cols| gptq(rows, cols, 4)),
        family("gptq int4 g128 act-order", |rows, cols| Recipe {
            group_index: Some((cols / 128) as u32),
            ..gptq(rows, cols, 4)
        }),
        family("gptq int3 g128", |rows, cols| gptq(rows, cols, 3)),
        family("gptq int8 g128", |rows, cols| gptq(rows, cols, 8)),
        family("awq int4 g128", awq),
        family("ct pack int4 g128", |rows, cols| packed_rows(rows, cols, false)),
        family("ct pack int4 g128 asymmetric", |rows, cols| packed_rows(rows, cols, true)),
        family("mlx int4 g64", mlx),
        family("fp8 block 128x128", |rows, cols| {
            let grid =
                Grid { rows_per_group: 128, cols_per_group: 128, ..grid(Number::F32, cols.div_ceil(128), 1) };
            floats(rows, cols, Element::E4m3, 8, grid, None)
        }),
        family("fp8 channel", |rows, cols| {
            let grid = Grid { cols_per_group: cols as u32, ..grid(Number::F32, 1, 0) };
            floats(rows, cols, Element::E4m3, 8, grid, None)
        }),
        family("mxfp4", |rows, cols| {
            let grid = Grid { cols_per_group: 32, ..grid(Number::E8m0, cols / 32, 1) };
            floats(rows, cols, Element::E2m1, 4, grid, None)
        }),
        family("nvfp4", |rows, cols| {
            let grid = Grid { cols_per_group: 16, ..grid(Number::E4m3, cols / 16, 1) };
            let global = Global { dtype: Dtype::F32, is_divisor: false, batch_stride: 0 };
            floats(rows, cols, Element::E2m1, 4, grid, Some(global))
        }),
        family("nvfp4 swizzled", |rows, cols| {
            let padded_cols = (cols / 16).next_multiple_of(4);
            let grid = Grid { cols_per_group: 16, is_swizzled: true, ..grid(Number::E4m3, padded_cols, 1) };
            let global = Global { dtype: Dtype::F32, is_divisor: false, batch_stride: 0 };
            let recipe = floats(rows, cols, Element::E2m1, 4, grid, Some(global));
            Recipe { codes: Codes::RowsHighFirst { row_stride_bytes: cols / 2 }, ..recipe }
        }),
        family("bnb nf4", |rows, cols| bitsandbytes(rows, cols, false)),
        family("bnb nf4 nested", |rows, cols| bitsandbytes(rows, cols, true)),
        family("mxfp6", |rows, cols| {
            let grid = Grid { cols_per_group: 32, ..grid(Number::E8m0, cols / 32, 1) };
            floats(rows, cols, Element::E2m3, 6, grid, None)
        }),
        family("hqq int4 g64", hqq),
    ]
}

fn gptq(rows: u64, cols: u64, bits: u8) -> Recipe {
    let offset = if bits == 3 { ZeroOffset::Modular } else { ZeroOffset::WordWise };
    let codes = Codes::Rows { bits, row_stride_bytes: 4 * (rows * u64::from(bits)).div_ceil(32) };
    Recipe {
        codes: Codes::Columns { bits },
        zero_point: ZeroPoint::Packed { codes, is_swapped: true, is_signed: false, offset },
        scale: scale(Grid { cols_per_group: 128, ..grid(Number::F16, 1, rows) }),
        is_column_major: true,
        ..plain(rows, cols)
    }
}

fn awq(rows: u64, cols: u64) -> Recipe {
    let codes = Codes::Words { words_per_row: rows / 8, is_interleaved: true };
    let offset = ZeroOffset::Constant(0);
    Recipe {
        codes,
        zero_point: ZeroPoint::Packed { codes, is_swapped: false, is_signed: false, offset },
        scale: scale(Grid { cols_per_group: 128, ..grid(Number::F16, 1, rows) }),
        is_column_major: true,
        ..plain(rows, cols)
    }
}

fn packed_rows(rows: u64, cols: u64, is_asymmetric: bool) -> Recipe {
    let (codes, offset) = (Codes::Columns { bits: 4 }, ZeroOffset::Constant(0));
    Recipe {
        zero_point: match is_asymmetric {
            true => ZeroPoint::Packed { codes, is_swapped: true, is_signed: false, offset },
            false => ZeroPoint::Constant(8),
        },
        scale: scale(Grid { cols_per_group: 128, ..grid(Number::Bf16, cols / 128, 1) }),
        ..plain(rows, cols)
    }
}

fn mlx(rows: u64, cols: u64) -> Recipe {
    let grid = Grid { cols_per_group: 64, ..grid(Number::Bf16, cols / 64, 1) };
    Recipe { scale: scale(grid), bias: Some(grid), ..plain(rows, cols) }
}

fn floats(rows: u64, cols: u64, element: Element, bits: u8, grid: Grid, global: Option<Global>) -> Recipe {
    Recipe {
        codes: Codes::Rows { bits, row_stride_bytes: cols * u64::from(bits) / 8 },
        element,
        scale: Some(Scale { grid, global }),
        ..plain(rows, cols)
    }
}

/// One row: blocks of 64 do not end with rows.
fn bitsandbytes(rows: u64, cols: u64, is_nested: bool) -> Recipe {
    let nested = Number::Nested { per_scale: 256, offset: 0.02 };
    let number = if is_nested { nested } else { Number::F32 };
    Recipe {
        codes: Codes::RowsHighFirst { row_stride_bytes: 0 },
        first_row: 0,
        first_col: 0,
        element: Element::Table,
        scale: scale(Grid { cols_per_group: 64, ..grid(number, 0, 1) }),
        ..plain(1, rows * cols)
    }
}

/// Each group is a row of the matrix of codes.
fn hqq(rows: u64, cols: u64) -> Recipe {
    let group_count = rows * cols / 64;
    let grid = Grid { cols_per_group: 64, ..grid(Number::F16, 1, 0) };
    Recipe {
        codes: Codes::RowChunks { bits: 4, unit_bytes: 1, unit_rows: group_count / 2 },
        zero_point: ZeroPoint::Float(grid),
        scale: scale(grid),
        ..plain(group_count, 64)
    }
}

fn plain(rows: u64, cols: u64) -> Recipe {
    Recipe {
        batch: 1,
        rows,
        cols,
        codes: Codes::Rows { bits: 4, row_stride_bytes: cols / 2 },
        first_row: 0,
        first_col: 0,
        element: Element::Unsigned,
        zero_point: ZeroPoint::None,
        scale: None,
        factor: None,
        bias: None,
        fold: None,
        group_index: None,
        is_column_major: false,
    }
}

fn scale(grid: Grid) -> Option<Scale> {
    Some(Scale { grid, global: None })
}

fn grid(number: Number, row_stride: u64, col_stride: u64) -> Grid {
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

/// Random bytes for every role that a recipe reads.
struct Bytes(Vec<(Role, Vec<u8>)>);

impl Bytes {
    fn new(recipe: &Recipe) -> Bytes {
        let roles = [
            Role::Payload,
            Role::Scale,
            Role::Global,
            Role::ZeroPoint,
            Role::GroupIndex,
            Role::Bias,
            Role::Table,
            Role::NestedTable,
            Role::NestedScale,
        ];
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let bytes_of =
            |role| Some((role, random.bytes(recipe, role, recipe.source_len_bytes(role)? as usize)));
        Bytes(roles.into_iter().filter_map(bytes_of).collect())
    }

    fn sources(&self) -> Sources<'_> {
        self.0.iter().map(|(role, bytes)| (*role, &bytes[..])).collect()
    }
}

struct Random(u64);

impl Random {
    /// The next of Marsaglia's xorshift numbers.
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, recipe: &Recipe, role: Role, len_bytes: usize) -> Vec<u8> {
        let is_byte = |number| matches!(number, Number::E8m0 | Number::E4m3 | Number::Nested { .. });
        let is_packed = matches!(recipe.zero_point, ZeroPoint::Packed { .. });
        match role {
            Role::Payload | Role::ZeroPoint if role == Role::Payload || is_packed => {
                (0..len_bytes).map(|_| (self.next() >> 32) as u8).collect()
            }
            Role::GroupIndex => {
                let group_count = u64::from(recipe.group_index.unwrap_or(1));
                (0..len_bytes / 4).flat_map(|_| ((self.next() % group_count) as u32).to_le_bytes()).collect()
            }
            Role::Scale if recipe.scale.is_some_and(|scale| is_byte(scale.grid.number)) => {
                (0..len_bytes).map(|_| 0x60 + (self.next() >> 32) as u8 % 0x1f).collect()
            }
            // Two bytes from 0x2000 to 0x2fff are small as F16, as BF16, and as the upper half of F32.
            _ => (0..len_bytes / 2)
                .flat_map(|_| (0x2000 + (self.next() >> 32) as u16 % 0x1000).to_le_bytes())
                .collect(),
        }
    }
}
