//! Byte ranges of files: alignment, splitting.

use serde::Serialize;

/// A byte range of one file of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Extent {
    /// Which file, by its place in [`Checkpoint::files`](crate::Checkpoint::files).
    pub file: u32,
    /// Distance from the start of the file.
    pub offset_bytes: u64,
    /// Number of bytes; never 0 in a plan.
    pub len_bytes: u64,
}

impl Extent {
    /// Returns the offset of the first byte behind the extent.
    pub fn end_bytes(&self) -> u64 {
        self.offset_bytes + self.len_bytes
    }

    /// Returns the smallest extent around this one whose ends are multiples of `align_bytes`,
    /// except that it never passes the end of the file: a direct read of the last, partial
    /// sector is short by exactly the bytes the file does not have.
    pub fn cover(&self, align_bytes: u64, file_len_bytes: u64) -> Extent {
        let begin = align_down(self.offset_bytes, align_bytes);
        let end = align_up(self.end_bytes(), align_bytes).min(file_len_bytes).max(self.end_bytes());
        Extent { file: self.file, offset_bytes: begin, len_bytes: end - begin }
    }

    /// Splits the extent where `offset + phase` is a multiple of `len_bytes_max`.
    ///
    /// The phase lets the pieces of a large copy start on the boundaries of their *target*:
    /// `0..10` with phase 3 and length 4 is `0..1`, `1..5`, `5..9`, `9..10`.
    pub fn split(&self, len_bytes_max: u64, phase: u64) -> impl Iterator<Item = Extent> + use<> {
        let (file, end) = (self.file, self.end_bytes());
        let mut begin = self.offset_bytes;
        std::iter::from_fn(move || {
            if begin == end {
                return None;
            }
            // Sums of two offsets may pass 64 bits, so the phase is taken off the length instead.
            let (behind, ahead) = (begin % len_bytes_max, len_bytes_max - phase % len_bytes_max);
            let until_boundary =
                if behind < ahead { ahead - behind } else { len_bytes_max - (behind - ahead) };
            let len_bytes = until_boundary.min(end - begin);
            let piece = Extent { file, offset_bytes: begin, len_bytes };
            begin += len_bytes;
            Some(piece)
        })
    }
}

/// Equal pieces of an extent at equal distances: the first begins where the extent does, the last ends where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Stride {
    /// Length of each piece.
    pub piece_len_bytes: u64,
    /// Number of pieces.
    pub piece_count: u64,
    /// From the start of a piece to the start of the next; more than the length of one.
    pub stride_bytes: u64,
}

impl Stride {
    /// Returns the bytes of all pieces.
    pub fn len_bytes(&self) -> u64 {
        self.piece_len_bytes * self.piece_count
    }
}

/// Rounds down to a multiple of `align`, which is not 0.
pub const fn align_down(value: u64, align: u64) -> u64 {
    value - value % align
}

/// Rounds up to a multiple of `align`, which is not 0. Saturates at the largest multiple.
pub const fn align_up(value: u64, align: u64) -> u64 {
    match value % align {
        0 => value,
        rest => match value.checked_add(align - rest) {
            Some(up) => up,
            None => align_down(u64::MAX, align),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extent(offset_bytes: u64, len_bytes: u64) -> Extent {
        Extent { file: 0, offset_bytes, len_bytes }
    }

    #[test]
    fn a_cover_stops_at_the_end_of_the_file() {
        assert_eq!(extent(700, 1000).cover(512, 1800), extent(512, 1288));
        assert_eq!(extent(700, 1000).cover(512, 1700), extent(512, 1188));
        assert_eq!(extent(700, 1000).cover(1, 1700), extent(700, 1000));
    }

    #[test]
    fn splits_fall_on_the_targets_boundaries() {
        let pieces: Vec<_> = extent(0, 10).split(4, 3).map(|e| (e.offset_bytes, e.len_bytes)).collect();
        assert_eq!(pieces, [(0, 1), (1, 4), (5, 4), (9, 1)]);
    }

    proptest! {
        #[test]
        fn pieces_tile_the_extent(offset in 0u64..5000, len in 1u64..5000, max in 1u64..700, phase in 0u64..2000) {
            let whole = extent(offset, len);
            let mut next = offset;
            for piece in whole.split(max, phase) {
                prop_assert_eq!(piece.offset_bytes, next);
                prop_assert!(piece.len_bytes >= 1 && piece.len_bytes <= max);
                prop_assert!(piece.offset_bytes == offset || (piece.offset_bytes + phase) % max == 0);
                next = piece.end_bytes();
            }
            prop_assert_eq!(next, whole.end_bytes());
        }

        #[test]
        fn a_cover_contains_its_extent_and_is_aligned(offset in 0u64..5000, len in 1u64..5000, align in 1u64..600, tail in 0u64..5000) {
            let (whole, file_len) = (extent(offset, len), offset + len + tail);
            let cover = whole.cover(align, file_len);
            prop_assert!(cover.offset_bytes <= whole.offset_bytes && cover.end_bytes() >= whole.end_bytes());
            prop_assert_eq!(cover.offset_bytes % align, 0);
            prop_assert!(cover.end_bytes() % align == 0 || cover.end_bytes() == file_len);
            prop_assert!(cover.end_bytes() <= file_len);
        }
    }
}
