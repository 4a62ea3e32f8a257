//! Ranks of a node that share their reading, as threads that load into host memory: each ends with exactly its bytes, and storage is
//! asked for each byte once.

#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

mod cut;
mod dequantize;
mod llama;

use std::thread;
use std::time::Duration;

use tensorhaul::exchange::{Exchange, InProcess};
use tensorhaul::share::SharedLoaded;
use tensorhaul::{
    Assembly, EngineChoice, Error, ErrorKind, FailsAt, Faults, Handover, LoadOptions, Model, Request, Select,
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
    let mut ends = InProcess::ranks(2, Duration::from_millis(50));
    ends.truncate(1);
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
