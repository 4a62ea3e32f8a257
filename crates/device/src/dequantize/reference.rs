//! The execution of a recipe that is written to be read: one number at a time, each step in the recipe's order.
//!
//! ```text
//! v = element(code)
//! v = v - zero_point[n, g]
//! v = v * s                         s = scale[n, g], or scale * global, or scale / global
//! v = v * factor
//! v = v + bias[n, g]
//! v = v * fold[k]
//! ```
//!
//! and one rounding to the output's dtype.

use tensorhaul_plan::Dtype;
use tensorhaul_plan::quant::{Codes, Element, Grid, Number, Recipe, Scale, ZeroOffset, ZeroPoint};

use super::{Layout, Output, Sources, check};
use crate::float::{bf16_to_f32, f8_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};

/// Writes a quantized tensor's numbers, one by one: tens of times slower than [`dequantize`](super::dequantize).
///
/// # Panics
/// As [`dequantize`](super::dequantize).
pub fn dequantize(recipe: &Recipe, sources: &Sources<'_>, output: Output, target: &mut [u8]) {
    check(recipe, sources, output, target);
    let mut elements = target.chunks_exact_mut(output.dtype.bits() as usize / 8);
    let (outer, inner) = match output.layout {
        Layout::Rows => (recipe.rows, recipe.cols),
        Layout::Columns => (recipe.cols, recipe.rows),
    };
    for e in 0..recipe.batch {
        for i in 0..outer {
            for j in 0..inner {
                let (n, k) = if output.layout == Layout::Rows { (i, j) } else { (j, i) };
                let element = elements.next().expect("the target is as long as the result");
                round(value(recipe, sources, Index { e, n, k }), output.dtype, element);
            }
        }
    }
}

/// Which number: matrix, row, column.
#[derive(Clone, Copy)]
struct Index {
    e: u64,
    n: u64,
    k: u64,
}

fn value(recipe: &Recipe, sources: &Sources<'_>, at: Index) -> f32 {
    let code = code(recipe, sources, at);
    let mut v = match recipe.zero_point {
        ZeroPoint::Constant(zero_point) => (integer(recipe, code) - zero_point) as f32,
        ZeroPoint::Packed { .. } => (integer(recipe, code) - zero_point(recipe, sources, at)) as f32,
        ZeroPoint::None => element(recipe.element, recipe.codes.bits(), code, sources.table),
        ZeroPoint::Float(grid) => {
            element(recipe.element, recipe.codes.bits(), code, sources.table)
                - number(recipe, &grid, sources.zero_point, sources, at)
        }
        zero_point => unreachable!("{zero_point:?} is not known here"),
    };
    if let Some(scale) = &recipe.scale {
        v *= scale_of(recipe, scale, sources, at);
    }
    if let Some(factor) = recipe.factor {
        v *= factor;
    }
    if let Some(grid) = &recipe.bias {
        v += number(recipe, grid, sources.bias, sources, at);
    }
    if let Some(dtype) = recipe.fold {
        v *= float(dtype, sources.fold, at.k);
    }
    v
}

fn round(value: f32, dtype: Dtype, element: &mut [u8]) {
    match dtype {
        Dtype::F32 => element.copy_from_slice(&value.to_le_bytes()),
        Dtype::F16 => element.copy_from_slice(&f32_to_f16(value).to_le_bytes()),
        _ => element.copy_from_slice(&f32_to_bf16(value).to_le_bytes()),
    }
}

fn code(recipe: &Recipe, sources: &Sources<'_>, at: Index) -> u8 {
    let payload = matrix(sources.payload, recipe.batch, at.e);
    let (rows, cols) = recipe.codes_size();
    let (n, k) = (at.n + u64::from(recipe.first_row), at.k + u64::from(recipe.first_col));
    code_at(recipe.codes, rows, cols, payload, n, k)
}

/// The bytes of matrix `e` of the batch.
pub(super) fn matrix(bytes: &[u8], batch: u64, e: u64) -> &[u8] {
    let stride_bytes = bytes.len() as u64 / batch;
    &bytes[(e * stride_bytes) as usize..][..stride_bytes as usize]
}

