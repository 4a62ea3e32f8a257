//! Libraries that are opened and closed by several threads.

use std::sync::Arc;
use std::thread;

use tensorhaul::{Model, Preference};
use tensorhaul_device::Device;
use tensorhaul_direct::{Compatibility, Kernel, Library, Probe};
use tensorhaul_io::OpenFile;

use crate::{assert_direct_and_clean, assert_same_bytes, checkpoint, folder, machine, options};

#[test]
fn a_library_that_is_being_closed_is_opened_anew_once_it_is() {
    let folder = folder();
    let path = folder.path().join("file");
    std::fs::write(&path, vec![7; 10_000]).unwrap();
    let files: Arc<[OpenFile]> = Arc::from([OpenFile::open(&path).unwrap()]);
    for vendor in ["cuFile", "hipFile"] {
        let close = format!("{vendor}DriverClose");
        let sim = machine(&format!("slow={close}:200"));
        let device: Arc<dyn Device> = match vendor {
            "cuFile" => Arc::new(tensorhaul_cuda::open(0).unwrap()),
            _ => Arc::new(tensorhaul_rocm::open(0).unwrap()),
        };
        let open = || Library::open(&device, Compatibility::Allowed).unwrap();
        thread::scope(|scope| {
            let last = open();
            scope.spawn(move || drop(last));
            while sim.report().calls(&close) == 0 {
                thread::yield_now();
            }
            // Several who want it share what the first of them opens.
            let others: Vec<_> = (0..3).map(|_| scope.spawn(open)).collect();
            let others: Vec<_> = others.into_iter().map(|other| other.join().unwrap()).collect();
            assert!(others.iter().all(|other| Arc::ptr_eq(other, &others[0])));
            let probe = Probe::new(&others[0], &device).unwrap();
            drop(probe.try_file(&files, 0).unwrap());
        });
        drop(device);
        sim.assert_clean(vendor);
        let happened = sim.report();
        assert_eq!((happened.calls(&format!("{vendor}DriverOpen")), happened.calls(&close)), (2, 2));
    }
}

#[test]
fn without_nvidia_fs_cufile_is_told_to_use_p2pdma() {
    if Kernel::examine().nvidia_fs.is_some() {
        println!("skipped: nvidia-fs is loaded");
        return;
    }
    let folder = folder();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = machine("direct_p2pdma=1");
    let loaded = model.load(&options(Preference::Required)).unwrap();
    assert_same_bytes(&model, &loaded);
    drop(loaded);
    assert_direct_and_clean(&sim, "P2PDMA");
}
