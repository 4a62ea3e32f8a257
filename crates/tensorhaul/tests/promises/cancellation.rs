//! A load that nobody waits for any more ends: no thread, no descriptor, no memory stays, and the next works.

use std::time::Duration;

use tensorhaul::{Dtype, EngineChoice, Faults, Handover, LoadOptions, Model, Preference};

use crate::common::{
    Census, Dice, Folder, assert_same, awkward, encode, in_memory_files, in_own_process, memory_bytes,
    reference, stored,
};

#[test]
fn a_dropped_stream_leaves_nothing() {
    in_own_process("cancellation::a_dropped_stream_leaves_nothing", || {
        let folder = Folder::on_disk();
        let expected = reference(&folder.checkpoint(&awkward()));
        let mut dice = Dice::printed();
        let before = Census::take();
        for round in 0..60 {
            let (model, options) = (slow_or_real(&mut dice, &folder), random_options(&mut dice));
            let mut stream = model.stream(&options).unwrap();
            for _ in 0..dice.below(8) {
                stream.next().unwrap().unwrap();
            }
            pause(&mut dice);
            drop(stream);
            drop(model);
            before.comes_back(&format!("round {round}: {options:?}"));
        }
        let loaded = Model::open(folder.path()).unwrap().load(&LoadOptions::default()).unwrap();
        assert_same(loaded.tensors.iter(), &expected, "after 60 dropped streams");
    });
}

#[test]
fn a_panic_in_the_callers_progress_ends_the_load_and_hangs_nothing() {
    let bytes = encode(&[stored("w", Dtype::U8, &[4 << 20])], 1);
    let model =
        Model::from_memory(vec![("m.safetensors".to_owned(), bytes.into())], Faults::default()).unwrap();
    let options = LoadOptions::default().in_place(Preference::Off).staging_bytes(64 << 10);
    let panicking = options.clone().on_progress(|_| panic!("the caller's own"));
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| model.load(&panicking).map(drop)));
    assert_eq!(caught.unwrap_err().downcast_ref::<&str>(), Some(&"the caller's own"));
    model.load(&options).unwrap();
}

#[test]
fn cancelled_loads_give_their_memory_back() {
    in_own_process("cancellation::cancelled_loads_give_their_memory_back", || {
        let folder = Folder::on_disk();
        folder.checkpoint(&awkward());
        let mut dice = Dice::printed();
        let mut cancel = |_| {
            let mut stream = slow_or_real(&mut dice, &folder).stream(&random_options(&mut dice)).unwrap();
            stream.next().unwrap().unwrap();
        };
        (0..10).for_each(&mut cancel);
        let before = memory_bytes("RssAnon");
        (0..100).for_each(&mut cancel);
        let kept = memory_bytes("RssAnon").saturating_sub(before);
        assert!(kept < 64 << 20, "{kept} bytes stayed after 100 cancelled loads");
    });
}

/// Slow bytes in memory, or files.
pub(crate) fn slow_or_real(dice: &mut Dice, folder: &Folder) -> Model {
    if dice.below(2) == 0 {
        return Model::open(folder.path()).unwrap();
    }
    Model::from_memory(in_memory_files(&awkward()), delays(dice.roll())).unwrap()
}

pub(crate) fn delays(seed: u64) -> Faults {
    Faults {
        seed,
        delayed_one_in: 2,
        delay_max: Duration::from_millis(2),
        short_one_in: 5,
        ..Faults::default()
    }
}

pub(crate) fn random_options(dice: &mut Dice) -> LoadOptions {
    LoadOptions::default()
        .handover(Handover::Private)
        .engine(dice.pick(&[EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring]))
        .in_place(dice.pick(&[Preference::Preferred, Preference::Off]))
        .staging_bytes(dice.pick(&[4096, 64 << 10, 1 << 20]))
        .checksums(dice.below(3) == 0)
        .threads(1 + dice.below(4) as u32)
}

fn pause(dice: &mut Dice) {
    std::thread::sleep(Duration::from_micros(dice.below(2000)));
}
