//! Whole loads by direct storage, compared byte for byte and counted call by call.

use tensorhaul::{DirectMode, Model, Preference};

use crate::{
    FILES, assert_direct_and_clean, assert_same_bytes, call, checkpoint, evict_all, folder, id, is_amd,
    machine, options, reasons,
};

#[test]
fn every_byte_arrives_whatever_the_calls_and_the_timing() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let modes = [
        DirectMode::default(),
        DirectMode::Threads { count: 1 },
        DirectMode::Batch { entries: 1 },
        DirectMode::Batch { entries: 16 },
    ];
    for config in ["", "delay_us=300", "pools=0", "direct_short=2", "direct_short=1"] {
        for mode in modes {
            let sim = machine(config);
            let loaded = model.load(&options(Preference::Required).direct_mode(mode)).unwrap();
            assert_same_bytes(&model, &loaded);
            let report = &loaded.report;
            assert!(
                report.engine.split('+').any(|name| name == call("").to_lowercase()),
                "{}",
                report.engine
            );
            assert!(report.bytes_direct_storage > report.bytes * 9 / 10, "{report:?}");
            assert_eq!(report.bytes_direct_storage, report.bytes_in_place);
            let is_batch = matches!(mode, DirectMode::Batch { .. });
            let told: &[_] = if is_amd() && is_batch { &[NO_BATCHES] } else { &[] };
            assert_eq!(reasons(&loaded), told, "{config} {mode:?}");
            drop(loaded);
            assert_direct_and_clean(&sim, config);
        }
    }
}

/// AMD's are there and do nothing.
const NO_BATCHES: &str = "direct storage reads on threads instead of in batches: \
                          hipFile takes batches, but does not tell when their reads are done";

#[test]
fn an_extent_takes_one_call_and_an_arena_is_registered_once() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = machine("");
    let loaded = model.load(&options(Preference::Required)).unwrap();
    let happened = sim.report();
    let staged = loaded.report.reads - in_place(&model);
    assert!(in_place(&model) > FILES as u64 && staged > 0);
    // Each file is tried once, with a read of its own.
    assert_eq!(happened.calls(&call("Read")), in_place(&model) + FILES as u64);
    assert_eq!(happened.calls(&call("HandleRegister")), FILES as u64);
    assert_eq!(happened.calls(&call("HandleDeregister")), FILES as u64);
    assert_eq!(happened.calls(&call("DriverOpen")), 1);
    let (registered, deregistered) =
        (happened.calls(&call("BufRegister")), happened.calls(&call("BufDeregister")));
    assert!(registered > 0 && registered == deregistered);
    assert_eq!(happened.calls("storage_compatible_reads"), 0);
    drop(loaded);

    // The library stays open for the next load, and closes with the devices.
    drop(model.load(&options(Preference::Required)).unwrap());
    assert_eq!(sim.report().calls(&call("DriverOpen")), 1);
    assert_direct_and_clean(&sim, "two loads");
    assert_eq!(sim.report().calls(&call("DriverClose")), 1);
}

/// Counts the reads that storage does.
fn in_place(model: &Model) -> u64 {
    let plan = model.plan(&options(Preference::Required)).unwrap();
    let is_in_place =
        |read: &&tensorhaul_plan::Read| matches!(read.target, tensorhaul_plan::Target::InPlace(_));
    plan.reads().iter().filter(is_in_place).count() as u64
}

#[test]
fn batches_take_one_call_for_many_reads() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    if is_amd() {
        return; // Its library has no batches that could be waited for.
    }
    let sim = machine("");
    drop(model.load(&options(Preference::Required).direct_mode(DirectMode::Batch { entries: 64 })).unwrap());
    let happened = sim.report();
    assert_eq!(happened.calls(&call("BatchRead")), in_place(&model));
    assert!(happened.calls(&call("BatchIOSubmit")) < in_place(&model) / 2, "{:?}", happened.calls);
    assert_eq!(happened.calls(&call("Read")), FILES as u64, "only the files are tried so");
    sim.assert_clean("batches");
}

#[test]
fn without_it_nothing_of_it_is_opened() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = machine("");
    let loaded = model.load(&options(Preference::Off)).unwrap();
    assert_eq!(loaded.report.bytes_direct_storage, 0);
    assert_eq!(sim.report().calls(&call("DriverOpen")), 0);
}

#[test]
fn checksums_are_of_what_arrived() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = machine("direct_short=3");
    let staged = model.load(&options(Preference::Off).checksums(true)).unwrap().report.checksums;
    let direct = model.load(&options(Preference::Required).checksums(true)).unwrap().report.checksums;
    assert!(staged.is_some());
    assert_eq!(staged, direct);
    assert_direct_and_clean(&sim, "checksums");
}

#[test]
fn what_the_page_cache_holds_is_copied_from_there_unless_direct_storage_is_required() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let hot = folder.path().join("part-1.safetensors");
    std::fs::read(hot).unwrap();
    let sim = machine("");
    let loaded = model.load(&options(Preference::Preferred)).unwrap();
    assert_same_bytes(&model, &loaded);
    assert_eq!(
        reasons(&loaded),
        [format!(
            "1 file is read through the staging ring instead of by direct storage into {}: \
                 all in the page cache, which is faster",
            id(0)
        )]
    );
    assert!(loaded.report.bytes_direct_storage > 0);
    drop(loaded);
    let loaded = model.load(&options(Preference::Required)).unwrap();
    assert_eq!(reasons(&loaded), [""; 0]);
    drop(loaded);
    assert_direct_and_clean(&sim, "hot");
}

#[test]
fn a_cancelled_load_leaves_nothing_behind() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    for mode in [DirectMode::Threads { count: 2 }, DirectMode::Batch { entries: 2 }] {
        evict_all(folder.path());
        let sim = machine(&format!("slow={}:5;slow={}:5", call("Read"), call("BatchRead")));
        let mut stream = model.stream(&options(Preference::Required).direct_mode(mode)).unwrap();
        let first = stream.next().unwrap();
        drop(stream);
        drop(first);
        sim.assert_clean("a stream dropped after its first tensor");
    }
}
