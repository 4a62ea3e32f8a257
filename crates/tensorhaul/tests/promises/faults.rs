//! Storage that fails, interrupts, stalls and returns less than was asked: either the bytes are right, or an
//! error says which bytes are not, and nothing is left behind.

use std::time::Duration;

use tensorhaul::{
    Error, ErrorKind, FailsAt, Faults, Handover, LoadOptions, Model, Preference, Request, Select,
};

use crate::common::{
    Census, Dice, MemoryFile, Reference, assert_consistent, assert_same, awkward, in_memory_files,
    in_own_process, memory_bytes, reference_of,
};

#[test]
fn short_interrupted_and_delayed_reads_change_nothing() {
    let (files, expected) = files();
    let mut dice = Dice::printed();
    for round in 0..60 {
        let (options, faults) = (random_options(&mut dice), harmless(&mut dice));
        let context = format!("round {round}: {faults:?}, {options:?}");
        let model = Model::from_memory(files.clone(), faults).unwrap();
        let loaded = model.load(&options).unwrap_or_else(|error| panic!("{context}: {error:?}"));
        assert_same(loaded.tensors.iter(), &expected, &context);
        assert_consistent(&loaded.report, 256 << 20, &context);
    }
}

#[test]
fn the_same_seed_gives_each_read_the_same_fate() {
    let (files, _) = files();
    let faults =
        Faults { seed: Dice::printed().roll(), short_one_in: 2, interrupted_one_in: 3, ..Faults::default() };
    let options = LoadOptions::default().threads(1).staging_bytes(64 << 10);
    let calls = |faults: &Faults| {
        Model::from_memory(files.clone(), faults.clone()).unwrap().load(&options).unwrap().report.system_calls
    };
    assert_eq!(calls(&faults), calls(&faults));
    assert!(calls(&faults) > calls(&Faults::default()), "short and interrupted reads take more calls");
}

#[test]
fn a_byte_that_cannot_be_read_is_an_error_naming_the_file_the_tensor_and_the_bytes() {
    let (files, _) = files();
    let mut dice = Dice::printed();
    for round in 0..80 {
        let file = dice.below(3) as usize;
        let model = Model::from_memory(files.clone(), Faults::default()).unwrap();
        let data_start = model.checkpoint().files()[file].header().data_start_bytes();
        let offset_bytes = data_start + dice.below(files[file].1.len() as u64 - data_start);
        let fails_at = Some(FailsAt { file: file as u32, offset_bytes, errno: 5 });
        let (options, faults) = (random_options(&mut dice), Faults { fails_at, ..harmless(&mut dice) });
        let context = format!("round {round}: {faults:?}, {options:?}");
        let error = fails(&Model::from_memory(files.clone(), faults).unwrap(), &options, &context);
        assert_eq!(error.kind(), ErrorKind::Io, "{context}: {error:?}");
        assert_names(&error, &model, file, offset_bytes, &context);
        assert!(error.one_line().contains("os error 5"), "{context}: {error:?}");
    }
}

#[test]
fn a_file_that_ends_early_is_an_error_naming_what_is_incomplete() {
    let (files, _) = files();
    let mut dice = Dice::printed();
    for round in 0..80 {
        let file = dice.below(3) as usize;
        let model = Model::from_memory(files.clone(), Faults::default()).unwrap();
        let data_start = model.checkpoint().files()[file].header().data_start_bytes();
        let end = data_start + dice.below(files[file].1.len() as u64 - data_start);
        let faults = Faults { ends_at: Some((file as u32, end)), ..harmless(&mut dice) };
        // One thread reads in order, so the first read to fail is the one that crosses the end.
        let options = random_options(&mut dice).threads(1);
        let context = format!("round {round}: {faults:?}, {options:?}");
        let error = fails(&Model::from_memory(files.clone(), faults).unwrap(), &options, &context);
        assert_eq!(error.kind(), ErrorKind::Malformed, "{context}: {error:?}");
        assert_names(&error, &model, file, end, &context);
        let cut = model.checkpoint().tensors().find(|tensor| {
            tensor.file as usize == file && tensor.file_offset_bytes + tensor.info.len_bytes() > end
        });
        assert_eq!(error.tensor(), cut.map(|tensor| tensor.info.name), "{context}: {error:?}");
        let bytes = error.bytes().unwrap();
        let what =
            if bytes.start == end { "ends before them".to_owned() } else { format!("ends at byte {end}") };
        assert!(error.one_line().contains(&what), "{context}: {error:?}");
    }
}

