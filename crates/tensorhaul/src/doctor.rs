//! What this machine gives a loader: facts, and what to do about what is missing.

mod devices;
mod folders;
mod peers;
mod place;
mod storage;

use std::env;
use std::fs;
use std::path::PathBuf;
use std::thread;

use rustix::process::{Resource, getrlimit};
use serde::Serialize;
use tensorhaul_io::probe;

pub use devices::{DeviceFact, DriverFact, KernelFact, PciLink};
pub(crate) use devices::{devices, has_device_of};
pub use folders::Folder;
pub use peers::{PeerFact, Reach};
pub use place::PciPlace;
pub use storage::{DirectFolder, DirectStorageFact};

pub use crate::link::CopySpeed;

use crate::error::Result;
use crate::options::STAGING_BYTES_DEFAULT;
use folders::nameless_file;

/// What this machine gives a loader.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Doctor {
    /// This crate's version.
    pub version: &'static str,
    /// The kernel's name, release and architecture.
    pub kernel: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Memory of the machine.
    pub memory_bytes: u64,
    /// Memory that can be had without swapping, if the system tells.
    pub memory_available_bytes: Option<u64>,
    /// The control group's limit, where it is less than the machine's memory.
    pub memory_limit_bytes: Option<u64>,
    /// Length of a page.
    pub page_bytes: u64,
    /// Transparent huge pages: `always`, `madvise`, `never`, or `None` where the system has none.
    pub huge_pages: Option<String>,
    /// Whether `io_uring` works.
    pub io_uring: Feature,
    /// Whether a staging ring of the default size can be registered with it.
    pub registered_buffers: Feature,
    /// Whether cachestat(2) tells what the page cache holds.
    pub cachestat: Feature,
    /// RLIMIT_MEMLOCK; `None` is no limit.
    pub locked_memory_limit_bytes: Option<u64>,
    /// RLIMIT_NOFILE; `None` is no limit.
    pub open_files_limit: Option<u64>,
    /// Where checkpoints are read from, and how they can be read.
    pub folders: Vec<Folder>,
    /// The vendors' drivers, found or not.
    pub drivers: Vec<DriverFact>,
    /// The devices this build can load onto, and those it cannot.
    pub devices: Vec<DeviceFact>,
    /// Which devices copy from each other's memory without the host, where there are several of a vendor.
    pub peers: Vec<PeerFact>,
    /// Direct storage, for each device that works and is not the host.
    pub direct_storage: Vec<DirectStorageFact>,
    /// What would make loads faster or possible, most important first; empty when nothing is missing.
    pub advice: Vec<Advice>,
}