/// The code of row `n` and column `k` of a matrix of `rows` by `cols`.
///
/// A matrix is one stream of bits, bit `i` in byte `i / 8` at place `i % 8`; as all words are little-endian, that is bit
/// `i % 32` of the 32-bit word `i / 32` too. For most layouts a code is a field of that stream:
///
/// ```text
/// Rows, 3 bits          byte 0            byte 1            byte 2
///                       7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
///                       2 2 1 1 1 0 0 0   5 4 4 4 3 3 3 2   7 7 7 6 6 6 5 5     (k of each bit)
/// RowsHighFirst         |- 0 -| |- 1 -|   |- 2 -| |- 3 -|
/// RowsPadded, 3 bits    word: 2 bits unused, then k = 9, 8, .. 1, 0 from the top
/// RowsWithScales        byte 0: scale; bytes 1 to 16: k = 0..32, low nibble first; byte 17: the next scale
/// Words                 word of column k, rows 8c..8c+8, nibbles from the top: 7 6 5 4 3 2 1 0, interleaved 7 5 3 1 6 4 2 0
/// RowPairs              byte of column k, rows 2i, 2i+1: |- 2i+1 -| |- 2i -|
/// RowChunks, 2 bits     byte of column k, row u of 4 chunks of U rows: |u| |U+u| |2U+u| |3U+u|
/// ```
pub(super) fn code_at(codes: Codes, rows: u64, cols: u64, matrix: &[u8], n: u64, k: u64) -> u8 {
    let bits = u64::from(codes.bits());
    let first_bit = match codes {
        Codes::Rows { row_stride_bytes, .. } => 8 * n * row_stride_bytes + bits * k,
        Codes::RowsHighFirst { row_stride_bytes } => 8 * (n * row_stride_bytes + k / 2) + 4 * (1 - k % 2),
        Codes::RowsPadded { row_stride_bytes, .. } => {
            let per_word = 32 / bits;
            8 * n * row_stride_bytes + 32 * (k / per_word) + bits * (k % per_word)
        }
        Codes::RowsWithScales { row_stride_bytes } => {
            8 * (n * row_stride_bytes + 17 * (k / 32) + 1) + 4 * (k % 32)
        }
        Codes::Columns { .. } => return code_in_column(rows, matrix, n, k, bits),
        Codes::ColumnPlanes { .. } => {
            return code_in_planes(matrix, k, bits, |word| 32 * (word * rows + n));
        }
        Codes::RowPlanes { row_stride_bytes, .. } => {
            return code_in_planes(matrix, k, bits, |word| 8 * n * row_stride_bytes + 32 * word);
        }
        Codes::ColumnsPadded { .. } => {
            let per_word = 32 / bits;
            32 * (k / per_word * rows + n) + bits * (k % per_word)
        }
        Codes::Words { words_per_row, is_interleaved } => {
            let nibble = if is_interleaved { AWQ_NIBBLES[n as usize % 8] } else { n % 8 };
            32 * (k * words_per_row + n / 8) + 4 * nibble
        }
        Codes::RowPairs => 8 * (n / 2 * cols + k) + 4 * (n % 2),
        Codes::RowChunks { unit_bytes, unit_rows, .. } => {
            let unit_bits = 8 * u64::from(unit_bytes);
            let (chunk, row) = (n / unit_rows, n % unit_rows);
            unit_bits * (row * cols + k) + bits * (unit_bits / bits - 1 - chunk)
        }
        Codes::AwqFast => {
            // 4 rows by 64 columns are 256 nibbles, one row's behind the other's; words have 16 bits.
            let (r, k64) = (n % 4, k % 64);
            let place = 32 * (k64 / 32) + k64 / 2 % 4 * 8 + k64 % 2 * 4 + k64 % 32 / 8;
            16 * (n / 4 * cols + k / 64 * 64) + 4 * (64 * r + place)
        }
        codes => unreachable!("{codes:?} is not known here"),
    };
    field(matrix, first_bit, bits)
}

