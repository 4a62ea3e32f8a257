//! Arguments that say whose part of a model is meant.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use tensorhaul::DeviceId;
use tensorhaul::parallel::{Fuse, Parallel, Ranks, Rules, Unmatched};

use crate::failure::Failure;
use crate::output::printable;

/// Whose part of a model is meant, and how models are cut.
#[derive(Args)]
#[command(next_help_heading = "Ranks")]
pub(crate) struct Sharing {
    /// Which of --tp-size equal shares of each matrix, from 0
    #[arg(long, value_name = "RANK", requires = "tp_size")]
    tp_rank: Option<u32>,

    /// Ranks that share each matrix (tensor parallelism)
    #[arg(long, value_name = "RANKS", value_parser = sizes())]
    tp_size: Option<u32>,

    /// Load every tensor-parallel rank in this process, one on each of these devices
    #[arg(long, value_name = "DEVICES", value_delimiter = ',', conflicts_with_all = ["tp_rank", "tp_size"])]
    tp_devices: Vec<DeviceId>,

    /// Which of --pp-size stages of layers, from 0
    #[arg(long, value_name = "STAGE", requires = "pp_size")]
    pp_stage: Option<u32>,

    /// Stages that the layers are shared out to (pipeline parallelism)
    #[arg(long, value_name = "STAGES", value_parser = sizes())]
    pp_size: Option<u32>,

    /// These layers instead of a stage's, such as 0..16
    #[arg(long, value_name = "FIRST..END", value_parser = parse_layers, conflicts_with_all = ["pp_stage", "pp_size"])]
    layers: Option<Range<u64>>,

    /// Which of --ep-size equal shares of the experts, from 0
    #[arg(long, value_name = "RANK", requires = "ep_size")]
    ep_rank: Option<u32>,

    /// Ranks that share the experts (expert parallelism)
    #[arg(long, value_name = "RANKS", value_parser = sizes())]
    ep_size: Option<u32>,

    /// Keep each expert in one piece, though --tp-size cuts everything else
    #[arg(long)]
    whole_experts: bool,

    /// Cut by the rules in this JSON file: a table like the built-in ones, or a plan in the words of Hugging Face transformers
    /// [default: the rules of the architecture in config.json]
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,

    /// What becomes of a tensor that no rule names
    #[arg(long, value_name = "WHAT", value_parser = unmatched())]
    unmatched: Option<Unmatched>,

    /// Make these tensors one, such as --fuse=qkv,gate_up; alone, all that the rules have and the model allows
    #[arg(long, value_name = "NAMES", value_delimiter = ',', num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    fuse: Option<Vec<String>>,
}

impl Sharing {
    /// Returns what to load of the model; `None` for all of it, under its own names. `is_of_all`: whose part it is does not matter.
    pub(crate) fn parallel(&self, is_of_all: bool) -> Result<Option<Parallel>, Failure> {
        let is_asked = self.tp_size.is_some()
            || !self.tp_devices.is_empty()
            || self.pp_size.is_some()
            || self.layers.is_some()
            || self.ep_size.is_some()
            || self.rules.is_some()
            || self.unmatched.is_some()
            || self.whole_experts
            || self.fuse.is_some();
        if !is_asked {
            return Ok(None);
        }
        let ranks = [("tp", self.tp_size, self.tp_rank), ("ep", self.ep_size, self.ep_rank)];
        let stage = [("pp", self.pp_size, self.pp_stage)];
        if let Some((kind, size, _)) = ranks
            .into_iter()
            .chain(stage)
            .find(|(_, size, rank)| !is_of_all && rank.is_none() && size.is_some_and(|size| size > 1))
        {
            let rank = if kind == "pp" { "stage" } else { "rank" };
            let size = size.unwrap_or(1);
            let what =
                format!("--{kind}-size {size} needs --{kind}-{rank}: which of them, from 0 to {}", size - 1);
            return Err(Failure::of_request(&what));
        }
        let mut parallel = if self.tp_devices.is_empty() {
            Parallel::rank(self.rank())
        } else {
            let size = self.tp_devices.len() as u32; // Typed by hand.
            let of_device = |(rank, device)| (self.of_tp(rank, size), device);
            Parallel::on_devices((0..size).zip(self.tp_devices.iter().copied()).map(of_device))
        };
        if let Some(path) = &self.rules {
            parallel = parallel.rules(read_rules(path)?);
        }
        if let Some(unmatched) = self.unmatched {
            parallel = parallel.unmatched(unmatched);
        }
        let fuse = match self.fuse.as_deref() {
            None => Fuse::No,
            Some(names) if names.iter().any(|name| name == "all") || names.is_empty() => Fuse::All,
            Some(names) => Fuse::Only(names.to_vec()),
        };
        Ok(Some(parallel.fuse(fuse)))
    }

