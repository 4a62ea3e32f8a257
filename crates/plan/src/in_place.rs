//! Which files storage can read straight into which device's memory.

use serde::Serialize;

use crate::placement::DeviceId;

/// Where storage can write straight into the memory of the result: no stop in the staging ring, no copy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct InPlace {
    /// One entry for each device that storage can write to.
    pub routes: Vec<Route>,
}

/// What storage can write straight into one device's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Route {
    /// The device.
    pub device: DeviceId,
    /// Whether each file of the checkpoint can be read straight into the device; `None`: all can.
    pub files: Option<Vec<bool>>,
    /// Whether the device's memory is the host's own: the host itself, or a device that shares it. Threads can then write there
    /// too, and what is allocated is counted as the host's.
    pub is_hosts: bool,
    /// The longest single read; a multiple of 4096.
    pub read_len_bytes_max: u64,
}

impl InPlace {
    /// Everything is staged.
    pub fn never() -> InPlace {
        InPlace::default()
    }

    /// Any file can be read straight into the host's own memory, so many bytes at once.
    pub fn host(read_len_bytes_max: u64) -> InPlace {
        InPlace::shared(DeviceId::Host, read_len_bytes_max)
    }

    /// Any file can be read straight into the memory that a device shares with the host, so many bytes at once.
    pub fn shared(device: DeviceId, read_len_bytes_max: u64) -> InPlace {
        InPlace { routes: vec![Route { device, files: None, is_hosts: true, read_len_bytes_max }] }
    }

    /// Returns how a file gets straight into a device's memory, if it can.
    pub fn route(&self, device: DeviceId, file: u32) -> Option<&Route> {
        let can = |route: &&Route| match &route.files {
            Some(files) => files.get(file as usize).copied().unwrap_or(false),
            None => true,
        };
        self.of_device(device).filter(can)
    }

    /// Tells whether storage can write any file straight into a device's memory.
    pub fn is_any(&self, device: DeviceId) -> bool {
        self.of_device(device).is_some_and(|route| match &route.files {
            Some(files) => files.contains(&true),
            None => true,
        })
    }

    /// Tells whether a device's part of the result lies in the host's own memory.
    pub fn is_hosts(&self, device: DeviceId) -> bool {
        device == DeviceId::Host || self.of_device(device).is_some_and(|route| route.is_hosts)
    }

    fn of_device(&self, device: DeviceId) -> Option<&Route> {
        self.routes.iter().find(|route| route.device == device)
    }
}
