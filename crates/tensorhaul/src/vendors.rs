//! The vendors of accelerators: how each one's driver is found, and what its devices look like to the system.

use std::sync::Arc;

use tensorhaul_device::gpu::{Driver, NoDriver};
use tensorhaul_plan::DeviceId;

/// A vendor, whether or not this build has its backend.
pub(crate) struct Vendor {
    /// What its devices are called.
    pub(crate) name: &'static str,
    /// Who makes them, with an article.
    pub(crate) maker: &'static str,
    /// Loads and initializes its driver, once a process; the error is a sentence with the likely cause.
    pub(crate) driver: fn() -> Result<Arc<dyn Driver>, NoDriver>,
    /// Tells whether this process has done so.
    pub(crate) is_initialized: fn() -> bool,
    /// Where the kernel's part of the driver tells its version.
    pub(crate) module_version: &'static str,
    /// Its number on the PCI bus.
    pub(crate) pci_vendor: &'static str,
    /// How the PCI classes of devices begin that nobody buys for anything but computing or a screen of their own.
    pub(crate) pci_classes: &'static [&'static str],
    /// What to do where a device is there and its driver is not.
    pub(crate) remedy: &'static str,
}

/// Every vendor, in the order in which people look.
///
/// # Source
/// PCI Code and ID Assignment Specification: base classes 03 (display) and 12 (processing accelerators). AMD's
/// processors have displays of class 0300, which are no reason for advice; its accelerators are 0380 or 12.
pub(crate) const VENDORS: &[Vendor] = &[
    Vendor {
        name: "cuda",
        maker: "an NVIDIA",
        driver: cuda,
        is_initialized: is_cuda_initialized,
        module_version: "/sys/module/nvidia/version",
        pci_vendor: "0x10de",
        pci_classes: &["0x03", "0x12"],
        remedy: "install NVIDIA's driver; in a container, start it with --gpus all",
    },
    Vendor {
        name: "rocm",
        maker: "an AMD",
        driver: rocm,
        is_initialized: is_rocm_initialized,
        module_version: "/sys/module/amdgpu/version",
        pci_vendor: "0x1002",
        pci_classes: &["0x0380", "0x12"],
        remedy: "install ROCm and join the groups render and video; in a container, start it with --device=/dev/kfd --device=/dev/dri",
    },
];

impl Vendor {
    /// Returns the vendor of a device; `None` for the host.
    pub(crate) fn of(device: DeviceId) -> Option<&'static Vendor> {
        let name = device.to_string();
        let (name, _) = name.split_once(':')?;
        VENDORS.iter().find(|vendor| vendor.name == name)
    }
}

#[cfg(feature = "cuda")]
fn cuda() -> Result<Arc<dyn Driver>, NoDriver> {
    Ok(tensorhaul_cuda::driver()?)
}

#[cfg(feature = "cuda")]
fn is_cuda_initialized() -> bool {
    tensorhaul_cuda::is_initialized()
}

#[cfg(not(feature = "cuda"))]
fn is_cuda_initialized() -> bool {
    false
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Result<Arc<dyn Driver>, NoDriver> {
    Err(NoDriver::Missing("not in this build: the feature cuda is off".to_owned()))
}

#[cfg(feature = "rocm")]
fn rocm() -> Result<Arc<dyn Driver>, NoDriver> {
    Ok(tensorhaul_rocm::driver()?)
}

#[cfg(feature = "rocm")]
fn is_rocm_initialized() -> bool {
    tensorhaul_rocm::is_initialized()
}

#[cfg(not(feature = "rocm"))]
fn is_rocm_initialized() -> bool {
    false
}

#[cfg(not(feature = "rocm"))]
fn rocm() -> Result<Arc<dyn Driver>, NoDriver> {
    Err(NoDriver::Missing("not in this build: the feature rocm is off".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_but_the_host_has_a_vendor() {
        let name = |device| Vendor::of(device).map(|vendor| vendor.name);
        assert_eq!(name(DeviceId::Cuda(3)), Some("cuda"));
        assert_eq!(name(DeviceId::Rocm(0)), Some("rocm"));
        assert_eq!(name(DeviceId::Host), None);
    }
}
