//! How many bytes a recipe reads of each tensor, and writes.

use super::{Codes, Element, Grid, Number, Recipe, Role, ZeroOffset, ZeroPoint};
use crate::dtype::Dtype;

impl Recipe {
    /// Returns the bytes that the tensor of a role must have at least, or `None` where the recipe does not read it.
    ///
    /// Tensors may be longer: writers pad. Of a tensor that is long enough no index of the recipe lies outside. Where the
    /// recipe contradicts itself (codes of 9 bits, groups of no columns, integer zero-points for floats) or a length
    /// overflows, this is `u64::MAX`, which no tensor has.
    pub fn source_len_bytes(&self, role: Role) -> Option<u64> {
        let is_empty = [self.batch, self.rows, self.cols].contains(&0);
        let len_bytes = || if is_empty { Some(0) } else { self.least_len_bytes(role) };
        self.reads(role).then(|| len_bytes().unwrap_or(u64::MAX))
    }

    /// Returns the bytes of the result as elements of a dtype, or `None` where they overflow.
    pub fn target_len_bytes(&self, dtype: Dtype) -> Option<u64> {
        dtype.len_bytes(crate::dtype::numel(&[self.batch, self.rows, self.cols])?)
    }

    /// Returns the rows and columns of each matrix of codes: those before the first that is read count, and for
    /// [`Codes::AwqFast`] all of the last tile.
    pub fn codes_size(&self) -> (u64, u64) {
        // What saturates has no length.
        let rows = self.rows.saturating_add(self.first_row.into());
        let cols = self.cols.saturating_add(self.first_col.into());
        match self.codes {
            Codes::AwqFast => (rows.div_ceil(4).saturating_mul(4), cols.div_ceil(64).saturating_mul(64)),
            _ => (rows, cols),
        }
    }

    /// Returns how many groups the rows of a matrix fall into for a grid, or `None` where groups have no rows.
    pub fn row_group_count(&self, grid: &Grid) -> Option<u64> {
        group_count(self.rows, grid.row_first, grid.rows_per_group)
    }

    /// Returns how many groups the columns of a matrix fall into for a grid, or `None` where groups have no columns.
    pub fn col_group_count(&self, grid: &Grid) -> Option<u64> {
        match self.group_index {
            Some(count) => Some(count.into()),
            None => group_count(self.cols, grid.col_first, grid.cols_per_group),
        }
    }

    fn reads(&self, role: Role) -> bool {
        let is_inline = self.scale.is_some_and(|scale| scale.grid.number == Number::SignedExponent);
        match role {
            Role::Payload => true,
            Role::Scale => self.scale.is_some() && !is_inline,
            Role::Global => self.scale.is_some_and(|scale| scale.global.is_some()),
            Role::ZeroPoint => matches!(self.zero_point, ZeroPoint::Packed { .. } | ZeroPoint::Float(_)),
            Role::GroupIndex => self.group_index.is_some(),
            Role::Bias => self.bias.is_some(),
            Role::Table => self.element == Element::Table,
            Role::NestedTable | Role::NestedScale => self.nested().is_some(),
            Role::Fold => self.fold.is_some(),
            Role::Description => false,
        }
    }

    /// `None` where a tensor of any length would be too short.
    fn least_len_bytes(&self, role: Role) -> Option<u64> {
        match role {
            Role::Payload => self.payload_len_bytes(),
            Role::Scale => self.grid_len_bytes(&self.scale?.grid),
            Role::Global => {
                let global = self.scale?.global?;
                let last = (self.batch - 1).checked_mul(global.batch_stride)?;
                last.checked_add(1)?.checked_mul(float_len_bytes(global.dtype)?)
            }
            Role::ZeroPoint => match &self.zero_point {
                ZeroPoint::Packed { .. } => self.packed_zero_points_len_bytes(),
                ZeroPoint::Float(grid) => self.grid_len_bytes(grid),
                ZeroPoint::None | ZeroPoint::Constant(_) => None,
            },
            Role::GroupIndex => self.cols.checked_mul(4).filter(|_| self.group_index > Some(0)),
            Role::Bias => self.grid_len_bytes(&self.bias?),
            Role::Table => Some(16 * 4),
            Role::NestedTable => Some(256 * 4),
            Role::NestedScale => {
                let (grid, per_scale) = self.nested()?;
                let count = self.grid_len(grid)?;
                (per_scale > 0).then(|| count.div_ceil(per_scale.into()))?.checked_mul(4)
            }
            Role::Fold => self.cols.checked_mul(float_len_bytes(self.fold?)?),
            Role::Description => None,
        }
    }

