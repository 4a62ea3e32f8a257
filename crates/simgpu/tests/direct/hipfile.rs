//! hipFile, over a device that calls itself AMD's: whole pages only, the end of a file by way of the host.

use std::any::Any;
use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use tensorhaul_device::{Allocation, Device, Stream};
use tensorhaul_direct::{Compatibility, Direct, DirectMode, Library, Probe, Refusal};
use tensorhaul_io::{
    Access, Counts, DeviceLanding, Done, Engine, Feed, Job, JobMemory, Next, OpenFile, ReadError, Sink,
};
use tensorhaul_plan::Extent;

use crate::{folder, machine};

fn device() -> Arc<dyn Device> {
    Arc::new(tensorhaul_rocm::open(0).unwrap())
}

/// Reads a file in extents of `step_bytes`, each handed out once.
struct Reads<'r> {
    len_bytes: u64,
    step_bytes: u64,
    target: &'r Arc<dyn Allocation>,
    next: AtomicU32,
    done: Mutex<BTreeSet<u32>>,
    failed: Mutex<Vec<String>>,
}

impl Feed for Reads<'_> {
    fn next(&self, _wait: bool) -> Next {
        let read = self.next.fetch_add(1, Ordering::Relaxed);
        let offset_bytes = u64::from(read) * self.step_bytes;
        if offset_bytes >= self.len_bytes {
            return Next::Done;
        }
        let len_bytes = self.step_bytes.min(self.len_bytes - offset_bytes);
        let owner: Arc<dyn Any + Send + Sync> = self.target.clone();
        // SAFETY: the range is inside the allocation, and every read has its own.
        let landing = unsafe { DeviceLanding::new(self.target.address(), offset_bytes, len_bytes, owner) };
        let extent = Extent { file: 0, offset_bytes, len_bytes };
        Next::Job(Job {
            read,
            extent,
            stride: None,
            access: Access::Direct,
            memory: JobMemory::Device(landing),
        })
    }
}

impl Sink for Reads<'_> {
    fn done(&self, done: Done) {
        assert!(self.done.lock().unwrap().insert(done.read), "one answer a job");
        if let Err(error) = done.result {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            self.failed.lock().unwrap().push(format!("{error}: {cause}"));
        }
    }

    fn lost(&self, _read: u32, error: ReadError) {
        self.failed.lock().unwrap().push(error.to_string());
    }
}

/// Reads a file of that length by hipFile, in extents of so many bytes; returns what failed, and compares what did not.
fn read_all(folder: &Path, len: usize, step_bytes: u64, mode: DirectMode) -> (Vec<String>, Counts) {
    let path = folder.join("file");
    let bytes: Vec<u8> = (0..len).map(|at| ((at * 2_654_435_761) >> 11) as u8).collect();
    std::fs::write(&path, &bytes).unwrap();
    let device = device();
    let files: Arc<[OpenFile]> = Arc::from([OpenFile::open(&path).unwrap()]);
    let library = Library::open(&device, Compatibility::Refused).unwrap();
    let file = Probe::new(&library, &device).unwrap().try_file(&files, 0).unwrap();
    let target = device.allocate_for_storage(len as u64).unwrap();
    let (direct, unregistered) =
        Direct::new(&device, &library, Arc::from([Some(file)]), vec![target.clone()], mode);
    assert!(unregistered.is_none());
    let reads = Reads {
        len_bytes: len as u64,
        step_bytes,
        target: &target,
        next: AtomicU32::new(0),
        done: Mutex::default(),
        failed: Mutex::default(),
    };
    assert_eq!(direct.name(), "hipfile");
    let (runs, why) = direct.mode();
    assert!(matches!(runs, DirectMode::Threads { .. }), "{runs:?}");
    assert_eq!(
        why.is_some(),
        matches!(mode, DirectMode::Batch { .. }),
        "AMD's batches are there and do nothing"
    );
    let counts = direct.run(&reads, &reads);
    let failed = std::mem::take(&mut *reads.failed.lock().unwrap());
    if failed.is_empty() {
        let staging = device.staging_memory(len).unwrap();
        // SAFETY: staging memory is initialized, as long, and this function's.
        let staged = unsafe { std::slice::from_raw_parts_mut(staging.as_ptr().as_ptr(), len) };
        // SAFETY: both live until the wait.
        unsafe { device.copy_back(&target, 0, staged, Stream::Copy) }.unwrap();
        device.wait(&device.record(Stream::Copy).unwrap()).unwrap();
        assert!(staged == bytes, "{len} bytes in {step_bytes}, {mode:?}");
    }
    (failed, counts)
}

