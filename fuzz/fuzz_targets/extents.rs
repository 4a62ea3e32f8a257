//! Covers and pieces of an extent contain it, tile it, and stay in its file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tensorhaul_plan::extent::Extent;

/// What an input means: an extent's offset and length, the bytes behind it, the alignment of direct reads as a
/// power of two, the staging buffer's length, and the offset in the target that pieces are aligned to.
type Input = (u64, u64, u64, u8, u32, u64);

fuzz_target!(|input: Input| {
    let (offset_bytes, len_bytes, tail_bytes, align_bits, buffer_len_bytes, phase) = input;
    let file_len_bytes =
        offset_bytes.checked_add(len_bytes).and_then(|end_bytes| end_bytes.checked_add(tail_bytes));
    // The operating system counts file offsets in an `i64`.
    let Some(file_len_bytes) = file_len_bytes.filter(|len_bytes| i64::try_from(*len_bytes).is_ok()) else {
        return;
    };
    let whole = Extent { file: 0, offset_bytes, len_bytes };
    check_cover(whole, 1 << (align_bits % 31), file_len_bytes);
    // At most about a thousand pieces, so that a run spends its time on inputs.
    check_pieces(whole, u64::from(buffer_len_bytes).max(len_bytes / 1000).max(1), phase);
});

fn check_cover(whole: Extent, align_bytes: u64, file_len_bytes: u64) {
    let cover = whole.cover(align_bytes, file_len_bytes);
    assert!(cover.offset_bytes <= whole.offset_bytes && cover.end_bytes() >= whole.end_bytes());
    assert!(cover.offset_bytes.is_multiple_of(align_bytes));
    assert!(cover.end_bytes().is_multiple_of(align_bytes) || cover.end_bytes() == file_len_bytes);
    assert!(cover.end_bytes() <= file_len_bytes);
}

fn check_pieces(whole: Extent, len_bytes_max: u64, phase: u64) {
    let mut next_bytes = whole.offset_bytes;
    for piece in whole.split(len_bytes_max, phase) {
        assert_eq!(piece.offset_bytes, next_bytes);
        assert!((1..=len_bytes_max).contains(&piece.len_bytes));
        let target_offset = u128::from(next_bytes) + u128::from(phase);
        assert!(next_bytes == whole.offset_bytes || target_offset.is_multiple_of(u128::from(len_bytes_max)));
        next_bytes = piece.end_bytes();
    }
    assert_eq!(next_bytes, whole.end_bytes());
}
