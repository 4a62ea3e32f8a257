//! The asynchronous face is the same load: the same tensors, the same errors, and nothing left when it is dropped.

use std::time::Duration;

use tensorhaul::{ErrorKind, Faults, Handover, LoadOptions, Model, Preference};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use crate::cancellation::{delays, random_options, slow_or_real};
use crate::common::{
    Census, Dice, Folder, GIVE_BACK, assert_same, awkward, in_memory_files, in_own_process, reference,
};

#[test]
fn a_dropped_future_leaves_nothing_and_its_progress_ends() {
    in_own_process("asynchronous::a_dropped_future_leaves_nothing_and_its_progress_ends", || {
        let folder = Folder::on_disk();
        let expected = reference(&folder.checkpoint(&awkward()));
        let (mut dice, runtime) = (Dice::printed(), runtime());
        let before = Census::take();
        for round in 0..60 {
            let (model, options) = (slow_or_real(&mut dice, &folder), random_options(&mut dice));
            let context = format!("round {round}: {options:?}");
            let mut future = model.load_async(&options);
            let mut progress = future.progress();
            // Polled for a moment, or never.
            if dice.below(3) > 0 {
                let wait = Duration::from_micros(dice.below(3000));
                let _ = runtime.block_on(async { timeout(wait, &mut future).await });
            }
            drop(future);
            let rest = async { while progress.next().await.is_some() {} };
            runtime.block_on(async { timeout(GIVE_BACK, rest).await }).expect(&context);
            drop(model);
            before.comes_back(&context);
        }
        let loaded = runtime
            .block_on(Model::open(folder.path()).unwrap().load_async(&LoadOptions::default()))
            .unwrap();
        assert_same(loaded.tensors.iter(), &expected, "after 60 dropped futures");
    });
}

#[test]
fn an_async_load_hands_over_what_a_blocking_one_does() {
    let folder = Folder::on_disk();
    let expected = reference(&folder.checkpoint(&awkward()));
    let (model, runtime, mut dice) = (Model::open(folder.path()).unwrap(), runtime(), Dice::printed());
    for _ in 0..20 {
        let options = random_options(&mut dice);
        let blocking = model.load(&options).unwrap();
        let awaited = runtime.block_on(model.load_async(&options)).unwrap();
        assert_same(awaited.tensors.iter(), &expected, &format!("{options:?}"));
        let names = |loaded: &tensorhaul::Loaded| {
            loaded.tensors.iter().map(|(name, _)| name.to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names(&awaited), names(&blocking));
        // A plan also follows what the page cache holds, which others may change between two loads.
        let is_all_hot = |loaded: &tensorhaul::Loaded| loaded.report.bytes_cold == 0;
        if is_all_hot(&awaited) && is_all_hot(&blocking) {
            assert_eq!(awaited.report.promised, blocking.report.promised);
        }
        assert_eq!(awaited.report.promised.payload_bytes, blocking.report.promised.payload_bytes);
    }
}

#[test]
fn an_async_error_is_the_blocking_one() {
    let faults = Faults { ends_at: Some((1, 50_000)), ..Faults::default() };
    let model = Model::from_memory(in_memory_files(&awkward()), faults).unwrap();
    let options = LoadOptions::default().threads(1);
    let blocking = model.load(&options).unwrap_err();
    let awaited = runtime().block_on(model.load_async(&options)).unwrap_err();
    assert_eq!((awaited.kind(), awaited.one_line()), (blocking.kind(), blocking.one_line()));
    assert_eq!(awaited.kind(), ErrorKind::Malformed);
}

#[test]
fn async_loads_of_one_model_run_side_by_side_on_one_runtime_thread() {
    let folder = Folder::on_disk();
    let expected = reference(&folder.checkpoint(&awkward()));
    let model = Model::open(folder.path()).unwrap();
    let options =
        LoadOptions::default().handover(Handover::Private).in_place(Preference::Off).staging_bytes(64 << 10);
    let loads: Vec<_> = (0..6).map(|_| model.load_async(&options)).collect();
    for load in loads {
        assert_same(runtime().block_on(load).unwrap().tensors.iter(), &expected, "side by side");
    }
}

#[test]
fn progress_of_an_async_load_ends_at_the_totals() {
    let model = Model::from_memory(in_memory_files(&awkward()), delays(1)).unwrap();
    let (read, loaded) = runtime().block_on(async {
        let load = model.load_async(&LoadOptions::default().staging_bytes(64 << 10));
        let mut progress = load.progress();
        let watch = async {
            let mut last = 0;
            while let Some(now) = progress.next().await {
                assert!(now.read_bytes >= last && now.read_bytes <= now.total_bytes);
                last = now.read_bytes;
            }
            last
        };
        tokio::join!(watch, load)
    });
    assert_eq!(read, loaded.unwrap().report.promised.read_bytes);
}

/// A runtime without threads of its own.
fn runtime() -> Runtime {
    Builder::new_current_thread().enable_time().build().unwrap()
}
