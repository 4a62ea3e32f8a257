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

/// Returns those of these processors that the calling thread may run on; none means that it stays where it is.
///
/// Whoever started the process may have bound it (taskset, numactl, a batch system): being near a device is no reason to leave that.
pub(crate) fn permitted(processors: Vec<u32>) -> Vec<u32> {
    // Where nobody can say, it stays as well.
    let Ok(own) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    let is_own = |processor: &u32| {
        let processor = *processor as usize;
        processor < rustix::thread::CpuSet::MAX_CPU && own.is_set(processor)
    };
    processors.into_iter().filter(is_own).collect()
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::engine::Engine;

    /// Hands out nothing, and notes where it is asked.
    #[derive(Default)]
    struct Asked(Mutex<Vec<Vec<u32>>>);

    impl Feed for Asked {
        fn next(&self, _wait: bool) -> Next {
            self.0.lock().unwrap().push(own());
            Next::Done
        }
    }

    impl Sink for Asked {
        fn done(&self, _done: Done) {
            unreachable!("nothing was handed out");
        }

        fn lost(&self, _read: u32, _error: ReadError) {
            unreachable!("nothing was handed out");
        }
    }

    /// Returns the processors that the calling thread may run on.
    fn own() -> Vec<u32> {
        let own = rustix::thread::sched_getaffinity(None).unwrap();
        let all = 0..rustix::thread::CpuSet::MAX_CPU;
        all.filter(|processor| own.is_set(*processor)).map(|processor| processor as u32).collect()
    }

    type Make = fn(Vec<u32>) -> Option<Box<dyn Engine>>;

    fn pread(near: Vec<u32>) -> Option<Box<dyn Engine>> {
        Some(Box::new(crate::pread::Pread::new(Arc::from([]), 2).near(near)))
    }

    #[cfg(all(target_os = "linux", feature = "io-uring"))]
    fn uring(near: Vec<u32>) -> Option<Box<dyn Engine>> {
        let uring = crate::uring::Uring::new(Arc::from([]), crate::engine::Depth::default(), None);
        Some(Box::new(uring.ok()?.near(near)))
    }

    #[test]
    fn readers_are_near_the_device_as_far_as_the_callers_own_binding_goes() {
        let all = own();
        let [first, .., last] = all[..] else {
            println!("skipped: this process may use one processor");
            return;
        };
        let makes = [
            pread as Make,
            #[cfg(all(target_os = "linux", feature = "io-uring"))]
            uring,
        ];
        for (bound, near, expected) in [
            (all.clone(), vec![last], vec![last]),
            (all.clone(), Vec::new(), all.clone()),
            (vec![first], all.clone(), vec![first]),
            (vec![first], vec![last], vec![first]),
            (vec![first], vec![5000], vec![first]),
        ] {
            for make in makes {
                let in_a_thread_of_its_own = || {
                    stay_on(&bound);
                    let Some(engine) = make(near.clone()) else {
                        println!("skipped: this system has no io_uring");
                        return;
                    };
                    let asked = Asked::default();
                    engine.run(&asked, &asked);
                    let asked = asked.0.into_inner().unwrap();
                    assert!(!asked.is_empty());
                    let name = engine.name();
                    assert!(
                        asked.iter().all(|own| *own == expected),
                        "{name}: {bound:?}, {near:?}: {asked:?}"
                    );
                };
                thread::scope(|scope| scope.spawn(in_a_thread_of_its_own).join().unwrap());
            }
        }
    }
}
