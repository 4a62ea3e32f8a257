//! Ranks of a node that share their reading, as threads that load into host memory: each ends with exactly its bytes, and storage is
//! asked for each byte once.

#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

mod cut;
mod dequantize;
mod llama;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tensorhaul::exchange::{Exchange, InProcess, Launched};
use tensorhaul::share::{Carrier, NodeOptions, SharedLoaded, node_exchange};
use tensorhaul::{
    Assembled, Assembly, DeviceId, EngineChoice, Error, ErrorKind, FailsAt, Faults, Handover, LoadOptions,
    Model, Part, Request, Select, Slice,
};

use llama::{assemblies, expected, files};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Loads on every rank at once; `model_of` and `options_of` say what each does.
fn load_on_all(
    ranks: &[Assembly],
    model_of: impl Fn(usize) -> Model + Sync,
    options_of: impl Fn(usize) -> LoadOptions + Sync,
) -> Vec<Result<SharedLoaded, Error>> {
    let ends = InProcess::ranks(ranks.len() as u32, TIMEOUT);
    thread::scope(|scope| {
        let start = |(rank, end): (usize, InProcess)| {
            let (model_of, options_of) = (&model_of, &options_of);
            scope.spawn(move || model_of(rank).load_shared(&options_of(rank), ranks, &end))
        };
        let loads: Vec<_> = ends.into_iter().enumerate().map(start).collect();
        loads.into_iter().map(|load| load.join().unwrap()).collect()
    })
}

/// Loads on every rank at once, connected by sockets as processes are.
fn load_on_all_by_sockets(model: &Model, ranks: &[Assembly], options: &LoadOptions) -> Vec<SharedLoaded> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let folder = folder.path();
    thread::scope(|scope| {
        let start = |rank| {
            scope.spawn(move || {
                let exchange = meet(rank, ranks.len() as u32, folder);
                let loaded = model.load_shared(options, ranks, &*exchange).unwrap();
                assert_eq!(loaded.report.exchange, "sockets");
                loaded
            })
        };
        let loads: Vec<_> = (0..ranks.len() as u32).map(start).collect();
        loads.into_iter().map(|load| load.join().unwrap()).collect()
    })
}

/// Meets the other ranks of a node, whatever the launcher.
fn meet(rank: u32, size: u32, folder: &Path) -> Box<dyn Exchange> {
    let (job, launcher) = ("a-job".to_owned(), "the test");
    let launched = Launched { rank, size, local_rank: rank, local_size: size, job, launcher };
    let (path, carrier) = (Some(folder.join("ranks.sock")), (size > 1).then_some(Carrier::Sockets));
    let node = NodeOptions { path, carrier, timeout: Some(TIMEOUT) };
    node_exchange(&launched, DeviceId::Host, &node).unwrap()
}

fn options() -> LoadOptions {
    LoadOptions::default().staging_bytes(512 << 10)
}

fn assert_is_expected(model: &Model, ranks: &[Assembly], loads: &[SharedLoaded], context: &str) {
    for (rank, (loaded, assembly)) in loads.iter().zip(ranks).enumerate() {
        let expected = expected(model, assembly);
        assert_eq!(loaded.tensors.len(), expected.len(), "{context}");
        for (name, tensor) in loaded.tensors.iter() {
            assert!(tensor.bytes().unwrap() == expected[name], "{context}: {name} on rank {rank}");
        }
        let (report, promised) = (&loaded.report, loaded.report.promised);
        assert_eq!(
            (report.rank as usize, report.read_bytes, report.sent_bytes, report.received_bytes),
            (rank, promised.read_bytes, promised.sent_bytes, promised.received_bytes),
            "{context}"
        );
        assert_eq!(report.exchange_bytes, promised.exchange_bytes());
    }
}

