//! Loads onto several devices at once, compared byte for byte, counted, and broken.

use std::collections::BTreeSet;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tensorhaul::save::{SaveOptions, SaveTensor, save};
use tensorhaul::{
    Dequantization, DeviceId, DeviceMap, Dtype, EngineChoice, ErrorKind, ExternalMemory, LoadOptions, Loaded,
    Model, Report, Request, Select,
};
use tensorhaul_device::Device;

use crate::suite::consumer::Consumer;
use crate::suite::load::checkpoint;
use crate::suite::quantized;
use crate::suite::sim::{Sim, may_not_choose_nodes};
use crate::vendor::{self, call, id};

fn model() -> (tempfile::TempDir, Model) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    (folder, model)
}

fn map(entries: &[(&str, &[DeviceId])]) -> DeviceMap {
    let entries = entries.iter().map(|(pattern, devices)| ((*pattern).to_owned(), devices.to_vec()));
    DeviceMap::new(entries).unwrap()
}

/// Layers here and there, one of them on two devices, small tensors by a glob, the rest on the last.
fn mixed() -> DeviceMap {
    map(&[
        ("f0.layers.0", &[id(0)]),
        ("f0.layers.1", &[id(1)]),
        ("f0.layers.2", &[id(1), id(0)]),
        ("f1.layers.0.w", &[id(2), id(0), id(1)]),
        ("f1.layers.1", &[id(0)]),
        ("*.scale", &[id(0), id(2)]),
        ("", &[id(2)]),
    ])
}

fn options(map: &DeviceMap) -> LoadOptions {
    LoadOptions::default().device_map(map.clone()).staging_bytes(3 << 20)
}

/// Compares every tensor on every device that the map names with the file's own bytes.
#[track_caller]
fn assert_mapped(model: &Model, map: &DeviceMap, loaded: &Loaded, what: &str) {
    let mut count = 0;
    for stored in model.checkpoint().tensors() {
        let name = stored.info.name;
        let mut devices = map.devices_of(name).unwrap().to_vec();
        devices.sort_unstable();
        let found: Vec<_> = loaded.tensors.all(name).map(|tensor| tensor.device()).collect();
        assert_eq!(found, devices, "{what}: {name}");
        let expected = model.tensor(name).unwrap();
        for device in devices {
            let tensor = loaded.tensors.get_on(name, device).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (expected.dtype(), expected.shape()));
            assert!(tensor.to_host().unwrap() == expected.bytes().unwrap(), "{what}: {name} on {device}");
            count += 1;
        }
    }
    assert_eq!(loaded.tensors.len(), count, "{what}");
}

#[test]
fn a_map_for_nothing_loads_nothing() {
    let (_folder, model) = model();
    let map = map(&[("", &[id(0), id(1)])]);
    for engine in [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring, EngineChoice::Mmap] {
        let sim = Sim::new("devices=2");
        let nothing = Request::of(Select::predicate(|_| false));
        let options = LoadOptions::default().request(nothing).device_map(map.clone()).engine(engine);
        let loaded = model.load(&options).unwrap();
        assert!(loaded.tensors.is_empty(), "{engine:?}");
        drop(loaded);
        sim.assert_clean("nothing");
    }
}

#[test]
fn every_byte_arrives_on_every_device_that_the_map_names() {
    let (_folder, model) = model();
    let configs = ["", "delay_us=300", "delay_us=300;seed=9;pools=0", "peers=0", "no_peer=0:1", "batches=0"];
    for config in configs {
        for engine in [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring, EngineChoice::Mmap] {
            let what = format!("{config:?} by {engine:?}");
            let sim = Sim::new(&format!("devices=3;{config}"));
            let loaded = model.load(&options(&mixed()).engine(engine)).unwrap();
            assert_mapped(&model, &mixed(), &loaded, &what);
            let told = loaded.report.fallbacks.iter();
            let told =
                told.filter(|told| told.what.contains("has too came through the staging ring")).count();
            assert_eq!(told > 0, config.contains("peer"), "{what}: {:?}", loaded.report.fallbacks);
            drop(loaded);
            sim.assert_clean(&what);
        }
    }
}

