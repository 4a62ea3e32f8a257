//! Whatever was packed comes back, and both executions agree about all bytes.

use half::{bf16, f16};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use tensorhaul_device::dequantize::{Layout, Output, Sources, dequantize, reference};
use tensorhaul_plan::Dtype;
use tensorhaul_plan::quant::{
    Codes, Element, Global, Grid, Number, Recipe, Role, Scale, ZeroOffset, ZeroPoint,
};

use crate::cases::{grid, plain};
use crate::packing::{INLINE_SCALE, pack};

const OUTPUTS: [Output; 6] = [
    Output { dtype: Dtype::F32, layout: Layout::Rows },
    Output { dtype: Dtype::F32, layout: Layout::Columns },
    Output { dtype: Dtype::F16, layout: Layout::Rows },
    Output { dtype: Dtype::F16, layout: Layout::Columns },
    Output { dtype: Dtype::Bf16, layout: Layout::Rows },
    Output { dtype: Dtype::Bf16, layout: Layout::Columns },
];

/// A matrix of numbers, `[rows][cols]`.
type Matrix = Vec<Vec<f32>>;

/// Compares both executions, all outputs and several numbers of threads with what is expected.
fn expect(recipe: &Recipe, sources: &Sources<'_>, expected: &[Matrix]) {
    let found = decode(recipe, sources, OUTPUTS[0], None);
    let flat: Vec<f32> = expected.iter().flatten().flatten().copied().collect();
    assert_eq!(found.len(), flat.len());
    for (i, (found, expected)) in found.iter().zip(&flat).enumerate() {
        let is_same = found == expected || found.is_nan() && expected.is_nan();
        assert!(is_same, "[{i}] is {found:e}, expected {expected:e}: {recipe:?}");
    }
    for output in OUTPUTS {
        let rounded = |v: &f32| match output.dtype {
            Dtype::F32 => *v,
            Dtype::F16 => f16::from_f32(*v).to_f32(),
            _ => bf16::from_f32(*v).to_f32(),
        };
        let in_order: Vec<f32> = match output.layout {
            Layout::Rows => flat.iter().map(rounded).collect(),
            Layout::Columns => expected.iter().flat_map(transposed).map(|v| rounded(&v)).collect(),
        };
        let found = decode(recipe, sources, output, None);
        let is_same =
            |(found, expected): (&f32, &f32)| found == expected || found.is_nan() && expected.is_nan();
        assert!(found.iter().zip(&in_order).all(is_same), "{output:?} of {recipe:?}");
    }
    agree(recipe, sources);
}

/// Compares the fast execution with the reference, in all bits.
fn agree(recipe: &Recipe, sources: &Sources<'_>) {
    for output in OUTPUTS {
        let expected = decode(recipe, sources, output, None);
        for thread_count in 1..=3 {
            let found = decode(recipe, sources, output, Some(thread_count));
            let is_same = |(found, expected): (&f32, &f32)| {
                found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan()
            };
            let different = found.iter().zip(&expected).position(|pair| !is_same(pair));
            assert_eq!(
                different, None,
                "first different element of {output:?}, {thread_count} threads: {recipe:?}"
            );
        }
    }
}

/// The numbers of an execution, widened again: the reference where no threads are named.
fn decode(recipe: &Recipe, sources: &Sources<'_>, output: Output, thread_count: Option<usize>) -> Vec<f32> {
    let len_bytes = recipe.target_len_bytes(output.dtype).expect("small matrices");
    let mut target = vec![0xaa; len_bytes as usize];
    match thread_count {
        None => reference::dequantize(recipe, sources, output, &mut target),
        Some(thread_count) => dequantize(recipe, sources, output, &mut target, thread_count),
    }
    match output.dtype {
        Dtype::F32 => target.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        Dtype::F16 => target.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
        _ => target.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
    }
}

fn transposed(matrix: &Matrix) -> Vec<f32> {
    (0..matrix[0].len()).flat_map(|k| matrix.iter().map(move |row| row[k])).collect()
}

