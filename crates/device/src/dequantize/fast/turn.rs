//! Squares of codes turned: rows to columns.

/// Writes the `lines` of `source`, each `width` long, as columns of `target`: `target[i][j]` becomes `source[j][i]`.
#[inline(always)]
pub(super) fn turn(source: &[u8], lines: usize, width: usize, target: &mut [u8]) {
    let (even_lines, even_width) = (lines / 8 * 8, width / 8 * 8);
    for j in (0..even_lines).step_by(8) {
        for i in (0..even_width).step_by(8) {
            let eight =
                |r: usize| source[(j + r) * width + i..].first_chunk().expect("lines are as long as said");
            let turned = turn_eight(std::array::from_fn(|r| u64::from_le_bytes(*eight(r))));
            for (r, column) in turned.iter().enumerate() {
                target[(i + r) * lines + j..][..8].copy_from_slice(&column.to_le_bytes());
            }
        }
    }
    for i in 0..width {
        let first = if i < even_width { even_lines } else { 0 };
        for j in first..lines {
            target[i * lines + j] = source[j * width + i];
        }
    }
}

/// Turns 8 by 8 bytes: exchanges the off-diagonal quarters, then those of the quarters, then bytes.
///
/// # Source
/// H. S. Warren, "Hacker's Delight", 2nd edition, section 7-3, for bits.
#[inline(always)]
fn turn_eight(mut rows: [u64; 8]) -> [u64; 8] {
    for (distance, shift, mask) in
        [(4, 32, 0x0000_0000_ffff_ffff_u64), (2, 16, 0x0000_ffff_0000_ffff), (1, 8, 0x00ff_00ff_00ff_00ff)]
    {
        for r in (0..8).filter(|r| r & distance == 0) {
            let difference = (rows[r] >> shift ^ rows[r + distance]) & mask;
            rows[r + distance] ^= difference;
            rows[r] ^= difference << shift;
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_where_its_indices_say() {
        for (lines, width) in [(8, 8), (1, 1), (16, 24), (7, 9), (9, 7), (20, 33), (128, 128)] {
            let source: Vec<u8> = (0..lines * width).map(|i| (i * 37 + i / 256) as u8).collect();
            let mut target = vec![0; lines * width];
            turn(&source, lines, width, &mut target);
            let is_turned = |j: usize, i: usize| target[i * lines + j] == source[j * width + i];
            assert!((0..lines).all(|j| (0..width).all(|i| is_turned(j, i))), "{lines} x {width}");
        }
    }
}
