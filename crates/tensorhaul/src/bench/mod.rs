//! What this machine does at best, and what loads make of it, measured in one run.
//!
//! A figure alone says nothing: [`run`] measures the ceilings beside the loads, in turns, so that whatever else
//! the machine does meets both. The state of the page cache is made and verified before every run, and a row that
//! could not be measured says why instead of showing another's figure.
//!
//! | row | bytes go |
//! |---|---|
//! | direct read | storage to 128 MiB of touched memory, again and again, past the page cache |
//! | cached read | page cache to touched memory, again and again |
//! | memory copy | memory to memory |
//! | host to device, device to host | staging memory to device memory and back |
//! | cold load, hot load | storage or page cache to tensors on the device |

mod cache;
#[cfg(feature = "io-uring")]
mod deep;
mod figures;
mod generate;
mod machine;
mod plain;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::Serialize;
use tensorhaul_io::{Access, OpenFile};
use tensorhaul_plan::DeviceId;

pub use cache::Cache;
pub use figures::{Row, Run, Spread};
pub use generate::{LEN_BYTES_MIN, TemporaryCheckpoint};
pub use machine::Machine;

use crate::cancel::Cancel;
use crate::error::{Error, ErrorKind, Result};
use crate::link::{Direction, Link};
use crate::model::{Inner, Model, Source};
use crate::options::{Handover, LoadOptions, Preference};
use crate::vendors::Vendor;
use crate::{default_device, devices, handover};
use figures::Meter;
use machine::{available_bytes, cores};
use plain::Plain;

/// What to measure, and how often.
#[derive(Clone)]
pub struct BenchOptions {
    load: LoadOptions,
    device: Option<DeviceId>,
    runs: u32,
    cancel: Arc<AtomicBool>,
    step: Option<Arc<OnStep>>,
}

/// Takes the name of each step.
type OnStep = dyn Fn(&str) + Send + Sync;

impl Default for BenchOptions {
    fn default() -> BenchOptions {
        let load = LoadOptions::default();
        BenchOptions { load, device: None, runs: 3, cancel: Arc::default(), step: None }
    }
}

impl BenchOptions {
    /// How to load. Default: as [`LoadOptions`]. Every tensor is loaded, into memory of its own, whatever the request
    /// and the hand-over say: a part of the files has no ceiling here, and a mapping moves no byte.
    pub fn load(self, load: LoadOptions) -> Self {
        BenchOptions { load, ..self }
    }

    /// Which device to load onto. Default: [`default_device`], found as a part of what is measured.
    pub fn device(self, device: DeviceId) -> Self {
        BenchOptions { device: Some(device), ..self }
    }

    /// Runs of every row; at least one. Default: 3, the fewest that have a middle.
    pub fn runs(self, runs: u32) -> Self {
        BenchOptions { runs: runs.max(1), ..self }
    }

    /// Ends the bench with [`ErrorKind::Cancelled`] soon after this becomes true.
    pub fn cancel_on(self, cancel: Arc<AtomicBool>) -> Self {
        BenchOptions { cancel, ..self }
    }

    /// Called before each run with what is measured next.
    pub fn on_step(self, step: impl Fn(&str) + Send + Sync + 'static) -> Self {
        BenchOptions { step: Some(Arc::new(step)), ..self }
    }
}

impl fmt::Debug for BenchOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BenchOptions")
            .field("load", &self.load)
            .field("device", &self.device)
            .field("runs", &self.runs)
            .finish_non_exhaustive()
    }
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Bench {
    /// Where.
    pub machine: Machine,
    /// The checkpoint's path.
    pub path: String,
    /// Its files.
    pub files: usize,
    /// Its tensors.
    pub tensors: usize,
    /// Bytes of the files: what ceilings read.
    pub file_bytes: u64,
    /// Bytes of the tensors: what loads load.
    pub payload_bytes: u64,
    /// Where the tensors went.
    pub device: String,
    /// What no load can pass.
    pub ceilings: Vec<Row>,
    /// Loads after the first.
    pub loads: Vec<Row>,
    /// Finding and initializing the device's driver; about 0 on the host, or where this process had done it before.
    pub driver_seconds: f64,
    /// The first load, before everything else: it opens the device and pins the staging ring, which later ones find done.
    pub first_load: FirstLoad,
    /// The result in a line.
    pub verdict: String,
}

