//! The machine a result belongs to.

use std::fs;
use std::path::Path;

use serde::Serialize;

/// What a result is kept with: another machine's figures say nothing about this one's.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// The processor's own name.
    pub processor: String,
    /// Cores this process may use.
    pub cores: usize,
    /// Memory of the machine.
    pub memory_bytes: u64,
    /// Name and release of the kernel.
    pub kernel: String,
    /// Filesystem of the checkpoint.
    pub filesystem: Option<&'static str>,
    /// When the kernel gives out huge pages.
    pub transparent_huge_pages: String,
}

impl Machine {
    /// Describes this machine, and the filesystem that `folder` is on.
    pub fn of(folder: &Path) -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, key: &str| {
            let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
            line.split_once(':').map_or("unknown", |(_, value)| value.trim()).to_owned()
        };
        let memory_kib =
            field(&read("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0u64);
        let uname = rustix::system::uname();
        Machine {
            processor: field(&read("/proc/cpuinfo"), "model name"),
            cores: cores(),
            memory_bytes: memory_kib * 1024,
            kernel: format!("{} {}", uname.sysname().to_string_lossy(), uname.release().to_string_lossy()),
            filesystem: fs::File::open(folder).ok().and_then(tensorhaul_io::probe::filesystem),
            transparent_huge_pages: read("/sys/kernel/mm/transparent_hugepage/enabled").trim().to_owned(),
        }
    }
}

/// Returns the number of cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