/// Every layout that holds a matrix of these sizes, with `padding` more bytes a row than it needs.
fn layouts(rows: u64, cols: u64, padding: u64) -> Vec<Codes> {
    let mut layouts = vec![
        Codes::RowsHighFirst { row_stride_bytes: cols.div_ceil(2) + padding },
        Codes::RowsWithScales { row_stride_bytes: cols.div_ceil(32) * 17 + padding },
        Codes::Words { words_per_row: rows.div_ceil(8) + padding, is_interleaved: false },
        Codes::Words { words_per_row: rows.div_ceil(8), is_interleaved: true },
        Codes::RowPairs,
        Codes::RowChunks { bits: 3, unit_bytes: 4, unit_rows: rows.div_ceil(10) },
    ];
    for bits in 1..=8 {
        let row_stride_bytes = (cols * u64::from(bits)).div_ceil(8) + padding;
        layouts.push(Codes::Rows { bits, row_stride_bytes });
        let row_stride_bytes = 4 * (cols.div_ceil(32 / u64::from(bits)) + padding);
        layouts.push(Codes::RowsPadded { bits, row_stride_bytes });
        layouts.push(Codes::Columns { bits });
        layouts.push(Codes::ColumnsPadded { bits });
        if bits > 1 {
            layouts.push(Codes::ColumnPlanes { bits });
            let row_stride_bytes = 4 * (cols.div_ceil(32) * u64::from(bits) + padding);
            layouts.push(Codes::RowPlanes { bits, row_stride_bytes });
        }
        if 8 % bits == 0 {
            layouts.push(Codes::RowChunks {
                bits,
                unit_bytes: 1,
                unit_rows: rows.div_ceil(8 / u64::from(bits)),
            });
        }
    }
    if rows.is_multiple_of(4) && cols.is_multiple_of(64) {
        layouts.push(Codes::AwqFast);
    }
    layouts
}

/// Codes below `2^bits` from random bytes.
fn codes_of(random: &[u8], rows: u64, cols: u64, bits: u8) -> Vec<Vec<u8>> {
    let mut codes = random.iter().cycle().enumerate().map(|(i, byte)| {
        // Turned a little at each pass, so that rows differ.
        byte.wrapping_add(((i / random.len()) as u8).wrapping_mul(29)) & (0xff >> (8 - bits))
    });
    (0..rows).map(|_| (&mut codes).take(cols as usize).collect()).collect()
}

