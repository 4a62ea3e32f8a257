//! Loads onto a simulated device whose link, or whose storage, is slow: how near the whole comes to its slowest stage.
//!
//! ```text
//! cargo bench -p tensorhaul-benches --bench overlap -- [PART OF A ROW'S NAME]... [--test]
//! ```
//!
//! `TENSORHAUL_BENCH_BYTES` is the length of the generated checkpoint: 256,000,000 by default, 32,000,000 with `--test`;
//! `TENSORHAUL_BENCH_ROUNDS` how often each row runs: 5, or 1 with `--test`.
//!
//! Reading, copying and the fixed costs are stages of one pipeline. Where they overlap, the whole takes as long as the
//! slowest of them, and a little for the first buffer in and the last one out; where they do not, it takes their sum.
//! The device is the simulated driver's, which keeps the link to its speed and makes a context take its time. Each
//! load runs in a process of its own, so that each begins without a driver, a context or a ring. Other processes on the
//! same cores delay reads, copies and the simulated link alike: *by it* is the median of the rounds, *least* the best.
//! A row whose *least* is more than *asked* makes the bench fail, after the table; with `--test` it does not, since one small round
//! beside a whole test run says nothing about time.
//!
//! This is no criterion bench: what is asked is a ratio of two times of one machine in one minute, not a time.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use serde::Deserialize;
use tensorhaul::{DeviceId, DeviceMap, Disk, EngineChoice, Faults, LoadOptions, Model, Request, TensorRef};
use tensorhaul_benches::cache::Cache;
use tensorhaul_benches::checkpoint::{Checkpoint, Shape};
use tensorhaul_benches::simulator;
use tensorhaul_benches::statistics::{least, median};

/// What is measured.
struct Row {
    name: &'static str,
    storage: Storage,
    /// How many devices share the checkpoint, neighbours together, each behind a link of its own.
    device_count: u32,
    /// Speed of the simulated link; 0 is no limit.
    link_mb_per_s: u64,
    context_millis: u64,
    slowest: Slowest,
    /// The most that the whole may take by its slowest stage.
    asked: f64,
}

/// Where bytes come from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Storage {
    /// The page cache, by the engine that a load chooses.
    PageCache,
    /// Memory, by one thread that sleeps before each read as a disk of about 250 MB/s would make it wait.
    Slow,
    /// Memory, behind a disk of this speed that all devices' lanes share.
    Disk { mb_per_s: u64 },
}

/// Which stage is the slowest, and so how long it takes alone.
#[derive(Clone, Copy)]
enum Slowest {
    /// Bytes by the link's speed.
    Link,
    /// The same reads onto a link without a limit and a device without a context to make; or, where that is longer, the context.
    Reads,
    /// Bytes by the disk's speed.
    Disk,
    /// The context, then the link: no copy begins without a context.
    ContextThenLink,
}

const ROWS: &[Row] = &[
    Row {
        name: "page cache to a link of 400 MB/s",
        storage: Storage::PageCache,
        device_count: 1,
        link_mb_per_s: 400,
        context_millis: 0,
        slowest: Slowest::Link,
        asked: 1.05,
    },
    Row {
        name: "page cache to a link of 800 MB/s",
        storage: Storage::PageCache,
        device_count: 1,
        link_mb_per_s: 800,
        context_millis: 0,
        slowest: Slowest::Link,
        asked: 1.05,
    },
    Row {
        name: "slow reads to a link of 800 MB/s",
        storage: Storage::Slow,
        device_count: 1,
        link_mb_per_s: 800,
        context_millis: 0,
        slowest: Slowest::Reads,
        asked: 1.05,
    },
    Row {
        name: "slow reads beside a context of 300 ms",
        storage: Storage::Slow,
        device_count: 1,
        link_mb_per_s: 800,
        context_millis: 300,
        slowest: Slowest::Reads,
        asked: 1.05,
    },
    Row {
        name: "page cache beside a context of 300 ms",
        storage: Storage::PageCache,
        device_count: 1,
        link_mb_per_s: 800,
        context_millis: 300,
        slowest: Slowest::ContextThenLink,
        asked: 1.05,
    },
    Row {
        name: "page cache to 2 devices, links of 200 MB/s",
        storage: Storage::PageCache,
        device_count: 2,
        link_mb_per_s: 200,
        context_millis: 0,
        slowest: Slowest::Link,
        asked: 1.05,
    },
    Row {
        name: "page cache to 4 devices, links of 100 MB/s",
        storage: Storage::PageCache,
        device_count: 4,
        link_mb_per_s: 100,
        context_millis: 0,
        slowest: Slowest::Link,
        asked: 1.05,
    },
    Row {
        name: "a disk of 200 MB/s to 2 devices, links of 200 MB/s",
        storage: Storage::Disk { mb_per_s: 200 },
        device_count: 2,
        link_mb_per_s: 200,
        context_millis: 0,
        slowest: Slowest::Disk,
        asked: 1.05,
    },
    Row {
        name: "a disk of 200 MB/s to 4 devices, links of 100 MB/s",
        storage: Storage::Disk { mb_per_s: 200 },
        device_count: 4,
        link_mb_per_s: 100,
        context_millis: 0,
        slowest: Slowest::Disk,
        asked: 1.05,
    },
];

