//! The `pread` engine: portable, and the fastest way out of the page cache.

use std::io;
use std::sync::Arc;

use crate::engine::{Access, Counts, Engine, Feed, Sink};
use crate::file::OpenFile;
use crate::threads::{self, ReadAt};

/// Reads with `pread` on threads; each thread is one request in flight.
pub struct Pread {
    files: Arc<[OpenFile]>,
    thread_count: u32,
    processors: Vec<u32>,
}

impl Pread {
    /// Reads these files on `thread_count` threads (at least one).
    pub fn new(files: Arc<[OpenFile]>, thread_count: u32) -> Pread {
        Pread { files, thread_count: thread_count.max(1), processors: Vec::new() }
    }

    /// Keeps the threads on these processors, those near the device that the bytes go to; empty means any. A caller that is bound to others
    /// stays there.
    pub fn near(self, processors: Vec<u32>) -> Pread {
        Pread { processors: threads::permitted(processors), ..self }
    }
}

impl Engine for Pread {
    fn name(&self) -> &'static str {
        "pread"
    }

    fn run(&self, feed: &dyn Feed, sink: &dyn Sink) -> Counts {
        threads::run(self, self.thread_count, &self.processors, feed, sink)
    }
}

impl ReadAt for Pread {
    fn read_at(&self, file: u32, access: Access, offset_bytes: u64, target: &mut [u8]) -> io::Result<usize> {
        let file = &self.files[file as usize];
        let read = match (access, file.direct()) {
            (Access::Direct, Some((direct, _))) => rustix::io::pread(direct, target, offset_bytes),
            _ => rustix::io::pread(file.cached(), target, offset_bytes),
        };
        Ok(read?)
    }

    fn direct_align_bytes(&self, file: u32) -> Option<u64> {
        self.files[file as usize].direct().map(|(_, direct)| direct.align_bytes)
    }
}
