//! Every engine keeps the promises of the engine contract, on a real disk and in memory.
#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tensorhaul_io::conformance::{self, Files, assert_passes};
use tensorhaul_io::memory::{Faults, Memory};
use tensorhaul_io::mmap::Mmap;
use tensorhaul_io::pread::Pread;
use tensorhaul_io::{Counts, Done, Engine, Feed, OpenFile, ReadCause, ReadError, Sink};
use tensorhaul_plan::Extent;

#[test]
fn pread_passes_on_one_thread() {
    assert_passes(disk().path(), &|files, _| Box::new(Pread::new(Arc::clone(&files.open), 1)));
}

#[test]
fn pread_passes_on_many_threads() {
    assert_passes(disk().path(), &|files, _| Box::new(Pread::new(Arc::clone(&files.open), 8)));
}

#[test]
fn pread_passes_where_files_live_in_memory() {
    assert_passes(shm().path(), &|files, _| Box::new(Pread::new(Arc::clone(&files.open), 2)));
}

#[test]
fn mmap_passes() {
    assert_passes(disk().path(), &|files, _| Box::new(Mmap::new(Arc::clone(&files.open), 3).unwrap()));
}

#[test]
fn memory_passes() {
    assert_passes(disk().path(), &|files, _| memory(files, Faults::default()));
}

#[test]
fn memory_passes_while_reads_are_short_and_interrupted() {
    let seed = seed();
    let faults = Faults {
        seed,
        short_one_in: 3,
        interrupted_one_in: 4,
        delayed_one_in: 50,
        delay_max: Duration::from_micros(200),
        ..Faults::default()
    };
    assert_passes(disk().path(), &|files, _| memory(files, faults.clone()));
}

#[test]
fn the_suite_finds_an_engine_that_breaks_a_promise() {
    let breaks: [(Break, &str); 5] = [
        (Break::LosesAnswers, "0 answers"),
        (Break::ChangesBytes, "differs"),
        (Break::WritesBehind, "bytes behind the extent were written"),
        (Break::HidesErrors, "differs"),
        (Break::MisstatesTheEnd, "says the error"),
    ];
    for (how, found) in breaks {
        let folder = disk();
        let verdicts = conformance::run(folder.path(), &|files, _| {
            Box::new(Broken { inner: Pread::new(Arc::clone(&files.open), 2), how })
        });
        let texts: Vec<String> = verdicts.into_iter().filter_map(|verdict| verdict.result.err()).collect();
        assert!(texts.iter().any(|text| text.contains(found)), "{how:?}: {texts:?}");
    }
}

/// An engine that breaks a promise.
struct Broken {
    inner: Pread,
    how: Break,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Break {
    LosesAnswers,
    ChangesBytes,
    WritesBehind,
    HidesErrors,
    MisstatesTheEnd,
}

struct BrokenSink<'s>(&'s dyn Sink, Break);

impl Engine for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn run(&self, feed: &dyn Feed, sink: &dyn Sink) -> Counts {
        self.inner.run(feed, &BrokenSink(sink, self.how))
    }
}

impl Sink for BrokenSink<'_> {
    fn done(&self, mut done: Done) {
        match (self.1, &mut done.result) {
            (Break::LosesAnswers, _) if done.read % 7 == 3 => return,
            (Break::ChangesBytes, Ok(())) => done.memory.bytes_mut()[0] ^= 1,
            (Break::WritesBehind, Ok(())) => *done.memory.bytes_mut().last_mut().unwrap() ^= 1,
            (Break::HidesErrors, result) => *result = Ok(()),
            (Break::MisstatesTheEnd, Err(ReadError { cause: ReadCause::End { at_bytes }, .. })) => {
                *at_bytes += 1
            }
            _ => {}
        }
        self.0.done(done);
    }

    fn lost(&self, read: u32, error: ReadError) {
        self.0.lost(read, error);
    }
}

