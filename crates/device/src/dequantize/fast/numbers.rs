//! Scales, zero-points and biases of a line of codes, as F32.

use tensorhaul_plan::quant::{Codes, Grid, Number, Recipe, Role, Scale, ZeroOffset, ZeroPoint};

use super::unpack::{Packed, has_column_lines};
use crate::dequantize::Sources;
use crate::dequantize::reference::{
    float, grid_index, group_counts, mask, matrix, row_group, sign_extended, stored_number,
};
use crate::float::{bf16_to_f32, f16_to_f32};

/// One kind of number that codes are combined with: where it lies, and which columns share it.
pub(super) struct Numbers<'a> {
    stored: Stored<'a>,
    grid: Grid,
    recipe: &'a Recipe,
    sources: &'a Sources<'a>,
}

enum Stored<'a> {
    Grid {
        bytes: &'a [u8],
        /// The number that each byte stands for, where a number has one byte.
        of_bytes: Box<[f32; 256]>,
        scale: Option<Scale>,
    },
    ZeroPoints {
        codes: Codes,
        is_swapped: bool,
        of_codes: Box<[f32; 256]>,
        is_word_wise: bool,
    },
}

/// Numbers along one line, or down a strip of lines.
#[derive(Clone, Copy)]
pub(super) enum Line {
    /// Those of row `n`, for groups of columns from `first` on.
    Row { n: usize, first: usize },
    /// Those of a group of columns, for rows from `first` on.
    Group { g: usize, first: usize },
}

impl<'a> Numbers<'a> {
    pub(super) fn of_scale(recipe: &'a Recipe, sources: &'a Sources<'a>, scale: Scale) -> Numbers<'a> {
        let is_inline = scale.grid.number == Number::SignedExponent;
        let bytes = if is_inline { sources.payload } else { sources.scale };
        Numbers {
            stored: Stored::grid(scale.grid, bytes, Some(scale), sources),
            grid: scale.grid,
            recipe,
            sources,
        }
    }

    pub(super) fn of_grid(
        recipe: &'a Recipe,
        sources: &'a Sources<'a>,
        grid: Grid,
        role: Role,
    ) -> Numbers<'a> {
        Numbers { stored: Stored::grid(grid, sources.of(role), None, sources), grid, recipe, sources }
    }