fn main() -> Result<(), Box<dyn Error>> {
    if let Some(folder) = env::var_os(FOLDER_VARIABLE) {
        return load(Path::new(&folder));
    }
    let arguments: Vec<String> = env::args().skip(1).collect();
    let is_test = arguments.iter().any(|argument| argument == "--test");
    let number = |name: &str| env::var(name).ok().map(|text| text.replace('_', "").parse().expect(name));
    let len_bytes =
        number("TENSORHAUL_BENCH_BYTES").unwrap_or(if is_test { 32_000_000 } else { 256_000_000 });
    let rounds = number("TENSORHAUL_BENCH_ROUNDS").unwrap_or(if is_test { 1 } else { 5 });
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();

    let folder = tempfile::Builder::new().prefix("bench-overlap-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let checkpoint = Checkpoint::generate(folder.path(), Shape::FewLarge, len_bytes)?;
    Cache::Warm.prepare(&checkpoint)?;
    let mut table = Table::new();
    let head = ["", "seconds", "slowest stage", "by it", "least", "asked", "context", "hidden", "read ahead"];
    table.load_style(presets::ASCII_MARKDOWN).set_header(head);
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    let mut missed = Vec::new();
    for row in ROWS {
        if !filters.is_empty() && !filters.iter().any(|part| row.name.contains(*part)) {
            continue;
        }
        let runs = (0..rounds).map(|_| row.run(&checkpoint)).collect::<Result<Vec<_>, _>>()?;
        let of = |value: fn(&Run) -> f64| median(runs.iter().map(value));
        let least = least(runs.iter().map(Run::ratio));
        if least > row.asked {
            missed.push(format!("{}: {least:.3} instead of {:.2}", row.name, row.asked));
        }
        table.add_row([
            row.name.to_owned(),
            format!("{:.3}", of(|run| run.report.seconds)),
            format!("{:.3}", of(|run| run.slowest_seconds)),
            format!("{:.3}", of(Run::ratio)),
            format!("{least:.3}"),
            format!("{:.2}", row.asked),
            format!("{:.3}", of(|run| run.report.phases.context_seconds)),
            format!("{:.3}", of(|run| run.report.phases.hidden_seconds)),
            format!("{:.0} MB", of(|run| run.report.bytes_ahead as f64 / 1e6)),
        ]);
    }
    println!("{table}");
    match missed.is_empty() || is_test {
        true => Ok(()),
        false => Err(missed.join("; ").into()),
    }
}

struct Run {
    report: Report,
    slowest_seconds: f64,
}

impl Run {
    fn ratio(&self) -> f64 {
        self.report.seconds / self.slowest_seconds
    }
}

/// What of a load's report is looked at here.
#[derive(Deserialize)]
struct Report {
    seconds: f64,
    bytes: u64,
    bytes_ahead: u64,
    phases: Phases,
    /// Only of several.
    #[serde(default)]
    devices: Vec<DeviceBytes>,
}

#[derive(Deserialize)]
struct DeviceBytes {
    bytes: u64,
}

impl Report {
    /// Returns the bytes that the fullest device's link has to carry.
    fn link_bytes(&self) -> u64 {
        self.devices.iter().map(|device| device.bytes).max().unwrap_or(self.bytes)
    }
}

#[derive(Deserialize)]
struct Phases {
    context_seconds: f64,
    hidden_seconds: f64,
}

impl Row {
    fn run(&self, checkpoint: &Checkpoint) -> Result<Run, Box<dyn Error>> {
        let report = self.load(checkpoint, self.link_mb_per_s, self.context_millis)?;
        assert_eq!(report.bytes, checkpoint.payload_bytes, "{}", self.name);
        let link_seconds = report.link_bytes() as f64 / (self.link_mb_per_s as f64 * 1e6);
        let slowest_seconds = match self.slowest {
            Slowest::Link => link_seconds,
            Slowest::Disk => report.bytes as f64 / (self.disk_mb_per_s() as f64 * 1e6),
            Slowest::Reads => self.load(checkpoint, 0, 0)?.seconds.max(self.context_millis as f64 / 1e3),
            Slowest::ContextThenLink => self.context_millis as f64 / 1e3 + link_seconds,
        };
        Ok(Run { report, slowest_seconds })
    }

    fn disk_mb_per_s(&self) -> u64 {
        match self.storage {
            Storage::Disk { mb_per_s } => mb_per_s,
            Storage::PageCache | Storage::Slow => unreachable!("only a row with a disk waits for it"),
        }
    }

    /// Runs [`load`] in a process whose machine has this link and this context.
    fn load(
        &self,
        checkpoint: &Checkpoint,
        link_mb_per_s: u64,
        context_millis: u64,
    ) -> Result<Report, Box<dyn Error>> {
        let machine = format!(
            "devices={};memory=8000000000;poison=0;link_mb_per_s={link_mb_per_s};slow=cuDevicePrimaryCtxRetain:{context_millis}",
            self.device_count
        );
        let mut command = Command::new(env::current_exe()?);
        command.env("SIMGPU", machine).env("TENSORHAUL_CUDA_LIBRARY", simulator::library()?);
        command.env(FOLDER_VARIABLE, &checkpoint.folder);
        command.env(DEVICES_VARIABLE, self.device_count.to_string());
        match self.storage {
            Storage::PageCache => {}
            Storage::Slow => drop(command.env(SLOW_VARIABLE, "1")),
            Storage::Disk { mb_per_s } => drop(command.env(DISK_VARIABLE, mb_per_s.to_string())),
        }
        let output = command.output()?;
        if !output.status.success() {
            return Err(format!("{}: {}", self.name, String::from_utf8_lossy(&output.stderr)).into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

/// Loads onto the simulated device and prints the report: what a process of one run does.
fn load(folder: &Path) -> Result<(), Box<dyn Error>> {
    let mut request = Request::all();
    request.device = DeviceId::Cuda(0);
    let options = LoadOptions::default().request(request);
    let (model, options) = match (env::var_os(SLOW_VARIABLE), env::var(DISK_VARIABLE)) {
        // One thread, so that the same seed makes the same reads wait as long whenever it runs.
        (Some(_), _) => (in_memory(folder, slow())?, options.engine(EngineChoice::Pread).threads(1)),
        (None, Ok(mb_per_s)) => {
            let disk = Disk::new(mb_per_s.parse::<u64>()? * 1_000_000);
            let faults = Faults { disk: Some(disk), ..Faults::default() };
            (in_memory(folder, faults)?, options.engine(EngineChoice::Pread))
        }
        (None, Err(_)) => (Model::open(folder)?, options),
    };
    let device_count = env::var(DEVICES_VARIABLE)?.parse()?;
    let options = if device_count > 1 { options.device_map(shared(&model, device_count)?) } else { options };
    println!("{}", serde_json::to_string(&model.load(&options)?.report)?);
    Ok(())
}

/// Shares tensors out among devices by their place in the files, about as many bytes to each.
fn shared(model: &Model, device_count: u32) -> Result<DeviceMap, Box<dyn Error>> {
    let len_bytes: u64 = model.checkpoint().tensors().map(|tensor| tensor.info.len_bytes()).sum();
    let mut before = 0;
    let entry = |tensor: TensorRef<'_>| {
        let ordinal = before * u64::from(device_count) / len_bytes.max(1);
        before += tensor.info.len_bytes();
        (tensor.info.name.to_owned(), vec![DeviceId::Cuda(ordinal as u32)])
    };
    Ok(DeviceMap::new(model.checkpoint().tensors().map(entry))?)
}

/// Makes each read wait: one of 4 MiB for 15 ms in the mean.
fn slow() -> Faults {
    Faults { seed: 1, delayed_one_in: 1, delay_max: Duration::from_millis(30), ..Faults::default() }
}

/// Opens a folder's files as bytes in memory.
fn in_memory(folder: &Path, faults: Faults) -> Result<Model, Box<dyn Error>> {
    let mut paths =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    let named = |path: &PathBuf| -> std::io::Result<(String, Arc<[u8]>)> {
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Ok((name, fs::read(path)?.into()))
    };
    let files = paths.iter().map(named).collect::<std::io::Result<Vec<_>>>()?;
    Ok(Model::from_memory(files, faults)?)
}

/// Set for a process of one run: the folder to load.
const FOLDER_VARIABLE: &str = "TENSORHAUL_BENCH_OVERLAP_FOLDER";
/// How many devices share it.
const DEVICES_VARIABLE: &str = "TENSORHAUL_BENCH_OVERLAP_DEVICES";
/// Set where storage is [`Storage::Slow`].
const SLOW_VARIABLE: &str = "TENSORHAUL_BENCH_OVERLAP_SLOW";
/// The speed of a [`Storage::Disk`].
const DISK_VARIABLE: &str = "TENSORHAUL_BENCH_OVERLAP_DISK_MB_PER_S";
