//! Threads that read one job after another: the loop under every engine but io_uring.

use std::io;
use std::sync::Mutex;
use std::thread;

use tensorhaul_plan::{Extent, Stride};

use crate::engine::{Access, Counts, Done, Feed, Job, Next, ReadCause, ReadError, Sink};

/// One positioned read, as often as it takes.
pub(crate) trait ReadAt: Sync {
    /// Reads at most `target.len()` bytes; fewer is allowed, 0 means the file ends here.
    fn read_at(&self, file: u32, access: Access, offset_bytes: u64, target: &mut [u8]) -> io::Result<usize>;

    /// Returns the alignment that direct reads of a file need, if it can be read directly.
    fn direct_align_bytes(&self, file: u32) -> Option<u64>;
}

/// Reads the feed's jobs on `thread_count` threads, all of which have ended when it returns.
///
/// The threads stay on the given processors, if there are any; the calling thread is one of them.
pub(crate) fn run(
    reader: &impl ReadAt,
    thread_count: u32,
    processors: &[u32],
    feed: &dyn Feed,
    sink: &dyn Sink,
) -> Counts {
    let total = Mutex::new(Counts::default());
    let worker = || {
        let mut counts = Counts::default();
        stay_on(processors);
        while let Next::Job(job) = feed.next(true) {
            sink.done(read(reader, job, &mut counts));
        }
        *total.lock().unwrap_or_else(std::sync::PoisonError::into_inner) += counts;
    };
    thread::scope(|scope| {
        for number in 1..thread_count {
            let name = format!("tensorhaul-read-{number}");
            // A system that refuses a thread still has this one.
            let _ = thread::Builder::new().name(name).spawn_scoped(scope, worker);
        }
        worker();
    });
    total.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Keeps the calling thread on these processors. A system that refuses runs it anywhere, only slower.
pub(crate) fn stay_on(processors: &[u32]) {
    if !processors.is_empty() {
        let mut set = rustix::thread::CpuSet::new();
        let known = processors
            .iter()
            .map(|processor| *processor as usize)
            .filter(|processor| *processor < rustix::thread::CpuSet::MAX_CPU);
        known.for_each(|processor| set.set(processor));
        let _ = rustix::thread::sched_setaffinity(None, &set);
    }
}

fn read(reader: &impl ReadAt, job: Job, counts: &mut Counts) -> Done {
    let Job { read, extent, stride, mut access, mut memory } = job;
    let direct_align = reader.direct_align_bytes(extent.file);
    if direct_align.is_none() || stride.is_some() {
        access = Access::Cached;
    }
    let result = match stride {
        Some(stride) => fill_pieces(reader, extent, stride, memory.bytes_mut(), counts),
        None => fill(reader, extent, access, direct_align.unwrap_or(1), memory.bytes_mut(), counts),
    };
    Done { read, memory, result }
}

/// Reads pieces of the extent, one request each, back to back into the memory.
fn fill_pieces(
    reader: &impl ReadAt,
    extent: Extent,
    stride: Stride,
    memory: &mut [u8],
    counts: &mut Counts,
) -> Result<(), ReadError> {
    let Stride { piece_len_bytes, piece_count, stride_bytes } = stride;
    let pieces = memory.chunks_exact_mut(piece_len_bytes as usize); // A job's memory holds it.
    for (number, piece) in (0..piece_count).zip(pieces) {
        let offset_bytes = extent.offset_bytes + number * stride_bytes;
        let extent = Extent { offset_bytes, len_bytes: piece_len_bytes, ..extent };
        fill(reader, extent, Access::Cached, 1, piece, counts)?;
    }
    Ok(())
}

/// Reads until the extent is complete, whatever pieces the system gives it in.
fn fill(
    reader: &impl ReadAt,
    extent: Extent,
    mut access: Access,
    align_bytes: u64,
    memory: &mut [u8],
    counts: &mut Counts,
) -> Result<(), ReadError> {
    let len = extent.len_bytes as usize; // A job's memory holds it.
    let mut have = 0;
    counts.requests += 1;
    while have < len {
        let ask = match access {
            // A direct read asks for whole sectors, also of the last, partial one.
            Access::Direct => len.next_multiple_of(align_bytes as usize).min(memory.len()),
            Access::Cached => len,
        };
        let offset_bytes = extent.offset_bytes + have as u64;
        counts.system_calls += 1;
        match reader.read_at(extent.file, access, offset_bytes, &mut memory[have..ask]) {
            Ok(0) => return Err(ReadError { extent, cause: ReadCause::End { at_bytes: offset_bytes } }),
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error)
                if access == Access::Direct
                    && matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) =>
            {
                counts.direct_refused += 1;
                access = Access::Cached;
            }
            Err(error) => return Err(ReadError { extent, cause: ReadCause::Io(error) }),
        }
        if !(have as u64).is_multiple_of(align_bytes) {
            access = Access::Cached; // The rest of a read that stopped inside a sector has no direct address.
        }
    }
    Ok(())
}
