//! Loads of whole checkpoints beside the machine's ceilings, cold and warm, in one table.
//!
//! ```text
//! cargo bench -p tensorhaul-benches --bench load -- [PART OF A ROW'S NAME]... [--test]
//! ```
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `TENSORHAUL_BENCH_BYTES` | length of the generated checkpoints | 1,000,000,000; 16 MB with `--test` |
//! | `TENSORHAUL_BENCH_MODEL` | a folder with safetensors files, instead of the one of few large tensors | generated |
//! | `TENSORHAUL_BENCH_DIR` | where checkpoints are generated; on the disk that is to be measured | cargo's target folder |
//! | `TENSORHAUL_BENCH_ROUNDS` | timed rounds | 7; 1 with `--test` |
//! | `TENSORHAUL_BENCH_QUIET` | cores: a run during which others kept more busy is repeated, and does not count | do not look |
//! | `TENSORHAUL_BENCH_OUT` | a file for the results as JSON | none |
//!
//! This is no criterion bench. A cold run is worth something only right after the page cache was emptied and that was
//! verified, and each run needs its memory primed before the clock starts; criterion runs a body many times in a row. And
//! a shared disk drifts by a third within minutes, so rows are compared only within rounds that run every row once;
//! criterion finishes one row before it starts the next.

use std::env;
use std::error::Error;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use tensorhaul::{EngineChoice, Handover, LoadOptions, Model, Preference, Report};
use tensorhaul_benches::cache::Cache;
use tensorhaul_benches::ceiling::{Ceiling, Check};
use tensorhaul_benches::checkpoint::{Checkpoint, Shape, tensor_checksum};
use tensorhaul_benches::machine::Machine;
use tensorhaul_benches::memory::prime;
use tensorhaul_benches::meter::{Cost, Meter, wait_until_quiet};
use tensorhaul_benches::statistics::median;

/// What is measured and what it is held against.
struct Row {
    name: &'static str,
    cache: Cache,
    shape: Shape,
    work: Work,
    /// The rows whose best median is this one's ceiling.
    ceilings: &'static [&'static str],
    /// The least fraction of the ceiling's GB/s.
    asked: Option<f64>,
}

/// What a row does. Each must produce its checkpoint's checksum: a ceiling that of the files, a load that of the tensors.
#[derive(Clone, Copy)]
enum Work {
    Ceiling(Ceiling),
    Load(Load),
}

/// The options of a load.
#[derive(Clone, Copy)]
struct Load {
    handover: Handover,
    engine: EngineChoice,
    in_place: Preference,
    staging_bytes: u64,
}

const PRIVATE: Load = Load {
    handover: Handover::Private,
    engine: EngineChoice::Auto,
    in_place: Preference::Preferred,
    staging_bytes: tensorhaul::STAGING_BYTES_DEFAULT,
};
const MAPPED: Load = Load { handover: Handover::Mapped, ..PRIVATE };
/// As an accelerator loads: every byte stops in the staging ring.
const STAGED: Load = Load { in_place: Preference::Off, ..PRIVATE };

/// The plain sequential reads, of which the best is the ceiling of every cold load.
const SEQUENTIAL: &[&str] = &[
    "ceiling: O_DIRECT, 128 KiB x 64, reused ring",
    "ceiling: O_DIRECT, 1 MiB x 32, reused ring",
    "ceiling: O_DIRECT, 8 MiB x 4, reused ring",
    "ceiling: buffered, 1 thread",
    "ceiling: buffered, 2 threads",
];
const PREAD_FRESH: &str = "ceiling: pread into fresh huge pages";

const fn row(name: &'static str, cache: Cache, work: Work) -> Row {
    Row { name, cache, shape: Shape::FewLarge, work, ceilings: &[], asked: None }
}

const fn direct_ring(name: &'static str, request_len_bytes: usize, depth: usize) -> Row {
    row(name, Cache::Cold, Work::Ceiling(Ceiling::DirectRing { request_len_bytes, depth }))
}

const fn buffered(name: &'static str, thread_count: usize) -> Row {
    row(name, Cache::Cold, Work::Ceiling(Ceiling::Buffered { request_len_bytes: 1 << 20, thread_count }))
}

