//! The two vendors, and where each one's library is looked for.

use std::env;
use std::path::PathBuf;

use tensorhaul_plan::DeviceId;

/// Who made the device, and the library that reads into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// NVIDIA: cuFile.
    Nvidia,
    /// AMD: hipFile.
    Amd,
}

impl Vendor {
    /// Returns the vendor of a device; `None` for the host.
    pub fn of(device: DeviceId) -> Option<Vendor> {
        match device {
            DeviceId::Cuda(_) => Some(Vendor::Nvidia),
            DeviceId::Rocm(_) => Some(Vendor::Amd),
            _ => None,
        }
    }

    /// Returns the name of its library.
    pub fn library(self) -> &'static str {
        match self {
            Vendor::Nvidia => "cuFile",
            Vendor::Amd => "hipFile",
        }
    }

    /// Returns the name of the engine, which reports use.
    pub fn engine(self) -> &'static str {
        match self {
            Vendor::Nvidia => "cufile",
            Vendor::Amd => "hipfile",
        }
    }

    /// The names to try: the user's own, or what the vendor installs. Wheels and runtime packages have only the name that ends in
    /// `.so.0`; the one without is of development packages.
    pub(crate) fn candidates(self) -> Vec<PathBuf> {
        let (variable, names) = match self {
            Vendor::Nvidia => (
                CUFILE_LIBRARY_VARIABLE,
                ["libcufile.so.0", "libcufile.so", "/usr/local/cuda/lib64/libcufile.so.0"],
            ),
            Vendor::Amd => (
                HIPFILE_LIBRARY_VARIABLE,
                ["libhipfile.so.0", "libhipfile.so", "/opt/rocm/lib/libhipfile.so.0"],
            ),
        };
        match env::var_os(variable).filter(|path| !path.is_empty()) {
            Some(path) => vec![path.into()],
            None => names.map(PathBuf::from).to_vec(),
        }
    }
}

/// Names another cuFile library, for containers that keep it elsewhere and for tests.
pub const CUFILE_LIBRARY_VARIABLE: &str = "TENSORHAUL_CUFILE_LIBRARY";

/// Names another hipFile library.
pub const HIPFILE_LIBRARY_VARIABLE: &str = "TENSORHAUL_HIPFILE_LIBRARY";