fn matrix(rows: u64, cols: u64, number: impl Fn(usize, usize) -> f32) -> Matrix {
    (0..rows as usize).map(|n| (0..cols as usize).map(|k| number(n, k)).collect()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn codes_of_every_layout_come_back(
        rows in 1u64..45,
        cols in 1u64..180,
        is_whole in any::<bool>(),
        padding in 0u64..3,
        random in vec(any::<u8>(), 97),
    ) {
        let (rows, cols) = if is_whole { (rows.next_multiple_of(4), cols.next_multiple_of(64)) } else { (rows, cols) };
        for layout in layouts(rows, cols, padding) {
            let codes = codes_of(&random, rows, cols, layout.bits());
            let payload = [pack(layout, &codes), pack(layout, &codes)].concat();
            let sources = Sources { payload: &payload, ..Sources::default() };
            for element in [Element::Unsigned, Element::Signed] {
                let recipe = Recipe { batch: 2, ..plain(rows, cols, layout, element) };
                prop_assert!(recipe.source_len_bytes(Role::Payload).unwrap() <= payload.len() as u64);
                let half_range = 1 << (layout.bits() - 1);
                let number = |n: usize, k: usize| match element {
                    Element::Signed => (i32::from(codes[n][k]) ^ half_range) - half_range,
                    _ => codes[n][k].into(),
                };
                let expected = matrix(rows, cols, |n, k| number(n, k) as f32);
                expect(&recipe, &sources, &[expected.clone(), expected]);
            }
        }
    }

    #[test]
    fn zero_points_of_every_form_are_subtracted(
        rows in 1u64..45,
        cols in 1u64..180,
        group_size in select(vec![1u32, 16, 32, 33, 64, 128, 500]),
        first in 0u32..20,
        bits in select(vec![2u8, 3, 4, 8]),
        random in vec(any::<u8>(), 89),
    ) {
        let (row_first, col_first) = (first % 3, first % group_size);
        let group = |k: usize| (k + col_first as usize) / group_size as usize;
        let row_group = |n: usize| (n + row_first as usize) / 3;
        let (groups, row_groups) = (group(cols as usize - 1) as u64 + 1, row_group(rows as usize - 1) as u64 + 1);
        let scales = Grid { rows_per_group: 3, cols_per_group: group_size, row_first, col_first, ..grid(Number::I8, 0, 0) };
        for payload_layout in [Codes::Columns { bits }, Codes::Rows { bits, row_stride_bytes: cols }] {
            let codes = codes_of(&random, rows, cols, bits);
            let payload = pack(payload_layout, &codes);
            let stored = codes_of(&random[7..], row_groups, groups, bits);
            let swapped: Vec<Vec<u8>> =
                (0..groups as usize).map(|g| stored.iter().map(|row| row[g]).collect()).collect();
            let word_stride = 4 * (row_groups * u64::from(bits)).div_ceil(32);
            let mut forms = vec![
                (Codes::Rows { bits, row_stride_bytes: groups }, false, ZeroOffset::Constant(0)),
                (Codes::Rows { bits, row_stride_bytes: row_groups }, true, ZeroOffset::Modular),
                (Codes::Columns { bits }, false, ZeroOffset::Modular),
                (Codes::Columns { bits }, true, ZeroOffset::Constant(-3)),
            ];
            if bits != 3 {
                forms.push((Codes::Rows { bits, row_stride_bytes: word_stride }, true, ZeroOffset::WordWise));
            }
            if bits == 4 {
                let words_per_row = row_groups.div_ceil(8);
                forms.push((Codes::Words { words_per_row, is_interleaved: true }, false, ZeroOffset::Constant(1)));
            }
            for (layout, is_swapped, offset) in forms {
                let mut packed = pack(layout, if is_swapped { &swapped } else { &stored });
                packed.resize(packed.len().next_multiple_of(4), 0);
                let is_signed = first % 2 == 1;
                let one_more = |row: usize, g: usize| match offset {
                    ZeroOffset::Constant(_) => stored[row][g],
                    ZeroOffset::Modular => (u32::from(stored[row][g]) + 1) as u8 & (0xff >> (8 - bits)),
                    // By hand: the carry into a field comes from those below it in its word.
                    _ => {
                        let first = row / (32 / usize::from(bits)) * (32 / usize::from(bits));
                        let below = (first..row).map(|row| u64::from(stored[row][g]) + 1);
                        let carry = below.fold(0, |carry, increased| (increased + carry) >> bits);
                        ((u64::from(stored[row][g]) + 1 + carry) & ((1 << bits) - 1)) as u8
                    }
                };
                let zero_point = |n: usize, k: usize| {
                    let z = i32::from(one_more(row_group(n), group(k)));
                    let z = if is_signed { (z ^ 1 << (bits - 1)) - (1 << (bits - 1)) } else { z };
                    if let ZeroOffset::Constant(offset) = offset { z + offset } else { z }
                };
                let recipe = Recipe {
                    zero_point: ZeroPoint::Packed { codes: layout, is_swapped, is_signed, offset },
                    scale: Some(Scale { grid: scales, global: None }),
                    ..plain(rows, cols, payload_layout, Element::Unsigned)
                };
                let sources =
                    Sources { payload: &payload, zero_point: &packed, scale: &[1], ..Sources::default() };
                let expected = matrix(rows, cols, |n, k| (i32::from(codes[n][k]) - zero_point(n, k)) as f32);
                expect(&recipe, &sources, &[expected]);
            }
            let recipe = Recipe {
                zero_point: ZeroPoint::Constant(5),
                ..plain(rows, cols, payload_layout, Element::Signed)
            };
            agree(&recipe, &Sources { payload: &payload, ..Sources::default() });
        }
    }

    #[test]
    fn numbers_of_every_form_are_found(
        rows in 1u64..45,
        cols in 1u64..180,
        rows_per_group in 1u32..5,
        cols_per_group in select(vec![1u32, 16, 17, 32, 128, 500]),
        first in 0u32..20,
        form in 0usize..9,
        is_column_major in any::<bool>(),
        random in vec(1u8..0x7b, 61),
    ) {
        let (row_first, col_first) = (first % rows_per_group, first % cols_per_group);
        let row_group = |n: usize| (n + row_first as usize) / rows_per_group as usize;
        let group = |k: usize| (k + col_first as usize) / cols_per_group as usize;
        let (row_groups, groups) = (row_group(rows as usize - 1) + 1, group(cols as usize - 1) + 1);
        let is_swizzled = form == 8;
        let number = [
            Number::F32, Number::F16, Number::Bf16, Number::E8m0, Number::E4m3, Number::I8,
            Number::Nested { per_scale: 3, offset: 0.25 }, Number::F16, Number::E4m3,
        ][form];
        // The seventh form lies the other way round, the eighth in tiles.
        let (row_stride, col_stride) = match form {
            7 => (1, row_groups),
            8 => (groups.next_multiple_of(4), 1),
            _ => (groups, 1),
        };
        let len = if is_swizzled { row_groups.next_multiple_of(128) * row_stride } else { row_groups * groups };
        let byte = |i: usize| random[(i * 7 + i / 61) % 61];
        let index = |r: usize, c: usize| match is_swizzled {
            // As a reshape: [tiles down, 4, 32 rows, tiles across, 4] to [tiles down, tiles across, 32 rows, 4, 4].
            true => {
                let (down, four, r32, across, c4) = (r / 128, r % 128 / 32, r % 32, c / 4, c % 4);
                (((down * (row_stride / 4) + across) * 32 + r32) * 4 + four) * 4 + c4
            }
            false => r * row_stride + c * col_stride,
        };
        let e4m3 = |code: u8| match (code >> 3, f32::from(code & 7)) {
            (0, m) => m * 2f32.powi(-9),
            (e, m) => (8.0 + m) * 2f32.powi(i32::from(e) - 10),
        };
        let nested_table: Vec<f32> = (0..256u16).map(|i| f32::from(i) / 7.0).collect();
        let nested_scale: Vec<f32> = (0..len.div_ceil(3)).map(|i| 1.0 / (1.0 + i as f32)).collect();
        let value = |i: usize| match number {
            Number::F32 => f32::from(byte(i)) / 3.0,
            Number::F16 => f16::from_f32(f32::from(byte(i)) / 3.0).to_f32(),
            Number::Bf16 => bf16::from_f32(f32::from(byte(i)) / 3.0).to_f32(),
            Number::E8m0 => 2f32.powi(i32::from(byte(i)) - 127),
            Number::E4m3 => e4m3(byte(i)),
            Number::I8 => f32::from(byte(i)) - 128.0,
            _ => nested_table[usize::from(byte(i))] * nested_scale[i / 3] + 0.25,
        };
        let bytes: Vec<u8> = (0..len).flat_map(|i| match number {
            Number::F32 => value(i).to_le_bytes().to_vec(),
            Number::F16 => f16::from_f32(value(i)).to_le_bytes().to_vec(),
            Number::Bf16 => bf16::from_f32(value(i)).to_le_bytes().to_vec(),
            Number::I8 => vec![(value(i) as i8) as u8],
            _ => vec![byte(i)],
        }).collect();
        let floats = |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
        let (nested_table_bytes, nested_scale_bytes) = (floats(&nested_table), floats(&nested_scale));
        let layout = match is_column_major {
            true => Codes::Columns { bits: 5 },
            false => Codes::Rows { bits: 5, row_stride_bytes: (5 * cols).div_ceil(8) },
        };
        let codes = codes_of(&random, rows, cols, 5);
        let payload = pack(layout, &codes);
        let all = Grid {
            number, rows_per_group, cols_per_group, batch_stride: 0, row_stride: row_stride as u64,
            col_stride: col_stride as u64, row_first, col_first, is_swizzled,
        };
        let sources = Sources {
            payload: &payload, scale: &bytes, bias: &bytes, zero_point: &bytes,
            nested_table: &nested_table_bytes, nested_scale: &nested_scale_bytes,
            global: &1.7f32.to_le_bytes(), fold: &floats(&[0.3; 180]), ..Sources::default()
        };
        let plain = plain(rows, cols, layout, Element::Unsigned);
        let code = |n: usize, k: usize| f32::from(codes[n][k]);
        let number = |n: usize, k: usize| value(index(row_group(n), group(k)));

        let scale = Some(Scale { grid: all, global: None });
        let scaled = Recipe { scale, ..plain.clone() };
        expect(&scaled, &sources, &[matrix(rows, cols, |n, k| code(n, k) * number(n, k))]);
        for is_divisor in [false, true] {
            let global = Some(Global { dtype: Dtype::F32, is_divisor, batch_stride: 0 });
            let recipe = Recipe { scale: Some(Scale { grid: all, global }), ..plain.clone() };
            let number = |n, k| if is_divisor { number(n, k) / 1.7 } else { number(n, k) * 1.7 };
            expect(&recipe, &sources, &[matrix(rows, cols, |n, k| code(n, k) * number(n, k))]);
        }
        let everything = Recipe {
            zero_point: ZeroPoint::Float(all),
            scale,
            factor: Some(0.7),
            bias: Some(all),
            fold: Some(Dtype::F32),
            ..plain
        };
        expect(&everything, &sources, &[matrix(rows, cols, |n, k| {
            let number = number(n, k);
            ((code(n, k) - number) * number * 0.7 + number) * 0.3
        })]);
    }

    #[test]
    fn columns_follow_their_group_index(
        rows in 1u64..45,
        cols in 1u64..180,
        is_column_major in any::<bool>(),
        index in vec(0u32..9, 180),
        random in vec(any::<u8>(), 61),
    ) {
        // Seven groups: 7 and 8 are outside, and so is -1.
        let layout = match is_column_major {
            true => Codes::Columns { bits: 4 },
            false => Codes::Rows { bits: 4, row_stride_bytes: cols.div_ceil(2) },
        };
        let codes = codes_of(&random, rows, cols, 4);
        let payload = pack(layout, &codes);
        let stored = |k: usize| if index[k] == 8 { u32::MAX } else { index[k] };
        let group_index: Vec<u8> = (0..cols as usize).flat_map(|k| stored(k).to_le_bytes()).collect();
        let scale: Vec<u8> = (0..7 * rows).map(|i| random[i as usize % 61] & 0x3f).collect();
        let recipe = Recipe {
            scale: Some(Scale { grid: grid(Number::I8, 1, rows), global: None }),
            group_index: Some(7),
            ..plain(rows, cols, layout, Element::Unsigned)
        };
        let sources = Sources { payload: &payload, scale: &scale, group_index: &group_index, ..Sources::default() };
        let expected = matrix(rows, cols, |n, k| {
            let g = index[k].min(6) as usize;
            f32::from(codes[n][k]) * f32::from(scale[g * rows as usize + n])
        });
        expect(&recipe, &sources, &[expected]);
    }

    /// Any bytes, any scales: NaN, infinities and subnormal numbers among them.
    #[test]
    fn both_executions_agree_about_random_bytes(
        rows in 1u64..300,
        cols in 1u64..700,
        batch in 1u64..3,
        choice in 0usize..64,
        number in select(vec![Number::F32, Number::F16, Number::Bf16, Number::E8m0, Number::E4m3]),
        group_size in select(vec![16u32, 32, 33, 128, 4096]),
        random in vec(any::<u8>(), 211),
    ) {
        let layouts = layouts(rows, cols, choice as u64 % 3);
        let codes = layouts[choice % layouts.len()];
        let element = match codes.bits() {
            4 => select_of(&[Element::E2m1, Element::Table, Element::Unsigned], choice),
            6 => select_of(&[Element::E2m3, Element::E3m2, Element::Signed], choice),
            8 => select_of(&[Element::E4m3, Element::E5m2, Element::E4m3Fnuz, Element::E5m2Fnuz, Element::E8m0], choice),
            _ => Element::Signed,
        };
        let groups = cols.div_ceil(group_size.into());
        let grid = Grid { cols_per_group: group_size, batch_stride: rows * groups, ..grid(number, groups, 1) };
        let recipe = Recipe {
            batch,
            scale: Some(Scale { grid, global: None }),
            bias: (choice % 4 == 0).then_some(grid),
            ..plain(rows, cols, codes, element)
        };
        let bytes_of = |role| {
            let len_bytes = recipe.source_len_bytes(role).unwrap_or(0) as usize;
            (0..len_bytes).map(|i| random[i % 211].wrapping_mul((i / 211) as u8 | 1)).collect::<Vec<u8>>()
        };
        let [payload, scale, bias, table] = [Role::Payload, Role::Scale, Role::Bias, Role::Table].map(bytes_of);
        let sources = Sources { payload: &payload, scale: &scale, bias: &bias, table: &table, ..Sources::default() };
        agree(&recipe, &sources);
    }
}

fn select_of(elements: &[Element], choice: usize) -> Element {
    elements[choice % elements.len()]
}

/// Matrices of several units for each thread: long rows, one very long row, many rows.
#[test]
fn both_executions_agree_across_the_borders_of_units_and_tiles() {
    for (rows, cols) in [(3, 70_000), (1, 140_001), (1300, 130), (257, 4097)] {
        for codes in [
            Codes::Rows { bits: 4, row_stride_bytes: cols / 2 + 1 },
            Codes::RowsHighFirst { row_stride_bytes: cols / 2 + 1 },
            Codes::Rows { bits: 3, row_stride_bytes: cols },
            Codes::Columns { bits: 4 },
            Codes::Words { words_per_row: rows / 8 + 1, is_interleaved: true },
        ] {
            let groups = cols.div_ceil(48);
            let grid = Grid { cols_per_group: 48, ..grid(Number::E8m0, groups, 1) };
            let scale = Some(Scale { grid, global: None });
            let recipe = Recipe { scale, ..plain(rows, cols, codes, Element::Unsigned) };
            let bytes_of = |role| {
                let len_bytes = recipe.source_len_bytes(role).unwrap();
                (0..len_bytes).map(|i| ((i * 0x9e37_79b9) >> 13) as u8).collect::<Vec<u8>>()
            };
            let (payload, scale) = (bytes_of(Role::Payload), bytes_of(Role::Scale));
            let sources = Sources { payload: &payload, scale: &scale, ..Sources::default() };
            for output in [OUTPUTS[4], OUTPUTS[5]] {
                let expected = decode(&recipe, &sources, output, None);
                let same = |found: Vec<f32>| {
                    found.iter().zip(&expected).all(|(found, expected)| {
                        found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan()
                    })
                };
                for thread_count in [1, 3] {
                    let found = decode(&recipe, &sources, output, Some(thread_count));
                    assert!(same(found), "{rows} x {cols}, {codes:?}, {output:?}, {thread_count} threads");
                }
            }
        }
    }
}

#[test]
fn inline_scales_are_read_with_their_codes() {
    let codes: Vec<Vec<u8>> = (0..3).map(|n| (0..70).map(|k| (k * 5 + n) as u8 & 0xf).collect()).collect();
    let layout = Codes::RowsWithScales { row_stride_bytes: 51 };
    let payload = pack(layout, &codes);
    let grid = Grid { cols_per_group: 32, ..grid(Number::SignedExponent, 51, 17) };
    let recipe =
        Recipe { scale: Some(Scale { grid, global: None }), ..plain(3, 70, layout, Element::Unsigned) };
    let factor = 2f32.powi(INLINE_SCALE.into());
    let expected = matrix(3, 70, |n, k| f32::from(codes[n][k]) * factor);
    expect(&recipe, &Sources { payload: &payload, ..Sources::default() }, &[expected]);
}

#[test]
fn every_code_of_every_float_is_its_number() {
    // Exponent bits, mantissa bits, bias.
    let kinds = [
        (Element::E2m1, 2, 1, 1),
        (Element::E2m3, 2, 3, 1),
        (Element::E3m2, 3, 2, 3),
        (Element::E4m3, 4, 3, 7),
        (Element::E5m2, 5, 2, 15),
        (Element::E4m3Fnuz, 4, 3, 8),
        (Element::E5m2Fnuz, 5, 2, 16),
    ];
    for (element, exponent_bits, mantissa_bits, bias) in kinds {
        let bits = 1 + exponent_bits + mantissa_bits;
        let value = |code: usize| {
            let is_fnuz = matches!(element, Element::E4m3Fnuz | Element::E5m2Fnuz);
            let (magnitude, is_negative) = (code & ((1 << (bits - 1)) - 1), code >> (bits - 1) == 1);
            let special = match element {
                Element::E4m3 if magnitude == 0x7f => Some(f32::NAN),
                Element::E5m2 if magnitude == 0x7c => Some(f32::INFINITY),
                Element::E5m2 if magnitude > 0x7c => Some(f32::NAN),
                _ if is_fnuz && code == 0x80 => Some(f32::NAN),
                _ => None,
            };
            let (exponent, mantissa) = (magnitude >> mantissa_bits, magnitude % (1 << mantissa_bits));
            let whole = if exponent == 0 { mantissa } else { mantissa + (1 << mantissa_bits) };
            let finite = whole as f32 * 2f32.powi(exponent.max(1) as i32 - bias - mantissa_bits);
            special.unwrap_or(finite) * if is_negative { -1.0 } else { 1.0 }
        };
        all_codes(element, bits as u8, value);
    }
    assert_eq!(all_codes(Element::E2m1, 4, |code| E2M1[code]), 16);
    all_codes(Element::E8m0, 8, |code| match code {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits((code as u32) << 23),
    });
}

const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Decodes each code once, alone and in columns, and returns how many there are.
fn all_codes(element: Element, bits: u8, value: impl Fn(usize) -> f32) -> usize {
    let count = 1usize << bits;
    let codes = vec![(0..count).map(|code| code as u8).collect::<Vec<u8>>()];
    let row_stride_bytes = (count * usize::from(bits) / 8) as u64;
    for layout in [Codes::Rows { bits, row_stride_bytes }, Codes::Columns { bits }] {
        let payload = pack(layout, &codes);
        let recipe = plain(1, count as u64, layout, element);
        let sources = Sources { payload: &payload, ..Sources::default() };
        expect(&recipe, &sources, &[matrix(1, count as u64, |_, k| value(k))]);
    }
    count
}

#[test]
#[should_panic(expected = "Payload has 34 bytes, the recipe reads 35")]
fn a_payload_that_is_too_short_is_refused() {
    let recipe = plain(5, 14, Codes::Rows { bits: 4, row_stride_bytes: 7 }, Element::Unsigned);
    let sources = Sources { payload: &[0; 34], ..Sources::default() };
    dequantize(&recipe, &sources, OUTPUTS[0], &mut [0; 280], 1);
}

#[test]
fn nothing_is_written_for_no_elements() {
    let recipe = plain(0, 14, Codes::Rows { bits: 4, row_stride_bytes: 7 }, Element::Unsigned);
    dequantize(&recipe, &Sources::default(), OUTPUTS[0], &mut [], 4);
    reference::dequantize(&recipe, &Sources::default(), OUTPUTS[0], &mut []);
}
