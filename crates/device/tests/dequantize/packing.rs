//! Packs codes as writers of the formats do, without a line in common with the code that unpacks them.

use tensorhaul_plan::quant::Codes;

/// Packs one matrix, `codes[n][k]`. Layouts of rows are padded to their stride with ones.
pub(crate) fn pack(layout: Codes, codes: &[Vec<u8>]) -> Vec<u8> {
    let rows = |stride_bytes: u64, pack_row: &dyn Fn(&[u8]) -> Vec<u8>| {
        let mut bytes = Vec::new();
        for row in codes {
            let packed = pack_row(row);
            let padding = stride_bytes as usize - packed.len();
            bytes.extend(packed);
            bytes.extend(vec![0xff; padding]);
        }
        bytes
    };
    match layout {
        Codes::Rows { bits, row_stride_bytes } => rows(row_stride_bytes, &|row| bytes_of(&stream(row, bits))),
        Codes::RowsHighFirst { row_stride_bytes } => rows(row_stride_bytes, &|row| {
            row.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).unwrap_or(&0)).collect()
        }),
        Codes::RowsPadded { bits, row_stride_bytes } => rows(row_stride_bytes, &|row| {
            row.chunks(32 / usize::from(bits)).flat_map(|codes| word(codes, bits).to_le_bytes()).collect()
        }),
        Codes::RowsWithScales { row_stride_bytes } => rows(row_stride_bytes, &|row| {
            let block = |codes: &[u8]| {
                let mut block = vec![INLINE_SCALE as u8];
                block.extend(codes.chunks(2).map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 4));
                block.resize(17, 0);
                block
            };
            row.chunks(32).flat_map(block).collect()
        }),
        Codes::Columns { bits } => across(codes, |row| words_of(&stream(row, bits))),
        Codes::ColumnPlanes { bits } => {
            across(codes, |row| row.chunks(32).flat_map(|codes| planes(codes, bits)).collect())
        }
        Codes::RowPlanes { bits, row_stride_bytes } => rows(row_stride_bytes, &|row| {
            let words = row.chunks(32).flat_map(|codes| planes(codes, bits));
            words.flat_map(u32::to_le_bytes).collect()
        }),
        Codes::ColumnsPadded { bits } => {
            across(codes, |row| row.chunks(32 / usize::from(bits)).map(|codes| word(codes, bits)).collect())
        }
        Codes::Words { words_per_row, is_interleaved } => {
            let order = if is_interleaved { [0, 2, 4, 6, 1, 3, 5, 7] } else { [0, 1, 2, 3, 4, 5, 6, 7] };
            let mut bytes = Vec::new();
            for k in 0..codes[0].len() {
                for c in 0..words_per_row as usize {
                    let code = |j: usize| codes.get(8 * c + j).map_or(0, |row| row[k]);
                    bytes.extend(word(&order.map(code), 4).to_le_bytes());
                }
            }
            bytes
        }
        Codes::RowPairs => codes
            .chunks(2)
            .flat_map(|pair| {
                (0..pair[0].len()).map(|k| pair[0][k] | pair.get(1).map_or(0, |row| row[k]) << 4)
            })
            .collect(),
        Codes::RowChunks { bits, unit_bytes, unit_rows } => {
            let chunk_count = 8 * unit_bytes / bits;
            let mut units = vec![0u32; unit_rows as usize * codes[0].len()];
            for chunk in 0..usize::from(chunk_count) {
                let rows = codes.iter().skip(chunk * unit_rows as usize).take(unit_rows as usize).flatten();
                let mut rows = rows.copied();
                units.iter_mut().for_each(|unit| *unit = *unit << bits | u32::from(rows.next().unwrap_or(0)));
            }
            units.iter().flat_map(|unit| unit.to_le_bytes()[..usize::from(unit_bytes)].to_vec()).collect()
        }
        Codes::AwqFast => awq_fast(codes),
        _ => panic!("{layout:?} is not known here"),
    }
}

/// The exponent in each block of [`Codes::RowsWithScales`].
pub(crate) const INLINE_SCALE: i8 = -3;

/// Each code's bits, the lowest first.
fn stream(codes: &[u8], bits: u8) -> Vec<bool> {
    codes.iter().flat_map(|code| (0..bits).map(move |bit| code >> bit & 1 == 1)).collect()
}

fn bytes_of(stream: &[bool]) -> Vec<u8> {
    stream.chunks(8).map(|bits| bits.iter().rev().fold(0, |byte, bit| byte << 1 | u8::from(*bit))).collect()
}

fn words_of(stream: &[bool]) -> Vec<u32> {
    stream.chunks(32).map(|bits| bits.iter().rev().fold(0, |word, bit| word << 1 | u32::from(*bit))).collect()
}

fn word(codes: &[u8], bits: u8) -> u32 {
    codes.iter().rev().fold(0, |word, code| word << bits | u32::from(*code))
}

/// Each row's words as a column.
fn across(codes: &[Vec<u8>], pack_row: impl Fn(&[u8]) -> Vec<u32>) -> Vec<u8> {
    let columns: Vec<Vec<u32>> = codes.iter().map(|row| pack_row(row)).collect();
    let rows_of_words = 0..columns[0].len();
    rows_of_words.flat_map(|i| columns.iter().flat_map(move |column| column[i].to_le_bytes())).collect()
}

fn planes(codes: &[u8], bits: u8) -> Vec<u32> {
    let mut codes = codes.to_vec();
    codes.resize(32, 0);
    let widths: &[u8] = match bits {
        3 => &[2, 1],
        5 => &[4, 1],
        6 => &[4, 2],
        7 => &[4, 2, 1],
        _ => &[bits],
    };
    let mut words = Vec::new();
    for width in widths {
        let low: Vec<u8> = codes.iter().map(|code| (u32::from(*code) & ((1 << width) - 1)) as u8).collect();
        words.extend(low.chunks(32 / usize::from(*width)).map(|codes| word(codes, *width)));
        codes.iter_mut().for_each(|code| *code = (u32::from(*code) >> width) as u8);
    }
    words
}

/// Two permutations within a row, then 64 codes of each of 4 rows in turn.
fn awq_fast(codes: &[Vec<u8>]) -> Vec<u8> {
    let permuted = |row: &Vec<u8>| -> Vec<u8> {
        let pairs_across =
            |codes: &[u8]| -> Vec<u8> { (0..32).map(|i| codes[i % 8 / 2 * 8 + i / 8 * 2 + i % 2]).collect() };
        let row: Vec<u8> = row.chunks(32).flat_map(pairs_across).collect();
        row.chunks(8).flat_map(|codes| [0, 2, 4, 6, 1, 3, 5, 7].map(|i| codes[i])).collect()
    };
    let rows: Vec<Vec<u8>> = codes.iter().map(permuted).collect();
    let mut bytes = Vec::new();
    for four in rows.chunks(4) {
        for first in (0..four[0].len()).step_by(64) {
            let nibbles: Vec<u8> = four.iter().flat_map(|row| row[first..first + 64].to_vec()).collect();
            bytes.extend(nibbles.chunks(2).map(|pair| pair[0] | pair[1] << 4));
        }
    }
    bytes
}
