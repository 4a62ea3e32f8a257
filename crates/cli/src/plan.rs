//! `tensorhaul plan`: what a load into memory of its own would do, without doing it.

use std::path::PathBuf;

use clap::Args;
use tensorhaul::Model;

use crate::arguments::Selection;
use crate::failure::Outcome;
use crate::output::{print, print_json, printable};

/// Show every read, copy and byte of memory of a load, without reading
///
/// The plan is that of a load into memory of its own; a mapped load, the host's default, reads pages when
/// they are touched and has no schedule.
#[derive(Args)]
#[command(after_help = "Examples:
  tensorhaul plan examples/models/tiny-llama
  tensorhaul plan model --tensor 'model.layers.0.*' --staging 16MiB
  tensorhaul plan model-AWQ --dequantize bf16
  tensorhaul plan model --device-map auto --devices cuda:0,cuda:1
  tensorhaul plan model --json | jq .promised")]
pub(crate) struct PlanLoad {
    /// A .safetensors file, a folder, an index json, or an org/name in the Hugging Face cache
    path: PathBuf,

    #[command(flatten)]
    selection: Selection,

    /// Print one JSON object: promised, machine, files, arenas, operations, reads, tensors
    #[arg(long)]
    json: bool,
}

impl PlanLoad {
    pub(crate) fn run(&self) -> Outcome {
        let model = Model::open(&self.path)?;
        let plan = model.plan(&self.selection.options(&model)?)?;
        if self.json {
            return print_json(&plan);
        }
        let text = plan.to_string();
        // Line by line, because the ends of lines are control characters, too.
        text.lines().try_for_each(|line| print(format_args!("{}\n", printable(line))))
    }
}