    fn payload_len_bytes(&self) -> Option<u64> {
        if !self.element.has_codes_of(self.codes.bits()) || !self.has_numbers_for_zero_points() {
            return None;
        }
        let (rows, cols) = self.codes_size();
        let of_codes = self.codes.len_bytes(rows, cols)?.checked_mul(self.batch)?;
        let scales = self.scale.map(|scale| scale.grid);
        match scales.filter(|grid| grid.number == Number::SignedExponent) {
            Some(grid) => Some(of_codes.max(self.grid_len(&grid)?)),
            None => Some(of_codes),
        }
    }

    fn has_numbers_for_zero_points(&self) -> bool {
        let is_integer = matches!(self.element, Element::Unsigned | Element::Signed);
        match self.zero_point {
            ZeroPoint::None | ZeroPoint::Float(_) => true,
            ZeroPoint::Constant(zero_point) => is_integer && zero_point.unsigned_abs() <= INTEGER_MAX,
            ZeroPoint::Packed { .. } => is_integer && self.scale.is_some(),
        }
    }

    fn packed_zero_points_len_bytes(&self) -> Option<u64> {
        let ZeroPoint::Packed { codes, is_swapped, offset, .. } = self.zero_point else { return None };
        let grid = &self.scale?.grid;
        let (rows, cols) = (self.row_group_count(grid)?, self.col_group_count(grid)?);
        let (rows, cols) = if is_swapped { (cols, rows) } else { (rows, cols) };
        let len_bytes = match (offset, codes) {
            (ZeroOffset::Constant(offset), _) if offset.unsigned_abs() > INTEGER_MAX => None,
            (ZeroOffset::Constant(_) | ZeroOffset::Modular, _) => codes.len_bytes(rows, cols),
            // Whole words, as the padded layout has them; codes of these widths leave no bits over.
            (ZeroOffset::WordWise, Codes::Rows { bits: bits @ (2 | 4 | 8), row_stride_bytes }) => {
                Codes::RowsPadded { bits, row_stride_bytes }.len_bytes(rows, cols)
            }
            (ZeroOffset::WordWise, _) => None,
        };
        len_bytes?.checked_mul(self.batch)
    }

    fn grid_len_bytes(&self, grid: &Grid) -> Option<u64> {
        let is_inline = grid.number == Number::SignedExponent;
        let is_scale = self.scale.is_some_and(|scale| scale.grid == *grid);
        // Numbers that lie in or lead to another tensor are scales only.
        if !is_scale && (is_inline || matches!(grid.number, Number::Nested { .. })) {
            return None;
        }
        self.grid_len(grid)?.checked_mul(grid.number.len_bytes())
    }

    /// One more than the greatest index, in numbers.
    fn grid_len(&self, grid: &Grid) -> Option<u64> {
        let (rows, cols) = (self.row_group_count(grid)?, self.col_group_count(grid)?);
        let of_matrix = match grid.is_swizzled {
            true if cols == 0 || !grid.row_stride.is_multiple_of(4) || grid.row_stride < cols => return None,
            true => rows.checked_next_multiple_of(128)?.checked_mul(grid.row_stride)?,
            false => last_of(rows, grid.row_stride)?
                .checked_add(last_of(cols, grid.col_stride)?)?
                .checked_add(1)?,
        };
        last_of(self.batch, grid.batch_stride)?.checked_add(of_matrix)
    }

