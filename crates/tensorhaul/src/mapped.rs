//! The mapped hand-over: tensors are pages of their files.

use std::sync::Arc;
use std::time::Instant;

use memmap2::Mmap;
use rustix::mm::{Advice, madvise};
use tensorhaul_io::{Residency, probe};
use tensorhaul_plan::{Promised, TensorId};

use crate::cancel::Cancel;
use crate::checksum::{self, Hashing, Namesakes};
use crate::error::{Error, Result};
use crate::handover::{Emit, Ready};
use crate::model::{Inner, mapped};
use crate::options::LoadOptions;
use crate::progress::Progress;
use crate::report::{Fallback, Phases, Report};

/// Tensors that lie back to back in one file.
struct Run {
    file: u32,
    begin: u64,
    end: u64,
    first: usize,
    last: usize,
}

pub(crate) fn run(
    model: &Inner,
    options: &LoadOptions,
    cancel: &Cancel,
    emit: &mut Emit<'_>,
) -> Result<Report> {
    let start = Instant::now();
    let wanted = options.request.tensors(&model.checkpoint)?;
    let runs = runs(model, &wanted);
    let plan_seconds = start.elapsed().as_secs_f64();

    let resident = options.resident || options.checksums;
    let bytes: u64 = wanted.iter().map(|id| model.checkpoint.tensor(*id).info.len_bytes()).sum();
    let hot: Vec<_> = runs.iter().filter(|_| resident).map(|run| hot_bytes(model, run)).collect();
    let bytes_hot = hot.iter().flatten().sum::<u64>().min(bytes);
    let untold = hot.iter().any(Option::is_none);
    let mut touch = Touch { options, cancel, progress: Progress::default(), first_byte: None };
    touch.progress.total_bytes = if resident { bytes } else { 0 };
    touch.progress.total_tensors = wanted.len() as u64;
    let prepare_seconds = start.elapsed().as_secs_f64() - plan_seconds;

    let mut finished = start;
    let checksums = checksum::with_pool(options.checksums, |hashing: &Hashing| {
        let mut next = 0;
        for run in &runs {
            let map = model.mapping(run.file as usize)?;
            if resident {
                touch.run(model, run, &map)?;
            }
            for id in &wanted[next..run.last] {
                let stored = model.checkpoint.tensor(*id);
                let tensor = mapped(stored, &map);
                hashing.add(stored.info.name, Namesakes::Copies, &tensor);
                emit(Ready { id: stored.id, name: stored.info.name, is_renamed: false, tensor });
            }
            next = run.last;
        }
        finished = Instant::now();
        Ok(())
    })?;
    let seconds = (finished - start).as_secs_f64();
    if resident {
        model.check_unchanged(runs.iter().map(|run| run.file))?;
    }

    let first_byte_seconds =
        touch.first_byte.map_or(0.0, |at| (at - start).as_secs_f64() - plan_seconds - prepare_seconds);
    let read_seconds = (seconds - plan_seconds - prepare_seconds - first_byte_seconds).max(0.0);
    Ok(Report {
        tensors: wanted.len() as u64,
        device: options.request.device.to_string(),
        engine: "mmap".to_owned(),
        handover: "mapped",
        resident,
        bytes_hot,
        bytes_cold: if resident { bytes - bytes_hot } else { 0 },
        bytes_in_place: bytes,
        promised: Promised {
            payload_bytes: bytes,
            read_bytes: bytes,
            in_place_bytes: bytes,
            ..Promised::default()
        },
        fallbacks: if untold { vec![untold_residency()] } else { Vec::new() },
        phases: Phases {
            plan_seconds,
            prepare_seconds,
            first_byte_seconds,
            read_seconds,
            ..Phases::default()
        },
        checksums,
        ..Report::of(seconds, bytes)
    })
}

