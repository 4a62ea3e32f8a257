//! How far a load is.

/// Totals so far. `read_bytes` ends at `total_bytes` unless the load fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes that have arrived.
    pub read_bytes: u64,
    /// Bytes that the plan reads.
    pub total_bytes: u64,
    /// Tensors that are ready.
    pub ready_tensors: u64,
    /// Tensors asked for.
    pub total_tensors: u64,
}
