//! Direct storage into several devices of one load.

use tensorhaul::{DeviceMap, ErrorKind, LoadOptions, Model, Preference, Request, Select};

use crate::{assert_direct_and_clean, call, checkpoint, folder, id, machine};

fn halves() -> DeviceMap {
    let (first, second) = (id(0), id(1));
    let entries = [
        ("*.layers.0.*".to_owned(), vec![first]),
        ("*.layers.1.*".to_owned(), vec![second]),
        (String::new(), vec![second, first]),
    ];
    DeviceMap::new(entries).unwrap()
}

#[test]
fn every_device_is_read_into_and_a_file_is_registered_once() {
    let folder = folder();
    checkpoint(folder.path());
    let model = Model::open(folder.path()).unwrap();
    let sim = machine("devices=2");
    for checksums in [false, true] {
        let options = LoadOptions::default()
            .device_map(halves())
            .direct_storage(Preference::Required)
            .checksums(checksums);
        let loaded = model.load(&options).unwrap();
        assert!(loaded.report.bytes_direct_storage > 0, "{:?}", loaded.report);
        for stored in model.checkpoint().tensors() {
            let name = stored.info.name;
            let expected = model.tensor(name).unwrap();
            let devices = halves().devices_of(name).unwrap().len();
            assert_eq!(loaded.tensors.all(name).count(), devices, "{name}");
            for tensor in loaded.tensors.all(name) {
                assert!(tensor.to_host().unwrap() == expected.bytes().unwrap(), "{name}");
            }
        }
        drop(loaded);
    }
    let files = model.checkpoint().files().len() as u64;
    assert_eq!(sim.report().calls(&call("HandleRegister")), 2 * files, "once a load, for both devices");
    assert_direct_and_clean(&sim, "two devices");
}

#[test]
fn a_failed_read_into_one_device_fails_the_load_and_leaves_nothing() {
    let folder = folder();
    checkpoint(folder.path());
    let model = Model::open(folder.path()).unwrap();
    // Behind the probe's reads, one for each file and device.
    let probes = 2 * model.checkpoint().files().len();
    for nth in [1, 2, 3] {
        let sim = machine(&format!("devices=2;fail={}:{}:5", call("Read"), probes + nth));
        let options = LoadOptions::default().device_map(halves()).direct_storage(Preference::Required);
        let error = model.load(&options).unwrap_err();
        assert_ne!(error.kind(), ErrorKind::Cancelled, "{error}");
        sim.fail("");
        assert!(model.load(&options).is_ok(), "the next load works");
        sim.assert_clean("a failed read");
    }
}

#[test]
fn only_files_that_storage_reads_are_tried_and_only_on_the_devices_they_are_read_into() {
    const FILES: usize = 40;
    let folder = folder();
    for file in 0..FILES {
        let data: Vec<u8> = (0..256usize << 10).map(|at| (at * (file + 3)) as u8).collect();
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![data.len()], &data).unwrap();
        let path = folder.path().join(format!("part-{file:02}.safetensors"));
        safetensors::tensor::serialize_to_file([(format!("w{file:02}"), view)], None, &path).unwrap();
        crate::evict(&path);
    }
    let model = Model::open(folder.path()).unwrap();
    let sim = machine("devices=4");
    // A tenth of the files for each of three devices and nothing for the fourth; the rest is not asked for.
    let device = |ordinal| vec![id(ordinal)];
    let entries = ["w0*", "w1*", "w2*", ""].into_iter().map(str::to_owned).zip((0..4).map(device));
    let mut request = Request::all();
    request.select = Select::Globs(["w0[0-3]", "w1[0-3]", "w2[0-3]"].map(str::to_owned).to_vec());
    let options = LoadOptions::default()
        .request(request)
        .device_map(DeviceMap::new(entries).unwrap())
        .direct_storage(Preference::Required);
    let loaded = model.load(&options).unwrap();
    assert_eq!(loaded.tensors.len(), 12);
    let happened = sim.report();
    assert_eq!(happened.calls(&call("HandleRegister")), 12, "the other files are left alone");
    assert_eq!(happened.calls(&call("Read")), 12 + 12, "one read to try, one to load");
    for (name, tensor) in loaded.tensors.iter() {
        assert!(tensor.to_host().unwrap() == model.tensor(name).unwrap().bytes().unwrap(), "{name}");
    }
    drop(loaded);
    assert_direct_and_clean(&sim, "a selection");
}
