//! Everything that can stand in the way: a typed error where direct storage is required, a reason told where it is preferred.

use tensorhaul::{Compatibility, DeviceId, DirectMode, ErrorKind, Model, Preference};

use crate::{
    FILES, assert_same_bytes, checkpoint, evict_all, folder, machine, options, options_of_long_ones, reasons,
};

/// A machine, what is told of it, and for how many of the files.
const OBSTACLES: &[(&str, &str, usize)] = &[
    (
        "fail=cuFileDriverOpen:1:5033",
        "cuFileDriverOpen returned 5033 (the driver could not be set up); nvidia-fs",
        FILES,
    ),
    ("direct=0", "cuFileDriverOpen returned 5001 (its kernel driver is not loaded); nvidia-fs", FILES),
    ("direct_parameters=0", "cuFile may read through host memory instead (compatibility mode)", FILES),
    ("direct_insists=1", "cuFile may read through host memory instead (compatibility mode)", FILES),
    (
        "fail=cuFileHandleRegister:2:5008",
        "cuFileHandleRegister returned 5008 (not supported on this file)",
        1,
    ),
    ("fail=cuFileRead:1:5", "a first direct read into the device: Input/output error", 1),
    (
        "fail=cuFileRead:3:5008",
        "a first direct read into the device: cuFileRead returned 5008 (not supported on this file)",
        1,
    ),
    ("fail=cuMemAlloc_v2:1:2", "a first direct read: cuda:0: 4096 bytes do not fit", FILES),
    ("fail=cuMemAlloc_v2:1:801", "a first direct read: cuda:0: cuMemAlloc failed with 801", FILES),
];

#[test]
fn an_obstacle_is_told_and_the_rest_is_read_directly() {
    let folder = folder();
    checkpoint(folder.path());
    for (config, why, files) in OBSTACLES {
        // What a model has mapped to compare with stays in the page cache.
        let model = Model::open(folder.path()).unwrap();
        evict_all(folder.path());
        let sim = machine(config);
        let loaded = model.load(&options(Preference::Preferred)).unwrap();
        assert_same_bytes(&model, &loaded);
        let told = reasons(&loaded);
        let begin = if *files == 1 { "1 file is read".to_owned() } else { format!("{files} files are read") };
        assert!(
            told.len() == 1 && told[0].starts_with(&begin) && told[0].contains(why),
            "{config}: {told:?}"
        );
        assert_eq!(loaded.report.bytes_direct_storage > 0, *files < FILES, "{config}");
        assert_eq!(sim.report().calls("storage_compatible_reads"), 0, "{config}");
        drop(loaded);
        sim.assert_clean(config);
    }
}

#[test]
fn an_obstacle_is_an_error_where_direct_storage_is_required() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    for (config, why, files) in OBSTACLES {
        let sim = machine(config);
        let error = model.load(&options(Preference::Required)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadRequest, "{config}: {}", error.one_line());
        assert_eq!(error.file().is_some(), *files == 1, "{config}");
        let line = error.one_line();
        assert!(line.contains("direct storage is required") && line.contains(why), "{config}: {line}");
        for file in 0..FILES {
            let named = line.contains(&format!("part-{file}.safetensors"));
            assert!(named || *files == 1, "{config}: {line}");
        }
        sim.assert_clean(config);
    }
}

#[test]
fn a_read_that_fails_later_fails_the_load_with_file_and_code() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let modes = [DirectMode::default(), DirectMode::Batch { entries: 4 }];
    for (mode, call, first) in [(modes[0], "cuFileRead", FILES + 1), (modes[1], "cuFileBatchRead", 1)] {
        for nth in [first, first + 1, first + 5] {
            for (code, what) in
                [(5, "Input/output error"), (5012, "cuFileRead returned 5012 (not an address")]
            {
                let sim = machine(&format!("fail={call}:{nth}:{code}"));
                let error = model.load(&options(Preference::Required).direct_mode(mode)).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Io);
                assert!(error.file().is_some() && error.tensor().is_some() && error.bytes().is_some());
                let line = error.one_line();
                assert!(line.contains(what), "{call} {nth}: {line}");
                sim.assert_clean(&line);
                sim.fail("");
                let loaded = model.load(&options(Preference::Required).direct_mode(mode)).unwrap();
                assert_same_bytes(&model, &loaded);
                drop(loaded);
                sim.assert_clean("the next load");
            }
        }
    }
}

