//! What a load reads beyond the bound that its request sets.

use tensorhaul_plan::{OverRead, Plan};

use crate::report::Fallback;

/// Tells what a plan reads in vain because it cannot spare it, one line for each kind.
pub(crate) fn fallbacks(plan: &Plan) -> Vec<Fallback> {
    let sums = OverRead::sums(plan.over_reads()).into_iter();
    let noticed = sums.filter(|sum| sum.over_bytes >= TOLD_BYTES_MIN);
    noticed.map(|sum| Fallback::new(sum.to_string(), sum.worst.reason)).collect()
}

/// Half a millisecond at 2 GB/s. Every small load reads a few blocks in vain; [`Plan::over_reads`] tells of all.
const TOLD_BYTES_MIN: u64 = 1 << 20;