/// Joins the tensors into runs. Empty tensors join the run before them.
fn runs(model: &Inner, wanted: &[TensorId]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (index, id) in wanted.iter().enumerate() {
        let stored = model.checkpoint.tensor(*id);
        let (begin, end) = (stored.file_offset_bytes, stored.file_offset_bytes + stored.info.len_bytes());
        match runs.last_mut() {
            Some(run) if run.file == stored.file && (run.end == begin || begin == end) => {
                (run.end, run.last) = (end.max(run.end), index + 1);
            }
            _ => runs.push(Run { file: stored.file, begin, end, first: index, last: index + 1 }),
        }
    }
    debug_assert!(runs.is_sorted_by_key(|run| run.first));
    runs
}

/// Counts what the page cache holds of a run; `None` where the system does not tell.
fn hot_bytes(model: &Inner, run: &Run) -> Option<u64> {
    let (file, len) = (model.files()[run.file as usize].cached(), run.end - run.begin);
    probe::cached_bytes(file, run.begin, len).or_else(|| match probe::residency(file, run.begin, len) {
        Residency::Hot => Some(len),
        Residency::Cold => Some(0),
        _ => None,
    })
}

fn untold_residency() -> Fallback {
    let why = "the system does not tell it of files that one may not write, nor on an overlay";
    Fallback::new("bytes of which the page cache's share is unknown count as cold", why)
}

/// Brings pages in, and counts them.
struct Touch<'a> {
    options: &'a LoadOptions,
    cancel: &'a Cancel,
    progress: Progress,
    first_byte: Option<Instant>,
}

impl Touch<'_> {
    fn run(&mut self, model: &Inner, run: &Run, map: &Arc<Mmap>) -> Result<()> {
        let page_bytes = rustix::param::page_size() as u64;
        let (mut begin, end) = (run.begin - run.begin % page_bytes, run.end);
        huge_pages(map);
        while begin < end {
            if self.cancel.is_cancelled() {
                return Err(Error::cancelled());
            }
            let len = STEP_LEN_BYTES.min(end - begin);
            populate(map, begin as usize, len as usize).map_err(|source| {
                let path = model.file_path(run.file as usize);
                // The page is behind the end of a file that was longer before, or storage failed.
                let gone = model.check_unchanged([run.file].into_iter()).err();
                gone.unwrap_or_else(|| Error::io("reading it through its mapping", &path, source))
            })?;
            self.first_byte.get_or_insert_with(Instant::now);
            begin += len;
            self.progress.read_bytes = (self.progress.read_bytes + len).min(self.progress.total_bytes);
            if let Some(progress) = &self.options.progress {
                progress(self.progress);
            }
        }
        self.progress.ready_tensors += (run.last - run.first) as u64;
        Ok(())
    }
}

/// Lets the page cache keep the file in 2 MiB folios, where the filesystem can.
fn huge_pages(map: &Mmap) {
    // SAFETY: the range is the mapping; this advice changes no contents. A refusal costs speed alone.
    let _ = unsafe { madvise(map.as_ptr().cast_mut().cast(), map.len(), Advice::LinuxHugepage) };
}

/// Maps a range's pages in, reading them if need be. One thread in file order: read-ahead then fills
/// large folios; two threads or read-ahead by advice leave 4 KiB pages and run at a third of the speed.
///
/// MADV_POPULATE_READ (Linux 5.14) answers with an error where touching the page would be SIGBUS.
fn populate(map: &Mmap, begin: usize, len: usize) -> std::io::Result<()> {
    let range = &map[begin..begin + len];
    // SAFETY: the range is inside the mapping and starts on a page; populating changes no contents.
    match unsafe { madvise(range.as_ptr().cast_mut().cast(), len, Advice::LinuxPopulateRead) } {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::INVAL) => {
            for page in range.chunks(rustix::param::page_size()) {
                std::hint::black_box(page[0]);
            }
            Ok(())
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Between two looks at the caller's wishes: 8 MiB take about 3 ms from a disk.
const STEP_LEN_BYTES: u64 = 8 << 20;
