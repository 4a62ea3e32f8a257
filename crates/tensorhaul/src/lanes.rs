//! Who reads what: engines, and the reads each of them does.

use std::sync::Arc;
use std::thread;

use tensorhaul_device::Near;
use tensorhaul_direct::Direct;
use tensorhaul_io::memory::Memory;
use tensorhaul_io::mmap::Mmap;
use tensorhaul_io::pread::Pread;
use tensorhaul_io::{Access, Engine, OpenFile};
use tensorhaul_plan::Plan;
use tensorhaul_stage::Ring;

use crate::assignment::Assignment;
use crate::error::{Error, Result};
use crate::model::{Inner, Source};
use crate::options::{EngineChoice, LoadOptions};
use crate::pipeline::Lane;
use crate::probed::Temperatures;
use crate::report::Fallback;

/// What lanes are made for.
pub(crate) struct Reading<'r> {
    pub(crate) model: &'r Inner,
    pub(crate) options: &'r LoadOptions,
    pub(crate) plan: &'r Plan,
    pub(crate) temperatures: &'r Temperatures,
    pub(crate) assignment: &'r Assignment,
    /// For each device, what of the host is near it.
    pub(crate) near: &'r [Near],
}

impl Reading<'_> {
    /// Chooses who reads what for each device, through its ring; threads stay on the processors near it.
    /// What storage reads straight into a device is its engine's of `direct_storage`.
    pub(crate) fn lanes(
        &self,
        rings: &[Option<Ring>],
        direct_storage: Vec<(usize, Direct)>,
        fallbacks: &mut Vec<Fallback>,
    ) -> Result<Vec<Lane>> {
        let mut lanes = Vec::new();
        for (device, ring) in rings.iter().enumerate() {
            for (engine, reads) in self.of_device(device, ring.as_ref(), fallbacks)? {
                lanes.push(Lane { device, engine, reads });
            }
        }
        for (device, engine) in direct_storage {
            let reads = self.temperatures.reads_by_storage();
            let reads = reads.filter(|read| self.assignment.of_read(*read) == device).collect();
            lanes.push(Lane { device, engine: Box::new(engine), reads });
        }
        Ok(lanes)
    }

    fn of_device(
        &self,
        device: usize,
        ring: Option<&Ring>,
        fallbacks: &mut Vec<Fallback>,
    ) -> Result<Engines> {
        let Reading { model, options, plan, temperatures, assignment, near } = *self;
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        let share = |threads: u32| threads.div_ceil(assignment.reading_count() as u32);
        let copiers = share(options.thread_count.unwrap_or(cores.min(COPY_THREADS_MAX)));
        let direct_threads = share(DIRECT_THREADS);
        let reads = |access| {
            let reads = temperatures.reads(access);
            reads.filter(|read| assignment.of_read(*read) == device).collect::<Vec<_>>()
        };
        let all = || {
            let all = temperatures.reads_by_host();
            all.filter(|read| assignment.of_read(*read) == device).collect::<Vec<_>>()
        };
        let files = match &model.source {
            Source::Memory { files, faults } => {
                let engine = Memory::new(files.clone(), copiers, faults.clone());
                return Ok(vec![(Box::new(engine), all())]);
            }
            Source::Files(files) => files,
        };
        let (cached, direct) = (reads(Access::Cached), reads(Access::Direct));
        let mut engines: Engines = Vec::new();
        let mut add = |engine: Box<dyn Engine>, reads: Vec<u32>| {
            if !reads.is_empty() {
                engines.push((engine, reads));
            }
        };
        // A load of nothing has the host's work, whatever devices its map names.
        let near = near.get(device).map_or(&[][..], |near| &near.processors);
        let pread = |threads: u32, reads: &[u32]| {
            let engine = Pread::new(Arc::clone(files), threads.min(reads.len() as u32));
            Box::new(engine.near(near.to_vec()))
        };
        match options.engine {
            EngineChoice::Mmap => {
                let mapped = Mmap::new(Arc::clone(files), copiers);
                let mapped = mapped
                    .map_err(|(file, error)| Error::io("mapping it", files[file as usize].path(), error))?;
                add(Box::new(mapped), all());
            }
            EngineChoice::IoUring
                if assignment.devices().len() > 1 && cached.is_empty() && direct.is_empty() => {}
            EngineChoice::IoUring => match uring(files, options, ring, near, fallbacks) {
                Some(uring) => {
                    // A ring of requests has no use for reads of many short pieces.
                    let of_pieces = |read: &u32| plan.reads()[*read as usize].stride.is_some();
                    let (of_pieces, whole): (Vec<_>, Vec<_>) = all().into_iter().partition(of_pieces);
                    add(pread(copiers, &of_pieces), of_pieces);
                    add(uring, whole);
                }
                None => {
                    add(pread(copiers, &cached), cached);
                    add(pread(direct_threads, &direct), direct);
                }
            },
            EngineChoice::Auto if !direct.is_empty() => {
                let uring = uring(files, options, ring, near, fallbacks);
                add(pread(copiers, &cached), cached);
                add(uring.unwrap_or_else(|| pread(direct_threads, &direct)), direct);
            }
            EngineChoice::Auto | EngineChoice::Pread => {
                add(pread(copiers, &cached), cached);
                add(pread(direct_threads, &direct), direct);
            }
        }
        Ok(engines)
    }
}

/// Engines, each with the reads it does.
type Engines = Vec<(Box<dyn Engine>, Vec<u32>)>;

/// Sets up `io_uring`, or reports why the system has none.
#[cfg(feature = "io-uring")]
fn uring(
    files: &Arc<[OpenFile]>,
    options: &LoadOptions,
    ring: Option<&Ring>,
    near: &[u32],
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
                tell(fallbacks, Fallback::new("io_uring looks descriptors up for each request", error));
            }
            if let Some(Err(refused)) = &registered.buffers {
                tell(fallbacks, Fallback::new("io_uring pins staging buffers for each request", refused));
            }
            Some(Box::new(uring.near(near.to_vec())))
        }
        Err(error) => {
            tell(fallbacks, Fallback::new("pread threads read instead of io_uring", error));
            None
        }
    }
}

#[cfg(not(feature = "io-uring"))]
fn uring(
    _files: &Arc<[OpenFile]>,
    _options: &LoadOptions,
    _ring: Option<&Ring>,
    _near: &[u32],
    fallbacks: &mut Vec<Fallback>,
) -> Option<Box<dyn Engine>> {
    let why = "this build is without the io-uring feature";
    tell(fallbacks, Fallback::new("pread threads read instead of io_uring", why));
    None
}

/// Adds what the lanes of every device may have to tell once.
fn tell(fallbacks: &mut Vec<Fallback>, fallback: Fallback) {
    if !fallbacks.contains(&fallback) {
        fallbacks.push(fallback);
    }
}

/// A core copies 4 to 10 GB/s out of the page cache, so 16 pass what the memory of a socket sustains. Several devices share them.
const COPY_THREADS_MAX: u32 = 16;

/// Threads are queue depth: 16 direct reads in flight kept every disk measured busy (ARCHITECTURE.md).
const DIRECT_THREADS: u32 = 16;