#[test]
fn a_read_behind_the_end_of_a_file_does_not_claim_to_know_the_end() {
    let extent = Extent { file: 0, offset_bytes: 4096, len_bytes: 10 };
    let text = |at_bytes| ReadError { extent, cause: ReadCause::End { at_bytes } }.to_string();
    assert_eq!(
        text(4096),
        "reading bytes 4096..4106: the file ends before them; it was longer when it was opened"
    );
    assert_eq!(
        text(4100),
        "reading bytes 4096..4106: the file ends at byte 4100; it was longer when it was opened"
    );
}

fn memory(files: &Files, faults: Faults) -> Box<Memory> {
    Box::new(Memory::new(files.bytes.clone(), 4, Faults { ends_at: files.cut, ..faults }))
}

#[cfg(feature = "io-uring")]
mod uring {
    use tensorhaul_io::Depth;
    use tensorhaul_io::conformance::Make;
    use tensorhaul_io::uring::Uring;

    use super::*;

    #[test]
    fn io_uring_passes_with_registered_buffers() {
        passes(disk().path(), &|files, ring| {
            let uring = Uring::new(Arc::clone(&files.open), Depth::default(), Some(ring.clone())).unwrap();
            assert!(matches!(uring.registered().buffers, Some(Ok(()))), "{:?}", uring.registered());
            assert!(uring.registered().files.is_ok());
            Box::new(uring)
        });
    }

    #[test]
    fn io_uring_passes_without_registered_buffers() {
        passes(disk().path(), &|files, _| {
            Box::new(Uring::new(Arc::clone(&files.open), Depth::default(), None).unwrap())
        });
    }

    #[test]
    fn io_uring_passes_with_one_request_in_flight() {
        let depth = Depth { requests: 1, requests_max: 1, request_len_bytes: 4096 };
        passes(disk().path(), &|files, ring| {
            Box::new(Uring::new(Arc::clone(&files.open), depth, Some(ring.clone())).unwrap())
        });
    }

    #[test]
    fn io_uring_passes_when_every_job_takes_several_requests() {
        let depth = Depth { requests: 3, requests_max: 3, request_len_bytes: 4096 };
        passes(disk().path(), &|files, ring| {
            Box::new(Uring::new(Arc::clone(&files.open), depth, Some(ring.clone())).unwrap())
        });
    }

    #[test]
    fn io_uring_passes_when_jobs_are_no_multiple_of_a_request() {
        let depth = Depth { requests: 2, requests_max: 5, request_len_bytes: 3 * 4096 };
        passes(disk().path(), &|files, _| {
            Box::new(Uring::new(Arc::clone(&files.open), depth, None).unwrap())
        });
    }

    #[test]
    fn io_uring_passes_where_files_live_in_memory() {
        passes(shm().path(), &|files, ring| {
            Box::new(Uring::new(Arc::clone(&files.open), Depth::default(), Some(ring.clone())).unwrap())
        });
    }

    /// A ring that the system refuses to make is a machine that cannot run this test.
    fn passes(folder: &Path, make: &Make<'_>) {
        match Uring::new(Arc::new([]), Depth::default(), None) {
            Ok(_) => assert_passes(folder, make),
            Err(error) => eprintln!("skipped: this system has no io_uring: {error}"),
        }
    }
}

/// A folder on the disk that holds the build. Where it allows no direct reads, only cached ones are tried.
fn disk() -> TempDir {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    tell_of_direct_reads(folder.path());
    folder
}

fn shm() -> TempDir {
    let parent = if Path::new("/dev/shm").is_dir() {
        Path::new("/dev/shm")
    } else {
        Path::new(env!("CARGO_TARGET_TMPDIR"))
    };
    tempfile::tempdir_in(parent).unwrap()
}

fn tell_of_direct_reads(folder: &Path) {
    let path = folder.join("probe");
    std::fs::write(&path, [1; 5000]).unwrap();
    if let Err(refusal) = OpenFile::open(&path).unwrap().probe_direct() {
        eprintln!("skipped: direct reads in {}: {refusal}", folder.display());
    }
}

/// The seed of this run, printed, and taken back from `TENSORHAUL_TEST_SEED`.
fn seed() -> u64 {
    let given = std::env::var("TENSORHAUL_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let now =
        || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = given.unwrap_or_else(now);
    eprintln!("TENSORHAUL_TEST_SEED={seed} runs this again");
    seed
}