    fn nested(&self) -> Option<(&Grid, u32)> {
        let grid = &self.scale.as_ref()?.grid;
        match grid.number {
            Number::Nested { per_scale, .. } => Some((grid, per_scale)),
            _ => None,
        }
    }
}

impl Codes {
    /// Returns the width of a code.
    pub const fn bits(&self) -> u8 {
        match *self {
            Codes::Rows { bits, .. }
            | Codes::RowsPadded { bits, .. }
            | Codes::Columns { bits }
            | Codes::ColumnPlanes { bits }
            | Codes::RowPlanes { bits, .. }
            | Codes::ColumnsPadded { bits }
            | Codes::RowChunks { bits, .. } => bits,
            Codes::RowsHighFirst { .. }
            | Codes::RowsWithScales { .. }
            | Codes::Words { .. }
            | Codes::RowPairs
            | Codes::AwqFast => 4,
        }
    }

    /// Returns the bytes of one matrix of codes, without what lies behind the last row's last byte; `None` where no matrix of
    /// codes can be of these sizes, or the bytes overflow.
    pub fn len_bytes(&self, rows: u64, cols: u64) -> Option<u64> {
        let bits = u64::from(self.bits());
        if !(1..=8).contains(&bits) {
            return None;
        }
        let in_rows =
            |stride_bytes: u64, row_len_bytes| last_of(rows, stride_bytes)?.checked_add(row_len_bytes);
        let words = |per_row: u64, count: u64| per_row.checked_mul(count)?.checked_mul(4);
        match *self {
            Codes::Rows { row_stride_bytes, .. } => {
                in_rows(row_stride_bytes, cols.checked_mul(bits)?.div_ceil(8))
            }
            Codes::RowsHighFirst { row_stride_bytes } => in_rows(row_stride_bytes, cols.div_ceil(2)),
            Codes::RowsPadded { row_stride_bytes, .. } => {
                let word_count = cols.div_ceil(32 / bits);
                in_rows(row_stride_bytes, word_count.checked_mul(4)?)
                    .filter(|_| row_stride_bytes.is_multiple_of(4))
            }
            Codes::RowsWithScales { row_stride_bytes } => {
                in_rows(row_stride_bytes, cols.div_ceil(32).checked_mul(17)?)
            }
            Codes::Columns { .. } => words(rows, cols.checked_mul(bits)?.div_ceil(32)),
            Codes::ColumnPlanes { .. } | Codes::RowPlanes { .. } if bits == 1 => None,
            Codes::ColumnPlanes { .. } => words(rows, cols.div_ceil(32) * bits),
            Codes::RowPlanes { row_stride_bytes, .. } => {
                in_rows(row_stride_bytes, (cols.div_ceil(32) * bits).checked_mul(4)?)
                    .filter(|_| row_stride_bytes.is_multiple_of(4))
            }
            Codes::ColumnsPadded { .. } => words(rows, cols.div_ceil(32 / bits)),
            Codes::Words { words_per_row, .. } if words_per_row < rows.div_ceil(8) => None,
            Codes::Words { words_per_row, .. } => words(words_per_row, cols),
            Codes::RowPairs => rows.div_ceil(2).checked_mul(cols),
            Codes::RowChunks { unit_bytes, unit_rows, .. } => {
                let chunk_count = u64::from(unit_bytes) * 8 / bits;
                let covers_rows = chunk_count.checked_mul(unit_rows)? >= rows;
                let len_bytes = unit_rows.checked_mul(cols)?.checked_mul(unit_bytes.into())?;
                (covers_rows && matches!(unit_bytes, 1 | 4)).then_some(len_bytes)
            }
            Codes::AwqFast if !rows.is_multiple_of(4) || !cols.is_multiple_of(64) => None,
            Codes::AwqFast => (rows / 4).checked_mul(cols)?.checked_mul(2),
        }
    }
}

