//! `--share node`: processes as a launcher starts them, over the host's sockets.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use serde_json::Value;
use tensorhaul::exchange::{Control, Exchange, Launched, Rendezvous};
use tensorhaul::parallel::{Parallel, Ranks, Unmatched};
use tensorhaul::share::{NodeOptions, node_exchange};
use tensorhaul::{Dequantization, DeviceId, Dtype, Handover, LoadOptions, Model, Progress, Request};

use crate::simulated::simulator;
use crate::{Ran, command, tensorhaul, tiny_llama};

/// What tiny-llama has besides a Llama's tensors, every rank has whole.
const LOAD: [&str; 8] = ["load", "", "--device", "host", "--unmatched", "replicate", "--share", "node"];

/// A rank as torchrun starts it.
fn rank(rank: u32, size: u32, folder: &Path, more: &[&str]) -> Command {
    let mut command = command(LOAD.map(|arg| if arg.is_empty() { tiny_llama() } else { arg }));
    command.args(more);
    as_torchrun(&mut command, rank, size, folder);
    command
}

fn as_torchrun(command: &mut Command, rank: u32, size: u32, folder: &Path) {
    command.env("TENSORHAUL_RENDEZVOUS", folder.join("ranks.sock"));
    let (rank, size) = (rank.to_string(), size.to_string());
    let own = [("RANK", &rank), ("LOCAL_RANK", &rank), ("WORLD_SIZE", &size), ("LOCAL_WORLD_SIZE", &size)];
    command.envs(own).stdout(Stdio::piped()).stderr(Stdio::piped());
}

/// The same rank, as this test is it.
fn launched(rank: u32, size: u32) -> Launched {
    let job = "torchrun".to_owned();
    Launched { rank, size, local_rank: rank, local_size: size, job, launcher: "the test" }
}

/// Loads as one rank of the command's others, and compares its tensors with those of a load of its own.
fn load_beside(rank: u32, size: u32, folder: &Path, dequantization: Option<Dequantization>) {
    let model = Model::open(tiny_llama()).unwrap();
    let mut request = Request::all();
    request.device = DeviceId::Host;
    let mut options = LoadOptions::default().request(request).staging_bytes(64 << 10);
    if let Some(dequantization) = dequantization {
        options = options.dequantize(dequantization);
    }
    let of = |ranks| Parallel::rank(ranks).unmatched(Unmatched::Replicate);
    let shared = options.clone().parallel(of(Ranks::alone()));
    let ranks = model.assemblies(&shared, Ranks::all(size, 1, 1)).unwrap();
    let exchange = meet(rank, size, folder);
    let loaded = model.load_shared(&shared, &ranks, &*exchange).unwrap();
    assert!(loaded.report.received_bytes > 0);
    let alone = options.handover(Handover::Private).parallel(of(Ranks::alone().tp(rank, size)));
    let alone = model.load(&alone).unwrap().tensors;
    assert_eq!(loaded.tensors.len(), alone.len());
    for (name, tensor) in loaded.tensors.iter() {
        let expected = alone.get(name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (expected.dtype(), expected.shape()), "{name}");
        assert!(tensor.bytes().unwrap() == expected.bytes().unwrap(), "{name} on rank {rank}");
    }
}

fn meet(rank: u32, size: u32, folder: &Path) -> Box<dyn Exchange> {
    let (path, timeout) = (Some(folder.join("ranks.sock")), Some(Duration::from_secs(60)));
    let node = NodeOptions { path, timeout, ..NodeOptions::default() };
    node_exchange(&launched(rank, size), DeviceId::Host, &node).unwrap()
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
        assert!(text.contains("on the host at most ") && text.contains(" for messages"), "{text}");
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
    let rendezvous = Rendezvous { path: folder.path().join("ranks.sock"), timeout: Duration::from_secs(20) };
    // It comes, and goes without a word of what it would have loaded.
    drop(Control::meet(&launched(3, 4), rendezvous).unwrap());
    for child in started {
        let line = end(child).error(3);
        assert!(line.contains("rank 3 of the node failed or ended"), "{line}");
    }
}

/// What the command's ranks send is compared where it arrives: on a rank that this test is.
#[test]
fn what_processes_read_for_others_is_what_the_files_hold() {
    for (own, more, dequantization) in [
        (0, &["--staging", "64KiB"][..], None),
        (2, &["--staging", "64KiB"], None),
        (1, &["--staging", "64KiB", "--dequantize", "bf16"], Some(Dequantization::to(Dtype::Bf16))),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let others = (0..4).filter(|number| *number != own);
        let others: Vec<_> = others.map(|number| start(rank(number, 4, folder.path(), more))).collect();
        load_beside(own, 4, folder.path(), dequantization);
        for other in others {
            end(other).ok();
        }
    }
}

