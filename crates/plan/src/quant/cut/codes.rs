//! Parts of matrices of codes.

use std::ops::Range;

use crate::quant::Codes;

/// A part of a matrix of codes, which covers what was asked for.
pub(super) struct CutCodes {
    /// The matrix's lines, and the bytes of each.
    pub(super) shape: [u64; 2],
    /// Lines and bytes of them that are taken.
    pub(super) ranges: [Range<u64>; 2],
    /// How the codes lie in these, back to back.
    pub(super) codes: Codes,
    /// Rows before the first that was asked for.
    pub(super) first_row: u32,
    /// Columns before it.
    pub(super) first_col: u32,
}

/// Cuts a matrix of `size` rows and columns that has so many bytes, to rows and columns of which there is one at least; `None` where
/// no such matrix lies in these bytes.
pub(super) fn cut_codes(
    codes: Codes,
    size: (u64, u64),
    rows: &Range<u64>,
    cols: &Range<u64>,
    len_bytes: u64,
) -> Option<CutCodes> {
    let packing = Packing::of(codes);
    let (by_rows, by_cols) = (packing.rows.covering(rows), packing.cols.covering(cols));
    let all_rows = packing.rows.covering(&(0..size.0)).end;
    let all_cols = packing.cols.covering(&(0..size.1)).end;
    let mut first_row = rows.start % packing.rows.codes;
    let (shape, lines, bytes) = match packing.lines {
        LinesAre::Rows { stride_bytes } => {
            // The distance from an only line to the next is nobody's.
            let line_len_bytes = if all_rows <= 1 { len_bytes } else { stride_bytes.unwrap_or(all_cols) };
            let has_padding = all_rows.checked_mul(line_len_bytes)? <= len_bytes;
            let end = if cols.end == size.1 && has_padding { line_len_bytes } else { by_cols.end };
            ([all_rows, line_len_bytes], by_rows, by_cols.start..end.min(line_len_bytes))
        }
        LinesAre::Chunks { unit_rows } => {
            let (chunk, last_chunk) = (rows.start / unit_rows, (rows.end - 1) / unit_rows);
            let units = match chunk == last_chunk {
                true => rows.start % unit_rows..(rows.end - 1) % unit_rows + 1,
                false => 0..unit_rows,
            };
            // Rows of other chunks that lie in the same units come before.
            let is_one = chunk == last_chunk;
            first_row = if is_one { chunk * (units.end - units.start) } else { rows.start };
            ([unit_rows, all_cols], units, by_cols)
        }
        LinesAre::Columns { line_len_bytes } => {
            let line_len_bytes = line_len_bytes.unwrap_or(all_rows);
            let line_count = all_cols.min(len_bytes.checked_div(line_len_bytes)?);
            let end = if rows.end == size.0 { line_len_bytes } else { by_rows.end };
            let lines = by_cols.start..by_cols.end.min(line_count);
            ([line_count, line_len_bytes], lines, by_rows.start..end)
        }
    };
    let line_count = lines.end.checked_sub(lines.start)?;
    let line_len_bytes = bytes.end.checked_sub(bytes.start)?;
    Some(CutCodes {
        shape,
        ranges: [lines, bytes],
        codes: in_lines(codes, line_count, line_len_bytes),
        first_row: u32::try_from(first_row).ok()?,
        first_col: u32::try_from(cols.start % packing.cols.codes).ok()?,
    })
}

/// The same layout for lines of another number and length.
fn in_lines(codes: Codes, line_count: u64, line_len_bytes: u64) -> Codes {
    let row_stride_bytes = line_len_bytes;
    match codes {
        Codes::Rows { bits, .. } => Codes::Rows { bits, row_stride_bytes },
        Codes::RowsHighFirst { .. } => Codes::RowsHighFirst { row_stride_bytes },
        Codes::RowsPadded { bits, .. } => Codes::RowsPadded { bits, row_stride_bytes },
        Codes::RowsWithScales { .. } => Codes::RowsWithScales { row_stride_bytes },
        Codes::RowPlanes { bits, .. } => Codes::RowPlanes { bits, row_stride_bytes },
        Codes::Words { is_interleaved, .. } => {
            Codes::Words { words_per_row: line_len_bytes / 4, is_interleaved }
        }
        Codes::RowChunks { bits, unit_bytes, .. } => {
            Codes::RowChunks { bits, unit_bytes, unit_rows: line_count }
        }
        Codes::Columns { .. }
        | Codes::ColumnPlanes { .. }
        | Codes::ColumnsPadded { .. }
        | Codes::RowPairs
        | Codes::AwqFast => codes,
    }
}

