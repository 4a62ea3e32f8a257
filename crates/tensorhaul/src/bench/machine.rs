//! The machine that figures belong to: another's say nothing about this one.

use std::fs;

use serde::Serialize;
use tensorhaul_io::{OpenFile, probe};
use tensorhaul_plan::DeviceId;

use crate::doctor::{self, DeviceFact};

/// What figures are kept with.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Machine {
    /// This crate's version.
    pub version: &'static str,
    /// The kernel's name, release and architecture.
    pub kernel: String,
    /// The processor's own name, where it has one.
    pub processor: Option<String>,
    /// Cores that this process may use.
    pub cores: usize,
    /// Memory of the machine.
    pub memory_bytes: u64,
    /// Transparent huge pages, as in [`Doctor`](crate::doctor::Doctor).
    pub huge_pages: Option<String>,
    /// The filesystem of the first file, where it is one that matters here.
    pub filesystem: Option<&'static str>,
    /// The device and its driver.
    pub device: DeviceFact,
}

impl Machine {
    pub(super) fn of(files: &[OpenFile], device: DeviceId) -> Machine {
        let name = device.to_string();
        let fact = doctor::devices().into_iter().find(|fact| fact.name == name);
        Machine {
            version: env!("CARGO_PKG_VERSION"),
            kernel: doctor::kernel(),
            processor: processor(),
            cores: cores(),
            memory_bytes: doctor::meminfo("MemTotal").unwrap_or(0),
            huge_pages: doctor::huge_pages(),
            filesystem: files.first().and_then(|file| probe::filesystem(file.cached())),
            device: fact.unwrap_or_else(|| DeviceFact::new(name)),
        }
    }
}

/// Returns the number of cores that this process may use.
pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Returns the memory that can be had without swapping, the control group's limit considered.
pub(super) fn available_bytes() -> u64 {
    let limit = doctor::control_group_limit().unwrap_or(u64::MAX);
    doctor::meminfo("MemAvailable").unwrap_or(u64::MAX).min(limit)
}

fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