#[test]
fn a_process_that_is_killed_while_all_read_is_named_by_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let start = |number| start(rank(number, 4, folder.path(), &["--staging", "64KiB"]));
    let (started, victim) = ([0, 2].map(start), start(3));
    let model = Model::open(tiny_llama()).unwrap();
    // At this rank's first read all have agreed, and none can end: what it reads is missing.
    let victim = Mutex::new(Some(victim));
    let kill = move |_: Progress| {
        if let Some(mut victim) = victim.lock().unwrap().take() {
            victim.kill().unwrap();
            victim.wait().unwrap();
        }
    };
    let mut request = Request::all();
    request.device = DeviceId::Host;
    let parallel = Parallel::rank(Ranks::alone()).unmatched(Unmatched::Replicate);
    let options = LoadOptions::default().request(request).staging_bytes(64 << 10);
    let options = options.parallel(parallel).on_progress(kill);
    let ranks = model.assemblies(&options, Ranks::all(4, 1, 1)).unwrap();
    let exchange = meet(1, 4, folder.path());
    let error = model.load_shared(&options, &ranks, &*exchange).unwrap_err().one_line();
    assert!(error.contains("rank 3 of the node failed or ended"), "{error}");
    for child in started {
        let line = end(child).error(3);
        assert!(line.contains("rank 3 of the node failed or ended"), "{line}");
    }
}

#[test]
fn a_plan_of_a_node_tells_what_is_not_fused_and_what_a_carrier_holds() {
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules.json");
    let odd = r#"{"extends":"LlamaForCausalLM","rules":{},"fuse":[
        {"name":"odd","target":"layers.*.mlp.odd","rows":["layers.*.mlp.up_proj","layers.*.mlp.down_proj"]}]}"#;
    std::fs::write(&rules, odd).unwrap();
    let plan = |more: &[&str]| {
        let plan = ["plan", tiny_llama(), "--tp-size", "2", "--unmatched", "replicate", "--fuse", "--rules"];
        tensorhaul(plan.into_iter().chain([rules.to_str().unwrap()]).chain(more.iter().copied()))
    };
    let shown = plan(&["--share", "node"]).ok();
    let alone = plan(&["--all-ranks"]).ok();
    let not_fused =
        |text: &str| text.lines().find(|line| line.starts_with("not fused: ")).unwrap().to_owned();
    assert_eq!(not_fused(&shown), not_fused(&alone));
    assert!(shown.lines().next().unwrap().ends_with("carrier bytes"), "{shown}");
    let value = plan(&["--share", "node", "--json"]).json();
    assert_eq!(value["unfused"], plan(&["--tp-rank", "0", "--json"]).json()["unfused"]);
    assert!(value["unfused"].to_string().contains("\"odd\""), "{value}");
    let promised = &value["ranks"][0]["promised"];
    let both_ways = number(promised, "sent_bytes") + number(promised, "received_bytes");
    assert!((1..=both_ways).contains(&number(promised, "carrier_bytes")), "{promised}");
}

#[test]
fn a_plan_of_a_node_tells_what_is_read_beyond_the_bound() {
    let plan = |more: &[&str]| {
        let plan = ["plan", tiny_llama(), "--tp-size", "2", "--unmatched", "replicate", "--share", "node"];
        tensorhaul(plan.into_iter().chain(more.iter().copied()))
    };
    // Shared reads are whole blocks of 4096 bytes, which the two files do not begin with.
    let line = "bytes are read in vain for 2 tensors, most for \"model.layers.0.input_layernorm.weight\", because direct reads are \
                whole blocks of 4096 bytes";
    assert!(!plan(&[]).ok().contains("in vain"));
    let shown = plan(&["--over-read-max", "1"]).ok();
    assert!(shown.contains(line), "{shown}");
    let value = plan(&["--over-read-max", "1", "--json"]).json();
    assert_eq!(value["over_reads"][0]["reason"], "alignment", "{value}");
}

#[test]
fn a_rank_takes_the_only_gpu_that_it_is_shown() {
    for (devices, expected) in [("devices=1", ["cuda:0", "cuda:0"]), ("devices=2", ["cuda:0", "cuda:1"])] {
        let folder = tempfile::tempdir().unwrap();
        let started = [0, 1].map(|number| {
            let mut command =
                command(["load", tiny_llama(), "--unmatched", "replicate", "--share", "node", "--json"]);
            as_torchrun(&mut command, number, 2, folder.path());
            for variable in ["CUDA", "HIP"] {
                command.env(format!("TENSORHAUL_{variable}_LIBRARY"), simulator());
            }
            command.args(["--share-by", "sockets"]).env("SIMGPU", devices);
            start(command)
        });
        let on: Vec<_> = started.map(|child| end(child).json()["device"].clone()).into_iter().collect();
        assert_eq!(on, expected, "{devices}");
    }
}
