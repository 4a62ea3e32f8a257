//! Ranks of a node that share their reading, each with a simulated device, connected by the simulated communication library.

#[path = "../../../tensorhaul/tests/share/llama.rs"]
pub(crate) mod llama;

use std::path::Path;
use std::thread;
use std::time::Duration;

use tensorhaul::exchange::{Control, Launched, Rendezvous};
use tensorhaul::share::{NodeOptions, SharedLoaded, node_exchange};
use tensorhaul::{Assembly, Error, ErrorKind, LoadOptions, Model, Request};
use tensorhaul_device::Device;

use crate::suite::load::read_back;
use crate::suite::sim::Sim;
use crate::vendor;
use llama::{assemblies, expected, files};

fn model(folder: &Path) -> Model {
    for (name, bytes) in files() {
        std::fs::write(folder.join(name), &bytes).unwrap();
    }
    Model::open(folder).unwrap()
}

fn options(rank: u32) -> LoadOptions {
    let mut request = Request::all();
    request.device = vendor::id(rank);
    LoadOptions::default().request(request).staging_bytes(512 << 10)
}

/// What a launcher would have told the rank of a node.
fn launched(rank: u32, size: u32) -> Launched {
    let job = "a-job".to_owned();
    Launched { rank, size, local_rank: rank, local_size: size, job, launcher: "the test" }
}

fn node(folder: &Path) -> NodeOptions {
    let (path, timeout) = (Some(folder.join("ranks.sock")), Some(Duration::from_secs(20)));
    NodeOptions { path, timeout, ..NodeOptions::default() }
}

/// Connects all ranks and loads on them at once, each on a thread as another process would.
fn load_on_all(folder: &Path, model: &Model, ranks: &[Assembly]) -> Vec<Result<SharedLoaded, Error>> {
    let size = ranks.len() as u32;
    thread::scope(|scope| {
        let start = |rank| {
            scope.spawn(move || {
                let exchange = node_exchange(&launched(rank, size), vendor::id(rank), &node(folder))?;
                let loaded = model.load_shared(&options(rank), ranks, &*exchange)?;
                assert_eq!((exchange.rank(), exchange.size()), (rank, size));
                Ok(loaded)
            })
        };
        let loads: Vec<_> = (0..size).map(start).collect();
        loads.into_iter().map(|load| load.join().unwrap()).collect()
    })
}

fn assert_is_expected(model: &Model, ranks: &[Assembly], loads: &[SharedLoaded], context: &str) {
    for (rank, (loaded, assembly)) in (0..).zip(loads.iter().zip(ranks)) {
        let (device, expected) = (vendor::open(rank).unwrap(), expected(model, assembly));
        assert_eq!(loaded.tensors.len(), expected.len());
        for (name, tensor) in loaded.tensors.iter() {
            assert_eq!(tensor.device(), vendor::id(rank));
            let expected = &expected[name];
            assert!(
                read_back(&device, tensor, expected.len()) == *expected,
                "{context}: {name} on rank {rank}"
            );
        }
        assert_eq!(device.id(), vendor::id(rank));
    }
}

#[test]
fn every_rank_ends_with_its_bytes_and_each_is_read_once() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = model(folder.path());
    let stored: u64 = model.checkpoint().tensors().map(|tensor| tensor.info.len_bytes()).sum();
    for (size, seed, config) in [
        (2, 1, "devices=2"),
        (4, 2, "devices=4;delay_us=100"),
        (4, 3, "devices=4;pools=0;batches=0;peers=0"),
        (8, 4, "devices=8;delay_us=50;seed=7"),
    ] {
        let sim = Sim::new(config);
        let ranks = assemblies(&model, size, seed);
        let loads = load_on_all(folder.path(), &model, &ranks);
        let loads: Vec<_> = loads
            .into_iter()
            .map(|load| load.unwrap_or_else(|error| panic!("{config}: {error:?}")))
            .collect();
        assert_is_expected(&model, &ranks, &loads, config);
        let reports: Vec<_> = loads.iter().map(|loaded| &loaded.report).collect();
        let read: u64 = reports.iter().map(|report| report.read_bytes).sum();
        // Reads begin and end at pages, which adds less than two to each; in memory they do not, and add nothing.
        let share = model.plan_shared(&options(0), &ranks).unwrap();
        let reads = share.plan().reads();
        assert!((stored..stored + 8192 * reads.len() as u64).contains(&read), "{config}: {read} of {stored}");
        let happened = sim.report();
        let messages = |rounds: usize| rounds * size * size * 4;
        assert_eq!(happened.calls("ncclSend"), happened.calls("ncclRecv"), "{config}");
        assert!(happened.calls("ncclSend") <= messages(reports[0].rounds as usize) as u64, "{config}");
        assert!(happened.calls("ncclGroupEnd") <= reports[0].rounds * size as u64, "one group a round");
        assert!(reports.iter().all(|report| report.exchange_bytes == report.promised.exchange_bytes()));
        drop(loads);
        sim.assert_clean(config);
    }
}

