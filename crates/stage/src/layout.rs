//! How a staging budget becomes buffers.

use std::fmt;

/// The buffers of a ring: how long, how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    buffer_len_bytes: usize,
    buffer_count: u32,
}

impl Layout {
    /// Cuts a budget into buffers whose length is a multiple of `align_bytes` (a power of two).
    ///
    /// # Errors
    /// [`LayoutError`] when the budget holds no single buffer of [`BUFFER_LEN_BYTES_MIN`].
    pub fn new(budget_bytes: usize, align_bytes: usize) -> Result<Layout, LayoutError> {
        assert!(align_bytes.is_power_of_two());
        let smallest = BUFFER_LEN_BYTES_MIN.max(align_bytes);
        if budget_bytes < smallest {
            return Err(LayoutError { budget_bytes, needed_bytes: smallest });
        }
        let buffer_len_bytes = (budget_bytes / HOLDERS) // Everyone who can hold one at a time has one,
            .clamp(smallest, BUFFER_LEN_BYTES_MAX) // no smaller and no larger than storage likes,
            & !(align_bytes - 1); // and direct reads can fill it to the last byte.
        let buffer_count = (budget_bytes / buffer_len_bytes).try_into().unwrap_or(u32::MAX);
        Ok(Layout { buffer_len_bytes, buffer_count })
    }

    /// Returns the same buffers, but no more than `count` of them (at least one): what a small load needs.
    pub fn at_most(self, count: u64) -> Layout {
        let buffer_count = count.clamp(1, self.buffer_count.into()) as u32; // Clamped to a u32.
        Layout { buffer_count, ..self }
    }

    /// Returns so many of the same buffers (at least one).
    pub fn of_count(self, buffer_count: u32) -> Layout {
        Layout { buffer_count: buffer_count.max(1), ..self }
    }

    /// Returns as many buffers, but none longer than the longest read needs.
    pub fn for_reads_of(self, read_len_bytes_max: u64) -> Layout {
        let read_len = read_len_bytes_max.clamp(1, self.buffer_len_bytes as u64) as usize; // Clamped to a usize.
        let buffer_len_bytes = read_len.next_multiple_of(BUFFER_LEN_BYTES_MIN).min(self.buffer_len_bytes);
        Layout { buffer_len_bytes, ..self }
    }

    /// Returns the length of each buffer.
    pub fn buffer_len_bytes(&self) -> usize {
        self.buffer_len_bytes
    }

    /// Returns the number of buffers.
    pub fn buffer_count(&self) -> u32 {
        self.buffer_count
    }

    /// Returns the bytes of all buffers; at most the budget.
    pub fn len_bytes(&self) -> usize {
        self.buffer_len_bytes * self.buffer_count as usize
    }
}

/// A staging budget that is too small for one buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayoutError {
    /// The budget given.
    pub budget_bytes: usize,
    /// The smallest that works.
    pub needed_bytes: usize,
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LayoutError { budget_bytes, needed_bytes } = self;
        write!(
            f,
            "a staging budget of {budget_bytes} bytes holds no buffer; the smallest is {needed_bytes} bytes"
        )
    }
}

impl std::error::Error for LayoutError {}

/// Who can hold a buffer at once: sixteen requests that keep storage busy, eight workers that fill from the
/// page cache, the pipeline and the device's copy queue with four each. A larger budget makes buffers
/// longer before it makes them more.
const HOLDERS: usize = 16 + 8 + 4 + 4;

/// One page of direct I/O. A smaller buffer could not be filled by any direct read.
pub const BUFFER_LEN_BYTES_MIN: usize = 4096;

/// Past 4 MiB a request gets no faster on any disk measured (see ARCHITECTURE.md), a worker keeps a
/// buffer for longer, and the ring has fewer to go round.
const BUFFER_LEN_BYTES_MAX: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_become_buffers() {
        let shape = |budget| {
            let layout = Layout::new(budget, 4096).unwrap();
            (layout.buffer_len_bytes(), layout.buffer_count())
        };
        assert_eq!(shape(256 << 20), (4 << 20, 64));
        assert_eq!(shape(16 << 20), (512 << 10, 32));
        assert_eq!(shape(1 << 20), (32 << 10, 32));
        assert_eq!(shape(10_000), (4096, 2));
        assert_eq!(shape(4096), (4096, 1));
    }

    #[test]
    fn a_budget_below_one_buffer_says_what_would_work() {
        let error = Layout::new(4095, 4096).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a staging budget of 4095 bytes holds no buffer; the smallest is 4096 bytes"
        );
    }

    #[test]
    fn small_loads_take_small_rings() {
        assert_eq!(Layout::new(256 << 20, 4096).unwrap().at_most(3).len_bytes(), 12 << 20);
        assert_eq!(Layout::new(256 << 20, 4096).unwrap().at_most(0).buffer_count(), 1);
        let of_reads = |read_len| Layout::new(256 << 20, 4096).unwrap().at_most(2).for_reads_of(read_len);
        assert_eq!(of_reads(261_384).len_bytes(), 2 * 262_144);
        assert_eq!(of_reads(4096).len_bytes(), 2 * 4096);
        assert_eq!(of_reads(0).len_bytes(), 2 * 4096);
        assert_eq!(of_reads(u64::MAX).len_bytes(), 8 << 20, "the budget's buffers are the limit");
    }
}
