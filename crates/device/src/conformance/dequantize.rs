//! Promises about dequantization: what the device computes is what the host's readable execution computes, bit for bit,
//! and NaN where that is NaN.

use tensorhaul_plan::Dtype;
use tensorhaul_plan::quant::{
    Codes, Element, Global, Grid, Number, Recipe, Role, Scale, ZeroOffset, ZeroPoint,
};

use super::operations::{GUARD, GUARD_LEN, STREAMS, guarded, run_and_read};
use super::{expect, text, write};
use crate::contract::Device;
use crate::dequantize::{Layout, Output, Sources, reference};
use crate::float::{f32_to_bf16, f32_to_f16};
use crate::operation::{Dequantize, Location, Operation, Source};

pub(super) fn dequantization_equals_the_host(device: &dyn Device) -> Result<(), String> {
    for (number, (name, recipe)) in recipes().into_iter().enumerate() {
        // Where addresses are multiples of 16, and where they are of nothing.
        for offsets in [[0, 0], [0, 2], [1, 3]].into_iter().take(if number % 4 == 0 { 3 } else { 1 }) {
            check(device, &recipe, number, offsets).map_err(|what| format!("{name}: {what}"))?;
        }
    }
    Ok(())
}

/// Makes every output of a recipe, one behind the other in one allocation.
fn check(
    device: &dyn Device,
    recipe: &Recipe,
    number: usize,
    [source_offset, target_offset]: [usize; 2],
) -> Result<(), String> {
    let members = members(recipe, number as u64);
    let (mut bytes, mut starts) = (vec![GUARD; 16], Vec::new());
    for (_, member) in &members {
        starts.push(bytes.len().next_multiple_of(16) + source_offset);
        bytes.resize(starts[starts.len() - 1], GUARD);
        bytes.extend(member);
    }
    let allocation = device.allocate(bytes.len() as u64).map_err(text)?;
    write(device, &bytes, &allocation, 0)?;
    let sources: Vec<Source<'_>> = members
        .iter()
        .zip(&starts)
        .map(|((role, member), start)| Source {
            role: *role,
            start: Location { allocation: &allocation, offset_bytes: *start as u64 },
            len_bytes: member.len() as u64,
        })
        .collect();
    let on_host: Sources<'_> = members.iter().map(|(role, member)| (*role, &member[..])).collect();

    let (mut expected, mut places) = (vec![GUARD; 16], Vec::new());
    for output in OUTPUTS {
        let start = expected.len().next_multiple_of(16) + target_offset;
        let len = recipe.target_len_bytes(output.dtype).ok_or("too long")? as usize;
        expected.resize(start + len, GUARD);
        reference::dequantize(recipe, &on_host, output, &mut expected[start..]);
        expected.extend([GUARD; GUARD_LEN]);
        places.push((output, start, len));
    }
    let target = guarded(device, expected.len())?;
    let mut found = Vec::new();
    for (output, start, _) in &places {
        let target_start = Location { allocation: &target, offset_bytes: *start as u64 };
        let operation = Dequantize { recipe, sources: &sources, target: target_start, output: *output };
        let operation = Operation::Dequantize(operation);
        found = run_and_read(device, &[operation], &target, expected.len(), STREAMS[number % 2])?;
    }
    for (output, start, len) in places {
        let width = output.dtype.bits() as usize / 8;
        for at in (start..start + len).step_by(width) {
            let (found, expected) = (&mut found[at..at + width], &expected[at..at + width]);
            if is_nan(output.dtype, found) && is_nan(output.dtype, expected) {
                found.copy_from_slice(expected);
            }
            expect(found == expected, || {
                let element = (at - start) / width;
                format!(
                    "element {element} is {found:02x?} instead of {expected:02x?}, {output:?}, from {source_offset} to {target_offset}"
                )
            })?;
        }
    }
    let outside = found.iter().zip(&expected).position(|(found, expected)| found != expected);
    outside.map_or(Ok(()), |at| Err(format!("byte {at} is outside the target")))
}