#[test]
fn every_rank_ends_with_its_bytes_and_each_is_read_once() {
    let model = Model::from_memory(files(), Faults::default()).unwrap();
    let stored: u64 = model.checkpoint().tensors().map(|tensor| tensor.info.len_bytes()).sum();
    for size in [1, 2, 4, 8] {
        for (seed, staging_bytes) in [(1, 64 << 10), (2, 512 << 10), (3, 8 << 20), (4, 4096)] {
            let context = format!("{size} ranks, seed {seed}, {staging_bytes} bytes of staging");
            let ranks = assemblies(&model, size, seed);
            let options = options().staging_bytes(staging_bytes);
            let loads = load_on_all(&ranks, |_| model.clone(), |_| options.clone());
            let loads: Vec<_> = loads
                .into_iter()
                .map(|load| load.unwrap_or_else(|error| panic!("{context}: {error:?}")))
                .collect();
            assert_is_expected(&model, &ranks, &loads, &context);
            let read: u64 = loads.iter().map(|loaded| loaded.report.read_bytes).sum();
            assert_eq!(read, stored, "{context}");
            let mean = stored / size as u64;
            for loaded in &loads {
                let buffer = model.plan_shared(&options, &ranks).unwrap().plan().machine().buffer_len_bytes;
                assert!(loaded.report.read_bytes.abs_diff(mean) <= buffer + 1, "{context}");
                assert!(loaded.report.peak_staging_bytes <= staging_bytes, "{context}");
            }
        }
    }
}

#[test]
fn files_are_read_by_every_engine() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for (name, bytes) in files() {
        std::fs::write(folder.path().join(name), &bytes).unwrap();
    }
    let model = Model::open(folder.path()).unwrap();
    let ranks = assemblies(&model, 3, 5);
    for engine in [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring, EngineChoice::Mmap] {
        // Each rank opens the files for itself, as processes do.
        let load = |_| Model::open(folder.path()).unwrap();
        let loads = load_on_all(&ranks, load, |_| options().engine(engine));
        let loads: Vec<_> = loads.into_iter().map(Result::unwrap).collect();
        assert_is_expected(&model, &ranks, &loads, &format!("{engine:?}"));
    }
}

#[test]
fn short_and_late_reads_change_nothing() {
    let model = Model::from_memory(files(), Faults::default()).unwrap();
    let ranks = assemblies(&model, 4, 6);
    let faulty = |rank: usize| {
        let faults = Faults {
            seed: rank as u64,
            short_one_in: 3,
            interrupted_one_in: 4,
            delayed_one_in: 5,
            delay_max: Duration::from_millis(2),
            ..Faults::default()
        };
        Model::from_memory(files(), faults).unwrap()
    };
    let loads = load_on_all(&ranks, faulty, |_| options().staging_bytes(128 << 10));
    let loads: Vec<_> = loads.into_iter().map(Result::unwrap).collect();
    assert_is_expected(&model, &ranks, &loads, "faulty");
}

#[test]
fn when_one_rank_cannot_read_all_fail_and_it_says_why() {
    let model = Model::from_memory(files(), Faults::default()).unwrap();
    let ranks = assemblies(&model, 4, 7);
    let share = model.plan_shared(&options(), &ranks).unwrap();
    for broken in 0..4usize {
        let reads: Vec<_> = share.reads(broken as u32).collect();
        let extent = share.plan().reads()[reads[reads.len() / 2] as usize].extent;
        let fails_at = Some(FailsAt { file: extent.file, offset_bytes: extent.offset_bytes, errno: 5 });
        let model_of = |rank: usize| {
            let fails_at = fails_at.filter(|_| rank == broken);
            Model::from_memory(files(), Faults { fails_at, ..Faults::default() }).unwrap()
        };
        for (rank, load) in load_on_all(&ranks, model_of, |_| options()).into_iter().enumerate() {
            let error = load.unwrap_err();
            let text = error.one_line();
            assert_eq!(error.kind(), ErrorKind::Io, "{text}");
            if rank == broken {
                assert!(text.contains("os error 5") && text.contains("tensor \"model."), "{text}");
            } else {
                assert!(text.contains(&format!("rank {broken} of the node failed")), "{text}");
            }
        }
    }
}

