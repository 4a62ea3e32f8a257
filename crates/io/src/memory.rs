//! The `memory` engine: files that are bytes in memory, with faults from a seed.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::engine::{Access, Counts, Engine, Feed, Sink};
use crate::threads::{self, ReadAt};

/// Serves reads from memory, misbehaving exactly as told.
pub struct Memory {
    files: Vec<Arc<[u8]>>,
    faults: Faults,
    thread_count: u32,
    calls: AtomicU64,
}

/// What goes wrong, and how often. The same seed gives each call the same fate.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Where the dice start.
    pub seed: u64,
    /// One read in so many returns fewer bytes than asked for; 0 for none.
    pub short_one_in: u64,
    /// One read in so many is interrupted (EINTR) before it reads anything; 0 for none.
    pub interrupted_one_in: u64,
    /// One read in so many waits for up to this long first; 0 for none.
    pub delayed_one_in: u64,
    /// The longest delay.
    pub delay_max: Duration,
    /// What all reads have to share, also those of other engines that have a clone of it.
    pub disk: Option<Disk>,
    /// Reads that touch this byte of this file fail with this error number.
    pub fails_at: Option<FailsAt>,
    /// This file ends here, whatever its header said: somebody truncated it.
    pub ends_at: Option<(u32, u64)>,
}

/// A disk's speed: reads pass one after the other, whoever asks. Clones are handles of the same disk.
#[derive(Clone, Debug)]
pub struct Disk {
    bytes_per_s: u64,
    free_at: Arc<Mutex<Instant>>,
}

impl Disk {
    /// Makes a disk that is idle.
    ///
    /// # Panics
    /// When it would stand still.
    pub fn new(bytes_per_s: u64) -> Disk {
        assert!(bytes_per_s > 0, "a disk moves");
        Disk { bytes_per_s, free_at: Arc::new(Mutex::new(Instant::now())) }
    }

    /// Waits until these bytes have passed, behind those of whoever came before.
    fn carry(&self, len_bytes: u64) {
        let done_at = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let seconds = len_bytes as f64 / self.bytes_per_s as f64;
            *free_at = (*free_at).max(Instant::now()) + Duration::from_secs_f64(seconds);
            *free_at
        };
        std::thread::sleep(done_at.saturating_duration_since(Instant::now()));
    }
}

/// A byte that cannot be read.
#[derive(Clone, Copy, Debug)]
pub struct FailsAt {
    /// Number of the file.
    pub file: u32,
    /// Offset in it.
    pub offset_bytes: u64,
    /// Error number, such as 5 for EIO.
    pub errno: i32,
}

impl Memory {
    /// Serves these bytes, to be read on `thread_count` threads (at least one).
    pub fn new(files: Vec<Arc<[u8]>>, thread_count: u32, faults: Faults) -> Memory {
        Memory { files, faults, thread_count: thread_count.max(1), calls: AtomicU64::new(0) }
    }

    /// Rolls the dice of one call: three independent numbers.
    fn roll(&self) -> [u64; 3] {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        [1, 2, 3].map(|salt| splitmix64(self.faults.seed ^ splitmix64(call.wrapping_mul(4) + salt)))
    }
}

impl Engine for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn run(&self, feed: &dyn Feed, sink: &dyn Sink) -> Counts {
        threads::run(self, self.thread_count, &[], feed, sink)
    }
}

impl ReadAt for Memory {
    fn read_at(&self, file: u32, _access: Access, offset_bytes: u64, target: &mut [u8]) -> io::Result<usize> {
        let faults = &self.faults;
        let [interrupted, delayed, short] = self.roll();
        if hits(delayed, faults.delayed_one_in) {
            let nanos = faults.delay_max.as_nanos() as u64;
            std::thread::sleep(Duration::from_nanos(splitmix64(delayed) % nanos.max(1)));
        }
        if hits(interrupted, faults.interrupted_one_in) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let bytes = &self.files[file as usize];
        let end = match faults.ends_at {
            Some((ended, at)) if ended == file => at.min(bytes.len() as u64),
            _ => bytes.len() as u64,
        };
        let mut len = end.saturating_sub(offset_bytes).min(target.len() as u64);
        if hits(short, faults.short_one_in) && len > 1 {
            len = 1 + splitmix64(short) % (len - 1);
        }
        if let Some(fails) = faults.fails_at
            && fails.file == file
            && (offset_bytes..offset_bytes + len).contains(&fails.offset_bytes)
        {
            return Err(io::Error::from_raw_os_error(fails.errno));
        }
        if let Some(disk) = &faults.disk {
            disk.carry(len);
        }
        let (begin, len) = (offset_bytes.min(end) as usize, len as usize);
        target[..len].copy_from_slice(&bytes[begin..begin + len]);
        Ok(len)
    }

    fn direct_align_bytes(&self, _file: u32) -> Option<u64> {
        None
    }
}

fn hits(dice: u64, one_in: u64) -> bool {
    one_in > 0 && dice.is_multiple_of(one_in)
}

/// # Source
/// Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014.
fn splitmix64(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_through_clones_of_a_disk_pass_one_after_the_other() {
        let disk = Disk::new(1_000_000_000);
        let free_at = || *disk.free_at.lock().unwrap();
        let before = free_at();
        disk.clone().carry(500_000);
        let between = free_at();
        disk.carry(500_000);
        assert!(between >= before + Duration::from_micros(500), "a clone's read keeps the disk busy");
        assert!(free_at() >= between + Duration::from_micros(500), "and the next is behind it");
    }
}
