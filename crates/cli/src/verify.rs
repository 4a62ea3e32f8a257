//! `tensorhaul verify`: compares a checkpoint with its manifest, or writes one.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use tensorhaul::manifest::{Difference, Manifest};
use tensorhaul::{LoadOptions, Model, Report};

use crate::failure::{Failure, Outcome};
use crate::interrupt;
use crate::output::{bytes, count, print, print_json, printable, seconds};
use crate::progress::Bar;

/// Check every tensor against a manifest of xxh3-64 checksums, or write that manifest
///
/// The manifest is of tensors, not of files: it also fits the same model in other shards. Exits with 1 when
/// anything differs.
#[derive(Args)]
#[command(after_help = "Examples:
  tensorhaul verify model --write-manifest sums.json
  tensorhaul verify model --manifest sums.json
  tensorhaul verify other-shards --manifest sums.json --json | jq .differences")]
pub(crate) struct Verify {
    /// A .safetensors file, a folder, an index json, or an org/name in the Hugging Face cache
    path: PathBuf,

    #[command(flatten)]
    manifest: ManifestFile,

    /// Print one JSON object: ok, manifest, tensors, bytes, seconds, gb_per_s, differences
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct ManifestFile {
    /// Compare with this manifest
    #[arg(long, value_name = "FILE")]
    manifest: Option<PathBuf>,

    /// Write this manifest, over an older one if there is one
    #[arg(long, value_name = "FILE")]
    write_manifest: Option<PathBuf>,
}

impl Verify {
    pub(crate) fn run(&self) -> Outcome {
        match (&self.manifest.manifest, &self.manifest.write_manifest) {
            (Some(file), _) => self.check(file),
            (None, Some(file)) => self.write(file),
            (None, None) => unreachable!("clap requires one of the two"),
        }
    }

    fn check(&self, file: &Path) -> Outcome {
        let expected = Manifest::read(file)?;
        let (found, report) = self.compute()?;
        let differences = expected.differences(&found);
        let file = file.to_string_lossy();
        let printed = if self.json {
            print_json(&View::of(&file, &report, &differences))
        } else if differences.is_empty() {
            print(format_args!("ok: {}, as in {}\n", figures(&report), printable(&file)))
        } else {
            let lines =
                differences.iter().map(|difference| format!("{}\n", printable(&difference.to_string())));
            print(lines.collect::<String>())
        };
        if differences.is_empty() {
            return printed;
        }
        // Also when nobody reads the list to its end: the answer is no.
        let (path, number) = (self.path.to_string_lossy(), count(differences.len() as u64, "tensor"));
        Err(Failure::of_input(format!("{path}: {number} not as in {file}")))
    }

    fn write(&self, file: &Path) -> Outcome {
        let (manifest, report) = self.compute()?;
        // The file is written beside its name first; an interrupt must not leave that behind.
        interrupt::set_a_flag_instead();
        manifest.write(file)?;
        let file = file.to_string_lossy();
        if self.json {
            return print_json(&View::of(&file, &report, &[]));
        }
        print(format_args!("wrote {}: {}\n", printable(&file), figures(&report)))
    }

    fn compute(&self) -> Result<(Manifest, Report), Failure> {
        let bar = Bar::new();
        Ok(Manifest::of(&Model::open(&self.path)?, &LoadOptions::default().on_progress(bar.follow()))?)
    }
}

fn figures(report: &Report) -> String {
    let (tensors, len) = (count(report.tensors, "tensor"), bytes(report.bytes));
    format!("{tensors}, {len} in {} ({:.2} GB/s)", seconds(report.seconds), report.gb_per_s)
}

#[derive(Serialize)]
struct View<'v> {
    ok: bool,
    manifest: &'v str,
    tensors: u64,
    bytes: u64,
    seconds: f64,
    gb_per_s: f64,
    differences: &'v [Difference],
}

impl<'v> View<'v> {
    fn of(manifest: &'v str, report: &Report, differences: &'v [Difference]) -> View<'v> {
        View {
            ok: differences.is_empty(),
            manifest,
            tensors: report.tensors,
            bytes: report.bytes,
            seconds: report.seconds,
            gb_per_s: report.gb_per_s,
            differences,
        }
    }
}
