//! How writers of checkpoints pack codes, each way written from the description of its layout.

/// Codes side by side, least significant bit first, each in the next `bits` bits of a stream of bytes.
pub(crate) fn stream(codes: &[u32], bits: u32) -> Vec<u8> {
    let mut bytes = vec![0u8; (codes.len() * bits as usize).div_ceil(8)];
    for (index, code) in codes.iter().enumerate() {
        for bit in 0..bits as usize {
            let place = index * bits as usize + bit;
            bytes[place / 8] |= ((code >> bit & 1) as u8) << (place % 8);
        }
    }
    bytes
}

/// [`stream`] in whole words of 32 bits.
pub(crate) fn stream_words(codes: &[u32], bits: u32) -> Vec<u32> {
    let mut bytes = stream(codes, bits);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

/// As many whole codes as fit in each word; what is left of a word stays 0.
pub(crate) fn padded_words(codes: &[u32], bits: u32) -> Vec<u32> {
    let per_word = (32 / bits) as usize;
    let word = |codes: &[u32]| (0..).zip(codes).fold(0, |word, (index, code)| word | code << (bits * index));
    codes.chunks(per_word).map(word).collect()
}

/// Each 32 codes as planes of their low, middle and high bits.
pub(crate) fn plane_words(codes: &[u32], bits: u32) -> Vec<u32> {
    let widths: &[u32] = match bits {
        2 => &[2],
        3 => &[2, 1],
        4 => &[4],
        5 => &[4, 1],
        6 => &[4, 2],
        7 => &[4, 2, 1],
        _ => &[8],
    };
    assert!(codes.len().is_multiple_of(32), "planes are of 32 codes");
    let mut words = Vec::new();
    for block in codes.chunks(32) {
        let mut shift = 0;
        for width in widths {
            let plane: Vec<u32> = block.iter().map(|code| code >> shift & ((1 << width) - 1)).collect();
            words.extend(padded_words(&plane, *width));
            shift += width;
        }
    }
    words
}

/// Pairs of 4-bit codes, the first of a pair in the low half of its byte.
pub(crate) fn nibbles_low_first(codes: &[u32]) -> Vec<u8> {
    codes.chunks(2).map(|pair| (pair[0] | pair.get(1).unwrap_or(&0) << 4) as u8).collect()
}

/// Pairs of 4-bit codes, the first of a pair in the high half of its byte.
pub(crate) fn nibbles_high_first(codes: &[u32]) -> Vec<u8> {
    codes.chunks(2).map(|pair| (pair[0] << 4 | pair.get(1).unwrap_or(&0)) as u8).collect()
}

/// Eight 4-bit codes to a word, in the order that AWQ's kernels like: nibble `i` holds code `ORDER[i]` of the eight.
pub(crate) fn awq_words(codes: &[u32]) -> Vec<u32> {
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let word = |eight: &[u32]| {
        let code = |place: usize| eight.get(ORDER[place]).unwrap_or(&0) << (4 * place);
        (0..8).map(code).sum()
    };
    codes.chunks(8).map(word).collect()
}

/// The layout of AWQ's fast matrix-vector kernel, as its packer does it: within 32 columns pairs are dealt out to four
/// hands, within eight the even ones go first, and four rows are laid behind each other every 64 columns.
pub(crate) fn awq_fast(codes: &[u32], rows: usize, cols: usize) -> Vec<u16> {
    let mut dealt = vec![0; codes.len()];
    for (index, block) in codes.chunks(32).enumerate() {
        let mut hands = Vec::new();
        for hand in 0..4 {
            for turn in 0..4 {
                hands.extend_from_slice(&block[turn * 8 + hand * 2..][..2]);
            }
        }
        for (place, eight) in hands.chunks(8).enumerate() {
            let evens = eight.iter().step_by(2);
            let odds = eight.iter().skip(1).step_by(2);
            let target = &mut dealt[index * 32 + place * 8..][..8];
            target.iter_mut().zip(evens.chain(odds)).for_each(|(target, code)| *target = *code);
        }
    }
    let mut words = Vec::new();
    for four in 0..rows / 4 {
        for block in 0..cols / 64 {
            let rows = (0..4).flat_map(|row| &dealt[(four * 4 + row) * cols + block * 64..][..64]);
            let nibbles: Vec<u32> = rows.copied().collect();
            let word = |four: &[u32]| (four[0] | four[1] << 4 | four[2] << 8 | four[3] << 12) as u16;
            words.extend(nibbles.chunks(4).map(word));
        }
    }
    words
}

/// A matrix of bytes in tiles of 128 rows by 4 columns, padded with zeros to whole tiles.
pub(crate) fn swizzled(bytes: &[u8], rows: usize, cols: usize) -> Vec<u8> {
    let (padded_rows, padded_cols) = (rows.next_multiple_of(128), cols.next_multiple_of(4));
    let mut target = vec![0; padded_rows * padded_cols];
    for row in 0..rows {
        for col in 0..cols {
            let tile = row / 128 * (padded_cols / 4) + col / 4;
            let (row_within, col_within) = (row % 128, col % 4);
            let place = tile * 512 + row_within % 32 * 16 + row_within / 32 * 4 + col_within;
            target[place] = bytes[row * cols + col];
        }
    }
    target
}

/// Swaps rows and columns of a row-major matrix that has `cols` columns.
pub(crate) fn transposed<T: Copy>(matrix: &[T], cols: usize) -> Vec<T> {
    (0..cols).flat_map(|col| matrix.iter().skip(col).step_by(cols).copied()).collect()
}

/// The bytes of words, as files hold them.
pub(crate) fn bytes_of(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