/// The table. A row stands behind its ceilings.
const ROWS: &[Row] = &[
    direct_ring(SEQUENTIAL[0], 128 << 10, 64),
    direct_ring(SEQUENTIAL[1], 1 << 20, 32),
    direct_ring(SEQUENTIAL[2], 8 << 20, 4),
    buffered(SEQUENTIAL[3], 1),
    buffered(SEQUENTIAL[4], 2),
    row(
        "ceiling: O_DIRECT into fresh huge pages",
        Cache::Cold,
        Work::Ceiling(Ceiling::DirectFresh { request_len_bytes: 1 << 20, depth: 32 }),
    ),
    row("ceiling: touch of a cold mapping", Cache::Cold, Work::Ceiling(Ceiling::Touch)),
    Row {
        ceilings: SEQUENTIAL,
        asked: Some(0.95),
        ..row("private cold, auto", Cache::Cold, Work::Load(PRIVATE))
    },
    Row {
        ceilings: SEQUENTIAL,
        ..row(
            "private cold, io-uring",
            Cache::Cold,
            Work::Load(Load { engine: EngineChoice::IoUring, ..PRIVATE }),
        )
    },
    Row {
        ceilings: SEQUENTIAL,
        ..row("private cold, pread", Cache::Cold, Work::Load(Load { engine: EngineChoice::Pread, ..PRIVATE }))
    },
    Row {
        ceilings: SEQUENTIAL,
        ..row("private cold, staged through 256 MiB", Cache::Cold, Work::Load(STAGED))
    },
    Row {
        ceilings: &["private cold, staged through 256 MiB"],
        asked: Some(0.9),
        ..row(
            "private cold, staged through 16 MiB",
            Cache::Cold,
            Work::Load(Load { staging_bytes: 16 << 20, ..STAGED }),
        )
    },
    Row {
        shape: Shape::ManySmall,
        ceilings: &["private cold, auto"],
        asked: Some(0.9),
        ..row("private cold, 10,000 small tensors", Cache::Cold, Work::Load(PRIVATE))
    },
    Row {
        ceilings: &["ceiling: touch of a cold mapping"],
        ..row("mapped cold, every page touched", Cache::Cold, Work::Load(MAPPED))
    },
    row(PREAD_FRESH, Cache::Warm, Work::Ceiling(Ceiling::PreadFresh { request_len_bytes: 4 << 20 })),
    row("ceiling: memcpy into touched memory", Cache::Warm, Work::Ceiling(Ceiling::Copy)),
    row("ceiling: touch of a warm mapping", Cache::Warm, Work::Ceiling(Ceiling::Touch)),
    Row {
        ceilings: &[PREAD_FRESH],
        asked: Some(0.95),
        ..row("private warm, auto", Cache::Warm, Work::Load(PRIVATE))
    },
    Row {
        ceilings: &[PREAD_FRESH],
        ..row("private warm, staged through 256 MiB", Cache::Warm, Work::Load(STAGED))
    },
    Row {
        ceilings: &["private warm, staged through 256 MiB"],
        asked: Some(0.9),
        ..row(
            "private warm, staged through 16 MiB",
            Cache::Warm,
            Work::Load(Load { staging_bytes: 16 << 20, ..STAGED }),
        )
    },
    Row {
        shape: Shape::ManySmall,
        ceilings: &["private warm, auto"],
        asked: Some(0.9),
        ..row("private warm, 10,000 small tensors", Cache::Warm, Work::Load(PRIVATE))
    },
    Row {
        ceilings: &["ceiling: touch of a warm mapping"],
        ..row("mapped warm, every page touched", Cache::Warm, Work::Load(MAPPED))
    },
];