#[test]
fn ranks_that_load_different_things_are_told_so() {
    let model = Model::from_memory(files(), Faults::default()).unwrap();
    let ranks = assemblies(&model, 3, 8);
    let options_of = |rank| if rank == 1 { options().staging_bytes(256 << 10) } else { options() };
    for load in load_on_all(&ranks, |_| model.clone(), options_of) {
        let error = load.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadRequest);
        assert!(
            error.to_string().contains("rank 1 of the node has staging memory of another size"),
            "{error}"
        );
    }
    let others = assemblies(&model, 3, 9);
    let ends = InProcess::ranks(3, TIMEOUT);
    thread::scope(|scope| {
        for end in ends {
            let (model, ranks) = (&model, if end.rank() == 2 { &others } else { &ranks });
            scope.spawn(move || {
                let error = model.load_shared(&options(), ranks, &end).unwrap_err();
                assert!(error.to_string().contains("rank 2 of the node loads other tensors"), "{error}");
            });
        }
    });
    let mut smaller = files();
    smaller.truncate(1);
    let smaller = Model::from_memory(smaller, Faults::default()).unwrap();
    let ranks = vec![Assembly::default(); 2];
    let of_rank = |rank| if rank == 1 { smaller.clone() } else { model.clone() };
    for load in load_on_all(&ranks, of_rank, |_| options()) {
        let error = load.unwrap_err();
        assert!(error.to_string().contains("rank 1 of the node loads other files"), "{error}");
    }
}

#[test]
fn a_rank_that_never_comes_is_an_error_after_a_while() {
    let model = Model::from_memory(files(), Faults::default()).unwrap();
    let ranks = assemblies(&model, 2, 9);
    let ends = InProcess::ranks(2, Duration::from_millis(50));
    let error = model.load_shared(&options(), &ranks, &ends[0]).unwrap_err();
    assert!(error.to_string().contains("rank 1 of the node did not come within 0.05 s"), "{error}");
    assert!(ends[0].check().is_err(), "the exchange is of no more use");
}

#[test]
fn what_is_selected_arrives_on_the_ranks_that_have_it() {
    let model = Model::from_memory(files(), Faults::default()).unwrap();
    let ranks = assemblies(&model, 4, 13);
    let selected = Request::of(Select::Globs(vec!["*.1.*".to_owned(), "model.norm.weight".to_owned()]));
    let options = options().request(selected);
    let loads = load_on_all(&ranks, |_| model.clone(), |_| options.clone());
    let loads: Vec<_> = loads.into_iter().map(Result::unwrap).collect();
    let is_selected = |name: &str| name.contains(".1.") || name == "model.norm.weight";
    let kept = |assembly: &Assembly| Assembly {
        tensors: assembly.tensors.iter().filter(|tensor| is_selected(&tensor.name)).cloned().collect(),
        ..Assembly::default()
    };
    let ranks: Vec<_> = ranks.iter().map(kept).collect();
    assert!(ranks.iter().any(|assembly| !assembly.tensors.is_empty()));
    assert_is_expected(&model, &ranks, &loads, "selected");
    let needed = model.plan_shared(&options, &ranks).unwrap().plan().promised().needed_bytes;
    let stored = model.checkpoint().tensors().filter(|tensor| is_selected(tensor.info.name));
    assert_eq!(needed, stored.map(|tensor| tensor.info.len_bytes()).sum::<u64>());
}

#[test]
fn a_load_that_is_aborted_from_outside_ends_on_all_ranks() {
    let model = Model::from_memory(files(), Faults::default()).unwrap();
    let ranks = assemblies(&model, 3, 14);
    let ends = InProcess::ranks(3, TIMEOUT);
    thread::scope(|scope| {
        let (model, ranks) = (&model, &ranks);
        let loads: Vec<_> = ends[..2]
            .iter()
            .map(|end| scope.spawn(move || model.load_shared(&options(), ranks, end).unwrap_err()))
            .collect();
        ends[2].abort(); // The rank that would be the third cancels instead.
        for load in loads {
            let error = load.join().unwrap().to_string();
            assert!(error.contains("rank 2 of the node failed or ended"), "{error}");
        }
    });
}

