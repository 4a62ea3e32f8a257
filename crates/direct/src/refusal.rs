//! Why a file is not read by direct storage.

use std::fmt;

use tensorhaul_device::DeviceError;
use tensorhaul_device::gpu::table::TableError;

use crate::vendor::Vendor;

/// Why a file is not read by direct storage. The text says what happened; [`Refusal::remedy`] what would help.
#[derive(Debug)]
#[non_exhaustive]
pub enum Refusal {
    /// The vendor's library is not there, or lacks a function.
    Library {
        /// Whose.
        vendor: Vendor,
        /// What was tried.
        error: TableError,
    },
    /// The library did not open.
    Open {
        /// Whose.
        vendor: Vendor,
        /// The call that failed.
        error: CallFailed,
        /// What the kernel says of its part.
        kernel: String,
    },
    /// The library would read through host memory behind our back.
    Compatibility {
        /// Whose.
        vendor: Vendor,
        /// How that is known.
        why: String,
    },
    /// The process was forked after the library was opened.
    Forked,
    /// The device could not give or copy the memory that a first read needs, or turned out to be lost when such a read failed.
    Device(DeviceError),
    /// The file cannot be read past the page cache at all.
    NoDirectReads {
        /// Why.
        why: String,
    },
    /// The file has not one whole page.
    TooShort {
        /// Its length.
        len_bytes: u64,
    },
    /// The library does not take the file.
    Register(CallFailed),
    /// The library opened, took the file, and failed to read it.
    FirstRead {
        /// Whose.
        vendor: Vendor,
        /// What it answered.
        why: String,
    },
    /// A first direct read and an ordinary read of the same bytes differ.
    Mismatch,
}

impl Refusal {
    /// Returns what would help, where that is known.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Refusal::Library { vendor: Vendor::Nvidia, .. } => Some(
                "install NVIDIA's libcufile (package libcufile, or the wheel nvidia-cufile), or name it in TENSORHAUL_CUFILE_LIBRARY"
                    .to_owned(),
            ),
            Refusal::Library { vendor: Vendor::Amd, .. } => {
                Some("install AMD's hipFile (ROCm 7.2 or later), or name it in TENSORHAUL_HIPFILE_LIBRARY".to_owned())
            }
            Refusal::Open { vendor: Vendor::Nvidia, .. } | Refusal::FirstRead { vendor: Vendor::Nvidia, .. } => Some(
                "load the kernel module nvidia-fs; or run a kernel with CONFIG_PCI_P2PDMA, set properties.use_pci_p2pdma to true in \
                 cufile.json, and on x86 give NVIDIA's module NVreg_RegistryDwords=\"RMForceStaticBar1=1;RmForceDisableIomapWC=1\"; \
                 NVIDIA's gdscheck -p tells more"
                    .to_owned(),
            ),
            Refusal::Open { vendor: Vendor::Amd, .. } | Refusal::FirstRead { vendor: Vendor::Amd, .. } => Some(
                "run a kernel with CONFIG_PCI_P2PDMA and amdgpu-dkms 30.20.1 or later; AMD's ais-check tells more".to_owned(),
            ),
            Refusal::Compatibility { vendor: Vendor::Nvidia, .. } => {
                Some("set properties.allow_compat_mode to false in cufile.json".to_owned())
            }
            Refusal::Compatibility { vendor: Vendor::Amd, .. } => {
                Some("start the process with HIPFILE_ALLOW_COMPAT_MODE=false".to_owned())
            }
            Refusal::Forked => Some("fork before the first load, or start processes anew (spawn)".to_owned()),
            Refusal::NoDirectReads { .. } | Refusal::Register(_) => {
                Some("keep checkpoints on local NVMe with ext4 (data=ordered) or xfs".to_owned())
            }
            Refusal::Device(_) | Refusal::TooShort { .. } | Refusal::Mismatch => None,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Library { vendor, error } => write!(f, "{}: {error}", vendor.library()),
            Refusal::Open { error, kernel, .. } => write!(f, "{error}; {kernel}"),
            Refusal::Compatibility { vendor, why } => {
                write!(
                    f,
                    "{} may read through host memory instead (compatibility mode): {why}",
                    vendor.library()
                )
            }
            Refusal::Forked => f.write_str("the process was forked after direct storage was opened"),
            Refusal::Device(error) => write!(f, "a first direct read: {error}"),
            Refusal::NoDirectReads { why } => f.write_str(why),
            Refusal::TooShort { len_bytes } => write!(f, "it has {len_bytes} bytes, not one page"),
            Refusal::Register(error) => error.fmt(f),
            Refusal::FirstRead { why, .. } => write!(f, "a first direct read into the device: {why}"),
            Refusal::Mismatch => {
                f.write_str("a first direct read into the device differs from an ordinary one")
            }
        }
    }
}

impl std::error::Error for Refusal {}

/// A call of the vendor's library that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallFailed {
    /// The call.
    pub call: String,
    /// The library's code.
    pub code: i32,
    /// The device driver's code, where that is the cause.
    pub driver_code: Option<i32>,
    /// What the code means; empty where nobody says.
    pub meaning: String,
}

impl fmt::Display for CallFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} returned {}", self.call, self.code)?;
        match (self.meaning.as_str(), self.driver_code) {
            ("", None) => Ok(()),
            (meaning, None) => write!(f, " ({meaning})"),
            (meaning, Some(code)) => write!(f, " ({meaning} {code})"),
        }
    }
}

impl std::error::Error for CallFailed {}