    /// Returns packed zero-points, `None` where there are none.
    pub(super) fn of_zero_points(recipe: &'a Recipe, sources: &'a Sources<'a>) -> Option<Numbers<'a>> {
        let ZeroPoint::Packed { codes, is_swapped, is_signed, offset } = recipe.zero_point else {
            return None;
        };
        let bits = codes.bits();
        let of_code = |code: usize| {
            let code = match offset {
                ZeroOffset::Modular => (code as u8).wrapping_add(1) & mask(bits.into()),
                _ => code as u8,
            };
            let stored = if is_signed { sign_extended(code, bits) } else { code.into() };
            match offset {
                ZeroOffset::Constant(offset) => (stored + offset) as f32,
                _ => stored as f32,
            }
        };
        let of_codes = Box::new(std::array::from_fn(of_code));
        let is_word_wise = offset == ZeroOffset::WordWise;
        let stored = Stored::ZeroPoints { codes, is_swapped, of_codes, is_word_wise };
        Some(Numbers { stored, grid: recipe.scale?.grid, recipe, sources })
    }

    /// Returns the group of a column, where the recipe has no group index.
    pub(super) fn group(&self, k: usize) -> usize {
        (k + self.grid.col_first as usize) / self.grid.cols_per_group as usize
    }

    /// Returns the columns of a group.
    pub(super) fn cols_per_group(&self) -> usize {
        self.grid.cols_per_group as usize
    }

    /// Returns the column behind the last one of a group.
    pub(super) fn group_end(&self, g: usize) -> usize {
        (g + 1).saturating_mul(self.grid.cols_per_group as usize) - self.grid.col_first as usize
    }

    /// Fills `numbers` with those of a line of matrix `e`. Needs `codes` as room for as many bytes.
    #[inline(always)]
    pub(super) fn line(&self, e: usize, line: Line, numbers: &mut [f32], codes: &mut Vec<u8>) {
        match &self.stored {
            Stored::Grid { bytes, of_bytes, scale } => {
                self.grid_line(bytes, of_bytes, e, line, numbers);
                if let Some(scale) = scale {
                    self.take_in_global(scale, e, numbers);
                }
            }
            Stored::ZeroPoints { codes: layout, is_swapped, of_codes, is_word_wise } => {
                codes.resize(numbers.len(), 0);
                self.zero_point_line(*layout, *is_swapped, *is_word_wise, e, line, codes);
                for (number, code) in numbers.iter_mut().zip(&*codes) {
                    *number = of_codes[usize::from(*code)];
                }
            }
        }
    }

    #[inline(always)]
    fn grid_line(&self, bytes: &[u8], of_bytes: &[f32; 256], e: usize, line: Line, numbers: &mut [f32]) {
        let grid = &self.grid;
        let index = |n: usize, g: usize| grid_index(grid, e as u64, n as u64, g as u64) as usize;
        let (first, stride) = match line {
            _ if grid.is_swizzled => return self.one_by_one(bytes, index, line, numbers),
            Line::Row { n, first } => (index(n, first), grid.col_stride as usize),
            Line::Group { .. } if grid.rows_per_group > 1 => {
                return self.one_by_one(bytes, index, line, numbers);
            }
            Line::Group { g, first } => (index(first, g), grid.row_stride as usize),
        };
        match grid.number {
            Number::F32 => strided(bytes, first, stride, numbers, f32::from_le_bytes),
            Number::F16 => {
                strided(bytes, first, stride, numbers, |code| f16_to_f32(u16::from_le_bytes(code)))
            }
            Number::Bf16 => {
                strided(bytes, first, stride, numbers, |code| bf16_to_f32(u16::from_le_bytes(code)))
            }
            Number::Nested { .. } => self.one_by_one(bytes, index, line, numbers),
            _ => strided(bytes, first, stride, numbers, |[byte]| of_bytes[usize::from(byte)]),
        }
    }

    fn one_by_one(
        &self,
        bytes: &[u8],
        index: impl Fn(usize, usize) -> usize,
        line: Line,
        numbers: &mut [f32],
    ) {
        for (i, number) in numbers.iter_mut().enumerate() {
            let index = match line {
                Line::Row { n, first } => index(n, first + i),
                Line::Group { g, first } => index(first + i, g),
            };
            *number = stored_number(self.grid.number, bytes, self.sources, index as u64);
        }
    }

    #[inline(always)]
    fn take_in_global(&self, scale: &Scale, e: usize, numbers: &mut [f32]) {
        let Some(global) = scale.global else { return };
        let of_all = float(global.dtype, self.sources.global, e as u64 * global.batch_stride);
        match global.is_divisor {
            true => numbers.iter_mut().for_each(|number| *number /= of_all),
            false => numbers.iter_mut().for_each(|number| *number *= of_all),
        }
    }

    /// Zero-points lie as codes do, with groups for rows and columns. Their lines are the codes' lines for every format
    /// that is known: then neighbours are unpacked together.
    #[inline(always)]
    fn zero_point_line(
        &self,
        layout: Codes,
        is_swapped: bool,
        is_word_wise: bool,
        e: usize,
        line: Line,
        codes: &mut [u8],
    ) {
        let (row_groups, col_groups) = group_counts(self.recipe, &self.grid);
        let (rows, cols) = if is_swapped { (col_groups, row_groups) } else { (row_groups, col_groups) };
        let bytes = matrix(self.sources.zero_point, self.recipe.batch, e as u64);
        let packed = Packed {
            codes: layout,
            rows: rows as usize,
            cols: cols as usize,
            first_row: 0,
            first_col: 0,
            bytes,
        };
        let row_group = |n: usize| row_group(&self.grid, n as u64) as usize;
        let is_along_rows = matches!(line, Line::Row { .. }) != is_swapped;
        if is_along_rows != has_column_lines(layout)
            && (self.grid.rows_per_group == 1 || matches!(line, Line::Row { .. }))
        {
            let (line, first) = match line {
                Line::Row { n, first } => (row_group(n), first),
                Line::Group { g, first } => (g, row_group(first)),
            };
            return match is_word_wise {
                true => increased_line(packed, line, first, codes),
                false => packed.line(line, first, codes),
            };
        }
        for (i, code) in codes.iter_mut().enumerate() {
            let (row_group, col_group) = match line {
                Line::Row { n, first } => (row_group(n), first + i),
                Line::Group { g, first } => (row_group(first + i), g),
            };
            let (n, k) = if is_swapped { (col_group, row_group) } else { (row_group, col_group) };
            let (line, first) = if has_column_lines(layout) { (k, n) } else { (n, k) };
            let code = std::slice::from_mut(code);
            match is_word_wise {
                true => increased_line(packed, line, first, code),
                false => packed.line(line, first, code),
            }
        }
    }
}

impl<'a> Stored<'a> {
    fn grid(grid: Grid, bytes: &'a [u8], scale: Option<Scale>, sources: &Sources<'_>) -> Stored<'a> {
        let all: [u8; 256] = std::array::from_fn(|byte| byte as u8);
        let of_byte = |byte: usize| match grid.number {
            Number::E8m0 | Number::E4m3 | Number::I8 | Number::SignedExponent => {
                stored_number(grid.number, &all, sources, byte as u64)
            }
            _ => 0.0, // Not read: other numbers have more bytes, or need their index too.
        };
        Stored::Grid { bytes, of_bytes: Box::new(std::array::from_fn(of_byte)), scale }
    }
}

/// Numbers at equal distances.
#[inline(always)]
fn strided<const B: usize>(
    bytes: &[u8],
    first: usize,
    stride: usize,
    numbers: &mut [f32],
    decode: impl Fn([u8; B]) -> f32,
) {
    let stored = &bytes.as_chunks::<B>().0[first..];
    match stride {
        0 => numbers.fill(decode(stored[0])),
        1 => numbers.iter_mut().zip(stored).for_each(|(number, bytes)| *number = decode(*bytes)),
        _ => numbers
            .iter_mut()
            .zip(stored.iter().step_by(stride))
            .for_each(|(number, bytes)| *number = decode(*bytes)),
    }
}

/// A part of a row whose every word is first increased by one in every field.
#[inline(always)]
fn increased_line(packed: Packed<'_>, line: usize, first: usize, codes: &mut [u8]) {
    let Codes::Rows { bits, row_stride_bytes } = packed.codes else {
        unreachable!("only rows of whole words are increased word by word")
    };
    let ones = u32::MAX / u32::from(mask(bits.into()));
    let per_word = 32 / usize::from(bits);
    let words = packed.bytes[line * row_stride_bytes as usize..].as_chunks::<4>().0;
    let (mut first, mut codes) = (first, codes);
    while !codes.is_empty() {
        let (part, rest) = codes.split_at_mut((per_word - first % per_word).min(codes.len()));
        let word = u32::from_le_bytes(words[first / per_word]).wrapping_add(ones);
        for (code, i) in part.iter_mut().zip(first % per_word..) {
            *code = (word >> (usize::from(bits) * i)) as u8 & mask(bits.into());
        }
        (first, codes) = (first + part.len(), rest);
    }
}
