//! The scalar twin of every kernel: plain loops that say what an operation means.

use std::thread::available_parallelism;

use crate::cast::cast;
use crate::dequantize::dequantize;
use crate::operation::{Cast, Dequantize, Location, Strided};

/// # Safety
/// Nobody else writes the source's range or touches the target's meanwhile, and the two do not overlap.
pub(super) unsafe fn run_cast(operation: &Cast<'_>) {
    // SAFETY: the caller's promise.
    let source = unsafe { bytes(operation.source, operation.source_len_bytes()) };
    // SAFETY: as above.
    let target = unsafe { bytes_mut(operation.target, operation.target_len_bytes()) };
    cast(operation.source_dtype, source, operation.target_dtype, target);
}

/// # Safety
/// As for [`run_cast`].
pub(super) unsafe fn run_strided(operation: &Strided<'_>) {
    // SAFETY: the caller's promise.
    let source = unsafe { bytes(operation.source, operation.source_reach_bytes()) };
    // SAFETY: as above.
    let target = unsafe { bytes_mut(operation.target, operation.target_reach_bytes()) };
    let len = operation.piece_len_bytes as usize;
    for piece in 0..operation.piece_count {
        let from = (piece * operation.source_stride_bytes) as usize;
        let to = (piece * operation.target_stride_bytes) as usize;
        target[to..to + len].copy_from_slice(&source[from..from + len]);
    }
}

/// # Safety
/// As for [`run_cast`], for every source.
pub(super) unsafe fn run_dequantize(operation: &Dequantize<'_>) {
    let sources = operation.sources.iter().map(|source| {
        // SAFETY: the caller's promise.
        (source.role, unsafe { bytes(source.start, source.len_bytes) })
    });
    let sources = sources.collect();
    // SAFETY: as above.
    let target = unsafe { bytes_mut(operation.target, operation.target_len_bytes()) };
    let thread_count = available_parallelism().map_or(1, usize::from);
    dequantize(operation.recipe, &sources, operation.output, target, thread_count);
}

/// # Safety
/// Nobody writes the range while the slice lives.
unsafe fn bytes(location: Location<'_>, len_bytes: u64) -> &[u8] {
    let start = super::place(location.allocation, location.offset_bytes, len_bytes as usize);
    // SAFETY: `place` keeps the range inside the allocation, which is initialized; the rest is the caller's promise.
    unsafe { std::slice::from_raw_parts(start.as_ptr(), len_bytes as usize) }
}

/// # Safety
/// Nobody else touches the range while the slice lives.
unsafe fn bytes_mut(location: Location<'_>, len_bytes: u64) -> &mut [u8] {
    let start = super::place(location.allocation, location.offset_bytes, len_bytes as usize);
    // SAFETY: as in `bytes`.
    unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len_bytes as usize) }
}
