//! `tensorhaul plan`: what a load into memory of its own would do, without doing it.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use tensorhaul::parallel::RankPlan;
use tensorhaul::{LoadOptions, Model, OverRead};

use crate::arguments::Selection;
use crate::failure::Outcome;
use crate::output::{grouped, print, print_json, printable};
use crate::share;

/// Show every read, copy and byte of memory of a load, without reading
///
/// The plan is that of a load into memory of its own; a mapped load, the host's default, reads pages when
/// they are touched and has no schedule.
#[derive(Args)]
#[command(after_help = "Examples:
  tensorhaul plan examples/models/tiny-llama
  tensorhaul plan model --tensor 'model.layers.0.*' --staging 16MiB
  tensorhaul plan model-AWQ --dequantize bf16
  tensorhaul plan model --tp-size 8 --all-ranks
  tensorhaul plan model --tp-size 8 --share node
  tensorhaul plan model --tp-size 8 --tp-rank 3 --fuse --by-rule
  tensorhaul plan model --device-map auto --devices cuda:0,cuda:1
  tensorhaul plan model --json | jq .promised")]
pub(crate) struct PlanLoad {
    /// A .safetensors file, a folder, an index json, or an org/name in the Hugging Face cache
    path: PathBuf,

    #[command(flatten)]
    selection: Selection,

    /// Show instead what every rank of --tp-size, --pp-size and --ep-size would load, a line each
    #[arg(long, conflicts_with_all = ["tp_rank", "tp_devices", "pp_stage", "ep_rank", "share"])]
    all_ranks: bool,

    /// Show instead what the rank has of each tensor, and by which rule
    #[arg(long, conflicts_with_all = ["all_ranks", "tp_devices", "share"])]
    by_rule: bool,

    /// Print one JSON object: promised, over_reads, machine, files, arenas, operations, reads, tensors
    #[arg(long)]
    json: bool,
}

impl PlanLoad {
    pub(crate) fn run(&self) -> Outcome {
        let model = Model::open(&self.path)?;
        if self.selection.node.is_asked() {
            return share::print_plan(&model, &self.selection, self.json);
        }
        let options = self.selection.options_of(&model, self.all_ranks)?;
        if self.all_ranks {
            return self.all_ranks(&model, &options);
        }
        if self.by_rule {
            return self.by_rule(&model, &options);
        }
        let plan = model.plan_for_devices(&options)?;
        if self.json {
            return print_json(&plan);
        }
        let text = plan.to_string();
        // Line by line, because the ends of lines are control characters, too.
        text.lines().try_for_each(|line| print(format_args!("{}\n", printable(line))))
    }

    /// Prints what each rank would load.
    fn all_ranks(&self, model: &Model, options: &LoadOptions) -> Outcome {
        let plans = model.plan_ranks(options, self.selection.sharing.all_ranks()?)?;
        if self.json {
            return print_json(&plans);
        }
        let mut text = format!(
            "{:<28} {:>8} {:>20} {:>20} {:>10} {:>10} {:>16}\n",
            "rank", "tensors", "resident bytes", "read bytes", "over-read", "requests", "staging bytes"
        );
        let over = |read_bytes: u64, needed_bytes: u64| match needed_bytes {
            0 => "-".to_owned(),
            _ => format!("{:.3}x", read_bytes as f64 / needed_bytes as f64),
        };
        let (mut read_bytes, mut needed_bytes) = (0, 0);
        for RankPlan { ranks, tensors, promised, .. } in &plans {
            (read_bytes, needed_bytes) =
                (read_bytes + promised.read_bytes, needed_bytes + promised.needed_bytes);
            let _ = writeln!(
                text,
                "{:<28} {tensors:>8} {:>20} {:>20} {:>10} {:>10} {:>16}",
                ranks.to_string(),
                grouped(promised.target_bytes),
                grouped(promised.read_bytes),
                over(promised.read_bytes, promised.needed_bytes),
                grouped(promised.reads),
                grouped(promised.peak_staging_bytes)
            );
        }
        let over_read = over(read_bytes, needed_bytes);
        let _ =
            writeln!(text, "{:<28} {:>8} {:>20} {:>20} {over_read:>10}", "all", "", "", grouped(read_bytes));
        let over_bytes = |plan: &&RankPlan| plan.over_reads.iter().map(|over| over.over_bytes).sum::<u64>();
        let worst = plans.iter().max_by_key(over_bytes);
        for (ranks, sum) in worst
            .iter()
            .flat_map(|plan| OverRead::sums(&plan.over_reads).into_iter().map(|sum| (&plan.ranks, sum)))
        {
            let _ = writeln!(text, "{ranks}: {}, because {}", printable(&sum.to_string()), sum.worst.reason);
        }
        if let Some(plan) = plans.first() {
            for unfused in &plan.unfused {
                let _ = writeln!(text, "not fused: {}", printable(&unfused.to_string()));
            }
            for rule in &plan.unused_rules {
                let _ = writeln!(text, "not used: rule {rule:?}, which no tensor has");
            }
        }
        print(text)
    }

    /// Prints what a rank has of each tensor.
    fn by_rule(&self, model: &Model, options: &LoadOptions) -> Outcome {
        let ranks = self.selection.sharing.rank();
        let summary = model.describe_rank(options, &ranks)?;
        if self.json {
            return print_json(&summary);
        }
        let text = summary.to_string();
        text.lines().try_for_each(|line| print(format_args!("{}\n", printable(line))))
    }
}
