//! The ROCm backend: AMD's HIP runtime, loaded at run time.
//!
//! Nothing of ROCm is needed to build this crate, and a machine without a runtime gets an error value that
//! says so. `sys` is the table of HIP functions, `driver` maps them to
//! [`tensorhaul_device::gpu::Driver`], and [`tensorhaul_device::gpu::Gpu`] does the rest.
//!
//! HIP differs from CUDA's driver in ways that matter here:
//! - There are no contexts to make current, but a current device for each thread. [`Context`] is its ordinal, from 1.
//! - Two HIP runtimes in one process share neither memory nor streams, and frameworks bring their own. So the one that the
//!   process holds already is used, whatever else is installed.
//! - A failed call leaves its status behind for `hipGetLastError`, where a framework would find it. It is taken away again.
//! - A code object is for one architecture. This build has those that ARCHITECTURE.md lists; for another device hipRTC compiles
//!   the kernels when they are first needed, where it is installed. Without it such a device loads tensors but runs no operations.
//! - Copies of 1 MiB and more from pages of a mapped file stop the device's queues for as long as the runtime pins them. No
//!   such page gets here: what is copied from is staging memory, which the mmap engine fills as every other engine does, and
//!   only a ring that is pinned may be copied from, by its type. The simulated driver counts copies from anything else.
//!
//! [`Context`]: tensorhaul_device::gpu::Context

mod describe;
mod driver;
mod kernels;
mod rtc;
mod sys;

use std::env;
use std::path::PathBuf;
use std::sync::Arc;

pub use driver::Rocm;
use tensorhaul_device::DeviceError;
use tensorhaul_device::gpu::{Found, Gpu, Loaded, NoDriver};
use tensorhaul_plan::DeviceId;

/// Opens a device by its ordinal in the runtime's order (`HIP_VISIBLE_DEVICES` and `ROCR_VISIBLE_DEVICES` apply).
///
/// # Errors
/// Those of [`find`]; [`DeviceError::Driver`] when a call failed.
pub fn open(ordinal: u32) -> Result<Gpu<Rocm>, DeviceError> {
    find(ordinal)?.open()
}

/// Finds a device and describes it, which makes no queue on it; the first call in a process loads and initializes
/// the runtime.
///
/// # Errors
/// [`DeviceError::Unavailable`] when there is no runtime or no such device, with the likely cause;
/// [`DeviceError::Driver`] when a call failed.
pub fn find(ordinal: u32) -> Result<Found<Rocm>, DeviceError> {
    let unavailable =
        |why: NoDriver| DeviceError::Unavailable { device: DeviceId::Rocm(ordinal), why: why.to_string() };
    Found::new(driver().map_err(unavailable)?, ordinal)
}

/// Loads and initializes the runtime, once a process.
///
/// # Errors
/// A sentence with the likely cause. In a child forked after the first call: that it was.
pub fn driver() -> Result<Arc<Rocm>, NoDriver> {
    DRIVER.get(|| Rocm::load(&candidates()))
}

/// Tells whether this process has loaded and initialized the runtime: from then on its children cannot.
pub fn is_initialized() -> bool {
    DRIVER.is_loaded()
}

static DRIVER: Loaded<Rocm> = Loaded::new();

/// The names to try where the process holds no runtime: the user's own, or what ROCm installs, the newest first.
fn candidates() -> Vec<PathBuf> {
    match env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty()) {
        Some(path) => vec![path.into()],
        None => {
            let names = ["libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so"];
            names.into_iter().chain(["/opt/rocm/lib/libamdhip64.so"]).map(PathBuf::from).collect()
        }
    }
}

/// Names another HIP library, for containers that keep it elsewhere and for tests. A runtime that the process holds
/// already comes before it.
pub const LIBRARY_VARIABLE: &str = "TENSORHAUL_HIP_LIBRARY";