#[test]
fn a_report_tells_what_was_whose() {
    let (_folder, model) = model();
    let sim = Sim::new("devices=3");
    let loaded = model.load(&options(&mixed()).checksums(true)).unwrap();
    let Report { devices, promised, checksums, device, .. } = &loaded.report;
    assert_eq!(*device, [id(0), id(1), id(2)].map(|id| id.to_string()).join(", "));
    let sum = |of: fn(&tensorhaul::DeviceReport) -> u64| devices.iter().map(of).sum::<u64>();
    assert_eq!(sum(|device| device.bytes), loaded.report.bytes);
    assert_eq!(sum(|device| device.tensors), loaded.report.tensors);
    assert_eq!(sum(|device| device.target_bytes), promised.target_bytes);
    assert_eq!(sum(|device| device.reads), promised.reads);
    assert_eq!(sum(|device| device.copies), promised.copies);
    assert_eq!(sum(|device| device.peak_staging_bytes), loaded.report.peak_staging_bytes);
    assert!(loaded.report.peak_staging_bytes <= promised.peak_staging_bytes);
    assert!(promised.peak_staging_bytes <= 3 << 20);
    let from_peers = |at: usize| devices[at].bytes_from_peers;
    let len = |name| model.tensor(name).unwrap().len_bytes();
    let layer = len("f0.layers.2.w") + len("f0.layers.2.odd") + len("f0.layers.2.scale");
    assert_eq!(from_peers(0), layer + len("f1.layers.0.w"));
    assert_eq!(from_peers(1), len("f1.layers.0.w"));
    assert_eq!(from_peers(2), len("f1.layers.0.scale") + len("f1.layers.2.scale"));
    // Each tensor once, wherever and however often it is.
    assert_eq!(checksums.as_ref().unwrap().len(), model.checkpoint().len());
    drop(loaded);
    sim.assert_clean("after the report");
}

#[test]
fn what_goes_to_several_devices_is_read_once() {
    let (_folder, model) = model();
    let everywhere = DeviceMap::everything_on(vec![id(1), id(0), id(2)]).unwrap();
    let single = DeviceMap::everything_on(vec![id(1)]).unwrap();
    let read = |config: &str, map: &DeviceMap| {
        let sim = Sim::new(config);
        // With as much staging memory for the first device, so that reads are cut alike.
        let loaded = model.load(&options(map).staging_bytes((1 << 20) * map.devices().len() as u64)).unwrap();
        assert_mapped(&model, map, &loaded, config);
        let happened = sim.report();
        let copies = happened.calls(call::COPY_IN);
        let peers = happened.calls(call::COPY_PEER);
        let report = loaded.report.clone();
        drop(loaded);
        sim.assert_clean(config);
        (report, copies, peers)
    };
    let (alone, alone_copies, _) = read("devices=3", &single);
    let (fanned, fanned_copies, peer_copies) = read("devices=3", &everywhere);
    let (staged, staged_copies, no_peer_copies) = read("devices=3;peers=0", &everywhere);
    for report in [&fanned, &staged] {
        assert_eq!(report.promised.read_bytes, alone.promised.read_bytes);
        assert_eq!((report.reads, report.requests), (alone.reads, alone.requests));
    }
    assert_eq!(fanned_copies, alone_copies, "the link to the first device alone is used");
    let filled = model.checkpoint().tensors().filter(|tensor| tensor.info.len_bytes() > 0).count() as u64;
    assert_eq!(peer_copies, 2 * filled);
    assert_eq!((staged_copies, no_peer_copies), (3 * alone_copies, 0));
    assert!(staged.devices.iter().all(|device| device.bytes_from_peers == 0));
}