#[test]
fn when_a_call_fails_on_one_rank_all_ranks_fail_and_nothing_is_left() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = model(folder.path());
    let ranks = assemblies(&model, 3, 5);
    let copy = format!("{}:4:1", vendor::call::COPY_ROWS);
    for (call, told) in [
        ("ncclGetUniqueId:1:2", "ncclGetUniqueId failed with 2 (unhandled system error"),
        ("ncclCommInitRankConfig:2:2", "ncclCommInitRankConfig failed with 2"),
        ("ncclCommGetAsyncError:2:6", "ncclCommGetAsyncError failed with 6"),
        ("ncclSend:3:4", "ncclSend failed with 4 (invalid argument"),
        ("ncclRecv:1:4", "ncclRecv failed with 4"),
        ("ncclGroupStart:5:5", "ncclGroupStart failed with 5"),
        ("ncclGroupEnd:4:2", "ncclGroupEnd failed with 2"),
        (copy.as_str(), "failed with 1"),
    ] {
        let sim = Sim::new(&format!("devices=3;fail={call}"));
        let errors: Vec<_> = load_on_all(folder.path(), &model, &ranks)
            .into_iter()
            .map(|load| load.expect_err(call).one_line())
            .collect();
        assert!(errors.iter().any(|error| error.contains(told)), "{call}: {errors:?}");
        sim.assert_clean(call);
    }
}

#[test]
fn ranks_that_do_not_come_are_an_error_after_a_while() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let sim = Sim::new("devices=2");
    for rank in [0, 1] {
        let soon = NodeOptions { timeout: Some(Duration::from_millis(60)), ..node(folder.path()) };
        let error = node_exchange(&launched(rank, 2), vendor::id(rank), &soon).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(
            error
                .to_string()
                .contains(&format!("meeting: rank {} of the node did not come within 0.06 s", 1 - rank)),
            "{error}"
        );
    }
    assert!(!node(folder.path()).path.unwrap().exists(), "the socket is removed");
    sim.assert_clean("after nobody came");
}

#[test]
fn a_rank_that_fails_or_stays_away_while_the_others_are_connected_ends_them() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // The older version has no call that does not wait.
    for version in [22_703, 21_304] {
        for (aborts, timeout, told) in [
            (true, Duration::from_secs(20), "rank 1 of the node failed or ended"),
            (
                false,
                Duration::from_secs(2), // The other must have met this one by then.
                "connecting the ranks: not all ranks of the node came within 2 s",
            ),
        ] {
            let context = format!("{version}, {told}");
            let sim = Sim::new(&format!("devices=2;nccl={version}"));
            let path = folder.path().join("ranks.sock");
            let (sender, receiver) = std::sync::mpsc::channel::<()>();
            thread::scope(|scope| {
                let rendezvous = Rendezvous { path: path.clone(), timeout: Duration::from_secs(20) };
                scope.spawn(move || {
                    let control = Control::meet(&launched(1, 2), rendezvous).unwrap();
                    control.agree(version).unwrap();
                    control.spread(&mut [0; 128]).unwrap();
                    if aborts {
                        control.abort();
                    }
                    let _ = receiver.recv(); // Until the other has ended.
                });
                let node = NodeOptions { path: Some(path), timeout: Some(timeout), ..NodeOptions::default() };
                let error = node_exchange(&launched(0, 2), vendor::id(0), &node).map(drop).unwrap_err();
                assert!(error.to_string().contains(told), "{context}: {error}");
                drop(sender);
            });
            // The older one's call goes on waiting on a thread that is left behind with its device.
            sim.fail("");
            let is_over = (0..20_000).any(|_| {
                thread::sleep(Duration::from_millis(1));
                tensorhaul::release_devices();
                sim.report().live["live.contexts"] == 0
            });
            assert!(is_over, "{context}: the thread ends with its call");
            sim.assert_clean(&context);
        }
    }
}

#[test]
fn ranks_with_an_older_library_load_as_well() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = model(folder.path());
    let ranks = assemblies(&model, 3, 9);
    let sim = Sim::new("devices=3;nccl=21304;delay_us=50");
    let loads: Vec<_> = load_on_all(folder.path(), &model, &ranks).into_iter().map(Result::unwrap).collect();
    assert_is_expected(&model, &ranks, &loads, "older");
    assert_eq!(sim.report().calls("ncclCommInitRank"), 3);
    drop(loads);
    sim.assert_clean("an older library");
}

#[test]
fn a_rank_that_leaves_before_the_load_is_noticed() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = model(folder.path());
    let ranks = assemblies(&model, 2, 6);
    let sim = Sim::new("devices=2");
    thread::scope(|scope| {
        let (path, model, ranks) = (folder.path(), &model, &ranks);
        scope.spawn(move || drop(node_exchange(&launched(1, 2), vendor::id(1), &node(path)).unwrap()));
        let exchange = node_exchange(&launched(0, 2), vendor::id(0), &node(path)).unwrap();
        let error = model.load_shared(&options(0), ranks, &*exchange).unwrap_err();
        assert!(error.to_string().contains("rank 1 of the node failed or ended"), "{error}");
    });
    sim.assert_clean("after it left");
}
