//! Who reads what: engines, and the reads each of them does.

use std::sync::Arc;
use std::thread;

use tensorhaul_direct::Direct;
use tensorhaul_io::memory::Memory;
use tensorhaul_io::mmap::Mmap;
use tensorhaul_io::pread::Pread;
use tensorhaul_io::{Access, Engine, OpenFile};
use tensorhaul_plan::Plan;
use tensorhaul_stage::Ring;

use crate::error::{Error, Result};
use crate::model::{Inner, Source};
use crate::options::{EngineChoice, LoadOptions};
use crate::pipeline::Lane;
use crate::probed::Temperatures;
use crate::report::Fallback;

/// Chooses who reads what; threads stay on the processors given, if there are any.
pub(crate) fn lanes(
    model: &Inner,
    options: &LoadOptions,
    plan: &Plan,
    temperatures: &Temperatures,
    ring: Option<&Ring>,
    storage: Option<Direct>,
    near_processors: &[u32],
    fallbacks: &mut Vec<Fallback>,
) -> Result<Vec<Lane>> {
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
    let copiers = options.thread_count.unwrap_or(cores.min(COPY_THREADS_MAX));
    let all = || temperatures.reads_by_host().collect::<Vec<_>>();
    let files = match &model.source {
        Source::Memory { files, faults } => {
            let engine = Memory::new(files.clone(), copiers, faults.clone());
            return Ok(vec![Lane { engine: Box::new(engine), reads: all() }]);
        }
        Source::Files(files) => files,
    };
    let (cached, direct) = (temperatures.reads(Access::Cached), temperatures.reads(Access::Direct));
    let mut lanes: Vec<Lane> = Vec::new();
    let mut add = |engine: Box<dyn Engine>, reads: Vec<u32>| {
        if !reads.is_empty() {
            lanes.push(Lane { engine, reads });
        }
    };
    let pread = |threads: u32, reads: &[u32]| {
        let engine = Pread::new(Arc::clone(files), threads.min(reads.len() as u32));
        Box::new(engine.near(near_processors.to_vec()))
    };
    match options.engine {
        EngineChoice::Mmap => {
            let mapped = Mmap::new(Arc::clone(files), copiers);
            let mapped = mapped
                .map_err(|(file, error)| Error::io("mapping it", files[file as usize].path(), error))?;
            add(Box::new(mapped), all());
        }
        EngineChoice::IoUring => match uring(files, options, ring, fallbacks) {
            Some(uring) => {
                // A ring of requests has no use for reads of many short pieces.
                let of_pieces = |read: &u32| plan.reads()[*read as usize].stride.is_some();
                let (of_pieces, whole): (Vec<_>, Vec<_>) = all().into_iter().partition(of_pieces);
                add(pread(copiers, &of_pieces), of_pieces);
                add(uring, whole);
            }
            None => {
                add(pread(copiers, &cached), cached);
                add(pread(DIRECT_THREADS, &direct), direct);
            }
        },
        EngineChoice::Auto if !direct.is_empty() => {
            let uring = uring(files, options, ring, fallbacks);
            add(pread(copiers, &cached), cached);
            add(uring.unwrap_or_else(|| pread(DIRECT_THREADS, &direct)), direct);
        }
        EngineChoice::Auto | EngineChoice::Pread => {
            add(pread(copiers, &cached), cached);
            add(pread(DIRECT_THREADS, &direct), direct);
        }
    }
    if let Some(storage) = storage {
        lanes.push(Lane { engine: Box::new(storage), reads: temperatures.reads_by_storage() });
    }
    Ok(lanes)
}

/// Sets up `io_uring`, or reports why the system has none.
#[cfg(feature = "io-uring")]
fn uring(
    files: &Arc<[OpenFile]>,
    options: &LoadOptions,
    ring: Option<&Ring>,
    fallbacks: &mut Vec<Fallback>,
) -> Option<Box<dyn Engine>> {
    use tensorhaul_io::uring::Uring;
    let refused = options.io_uring_refusal.map(std::io::Error::from_raw_os_error);
    let uring = match refused {
        Some(error) => Err(error),
        None => Uring::new(Arc::clone(files), tensorhaul_io::Depth::default(), ring.cloned()),
    };
    match uring {
        Ok(uring) => {
            let registered = uring.registered();
            if let Err(error) = &registered.files {
                fallbacks.push(Fallback::new("io_uring looks descriptors up for each request", error));
            }
            if let Some(Err(refused)) = &registered.buffers {
                fallbacks.push(Fallback::new("io_uring pins staging buffers for each request", refused));
            }
            Some(Box::new(uring))
        }
        Err(error) => {
            fallbacks.push(Fallback::new("pread threads read instead of io_uring", error));
            None
        }
    }
}

#[cfg(not(feature = "io-uring"))]
fn uring(
    _files: &Arc<[OpenFile]>,
    _options: &LoadOptions,
    _ring: Option<&Ring>,
    fallbacks: &mut Vec<Fallback>,
) -> Option<Box<dyn Engine>> {
    fallbacks.push(Fallback::new(
        "pread threads read instead of io_uring",
        "this build is without the io-uring feature",
    ));
    None
}

/// A core copies 4 to 10 GB/s out of the page cache, so 16 pass what the memory of a socket sustains.
const COPY_THREADS_MAX: u32 = 16;

/// Threads are queue depth: 16 direct reads in flight kept every disk measured busy (ARCHITECTURE.md).
const DIRECT_THREADS: u32 = 16;
