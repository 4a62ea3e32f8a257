//! `--share node`: ranks of a node that read each byte once between them.

use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde::Serialize;
use tensorhaul::exchange::{Launched, launch};
use tensorhaul::parallel::{Ranks, Unfused};
use tensorhaul::share::{Carrier, NodeOptions, SharedReport, launched, node_device, node_exchange};
use tensorhaul::{DeviceId, LoadOptions, Model, OverRead, SharePromised};

use crate::arguments::Selection;
use crate::failure::{Failure, Outcome};
use crate::output::{bytes, count, grouped, print, print_json, printable, seconds};
use crate::ranks::Sharing;

/// Whether the ranks of a node share their reading, and by what.
#[derive(Args)]
#[command(next_help_heading = "Ranks")]
pub(crate) struct NodeSharing {
    /// Read each byte once for all ranks of the node, which exchange what is others'. Rank, size and rendezvous are the launcher's
    /// (torchrun, srun, mpirun), one process a rank; --tp-size is then all of them unless it says otherwise
    #[arg(long, value_name = "node", value_parser = ["node"], conflicts_with_all = ["tp_rank", "tp_devices", "pp_stage", "layers", "ep_rank", "device_map"])]
    share: Option<String>,

    /// What carries bytes between the ranks of --share: the devices' links (NCCL, RCCL), or the host's sockets [default: links;
    /// sockets for the host's memory]
    #[arg(long, value_name = "WHAT", requires = "share", value_parser = carriers())]
    share_by: Option<Carrier>,

    /// Seconds that a rank waits for the others of --share [default: 300]
    #[arg(long, value_name = "SECONDS", requires = "share", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    share_timeout: Option<u64>,
}

impl NodeSharing {
    pub(crate) fn is_asked(&self) -> bool {
        self.share.is_some()
    }
}

fn carriers() -> impl TypedValueParser<Value = Carrier> {
    PossibleValuesParser::new(["links", "sockets"]).try_map(|name| name.parse::<Carrier>())
}

/// Loads what this process's rank has, together with the node's other ranks; `complete` adds the command's own options.
pub(crate) fn load(
    model: &Model,
    selection: &Selection,
    complete: impl FnOnce(LoadOptions) -> LoadOptions,
) -> Result<(Ranks, SharedReport), Failure> {
    let Some(launched) = launched()? else {
        let what = format!(
            "--share node is for processes that a launcher has started, and none has set its variables: {}; plan --share node works \
             without",
            launch::LOOKED_FOR
        );
        return Err(Failure::of_request(&what));
    };
    let ranks = of_node(&selection.sharing, &launched)?;
    let own = ranks[launched.local_rank as usize].clone();
    let device = selection.device().unwrap_or_else(|| node_device(&launched));
    let options = complete(selection.options_on(model, true, device)?);
    let assemblies = model.assemblies(&options, ranks)?;
    // What all refuse is refused before anybody waits.
    model.plan_shared(&options, &assemblies)?;
    let NodeSharing { share_by, share_timeout, .. } = selection.node;
    let timeout = share_timeout.map(Duration::from_secs);
    let node = NodeOptions { carrier: share_by, timeout, ..NodeOptions::default() };
    let exchange = node_exchange(&launched, device, &node)?;
    let report = model.load_shared(&options, &assemblies, &*exchange)?.report;
    Ok((own, report))
}

