//! Blocks of host memory as bytes.

use std::fs;
use std::thread;
use std::time::Duration;

use tensorhaul_stage::{HUGE_PAGE_BYTES, HostMemory, StagingMemory};

use crate::meter;

/// Memory on huge pages where the system grants them, taken from the system when it is first touched.
pub struct Memory(HostMemory);

impl Memory {
    /// Reserves whole huge pages.
    ///
    /// # Panics
    /// When the system refuses.
    pub fn fresh(len_bytes: usize) -> Memory {
        let len_bytes = len_bytes.max(1).next_multiple_of(HUGE_PAGE_BYTES);
        Memory(HostMemory::allocate(len_bytes).expect("the machine has memory for the bench"))
    }

    /// Reserves memory and touches all of it.
    ///
    /// # Panics
    /// As [`fresh`](Memory::fresh).
    pub fn touched(len_bytes: usize) -> Memory {
        let mut memory = Memory::fresh(len_bytes);
        memory.bytes_mut().fill(1);
        memory
    }

    /// Returns the bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the block is initialized (the system zeroes it) and belongs to `self`.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().as_ptr(), self.0.len_bytes()) }
    }

    /// Returns the bytes, to write to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `self` is borrowed for as long as the slice lives.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr().as_ptr(), self.0.len_bytes()) }
    }
}

/// Touches and frees memory, so that what is timed next does not pay for the first touch of pages that a
/// virtual machine's host has taken back.
///
/// A guest with free page reporting gives its free pages to its host within two seconds, and to touch them again costs
/// up to a second a GB, unevenly; that is no loader's doing. Where a balloon does this, the memory is held until a report
/// under way is over: freeing it then starts the next two seconds, long enough for a run.
///
/// # Source
/// Linux, mm/page_reporting.c: `PAGE_REPORTING_DELAY` is two seconds, from the first free after a report.
pub fn prime(len_bytes: u64) {
    let spare = meter::available_bytes().saturating_sub(SPARE_BYTES);
    let memory = Memory::touched(len_bytes.min(spare) as usize);
    if has_balloon() {
        thread::sleep(REPORTING_DELAY);
    }
    drop(memory);
}

fn has_balloon() -> bool {
    let devices = fs::read_dir("/sys/bus/virtio/drivers/virtio_balloon").into_iter().flatten().flatten();
    devices.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))
}

/// The kernel's delay, and the report itself.
const REPORTING_DELAY: Duration = Duration::from_millis(2_300);

/// Left to everybody else while memory is primed.
const SPARE_BYTES: u64 = 1 << 30;