/// Something that works or does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Feature {
    /// Whether it works; found out by using it.
    pub works: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Advice {
    /// What is missing, and what it costs.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

impl Doctor {
    /// Examines the machine, the current folder and the Hugging Face cache. Takes some milliseconds, and some tenths of
    /// a second for each device that has to be opened, or seconds where a library for direct storage is; leaves nothing behind.
    pub fn examine() -> Doctor {
        Doctor::of(folders::usual())
    }

    /// Examines the machine and these folders or files, instead of the usual folders.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) for the first that is not there.
    pub fn examine_paths(paths: &[PathBuf]) -> Result<Doctor> {
        Ok(Doctor::of(folders::given(paths)?))
    }

    fn of(folders: Vec<Folder>) -> Doctor {
        let memory_bytes = meminfo("MemTotal").unwrap_or(0);
        let locked_memory_limit_bytes = getrlimit(Resource::Memlock).current;
        let mut doctor = Doctor {
            version: env!("CARGO_PKG_VERSION"),
            kernel: kernel(),
            cores: thread::available_parallelism().map_or(1, |cores| cores.get()),
            memory_bytes,
            memory_available_bytes: meminfo("MemAvailable"),
            memory_limit_bytes: control_group_limit().filter(|limit| *limit < memory_bytes),
            page_bytes: rustix::param::page_size() as u64,
            huge_pages: huge_pages(),
            io_uring: io_uring::works(),
            registered_buffers: io_uring::registers_buffers(locked_memory_limit_bytes),
            cachestat: cachestat(),
            locked_memory_limit_bytes,
            open_files_limit: getrlimit(Resource::Nofile).current,
            folders,
            drivers: devices::drivers(),
            devices: devices::devices(),
            peers: Vec::new(),
            direct_storage: Vec::new(),
            advice: Vec::new(),
        };
        let opened = devices::open(&mut doctor.devices);
        doctor.peers = peers::examine(&opened);
        doctor.direct_storage = storage::examine(&opened, &doctor.folders);
        doctor.advice = doctor.advise();
        doctor
    }

    fn advise(&self) -> Vec<Advice> {
        let mut advice = Vec::new();
        let mut add = |what: String, remedy: &str| advice.push(Advice { what, remedy: remedy.to_owned() });
        if let Some(why) = &self.io_uring.why {
            let remedy = if fs::read_to_string(IO_URING_DISABLED).is_ok_and(|value| value.trim() != "0") {
                "sysctl kernel.io_uring_disabled=0"
            } else {
                "allow the io_uring system calls in the container's seccomp profile, or use Linux 5.6 or later"
            };
            add(
                format!("io_uring does not work ({why}): threads read instead, which takes more CPU"),
                remedy,
            );
        }
        if let Some(why) = self.registered_buffers.why.as_ref().filter(|_| self.io_uring.works) {
            let what = format!(
                "a staging ring of {STAGING_BYTES_DEFAULT} bytes cannot be registered with io_uring ({why}): its pages are \
                 pinned for every read"
            );
            add(
                what,
                "raise RLIMIT_MEMLOCK (ulimit -l; in a container --ulimit memlock=-1), or give a smaller --staging",
            );
        }
        if let Some(limit) = self.open_files_limit.filter(|limit| *limit < OPEN_FILES_MIN) {
            let what = format!("{limit} files may be open: a checkpoint needs two for each of its files");
            add(what, "raise RLIMIT_NOFILE (ulimit -n 4096)");
        }
        if let Some(why) = &self.cachestat.why {
            let what =
                format!("cachestat does not work ({why}): what the page cache holds is sampled, not counted");
            add(what, "use Linux 6.5 or later, or allow cachestat in the container's seccomp profile");
        }
        if matches!(self.huge_pages.as_deref(), None | Some("never")) {
            let what =
                "no huge pages: fresh memory is slower to touch, a private load by up to half".to_owned();
            add(what, "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled");
        }
        advice.extend(self.drivers.iter().filter_map(DriverFact::advise));
        advice.extend(self.devices.iter().filter_map(devices::advise_repair));
        advice.extend(self.devices.iter().filter_map(devices::advise));
        advice.extend(storage::advise(&self.direct_storage));
        advice.extend(self.folders.iter().filter_map(Folder::advise));
        advice
    }
}

impl Feature {
    fn new(result: Result<(), String>) -> Feature {
        Feature { works: result.is_ok(), why: result.err() }
    }
}

/// The kernel's name, release and architecture.
pub(crate) fn kernel() -> String {
    let kernel = rustix::system::uname();
    let parts = [kernel.sysname(), kernel.release(), kernel.machine()];
    parts.map(|part| part.to_string_lossy().into_owned()).join(" ")
}

/// A value of /proc/meminfo, which counts in units of 1024 bytes.
pub(crate) fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The limit of this process's control group: version 2 of the hierarchy, as seen from inside a container.
pub(crate) fn control_group_limit() -> Option<u64> {
    fs::read_to_string("/sys/fs/cgroup/memory.max").ok()?.trim().parse().ok()
}

pub(crate) fn huge_pages() -> Option<String> {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    let (_, chosen) = text.split_once('[')?;
    Some(chosen.split_once(']')?.0.to_owned())
}

#[cfg(feature = "io-uring")]
mod io_uring {
    use std::sync::Arc;

    use tensorhaul_io::Depth;
    use tensorhaul_io::uring::Uring;
    use tensorhaul_stage::{HostMemory, Layout, Ring};

    use super::{Feature, STAGING_BYTES_DEFAULT};

    pub(super) fn works() -> Feature {
        Feature::new(set_up(None).map(drop))
    }

    /// Tries it with more than the limit, not with all of a default ring, which takes 0.1 s to lock: who
    /// may lock memory at will (root) is not held to the limit.
    pub(super) fn registers_buffers(limit_bytes: Option<u64>) -> Feature {
        match limit_bytes.filter(|limit| *limit < STAGING_BYTES_DEFAULT) {
            Some(limit_bytes) => Feature::new(register(limit_bytes)),
            None => works(),
        }
    }

    fn register(limit_bytes: u64) -> Result<(), String> {
        let ring_bytes = (2 * limit_bytes).clamp(2 << 20, STAGING_BYTES_DEFAULT) as usize; // At most 256 MiB.
        let layout = Layout::new(ring_bytes, 4096).map_err(|error| error.to_string())?;
        let memory = HostMemory::allocate(layout.len_bytes()).map_err(|error| error.to_string())?;
        let uring = set_up(Some(Ring::new(memory, layout)))?;
        match &uring.registered().buffers {
            Some(Err(refused)) => Err(format!("RLIMIT_MEMLOCK is {limit_bytes} bytes: {}", refused.source)),
            _ => Ok(()),
        }
    }

    fn set_up(staging: Option<Ring>) -> Result<Uring, String> {
        Uring::new(Arc::from([]), Depth::default(), staging).map_err(|error| error.to_string())
    }
}

#[cfg(not(feature = "io-uring"))]
mod io_uring {
    use super::Feature;

    pub(super) fn works() -> Feature {
        Feature::new(Err("not in this build: the feature io-uring is off".to_owned()))
    }

    pub(super) fn registers_buffers(_: Option<u64>) -> Feature {
        works()
    }
}

/// Asks about a file of one's own: of others the system tells only who may write to them.
fn cachestat() -> Feature {
    let file = nameless_file(&env::temp_dir()).ok_or("no temporary file could be made to try it on");
    let counted = file.map(|file| probe::cached_bytes(&file, 0, 1));
    Feature::new(match counted {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err("the kernel does not have it, or forbids it".to_owned()),
        Err(why) => Err(why.to_owned()),
    })
}

const IO_URING_DISABLED: &str = "/proc/sys/kernel/io_uring_disabled";

/// The largest checkpoints have some 200 files, each open twice, beside what a server has open.
const OPEN_FILES_MIN: u64 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_examined_and_nothing_is_left_behind() {
        let folder = tempfile::tempdir_in(".").unwrap();
        let given = Doctor::examine_paths(&[folder.path().to_owned()]).unwrap();
        let fact = &given.folders[0];
        assert!(fact.direct_align_bytes.is_some() != fact.why.is_some(), "{fact:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

        let doctor = Doctor::examine();
        assert!(doctor.cores > 0 && doctor.page_bytes >= 4096 && doctor.memory_bytes > 0);
        assert_eq!(doctor.io_uring.works, doctor.io_uring.why.is_none());
        assert!(doctor.devices.iter().any(|device| device.name == "host" && device.works));
        assert_eq!(doctor.folders[0].role, "current folder");
    }

    #[test]
    fn what_is_missing_comes_with_a_remedy() {
        let mut doctor = Doctor::examine();
        doctor.io_uring = Feature::new(Ok(()));
        doctor.registered_buffers = Feature::new(Err("Cannot allocate memory".to_owned()));
        doctor.open_files_limit = Some(256);
        doctor.cachestat = Feature::new(Err("Function not implemented".to_owned()));
        doctor.huge_pages = Some("never".to_owned());
        (doctor.devices, doctor.drivers, doctor.folders) = (Vec::new(), Vec::new(), Vec::new());
        doctor.direct_storage = Vec::new();
        assert_eq!(doctor.advise().len(), 4);
        doctor.io_uring = doctor.registered_buffers.clone();
        let what: Vec<String> = doctor.advise().into_iter().map(|advice| advice.what).collect();
        assert_eq!(what.len(), 4);
        assert!(what[0].starts_with("io_uring does not work"), "{what:?}");
    }
}