#[test]
fn a_copy_that_arrives_wrong_on_one_device_fails_a_load_with_checksums() {
    let (_folder, model) = model();
    let everywhere = DeviceMap::everything_on(vec![id(0), id(1), id(2)]).unwrap();
    for (config, call) in [("", call::COPY_PEER), ("peers=0", call::COPY_IN)] {
        for nth in [1, 2, 7] {
            let sim = Sim::new(&format!("devices=3;batches=0;{config};flip={call}:{nth}"));
            let options = options(&everywhere).checksums(true);
            let error = model.load(&options).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Device, "{}", error.one_line());
            assert!(error.tensor().is_some(), "{}", error.one_line());
            assert!(error.one_line().contains(": its copies differ: checksum "), "{}", error.one_line());
            sim.assert_clean("after the comparison");
        }
    }
}

/// Returns how many mappings of this process prefer a memory node, as the kernel tells it.
fn mappings_near(node: u32) -> usize {
    let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
    maps.lines().filter(|line| line.contains(&format!(" prefer:{node} "))).count()
}

#[test]
fn a_ring_lies_on_the_node_that_its_driver_names() {
    if may_not_choose_nodes() {
        return;
    }
    let (_folder, model) = model();
    let map = map(&[("f0", &[id(0)]), ("", &[id(1)])]);
    let sim = Sim::new("devices=2;host_node=0");
    assert_eq!(mappings_near(0), 0);
    let loaded = model.load(&options(&map)).unwrap();
    let nodes: Vec<_> = loaded.report.devices.iter().map(|device| device.staging_node).collect();
    assert_eq!(nodes, [Some(0), Some(0)]);
    // Neighbours of one policy are one mapping to the kernel.
    assert!(mappings_near(0) > 0, "the rings are kept for the next load");
    assert_mapped(&model, &map, &loaded, "near");
    assert_eq!(loaded.report.fallbacks, []);
    drop((loaded, sim));

    // A node that no machine has.
    let sim = Sim::new("devices=2;host_node=1023");
    for _ in 0..2 {
        let loaded = model.load(&options(&map)).unwrap();
        assert!(loaded.report.devices.iter().all(|device| device.staging_node.is_none()));
        let told: Vec<_> = loaded.report.fallbacks.iter().map(|told| told.what.clone()).collect();
        let lies = |device| {
            format!("staging memory of {device} lies on any memory node, not on node 1023, its nearest")
        };
        assert_eq!(told, [vendor::FIRST, vendor::SECOND].map(lies));
        assert_mapped(&model, &map, &loaded, "anywhere");
    }
    drop(sim);

    let sim = Sim::new("devices=2");
    let loaded = model.load(&options(&map)).unwrap();
    assert!(loaded.report.devices.iter().all(|device| device.staging_node.is_none()), "nobody knows");
    assert_eq!((mappings_near(0), &*loaded.report.fallbacks), (0, &[][..]));
    drop((loaded, sim));
}

/// Device 0 does not get on; what goes to device 1, whose bytes come after its in the plan, arrives all the same. Reads of bytes for both, which
/// this map has none of, would wait for both.
#[test]
fn devices_do_not_wait_for_each_other() {
    let (_folder, model) = model();
    let map = map(&[("f0", &[id(0)]), ("f1", &[id(1)])]);
    let sim = Sim::new("devices=2");
    let consumer = Consumer::new();
    let gate = consumer.hold();
    // A ring for each that holds less than what is for device 0.
    let options = options(&map).staging_bytes(512 << 10);
    // SAFETY: the consumer's stream is of device 0, and outlives the tensors.
    let options = unsafe { options.stream_on(id(0), consumer.stream()) };
    let mut stream = model.stream(&options).unwrap();
    let names = model.checkpoint().tensors().map(|tensor| tensor.info.name);
    let on_second: BTreeSet<_> = names.filter(|name| map.devices_of(name) == Some(&[id(1)])).collect();
    let (mut ready, mut left) = (Vec::new(), on_second.len());
    while left > 0 {
        let (name, tensor) = stream.next().unwrap().unwrap();
        // What has no bytes has nothing to wait for.
        let is_moved = on_second.contains(name.as_str()) || tensor.len_bytes() == 0;
        assert!(is_moved, "{name} is ready, though its device stands still");
        left -= usize::from(on_second.contains(name.as_str()));
        ready.push((name, tensor));
    }
    drop(gate);
    ready.extend(stream.by_ref().map(|ready| ready.unwrap()));
    assert_eq!(ready.len(), model.checkpoint().len());
    for (name, tensor) in &ready {
        assert!(tensor.to_host().unwrap() == model.tensor(name).unwrap().bytes().unwrap(), "{name}");
    }
    drop((ready, stream, consumer));
    sim.assert_clean("after both devices");
}