const OUTPUTS: [Output; 6] = [
    Output { dtype: Dtype::F32, layout: Layout::Rows },
    Output { dtype: Dtype::F32, layout: Layout::Columns },
    Output { dtype: Dtype::F16, layout: Layout::Rows },
    Output { dtype: Dtype::F16, layout: Layout::Columns },
    Output { dtype: Dtype::Bf16, layout: Layout::Rows },
    Output { dtype: Dtype::Bf16, layout: Layout::Columns },
];

/// By the bits: all of the exponent, some of the mantissa.
fn is_nan(dtype: Dtype, bytes: &[u8]) -> bool {
    match (dtype, bytes) {
        (Dtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).is_nan(),
        (Dtype::F16, &[a, b]) => u16::from_le_bytes([a, b]) & 0x7fff > 0x7c00,
        (_, &[a, b]) => u16::from_le_bytes([a, b]) & 0x7fff > 0x7f80,
        _ => false,
    }
}

/// Recipes that have, taken together, everything that a recipe can have: every layout of codes and elements, with
/// every kind of zero-points, scales and what else there is, odd sizes, short last groups, several matrices.
fn recipes() -> Vec<(String, Recipe)> {
    let mut all = Vec::new();
    let mut add = |name: &str, recipe: Recipe| all.push((name.to_owned(), recipe));
    let rows_of =
        |bits: u8, cols: u64| Codes::Rows { bits, row_stride_bytes: (cols * u64::from(bits)).div_ceil(8) };

    // Layouts of codes.
    for bits in 1..=8 {
        add(&format!("rows of {bits} bits"), plain(rows_of(bits, 75), 7, 75));
        let padded =
            Codes::RowsPadded { bits, row_stride_bytes: 4 * 75u64.div_ceil(32 / u64::from(bits)) + 8 };
        add(&format!("padded rows of {bits} bits"), plain(padded, 3, 75));
        add(&format!("columns of {bits} bits"), k_major(Codes::Columns { bits }, 13, 75, 32));
        add(&format!("chunks of {bits} bits in bytes"), chunks(bits, 1, 11, 9));
        add(&format!("chunks of {bits} bits in words"), chunks(bits, 4, 23, 5));
    }
    for bits in 2..=8 {
        add(&format!("planes of {bits} bits"), k_major(Codes::ColumnPlanes { bits }, 9, 96, 32));
        let row_stride_bytes = 4 * 3 * u64::from(bits) + 4;
        add(
            &format!("planes along rows of {bits} bits"),
            plain(Codes::RowPlanes { bits, row_stride_bytes }, 5, 75),
        );
        add(&format!("padded columns of {bits} bits"), plain(Codes::ColumnsPadded { bits }, 7, 75));
    }
    add("high nibbles first", plain(Codes::RowsHighFirst { row_stride_bytes: 19 }, 5, 37));
    for is_interleaved in [false, true] {
        let words = |rows: u64| Codes::Words { words_per_row: rows.div_ceil(8), is_interleaved };
        add("words", k_major(words(21), 21, 40, 16));
        add("words, wide", k_major(words(136), 136, 96, 32));
        add("words, aligned", k_major(words(64), 64, 128, 64));
        let padded = Codes::Words { words_per_row: 4, is_interleaved };
        add("words with padding", k_major(padded, 24, 40, 40));
    }
    add("pairs of rows", plain(Codes::RowPairs, 7, 33));
    add("awq fast", plain(Codes::AwqFast, 12, 128));
    let inline = Grid {
        number: Number::SignedExponent,
        row_stride: 34,
        col_stride: 17,
        ..grid(Number::SignedExponent, 6, 64, 1, 32)
    };
    let inline = Recipe {
        element: Element::E2m1,
        ..with_scale(plain(Codes::RowsWithScales { row_stride_bytes: 34 }, 6, 64), inline)
    };
    add("inline scales", Recipe { zero_point: ZeroPoint::None, ..inline });

    // Parts of tensors, which begin inside a word, a byte, a chunk, a block.
    let part = |codes, first_row, first_col| Recipe { first_row, first_col, ..plain(codes, 9, 40) };
    for bits in 1..=8 {
        add(&format!("a part of rows of {bits} bits"), part(rows_of(bits, 47), 0, 7));
        let padded = Codes::RowsPadded { bits, row_stride_bytes: 64 };
        add(&format!("a part of padded rows of {bits} bits"), part(padded, 0, 3));
        add(&format!("a part of columns of {bits} bits"), part(Codes::Columns { bits }, 0, 31));
        add(&format!("a part of padded columns of {bits} bits"), part(Codes::ColumnsPadded { bits }, 0, 3));
        let chunks = Codes::RowChunks { bits, unit_bytes: 4, unit_rows: 8 };
        add(&format!("a part of chunks of {bits} bits"), part(chunks, 15, 0));
    }
    for bits in 2..=8 {
        add(&format!("a part of planes of {bits} bits"), part(Codes::ColumnPlanes { bits }, 0, 30));
        let along_rows = Codes::RowPlanes { bits, row_stride_bytes: 12 * u64::from(bits) };
        add(&format!("a part of planes along rows of {bits} bits"), part(along_rows, 0, 17));
    }
    add("a part of high nibbles first", part(Codes::RowsHighFirst { row_stride_bytes: 21 }, 0, 1));
    add("a part of inline scales' codes", part(Codes::RowsWithScales { row_stride_bytes: 51 }, 0, 31));
    add("a part of words", part(Codes::Words { words_per_row: 3, is_interleaved: true }, 5, 0));
    add("a part of pairs of rows", part(Codes::RowPairs, 1, 0));
    add("a part of awq fast", part(Codes::AwqFast, 3, 62));

    // Elements.
    let elements = [
        (Element::E2m1, 4),
        (Element::E2m3, 6),
        (Element::E3m2, 6),
        (Element::E4m3, 8),
        (Element::E5m2, 8),
        (Element::E4m3Fnuz, 8),
        (Element::E5m2Fnuz, 8),
        (Element::E8m0, 8),
        (Element::Table, 3),
        (Element::Table, 4),
        (Element::Signed, 4),
        (Element::Signed, 5),
        (Element::Signed, 8),
        (Element::Unsigned, 8),
    ];
    for (element, bits) in elements {
        // All codes, on the way that takes single numbers and on the one that takes eight.
        for (cols, group) in [(261, 20), (264, 24), (512, 512)] {
            let recipe =
                Recipe { element, zero_point: ZeroPoint::None, ..plain(rows_of(bits, cols), 3, cols) };
            let recipe = with_scale(recipe, grid(Number::Bf16, 3, cols, 1, group));
            add(&format!("{element:?} of {bits} bits, {cols} columns"), recipe.clone());
            let cast = Recipe { scale: None, ..recipe };
            add(&format!("{element:?} of {bits} bits, {cols} columns, no scale"), cast);
        }
    }
    let float_zeros = Recipe {
        element: Element::E4m3,
        zero_point: ZeroPoint::Float(grid(Number::E4m3, 3, 64, 1, 16)),
        ..plain(rows_of(8, 64), 3, 64)
    };
    add("floats minus floats", float_zeros);

    // Scales.
    let numbers = [Number::F32, Number::F16, Number::Bf16, Number::E8m0, Number::E4m3, Number::I8];
    for number in numbers {
        for (rows_per_group, cols_per_group) in [(1, 24), (1, 16), (1, 7), (3, 40), (7, 200)] {
            let name = format!("{number:?} of {rows_per_group} by {cols_per_group}");
            let of = grid(number, 7, 200, rows_per_group, cols_per_group);
            add(&name, with_scale(plain(rows_of(4, 200), 7, 200), of));
            let fp8 = Recipe {
                element: Element::E4m3,
                zero_point: ZeroPoint::None,
                ..plain(rows_of(8, 200), 7, 200)
            };
            add(&format!("{name}, fp8"), with_scale(fp8, of));
        }
    }
    for (row_first, col_first, cols_per_group) in [(0, 5, 16), (3, 8, 16), (5, 24, 48), (1, 32, 32)] {
        let first = Grid { row_first, col_first, ..grid(Number::F16, 16, 200, 4, cols_per_group) };
        add("groups that began earlier", with_scale(plain(rows_of(4, 144), 9, 144), first));
    }
    let nested =
        Grid { number: Number::Nested { per_scale: 4, offset: 0.375 }, ..grid(Number::I8, 1, 1005, 1, 64) };
    let table = Recipe {
        element: Element::Table,
        zero_point: ZeroPoint::None,
        ..plain(Codes::RowsHighFirst { row_stride_bytes: 503 }, 1, 1005)
    };
    add("nested scales", with_scale(table, nested));
    let swizzled = Grid {
        is_swizzled: true,
        row_stride: 8,
        batch_stride: 256 * 8,
        ..grid(Number::E4m3, 131, 112, 1, 16)
    };
    for (is_divisor, dtype, batch_stride) in
        [(false, Dtype::F32, 0), (true, Dtype::F32, 1), (true, Dtype::Bf16, 2), (false, Dtype::F16, 1)]
    {
        let global = Some(Global { dtype, is_divisor, batch_stride });
        let fp4 = Recipe {
            batch: 2,
            element: Element::E2m1,
            zero_point: ZeroPoint::None,
            ..plain(rows_of(4, 112), 131, 112)
        };
        add("swizzled", Recipe { scale: Some(Scale { grid: swizzled, global }), ..fp4.clone() });
        let straight = grid(Number::E4m3, 131, 112, 1, 16);
        add("scales of scales", Recipe { scale: Some(Scale { grid: straight, global }), ..fp4 });
    }

    // Zero-points.
    for (bits, stride) in [(2, 4), (4, 4), (8, 12)] {
        let codes = Codes::Rows { bits, row_stride_bytes: stride };
        add("increased word by word", packed(codes, true, false, ZeroOffset::WordWise, bits, 9));
    }
    for bits in 2..=8 {
        let along_rows = Codes::Rows { bits, row_stride_bytes: 16 };
        let offsets =
            [ZeroOffset::Constant(0), ZeroOffset::Constant(1), ZeroOffset::Constant(-8), ZeroOffset::Modular];
        for (at, offset) in offsets.into_iter().enumerate() {
            add("zero-points along rows", packed(along_rows, at % 2 == 0, at == 2, offset, bits, 10));
            let along_columns = Codes::Columns { bits };
            add("zero-points along columns", packed(along_columns, at % 2 == 1, at == 1, offset, bits, 5));
        }
    }
    for is_interleaved in [false, true] {
        for rows in [24, 64, 136] {
            let codes = Codes::Words { words_per_row: rows / 8, is_interleaved };
            let zero_point = ZeroPoint::Packed {
                codes,
                is_swapped: false,
                is_signed: false,
                offset: ZeroOffset::Constant(0),
            };
            let swapped = ZeroPoint::Packed {
                codes: Codes::Rows { bits: 4, row_stride_bytes: rows / 2 },
                is_swapped: true,
                is_signed: false,
                offset: ZeroOffset::WordWise,
            };
            for cols in [72, 128, 200] {
                for group in [16, 32, 64, 128] {
                    let name = format!("{rows} by {cols} by {group}");
                    let awq = k_major(codes, rows, cols, group);
                    // The zero-points' matrix has groups as columns, and rows as they are.
                    add(&format!("awq, {name}"), Recipe { zero_point, ..awq });
                    let gptq = k_major(Codes::Columns { bits: 4 }, rows, cols, group);
                    add(&format!("gptq, {name}"), Recipe { zero_point: swapped, ..gptq });
                }
            }
        }
    }
    for number in [Number::F16, Number::F32] {
        let zero_point = ZeroPoint::Float(grid(number, 7, 80, 1, 16));
        add("float zero-points", Recipe { zero_point, ..plain(rows_of(4, 80), 7, 80) });
    }

    // What comes behind the scale, and batches.
    let full = Recipe {
        batch: 3,
        factor: Some(1.0 / 127.0),
        bias: Some(grid(Number::Bf16, 6, 88, 1, 16)),
        fold: Some(Dtype::Bf16),
        ..plain(rows_of(8, 88), 6, 88)
    };
    add("everything", full.clone());
    add("everything but a fold", Recipe { fold: None, ..full.clone() });
    let shared = Grid { batch_stride: 0, ..grid(Number::F32, 6, 88, 6, 88) };
    add("scales for all matrices", with_scale(full, shared));
    let columns = Recipe {
        batch: 2,
        fold: Some(Dtype::F32),
        factor: Some(0.3),
        bias: Some(grid(Number::F16, 72, 96, 1, 32)),
        ..k_major(Codes::Columns { bits: 8 }, 72, 96, 32)
    };
    add("columns with everything", columns.clone());
    add("columns with everything but a fold", Recipe { fold: None, ..columns });
    for (rows, cols, group) in [(72, 200, 32), (64, 128, 128), (8, 264, 512)] {
        add("columns of bytes", k_major(Codes::Columns { bits: 8 }, rows, cols, group));
    }
    add("high nibbles first, in eights", plain(Codes::RowsHighFirst { row_stride_bytes: 44 }, 9, 80));

    // Groups by index.
    for (codes, rows) in
        [(Codes::Columns { bits: 4 }, 24), (rows_of(4, 96), 5), (Codes::Columns { bits: 3 }, 10)]
    {
        let of = Grid { row_stride: 1, col_stride: rows, ..grid(Number::F16, rows, 96, 1, 32) };
        let zero_codes = Codes::Rows { bits: codes.bits(), row_stride_bytes: 12 };
        let zero_point = ZeroPoint::Packed {
            codes: zero_codes,
            is_swapped: true,
            is_signed: false,
            offset: ZeroOffset::Modular,
        };
        let recipe = Recipe { group_index: Some(3), zero_point, ..with_scale(plain(codes, rows, 96), of) };
        add("groups by index", recipe);
    }
    add("no rows", plain(rows_of(4, 16), 0, 16));
    add("one number", plain(rows_of(4, 1), 1, 1));
    all
}

