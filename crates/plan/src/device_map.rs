//! Which tensors go to which devices.

use crate::placement::DeviceId;

/// Which tensors go to which devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceMap {
    entries: Vec<(String, Vec<DeviceId>)>,
}

impl DeviceMap {
    /// Maps names, or the modules they are in, to devices.
    pub fn new(entries: Vec<(String, Vec<DeviceId>)>) -> DeviceMap {
        DeviceMap { entries }
    }

    /// Returns where a tensor goes: the devices of the longest entry that is its name, or a module it is in.
    pub fn devices_of(&self, name: &str) -> Option<&[DeviceId]> {
        let is_in = |entry: &&(String, Vec<DeviceId>)| {
            let rest = name.strip_prefix(&entry.0);
            entry.0.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let longest = self.entries.iter().filter(is_in).max_by_key(|entry| entry.0.len());
        longest.map(|(_, devices)| devices.as_slice())
    }
}
