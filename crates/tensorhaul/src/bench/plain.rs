//! What a plain program does at best: reads of the very files and copies in memory, without a loader.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use tensorhaul_io::{Access, OpenFile, ReadCause, ReadError};
use tensorhaul_plan::Extent;
use tensorhaul_stage::{Filling, HostMemory, Layout, Ring};

use crate::error::{Error, ErrorKind, Result};

/// Files cut into pieces, and memory to read them into again and again.
pub(crate) struct Plain {
    pub(super) files: Arc<[OpenFile]>,
    pub(super) pieces: Vec<Extent>,
    pub(super) ring: Ring,
    cancel: Arc<AtomicBool>,
}

impl Plain {
    /// Takes memory and touches it.
    pub(crate) fn new(files: &Arc<[OpenFile]>, cancel: &Arc<AtomicBool>) -> Result<Plain> {
        let layout = Layout::new(MEMORY_BYTES, ALIGN_BYTES)?;
        let memory = HostMemory::allocate(layout.len_bytes());
        let memory = memory.map_err(|error| Error::new(ErrorKind::OutOfMemory, error))?;
        let ring = Ring::new(memory, layout);
        let mut buffers: Vec<Filling> = std::iter::from_fn(|| ring.try_take()).collect();
        buffers.iter_mut().for_each(|buffer| buffer.bytes_mut().fill(1));
        drop(buffers);
        let whole = |(file, open): (usize, &OpenFile)| Extent {
            file: file as u32,
            offset_bytes: 0,
            len_bytes: open.len_bytes(),
        };
        let extents = files.iter().enumerate().map(whole).filter(|extent| extent.len_bytes > 0);
        let pieces = extents.flat_map(|extent| extent.split(layout.buffer_len_bytes() as u64, 0)).collect();
        Ok(Plain { files: Arc::clone(files), pieces, ring, cancel: Arc::clone(cancel) })
    }

    /// Reads everything with `pread`, each thread into a buffer of its own.
    pub(crate) fn by_threads(&self, access: Access, thread_count: usize) -> Result<()> {
        let next = AtomicUsize::new(0);
        on_threads(thread_count.min(self.ring.layout().buffer_count() as usize), || {
            let Some(mut buffer) = self.ring.take() else { return Ok(()) };
            while let Some(piece) = self.pieces.get(next.fetch_add(1, Ordering::Relaxed))
                && !self.is_cancelled()
            {
                self.read(*piece, access, buffer.bytes_mut())?;
            }
            Ok(())
        })
    }

    fn read(&self, piece: Extent, access: Access, buffer: &mut [u8]) -> Result<()> {
        let file = &self.files[piece.file as usize];
        let (descriptor, align_bytes) = match (access, file.direct()) {
            (Access::Direct, Some((descriptor, direct))) => (descriptor, direct.align_bytes),
            _ => (file.cached().as_fd(), 1),
        };
        let (len, mut have) = (piece.len_bytes as usize, 0);
        // A direct read asks for whole sectors, also of the last, partial one; a buffer is made of whole ones.
        let ask = len.next_multiple_of(align_bytes as usize);
        while have < len {
            let offset_bytes = piece.offset_bytes + have as u64;
            let cause = match rustix::io::pread(descriptor, &mut buffer[have..ask], offset_bytes) {
                Ok(read) if read > 0 => {
                    have += read;
                    continue;
                }
                Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => ReadCause::End { at_bytes: offset_bytes },
                Err(errno) => ReadCause::Io(errno.into()),
            };
            return Err(Error::read(ReadError { extent: piece, cause }, file.path(), None));
        }
        Ok(())
    }

    /// Copies at least `bytes` from half of the memory to the other, on threads; returns how many it copied.
    pub(crate) fn copy(&self, bytes: u64, thread_count: usize) -> Result<u64> {
        let buffer_len = self.ring.layout().buffer_len_bytes() as u64;
        let pairs = self.ring.layout().buffer_count() as usize / 2;
        let thread_count = thread_count.clamp(1, pairs);
        let rounds = bytes.div_ceil(buffer_len * thread_count as u64);
        on_threads(thread_count, || {
            let take = || self.ring.take().ok_or_else(Error::cancelled);
            let mut own = (0..pairs / thread_count)
                .map(|_| Ok((take()?, take()?)))
                .collect::<Result<Vec<(Filling, Filling)>>>()?;
            for round in 0..rounds as usize {
                // Round after round another pair, so that processor caches are of no help.
                let index = round % own.len();
                let (source, target) = &mut own[index];
                target.bytes_mut().copy_from_slice(source.bytes_mut());
                if self.is_cancelled() {
                    break;
                }
            }
            Ok(())
        })?;
        Ok(rounds * buffer_len * thread_count as u64)
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
}

/// Does the same on several threads; returns the first error.
fn on_threads(thread_count: usize, work: impl Fn() -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..thread_count.max(1)).map(|_| scope.spawn(&work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("reads and copies do not panic"))
    })
}

/// 32 buffers of 4 MiB: the most that the direct reader has in flight, and more than processor caches hold.
const MEMORY_BYTES: usize = 128 << 20;

/// The strictest alignment of direct reads that the probe accepts.
const ALIGN_BYTES: usize = 4096;