impl Element {
    /// Tells whether codes of this width can stand for it.
    pub const fn has_codes_of(self, bits: u8) -> bool {
        match self {
            Element::Unsigned | Element::Signed => true,
            Element::E2m1 => bits == 4,
            Element::Table => bits <= 4,
            Element::E2m3 | Element::E3m2 => bits == 6,
            Element::E4m3 | Element::E5m2 | Element::E4m3Fnuz | Element::E5m2Fnuz | Element::E8m0 => {
                bits == 8
            }
        }
    }
}

impl Number {
    /// Returns the bytes of a stored number.
    pub const fn len_bytes(&self) -> u64 {
        match self {
            Number::F32 => 4,
            Number::F16 | Number::Bf16 => 2,
            Number::E8m0 | Number::E4m3 | Number::I8 | Number::SignedExponent | Number::Nested { .. } => 1,
        }
    }
}

/// The distance of the last of so many; nothing is left to count from where there are none.
fn last_of(count: u64, stride: u64) -> Option<u64> {
    count.checked_sub(1)?.checked_mul(stride)
}

fn group_count(len: u64, first: u32, per_group: u32) -> Option<u64> {
    let len = len.checked_add(first.into())?;
    (per_group > 0).then(|| len.div_ceil(per_group.into()))
}

fn float_len_bytes(dtype: Dtype) -> Option<u64> {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16).then_some(dtype.bits() / 8)
}

/// The greatest zero-point or offset: differences with codes are exact in f32, and sums stay within i32.
const INTEGER_MAX: u32 = 1 << 16;

#[cfg(test)]
mod tests {
    use super::super::{Global, Scale};
    use super::*;

    const GRID: Grid = Grid {
        number: Number::F16,
        rows_per_group: 1,
        cols_per_group: 32,
        batch_stride: 0,
        row_stride: 3,
        col_stride: 1,
        row_first: 0,
        col_first: 0,
        is_swizzled: false,
    };

    /// 5 rows of 70 columns in groups of 32: the last has 6.
    fn recipe(codes: Codes) -> Recipe {
        Recipe {
            batch: 1,
            rows: 5,
            cols: 70,
            codes,
            first_row: 0,
            first_col: 0,
            element: Element::Unsigned,
            zero_point: ZeroPoint::None,
            scale: Some(Scale { grid: GRID, global: None }),
            factor: None,
            bias: None,
            fold: None,
            group_index: None,
            is_column_major: false,
        }
    }

    fn payload_of(codes: Codes) -> u64 {
        recipe(codes).source_len_bytes(Role::Payload).unwrap()
    }

    #[test]
    fn payloads_are_as_long_as_their_layout_is_drawn() {
        // 70 codes of 3 bits are 210 bits, 27 bytes; rows start 28 bytes apart.
        assert_eq!(payload_of(Codes::Rows { bits: 3, row_stride_bytes: 28 }), 4 * 28 + 27);
        assert_eq!(payload_of(Codes::RowsHighFirst { row_stride_bytes: 35 }), 5 * 35);
        // Ten codes a word.
        assert_eq!(payload_of(Codes::RowsPadded { bits: 3, row_stride_bytes: 28 }), 5 * 28);
        assert_eq!(payload_of(Codes::RowsWithScales { row_stride_bytes: 51 }), 5 * 51);
        // 210 bits are 7 words, for each of 5 rows.
        assert_eq!(payload_of(Codes::Columns { bits: 3 }), 7 * 5 * 4);
        // Three blocks of 32 codes, 3 words each.
        assert_eq!(payload_of(Codes::ColumnPlanes { bits: 3 }), 9 * 5 * 4);
        assert_eq!(payload_of(Codes::Words { words_per_row: 1, is_interleaved: true }), 70 * 4);
        assert_eq!(payload_of(Codes::RowPairs), 3 * 70);
        assert_eq!(payload_of(Codes::RowChunks { bits: 2, unit_bytes: 1, unit_rows: 2 }), 2 * 70);
        assert_eq!(payload_of(Codes::RowChunks { bits: 3, unit_bytes: 4, unit_rows: 1 }), 70 * 4);
        // Tiles of 4 rows by 64 columns.
        assert_eq!(payload_of(Codes::AwqFast), 8 * 128 / 2);
    }