/// The first load of a process.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct FirstLoad {
    /// What the page cache held.
    pub cache: Cache,
    /// Its figures; the fixed costs are in the report's phases.
    pub run: Run,
}

/// Measures a checkpoint's ceilings and loads.
///
/// Takes the memory of a load, 128 MiB for the ceilings and 64 MiB for copies to a device; empties and fills the page
/// cache with the checkpoint's files, which leaves them in it. Lets go of the devices that earlier loads kept.
///
/// # Errors
/// [`ErrorKind::OutOfMemory`] when the tensors do not fit the device; [`ErrorKind::Cancelled`]; everything that a load can
/// fail with. What cannot be measured on this machine is a row without runs.
pub fn run(model: &Model, options: &BenchOptions) -> Result<Bench> {
    let Source::Files(files) = &model.inner.source else {
        return Err(Error::bad_request("a model of bytes in memory has no storage to measure"));
    };
    devices::release_devices();
    let start = Instant::now();
    let device = options.device.unwrap_or_else(default_device);
    find_driver(device);
    let driver_seconds = start.elapsed().as_secs_f64();
    Session::new(model, files, device, options)?.measure(driver_seconds)
}

/// Loads and initializes the driver of a device, if it has one. What is wrong with it, opening the device will tell.
fn find_driver(device: DeviceId) {
    if let Some(vendor) = Vendor::of(device) {
        let _ = (vendor.driver)();
    }
}

/// What every run needs.
struct Session<'b> {
    model: &'b Inner,
    files: &'b Arc<[OpenFile]>,
    file_bytes: u64,
    payload_bytes: u64,
    device: DeviceId,
    load: LoadOptions,
    options: &'b BenchOptions,
    plain: Plain,
}

/// A row, what its runs do, and why the last that failed did.
struct Task {
    row: Row,
    work: Work,
    missed: Option<String>,
}

impl Task {
    fn new(work: Work, name: &'static str, cache: Cache, how: impl Into<String>) -> Task {
        Task { row: Row::new(name, cache, how), work, missed: None }
    }
}

#[derive(Clone, Copy)]
enum Work {
    Deep,
    Threads,
    Cached,
    Copy,
    Link(Direction),
    Load,
}

/// Why there is no run.
enum NoRun {
    /// This machine, or these files, do not allow it: the row says so.
    Impossible(String),
    /// The bench ends.
    Failed(Error),
}

impl From<String> for NoRun {
    fn from(why: String) -> NoRun {
        NoRun::Impossible(why)
    }
}

impl<E: Into<Error>> From<E> for NoRun {
    fn from(error: E) -> NoRun {
        NoRun::Failed(error.into())
    }
}