/// Column `n` of the words `[.., rows]` is a stream of codes. One that straddles begins at the end of a word, and goes on at
/// the start of the one below:
///
/// ```text
/// 3 bits, words of a column        31 30 29 ..  5 4 3 2 1 0
///                       word 0     10 10  9 ..  1 1 1 0 0 0      (k of each bit)
///                       word 1     21 20 20 .. 12 .. 11 10
/// ```
fn code_in_column(rows: u64, matrix: &[u8], n: u64, k: u64, bits: u64) -> u8 {
    let (word, first_bit) = (bits * k / 32, bits * k % 32);
    let low_bits = bits.min(32 - first_bit);
    let low = field(matrix, 32 * (word * rows + n) + first_bit, low_bits);
    if low_bits == bits {
        return low;
    }
    low | field(matrix, 32 * ((word + 1) * rows + n), bits - low_bits) << low_bits
}

/// A code's bits lie in planes, each `width` words of 32 codes, which lie in a column or in a row:
///
/// ```text
/// 3 bits: plane of 2 bits    word 0: codes 0 to 15, word 1: codes 16 to 31
///         plane of 1 bit     word 2: codes 0 to 31, the codes' highest bits
/// ```
fn code_in_planes(matrix: &[u8], k: u64, bits: u64, first_bit_of: impl Fn(u64) -> u64) -> u8 {
    let (block, j) = (k / 32, k % 32);
    let (mut code, mut done_bits) = (0, 0);
    for &width in plane_widths(bits) {
        let per_word = 32 / width;
        let word = block * bits + done_bits + j / per_word;
        code |= field(matrix, first_bit_of(word) + width * (j % per_word), width) << done_bits;
        done_bits += width;
    }
    code
}

/// Widths of the planes that hold codes of `bits`, the low plane first.
pub(super) fn plane_widths(bits: u64) -> &'static [u64] {
    match bits {
        2 => &[2],
        3 => &[2, 1],
        4 => &[4],
        5 => &[4, 1],
        6 => &[4, 2],
        7 => &[4, 2, 1],
        _ => &[8],
    }
}

/// `bits` bits of a stream of bytes, the first of them lowest: 1 to 8, which lie in one byte or two.
fn field(bytes: &[u8], first_bit: u64, bits: u64) -> u8 {
    let (byte, shift) = ((first_bit / 8) as usize, first_bit % 8);
    let high = if shift + bits > 8 { bytes[byte + 1] } else { 0 };
    let both = u16::from_le_bytes([bytes[byte], high]);
    (both >> shift) as u8 & mask(bits)
}

pub(super) fn mask(bits: u64) -> u8 {
    (0xff >> (8 - bits)) as u8
}

fn integer(recipe: &Recipe, code: u8) -> i32 {
    match recipe.element {
        Element::Signed => sign_extended(code, recipe.codes.bits()),
        _ => code.into(),
    }
}

pub(super) fn sign_extended(code: u8, bits: u8) -> i32 {
    let unused = 8 - bits;
    i32::from((code << unused) as i8 >> unused)
}

/// The number that a code stands for, exact in F32.
pub(super) fn element(element: Element, bits: u8, code: u8, table: &[u8]) -> f32 {
    match element {
        Element::Unsigned => code.into(),
        Element::Signed => sign_extended(code, bits) as f32,
        Element::E2m1 => small_float(code, 2, 1, 1),
        Element::E2m3 => small_float(code, 2, 3, 1),
        Element::E3m2 => small_float(code, 3, 2, 3),
        Element::E4m3 => f8_to_f32(Dtype::F8E4m3, code),
        Element::E5m2 => f8_to_f32(Dtype::F8E5m2, code),
        Element::E4m3Fnuz => f8_to_f32(Dtype::F8E4m3Fnuz, code),
        Element::E5m2Fnuz => f8_to_f32(Dtype::F8E5m2Fnuz, code),
        Element::E8m0 => f8_to_f32(Dtype::F8E8m0, code),
        Element::Table => float(Dtype::F32, table, code.into()),
        element => unreachable!("{element:?} is not known here"),
    }
}

