//! Direct storage into several devices of one load.

use tensorhaul::{DeviceId, DeviceMap, ErrorKind, LoadOptions, Model, Preference};

use crate::{checkpoint, folder, machine};

fn halves() -> DeviceMap {
    let (first, second) = (DeviceId::Cuda(0), DeviceId::Cuda(1));
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
    assert_eq!(sim.report().calls("cuFileHandleRegister"), 2 * files, "once a load, for both devices");
    sim.assert_clean("two devices");
}

#[test]
fn a_failed_read_into_one_device_fails_the_load_and_leaves_nothing() {
    let folder = folder();
    checkpoint(folder.path());
    let model = Model::open(folder.path()).unwrap();
    // Behind the probe's reads, one for each file and device.
    let probes = 2 * model.checkpoint().files().len();
    for nth in [1, 2, 3] {
        let sim = machine(&format!("devices=2;fail=cuFileRead:{}:5", probes + nth));
        let options = LoadOptions::default().device_map(halves()).direct_storage(Preference::Required);
        let error = model.load(&options).unwrap_err();
        assert_ne!(error.kind(), ErrorKind::Cancelled, "{error}");
        sim.fail("");
        assert!(model.load(&options).is_ok(), "the next load works");
        sim.assert_clean("a failed read");
    }
}
