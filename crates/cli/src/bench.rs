//! `tensorhaul bench`: loads beside what this machine does at best, measured in one run.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use tensorhaul::bench::{Bench, BenchOptions, Cache, FirstLoad, Row, TemporaryCheckpoint, run};
use tensorhaul::save::SaveOptions;
use tensorhaul::{EngineChoice, Model};

use crate::arguments::{Placement, engines, parse_bytes};
use crate::failure::Outcome;
use crate::interrupt;
use crate::output::{bytes, count, print, print_json, printable, seconds};
use crate::progress::{Bar, Step};

/// Measure loads beside what this machine does at best
///
/// Ceilings and loads are measured in turns: direct reads of the very files, reads out of the page cache, copies in
/// memory and over the device's link, then loads with the page cache empty (cold) and full (hot). Loads are into memory
/// of their own, on the host too. What the page cache holds is made and verified before each run.
#[derive(Args)]
#[command(after_help = "Examples:
  tensorhaul bench                                with a checkpoint of 1 GiB, written here and removed again
  tensorhaul bench model --device host --runs 5
  tensorhaul bench --size 8GiB --dir /mnt/models --device cuda:0
  tensorhaul bench model --json | jq '.loads[] | {name, gb_per_s, ceiling_fraction}'")]
pub(crate) struct Measure {
    /// A .safetensors file, a folder, an index json, or an org/name in the Hugging Face cache [default: a temporary one]
    path: Option<PathBuf>,

    #[command(flatten)]
    placement: Placement,

    /// How loads read bytes
    #[arg(long, default_value = "auto", value_parser = engines())]
    engine: EngineChoice,

    /// Runs of everything that is measured
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,

    /// Length of the temporary checkpoint: bytes, or with a unit
    #[arg(long, value_name = "BYTES", default_value = "1GiB", conflicts_with = "path", value_parser = parse_bytes)]
    size: u64,

    /// The folder that the temporary checkpoint is written into [default: the current one]
    #[arg(long, value_name = "DIR", conflicts_with = "path")]
    dir: Option<PathBuf>,

    /// Print one JSON object: machine, ceilings, loads, first_load, verdict, with the figures of every run
    #[arg(long)]
    json: bool,
}

impl Measure {
    pub(crate) fn run(&self) -> Outcome {
        let interrupted = interrupt::set_a_flag_instead();
        let mut options = BenchOptions::default().runs(self.runs).cancel_on(interrupted.clone());
        options = options.load(self.placement.options().engine(self.engine));
        if let Some(device) = self.placement.device.named() {
            options = options.device(device);
        }
        let bench = match &self.path {
            Some(path) => measure(path, options),
            None => {
                let bar = Bar::new();
                let save = SaveOptions::default().on_progress(bar.follow()).cancel_on(interrupted);
                let folder = self.dir.as_deref().unwrap_or(Path::new("."));
                // Removed when it is dropped, whatever comes of the bench.
                let checkpoint = TemporaryCheckpoint::write(folder, self.size, &save)?;
                drop(bar);
                measure(checkpoint.path(), options)
            }
        }?;
        if self.json { print_json(&bench) } else { print(text(&bench)) }
    }
}

fn measure(path: &Path, options: BenchOptions) -> tensorhaul::Result<Bench> {
    let step = Step::new();
    run(&Model::open(path)?, &options.on_step(step.follow()))
}

fn text(bench: &Bench) -> String {
    let mut text = String::new();
    let (tensors, files) = (count(bench.tensors as u64, "tensor"), count(bench.files as u64, "file"));
    let (path, len) = (printable(&bench.path), bytes(bench.payload_bytes));
    let _ = writeln!(text, "{path}: {tensors}, {len} in {files}, onto {}", bench.device);
    let _ = writeln!(text, "{}\n", printable(&machine(bench)));
    text.push_str(&table(bench));
    text.push('\n');
    for row in bench.ceilings.iter().chain(&bench.loads) {
        if let Some(why) = &row.why {
            let runs =
                if row.runs.is_empty() { "no run".to_owned() } else { count(row.runs.len() as u64, "run") };
            let _ = writeln!(text, "{}: {runs}: {}", row.name, printable(why));
        }
    }
    text.push_str(&fixed_costs(bench));
    let _ = writeln!(text, "\n{}", printable(&bench.verdict));
    text
}

