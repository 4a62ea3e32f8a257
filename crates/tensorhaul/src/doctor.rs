//! What this machine gives a loader: facts, and what to do about what is missing.

use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, getrlimit};
use serde::Serialize;
use tensorhaul_io::{OpenFile, probe};

use crate::locate::cache_folder;
use crate::options::STAGING_BYTES_DEFAULT;

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
    /// Folders that checkpoints are read from, and how they can be read.
    pub folders: Vec<Folder>,
    /// The devices this build can load onto, and those it cannot.
    pub devices: Vec<DeviceFact>,
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

/// A folder that checkpoints are read from.
#[derive(Clone, Debug, Serialize)]
pub struct Folder {
    /// Its path.
    pub path: String,
    /// What it is to the loader.
    pub role: &'static str,
    /// The filesystem it is on, where it is one that matters here.
    pub filesystem: Option<&'static str>,
    /// What offsets, lengths and addresses of direct reads are multiples of; `None` where there are none.
    pub direct_align_bytes: Option<u64>,
    /// Why files here are not read directly, or why nothing is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A device, or a kind of device of which there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DeviceFact {
    /// Its name, as in `--device`.
    pub name: String,
    /// Whether tensors can be loaded onto it.
    pub works: bool,
    /// Why not, with the likely cause.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What it is called and its architecture.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Memory in all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// Speed and width of its PCI Express link, now and at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// The driver's library and version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
}

impl DeviceFact {
    fn new(name: impl Into<String>) -> DeviceFact {
        DeviceFact { name: name.into(), ..DeviceFact::default() }
    }
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
    /// Examines the machine. Takes some milliseconds; leaves nothing behind.
    pub fn examine() -> Doctor {
        let kernel = rustix::system::uname();
        let text = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
        let memory_bytes = meminfo("MemTotal").unwrap_or(0);
        let locked_memory_limit_bytes = getrlimit(Resource::Memlock).current;
        let mut doctor = Doctor {
            version: env!("CARGO_PKG_VERSION"),
            kernel: format!(
                "{} {} {}",
                text(kernel.sysname()),
                text(kernel.release()),
                text(kernel.machine())
            ),
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
            folders: folders(),
            devices: devices(),
            advice: Vec::new(),
        };
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
        advice
    }
}

impl Feature {
    fn new(result: Result<(), String>) -> Feature {
        Feature { works: result.is_ok(), why: result.err() }
    }
}

/// A value of /proc/meminfo, which counts in units of 1024 bytes.
fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The limit of this process's control group: version 2 of the hierarchy, as seen from inside a container.
fn control_group_limit() -> Option<u64> {
    fs::read_to_string("/sys/fs/cgroup/memory.max").ok()?.trim().parse().ok()
}

fn huge_pages() -> Option<String> {
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

fn folders() -> Vec<Folder> {
    let current = env::current_dir().ok().map(|path| folder(path, "current folder"));
    let cache = cache_folder().map(|path| folder(path, "Hugging Face cache"));
    current.into_iter().chain(cache).collect()
}

fn folder(path: PathBuf, role: &'static str) -> Folder {
    let filesystem = File::open(&path).ok().and_then(probe::filesystem);
    let (direct_align_bytes, why) = match direct_align(&path) {
        Ok(align_bytes) => (Some(align_bytes), None),
        Err(why) => (None, Some(why)),
    };
    let path = path.to_string_lossy().into_owned();
    Folder { path, role, filesystem, direct_align_bytes, why }
}

/// Reads a file of the folder directly: a nameless one, or where none can be made, the first that is there.
fn direct_align(folder: &Path) -> Result<u64, String> {
    if !folder.is_dir() {
        return Err("there is no such folder".to_owned());
    }
    let nameless = nameless_file(folder);
    let path = match &nameless {
        Some(file) => format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        None => first_file(folder).ok_or("it cannot be written to, and holds no file to try")?,
    };
    let file = OpenFile::open(&path).map_err(|error| error.to_string())?;
    let direct = file.probe_direct().map_err(ToString::to_string)?;
    Ok(direct.align_bytes)
}

/// A page in a file that vanishes when it is closed.
fn nameless_file(folder: &Path) -> Option<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR).ok()?);
    file.write_all(&[0; 4096]).ok()?;
    Some(file)
}

fn first_file(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.take(ENTRIES_MAX).flatten();
    entries
        .map(|entry| entry.path())
        .find(|path| path.metadata().is_ok_and(|file| file.is_file() && file.len() > 0))
}

fn devices() -> Vec<DeviceFact> {
    let host = DeviceFact { works: true, ..DeviceFact::new("host") };
    let rocm = DeviceFact { why: Some("not in this build".to_owned()), ..DeviceFact::new("rocm") };
    [host].into_iter().chain(cuda_devices()).chain([rocm]).collect()
}

#[cfg(feature = "cuda")]
fn cuda_devices() -> Vec<DeviceFact> {
    use tensorhaul_device::gpu::{Driver, topology};
    let fails = |why: String| vec![DeviceFact { why: Some(why), ..DeviceFact::new("cuda") }];
    let driver = match tensorhaul_cuda::driver() {
        Ok(driver) => driver,
        Err(why) => return fails(why),
    };
    let count = match driver.device_count() {
        Ok(count) => count,
        Err(error) => return fails(error.to_string()),
    };
    let describe = |ordinal| {
        let name = driver.device_id(ordinal).to_string();
        match driver.describe(ordinal) {
            Ok(facts) => DeviceFact {
                works: true,
                description: Some(format!("{}, {}", facts.name, facts.architecture)),
                total_bytes: Some(facts.total_bytes),
                link: topology::link(&facts.pci_bus_id).map(|link| {
                    format!(
                        "{} x{} (at most {} x{})",
                        link.speed_now, link.width_now, link.speed_max, link.width_max
                    )
                }),
                driver: Some(driver.version()),
                ..DeviceFact::new(name)
            },
            Err(error) => DeviceFact { why: Some(error.to_string()), ..DeviceFact::new(name) },
        }
    };
    (0..count).map(describe).collect()
}

#[cfg(not(feature = "cuda"))]
fn cuda_devices() -> Vec<DeviceFact> {
    vec![DeviceFact {
        why: Some("not in this build: the feature cuda is off".to_owned()),
        ..DeviceFact::new("cuda")
    }]
}

const IO_URING_DISABLED: &str = "/proc/sys/kernel/io_uring_disabled";

/// The largest checkpoints have some 200 files, each open twice, beside what a server has open.
const OPEN_FILES_MIN: u64 = 1024;

/// A folder without a file among so many entries is not searched further.
const ENTRIES_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_examined_and_nothing_is_left_behind() {
        let folder = tempfile::tempdir_in(".").unwrap();
        let fact = super::folder(folder.path().to_owned(), "test");
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
        assert_eq!(doctor.advise().len(), 4);
        doctor.io_uring = doctor.registered_buffers.clone();
        let what: Vec<String> = doctor.advise().into_iter().map(|advice| advice.what).collect();
        assert_eq!(what.len(), 4);
        assert!(what[0].starts_with("io_uring does not work"), "{what:?}");
    }

    #[test]
    fn folders_in_memory_and_missing_ones_say_why() {
        let memory = folder("/dev/shm".into(), "test");
        assert_eq!(memory.filesystem, Some("tmpfs"));
        assert!(memory.why.unwrap().contains("in memory"));
        assert_eq!(folder("/nowhere".into(), "test").why.as_deref(), Some("there is no such folder"));
    }
}
