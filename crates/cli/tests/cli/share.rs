//! `--share node`: processes as a launcher starts them, over the host's sockets.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tensorhaul::exchange::{Control, Launched, Rendezvous};

use crate::{Ran, command, tensorhaul, tiny_llama};

/// What tiny-llama has besides a Llama's tensors, every rank has whole.
const LOAD: [&str; 8] = ["load", "", "--device", "host", "--unmatched", "replicate", "--share", "node"];

/// A rank as torchrun starts it.
fn rank(rank: u32, size: u32, folder: &Path, more: &[&str]) -> Command {
    let mut command = command(LOAD.map(|arg| if arg.is_empty() { tiny_llama() } else { arg }));
    command.args(more).env("TENSORHAUL_RENDEZVOUS", folder.join("ranks.sock"));
    let (rank, size) = (rank.to_string(), size.to_string());
    let own = [("RANK", &rank), ("LOCAL_RANK", &rank), ("WORLD_SIZE", &size), ("LOCAL_WORLD_SIZE", &size)];
    command.envs(own).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn start(mut command: Command) -> Child {
    command.spawn().expect("the command starts")
}

fn end(child: Child) -> Ran {
    Ran::new(child.wait_with_output().expect("the command ends"))
}

/// Runs every rank, each with arguments of its own.
fn on_all(size: u32, more: impl Fn(u32) -> Vec<&'static str>) -> Vec<Ran> {
    let folder = tempfile::tempdir().unwrap();
    let started: Vec<_> =
        (0..size).map(|number| start(rank(number, size, folder.path(), &more(number)))).collect();
    started.into_iter().map(end).collect()
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} is a number: {value}"))
}

#[test]
fn processes_of_a_node_read_each_byte_once_between_them() {
    for more in
        [&["--json"][..], &["--json", "--dequantize", "bf16"], &["--json", "--pp-size", "2", "--fuse"]]
    {
        let reports: Vec<_> = on_all(4, |_| more.to_vec()).into_iter().map(Ran::json).collect();
        let sum = |key: &str| reports.iter().map(|report| number(report, key)).sum::<u64>();
        assert_eq!(sum("read_bytes"), number(&reports[0], "read_bytes_of_all"), "{more:?}");
        assert_eq!(sum("sent_bytes"), sum("received_bytes"));
        assert!(sum("received_bytes") > 0);
        assert_eq!(sum("operations") > 0, more.contains(&"--dequantize"));
        for (rank, report) in reports.iter().enumerate() {
            assert_eq!((number(report, "rank"), number(report, "size")), (rank as u64, 4));
            assert_eq!(report["exchange"], "sockets");
            assert_eq!(number(report, "read_bytes"), number(&report["promised"], "read_bytes"));
        }
    }
}

#[test]
fn a_rank_tells_what_it_read_sent_and_received() {
    let texts: Vec<_> = on_all(2, |_| Vec::new()).into_iter().map(Ran::ok).collect();
    for (rank, text) in texts.iter().enumerate() {
        assert!(
            text.contains(&format!("rank      {rank} of 2 on the node: tp {rank}/2, pp 0/1, ep 0/1")),
            "{text}"
        );
        assert!(text.contains("exchange  sent ") && text.contains("by sockets"), "{text}");
        assert!(text.contains("read      ") && text.contains("of all ranks"), "{text}");
    }
}

#[test]
fn a_plan_of_a_node_needs_no_launcher() {
    let plan = ["plan", tiny_llama(), "--tp-size", "8", "--unmatched", "replicate", "--share", "node"];
    let text = tensorhaul(plan).ok();
    assert_eq!(text.lines().count(), 10, "{text}");
    assert!(text.lines().nth(3).unwrap().starts_with("tp 2/8, pp 0/1, ep 0/1"), "{text}");
    assert!(text.lines().last().unwrap().starts_with("all read "), "{text}");
    let value = tensorhaul(plan.into_iter().chain(["--json"])).json();
    assert_eq!(value["ranks"].as_array().unwrap().len(), 8);
    assert!(number(&value, "read_bytes") >= number(&value, "needed_bytes"));
    assert!(number(&value["ranks"][7]["promised"], "received_bytes") > 0);
}

#[test]
fn without_a_launcher_the_variables_looked_for_are_told() {
    let load = ["load", tiny_llama(), "--device", "host", "--share", "node"];
    let line = tensorhaul(load).error(2);
    for variable in ["LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK"] {
        assert!(line.contains(variable), "{line}");
    }
    let mut half = command(load);
    half.env("LOCAL_RANK", "0").env("RANK", "0");
    let line = Ran::new(half.output().unwrap()).error(2);
    assert!(line.contains("torchrun") && line.contains("WORLD_SIZE, LOCAL_WORLD_SIZE is not set"), "{line}");
    let folder = tempfile::tempdir().unwrap();
    let line = end(start(rank(0, 4, folder.path(), &["--tp-size", "3"]))).error(2);
    assert!(line.contains("tp 3, pp 1 and ep 1 make 3 ranks, and torchrun has started 4"), "{line}");
    let line = tensorhaul(load.into_iter().chain(["--tp-size", "2", "--tp-rank", "0"])).error(2);
    assert!(line.contains("cannot be used with"), "{line}");
}

#[test]
fn ranks_that_differ_are_told_in_what() {
    let lines: Vec<_> = on_all(4, |rank| if rank == 2 { vec!["--staging", "1MiB"] } else { vec![] })
        .into_iter()
        .map(|ran| ran.error(2))
        .collect();
    for line in lines {
        assert!(line.contains("rank 2 of the node has staging memory of another size"), "{line}");
    }
}

#[test]
fn a_rank_that_never_comes_is_named_after_the_time_given() {
    let folder = tempfile::tempdir().unwrap();
    let line = end(start(rank(0, 4, folder.path(), &["--share-timeout", "1"]))).error(3);
    assert!(line.contains("ranks 1, 2, 3 of the node did not come within 1 s"), "{line}");
}

#[test]
fn a_rank_that_dies_on_the_way_is_named_by_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let started: Vec<_> = (0..3).map(|number| start(rank(number, 4, folder.path(), &[]))).collect();
    let launched = Launched {
        rank: 3,
        size: 4,
        local_rank: 3,
        local_size: 4,
        job: "torchrun".to_owned(),
        launcher: "the test",
    };
    let rendezvous = Rendezvous { path: folder.path().join("ranks.sock"), timeout: Duration::from_secs(20) };
    // It comes, and goes without a word of what it would have loaded.
    drop(Control::meet(&launched, rendezvous).unwrap());
    for child in started {
        let line = end(child).error(3);
        assert!(line.contains("rank 3 of the node failed or ended"), "{line}");
    }
}