    /// Returns the ranks of a job of so many processes, in the launcher's order: those of all sizes given, tensor-parallel ones innermost.
    /// Where their number is not given, they are as many as the job has for them.
    pub(crate) fn of_job(&self, size: u32, launcher: &str) -> Result<Vec<Ranks>, Failure> {
        let (pp_size, ep_size) = (self.pp_size.unwrap_or(1), self.ep_size.unwrap_or(1));
        let of_others = pp_size * if self.whole_experts { 1 } else { ep_size };
        let tp_size = self.tp_size.unwrap_or(size / of_others).max(1);
        let group = self.rank().tp(0, tp_size).group();
        let group = group.map_err(|error| Failure::of_request(&error.to_string()))?;
        if group.len() == size as usize {
            return Ok(group);
        }
        let what = format!(
            "--share: tp {tp_size}, pp {pp_size} and ep {ep_size}{} make {} ranks, and {launcher} has started {size}",
            if self.whole_experts { " of whole experts" } else { "" },
            group.len()
        );
        Err(Failure::of_request(&what))
    }

    /// Returns every rank of the sizes given.
    pub(crate) fn all_ranks(&self) -> Result<Vec<Ranks>, Failure> {
        self.rank().group().map_err(|error| Failure::of_request(&error.to_string()))
    }

    /// Returns the one rank that is meant.
    pub(crate) fn rank(&self) -> Ranks {
        self.of_tp(self.tp_rank.unwrap_or(0), self.tp_size.unwrap_or(1))
    }

    fn of_tp(&self, rank: u32, size: u32) -> Ranks {
        let mut ranks = Ranks::alone().tp(rank, size);
        ranks = match (&self.layers, self.pp_size) {
            (Some(layers), _) => ranks.layers(layers.clone()),
            (None, Some(size)) => ranks.pp(self.pp_stage.unwrap_or(0), size),
            (None, None) => ranks,
        };
        if let Some(size) = self.ep_size {
            ranks = ranks.ep(self.ep_rank.unwrap_or(0), size);
        }
        if self.whole_experts { ranks.whole_experts() } else { ranks }
    }
}

fn read_rules(path: &Path) -> Result<Rules, Failure> {
    let failed = |error: &dyn std::fmt::Display| {
        Failure::of_input(format!("{}: {error}", printable(&path.to_string_lossy())))
    };
    let text = fs::read_to_string(path).map_err(|error| failed(&error))?;
    Rules::parse(&text).map_err(|error| failed(&error))
}

/// Groups larger than this are slips of the keyboard.
fn sizes() -> impl TypedValueParser<Value = u32> {
    clap::value_parser!(u32).range(1..=4096)
}

/// Reads `FIRST..END`.
fn parse_layers(text: &str) -> Result<Range<u64>, String> {
    let range = text.split_once("..").and_then(|(first, end)| Some(first.parse().ok()?..end.parse().ok()?));
    range.ok_or_else(|| "give the first layer and the one behind the last: 0..16".to_owned())
}

fn unmatched() -> impl TypedValueParser<Value = Unmatched> {
    PossibleValuesParser::new(["refuse", "replicate"]).map(|name| match name.as_str() {
        "replicate" => Unmatched::Replicate,
        _ => Unmatched::Refuse,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Alone {
        #[command(flatten)]
        sharing: Sharing,
    }

    fn of_job(args: &[&str], size: u32) -> Result<Vec<String>, Failure> {
        let args = [""].iter().chain(args);
        let ranks = <Alone as clap::Parser>::parse_from(args).sharing.of_job(size, "the test")?;
        Ok(ranks.iter().map(Ranks::to_string).collect())
    }

    #[test]
    fn a_job_has_as_many_ranks_as_the_sizes_make() {
        assert_eq!(of_job(&[], 2).unwrap(), ["tp 0/2, pp 0/1, ep 0/1", "tp 1/2, pp 0/1, ep 0/1"]);
        let staged = of_job(&["--pp-size", "2"], 4).unwrap();
        assert_eq!(staged[2..], ["tp 0/2, pp 1/2, ep 0/1", "tp 1/2, pp 1/2, ep 0/1"]);
        let experts = of_job(&["--tp-size", "2", "--ep-size", "2", "--whole-experts"], 2).unwrap();
        assert_eq!(experts[1], "tp 1/2, pp 0/1, ep 1/2, whole experts");
        assert_eq!(of_job(&["--tp-size", "2", "--ep-size", "2"], 4).unwrap().len(), 4);
        for args in [&["--tp-size", "3"][..], &["--tp-size", "2", "--ep-size", "4"], &["--pp-size", "3"]] {
            assert!(of_job(args, 4).is_err(), "{args:?}");
        }
        // Each would have one part of one half of the experts.
        assert!(of_job(&["--tp-size", "2", "--ep-size", "2"], 2).is_err());
    }

    #[test]
    fn layers_are_read_as_a_range() {
        assert_eq!(parse_layers("0..16"), Ok(0..16));
        for text in ["", "3", "a..b", "1.."] {
            assert!(parse_layers(text).is_err(), "{text}");
        }
    }
}