#[test]
fn some_on_the_host_and_some_on_devices() {
    let (_folder, model) = model();
    let map = map(&[("f0", &[DeviceId::Host]), ("f1.layers.0", &[DeviceId::Host, id(1)]), ("", &[id(0)])]);
    for config in ["devices=2", "devices=2;delay_us=200"] {
        let sim = Sim::new(config);
        for engine in [EngineChoice::Pread, EngineChoice::IoUring] {
            let loaded = model.load(&options(&map).engine(engine)).unwrap();
            assert_mapped(&model, &map, &loaded, config);
            assert!(loaded.tensors.get("f1.layers.0.w").unwrap().bytes().is_ok(), "the host comes first");
            assert!(loaded.report.bytes_in_place > 0, "reads for the host land where they belong");
            drop(loaded);
        }
        sim.assert_clean(config);
    }
}

#[test]
fn vendors_do_not_mix_and_devices_that_are_not_there_are_named() {
    let (_folder, model) = model();
    let _sim = Sim::new("devices=2");
    let refused = |map: &DeviceMap| model.load(&options(map)).unwrap_err();
    let error = refused(&map(&[("f0", &[DeviceId::Cuda(0)]), ("", &[DeviceId::Rocm(0)])]));
    assert_eq!(error.kind(), ErrorKind::BadRequest);
    assert_eq!(
        error.one_line(),
        "cuda:0 and rocm:0 are of different vendors; one load is for one, and the host"
    );
    let error = refused(&map(&[("f0", &[id(0)]), ("", &[id(7)])]));
    assert_eq!(error.device(), Some(id(7)));
    let error = refused(&map(&[("f0", &[id(0)])]));
    assert_eq!(error.kind(), ErrorKind::BadRequest);
    assert!(error.one_line().contains("f1.layers.0.w"), "{}", error.one_line());
    let error = refused(&map(&[("f2", &[id(0)]), ("", &[id(1)])]));
    assert_eq!(error.one_line(), "device map entry \"f2\" is about none of the 20 tensors");
}

#[test]
fn a_device_that_vanishes_between_plan_and_load_is_named() {
    let (_folder, model) = model();
    let sim = Sim::new("devices=3");
    model.plan_for_devices(&options(&mixed())).unwrap();
    drop(sim);
    let sim = Sim::new("devices=2");
    let error = model.load(&options(&mixed())).unwrap_err();
    assert_eq!((error.kind(), error.device()), (ErrorKind::Device, Some(id(2))));
    sim.assert_clean("after the refusal");
}