impl<'b> Session<'b> {
    fn new(
        model: &'b Model,
        files: &'b Arc<[OpenFile]>,
        device: DeviceId,
        options: &'b BenchOptions,
    ) -> Result<Session<'b>> {
        let model = &*model.inner;
        let payload_bytes = model.checkpoint.tensors().map(|tensor| tensor.info.len_bytes()).sum();
        if device == DeviceId::Host && payload_bytes > available_bytes() {
            let what = format!(
                "the tensors take {payload_bytes} bytes of host memory, {} are available",
                available_bytes()
            );
            return Err(Error::new(ErrorKind::OutOfMemory, what));
        }
        let mut request = tensorhaul_plan::Request::all();
        request.device = device;
        Ok(Session {
            model,
            files,
            file_bytes: files.iter().map(OpenFile::len_bytes).sum(),
            payload_bytes,
            device,
            load: options.load.clone().request(request).handover(Handover::Private),
            options,
            plain: Plain::new(files, &options.cancel)?,
        })
    }

    fn measure(&self, driver_seconds: f64) -> Result<Bench> {
        let first_load = self.first_load()?;
        let mut tasks = self.tasks();
        for round in 1..=self.options.runs {
            for Task { row, work, missed } in tasks.iter_mut().filter(|task| task.row.why.is_none()) {
                self.tell(&format!("round {round} of {}: {}", self.options.runs, row.name));
                match self.time(*work, row.cache) {
                    Ok(run) => row.runs.push(run),
                    // The page cache may be kinder in the next round.
                    Err(NoRun::Impossible(why)) => *missed = Some(why),
                    Err(NoRun::Failed(error)) => return Err(error),
                }
            }
        }
        for Task { row, missed, .. } in &mut tasks {
            row.why = row.why.take().or(missed.take());
            row.summarize();
        }
        let is_load = |task: &Task| matches!(task.work, Work::Load);
        let (loads, ceilings): (Vec<Task>, Vec<Task>) = tasks.into_iter().partition(is_load);
        let [ceilings, mut loads] =
            [ceilings, loads].map(|tasks| tasks.into_iter().map(|task| task.row).collect::<Vec<_>>());
        loads.iter_mut().for_each(|load| compare(load, &ceilings));
        Ok(Bench {
            machine: Machine::of(self.files, self.device),
            path: self.model.path.display().to_string(),
            files: self.files.len(),
            tensors: self.model.checkpoint.len(),
            file_bytes: self.file_bytes,
            payload_bytes: self.payload_bytes,
            device: self.device.to_string(),
            verdict: loads.iter().map(verdict).collect::<Vec<_>>().join("; "),
            ceilings,
            loads,
            driver_seconds,
            first_load,
        })
    }

    /// What is measured, in the order of a round: cold rows follow each other, so do hot ones.
    fn tasks(&self) -> Vec<Task> {
        let has_link = self.device != DeviceId::Host;
        let threads = |count: usize| format!("pread on {count} threads");
        let mut tasks = vec![
            Task::new(Work::Deep, DEEP, Cache::Cold, "up to 128 requests of 1 MiB"),
            Task::new(Work::Threads, THREADS, Cache::Cold, threads(DIRECT_THREADS)),
            Task::new(Work::Load, "cold load", Cache::Cold, self.how()),
            Task::new(Work::Cached, CACHED, Cache::Hot, threads(copy_threads())),
            Task::new(Work::Load, "hot load", Cache::Hot, self.how()),
            Task::new(Work::Copy, COPY, Cache::Unused, format!("memcpy on {} threads", copy_threads())),
        ];
        if has_link {
            let how = "pinned, 4 MiB a copy";
            tasks.push(Task::new(Work::Link(Direction::ToDevice), TO_DEVICE, Cache::Unused, how));
            tasks.push(Task::new(Work::Link(Direction::ToHost), TO_HOST, Cache::Unused, how));
        }
        let hot_bytes = self.file_bytes + if has_link { 0 } else { self.payload_bytes };
        if hot_bytes > available_bytes() {
            let why = format!(
                "{hot_bytes} bytes of page cache and tensors are more than this machine has memory for"
            );
            tasks
                .iter_mut()
                .filter(|task| task.row.cache == Cache::Hot)
                .for_each(|task| task.row.why = Some(why.clone()));
        }
        tasks
    }

    fn how(&self) -> String {
        let how = match self.load.direct_storage {
            Preference::Off => "",
            Preference::Preferred => ", by direct storage what is cold",
            Preference::Required => ", by direct storage",
        };
        format!("all tensors onto {}{how}", self.device)
    }

    /// Loads once before anything else has opened the device: cold, if the files can be, as most first loads are.
    fn first_load(&self) -> Result<FirstLoad> {
        self.tell("first load");
        let cache = if Cache::Cold.prepare(self.files, &self.options.cancel).is_ok() {
            Cache::Cold
        } else {
            Cache::AsFound
        };
        Ok(FirstLoad { cache, run: self.load_once()? })
    }

    fn load_once(&self) -> Result<Run> {
        let cancel = Cancel::new();
        let (wish, stop) = (Arc::clone(&self.options.cancel), cancel.clone());
        let options = self.load.clone().on_progress(move |_| {
            if wish.load(Ordering::Relaxed) {
                stop.cancel();
            }
        });
        let meter = Meter::start();
        let loaded = handover::load(self.model, &options, &cancel)?;
        Ok(meter.stop_load(loaded.report))
    }

    /// Measures one run in this state of the page cache, again where the state did not last.
    fn time(&self, work: Work, cache: Cache) -> Result<Run, NoRun> {
        for _ in 0..ATTEMPTS_MAX {
            let prepared = cache.prepare(self.files, &self.options.cancel);
            self.check_cancelled()?;
            prepared?;
            let run = self.once(work)?;
            self.check_cancelled()?;
            if cache.was_found(run.report.as_deref(), self.files) {
                return Ok(run);
            }
        }
        Err(NoRun::Impossible(format!("{ATTEMPTS_MAX} times the page cache changed before the run was over")))
    }

    fn once(&self, work: Work) -> Result<Run, NoRun> {
        if matches!(work, Work::Deep | Work::Threads) {
            let refused = self.files.iter().find_map(|file| file.probe_direct().err());
            refused.map_or(Ok(()), |refusal| Err(format!("no direct reads: {refusal}")))?;
        }
        match work {
            Work::Deep => self.deep(),
            Work::Threads => self.threads(Access::Direct, DIRECT_THREADS),
            Work::Cached => self.threads(Access::Cached, copy_threads()),
            Work::Copy => {
                let meter = Meter::start();
                let bytes = self.plain.copy(self.copied_bytes(), copy_threads())?;
                Ok(meter.stop(bytes))
            }
            Work::Link(direction) => {
                // Taken for the run only: loads may need all of the device.
                let device = devices::open(self.device)?;
                let link = Link::new(&*device, LINK_LEN_BYTES)?;
                let meter = Meter::start();
                let (bytes, _) = link.pass(direction, self.copied_bytes().div_ceil(LINK_LEN_BYTES as u64))?;
                Ok(meter.stop(bytes))
            }
            Work::Load => Ok(self.load_once()?),
        }
    }

    fn threads(&self, access: Access, count: usize) -> Result<Run, NoRun> {
        let meter = Meter::start();
        self.plain.by_threads(access, count)?;
        Ok(meter.stop(self.file_bytes))
    }

    #[cfg(feature = "io-uring")]
    fn deep(&self) -> Result<Run, NoRun> {
        let deep = deep::Deep::new(&self.plain)?;
        let meter = Meter::start();
        deep.read()?;
        Ok(meter.stop(self.file_bytes))
    }

    #[cfg(not(feature = "io-uring"))]
    fn deep(&self) -> Result<Run, NoRun> {
        Err(NoRun::Impossible("this build is without the io-uring feature".to_owned()))
    }

    /// As much as the files have, within what takes a moment.
    fn copied_bytes(&self) -> u64 {
        self.file_bytes.clamp(COPIED_BYTES_MIN, COPIED_BYTES_MAX)
    }

    fn tell(&self, step: &str) {
        if let Some(told) = &self.options.step {
            told(step);
        }
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.options.cancel.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Cancelled, "the bench was cancelled"));
        }
        Ok(())
    }
}

