//! The `mmap` engine: copies out of a mapping, by the caller's choice only.

use std::io;
use std::sync::Arc;

use crate::engine::{Access, Counts, Engine, Feed, Sink};
use crate::file::OpenFile;
use crate::threads::{self, ReadAt};

/// Reads by copying out of mappings, on threads.
///
/// If another process truncates a file meanwhile, touching a page behind its new end kills this
/// process (SIGBUS). Each copy first checks the file's length, which narrows that window and cannot
/// close it.
pub struct Mmap {
    files: Arc<[OpenFile]>,
    mappings: Vec<memmap2::Mmap>,
    thread_count: u32,
}

impl Mmap {
    /// Maps these files, to be read on `thread_count` threads (at least one).
    ///
    /// # Errors
    /// The system's, with the number of the file it refused to map.
    pub fn new(files: Arc<[OpenFile]>, thread_count: u32) -> Result<Mmap, (u32, io::Error)> {
        let map = |(number, file): (usize, &OpenFile)| map(file).map_err(|error| (number as u32, error));
        let mappings = files.iter().enumerate().map(map).collect::<Result<_, _>>()?;
        Ok(Mmap { files, mappings, thread_count: thread_count.max(1) })
    }
}

/// Maps a whole file for reading.
///
/// # Errors
/// The system's.
pub fn map(file: &OpenFile) -> io::Result<memmap2::Mmap> {
    // SAFETY: the mapping is only read. Another process that writes to the file changes the bytes under
    // us, and one that truncates it makes a later touch fatal: the caller chose mmap knowing this (the
    // types that hand out mappings say so), and `OpenFile::check_unchanged` detects it where it can.
    unsafe { memmap2::Mmap::map(file.cached()) }
}

impl Engine for Mmap {
    fn name(&self) -> &'static str {
        "mmap"
    }

    fn run(&self, feed: &dyn Feed, sink: &dyn Sink) -> Counts {
        threads::run(self, self.thread_count, &[], feed, sink)
    }
}

impl ReadAt for Mmap {
    fn read_at(&self, file: u32, _access: Access, offset_bytes: u64, target: &mut [u8]) -> io::Result<usize> {
        let len_now = self.files[file as usize].cached().metadata()?.len();
        let mapped = &self.mappings[file as usize];
        let end = (mapped.len() as u64).min(len_now);
        let left = end.saturating_sub(offset_bytes).min(target.len() as u64) as usize;
        let begin = offset_bytes.min(end) as usize;
        target[..left].copy_from_slice(&mapped[begin..begin + left]);
        Ok(left)
    }

    fn direct_align_bytes(&self, _file: u32) -> Option<u64> {
        None
    }
}