#[test]
fn a_device_without_room_is_named_before_the_first_read() {
    let (_folder, model) = model();
    let map = map(&[("f0.layers.0", &[id(0)]), ("", &[id(1)])]);
    let sim = Sim::new("devices=2;memory=4000000");
    let error = model.load(&options(&map)).unwrap_err();
    assert_eq!((error.kind(), error.device()), (ErrorKind::OutOfMemory, Some(id(1))));
    assert!(error.one_line().contains("do not fit, it has 4000000 in all"), "{}", error.one_line());
    assert_eq!(sim.report().calls(call::COPY_IN), 0);
    sim.assert_clean("after the refusal");
    // What only the allocation finds out.
    drop(sim);
    let sim = Sim::new("devices=2");
    for nth in 1..=2 {
        sim.fail(&format!("fail={}:{nth}:2", call::ALLOCATE_ORDERED));
        let error = model.load(&options(&map)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{}", error.one_line());
        assert!(error.device().is_some());
        sim.fail("");
        assert_mapped(&model, &map, &model.load(&options(&map)).unwrap(), "the next load");
        sim.assert_clean(&format!("after allocation {nth} was refused"));
    }
}

#[test]
fn a_failed_call_on_any_device_fails_the_load_on_all_and_the_next_load_works() {
    let (_folder, model) = model();
    for machine in ["devices=3", "devices=3;peers=0"] {
        let sim = Sim::new(machine);
        drop(model.load(&options(&mixed())).unwrap());
        tensorhaul::release_devices();
        let counts = sim.report().calls;
        assert!(counts.len() > 15, "{counts:?}");
        for (called, count) in &counts {
            for nth in BTreeSet::from([1, 2, 3, *count]).into_iter().filter(|nth| nth <= count) {
                let what = format!("{machine}: {called} fails at use {nth} of {count}");
                tensorhaul::release_devices();
                let before = sim.report().live;
                sim.fail(&format!("fail={called}:{nth}:1"));
                let result = model.load(&options(&mixed()));
                let may_leave = call::SURVIVED.contains(&called.as_str()) || result.is_ok();
                match result {
                    Ok(loaded) => {
                        sim.fail("");
                        assert_mapped(&model, &mixed(), &loaded, &what);
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Device, "{what}: {}", error.one_line());
                        let of_the_load = [id(0), id(1), id(2)];
                        assert!(error.device().is_some_and(|device| of_the_load.contains(&device)), "{what}");
                    }
                }
                sim.fail("");
                let again = model.load(&options(&mixed()));
                let again = again.unwrap_or_else(|error| panic!("{what}: then {}", error.one_line()));
                assert_mapped(&model, &mixed(), &again, &what);
                drop(again);
                tensorhaul::release_devices();
                let left = sim.report().live;
                assert!(may_leave || left == before, "{what}: {left:?}, before {before:?}");
                assert!(sim.report().violations.is_empty(), "{what}: {:?}", sim.report().violations);
            }
        }
    }
}

#[test]
fn a_cancelled_load_leaves_nothing_on_any_device() {
    let (_folder, model) = model();
    for config in ["delay_us=500", "delay_us_of=2:4000", "peers=0;delay_us_of=0:4000"] {
        for taken in [0, 1, 2, 3, 5, 12] {
            let sim = Sim::new(&format!("devices=3;{config}"));
            let mut stream = model.stream(&options(&mixed())).unwrap();
            let kept: Vec<_> = stream.by_ref().take(taken).map(|ready| ready.unwrap()).collect();
            drop(stream);
            for (name, tensor) in &kept {
                assert!(tensor.to_host().unwrap() == model.tensor(name).unwrap().bytes().unwrap(), "{name}");
            }
            drop(kept);
            sim.assert_clean(&format!("{config}: after the stream was dropped"));
        }
    }
}

#[test]
fn a_cancelled_load_that_dequantizes_leaves_nothing_on_any_device() {
    let folder = quantized::checkpoint();
    let model = Model::open(folder.path()).unwrap();
    let map =
        map(&[("model.layers.3", &[id(1), id(0)]), ("model.layers.5", &[id(2)]), ("", &[id(0), id(2)])]);
    let options = options(&map).dequantize(Dequantization::to(Dtype::Bf16)).staging_bytes(192 << 10);
    for config in ["delay_us_of=2:2000", "peers=0;delay_us_of=0:2000"] {
        for taken in 0..6 {
            let sim = Sim::new(&format!("devices=3;{config}"));
            let mut stream = model.stream(&options.clone().transient_bytes(256 << 10)).unwrap();
            let kept: Vec<_> = stream.by_ref().take(taken).map(|ready| ready.unwrap()).collect();
            drop(stream);
            assert_eq!(kept.len(), taken);
            drop(kept);
            sim.assert_clean(&format!("{config}: after {taken} tensors"));
        }
    }
}