    #[test]
    fn codes_before_the_first_row_and_column_are_part_of_the_payload() {
        let payload_of = |codes, first_row, first_col| {
            let part = Recipe { first_row, first_col, ..recipe(codes) };
            part.source_len_bytes(Role::Payload).unwrap()
        };
        // 71 nibbles are 36 bytes; 5 rows behind one more are 3 pairs; behind four more they are 2 words.
        assert_eq!(payload_of(Codes::Rows { bits: 4, row_stride_bytes: 36 }, 0, 1), 5 * 36);
        assert_eq!(payload_of(Codes::RowPairs, 1, 0), 3 * 70);
        assert_eq!(payload_of(Codes::Words { words_per_row: 2, is_interleaved: true }, 4, 0), 70 * 8);
        assert_eq!(payload_of(Codes::Words { words_per_row: 1, is_interleaved: true }, 4, 0), u64::MAX);
        assert_eq!(payload_of(Codes::AwqFast, 3, 60), 8 * 192 / 2);
    }

    #[test]
    fn what_contradicts_itself_needs_more_than_any_tensor_has() {
        for codes in [
            Codes::Rows { bits: 0, row_stride_bytes: 35 },
            Codes::Rows { bits: 9, row_stride_bytes: 99 },
            Codes::Rows { bits: 8, row_stride_bytes: u64::MAX },
            Codes::RowsPadded { bits: 3, row_stride_bytes: 27 },
            Codes::ColumnPlanes { bits: 1 },
            Codes::Words { words_per_row: 0, is_interleaved: false },
            Codes::RowChunks { bits: 4, unit_bytes: 1, unit_rows: 2 },
            Codes::RowChunks { bits: 4, unit_bytes: 2, unit_rows: 2 },
        ] {
            assert_eq!(payload_of(codes), u64::MAX, "{codes:?}");
        }
        let bytes = recipe(Codes::Rows { bits: 8, row_stride_bytes: 70 });
        for wrong in [
            Recipe { element: Element::E2m1, ..bytes.clone() },
            Recipe { zero_point: ZeroPoint::Constant(1 << 17), ..bytes.clone() },
            Recipe { element: Element::E4m3, zero_point: ZeroPoint::Constant(8), ..bytes.clone() },
            Recipe { batch: u64::MAX, ..bytes.clone() },
        ] {
            assert_eq!(wrong.source_len_bytes(Role::Payload), Some(u64::MAX), "{wrong:?}");
        }
        let grid = Grid { cols_per_group: 0, ..GRID };
        let wrong = Recipe { scale: Some(Scale { grid, global: None }), ..bytes };
        assert_eq!(wrong.source_len_bytes(Role::Scale), Some(u64::MAX));
    }

    #[test]
    fn roles_that_are_not_read_have_no_length() {
        let plain = Recipe { scale: None, ..recipe(Codes::Rows { bits: 8, row_stride_bytes: 70 }) };
        let roles = [
            Role::Scale,
            Role::Global,
            Role::ZeroPoint,
            Role::GroupIndex,
            Role::Bias,
            Role::Table,
            Role::NestedTable,
            Role::NestedScale,
            Role::Fold,
            Role::Description,
        ];
        for role in roles {
            assert_eq!(plain.source_len_bytes(role), None, "{role:?}");
        }
        assert_eq!(plain.source_len_bytes(Role::Payload), Some(350));
        assert_eq!(plain.target_len_bytes(Dtype::Bf16), Some(700));
        let none = Recipe { rows: 0, ..plain };
        assert_eq!(
            (none.source_len_bytes(Role::Payload), none.target_len_bytes(Dtype::F32)),
            (Some(0), Some(0))
        );
    }