/// A number of one sign bit, then exponent, then mantissa, all of whose codes are finite.
fn small_float(code: u8, exponent_bits: u32, mantissa_bits: u32, bias: i32) -> f32 {
    let sign = if code >> (exponent_bits + mantissa_bits) & 1 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(code >> mantissa_bits) & ((1 << exponent_bits) - 1);
    let mantissa = f32::from(code & ((1 << mantissa_bits) - 1)) / f32::from(1u8 << mantissa_bits);
    match exponent {
        0 => sign * mantissa * 2f32.powi(1 - bias),
        _ => sign * (1.0 + mantissa) * 2f32.powi(exponent - bias),
    }
}

/// The integer zero-point of a number. Zero-points are packed as codes are, in a matrix that has the groups of the scale as
/// rows and columns.
fn zero_point(recipe: &Recipe, sources: &Sources<'_>, at: Index) -> i32 {
    let (ZeroPoint::Packed { codes, is_swapped, is_signed, offset }, Some(scale)) =
        (recipe.zero_point, recipe.scale)
    else {
        unreachable!("packed zero-points are packed and have a scale")
    };
    let grid = &scale.grid;
    let (row_groups, col_groups) = group_counts(recipe, grid);
    let (row_group, col_group) = (row_group(grid, at.n), col_group(recipe, grid, sources, at.k));
    let (rows, cols, n, k) = match is_swapped {
        false => (row_groups, col_groups, row_group, col_group),
        true => (col_groups, row_groups, col_group, row_group),
    };
    let matrix = matrix(sources.zero_point, recipe.batch, at.e);
    let bits = codes.bits();
    let stored = match (offset, codes) {
        (ZeroOffset::WordWise, Codes::Rows { row_stride_bytes, .. }) => {
            field_of_increased_word(matrix, 8 * n * row_stride_bytes + u64::from(bits) * k, bits.into())
        }
        (ZeroOffset::Modular, _) => {
            code_at(codes, rows, cols, matrix, n, k).wrapping_add(1) & mask(bits.into())
        }
        _ => code_at(codes, rows, cols, matrix, n, k),
    };
    let stored = if is_signed { sign_extended(stored, bits) } else { stored.into() };
    match offset {
        ZeroOffset::Constant(offset) => stored + offset,
        _ => stored,
    }
}

/// One is added to every field of the word at once, and carries cross fields: 4 bits, 0x7777777f + 0x11111111 = 0x88888890.
fn field_of_increased_word(matrix: &[u8], first_bit: u64, bits: u64) -> u8 {
    let ones = u32::MAX / u32::from(mask(bits)); // 0x55555555, 0x11111111, 0x01010101.
    let word = u32::from_le_bytes(bytes_at(matrix, first_bit / 32)).wrapping_add(ones);
    (word >> (first_bit % 32)) as u8 & mask(bits)
}

/// The factor of a number: its scale, with the scale of scales taken in.
fn scale_of(recipe: &Recipe, scale: &Scale, sources: &Sources<'_>, at: Index) -> f32 {
    let bytes = if scale.grid.number == Number::SignedExponent { sources.payload } else { sources.scale };
    let number = number(recipe, &scale.grid, bytes, sources, at);
    match scale.global {
        None => number,
        Some(global) => {
            let of_all = float(global.dtype, sources.global, at.e * global.batch_stride);
            if global.is_divisor { number / of_all } else { number * of_all }
        }
    }
}

/// The number of a grid that belongs to `[e, n, k]`.
fn number(recipe: &Recipe, grid: &Grid, bytes: &[u8], sources: &Sources<'_>, at: Index) -> f32 {
    let group = col_group(recipe, grid, sources, at.k);
    stored_number(grid.number, bytes, sources, grid_index(grid, at.e, at.n, group))
}

/// The index of a number in its grid's tensor.
pub(super) fn grid_index(grid: &Grid, e: u64, n: u64, col_group: u64) -> u64 {
    let row_group = row_group(grid, n);
    e * grid.batch_stride
        + match grid.is_swizzled {
            false => row_group * grid.row_stride + col_group * grid.col_stride,
            true => swizzled_index(row_group, col_group, grid.row_stride),
        }
}