/// Whatever call it is lost at, and however far behind another is: the load ends, names a device that it was for, and nobody touches memory that
/// is gone.
#[test]
fn a_device_lost_beside_a_slow_one_fails_the_load_on_all() {
    let (_folder, model) = model();
    for config in ["devices=3;delay_us_of=1:2000", "devices=3;peers=0;delay_us_of=1:2000"] {
        let sim = Sim::new(config);
        drop(model.load(&options(&mixed())).unwrap());
        let counts = sim.report().calls;
        drop(sim);
        let mut failed = 0;
        for (called, count) in counts.iter().filter(|(called, _)| !call::SURVIVED.contains(&called.as_str()))
        {
            for nth in BTreeSet::from([1, 2, *count]).into_iter().filter(|nth| nth <= count) {
                let what = format!("{config}: a device is lost at use {nth} of {count} of {called}");
                let sim = Sim::new(config);
                sim.fail(&format!("fail={called}:{nth}:700"));
                match model.load(&options(&mixed())) {
                    // Counts of what is asked again and again, or of what closes devices, are not the same twice.
                    Ok(loaded) => drop(loaded),
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Device, "{what}: {}", error.one_line());
                        let is_named =
                            error.device().is_some_and(|device| mixed().devices().contains(&device));
                        assert!(is_named, "{what}: {}", error.one_line());
                        failed += 1;
                    }
                }
                tensorhaul::release_devices();
                assert!(sim.report().violations.is_empty(), "{what}: {:?}", sim.report().violations);
            }
        }
        assert!(failed > 20, "{config}: {failed} loads failed");
    }
}

/// Whoever takes a tensor may free it at once; copies from it to other devices are behind it by then.
#[test]
fn a_tensor_may_be_dropped_as_soon_as_it_is_handed_over() {
    let (_folder, model) = model();
    let everywhere = DeviceMap::everything_on(vec![id(0), id(1), id(2)]).unwrap();
    let sim = Sim::new("devices=3;delay_us=300");
    let mut count = 0;
    for ready in model.stream(&options(&everywhere)).unwrap() {
        let (name, tensor) = ready.unwrap();
        assert!(tensor.to_host().unwrap() == model.tensor(&name).unwrap().bytes().unwrap(), "{name}");
        count += 1;
    }
    assert_eq!(count, 3 * model.checkpoint().len());
    sim.assert_clean("after the stream");
}

#[test]
fn quantized_tensors_become_the_same_numbers_on_every_device() {
    let folder = quantized::checkpoint();
    let model = Model::open(folder.path()).unwrap();
    let dequantize = |options: LoadOptions| options.dequantize(Dequantization::to(Dtype::Bf16));
    let on_host = dequantize(LoadOptions::default());
    let needed_bytes = model.plan(&on_host).unwrap().promised().needed_bytes;
    let expected = model.load(&on_host).unwrap().tensors;
    let layers: Vec<_> = (0..6).map(|layer| format!("model.layers.{layer}")).collect();
    let devices: [&[DeviceId]; 6] =
        [&[id(0)], &[id(1)], &[id(2)], &[id(1), id(0)], &[id(0)], &[id(2), id(1)]];
    let map = DeviceMap::new(layers.into_iter().zip(devices.map(<[_]>::to_vec))).unwrap();
    for config in ["", "delay_us=200", "peers=0;delay_us=200;seed=3"] {
        for engine in [EngineChoice::Pread, EngineChoice::IoUring] {
            let sim = Sim::new(&format!("devices=3;{config}"));
            let options = dequantize(options(&map)).staging_bytes(192 << 10).engine(engine);
            // Room for two layers' codes, so that places in it are taken again.
            let loaded = model.load(&options.transient_bytes(256 << 10)).unwrap();
            let count: usize = expected.iter().map(|(name, _)| map.devices_of(name).unwrap().len()).sum();
            assert_eq!(loaded.tensors.len(), count);
            assert_eq!(loaded.report.promised.needed_bytes, needed_bytes, "each source is read once");
            for (name, tensor) in loaded.tensors.iter() {
                let expected = expected.get(name).unwrap();
                assert_eq!((tensor.dtype(), tensor.shape()), (expected.dtype(), expected.shape()));
                assert!(map.devices_of(name).unwrap().contains(&tensor.device()), "{name}");
                assert!(tensor.to_host().unwrap() == expected.bytes().unwrap(), "{config}: {name}");
            }
            let first = loaded.tensors.get("model.layers.3.mlp.up_proj.weight").unwrap();
            assert_eq!(first.device(), id(0));
            drop(loaded);
            sim.assert_clean(config);
        }
    }
}