/// What is packed together: so many codes of one index take so many lines, or bytes of a line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unit {
    pub(super) codes: u64,
    pub(super) takes: u64,
}

impl Unit {
    const fn new(codes: u64, takes: u64) -> Unit {
        Unit { codes, takes }
    }

    fn covering(self, range: &Range<u64>) -> Range<u64> {
        range.start / self.codes * self.takes..range.end.div_ceil(self.codes).saturating_mul(self.takes)
    }
}

/// How codes lie in lines of bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packing {
    pub(super) rows: Unit,
    pub(super) cols: Unit,
    pub(super) lines: LinesAre,
}

/// What a line holds.
#[derive(Clone, Copy, Debug)]
pub(super) enum LinesAre {
    /// Rows, some bytes apart; lines without a distance follow each other.
    Rows { stride_bytes: Option<u64> },
    /// A row of each chunk.
    Chunks { unit_rows: u64 },
    /// Columns, or words of them: of this length, or as long as rows need.
    Columns { line_len_bytes: Option<u64> },
}

impl Packing {
    pub(super) fn of(codes: Codes) -> Packing {
        let bits = u64::from(codes.bits()).clamp(1, 8);
        // Codes that end with a byte, or with a word.
        let shared = 1 << bits.trailing_zeros();
        let (in_bytes, in_words) =
            (Unit::new(8 / shared, bits / shared), Unit::new(32 / shared, bits / shared));
        let in_rows = |cols, stride_bytes| Packing {
            rows: ONE,
            cols,
            lines: LinesAre::Rows { stride_bytes: Some(stride_bytes) },
        };
        let in_columns =
            |cols| Packing { rows: Unit::new(1, 4), cols, lines: LinesAre::Columns { line_len_bytes: None } };
        match codes {
            Codes::Rows { row_stride_bytes, .. } => in_rows(in_bytes, row_stride_bytes),
            Codes::RowsHighFirst { row_stride_bytes } => in_rows(Unit::new(2, 1), row_stride_bytes),
            Codes::RowsPadded { row_stride_bytes, .. } => in_rows(Unit::new(32 / bits, 4), row_stride_bytes),
            Codes::RowsWithScales { row_stride_bytes } => in_rows(Unit::new(32, 17), row_stride_bytes),
            Codes::RowPlanes { row_stride_bytes, .. } => in_rows(Unit::new(32, 4 * bits), row_stride_bytes),
            Codes::Columns { .. } => in_columns(in_words),
            Codes::ColumnPlanes { .. } => in_columns(Unit::new(32, bits)),
            Codes::ColumnsPadded { .. } => in_columns(Unit::new(32 / bits, 1)),
            Codes::Words { words_per_row, .. } => Packing {
                rows: Unit::new(8, 4),
                cols: ONE,
                lines: LinesAre::Columns { line_len_bytes: words_per_row.checked_mul(4) },
            },
            Codes::RowPairs => {
                Packing { rows: Unit::new(2, 1), cols: ONE, lines: LinesAre::Rows { stride_bytes: None } }
            }
            Codes::RowChunks { unit_bytes, unit_rows, .. } => Packing {
                rows: ONE,
                cols: Unit::new(1, unit_bytes.into()),
                lines: LinesAre::Chunks { unit_rows: unit_rows.max(1) },
            },
            Codes::AwqFast => Packing {
                rows: Unit::new(4, 1),
                cols: Unit::new(64, 128),
                lines: LinesAre::Rows { stride_bytes: None },
            },
        }
    }
}

const ONE: Unit = Unit::new(1, 1);
