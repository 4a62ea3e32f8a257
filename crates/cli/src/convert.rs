//! `tensorhaul convert`: writes a checkpoint anew, in other shards or as another dtype.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use tensorhaul::convert::{ConvertOptions, ConvertReport, convert};
use tensorhaul::{Dtype, Model};

use crate::arguments::{Bound, Device, cast_targets, parse_bytes, parse_device};
use crate::failure::Outcome;
use crate::interrupt;
use crate::output::{bytes, count, print, print_json, printable, seconds};
use crate::progress::Bar;
use crate::ranks::Sharing;

/// Write a checkpoint into another folder, in other shards, cast to another dtype, or dequantized
///
/// Files get their names when all of them are complete; on an error or Ctrl-C nothing is left. Data begins at a
/// multiple of 4096 bytes, so that it can be read directly. Configuration and tokenizer files come along.
/// Quantized tensors and their scales keep their dtype under --cast, and are listed; with --dequantize they become
/// plain tensors, and the configuration says nothing of quantization any more.
#[derive(Args)]
#[command(after_help = "Examples:
  tensorhaul convert model out --cast bf16
  tensorhaul convert model out --max-shard-bytes 5GB
  tensorhaul convert model-GPTQ-Int4 out --dequantize bf16
  tensorhaul convert model out-3 --tp-size 8 --tp-rank 3 --fuse
  tensorhaul convert org/name out --cast f16 --json | jq .kept")]
pub(crate) struct Convert {
    /// A .safetensors file, a folder, an index json, or an org/name in the Hugging Face cache
    path: PathBuf,

    /// The folder to write into; made where it is missing, refused where it holds a checkpoint
    out_dir: PathBuf,

    /// Cast floating-point tensors to this dtype, rounding to nearest
    #[arg(long, value_name = "DTYPE", value_parser = cast_targets())]
    cast: Option<Dtype>,

    /// Turn quantized tensors (GPTQ, AWQ, FP8, MXFP4, NVFP4, ...) into this dtype, under the names they had before
    #[arg(long, value_name = "DTYPE", value_parser = cast_targets())]
    dequantize: Option<Dtype>,

    /// Where tensors are dequantized; the bytes are the same everywhere
    #[arg(long, value_name = "host|cuda:N|rocm:N|auto", default_value = "host", value_parser = parse_device, requires = "dequantize")]
    device: Device,

    #[command(flatten)]
    sharing: Sharing,

    #[command(flatten)]
    bound: Bound,

    /// The most bytes of tensors in one file: bytes, or with a unit such as 5GB [default: one file]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    max_shard_bytes: Option<u64>,

    /// Print one JSON object: files, sidecars, tensors, bytes, tensors_cast, tensors_dequantized, kept, overflowed, left_out, ...
    #[arg(long)]
    json: bool,
}

impl Convert {
    pub(crate) fn run(&self) -> Outcome {
        let model = Model::open(&self.path)?;
        let bar = Bar::new();
        let mut options = ConvertOptions::default().on_progress(bar.follow());
        options = options.cancel_on(interrupt::set_a_flag_instead());
        if let Some(dtype) = self.cast {
            options = options.cast(dtype);
        }
        if let Some(dtype) = self.dequantize {
            options = options.dequantize(dtype);
            options = options.device(self.device.named().unwrap_or_else(tensorhaul::default_device));
        }
        if let Some(parallel) = self.sharing.parallel(false)? {
            options = options.parallel(parallel);
        }
        if let Some(over_read_max) = self.bound.over_read_max {
            options = options.over_read_max(over_read_max);
        }
        if let Some(max_shard_bytes) = self.max_shard_bytes {
            options = options.max_shard_bytes(max_shard_bytes);
        }
        let report = convert(&model, &self.out_dir, &options)?;
        drop(bar);
        if self.json { print_json(&report) } else { print(self.text(&report)) }
    }

    fn text(&self, report: &ConvertReport) -> String {
        let mut text = String::new();
        let out_dir = self.out_dir.to_string_lossy();
        let _ = writeln!(
            text,
            "{}: {}, {} in {} ({:.2} GB/s)",
            printable(&out_dir),
            count(report.tensors, "tensor"),
            bytes(report.bytes),
            seconds(report.seconds),
            report.gb_per_s
        );
        let written = report.files.iter().chain(&report.index).chain(&report.sidecars);
        list(&mut text, "file", written.cloned());
        if let Some(dtype) = self.cast {
            let _ = writeln!(text, "  cast      {} to {dtype}", count(report.tensors_cast, "tensor"));
        }
        if let Some(dtype) = self.dequantize {
            let _ = writeln!(text, "  dequant   {} to {dtype}", count(report.tensors_dequantized, "tensor"));
        }
        list(&mut text, "kept", report.kept.iter().map(ToString::to_string));
        let overflow =
            |tensor: &str, elements| format!("{tensor:?}: {} became infinite", count(elements, "number"));
        list(&mut text, "overflow", report.overflowed.iter().map(|it| overflow(&it.tensor, it.elements)));
        list(&mut text, "unfused", report.unfused.iter().map(ToString::to_string));
        let unused = |rule: &String| format!("rule {rule:?}, which no tensor has");
        list(&mut text, "unused", report.unused_rules.iter().map(unused));
        list(&mut text, "left out", report.left_out.iter().map(|it| format!("{}: {}", it.what, it.why)));
        text
    }
}

/// Lists a few, and how many more there are.
fn list(text: &mut String, title: &str, items: impl Iterator<Item = String>) {
    let items: Vec<String> = items.collect();
    for item in items.iter().take(LISTED_MAX) {
        let _ = writeln!(text, "  {title:<8}  {}", printable(item));
    }
    if items.len() > LISTED_MAX {
        let _ = writeln!(text, "  {title:<8}  and {} more; --json lists all", items.len() - LISTED_MAX);
    }
}

/// A quantized model keeps thousands of tensors, for one reason.
const LISTED_MAX: usize = 12;