#[test]
fn an_automatic_map_fills_devices_by_what_is_free() {
    let (_folder, model) = model();
    let sim = Sim::new("devices=3;memory=9000000");
    let devices = [id(0), id(1), id(2)];
    let everything = LoadOptions::default();
    let map = model.device_map(&everything, &devices).unwrap();
    assert_eq!(map.devices(), devices);
    let loaded = model.load(&options(&map)).unwrap();
    assert_mapped(&model, &map, &loaded, "automatic");
    // The devices are fuller now, by what was just loaded.
    let error = model.device_map(&everything, &devices[..1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    let text = error.one_line();
    assert!(text.contains("do not fit") && text.contains(&format!("{} takes ", vendor::FIRST)), "{text}");
    drop(loaded);
    sim.assert_clean("after the automatic map");
}

#[test]
fn the_callers_own_memory_is_given_for_each_device() {
    let (_folder, model) = model();
    let sim = Sim::new("devices=2");
    let name = "f0.layers.1.w";
    let len_bytes = model.tensor(name).unwrap().len_bytes();
    let map = DeviceMap::everything_on(vec![id(0), id(1)]).unwrap();
    let devices = [0, 1].map(|ordinal| vendor::open(ordinal).unwrap());
    let memory = |ordinal: usize| {
        let allocation = devices[ordinal].allocate(len_bytes).unwrap();
        let address = allocation.address();
        // SAFETY: the allocation is the owner, and nobody else's.
        (address, unsafe {
            ExternalMemory::device(devices[ordinal].id(), address, len_bytes, Arc::new(allocation))
        })
    };
    let ((first, for_first), (second, for_second)) = (memory(0), memory(1));
    let given = options(&map).target(name, for_first).target(name, for_second);
    let loaded = model.load(&given).unwrap();
    assert_mapped(&model, &map, &loaded, "given");
    let address = |device| loaded.tensors.get_on(name, device).unwrap().address();
    assert_eq!([address(id(0)), address(id(1))], [first, second]);
    drop((loaded, given));
    let dangling = NonNull::<u8>::without_provenance(NonZero::new(4096).unwrap());
    // SAFETY: never written to, because it is refused.
    let of_the_host = unsafe { ExternalMemory::host(dangling, len_bytes, Arc::new(())) };
    let error = model.load(&options(&map).target(name, of_the_host)).unwrap_err();
    let (first, second) = (vendor::FIRST, vendor::SECOND);
    assert_eq!(
        error.one_line(),
        format!("tensor {name:?}: the memory given is of host, the load is for {first} and {second}")
    );
    drop(devices);
    sim.assert_clean("after the caller's own memory");
}

/// Layers of few and many bytes, each with a scale, one after the other in one file.
fn uneven_layers(folder: &std::path::Path) -> Model {
    let sizes = [60u64, 5, 400, 16, 60, 32, 8, 1500, 60, 60, 5, 32, 16, 400, 60, 8, 60, 5, 32, 60];
    let codes: Vec<u8> =
        (0..1501 * 1024u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 25) as u8 & 0x7b).collect();
    let scale = 0.5f32.to_le_bytes();
    let tensor = |name: String, dtype, shape: Vec<u64>, bytes: &'static [u8]| SaveTensor {
        name,
        dtype,
        shape,
        bytes: Box::new(bytes),
    };
    let (codes, scale): (&[u8], &[u8]) = (codes.leak(), scale.to_vec().leak()); // For the life of the test's process.
    let tensors = sizes.iter().enumerate().flat_map(|(layer, rows)| {
        let len_bytes = *rows as usize * 1024;
        let name = |part: &str| format!("model.layers.{layer}.up_proj.{part}");
        let from = layer * 7;
        [
            tensor(name("weight"), Dtype::F8E4m3, vec![*rows, 1024], &codes[from..from + len_bytes]),
            tensor(name("weight_scale"), Dtype::F32, vec![1], scale),
        ]
    });
    save(folder, tensors.collect(), &SaveOptions::default()).unwrap();
    let config = r#"{"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}"#;
    std::fs::write(folder.join("config.json"), config).unwrap();
    Model::open(folder).unwrap()
}