#[test]
fn a_stream_over_failing_storage_hands_over_good_tensors_then_one_error_then_ends() {
    let (files, expected) = files();
    let mut dice = Dice::printed();
    for round in 0..40 {
        let offset_bytes = 5000 + dice.below(files[1].1.len() as u64 - 5000);
        let fails_at = Some(FailsAt { file: 1, offset_bytes, errno: 5 });
        let (options, faults) = (random_options(&mut dice), Faults { fails_at, ..harmless(&mut dice) });
        let context = format!("round {round}: {faults:?}, {options:?}");
        let mut stream = Model::from_memory(files.clone(), faults).unwrap().stream(&options).unwrap();
        let mut kept = Vec::new();
        let error = loop {
            match stream.next().unwrap_or_else(|| panic!("{context}: ended without the error")) {
                Ok(tensor) => kept.push(tensor),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::Io, "{context}");
        assert!(stream.next().is_none() && stream.report().is_none(), "{context}");
        drop(stream);
        for (name, tensor) in kept {
            assert!(tensor.bytes().unwrap() == expected[&name].2, "{context}: {name}");
        }
    }
}

#[test]
fn a_fault_in_one_file_leaves_the_others_loadable() {
    let (files, mut expected) = files();
    let fails_at = Some(FailsAt { file: 1, offset_bytes: 100_000, errno: 5 });
    let model = Model::from_memory(files, Faults { fails_at, ..Faults::default() }).unwrap();
    assert!(model.load(&LoadOptions::default()).is_err());
    let elsewhere = LoadOptions::default().request(Request::of(Select::predicate(|tensor| tensor.file != 1)));
    let loaded = model.load(&elsewhere).unwrap();
    expected.retain(|name, _| model.checkpoint().find(name).unwrap().file != 1);
    assert_same(loaded.tensors.iter(), &expected, "the files beside it");
}

#[test]
fn after_failed_loads_no_thread_descriptor_or_memory_is_left_and_the_next_load_works() {
    in_own_process(
        "faults::after_failed_loads_no_thread_descriptor_or_memory_is_left_and_the_next_load_works",
        || {
            let before = Census::take();
            let (files, expected) = files();
            let mut dice = Dice::printed();
            let mut fail = |round| {
                let offset_bytes = 5000 + dice.below(files[2].1.len() as u64 - 5000);
                let fails_at = Some(FailsAt { file: 2, offset_bytes, errno: 5 });
                let (options, faults) =
                    (random_options(&mut dice), Faults { fails_at, ..harmless(&mut dice) });
                let checksums = options.checksums(round % 2 == 0);
                fails(
                    &Model::from_memory(files.clone(), faults).unwrap(),
                    &checksums,
                    &format!("round {round}"),
                );
            };
            // The first rounds bring in what the process keeps: the allocator's own memory.
            (0..10).for_each(&mut fail);
            let memory_before = memory_bytes("RssAnon");
            (10..110).for_each(&mut fail);
            before.comes_back("after 100 failed loads");
            // A hundred results of 7 MB were begun, and as many rings.
            let kept = memory_bytes("RssAnon").saturating_sub(memory_before);
            assert!(kept < 64 << 20, "{kept} bytes stayed after 100 failed loads");
            let loaded = Model::from_memory(files.clone(), Faults::default())
                .unwrap()
                .load(&LoadOptions::default())
                .unwrap();
            assert_same(loaded.tensors.iter(), &expected, "after 100 failed loads");
        },
    );
}

/// Checks that an error names a file, a byte range that holds this byte, and a tensor of that range.
fn assert_names(error: &Error, model: &Model, file: usize, offset_bytes: u64, context: &str) {
    let name = model.checkpoint().files()[file].name();
    let context = format!("{context}: {error:?}");
    assert_eq!(error.file().and_then(|path| path.to_str()), Some(name), "{context}");
    let bytes = error.bytes().unwrap_or_else(|| panic!("no bytes: {context}"));
    assert!(bytes.contains(&offset_bytes), "byte {offset_bytes}: {context}");
    let tensor = error.tensor().unwrap_or_else(|| panic!("no tensor: {context}"));
    let stored = model.checkpoint().find(tensor).unwrap();
    let end = stored.file_offset_bytes + stored.info.len_bytes();
    assert!(
        stored.file as usize == file && stored.file_offset_bytes < bytes.end && end > bytes.start,
        "{context}"
    );
    let line = error.one_line();
    assert!(line.contains(name) && line.contains(tensor) && !line.contains('\n'), "{context}");
    assert!(line.contains(&format!("{}..{}", bytes.start, bytes.end)), "{context}");
}

fn fails(model: &Model, options: &LoadOptions, context: &str) -> Error {
    match model.load(options) {
        Ok(_) => panic!("{context}: loaded"),
        Err(error) => error,
    }
}

fn files() -> (Vec<MemoryFile>, Reference) {
    let files = in_memory_files(&awkward());
    let expected = reference_of(files.iter().map(|(_, bytes)| &**bytes));
    (files, expected)
}

/// Faults that a load survives.
fn harmless(dice: &mut Dice) -> Faults {
    Faults {
        seed: dice.roll(),
        short_one_in: dice.pick(&[0, 1, 2, 10]),
        interrupted_one_in: dice.pick(&[0, 2, 10]),
        delayed_one_in: dice.pick(&[0, 0, 20]),
        delay_max: Duration::from_micros(300),
        ..Faults::default()
    }
}

fn random_options(dice: &mut Dice) -> LoadOptions {
    LoadOptions::default()
        .handover(Handover::Private)
        .in_place(dice.pick(&[Preference::Preferred, Preference::Off]))
        .staging_bytes(dice.pick(&[4096, 10_000, 256 << 10, 16 << 20]))
        .threads(1 + dice.below(8) as u32)
}
