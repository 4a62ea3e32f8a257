//! The CUDA backend: NVIDIA's driver, loaded at run time.
//!
//! Nothing of CUDA is needed to build this crate, and a machine without a driver gets an error value that
//! says so. `sys` is the table of driver functions, `driver` maps them to
//! [`tensorhaul_device::gpu::Driver`], and [`tensorhaul_device::gpu::Gpu`] does the rest.
//!
//! The table is the project's own instead of a binding crate's: those panic on a missing library or symbol,
//! fix at build time which driver's symbols are required, and clash when two of them, or two feature sets of one,
//! meet in a dependency graph. ARCHITECTURE.md has the evidence.

mod describe;
mod driver;
mod kernels;
mod sys;

use std::env;
use std::path::PathBuf;
use std::sync::Arc;

pub use driver::Cuda;
use tensorhaul_device::DeviceError;
use tensorhaul_device::gpu::{Found, Gpu, Loaded, NoDriver};
use tensorhaul_plan::DeviceId;

/// Opens a device by its ordinal in the driver's order (`CUDA_VISIBLE_DEVICES` applies).
///
/// # Errors
/// Those of [`find`]; [`DeviceError::Driver`] when a call failed.
pub fn open(ordinal: u32) -> Result<Gpu<Cuda>, DeviceError> {
    find(ordinal)?.open()
}

/// Finds a device and describes it, which makes no context on it; the first call in a process loads and initializes
/// the driver.
///
/// # Errors
/// [`DeviceError::Unavailable`] when there is no driver or no such device, with the likely cause;
/// [`DeviceError::Driver`] when a call failed.
pub fn find(ordinal: u32) -> Result<Found<Cuda>, DeviceError> {
    let unavailable =
        |why: NoDriver| DeviceError::Unavailable { device: DeviceId::Cuda(ordinal), why: why.to_string() };
    Found::new(driver().map_err(unavailable)?, ordinal)
}

/// Loads and initializes the driver, once a process.
///
/// # Errors
/// A sentence with the likely cause. In a child forked after the first call: that it was.
pub fn driver() -> Result<Arc<Cuda>, NoDriver> {
    DRIVER.get(|| Cuda::load(&candidates()))
}

/// Tells whether this process has loaded and initialized the driver: from then on its children cannot.
pub fn is_initialized() -> bool {
    DRIVER.is_loaded()
}

static DRIVER: Loaded<Cuda> = Loaded::new();

/// The names to try: the user's own, or what the driver installs.
fn candidates() -> Vec<PathBuf> {
    match env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty()) {
        Some(path) => vec![path.into()],
        None => ["libcuda.so.1", "libcuda.so", "/usr/lib/wsl/lib/libcuda.so.1"].map(PathBuf::from).to_vec(),
    }
}

/// Names another driver library, for containers that keep it elsewhere and for tests.
pub const LIBRARY_VARIABLE: &str = "TENSORHAUL_CUDA_LIBRARY";