/// Codes minus a constant, times F16 scales of 16 columns.
fn plain(codes: Codes, rows: u64, cols: u64) -> Recipe {
    Recipe {
        batch: 1,
        rows,
        cols,
        codes,
        first_row: 0,
        first_col: 0,
        element: Element::Unsigned,
        zero_point: ZeroPoint::Constant(1 << (codes.bits() - 1)),
        scale: Some(Scale { grid: grid(Number::F16, rows, cols, 1, 16), global: None }),
        factor: None,
        bias: None,
        fold: None,
        group_index: None,
        is_column_major: false,
    }
}

fn with_scale(recipe: Recipe, grid: Grid) -> Recipe {
    Recipe { scale: Some(Scale { grid, global: None }), ..recipe }
}

/// As files have it that hold the columns' codes one behind the other: the scales lie so too.
fn k_major(codes: Codes, rows: u64, cols: u64, cols_per_group: u32) -> Recipe {
    let of = Grid { row_stride: 1, col_stride: rows, ..grid(Number::F16, rows, cols, 1, cols_per_group) };
    Recipe { is_column_major: true, ..with_scale(plain(codes, rows, cols), of) }
}

fn chunks(bits: u8, unit_bytes: u8, rows: u64, cols: u64) -> Recipe {
    let chunk_count = u64::from(unit_bytes) * 8 / u64::from(bits);
    plain(Codes::RowChunks { bits, unit_bytes, unit_rows: rows.div_ceil(chunk_count) }, rows, cols)
}

