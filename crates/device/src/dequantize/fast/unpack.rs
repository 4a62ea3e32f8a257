//! Codes out of their layout, a line at a time, one to a byte.
//!
//! A line runs along the index whose codes are neighbours in the file: along a row, or down a column where words lie
//! `[.., rows]`. The loops have no branch inside and simple strides, which is all that the compiler asks for to vectorize them.

use tensorhaul_plan::quant::Codes;

use crate::dequantize::reference::{AWQ_NIBBLES, code_at, mask, plane_widths};

/// A matrix of codes.
#[derive(Clone, Copy)]
pub(super) struct Packed<'a> {
    pub(super) codes: Codes,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Rows and columns that no line counts.
    pub(super) first_row: usize,
    pub(super) first_col: usize,
    pub(super) bytes: &'a [u8],
}

/// Tells whether neighbouring rows' codes are neighbours in the file, so that lines are columns.
pub(super) fn has_column_lines(codes: Codes) -> bool {
    matches!(codes, Codes::Columns { .. } | Codes::ColumnPlanes { .. } | Codes::Words { .. })
}

impl Packed<'_> {
    /// Unpacks part of a line, from `first` on: of row `line`, or of column `line` where lines are columns.
    #[inline(always)]
    pub(super) fn line(&self, line: usize, first: usize, codes: &mut [u8]) {
        let (line, first) = match has_column_lines(self.codes) {
            true => (line + self.first_col, first + self.first_row),
            false => (line + self.first_row, first + self.first_col),
        };
        let layout = match self.codes {
            // Of these widths no bits are left over.
            Codes::RowsPadded { bits: bits @ (1 | 2 | 4 | 8), row_stride_bytes } => {
                Codes::Rows { bits, row_stride_bytes }
            }
            layout => layout,
        };
        match layout {
            Codes::Rows { bits, row_stride_bytes } => {
                let row = &self.bytes[line * row_stride_bytes as usize..];
                match bits {
                    1 => self.dense::<1>(row, line, first, codes),
                    2 => self.dense::<2>(row, line, first, codes),
                    3 => self.dense::<3>(row, line, first, codes),
                    4 => self.nibbles(row, line, first, codes, |byte| [byte & 0xf, byte >> 4]),
                    5 => self.dense::<5>(row, line, first, codes),
                    6 => self.dense::<6>(row, line, first, codes),
                    7 => self.dense::<7>(row, line, first, codes),
                    _ => codes.copy_from_slice(&row[first..first + codes.len()]),
                }
            }
            Codes::RowsHighFirst { row_stride_bytes } => {
                let row = &self.bytes[line * row_stride_bytes as usize..];
                self.nibbles(row, line, first, codes, |byte| [byte >> 4, byte & 0xf]);
            }
            Codes::RowsWithScales { row_stride_bytes } => {
                self.blocks(&self.bytes[line * row_stride_bytes as usize..], line, first, codes);
            }
            Codes::Columns { bits } => self.column(bits.into(), line, first, codes),
            Codes::ColumnPlanes { bits } => self.planes(bits.into(), line, first, codes),
            Codes::Words { words_per_row, is_interleaved } => {
                let words = &self.bytes[4 * line * words_per_row as usize..];
                match is_interleaved {
                    true => {
                        self.words(words, line, first, codes, AWQ_NIBBLES.map(|nibble| 4 * nibble as u32))
                    }
                    false => self.words(words, line, first, codes, [0, 4, 8, 12, 16, 20, 24, 28]),
                }
            }
            Codes::RowPairs => {
                let bytes = &self.bytes[line / 2 * self.cols + first..][..codes.len()];
                let shift = 4 * (line % 2);
                codes.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte >> shift & 0xf);
            }
            Codes::RowChunks { bits, unit_bytes, unit_rows } => {
                let unit_bits = 8 * u64::from(unit_bytes);
                let (chunk, row) = (line as u64 / unit_rows, line % unit_rows as usize);
                let shift = u64::from(bits) * (unit_bits / u64::from(bits) - 1 - chunk);
                let units = &self.bytes[(row * self.cols + first) * usize::from(unit_bytes)..];
                match unit_bytes {
                    1 => shifted(units.as_chunks::<1>().0, shift as u32, mask(bits.into()), codes),
                    _ => shifted(units.as_chunks::<4>().0, shift as u32, mask(bits.into()), codes),
                }
            }
            // Rare: code by code.
            _ => self.one_by_one(line, first, codes),
        }
    }

    /// Any layout, any start.
    fn one_by_one(&self, line: usize, first: usize, codes: &mut [u8]) {
        for (i, code) in codes.iter_mut().enumerate() {
            let (n, k) = match has_column_lines(self.codes) {
                true => (first + i, line),
                false => (line, first + i),
            };
            *code = code_at(self.codes, self.rows as u64, self.cols as u64, self.bytes, n as u64, k as u64);
        }
    }

    /// Unpacks up to the first multiple of `unit` one by one, and returns what is left to do.
    #[inline(always)]
    fn head<'c>(&self, unit: usize, line: usize, first: usize, codes: &'c mut [u8]) -> (usize, &'c mut [u8]) {
        let head = (first.next_multiple_of(unit) - first).min(codes.len());
        if head == 0 {
            return (first, codes);
        }
        let (head_codes, rest) = codes.split_at_mut(head);
        self.one_by_one(line, first, head_codes);
        (first + head, rest)
    }

    /// Eight codes are `BITS` bytes.
    #[inline(always)]
    fn dense<const BITS: usize>(&self, row: &[u8], line: usize, first: usize, codes: &mut [u8]) {
        let (first, codes) = self.head(8, line, first, codes);
        let (eights, rest) = codes.as_chunks_mut::<8>();
        let rest_first = first + 8 * eights.len();
        let bytes = row.get(first / 8 * BITS..).unwrap_or_default().as_chunks::<BITS>().0;
        for (eight, bytes) in eights.iter_mut().zip(bytes) {
            let mut word = [0; 8];
            word[..BITS].copy_from_slice(bytes);
            let word = u64::from_le_bytes(word);
            *eight = std::array::from_fn(|j| (word >> (BITS * j)) as u8 & mask(BITS as u64));
        }
        self.one_by_one(line, rest_first, rest);
    }

    /// Two codes are one byte.
    #[inline(always)]
    fn nibbles(
        &self,
        row: &[u8],
        line: usize,
        first: usize,
        codes: &mut [u8],
        split: impl Fn(u8) -> [u8; 2],
    ) {
        let (first, codes) = self.head(2, line, first, codes);
        let (pairs, rest) = codes.as_chunks_mut::<2>();
        let bytes = row.get(first / 2..).unwrap_or_default();
        for (pair, byte) in pairs.iter_mut().zip(bytes) {
            *pair = split(*byte);
        }
        let rest_first = first + 2 * pairs.len();
        self.one_by_one(line, rest_first, rest);
    }

    /// 32 codes are 17 bytes, the first of which is their scale.
    #[inline(always)]
    fn blocks(&self, row: &[u8], line: usize, first: usize, codes: &mut [u8]) {
        let (first, codes) = self.head(32, line, first, codes);
        let (blocks, rest) = codes.as_chunks_mut::<32>();
        let bytes = row.get(first / 32 * 17..).unwrap_or_default().as_chunks::<17>().0;
        for (block, bytes) in blocks.iter_mut().zip(bytes) {
            for (pair, byte) in block.as_chunks_mut::<2>().0.iter_mut().zip(&bytes[1..]) {
                *pair = [byte & 0xf, byte >> 4];
            }
        }
        let rest_first = first + 32 * blocks.len();
        self.one_by_one(line, rest_first, rest);
    }

    /// The codes of one column are at the same place of neighbouring words, or in two rows of words where they straddle.
    #[inline(always)]
    fn column(&self, bits: usize, line: usize, first: usize, codes: &mut [u8]) {
        let (word, shift) = (bits * line / 32, bits * line % 32);
        let words = |word: usize| self.bytes[4 * (word * self.rows + first)..].as_chunks::<4>().0;
        shifted(words(word), shift as u32, mask(bits as u64), codes);
        let low_bits = 32 - shift;
        if low_bits < bits {
            let high = mask((bits - low_bits) as u64);
            for (code, word) in codes.iter_mut().zip(words(word + 1)) {
                *code |= (word[0] & high) << low_bits;
            }
        }
    }

    /// The codes of one column are at the same place of neighbouring words of each plane.
    #[inline(always)]
    fn planes(&self, bits: usize, line: usize, first: usize, codes: &mut [u8]) {
        let (block, j) = (line / 32, line % 32);
        codes.fill(0);
        let mut done_bits = 0;
        for &width in plane_widths(bits as u64) {
            let per_word = 32 / width as usize;
            let word = block * bits + done_bits + j / per_word;
            let shift = width as usize * (j % per_word);
            let words = self.bytes[4 * (word * self.rows + first)..].as_chunks::<4>().0;
            for (code, word) in codes.iter_mut().zip(words) {
                *code |= ((u32::from_le_bytes(*word) >> shift) as u8 & mask(width)) << done_bits;
            }
            done_bits += width as usize;
        }
    }

    /// A word holds the codes of 8 neighbouring rows.
    #[inline(always)]
    fn words(&self, words: &[u8], line: usize, first: usize, codes: &mut [u8], shifts: [u32; 8]) {
        let (first, codes) = self.head(8, line, first, codes);
        let (eights, rest) = codes.as_chunks_mut::<8>();
        let words = words.get(first / 8 * 4..).unwrap_or_default().as_chunks::<4>().0;
        for (eight, word) in eights.iter_mut().zip(words) {
            let word = u32::from_le_bytes(*word);
            *eight = shifts.map(|shift| (word >> shift) as u8 & 0xf);
        }
        let rest_first = first + 8 * eights.len();
        self.one_by_one(line, rest_first, rest);
    }
}

/// One field of each of neighbouring little-endian words.
#[inline(always)]
fn shifted<const B: usize>(words: &[[u8; B]], shift: u32, mask: u8, codes: &mut [u8]) {
    for (code, bytes) in codes.iter_mut().zip(words) {
        let mut word = [0; 4];
        word[..B].copy_from_slice(bytes);
        *code = (u32::from_le_bytes(word) >> shift) as u8 & mask;
    }
}
