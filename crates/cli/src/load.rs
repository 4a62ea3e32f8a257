//! `tensorhaul load`: reads a checkpoint into memory, and prints the figures.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use tensorhaul::{EngineChoice, LoadOptions, Model, Report};

use crate::arguments::{Selection, engines};
use crate::failure::Outcome;
use crate::output::{bytes, count, grouped, print, print_json, printable, seconds};
use crate::progress::Bar;
use crate::share;

/// Load tensors until every byte is in memory, and print how that went
///
/// With the engines auto and mmap, tensors on the host are pages of their files, all of them brought in. With
/// pread and io-uring they are read into memory of their own.
#[derive(Args)]
#[command(after_help = "Examples:
  tensorhaul load examples/models/tiny-llama
  tensorhaul load model --engine io-uring --staging 64MiB
  tensorhaul load model --tensor '*.q_proj.*' --tensor '*.k_proj.*' --checksum
  tensorhaul load model-GPTQ-Int4 --device cuda:0 --dequantize bf16
  tensorhaul load model --device cuda:0 --gds required
  tensorhaul load model --device-map auto
  tensorhaul load model --device-map map.json --device cuda:0
  tensorhaul load model --device cuda:3 --tp-size 8 --tp-rank 3 --fuse
  torchrun --nproc-per-node 8 --no-python tensorhaul load model --share node
  tensorhaul load model --json | jq '.gb_per_s, .fallbacks'")]
pub(crate) struct Load {
    /// A .safetensors file, a folder, an index json, or an org/name in the Hugging Face cache
    path: PathBuf,

    #[command(flatten)]
    selection: Selection,

    /// How bytes are read
    #[arg(long, default_value = "auto", value_parser = engines())]
    engine: EngineChoice,

    /// Threads that copy out of the page cache [default: one a core, at most 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,

    /// Compute the xxh3-64 of every tensor while its bytes pass
    #[arg(long)]
    checksum: bool,

    /// Print one JSON object: bytes, seconds, gb_per_s, engine, bytes_hot, bytes_cold, promised, fallbacks, ...
    #[arg(long)]
    json: bool,
}

impl Load {
    pub(crate) fn run(&self) -> Outcome {
        let model = Model::open(&self.path)?;
        let bar = Bar::new();
        let complete = |options: LoadOptions| {
            // The figures are of every byte in memory, not of a mapping that stands.
            let options = options.engine(self.engine).checksums(self.checksum).resident(true);
            let options = options.on_progress(bar.follow());
            match self.threads {
                Some(threads) => options.threads(threads),
                None => options,
            }
        };
        if self.selection.node.is_asked() {
            let (ranks, report) = share::load(&model, &self.selection, complete)?;
            drop(bar);
            return match self.json {
                true => print_json(&report),
                false => print(share::text(&self.path.to_string_lossy(), &ranks, &report)),
            };
        }
        let report = model.load(&complete(self.selection.options(&model)?))?.report;
        drop(bar);
        if self.json { print_json(&report) } else { print(self.text(&report)) }
    }

    fn text(&self, report: &Report) -> String {
        let Report { promised, phases, .. } = report;
        let mut text = String::new();
        let (path, tensors) = (self.path.to_string_lossy(), count(report.tensors, "tensor"));
        let _ = writeln!(
            text,
            "{}: {tensors}, {} bytes on {}",
            printable(&path),
            grouped(report.bytes),
            report.device
        );
        let _ = writeln!(text, "  time      {}, {:.2} GB/s", seconds(report.seconds), report.gb_per_s);
        let _ = writeln!(text, "  engine    {}, {} hand-over", report.engine, report.handover);
        let (hot, cold) = (report.bytes_hot, report.bytes_cold);
        let cache = |bytes_| if hot + cold == 0 { 0.0 } else { 100.0 * bytes_ as f64 / (hot + cold) as f64 };
        let _ = writeln!(
            text,
            "  cache     {} hot ({:.0}%), {} cold ({:.0}%); {} read directly{}",
            bytes(hot),
            cache(hot),
            bytes(cold),
            cache(cold),
            bytes(report.bytes_direct),
            straight(report.bytes_direct_storage)
        );
        let peak = |used, promised| format!("{} of {} promised", bytes(used), bytes(promised));
        let staging = peak(report.peak_staging_bytes, promised.peak_staging_bytes);
        let host = peak(report.peak_host_bytes, promised.peak_host_bytes);
        let _ = writeln!(text, "  memory    staging {staging}; host {host}");
        let _ = writeln!(
            text,
            "  phases    probe {}, plan {}, prepare {}, first byte {}, read {}",
            seconds(phases.probe_seconds),
            seconds(phases.plan_seconds),
            seconds(phases.prepare_seconds),
            seconds(phases.first_byte_seconds),
            seconds(phases.read_seconds)
        );
        if report.device != "host" {
            let _ = writeln!(
                text,
                "  device    driver {}, context {}, allocate {}, pin {}, kernels {}",
                seconds(phases.driver_seconds),
                seconds(phases.context_seconds),
                seconds(phases.allocate_seconds),
                seconds(phases.pin_seconds),
                seconds(phases.module_seconds)
            );
            let _ = writeln!(
                text,
                "  overlap   {} of that beside reads, {} read ahead; first copy {} after the first byte",
                seconds(phases.hidden_seconds),
                bytes(report.bytes_ahead),
                seconds(phases.first_copy_seconds)
            );
        }
        for device in &report.devices {
            let _ = writeln!(
                text,
                "  {:<9} {}, {} ({} from other devices); {} of its memory, staging {}",
                device.device,
                count(device.tensors, "tensor"),
                bytes(device.bytes),
                bytes(device.bytes_from_peers),
                bytes(device.target_bytes + device.transient_bytes),
                bytes(device.peak_staging_bytes)
            );
        }
        for fallback in &report.fallbacks {
            let _ = writeln!(text, "  fallback  {}: {}", printable(&fallback.what), printable(&fallback.why));
        }
        for (name, checksum) in report.checksums.iter().flatten() {
            let _ = writeln!(text, "{checksum}  {}", printable(name));
        }
        text
    }
}

/// How much of what was read directly went past the host.
fn straight(len_bytes: u64) -> String {
    match len_bytes {
        0 => String::new(),
        _ => format!(", {} of it straight into the device", bytes(len_bytes)),
    }
}
