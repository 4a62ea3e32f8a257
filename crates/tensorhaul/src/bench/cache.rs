//! The page cache's state before a run: made, and seen to be so.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::{Advice, fadvise};
use serde::Serialize;
use tensorhaul_io::{DirectRefusal, OpenFile, Residency, probe};

use crate::report::Report;

/// What of the files the page cache held when a run began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Cache {
    /// Nothing: bytes come from storage.
    Cold,
    /// Everything.
    Hot,
    /// Whatever it happened to hold.
    AsFound,
    /// The run reads no file.
    Unused,
}

impl Cache {
    /// Puts the page cache into this state, and asks the system whether it is there. The error says why not; after a
    /// cancellation it may say anything.
    pub(crate) fn prepare(self, files: &[OpenFile], cancel: &AtomicBool) -> Result<(), String> {
        match self {
            Cache::Cold => files.iter().try_for_each(evict),
            Cache::Hot => warm(files, cancel),
            Cache::AsFound | Cache::Unused => Ok(()),
        }
    }

    /// Tells whether a run found the cache as it was prepared: what a load saw, or what is there behind a plain read.
    pub(crate) fn was_found(self, report: Option<&Report>, files: &[OpenFile]) -> bool {
        match (self, report) {
            // Opening read the headers, and the kernel read ahead of them.
            (Cache::Cold, Some(report)) => report.bytes_hot <= files.len() as u64 * READ_AHEAD_BYTES_MAX,
            (Cache::Hot, Some(report)) => report.bytes_cold == 0,
            (Cache::Hot, None) => are_hot(files),
            _ => true,
        }
    }
}

fn residency(file: &OpenFile) -> Residency {
    probe::residency(file.cached(), 0, file.len_bytes())
}

fn evict(file: &OpenFile) -> Result<(), String> {
    if let Err(refusal @ DirectRefusal::InMemory { .. }) = file.probe_direct() {
        return Err(format!("never cold: {refusal}"));
    }
    // Dirty pages stay, so they are written first; where that fails, the check below tells.
    let _ = file.cached().sync_all();
    for _ in 0..EVICTIONS_MAX {
        let _ = fadvise(file.cached(), 0, None, Advice::DontNeed);
        match residency(file) {
            Residency::Cold => return Ok(()),
            Residency::Unknown => return Err(UNTOLD.to_owned()),
            // Pages on the way to the lists from which they can be evicted get there by themselves.
            _ => thread::sleep(Duration::from_millis(20)),
        }
    }
    Err("the page cache does not let go of the files; is somebody using them?".to_owned())
}

fn warm(files: &[OpenFile], cancel: &AtomicBool) -> Result<(), String> {
    for attempt in 0..WARMINGS_MAX {
        for file in files {
            match residency(file) {
                Residency::Hot => {}
                Residency::Unknown => return Err(UNTOLD.to_owned()),
                _ => read_through(file.cached(), cancel).map_err(|error| error.to_string())?,
            }
        }
        if are_hot(files) {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50) * attempt);
    }
    Err("the page cache does not keep the files; is there memory for them?".to_owned())
}

fn are_hot(files: &[OpenFile]) -> bool {
    files.iter().all(|file| residency(file) == Residency::Hot)
}

/// Reads a file as a first reader would, whose read-ahead fills large folios: pages that a random reader
/// brought in one by one are three times slower to copy.
fn read_through(file: &File, cancel: &AtomicBool) -> std::io::Result<()> {
    fadvise(file, 0, None, Advice::Sequential)?;
    let mut buffer = vec![0; 4 << 20];
    let mut offset_bytes = 0;
    while !cancel.load(Ordering::Relaxed) {
        match file.read_at(&mut buffer, offset_bytes)? {
            0 => break,
            read => offset_bytes += read as u64,
        }
    }
    Ok(fadvise(file, 0, None, Advice::Normal)?)
}

const UNTOLD: &str = "the filesystem does not tell what of the files the page cache holds";

/// A second is enough for every page that can go.
const EVICTIONS_MAX: u32 = 50;

/// A system that takes idle pages back does so in bursts; this waits for the better part of two seconds.
const WARMINGS_MAX: u32 = 8;

/// The longest read-ahead of any kernel's defaults.
const READ_AHEAD_BYTES_MAX: u64 = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn file(folder: &str) -> (tempfile::NamedTempFile, OpenFile) {
        let file = tempfile::NamedTempFile::new_in(folder).unwrap();
        std::fs::write(file.path(), vec![7; 300_000]).unwrap();
        let open = OpenFile::open(file.path()).unwrap();
        (file, open)
    }

    #[test]
    fn states_are_made_and_seen() {
        let (_file, open) = file(".");
        for state in [Cache::Cold, Cache::Hot, Cache::Cold] {
            state.prepare(std::slice::from_ref(&open), &AtomicBool::new(false)).unwrap();
            let expected = if state == Cache::Cold { Residency::Cold } else { Residency::Hot };
            assert_eq!(residency(&open), expected);
        }
    }

    #[test]
    fn files_in_memory_are_never_cold() {
        let (_file, open) = file("/dev/shm");
        let why = Cache::Cold.prepare(std::slice::from_ref(&open), &AtomicBool::new(false)).unwrap_err();
        assert_eq!(why, "never cold: tmpfs keeps its files in memory");
        Cache::Hot.prepare(&[open], &AtomicBool::new(false)).unwrap();
    }
}
