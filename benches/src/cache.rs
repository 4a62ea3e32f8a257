//! The page cache's state, made and verified before each run.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::fs::{Advice, fadvise};
use serde::Serialize;
use tensorhaul_io::Residency;
use tensorhaul_io::probe::residency;

use crate::checkpoint::Checkpoint;
use crate::memory::Memory;

/// What of the checkpoint the page cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Nothing: bytes come from storage.
    Cold,
    /// Everything.
    Warm,
}

impl Cache {
    /// Puts the page cache into this state.
    ///
    /// # Errors
    /// I/O errors, and when the state cannot be reached or not be seen: a filesystem in memory is never cold.
    pub fn prepare(self, checkpoint: &Checkpoint) -> io::Result<()> {
        for (file, len_bytes) in checkpoint.open()? {
            match self {
                Cache::Cold => evict(&file, len_bytes)?,
                Cache::Warm => warm(&file, len_bytes)?,
            }
        }
        Ok(())
    }
}

fn evict(file: &File, len_bytes: u64) -> io::Result<()> {
    file.sync_all()?; // Dirty pages stay.
    for _ in 0..EVICTIONS_MAX {
        fadvise(file, 0, None, Advice::DontNeed)?;
        match residency(file, 0, len_bytes) {
            Residency::Cold => return Ok(()),
            // Pages on the way to the lists from which they can be evicted get there by themselves.
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
    Err(io::Error::other("the page cache keeps pages of the checkpoint; is its filesystem in memory?"))
}

fn warm(file: &File, len_bytes: u64) -> io::Result<()> {
    if residency(file, 0, len_bytes) == Residency::Hot {
        return Ok(());
    }
    // As a first reader leaves it: read-ahead fills large folios. Pages that a random reader brought in
    // singly are three times slower to copy.
    fadvise(file, 0, None, Advice::Sequential)?;
    let mut buffer = Memory::fresh(4 << 20);
    let mut offset_bytes = 0;
    while offset_bytes < len_bytes {
        match file.read_at(buffer.bytes_mut(), offset_bytes)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => offset_bytes += read as u64,
        }
    }
    match residency(file, 0, len_bytes) {
        Residency::Hot => Ok(()),
        _ => Err(io::Error::other("the page cache does not keep the checkpoint; is there memory for it?")),
    }
}

/// A second is enough for every page that can go.
const EVICTIONS_MAX: u32 = 50;
