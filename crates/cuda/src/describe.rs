//! What the driver says of a device.

use std::ffi::c_int;

use tensorhaul_device::gpu::{CallError, DeviceFacts, call::text};

use crate::driver::Cuda;
use crate::sys;

impl Cuda {
    /// Returns what a device is, without a context.
    pub(crate) fn facts(&self, ordinal: u32) -> Result<DeviceFacts, CallError> {
        let device = self.device(ordinal)?;
        let mut total = 0usize;
        // SAFETY: writes one integer.
        self.check("cuDeviceTotalMem", unsafe { (self.table.cuDeviceTotalMem_v2)(&raw mut total, device) })?;
        let name = text(|buffer, len| {
            // SAFETY: writes at most `len` bytes.
            self.check("cuDeviceGetName", unsafe { (self.table.cuDeviceGetName)(buffer, len, device) })
        })?;
        let pci_bus_id = text(|buffer, len| {
            // SAFETY: as above.
            self.check("cuDeviceGetPCIBusId", unsafe {
                (self.table.cuDeviceGetPCIBusId)(buffer, len, device)
            })
        });
        let (major, minor) =
            (self.attribute(sys::ATTRIBUTE_MAJOR, device)?, self.attribute(sys::ATTRIBUTE_MINOR, device)?);
        Ok(DeviceFacts {
            name,
            total_bytes: total as u64,
            pci_bus_id: pci_bus_id.unwrap_or_default(),
            architecture: format!("sm_{major}{minor}"),
            integrated: self.attribute(sys::ATTRIBUTE_INTEGRATED, device)? != 0,
            processor_count: self.attribute(sys::ATTRIBUTE_MULTIPROCESSOR_COUNT, device)?.max(0) as u32,
            host_node: self.host_node(device),
            reads_pinned: self.attribute(sys::ATTRIBUTE_CAN_MAP_HOST_MEMORY, device)? != 0,
        })
    }

    pub(crate) fn device(&self, ordinal: u32) -> Result<sys::Device, CallError> {
        let mut device = 0;
        // SAFETY: writes one integer.
        self.check("cuDeviceGet", unsafe { (self.table.cuDeviceGet)(&raw mut device, ordinal as c_int) })?;
        Ok(device)
    }

    /// Returns the host's memory node nearest to a device. Older drivers do not know the attribute; -1 is a system without nodes.
    fn host_node(&self, device: sys::Device) -> Option<u32> {
        self.attribute(sys::ATTRIBUTE_HOST_NUMA_ID, device).ok()?.try_into().ok()
    }

    fn attribute(&self, attribute: c_int, device: sys::Device) -> Result<c_int, CallError> {
        let mut value = 0;
        // SAFETY: writes one integer.
        let code = unsafe { (self.table.cuDeviceGetAttribute)(&raw mut value, attribute, device) };
        self.check("cuDeviceGetAttribute", code)?;
        Ok(value)
    }
}