/// Rows of 80 codes in 5 groups, with packed zero-points.
fn packed(
    codes: Codes,
    is_swapped: bool,
    is_signed: bool,
    offset: ZeroOffset,
    bits: u8,
    rows: u64,
) -> Recipe {
    let zero_point = ZeroPoint::Packed { codes, is_swapped, is_signed, offset };
    Recipe { zero_point, ..plain(Codes::Rows { bits, row_stride_bytes: 80 }, rows, 80) }
}

/// A grid whose numbers lie row after row, and matrix after matrix.
fn grid(number: Number, rows: u64, cols: u64, rows_per_group: u32, cols_per_group: u32) -> Grid {
    let row_stride = cols.div_ceil(cols_per_group.into());
    Grid {
        number,
        rows_per_group,
        cols_per_group,
        batch_stride: rows.div_ceil(rows_per_group.into()) * row_stride,
        row_stride,
        col_stride: 1,
        row_first: 0,
        col_first: 0,
        is_swizzled: false,
    }
}

/// The bytes of every tensor that a recipe reads.
fn members(recipe: &Recipe, seed: u64) -> Vec<(Role, Vec<u8>)> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut members = Vec::new();
    for role in ROLES {
        let Some(len_bytes) = recipe.source_len_bytes(role) else { continue };
        assert!(len_bytes < 1 << 24, "{role:?} of {recipe:?} contradicts the recipe");
        // Matrices of a batch are equal parts, and tensors may be longer than is read.
        let len = len_bytes.next_multiple_of(recipe.batch) as usize;
        let grid = match role {
            Role::Scale => recipe.scale.map(|scale| scale.grid),
            Role::Bias => recipe.bias,
            Role::ZeroPoint => match recipe.zero_point {
                ZeroPoint::Float(grid) => Some(grid),
                _ => None,
            },
            _ => None,
        };
        let float = match role {
            Role::Global => recipe.scale.and_then(|scale| scale.global).map(|global| global.dtype),
            Role::Fold => recipe.fold,
            Role::Table | Role::NestedTable | Role::NestedScale => Some(Dtype::F32),
            _ => match grid.map(|grid| grid.number) {
                Some(Number::F32) => Some(Dtype::F32),
                Some(Number::F16) => Some(Dtype::F16),
                Some(Number::Bf16) => Some(Dtype::Bf16),
                _ => None,
            },
        };
        let bytes = match float {
            Some(dtype) => random.floats(dtype, len),
            None if role == Role::GroupIndex => {
                random.indices(recipe.group_index.unwrap_or_default(), len / 4)
            }
            None => (0..len).map(|_| random.next() as u8).collect(),
        };
        members.push((role, bytes));
    }
    members
}

/// Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }

    /// Numbers around one of either sign; each twelfth is one of those that are easily got wrong.
    fn floats(&mut self, dtype: Dtype, len: usize) -> Vec<u8> {
        let hard = [0.0, -0.0, 1e-40, -1e-42, 6e-8, 3e-5, f32::INFINITY, f32::NAN, 3e38, f32::MIN_POSITIVE];
        let mut bytes = Vec::with_capacity(len + 4);
        while bytes.len() < len {
            let pick = self.next();
            let value = match pick % 12 {
                0 => hard[(pick / 12) as usize % hard.len()],
                _ => {
                    (self.next() as u32 as f32 / (1u64 << 31) as f32 - 1.0)
                        * [0.01, 1.0, 3.0][pick as usize % 3]
                }
            };
            match dtype {
                Dtype::F32 => bytes.extend(value.to_le_bytes()),
                Dtype::F16 => bytes.extend(f32_to_f16(value).to_le_bytes()),
                _ => bytes.extend(f32_to_bf16(value).to_le_bytes()),
            }
        }
        bytes.truncate(len);
        bytes
    }

    /// Groups, some outside.
    fn indices(&mut self, group_count: u32, count: usize) -> Vec<u8> {
        let index = |random: u64| random as i32 % (group_count as i32 + 2) - 1;
        (0..count).flat_map(|_| index(self.next() >> 20).to_le_bytes()).collect()
    }
}

const ROLES: [Role; 10] = [
    Role::Payload,
    Role::Scale,
    Role::Global,
    Role::ZeroPoint,
    Role::GroupIndex,
    Role::Bias,
    Role::Table,
    Role::NestedTable,
    Role::NestedScale,
    Role::Fold,
];