/// Prints what every rank of the node would read, send and receive: the launcher's node, or one that has all ranks.
pub(crate) fn print_plan(model: &Model, selection: &Selection, as_json: bool) -> Outcome {
    let ranks = match launched()? {
        Some(launched) => of_node(&selection.sharing, &launched)?,
        None => selection.sharing.all_ranks()?,
    };
    // Which device it is does not matter to the plan, and none is asked for it.
    let options = selection.options_on(model, true, DeviceId::Host)?;
    let assemblies = model.assemblies(&options, ranks.iter().cloned())?;
    let share = model.plan_shared(&options, &assemblies)?;
    let of_rank = |(rank, ranks)| RankShare { ranks, promised: *share.promised(rank) };
    let ranks: Vec<_> = (0..).zip(ranks).map(of_rank).collect();
    let promised = share.plan().promised();
    if as_json {
        return print_json(&NodeShare {
            ranks,
            needed_bytes: promised.needed_bytes,
            read_bytes: promised.read_bytes,
            rounds: share.round_count(),
            over_reads: share.plan().over_reads(),
            unfused: share.plan().unfused(),
            unused_rules: share.plan().unused_rules(),
        });
    }
    let mut text = format!(
        "{:<28} {:>18} {:>18} {:>18} {:>18} {:>16} {:>16} {:>16}\n",
        "rank",
        "resident bytes",
        "read bytes",
        "sent bytes",
        "received bytes",
        "exchange bytes",
        "transient bytes",
        "carrier bytes"
    );
    for RankShare { ranks, promised } in &ranks {
        let _ = writeln!(
            text,
            "{:<28} {:>18} {:>18} {:>18} {:>18} {:>16} {:>16} {:>16}",
            ranks.to_string(),
            grouped(promised.target_bytes),
            grouped(promised.read_bytes),
            grouped(promised.sent_bytes),
            grouped(promised.received_bytes),
            grouped(promised.exchange_bytes()),
            grouped(promised.transient_bytes),
            grouped(promised.carrier_bytes)
        );
    }
    let over = promised.read_bytes as f64 / promised.needed_bytes.max(1) as f64;
    let _ = writeln!(
        text,
        "all read {} bytes for {} that are needed ({over:.4}x), in {}",
        grouped(promised.read_bytes),
        grouped(promised.needed_bytes),
        count(share.round_count() as u64, "round")
    );
    for sum in OverRead::sums(share.plan().over_reads()) {
        let _ = writeln!(text, "{}, because {}", printable(&sum.to_string()), sum.worst.reason);
    }
    for unfused in share.plan().unfused() {
        let _ = writeln!(text, "not fused: {}", printable(&unfused.to_string()));
    }
    for rule in share.plan().unused_rules() {
        let _ = writeln!(text, "not used: rule {rule:?}, which no tensor has");
    }
    print(text)
}

/// Prints what a rank did.
pub(crate) fn text(path: &str, ranks: &Ranks, report: &SharedReport) -> String {
    let mut text = String::new();
    let tensors = count(report.tensors, "tensor");
    let _ = writeln!(
        text,
        "{}: {tensors}, {} bytes on {}",
        printable(path),
        grouped(report.bytes),
        report.device
    );
    let _ = writeln!(text, "  rank      {} of {} on the node: {ranks}", report.rank, report.size);
    let _ = writeln!(text, "  time      {}, {:.2} GB/s", seconds(report.seconds), report.gb_per_s);
    let _ = writeln!(
        text,
        "  read      {} by {}, {} of all ranks",
        bytes(report.read_bytes),
        report.engine,
        bytes(report.read_bytes_of_all)
    );
    let _ = writeln!(
        text,
        "  exchange  sent {}, received {} in {} by {}",
        bytes(report.sent_bytes),
        bytes(report.received_bytes),
        count(report.rounds, "round"),
        printable(&report.exchange)
    );
    let carrier = match &*report.exchange {
        "sockets" => format!("; on the host at most {} for messages", bytes(report.carrier_bytes)),
        _ => String::new(),
    };
    let _ = writeln!(
        text,
        "  memory    staging {}; exchange {}, sources {} (free again){carrier}",
        bytes(report.peak_staging_bytes),
        bytes(report.exchange_bytes),
        bytes(report.transient_bytes)
    );
    for fallback in &report.fallbacks {
        let _ = writeln!(text, "  fallback  {}: {}", printable(&fallback.what), printable(&fallback.why));
    }
    text
}

/// What the ranks of a node would do.
#[derive(Serialize)]
struct NodeShare<'s> {
    ranks: Vec<RankShare>,
    needed_bytes: u64,
    read_bytes: u64,
    rounds: usize,
    over_reads: &'s [OverRead],
    unfused: &'s [Unfused],
    unused_rules: &'s [String],
}

/// What one of them would do.
#[derive(Serialize)]
struct RankShare {
    ranks: Ranks,
    promised: SharePromised,
}

/// Returns the ranks of this process's node. Launchers number them node by node.
fn of_node(sharing: &Sharing, launched: &Launched) -> Result<Vec<Ranks>, Failure> {
    let Launched { rank, size, local_rank, local_size, launcher, .. } = *launched;
    let mut all = sharing.of_job(size, launcher)?;
    let first = rank.checked_sub(local_rank).filter(|first| first + local_size <= size);
    let Some(first) = first else {
        let what = format!(
            "--share node: {launcher} says rank {rank} of {size}, and {local_rank} of {local_size} on the node; ranks of a node have to be \
             numbered one behind the other"
        );
        return Err(Failure::of_request(&what));
    };
    Ok(all.drain(first as usize..(first + local_size) as usize).collect())
}