#[test]
fn reads_for_several_devices_wait_for_what_lies_where_they_land_on_each() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = uneven_layers(folder.path());
    let dequantize = |options: LoadOptions| options.dequantize(Dequantization::to(Dtype::Bf16));
    let expected = model.load(&dequantize(LoadOptions::default())).unwrap().tensors;
    let layers: BTreeSet<u32> =
        expected.iter().map(|(name, _)| name.split('.').nth(2).unwrap().parse().unwrap()).collect();
    for (config, salt) in
        [("", 1u32), ("delay_us=300;seed=5", 2), ("peers=0", 3), ("peers=0;delay_us=300;seed=7", 4)]
    {
        let sim = Sim::new(&format!("devices=2;{config}"));
        let of = |layer: &u32| match layer.wrapping_mul(2_654_435_761).wrapping_add(salt * 77) >> 3 & 3 {
            0 => vec![id(0), id(1)],
            1 => vec![id(1), id(0)],
            device => vec![id(device - 2)],
        };
        let entries = layers.iter().map(|layer| (format!("model.layers.{layer}"), of(layer)));
        let map = DeviceMap::new(entries).unwrap();
        for staging_bytes in [64 << 10, 1 << 20] {
            let options = dequantize(options(&map)).staging_bytes(staging_bytes);
            // Little more than the largest layer's codes.
            let loaded = model.load(&options.transient_bytes(1560 << 10)).unwrap();
            for (name, tensor) in loaded.tensors.iter() {
                let expected = expected.get(name).unwrap().bytes().unwrap();
                assert!(tensor.to_host().unwrap() == expected, "{config}: {name} on {}", tensor.device());
            }
        }
        sim.assert_clean(config);
    }
}

#[test]
fn a_callback_that_panics_frees_nothing_that_another_device_still_reads() {
    let (_folder, model) = model();
    let map = map(&[("f0.layers", &[id(0), id(1)]), ("", &[id(0)])]);
    for calls in 1..12 {
        let sim = Sim::new("devices=2;delay_us_of=1:40000");
        let count = AtomicU32::new(0);
        let options = options(&map).on_progress(move |_| {
            assert!(count.fetch_add(1, Ordering::Relaxed) < calls, "enough of it");
        });
        let ended = catch_unwind(AssertUnwindSafe(|| model.load(&options).map(drop)));
        assert!(ended.is_err(), "{calls}");
        std::thread::sleep(Duration::from_millis(200)); // What is queued runs, or has run.
        // Staging buffers that copies may still read from are leaked.
        let violations = sim.report().violations;
        assert!(violations.is_empty(), "panicked at call {calls}: {violations:?}");
    }
}
