//! What `doctor` says of direct storage.

use std::path::PathBuf;

use tensorhaul::doctor::Doctor;

use crate::{folder, machine};

#[test]
fn each_folder_is_tried_and_what_is_in_the_way_is_named() {
    let folder = folder();
    let paths = [folder.path().to_owned(), PathBuf::from("/dev/shm")];
    let sim = machine("devices=2");
    let doctor = Doctor::examine_paths(&paths).unwrap();
    let [fact, second, amd, _] = doctor.direct_storage.as_slice() else {
        panic!("{:?}", doctor.direct_storage)
    };
    assert!(!amd.works && amd.remedy.as_ref().is_some_and(|remedy| remedy.contains("HIPFILE")), "{amd:?}");
    assert!(second.works && second.folders[0].verdict.works, "{second:?}");
    assert!(fact.works && fact.library.is_some() && fact.why.is_none(), "{fact:?}");
    assert_eq!((&*fact.device, fact.kind, fact.version.as_deref()), ("cuda:0", "cuFile", Some("1.14")));
    assert!(fact.kernel.contains("nvidia-fs"), "{fact:?}");
    let [disk, memory] = fact.folders.as_slice() else { panic!("{fact:?}") };
    assert!(disk.verdict.works, "{disk:?}");
    assert_eq!(memory.verdict.why.as_deref(), Some("tmpfs keeps its files in memory"));
    assert!(memory.remedy.as_ref().is_some_and(|remedy| remedy.contains("ext4")), "{memory:?}");
    sim.assert_clean("doctor");
    let json = serde_json::to_value(&doctor).unwrap();
    assert_eq!(json["direct_storage"][0]["folders"][1]["works"], false);

    drop(sim);
    let sim = machine("direct=0");
    let doctor = Doctor::examine_paths(&paths).unwrap();
    let fact = &doctor.direct_storage[0];
    assert!(!fact.works && fact.folders.is_empty());
    assert!(
        fact.why.as_ref().is_some_and(|why| why.starts_with("cuFileDriverOpen returned 5001")),
        "{fact:?}"
    );
    for word in ["nvidia-fs", "use_pci_p2pdma", "RMForceStaticBar1=1;RmForceDisableIomapWC=1"] {
        assert!(fact.remedy.as_ref().is_some_and(|remedy| remedy.contains(word)), "{word}: {fact:?}");
    }
    sim.assert_clean("no kernel driver");

    drop(sim);
    let sim = machine("devices=0");
    let doctor = Doctor::examine_paths(&paths).unwrap();
    assert!(doctor.direct_storage.is_empty());
    assert_eq!(sim.report().calls("cuFileDriverOpen"), 0);
}