#[test]
fn one_exchange_serves_several_loads() {
    let model = Model::from_memory(files(), Faults::default()).unwrap();
    let ranks = [assemblies(&model, 2, 10), assemblies(&model, 2, 11)];
    thread::scope(|scope| {
        for end in InProcess::ranks(2, TIMEOUT) {
            let (model, ranks) = (&model, &ranks);
            scope.spawn(move || {
                for ranks in ranks {
                    let loaded = model.load_shared(&options(), ranks, &end).unwrap();
                    let expected = expected(model, &ranks[end.rank() as usize]);
                    assert!(
                        loaded.tensors.iter().all(|(name, tensor)| tensor.bytes().unwrap() == expected[name])
                    );
                }
            });
        }
    });
}

#[test]
fn what_a_shared_load_does_not_do_is_refused() {
    let model = Model::from_memory(files(), Faults::default()).unwrap();
    let ranks = assemblies(&model, 2, 12);
    let mut assembled = Request::all();
    assembled.assembly = Some(std::sync::Arc::new(ranks[0].clone()));
    for (options, what) in [
        (options().request(assembled), "the request has an assembly"),
        (options().handover(Handover::Mapped), "mapped tensors are asked for"),
        (options().checksums(true), "checksums are asked for"),
    ] {
        let error = model.plan_shared(&options, &ranks).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadRequest);
        assert!(error.to_string().contains(what), "{error}");
    }
    let mut small = Request::all();
    small.target_bytes_max = Some(4096);
    let error = model.plan_shared(&options().request(small), &ranks).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    let end = &InProcess::ranks(3, TIMEOUT)[0];
    let error = model.load_shared(&options(), &ranks, end).unwrap_err();
    assert!(error.to_string().contains("2 assemblies are given for 3 ranks"), "{error}");
}

#[test]
fn a_panic_in_one_ranks_progress_ends_the_load_on_all_and_names_the_rank() {
    let model = Model::from_memory(files(), Faults::default()).unwrap();
    let ranks = assemblies(&model, 3, 15);
    let ends = InProcess::ranks(3, TIMEOUT);
    let loads: Vec<_> = thread::scope(|scope| {
        let start = |end: InProcess| {
            let (model, ranks) = (&model, &ranks);
            let panics = end.rank() == 1;
            let options = options().staging_bytes(64 << 10).on_progress(move |progress| {
                assert!(!panics || progress.read_bytes * 2 < progress.total_bytes, "the caller's own");
            });
            scope.spawn(move || model.load_shared(&options, ranks, &end).map(drop))
        };
        let loads: Vec<_> = ends.into_iter().map(start).collect();
        loads.into_iter().map(thread::ScopedJoinHandle::join).collect()
    });
    for (rank, load) in loads.into_iter().enumerate() {
        match load {
            Err(panicked) => {
                assert_eq!((rank, panicked.downcast_ref::<&str>()), (1, Some(&"the caller's own")));
            }
            Ok(load) => {
                let error = load.unwrap_err().to_string();
                assert!(rank != 1 && error.contains("rank 1 of the node failed or ended"), "{rank}: {error}");
            }
        }
    }
}

/// One tensor of which a rank wants a few bytes of each row.
fn short_pieces() -> (Model, Vec<Assembly>) {
    let (rows, cols) = (1 << 15, 64);
    let bytes = vec![7; rows * cols];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![rows, cols], &bytes);
    let file = safetensors::tensor::serialize([("w", view.unwrap())], None).unwrap();
    let model =
        Model::from_memory(vec![("m.safetensors".to_owned(), file.into())], Faults::default()).unwrap();
    let source = tensorhaul::assembly::Source::Stored(model.checkpoint().find("w").unwrap().id);
    let slice = Slice::new(vec![0..rows as u64, 0..8]);
    let parts = [Part { source, slice, at: [0, 0].as_slice().into() }].into();
    let tensor = Assembled {
        name: "w".to_owned(),
        shape: [rows as u64, 8].as_slice().into(),
        device: DeviceId::Host,
        parts,
    };
    let ranks = vec![Assembly { tensors: vec![tensor], ..Assembly::default() }];
    (model, ranks)
}

