//! `tensorhaul inspect`: what a checkpoint holds, from its headers alone.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::ser::SerializeSeq;
use serde::{Serialize, Serializer};
use tensorhaul::{Model, TensorRef};

use crate::failure::Outcome;
use crate::output::{bytes, count, grouped, print, print_json, printable};
use crate::quantized::{self, Quantized};

/// Show the tensors of a checkpoint: names, dtypes, shapes, files, metadata
///
/// Reads the headers, the configuration and the few bytes that describe quantized tensors, however large the checkpoint is.
#[derive(Args)]
#[command(after_help = "Examples:
  tensorhaul inspect examples/models/tiny-llama
  tensorhaul inspect model.safetensors
  tensorhaul inspect org/name --json | jq -r '.tensors[] | select(.dtype == \"F32\") | .name'")]
pub(crate) struct Inspect {
    /// A .safetensors file, a folder, an index json, or an org/name in the Hugging Face cache
    path: PathBuf,

    /// Print one JSON object: files, tensors, metadata, totals, quantization, file_details
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(crate) fn run(&self) -> Outcome {
        let model = Model::open(&self.path)?;
        if self.json { print_json(&View::of(&model)) } else { print(text(&model)) }
    }
}

fn text(model: &Model) -> String {
    let files = model.checkpoint().files();
    let mut table = Table::new();
    // Wrapping would break names in two, and scripts cut columns at spaces.
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    let quantized = Quantized::of(model);
    let mut header = vec!["name", "dtype", "shape", "bytes", "file"];
    if !quantized.is_plain() {
        header.push("quantization");
    }
    table.set_header(header);
    for TensorRef { id, info, file, .. } in model.checkpoint().tensors() {
        let (dtype, shape) = (info.dtype.to_string(), format!("{:?}", info.shape));
        let (name, file) = (printable(info.name), printable(files[file as usize].name()));
        let mut row = vec![name.into_owned(), dtype, shape, grouped(info.len_bytes()), file.into_owned()];
        if !quantized.is_plain() {
            row.push(quantized.describe(id));
        }
        table.add_row(row);
    }
    if let Some(column) = table.column_mut(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim());
        text.push('\n');
    }
    let totals = Totals::of(model);
    let _ = writeln!(
        text,
        "\n{} in {}, {} bytes ({})",
        count(totals.tensors, "tensor"),
        count(files.len() as u64, "file"),
        grouped(totals.bytes),
        bytes(totals.bytes)
    );
    for (dtype, total) in &totals.by_dtype {
        let _ = writeln!(
            text,
            "  {dtype:<10} {:>15}  {:>19} bytes",
            count(total.tensors, "tensor"),
            grouped(total.bytes)
        );
    }
    text.push_str(&quantized.summary());
    for (key, value) in metadata(model) {
        let _ = writeln!(text, "metadata {} = {}", printable(key), printable(value));
    }
    text
}

/// The JSON of a checkpoint.
#[derive(Serialize)]
struct View<'m> {
    /// Names, in table order.
    files: Vec<&'m str>,
    tensors: Tensors<'m>,
    /// Of all files; where two have a key, the first counts.
    metadata: BTreeMap<&'m str, &'m str>,
    totals: Totals,
    quantization: quantized::View,
    file_details: Vec<FileView<'m>>,
}

impl<'m> View<'m> {
    fn of(model: &'m Model) -> View<'m> {
        let files = model.checkpoint().files();
        let details = files.iter().map(|file| FileView {
            name: file.name(),
            bytes: file.len_bytes(),
            data_start: file.header().data_start_bytes(),
            tensors: file.header().len(),
            metadata: file.header().metadata(),
        });
        View {
            files: files.iter().map(|file| file.name()).collect(),
            tensors: Tensors(model),
            metadata: metadata(model),
            totals: Totals::of(model),
            quantization: Quantized::of(model).view(model),
            file_details: details.collect(),
        }
    }
}

#[derive(Serialize)]
struct FileView<'m> {
    name: &'m str,
    /// Of the whole file.
    bytes: u64,
    /// Where `data_offsets` count from.
    data_start: u64,
    tensors: usize,
    metadata: &'m BTreeMap<String, String>,
}

/// Written one by one: a checkpoint may have a million.
struct Tensors<'m>(&'m Model);

impl Serialize for Tensors<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct TensorView<'m> {
            name: &'m str,
            dtype: &'m str,
            shape: &'m [u64],
            file: &'m str,
            data_offsets: (u64, u64),
            bytes: u64,
        }
        let checkpoint = self.0.checkpoint();
        let mut list = serializer.serialize_seq(Some(checkpoint.len()))?;
        for TensorRef { info, file, .. } in checkpoint.tensors() {
            list.serialize_element(&TensorView {
                name: info.name,
                dtype: info.dtype.name(),
                shape: info.shape,
                file: checkpoint.files()[file as usize].name(),
                data_offsets: info.data_offsets,
                bytes: info.len_bytes(),
            })?;
        }
        list.end()
    }
}

#[derive(Default, Serialize)]
struct Totals {
    tensors: u64,
    bytes: u64,
    by_dtype: BTreeMap<&'static str, Total>,
}

#[derive(Default, Serialize)]
struct Total {
    tensors: u64,
    bytes: u64,
}

impl Totals {
    fn of(model: &Model) -> Totals {
        let mut totals = Totals::default();
        for TensorRef { info, .. } in model.checkpoint().tensors() {
            let total = totals.by_dtype.entry(info.dtype.name()).or_default();
            total.tensors += 1;
            total.bytes += info.len_bytes();
            totals.tensors += 1;
            totals.bytes += info.len_bytes();
        }
        totals
    }
}

fn metadata(model: &Model) -> BTreeMap<&str, &str> {
    let files = model.checkpoint().files().iter().rev();
    let pairs = files.flat_map(|file| file.header().metadata());
    pairs.map(|(key, value)| (key.as_str(), value.as_str())).collect()
}
