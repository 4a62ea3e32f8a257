//! The private hand-over: tensors in memory of their own, read by engines.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use tensorhaul_device::{Allocation, Device};
use tensorhaul_io::memory::Memory;
use tensorhaul_io::mmap::Mmap;
use tensorhaul_io::pread::Pread;
use tensorhaul_io::{Access, Engine, OpenFile, Residency, probe};
use tensorhaul_plan::plan::Machine;
use tensorhaul_plan::{Plan, plan::Target};
use tensorhaul_stage::{Layout, Ring};

use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::handover::{Emit, device, staging_layout};
use crate::model::{Inner, Source};
use crate::options::{EngineChoice, LoadOptions, Preference};
use crate::pipeline::{Lane, Transfer};
use crate::report::{Fallback, Phases, Report};

/// Plans a private load and does nothing else.
pub(crate) fn plan(model: &Inner, options: &LoadOptions) -> Result<Plan> {
    let device = device(options.request.device)?;
    let probed = Probed::new(model, options);
    let machine = machine(options, &*device, &probed)?;
    Ok(Plan::new(&model.checkpoint, &options.request, &machine)?)
}

/// Probes, plans, allocates, and reads.
pub(crate) fn run(
    model: &Inner,
    options: &LoadOptions,
    device: &dyn Device,
    cancel: &Cancel,
    emit: &mut Emit<'_>,
) -> Result<Report> {
    let start = Instant::now();
    let mut probed = Probed::new(model, options);
    let machine = machine(options, device, &probed)?;
    let probe_seconds = start.elapsed().as_secs_f64();

    let plan = Plan::new(&model.checkpoint, &options.request, &machine)?;
    let plan_seconds = start.elapsed().as_secs_f64() - probe_seconds;

    let mut fallbacks = std::mem::take(&mut probed.fallbacks);
    let temperatures = Temperatures::new(model, &plan, &probed);
    let arenas = allocate(&plan, device)?;
    let ring = ring(&plan, device, staging_layout(options)?)?;
    if let Some(ring) = &ring {
        cancel.closes(ring);
    }
    let lanes = lanes(model, options, &temperatures, ring.as_ref(), &mut fallbacks)?;
    let engine = lanes.iter().map(|lane| lane.engine.name()).collect::<Vec<_>>();
    let engine = if engine.windows(2).all(|pair| pair[0] == pair[1]) { engine.into_iter().take(1).collect() } else { engine };
    let prepare_seconds = start.elapsed().as_secs_f64() - probe_seconds - plan_seconds;

    let transfer = Transfer { model, plan: &plan, device, arenas, ring: ring.clone(), options, cancel };
    let done = transfer.run(&lanes, &temperatures.access, emit)?;
    let seconds = (done.finished - start).as_secs_f64();
    model.check_unchanged()?;
    if done.counts.direct_refused > 0 {
        let what = format!("{} direct reads were done through the page cache", done.counts.direct_refused);
        fallbacks.push(Fallback::new(what, "the system refused them (EINVAL) though the probe's read worked"));
    }

    let promised = *plan.promised();
    let first_byte_seconds = done.first_byte.map_or(0.0, |at| (at - start).as_secs_f64() - probe_seconds - plan_seconds - prepare_seconds);
    let before = probe_seconds + plan_seconds + prepare_seconds + first_byte_seconds;
    let peak_staging_bytes = ring.as_ref().map_or(0, Ring::peak_bytes);
    let on_host: u64 = plan.arenas().iter().filter(|arena| arena.device == tensorhaul_plan::DeviceId::Host).map(|arena| arena.len_bytes).sum();
    Ok(Report {
        bytes: promised.payload_bytes,
        tensors: plan.tensors().len() as u64,
        seconds,
        gb_per_s: promised.payload_bytes as f64 / seconds / 1e9,
        device: options.request.device.to_string(),
        engine: if engine.is_empty() { "none".to_owned() } else { engine.join("+") },
        handover: "private",
        resident: true,
        bytes_hot: temperatures.hot_bytes,
        bytes_cold: promised.payload_bytes - temperatures.hot_bytes,
        bytes_direct: temperatures.direct_bytes,
        bytes_in_place: promised.in_place_bytes,
        peak_staging_bytes,
        peak_host_bytes: on_host + ring.map_or(0, |ring| ring.layout().len_bytes() as u64),
        promised,
        reads: promised.reads,
        requests: done.counts.requests,
        system_calls: done.counts.system_calls,
        phases: Phases { probe_seconds, plan_seconds, prepare_seconds, first_byte_seconds, read_seconds: (seconds - before).max(0.0) },
        fallbacks,
        checksums: done.checksums,
    })
}

/// What the files allow.
struct Probed {
    /// By file; empty when the files are bytes in memory.
    residency: Vec<Residency>,
    direct_align_bytes: u64,
    fallbacks: Vec<Fallback>,
}