fn machine(bench: &Bench) -> String {
    let machine = &bench.machine;
    let cores = count(machine.cores as u64, "core");
    let memory = format!("{} of memory", bytes(machine.memory_bytes));
    let device = [&machine.device.description, &machine.device.driver];
    let facts = [machine.processor.clone(), Some(cores), Some(memory), Some(machine.kernel.clone())];
    let facts = facts.into_iter().flatten().chain(machine.filesystem.map(str::to_owned));
    facts.chain(device.into_iter().flatten().cloned()).collect::<Vec<_>>().join(", ")
}

fn table(bench: &Bench) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["", "cache", "GB/s", "min - max", "of ceiling", "CPU s/GB", "staging", "how"]);
    bench.ceilings.iter().for_each(|row| _ = table.add_row(cells(row)));
    table.add_row(first_load(&bench.first_load));
    bench.loads.iter().for_each(|row| _ = table.add_row(cells(row)));
    table
        .column_iter_mut()
        .skip(2)
        .take(5)
        .for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
        .lines()
        .fold(String::new(), |text, line| text + line.strip_prefix(' ').unwrap_or(&line).trim_end() + "\n")
}

fn cells(row: &Row) -> [String; 8] {
    let percent = row.ceiling_fraction.map(|fraction| format!("{:.0}%", fraction * 100.0));
    let how = match row.ceiling {
        Some(ceiling) => format!("{}; ceiling: {ceiling}", row.how),
        None => row.how.clone(),
    };
    [
        row.name.to_owned(),
        cache(row.cache).to_owned(),
        row.gb_per_s.map_or("-".to_owned(), |speed| format!("{:.2}", speed.median)),
        row.gb_per_s.map_or(String::new(), |speed| format!("{:.2} - {:.2}", speed.min, speed.max)),
        percent.unwrap_or_default(),
        row.cpu_seconds_per_gb.map_or(String::new(), |seconds| format!("{seconds:.3}")),
        row.peak_staging_bytes.map_or(String::new(), bytes),
        how,
    ]
}

fn first_load(first: &FirstLoad) -> [String; 8] {
    let run = &first.run;
    let staging = run.report.as_ref().map(|report| bytes(report.peak_staging_bytes));
    [
        "first load".to_owned(),
        cache(first.cache).to_owned(),
        format!("{:.2}", run.gb_per_s),
        String::new(),
        String::new(),
        format!("{:.3}", run.cpu_seconds * 1e9 / run.bytes.max(1) as f64),
        staging.unwrap_or_default(),
        "before everything else, with its fixed costs".to_owned(),
    ]
}

fn cache(cache: Cache) -> &'static str {
    match cache {
        Cache::Cold => "cold",
        Cache::Hot => "hot",
        Cache::AsFound => "as found",
        _ => "-",
    }
}

/// What does not grow with the bytes: of the first load, and of the last of each later kind.
fn fixed_costs(bench: &Bench) -> String {
    let mut text = format!("fixed costs: driver {}\n", seconds(bench.driver_seconds));
    let later = bench.loads.iter().filter_map(|row| Some((row.name, row.runs.last()?)));
    for (name, run) in [("first load", &bench.first_load.run)].into_iter().chain(later) {
        let Some(report) = &run.report else { continue };
        let phases = &report.phases;
        let _ = writeln!(
            text,
            "  {name:<10} {}: driver {}, context {}, pinning {} ({} of that beside reads); probe {}, plan {}, prepare {}, first byte {}, read {}",
            seconds(report.seconds),
            seconds(phases.driver_seconds),
            seconds(phases.context_seconds),
            seconds(phases.pin_seconds),
            seconds(phases.hidden_seconds),
            seconds(phases.probe_seconds),
            seconds(phases.plan_seconds),
            seconds(phases.prepare_seconds),
            seconds(phases.first_byte_seconds),
            seconds(phases.read_seconds)
        );
    }
    text
}