#[test]
fn a_read_that_fails_where_direct_storage_is_preferred_says_what_would_work() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    evict_all(folder.path());
    let remedy = "load without direct storage, through the staging ring";
    for (code, preference, is_told) in [
        (5, Preference::Preferred, true),
        (5012, Preference::Preferred, true),
        (719, Preference::Preferred, false),
        (5012, Preference::Required, false),
    ] {
        evict_all(folder.path());
        let sim = machine(&format!("fail=cuFileRead:{}:{code}", FILES + 1));
        let error = model.load(&options_of_long_ones(preference)).unwrap_err();
        let line = error.one_line();
        assert_eq!(line.contains(remedy), is_told, "{code}: {line}");
        assert!(error.tensor().is_some() && error.bytes().is_some(), "{line}");
        sim.fail("");
        let loaded = model.load(&options_of_long_ones(Preference::Off)).unwrap();
        assert_eq!(loaded.report.bytes_direct_storage, 0);
    }
}

#[test]
fn a_batch_that_cannot_be_waited_for_fails_the_load_and_is_over_once_its_reads_are() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let batches = options(Preference::Required).direct_mode(DirectMode::Batch { entries: 4 });
    for (fault, why) in [
        ("cuFileBatchIOGetStatus:1:5041", "cuFileBatchIOGetStatus returned 5041"),
        ("cuFileBatchIOGetStatus:2:5041", "cuFileBatchIOGetStatus returned 5041"),
    ] {
        let sim = machine(&format!("fail={fault}"));
        let line = model.load(&batches).unwrap_err().one_line();
        assert!(line.contains(why) && !line.contains("under way"), "{fault}: {line}");
        sim.assert_clean(fault);
    }
}

#[test]
fn a_batch_that_is_refused_or_too_large_is_told_and_the_load_goes_on() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let batches = options(Preference::Required).direct_mode(DirectMode::Batch { entries: 4 });
    let refused = "direct storage reads on threads instead of in batches: \
                   cuFileBatchIOSetUp returned 5039 (batch could not be set up)";
    let bounded =
        "direct storage reads in batches of 3, fewer than asked for: the library takes 3 reads in a batch";
    for (config, told, in_batches) in
        [("fail=cuFileBatchIOSetUp:1:5039", refused, false), ("direct_batch=3", bounded, true)]
    {
        let sim = machine(config);
        let loaded = model.load(&batches).unwrap();
        assert_same_bytes(&model, &loaded);
        assert_eq!(reasons(&loaded), [told], "{config}");
        assert_eq!(sim.report().calls("cuFileBatchRead") > 0, in_batches, "{config}");
        drop(loaded);
        sim.assert_clean(config);
    }
}

#[test]
fn a_read_in_a_batch_is_over_only_when_the_library_says_so() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let batches = options(Preference::Required).direct_mode(DirectMode::Batch { entries: 4 });
    for under_way in [0x01, 0x02] {
        let sim = machine(&format!("direct_told={under_way}:9"));
        let loaded = model.load(&batches).unwrap();
        assert_same_bytes(&model, &loaded);
        drop(loaded);
        sim.assert_clean("waiting, pending");
    }
    // These say nothing of the end, which comes after.
    for (status, why) in [(0x20, "a read in a batch timed out"), (0x80, "the unknown status 0x80")] {
        let sim = machine(&format!("direct_told={status}:3"));
        let line = model.load(&batches).unwrap_err().one_line();
        assert!(line.contains(why) && !line.contains("under way"), "{line}");
        sim.assert_clean(why);
    }
}

#[test]
fn the_error_number_of_a_thread_says_nothing_of_a_read_in_a_batch() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let batches = options(Preference::Required).direct_mode(DirectMode::Batch { entries: 4 });
    let sim = machine("fail=cuFileBatchRead:2:1");
    let line = model.load(&batches).unwrap_err().one_line();
    assert!(line.ends_with("the library does not say why"), "{line}");
    sim.assert_clean("a read in a batch that returns -1");
}

#[test]
fn a_device_lost_while_storage_reads_is_told_and_forgotten() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    for preference in [Preference::Required, Preference::Preferred] {
        // While the first or the second file is tried, and while the first or a later extent is read.
        for (nth, is_trial) in [(1, true), (2, true), (FILES + 1, false), (FILES + 4, false)] {
            evict_all(folder.path());
            let sim = machine(&format!("fail=cuFileRead:{nth}:719"));
            let error = model.load(&options_of_long_ones(preference)).unwrap_err();
            let line = error.one_line();
            assert_eq!(error.kind(), ErrorKind::Device, "{nth}: {line}");
            assert_eq!(error.device(), Some(DeviceId::Cuda(0)), "{nth}: {line}");
            assert!(error.file().is_some() && line.contains(".safetensors: "), "{nth}: {line}");
            assert!(line.contains("cuda:0: ") && line.contains("719"), "{nth}: {line}");
            let is_read = error.tensor().is_some() && error.bytes().is_some();
            assert_eq!(is_read, !is_trial, "{nth}: {line}");
            // The driver gives the device back, to whoever opens it anew.
            sim.fail("");
            let loaded = model.load(&options_of_long_ones(preference)).unwrap();
            assert!(loaded.report.bytes_direct_storage > 0);
            for (name, tensor) in loaded.tensors.iter() {
                assert!(tensor.to_host().unwrap() == model.tensor(name).unwrap().bytes().unwrap(), "{name}");
            }
            drop(loaded);
            assert_eq!(sim.report().calls("cuDevicePrimaryCtxRetain"), 1, "{nth}: opened anew");
        }
    }
}