    #[test]
    fn grids_reach_to_their_last_number() {
        let with = |grid| Recipe {
            batch: 2,
            scale: Some(Scale { grid, global: None }),
            ..recipe(Codes::Rows { bits: 4, row_stride_bytes: 35 })
        };
        let len = |grid| with(grid).source_len_bytes(Role::Scale).unwrap();
        assert_eq!(len(GRID), 5 * 3 * 2);
        assert_eq!(len(Grid { batch_stride: 15, ..GRID }), 2 * 5 * 3 * 2);
        assert_eq!(len(Grid { row_stride: 1, col_stride: 5, ..GRID }), 5 * 3 * 2);
        // A part whose first group began 27 columns before it: 97 columns, 4 groups.
        assert_eq!(len(Grid { row_stride: 4, col_first: 27, ..GRID }), 5 * 4 * 2);
        assert_eq!(len(Grid { rows_per_group: 4, row_first: 3, ..GRID }), 2 * 3 * 2);
        assert_eq!(len(Grid { row_stride: 4, is_swizzled: true, number: Number::E4m3, ..GRID }), 128 * 4);
        assert_eq!(len(Grid { is_swizzled: true, ..GRID }), u64::MAX);
        let indexed = Recipe { group_index: Some(7), ..with(Grid { row_stride: 7, ..GRID }) };
        assert_eq!(indexed.source_len_bytes(Role::Scale), Some(5 * 7 * 2));
        assert_eq!(indexed.source_len_bytes(Role::GroupIndex), Some(280));

        let nested = with(Grid { number: Number::Nested { per_scale: 4, offset: 0.5 }, ..GRID });
        let lens =
            [Role::Scale, Role::NestedTable, Role::NestedScale].map(|role| nested.source_len_bytes(role));
        assert_eq!(lens, [Some(15), Some(1024), Some(16)]);
        let global = Global { dtype: Dtype::Bf16, is_divisor: true, batch_stride: 1 };
        let global = Recipe { scale: Some(Scale { grid: GRID, global: Some(global) }), ..with(GRID) };
        assert_eq!(global.source_len_bytes(Role::Global), Some(4));
    }

    #[test]
    fn inline_scales_are_part_of_the_payload() {
        let grid = Grid { number: Number::SignedExponent, row_stride: 51, col_stride: 17, ..GRID };
        let codes = Codes::RowsWithScales { row_stride_bytes: 51 };
        let inline = Recipe { scale: Some(Scale { grid, global: None }), ..recipe(codes) };
        assert_eq!(inline.source_len_bytes(Role::Scale), None);
        assert_eq!(inline.source_len_bytes(Role::Payload), Some(5 * 51));
    }

    #[test]
    fn packed_zero_points_count_groups() {
        let with = |codes, is_swapped, offset| {
            let zero_point = ZeroPoint::Packed { codes, is_swapped, is_signed: false, offset };
            Recipe { zero_point, batch: 2, ..recipe(Codes::Columns { bits: 4 }) }
        };
        let len = |codes, is_swapped, offset| {
            with(codes, is_swapped, offset).source_len_bytes(Role::ZeroPoint).unwrap()
        };
        let rows = Codes::Rows { bits: 4, row_stride_bytes: 4 };
        // [3 groups, 5 rows of 4 bits] and the other way round.
        assert_eq!(len(rows, true, ZeroOffset::Constant(0)), 2 * (2 * 4 + 3));
        assert_eq!(len(rows, true, ZeroOffset::WordWise), 2 * 3 * 4);
        assert_eq!(len(rows, false, ZeroOffset::Modular), 2 * (4 * 4 + 2));
        assert_eq!(len(Codes::Columns { bits: 4 }, true, ZeroOffset::Constant(-8)), 2 * 3 * 4);
        assert_eq!(len(Codes::RowPairs, false, ZeroOffset::WordWise), u64::MAX);
        assert_eq!(len(rows, true, ZeroOffset::Constant(1 << 20)), u64::MAX);
    }
}
