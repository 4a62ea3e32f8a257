//! What the runtime says of a device, or why there is none.

use std::ffi::{CStr, c_int};
use std::fs::File;
use std::io::ErrorKind;

use tensorhaul_device::gpu::{CallError, DeviceFacts, call::text};

use crate::driver::Rocm;
use crate::sys;

impl Rocm {
    /// Returns what a device is, without a queue on it.
    pub(crate) fn facts(&self, ordinal: u32) -> Result<DeviceFacts, CallError> {
        let device = ordinal as sys::Device;
        let mut total = 0usize;
        // SAFETY: writes one integer.
        self.check("hipDeviceTotalMem", unsafe { (self.table.hipDeviceTotalMem)(&raw mut total, device) })?;
        let architecture = self.architecture(device)?;
        // Features follow, which the code objects do not depend on.
        let architecture = architecture.split(':').next().unwrap_or_default().to_owned();
        let name = text(|buffer, len| {
            // SAFETY: writes at most `len` bytes.
            self.check("hipDeviceGetName", unsafe { (self.table.hipDeviceGetName)(buffer, len, device) })
        })?;
        let pci_bus_id = text(|buffer, len| {
            // SAFETY: as above.
            self.check("hipDeviceGetPCIBusId", unsafe {
                (self.table.hipDeviceGetPCIBusId)(buffer, len, device)
            })
        });
        let attribute = self.attribute(sys::ATTRIBUTE_INTEGRATED, device)? != 0;
        Ok(DeviceFacts {
            integrated: attribute || is_mi300a(&architecture, &name),
            // Where the table of names is not installed, a device has none.
            name: if name.is_empty() { format!("AMD {architecture}") } else { name },
            total_bytes: total as u64,
            pci_bus_id: pci_bus_id.unwrap_or_default(),
            architecture,
            processor_count: self.attribute(sys::ATTRIBUTE_MULTIPROCESSOR_COUNT, device)?.max(0) as u32,
            host_node: self.host_node(device),
            reads_pinned: self.attribute(sys::ATTRIBUTE_CAN_MAP_HOST_MEMORY, device)? != 0,
        })
    }

    /// Returns the host's memory node nearest to a device. Older runtimes do not know the attribute; -1 is a system without nodes.
    fn host_node(&self, device: sys::Device) -> Option<u32> {
        self.attribute(sys::ATTRIBUTE_HOST_NUMA_ID, device).ok()?.try_into().ok()
    }

    fn attribute(&self, attribute: c_int, device: sys::Device) -> Result<c_int, CallError> {
        let mut value = 0;
        // SAFETY: writes one integer.
        let code = unsafe { (self.table.hipDeviceGetAttribute)(&raw mut value, attribute, device) };
        self.check("hipDeviceGetAttribute", code)?;
        Ok(value)
    }

    /// Returns the architecture as HIP writes it: `gfx942:sramecc+:xnack-`.
    fn architecture(&self, device: sys::Device) -> Result<String, CallError> {
        let mut properties = Box::new(sys::Properties([0; _]));
        let offset = if let Some(describe) = self.table.hipGetDevicePropertiesR0600 {
            // SAFETY: writes one struct, for which there is room.
            let code = unsafe { describe(&raw mut *properties, device) };
            self.check("hipGetDevicePropertiesR0600", code)?;
            sys::ARCHITECTURE_OFFSET_R0600
        } else if let Some(describe) = self.table.hipGetDeviceProperties {
            // SAFETY: as above.
            let code = unsafe { describe(&raw mut *properties, device) };
            self.check("hipGetDeviceProperties", code)?;
            sys::ARCHITECTURE_OFFSET
        } else {
            return Ok(String::new());
        };
        let name = CStr::from_bytes_until_nul(&properties.0[offset..][..256]).unwrap_or_default();
        Ok(name.to_string_lossy().into_owned())
    }
}

/// Returns the likely cause where the runtime is there and sees no device.
pub(crate) fn why_no_device() -> &'static str {
    match File::options().read(true).write(true).open(KERNEL_DRIVER) {
        Ok(_) => "ROCm is installed, but it sees no GPU (HIP_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES?)",
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            "/dev/kfd cannot be opened: add the user to the groups render and video, in a container with --group-add"
        }
        Err(_) => {
            "there is no /dev/kfd: the amdgpu kernel module is not loaded, or this container was started without \
             --device=/dev/kfd --device=/dev/dri"
        }
    }
}

/// Tells whether a device is an MI300A, which shares the host's memory. Its architecture is also that of the MI300X, which does
/// not; and not every runtime sets the attribute for it.
fn is_mi300a(architecture: &str, name: &str) -> bool {
    architecture == "gfx942" && name.contains("MI300A")
}

/// Whoever may use AMD's GPUs for computing may open this.
const KERNEL_DRIVER: &str = "/dev/kfd";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_devices_of_one_architecture_one_shares_the_hosts_memory() {
        assert!(is_mi300a("gfx942", "AMD Instinct MI300A"));
        assert!(!is_mi300a("gfx942", "AMD Instinct MI300X"));
        assert!(!is_mi300a("gfx90a", "AMD Instinct MI250X"));
    }
}