/// Run in a process whose environment turns the fallback off, and in one where it does not.
#[test]
#[ignore = "run by the tests of processes, with another environment"]
fn whole_pages_are_read_by_storage_and_the_rest_by_the_host() {
    let folder = folder();
    for config in ["", "direct_short=3"] {
        for mode in [DirectMode::Threads { count: 3 }, DirectMode::Batch { entries: 3 }] {
            for len in [4096, 4097, 8191, 100_000, 1 << 20] {
                let sim = machine(config);
                let (failed, counts) = read_all(folder.path(), len, 64 << 10, mode);
                assert_eq!(failed, [""; 0], "{len} {mode:?}");
                let happened = sim.report();
                assert_eq!(happened.calls("storage_compatible_reads"), 0);
                assert_eq!(counts.requests, len.div_ceil(64 << 10) as u64);
                if config.is_empty() {
                    let calls = (len / 4096 * 4096).div_ceil(64 << 10) as u64;
                    assert_eq!(happened.calls("hipFileRead"), calls + 1, "the file was tried with one");
                }
                sim.assert_clean("hipFile");
            }
        }
    }
    let sim = machine("fail=hipFileRead:2:22");
    let (failed, _) = read_all(folder.path(), 100_000, 64 << 10, DirectMode::default());
    assert_eq!(failed, ["reading bytes 0..65536 failed: Invalid argument (os error 22)"]);
    sim.assert_clean("a read that fails");
    drop(sim);
    let sim = machine("fail=hipFileRead:2:719");
    let (failed, _) = read_all(folder.path(), 100_000, 64 << 10, DirectMode::Threads { count: 1 });
    assert!(failed[0].starts_with("reading bytes 0..65536 failed: rocm:0: "), "{failed:?}");
    assert!(sim.report().violations.is_empty(), "its memory is lost with it, and nothing is done to that");
    drop(sim);
    let sim = machine("fail=hipFileRead:1:5008;fail=hipFileHandleRegister:2:5008");
    let device = device();
    let library = Library::open(&device, Compatibility::Refused).unwrap();
    let files: Arc<[OpenFile]> = Arc::from([OpenFile::open(&folder.path().join("file")).unwrap()]);
    let refusal = || Probe::new(&library, &device).unwrap().try_file(&files, 0).err().unwrap();
    assert!(matches!(refusal(), Refusal::FirstRead { .. }));
    assert!(matches!(refusal(), Refusal::Register(_)));
    drop((library, device));
    sim.assert_clean("a file that is refused");
    println!("probe: read");
}

#[test]
fn its_fallback_is_recognised_and_refused_unless_it_is_asked_for() {
    let folder = folder();
    let path = folder.path().join("file");
    std::fs::write(&path, vec![7; 10_000]).unwrap();
    let sim = machine("direct=0");
    let device = device();
    let refusal = Library::open(&device, Compatibility::Refused).err().unwrap();
    assert!(matches!(refusal, Refusal::Compatibility { .. }), "{refusal}");
    assert_eq!(
        refusal.to_string(),
        "hipFile may read through host memory instead (compatibility mode): it cannot be told otherwise but by \
         HIPFILE_ALLOW_COMPAT_MODE=false"
    );
    assert_eq!(refusal.remedy().unwrap(), "start the process with HIPFILE_ALLOW_COMPAT_MODE=false");
    assert_eq!(sim.report().live["live.storage_opened"], 0);

    let library = Library::open(&device, Compatibility::Allowed).unwrap();
    let files: Arc<[OpenFile]> = Arc::from([OpenFile::open(&path).unwrap()]);
    let file = Probe::new(&library, &device).unwrap().try_file(&files, 0).unwrap();
    assert_eq!(sim.report().calls("storage_compatible_reads"), 1);
    let mut byte = [0];
    files[0].cached().read_exact_at(&mut byte, 0).unwrap();
    drop((file, library, device));
    sim.assert_clean("asked for");
}

#[test]
fn a_filesystem_that_refuses_direct_reads_is_told_by_its_answer() {
    // sysfs opens nothing with O_DIRECT, and says that its files are a page long.
    let files: Arc<[OpenFile]> =
        Arc::from([OpenFile::open(Path::new("/sys/kernel/mm/transparent_hugepage/enabled")).unwrap()]);
    let sim = machine("");
    let nvidia: Arc<dyn Device> = Arc::new(tensorhaul_cuda::open(0).unwrap());
    for (device, call) in [(nvidia, "cuFileHandleRegister"), (device(), "hipFileHandleRegister")] {
        let library = Library::open(&device, Compatibility::Allowed).unwrap();
        let refusal = Probe::new(&library, &device).unwrap().try_file(&files, 0).err().unwrap();
        assert!(matches!(refusal, Refusal::NoDirectReads { .. }), "{refusal}");
        assert!(refusal.to_string().contains("Invalid argument"), "{refusal}");
        assert!(refusal.remedy().unwrap().contains("ext4"));
        assert_eq!(sim.report().calls(call), 0);
    }
    sim.assert_clean("sysfs");
}
