//! The bound on what is read in vain, and which tensors make a plan pass it.
//!
//! Three things add to what is needed: the gaps of rows that are read whole (`routes`), the gaps between neighbours that share a request
//! (`requests`), and the blocks of direct reads. Blocks and the gaps of the shortest pieces cannot be spared, so they come first;
//! of what the bound leaves, rows take before neighbours, because their gaps spare a request each 8 KiB and less. So a plan passes its bound only by what
//! it cannot spare, and that is told.

use std::cmp::Reverse;

use crate::plan::{Promised, Vain};

/// Returns how many bytes more than those needed may be read.
pub(super) fn allowed_bytes(over_read_max: f64, needed_bytes: u64) -> u64 {
    ((over_read_max - 1.0) * needed_bytes as f64) as u64
}

/// Returns the fewest that account for what a plan reads beyond its bound, the worst first.
pub(super) fn over_reads(
    over_read_max: f64,
    promised: &Promised,
    vain: impl FnOnce() -> Vec<Vain>,
) -> Vec<Vain> {
    let over_bytes = promised.read_bytes - promised.needed_bytes;
    let mut excess_bytes = over_bytes.saturating_sub(allowed_bytes(over_read_max, promised.needed_bytes));
    if excess_bytes == 0 {
        return Vec::new();
    }
    let mut vain = vain();
    vain.sort_unstable_by_key(|vain| (Reverse(vain.over_bytes), vain.id));
    let is_needed = |vain: &Vain| {
        let is_needed = excess_bytes > 0;
        excess_bytes = excess_bytes.saturating_sub(vain.over_bytes);
        is_needed
    };
    let count = vain.iter().map(is_needed).take_while(|is_needed| *is_needed).count();
    vain.truncate(count);
    vain
}
