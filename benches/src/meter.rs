//! What a run costs: time, this process's CPU time, that of others, and memory.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// A run being measured.
pub struct Meter {
    start: Instant,
    cpu_seconds: f64,
    busy_seconds: f64,
    resident_bytes: u64,
}

/// What a run cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    /// From start to stop.
    pub seconds: f64,
    /// CPU time of all threads of this process, the kernel's work for them included.
    pub cpu_seconds: f64,
    /// Cores that other processes kept busy meanwhile; near 0 or the run says little. In ticks of 10 ms.
    pub others_cores: f64,
    /// The most memory of this process during the run, above that before it; pages of files that it maps count.
    pub peak_bytes: u64,
}

impl Meter {
    /// Starts to measure.
    pub fn start() -> Meter {
        // "5" resets the peak (proc_pid_clear_refs(5)); where it is refused, `peak_bytes` is that of the process.
        let _ = fs::write("/proc/self/clear_refs", "5");
        Meter {
            resident_bytes: status_bytes("VmRSS:"),
            busy_seconds: busy_seconds(),
            cpu_seconds: cpu_seconds(),
            start: Instant::now(),
        }
    }

    /// Ends the run.
    pub fn stop(self) -> Cost {
        let seconds = self.start.elapsed().as_secs_f64();
        let cpu_seconds = cpu_seconds() - self.cpu_seconds;
        let others_seconds = busy_seconds() - self.busy_seconds - cpu_seconds;
        Cost {
            seconds,
            cpu_seconds,
            others_cores: (others_seconds / seconds).max(0.0),
            peak_bytes: status_bytes("VmHWM:").saturating_sub(self.resident_bytes),
        }
    }
}

/// Waits until other processes keep at most `cores` busy, but for a minute at most.
pub fn wait_until_quiet(cores: f64) {
    for _ in 0..if cores.is_finite() { QUIET_WAITS_MAX } else { 0 } {
        let meter = Meter::start();
        thread::sleep(QUIET_WAIT);
        if meter.stop().others_cores <= cores {
            return;
        }
    }
}

const QUIET_WAIT: Duration = Duration::from_millis(300);
const QUIET_WAITS_MAX: u32 = 200;

/// Returns the memory that a process could take without swapping.
pub fn available_bytes() -> u64 {
    kib_field("/proc/meminfo", "MemAvailable:")
}

fn status_bytes(key: &str) -> u64 {
    kib_field("/proc/self/status", key)
}

fn kib_field(path: &str, key: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Returns the time that the machine's cores were not idle, from the first line of /proc/stat: user, nice, system,
/// (idle, iowait,) irq, softirq, in ticks of which all Linux has 100 a second. Steal is the host's, not a process's.
fn busy_seconds() -> f64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields = text.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let ticks: Vec<u64> = fields.map(|field| field.parse().unwrap_or(0)).collect();
    [0, 1, 2, 5, 6].iter().filter_map(|index| ticks.get(*index)).sum::<u64>() as f64 / 100.0
}