fn main() -> Result<(), Box<dyn Error>> {
    let settings = Settings::from_environment();
    let folder = tempfile::Builder::new().prefix("bench-load-").tempdir_in(&settings.folder)?;
    let rows = settings.rows();
    let checkpoints = Checkpoints::make(&settings, folder.path(), &rows)?;

    let mut measured = Vec::new();
    for row in rows {
        let checkpoint = checkpoints.of(row.shape);
        match (check(row, checkpoint), row.work) {
            (Ok(()), _) => measured.push(Measured { row, checkpoint, runs: Vec::new() }),
            // A filesystem in memory is never cold, and some others take no direct reads.
            (Err(error), Work::Ceiling(_)) => eprintln!("skipped: {}: {error}", row.name),
            (Err(error), Work::Load(_))
                if row.cache == Cache::Cold && Cache::Cold.prepare(checkpoint).is_err() =>
            {
                eprintln!("skipped: {}: {error}", row.name);
            }
            (Err(error), Work::Load(_)) => return Err(format!("{}: {error}", row.name).into()),
        }
    }
    let machine = Machine::of(&checkpoints.few_large.folder);
    for round in 0..settings.rounds {
        // Forth and back, so that no row always follows the same other one.
        let count = measured.len();
        for index in (0..count).map(|index| if round % 2 == 0 { index } else { count - 1 - index }) {
            let Measured { row, checkpoint, runs } = &mut measured[index];
            runs.push(
                time(row, checkpoint, settings.quiet_cores)
                    .map_err(|error| format!("{}: {error}", row.name))?,
            );
        }
        eprintln!("round {} of {}", round + 1, settings.rounds);
        let summaries = summarize(&measured, settings.quiet_cores);
        if let Some(path) = &settings.out {
            let document = Document { machine: &machine, rounds: round + 1, rows: &summaries };
            fs::write(path, serde_json::to_string_pretty(&document)? + "\n")?;
        }
        if round + 1 == settings.rounds {
            println!("{}\n{machine:?}", table(&summaries));
        }
    }
    Ok(())
}

fn summarize<'c>(measured: &'c [Measured<'_>], quiet_cores: f64) -> Vec<Summary<'c>> {
    let mut summaries = Vec::new();
    for measured in measured {
        let summary = Summary::new(measured, quiet_cores, &summaries);
        summaries.push(summary);
    }
    summaries
}

struct Settings {
    folder: PathBuf,
    model: Option<PathBuf>,
    out: Option<PathBuf>,
    len_bytes: u64,
    rounds: usize,
    quiet_cores: f64,
    filters: Vec<String>,
}

impl Settings {
    fn from_environment() -> Settings {
        let arguments: Vec<String> = env::args().skip(1).collect();
        let is_test = arguments.iter().any(|argument| argument == "--test");
        let number = |name: &str| env::var(name).ok().map(|text| text.replace('_', "").parse().expect(name));
        Settings {
            folder: env::var_os("TENSORHAUL_BENCH_DIR").unwrap_or(env!("CARGO_TARGET_TMPDIR").into()).into(),
            model: env::var_os("TENSORHAUL_BENCH_MODEL").map(Into::into),
            out: env::var_os("TENSORHAUL_BENCH_OUT").map(Into::into),
            len_bytes: number("TENSORHAUL_BENCH_BYTES").unwrap_or(if is_test {
                16_000_000
            } else {
                1_000_000_000
            }),
            rounds: number("TENSORHAUL_BENCH_ROUNDS").unwrap_or(if is_test { 1 } else { 7 }) as usize,
            quiet_cores: env::var("TENSORHAUL_BENCH_QUIET")
                .map_or(f64::INFINITY, |text| text.parse().expect("cores")),
            filters: arguments.into_iter().filter(|argument| !argument.starts_with("--")).collect(),
        }
    }

    /// Returns the rows asked for, and the ceilings they need.
    fn rows(&self) -> Vec<&'static Row> {
        let mut wanted: Vec<bool> = ROWS
            .iter()
            .map(|row| self.filters.is_empty() || self.filters.iter().any(|part| row.name.contains(part)))
            .collect();
        for index in (0..ROWS.len()).rev() {
            for (other, row) in ROWS[..index].iter().enumerate() {
                wanted[other] |= wanted[index] && ROWS[index].ceilings.contains(&row.name);
            }
        }
        ROWS.iter().zip(wanted).filter_map(|(row, wanted)| wanted.then_some(row)).collect()
    }
}

struct Checkpoints {
    few_large: Checkpoint,
    many_small: Option<Checkpoint>,
}

impl Checkpoints {
    fn make(settings: &Settings, folder: &Path, rows: &[&Row]) -> io::Result<Checkpoints> {
        let few_large = match &settings.model {
            Some(model) => Checkpoint::find(model)?,
            None => Checkpoint::generate(&folder.join("few-large"), Shape::FewLarge, settings.len_bytes)?,
        };
        let make_small =
            || Checkpoint::generate(&folder.join("many-small"), Shape::ManySmall, few_large.payload_bytes);
        let has_small = rows.iter().any(|row| row.shape == Shape::ManySmall);
        Ok(Checkpoints { many_small: has_small.then(make_small).transpose()?, few_large })
    }