#[test]
fn memory_that_is_not_registered_is_read_into_all_the_same_and_told() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = machine("fail=cuFileBufRegister:1:5036");
    let loaded = model.load(&options(Preference::Required)).unwrap();
    assert_same_bytes(&model, &loaded);
    let told = reasons(&loaded);
    assert!(told.len() == 1 && told[0].starts_with("direct storage reads into 1 of"), "{told:?}");
    assert!(
        told[0].ends_with("cuFileBufRegister returned 5036 (device memory cannot be pinned)"),
        "{told:?}"
    );
    drop(loaded);
    sim.assert_clean("unregistered");
}

#[test]
fn compatibility_mode_is_used_only_when_it_is_asked_for() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = machine("direct=0");
    let allowed = options(Preference::Required).direct_compatibility(Compatibility::Allowed);
    let loaded = model.load(&allowed).unwrap();
    assert_same_bytes(&model, &loaded);
    assert!(sim.report().calls("storage_compatible_reads") > 0);
    drop(loaded);
    // It is a setting of the process: who does not want it is told so, until the library was let go.
    let line = model.load(&options(Preference::Required)).unwrap_err().one_line();
    assert!(line.contains("an earlier load of this process allowed it"), "{line}");
    sim.assert_clean("compatibility");
}

#[test]
fn a_file_in_memory_is_not_read_by_storage() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = machine("");
    let line = model.load(&options(Preference::Required)).unwrap_err().one_line();
    assert!(line.contains("tmpfs keeps its files in memory"), "{line}");
    let loaded = model.load(&options(Preference::Preferred)).unwrap();
    assert_same_bytes(&model, &loaded);
    assert_eq!(reasons(&loaded).len(), 1);
    drop(loaded);
    assert_eq!(sim.report().calls("cuFileHandleRegister"), 0);
    sim.assert_clean("tmpfs");
}

#[test]
fn a_file_that_was_truncated_is_an_error_that_names_it() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let file = std::fs::File::options().write(true).open(folder.path().join("part-0.safetensors")).unwrap();
    file.set_len(1 << 20).unwrap();
    for mode in [DirectMode::default(), DirectMode::Batch { entries: 4 }] {
        let sim = machine("");
        let error = model.load(&options(Preference::Required).direct_mode(mode)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed, "{}", error.one_line());
        assert!(error.one_line().contains("it was longer when it was opened"), "{}", error.one_line());
        sim.assert_clean("truncated");
    }
}

#[test]
fn it_is_never_opened_without_a_device() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = machine("devices=0");
    for preference in [Preference::Required, Preference::Preferred] {
        assert_eq!(model.load(&options(preference)).unwrap_err().kind(), ErrorKind::Device);
    }
    sim.fail("");
    assert_eq!(sim.report().calls("cuFileDriverOpen"), 0);
    let on_host = options(Preference::Required).request(tensorhaul::Request::all());
    let line = model.load(&on_host).unwrap_err().one_line();
    assert!(line.contains("direct storage is required, and reads into devices"), "{line}");
    sim.assert_clean("no device");
}

#[test]
fn it_is_not_required_of_a_device_whose_memory_is_the_hosts() {
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = machine("integrated=1");
    let error = model.load(&options(Preference::Required)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadRequest);
    let line = error.one_line();
    let why = "direct storage is required, and reads into devices with memory of their own; the memory of cuda:0 is the host's";
    assert!(line.contains(why), "{line}");
    assert_eq!(sim.report().calls("cuFileDriverOpen"), 0);
    // Preferred, it has no use there; with memory of the device's own it has.
    let loaded = model.load(&options(Preference::Preferred)).unwrap();
    assert_eq!((loaded.report.bytes_direct_storage, reasons(&loaded).len()), (0, 0));
    drop(loaded);
    let own = options(Preference::Required).in_place(Preference::Off);
    assert!(model.load(&own).unwrap().report.bytes_direct_storage > 0);
    sim.assert_clean("memory of the host's");
}