/// Tiles of 128 rows by 4 columns lie one behind the other, a row of tiles first. In a tile, rows 32 apart are side by side:
///
/// ```text
/// bytes 0 to 15     [0, 0..4] [32, 0..4] [64, 0..4] [96, 0..4]
/// bytes 16 to 31    [1, 0..4] [33, 0..4] [65, 0..4] [97, 0..4]
/// ```
///
/// # Source
/// NVIDIA cuBLAS, "1D block scaling factors layout".
fn swizzled_index(row: u64, col: u64, padded_cols: u64) -> u64 {
    let tile = row / 128 * (padded_cols / 4) + col / 4;
    let r = row % 128;
    512 * tile + r % 32 * 16 + r / 32 * 4 + col % 4
}

pub(super) fn row_group(grid: &Grid, n: u64) -> u64 {
    (n + u64::from(grid.row_first)) / u64::from(grid.rows_per_group)
}

fn col_group(recipe: &Recipe, grid: &Grid, sources: &Sources<'_>, k: u64) -> u64 {
    match recipe.group_index {
        None => (k + u64::from(grid.col_first)) / u64::from(grid.cols_per_group),
        Some(count) => u32::from_le_bytes(bytes_at(sources.group_index, k)).min(count - 1).into(),
    }
}

/// How many groups the rows and the columns of a matrix fall into.
pub(super) fn group_counts(recipe: &Recipe, grid: &Grid) -> (u64, u64) {
    let counted = |count: Option<u64>| count.expect("a checked recipe's groups have rows and columns");
    (counted(recipe.row_group_count(grid)), counted(recipe.col_group_count(grid)))
}

/// A number of a grid by its index in the grid's tensor.
pub(super) fn stored_number(number: Number, bytes: &[u8], sources: &Sources<'_>, index: u64) -> f32 {
    let byte = || bytes[index as usize];
    match number {
        Number::F32 => float(Dtype::F32, bytes, index),
        Number::F16 => float(Dtype::F16, bytes, index),
        Number::Bf16 => float(Dtype::Bf16, bytes, index),
        Number::E8m0 => f8_to_f32(Dtype::F8E8m0, byte()),
        Number::E4m3 => f8_to_f32(Dtype::F8E4m3, byte()),
        Number::I8 => f32::from(byte() as i8),
        Number::SignedExponent => signed_power_of_two(byte() as i8),
        Number::Nested { per_scale, offset } => {
            let entry = float(Dtype::F32, sources.nested_table, byte().into());
            entry * float(Dtype::F32, sources.nested_scale, index / u64::from(per_scale)) + offset
        }
        number => unreachable!("{number:?} is not known here"),
    }
}

/// `2^exponent`; -127 and -128 make subnormal numbers.
fn signed_power_of_two(exponent: i8) -> f32 {
    match exponent {
        -128 => f32::from_bits(1 << 21),
        -127 => f32::from_bits(1 << 22),
        _ => f32::from_bits(((i32::from(exponent) + 127) as u32) << 23),
    }
}

/// Element `index` of a tensor of F32, F16 or BF16.
pub(super) fn float(dtype: Dtype, bytes: &[u8], index: u64) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_le_bytes(bytes_at(bytes, index)),
        Dtype::F16 => f16_to_f32(u16::from_le_bytes(bytes_at(bytes, index))),
        Dtype::Bf16 => bf16_to_f32(u16::from_le_bytes(bytes_at(bytes, index))),
        dtype => unreachable!("a checked recipe has no scales of {dtype}"),
    }
}

/// The bytes of element `index` of a tensor whose elements have `B` bytes.
fn bytes_at<const B: usize>(bytes: &[u8], index: u64) -> [u8; B] {
    bytes.as_chunks::<B>().0[index as usize]
}

/// The nibble of each of 8 neighbouring rows.
pub(super) const AWQ_NIBBLES: [u64; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