    fn of(&self, shape: Shape) -> &Checkpoint {
        match (shape, &self.many_small) {
            (Shape::ManySmall, Some(many_small)) => many_small,
            _ => &self.few_large,
        }
    }
}

/// Runs a row once, untimed, and compares its checksum.
fn check(row: &Row, checkpoint: &Checkpoint) -> Result<(), Box<dyn Error>> {
    row.cache.prepare(checkpoint)?;
    let (found, expected) = match row.work {
        Work::Ceiling(ceiling) => {
            let check: &'static Check = Box::leak(Box::default());
            ceiling.ready(checkpoint, Some(check))?()?;
            (check.sum(), checkpoint.files_checksum)
        }
        Work::Load(load) => {
            let loaded = Model::open(&checkpoint.folder)?.load(&load.options())?;
            let mut sum = 0u64;
            for (name, tensor) in loaded.tensors.iter() {
                sum = sum.wrapping_add(tensor_checksum(name, tensor.bytes()?));
            }
            (sum, checkpoint.tensors_checksum)
        }
    };
    if found == expected { Ok(()) } else { Err(format!("checksum {found:016x}, not {expected:016x}").into()) }
}

/// One timed run.
#[derive(Serialize)]
struct Run {
    cost: Cost,
    system_calls: u64,
    /// What a load says about itself.
    report: Option<Report>,
}

fn time(row: &Row, checkpoint: &Checkpoint, quiet_cores: f64) -> Result<Run, Box<dyn Error>> {
    for attempt in 1..=ATTEMPTS_MAX {
        wait_until_quiet(quiet_cores);
        row.cache.prepare(checkpoint)?;
        if checkpoint.file_bytes >= PRIMED_BYTES_MIN {
            prime(checkpoint.file_bytes + PRIMED_BESIDE_BYTES);
        }
        row.cache.prepare(checkpoint)?; // The kernel may have made room for huge pages.
        let run = time_once(row, checkpoint)?;
        let is_quiet = run.cost.others_cores <= quiet_cores || attempt == ATTEMPTS_MAX;
        if is_quiet && run.found_cache_as_prepared(row, checkpoint) {
            return Ok(run);
        }
    }
    Err(format!("{ATTEMPTS_MAX} times the page cache was no longer {:?} when the load looked", row.cache)
        .into())
}

fn time_once(row: &Row, checkpoint: &Checkpoint) -> Result<Run, Box<dyn Error>> {
    match row.work {
        Work::Ceiling(ceiling) => {
            let ready = ceiling.ready(checkpoint, None)?;
            let meter = Meter::start();
            let ran = ready()?;
            Ok(Run { cost: meter.stop(), system_calls: ran.system_calls, report: None })
        }
        Work::Load(load) => {
            let options = load.options();
            let meter = Meter::start();
            let loaded = Model::open(&checkpoint.folder)?.load(&options)?;
            let cost = meter.stop();
            let report = loaded.report;
            Ok(Run { cost, system_calls: report.system_calls, report: Some(report) })
        }
    }
}

impl Run {
    fn found_cache_as_prepared(&self, row: &Row, checkpoint: &Checkpoint) -> bool {
        match (&self.report, row.cache) {
            (None, _) => true,
            // Opening read the headers, and the kernel read ahead of them.
            (Some(report), Cache::Cold) => {
                report.bytes_hot <= checkpoint.paths.len() as u64 * READ_AHEAD_BYTES_MAX
            }
            (Some(report), Cache::Warm) => report.bytes_cold == 0,
        }
    }
}

impl Load {
    fn options(self) -> LoadOptions {
        let Load { handover, engine, in_place, staging_bytes } = self;
        let options = LoadOptions::default().handover(handover).engine(engine);
        options.in_place(in_place).staging_bytes(staging_bytes).resident(true)
    }
}

/// Figures of less than this are dominated by what does not grow with the bytes, and nobody waits for them.
const PRIMED_BYTES_MIN: u64 = 100_000_000;

/// The staging ring, and what the bench and the page cache take meanwhile.
const PRIMED_BESIDE_BYTES: u64 = 512 << 20;

/// More than any disturbance that passes by itself takes.
const ATTEMPTS_MAX: u32 = 3;