/// Cold bytes come from storage, hot ones from the page cache; all go over the device's link, if it has one.
fn compare(load: &mut Row, ceilings: &[Row]) {
    let named = |names: &[&str]| ceilings.iter().filter(|row| names.contains(&row.name)).collect::<Vec<_>>();
    let source = if load.cache == Cache::Cold { named(&[DEEP, THREADS]) } else { named(&[CACHED]) };
    load.compare(&[&source, &named(&[TO_DEVICE])]);
}

fn verdict(load: &Row) -> String {
    match (load.gb_per_s, load.ceiling.zip(load.ceiling_fraction), &load.why) {
        (Some(speed), Some((ceiling, fraction)), _) => {
            format!("{} {:.2} GB/s, {:.0}% of {ceiling}", load.name, speed.median, fraction * 100.0)
        }
        (Some(speed), None, _) => {
            format!("{} {:.2} GB/s, with no ceiling to compare", load.name, speed.median)
        }
        (None, _, why) => format!("{} not measured: {}", load.name, why.as_deref().unwrap_or("no run")),
    }
}

fn copy_threads() -> usize {
    cores().min(COPY_THREADS_MAX)
}

const DEEP: &str = "direct read (io_uring)";
const THREADS: &str = "direct read (threads)";
const CACHED: &str = "cached read";
const COPY: &str = "memory copy";
const TO_DEVICE: &str = "host to device";
const TO_HOST: &str = "device to host";

/// Threads are queue depth: 16 reads of 4 MiB keep every disk busy.
const DIRECT_THREADS: usize = 16;

/// As many as pass what the memory of a socket sustains.
const COPY_THREADS_MAX: usize = 16;

/// 1.3 ms on PCIe 5: long beside the cost of a call, and quickly pinned.
const LINK_LEN_BYTES: usize = 64 << 20;

/// What copies in memory and over a link are measured with.
const COPIED_BYTES_MIN: u64 = 64 << 20;
const COPIED_BYTES_MAX: u64 = 4 << 30;

/// A machine that takes pages back while they are in use is not waited for.
const ATTEMPTS_MAX: u32 = 3;