impl Probed {
    /// Asks the page cache about every file, and tries direct reads on those that it does not hold.
    fn new(model: &Inner, options: &LoadOptions) -> Probed {
        let mut probed = Probed { residency: Vec::new(), direct_align_bytes: 1, fallbacks: Vec::new() };
        let mut refused: Vec<(String, u64)> = Vec::new();
        for file in model.files() {
            let residency = probe::residency(file.cached(), 0, file.len_bytes());
            probed.residency.push(residency);
            if residency == Residency::Hot || options.engine == EngineChoice::Mmap {
                continue;
            }
            match file.probe_direct() {
                Ok(direct) => probed.direct_align_bytes = probed.direct_align_bytes.max(direct.align_bytes),
                Err(refusal) => match refused.iter_mut().find(|(why, _)| *why == refusal.to_string()) {
                    Some((_, files)) => *files += 1,
                    None => refused.push((refusal.to_string(), 1)),
                },
            }
        }
        let told = refused.into_iter().map(|(why, files)| {
            let files = if files == 1 { "1 file is".to_owned() } else { format!("{files} files are") };
            Fallback::new(format!("{files} read through the page cache instead of past it"), why)
        });
        probed.fallbacks.extend(told);
        probed
    }
}

fn machine(options: &LoadOptions, device: &dyn Device, probed: &Probed) -> Result<Machine> {
    let layout = staging_layout(options)?;
    let able = device.capabilities().in_place;
    let in_place = match options.in_place {
        Preference::Off => false,
        Preference::Preferred => able,
        Preference::Required if able => true,
        Preference::Required => {
            return Err(Error::bad_request(format!("{}: storage cannot write into its memory", device.id())));
        }
    };
    Ok(Machine {
        buffer_len_bytes: layout.buffer_len_bytes() as u64,
        buffer_count: layout.buffer_count(),
        direct_align_bytes: probed.direct_align_bytes,
        in_place,
    })
}

/// Hot or cold, for every read.
struct Temperatures {
    access: Vec<Access>,
    hot_bytes: u64,
    direct_bytes: u64,
}

impl Temperatures {
    fn new(model: &Inner, plan: &Plan, probed: &Probed) -> Temperatures {
        let mut temperatures = Temperatures { access: Vec::with_capacity(plan.reads().len()), hot_bytes: 0, direct_bytes: 0 };
        for read in plan.reads() {
            let extent = read.extent;
            let file = model.files().get(extent.file as usize);
            let is_hot = match (file, probed.residency.get(extent.file as usize)) {
                (Some(file), Some(Residency::Mixed)) => {
                    probe::residency(file.cached(), extent.offset_bytes, extent.len_bytes) == Residency::Hot
                }
                (Some(_), Some(residency)) => *residency == Residency::Hot,
                _ => true, // Bytes in memory.
            };
            // Direct reads need the covers that only a plan with an alignment has.
            let able = plan.machine().direct_align_bytes > 1 && file.is_some_and(|file| file.direct().is_some());
            let is_direct = !is_hot && able;
            temperatures.hot_bytes += if is_hot { plan.payload_bytes(read) } else { 0 };
            temperatures.direct_bytes += if is_direct { extent.len_bytes } else { 0 };
            temperatures.access.push(if is_direct { Access::Direct } else { Access::Cached });
        }
        temperatures
    }

    fn reads(&self, access: Access) -> Vec<u32> {
        (0..self.access.len() as u32).filter(|read| self.access[*read as usize] == access).collect()
    }
}

fn allocate(plan: &Plan, device: &dyn Device) -> Result<Vec<Arc<dyn Allocation>>> {
    plan.arenas().iter().map(|arena| Ok(device.allocate(arena.len_bytes)?)).collect()
}

/// Makes a ring no larger than the plan's staged reads can use; none when nothing is staged.
fn ring(plan: &Plan, device: &dyn Device, layout: Layout) -> Result<Option<Ring>> {
    let staged = plan.reads().iter().filter(|read| matches!(read.target, Target::Staged { .. })).count();
    if staged == 0 {
        return Ok(None);
    }
    let layout = layout.at_most(staged as u64);
    Ok(Some(Ring::from_boxed(device.staging_memory(layout.len_bytes())?, layout)))
}

/// Chooses who reads what.
fn lanes(
    model: &Inner,
    options: &LoadOptions,
    temperatures: &Temperatures,
    ring: Option<&Ring>,
    fallbacks: &mut Vec<Fallback>,
) -> Result<Vec<Lane>> {
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
    let copiers = options.thread_count.unwrap_or(cores.min(COPY_THREADS_MAX));
    let all = || (0..temperatures.access.len() as u32).collect::<Vec<_>>();
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
    let pread = |threads: u32, reads: &[u32]| Box::new(Pread::new(Arc::clone(files), threads.min(reads.len() as u32)));
    match options.engine {
        EngineChoice::Mmap => {
            let mapped = Mmap::new(Arc::clone(files), copiers);
            let mapped = mapped.map_err(|(file, error)| Error::io("mapping it", files[file as usize].path(), error))?;
            add(Box::new(mapped), all());
        }
        EngineChoice::IoUring => match uring(files, options, ring, fallbacks) {
            Some(uring) => add(uring, all()),
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
    fallbacks.push(Fallback::new("pread threads read instead of io_uring", "this build is without the io-uring feature"));
    None
}

/// A core copies 4 to 10 GB/s out of the page cache, so 16 pass what the memory of a socket sustains.
const COPY_THREADS_MAX: u32 = 16;

/// Threads are queue depth: 16 direct reads in flight kept every disk measured busy (ARCHITECTURE.md).
const DIRECT_THREADS: u32 = 16;