/// Fewer quiet runs have no median worth more than that of all.
const QUIET_RUNS_MIN: usize = 3;

/// The longest read-ahead of any kernel's defaults, and of this bench's records.
const READ_AHEAD_BYTES_MAX: u64 = 8 << 20;

struct Measured<'c> {
    row: &'static Row,
    checkpoint: &'c Checkpoint,
    runs: Vec<Run>,
}

/// A row's line of the table.
#[derive(Serialize)]
struct Summary<'c> {
    name: &'static str,
    cache: Cache,
    bytes: u64,
    tensors: usize,
    gb_per_s: f64,
    gb_per_s_min: f64,
    gb_per_s_max: f64,
    cpu_seconds_per_gb: f64,
    system_calls: f64,
    /// Peak memory of a load beyond its result.
    beside_result_bytes: Option<f64>,
    /// Runs that the figures above are of.
    counted_runs: usize,
    ceiling: Option<&'static str>,
    ceiling_fraction: Option<f64>,
    asked_fraction: Option<f64>,
    runs: &'c [Run],
}

impl<'c> Summary<'c> {
    /// `before` are the rows above it, its ceilings among them.
    fn new(measured: &'c Measured<'_>, quiet_cores: f64, before: &[Summary<'_>]) -> Summary<'c> {
        let Measured { row, checkpoint, runs } = measured;
        let quiet: Vec<&Run> = runs.iter().filter(|run| run.cost.others_cores <= quiet_cores).collect();
        let counted = if quiet.len() >= QUIET_RUNS_MIN { quiet } else { runs.iter().collect() };
        let bytes = match row.work {
            Work::Ceiling(_) => checkpoint.file_bytes,
            Work::Load(_) => checkpoint.payload_bytes,
        };
        let rates = || counted.iter().map(|run| bytes as f64 / run.cost.seconds / 1e9);
        let gb_per_s = median(rates());
        let ceilings = before.iter().filter(|other| row.ceilings.contains(&other.name));
        let ceiling = ceilings.max_by(|one, other| one.gb_per_s.total_cmp(&other.gb_per_s));
        let beside = |run: &&Run| run.cost.peak_bytes as f64 - bytes as f64;
        Summary {
            name: row.name,
            cache: row.cache,
            bytes,
            tensors: checkpoint.tensor_count,
            gb_per_s,
            gb_per_s_min: rates().fold(f64::INFINITY, f64::min),
            gb_per_s_max: rates().fold(0.0, f64::max),
            cpu_seconds_per_gb: median(counted.iter().map(|run| run.cost.cpu_seconds * 1e9 / bytes as f64)),
            system_calls: median(counted.iter().map(|run| run.system_calls as f64)),
            beside_result_bytes: matches!(row.work, Work::Load(_))
                .then(|| median(counted.iter().map(beside))),
            counted_runs: counted.len(),
            ceiling: ceiling.map(|ceiling| ceiling.name),
            ceiling_fraction: ceiling.map(|ceiling| gb_per_s / ceiling.gb_per_s),
            asked_fraction: row.asked,
            runs,
        }
    }

    fn cells(&self) -> Vec<String> {
        let percent =
            |fraction: Option<f64>| fraction.map_or(String::new(), |it| format!("{:.0}%", it * 100.0));
        vec![
            self.name.to_owned(),
            format!("{:.2}", self.gb_per_s),
            format!("{:.2} - {:.2}", self.gb_per_s_min, self.gb_per_s_max),
            percent(self.ceiling_fraction),
            percent(self.asked_fraction),
            format!("{:.3}", self.cpu_seconds_per_gb),
            format!("{:.0}", self.system_calls),
            self.beside_result_bytes
                .map_or(String::new(), |bytes| format!("{:.0}", bytes / f64::from(1 << 20))),
        ]
    }
}

fn table(summaries: &[Summary<'_>]) -> Table {
    let mut table = Table::new();
    let head = ["", "GB/s", "spread", "of ceiling", "asked", "CPU s/GB", "system calls", "MiB beside result"];
    table.load_style(presets::ASCII_MARKDOWN).set_header(head);
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    summaries.iter().for_each(|summary| {
        table.add_row(summary.cells());
    });
    table
}

#[derive(Serialize)]
struct Document<'c> {
    machine: &'c Machine,
    rounds: usize,
    rows: &'c [Summary<'c>],
}