/// What a load tells of tensors that stay unfused and of bytes that are read in vain.
fn told(fallbacks: &[tensorhaul::Fallback]) -> Vec<(&str, &str)> {
    let of_plan = |what: &str| what.contains("stays unfused") || what.contains("read in vain");
    let told = fallbacks.iter().filter(|fallback| of_plan(&fallback.what));
    told.map(|fallback| (fallback.what.as_str(), fallback.why.as_str())).collect()
}

/// Loads shared, and compares what each rank is told with what a load of its own tells; returns how much that is.
#[track_caller]
fn assert_told_as_alone(model: &Model, ranks: &[Assembly], options: &LoadOptions) -> usize {
    let loads = load_on_all(ranks, |_| model.clone(), |_| options.clone());
    let mut count = 0;
    for (load, assembly) in loads.into_iter().zip(ranks) {
        let mut request = Request::all();
        request.assembly = Some(Arc::new(assembly.clone()));
        let alone = LoadOptions::default().handover(Handover::Private).request(request);
        let alone = model.load(&alone).unwrap().report.fallbacks;
        assert_eq!(told(&load.unwrap().report.fallbacks), told(&alone));
        count += told(&alone).len();
    }
    count
}

#[test]
fn what_is_read_in_vain_is_told_as_in_a_load_of_ones_own() {
    let (model, ranks) = short_pieces();
    assert_eq!(assert_told_as_alone(&model, &ranks, &options()), 1);
}

#[test]
fn a_carrier_of_the_hosts_has_the_longest_round_to_hold() {
    let model = Model::from_memory(files(), Faults::default()).unwrap();
    let ranks = assemblies(&model, 4, 16);
    let share = model.plan_shared(&options(), &ranks).unwrap();
    for (rank, loaded) in load_on_all_by_sockets(&model, &ranks, &options()).iter().enumerate() {
        let turns = (0..share.round_count()).map(|round| &share.round(round)[rank]);
        let longest = turns.map(|turn| {
            let sent = turn.sends.iter().map(|send| send.len_bytes);
            sent.chain(turn.receives.iter().map(|receive| receive.len_bytes)).sum::<u64>()
        });
        let longest = longest.max().unwrap();
        assert_eq!((loaded.report.carrier_bytes, loaded.report.promised.carrier_bytes), (longest, longest));
        assert!(longest > 0);
    }
    let alone = assemblies(&model, 1, 16);
    assert_eq!(model.plan_shared(&options(), &alone).unwrap().promised(0).carrier_bytes, 0);
}

#[test]
fn one_rank_and_a_path_that_is_given_need_no_folder_to_meet_in() {
    const CHILD: &str = "TENSORHAUL_TEST_WITHOUT_FOLDER";
    if std::env::var_os(CHILD).is_none() {
        let name = "one_rank_and_a_path_that_is_given_need_no_folder_to_meet_in";
        // There is no folder for those who meet by a job's name.
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", name]).env(CHILD, "1").env("TMPDIR", "/nowhere");
        child.env_remove("TENSORHAUL_RENDEZVOUS");
        let output = child.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return;
    }
    let launched = |size| Launched {
        rank: 0,
        size,
        local_rank: 0,
        local_size: size,
        job: "a-job".to_owned(),
        launcher: "the test",
    };
    assert!(node_exchange(&launched(2), DeviceId::Host, &NodeOptions::default()).is_err());
    assert_eq!(node_exchange(&launched(1), DeviceId::Host, &NodeOptions::default()).unwrap().size(), 1);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let folder = folder.path();
    thread::scope(|scope| {
        for rank in 0..2 {
            scope.spawn(move || assert_eq!(meet(rank, 2, folder).rank(), rank));
        }
    });
}
