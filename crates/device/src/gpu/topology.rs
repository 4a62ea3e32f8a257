//! Where a device is: which processors are near, how wide its link is.

use std::fs;
use std::io;

use tensorhaul_stage::Placement;

use super::driver::DeviceFacts;
use crate::contract::Near;

/// Generation and width of a PCI Express link, now and at most.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// `32.0 GT/s PCIe`, as the system words it; links slow down when idle.
    pub speed_now: String,
    /// Lanes in use.
    pub width_now: String,
    /// The fastest both ends can do.
    pub speed_max: String,
    /// Lanes the device has.
    pub width_max: String,
}

/// Returns the memory node and the processors nearest to a device. The driver knows the node where containers hide the bus.
///
/// # Source
/// Linux, Documentation/ABI/testing/sysfs-bus-pci: `numa_node`, `local_cpulist`; sysfs-devices-node: `cpulist`.
pub fn near(facts: &DeviceFacts) -> Near {
    let on_bus = |name| attribute(&facts.pci_bus_id, name);
    // -1 is no node.
    let node = facts.host_node.or_else(|| on_bus("numa_node")?.parse().ok());
    let of_node = || system(&format!("node/node{}/cpulist", node?));
    let processors = match (on_bus("local_cpulist").or_else(of_node), system("cpu/online")) {
        (Some(near), Some(all)) if near != all => parse_list(&near),
        _ => Vec::new(),
    };
    Near { node, processors }
}

/// Tells whether the machine has memory on other nodes than this one, or none on it.
///
/// # Source
/// Linux, Documentation/ABI/stable/sysfs-devices-node: `has_memory`.
fn is_one_of_several(node: u32) -> bool {
    system("node/has_memory").is_some_and(|nodes| parse_list(&nodes) != [node])
}

/// Returns the node that the system refused to take memory from, and why. On a machine with one node there is no far: `None`.
pub fn refused(placement: Placement) -> Option<(u32, String)> {
    let Placement::Refused { node, errno } = placement else { return None };
    is_one_of_several(node).then(|| {
        let error = io::Error::from_raw_os_error(errno);
        let remedy = match error.kind() {
            io::ErrorKind::PermissionDenied => "a container needs the capability SYS_NICE for it",
            _ => "this process may have no memory of that node",
        };
        (node, format!("mbind: {error}; {remedy}"))
    })
}

/// Returns what the system says of a device's link; `None` for a device that is not on PCI Express.
///
/// # Source
/// As above: `current_link_speed`, `current_link_width`, `max_link_speed`, `max_link_width`.
pub fn link(pci_bus_id: &str) -> Option<Link> {
    let read = |name| attribute(pci_bus_id, name);
    Some(Link {
        speed_now: read("current_link_speed")?,
        width_now: read("current_link_width")?,
        speed_max: read("max_link_speed").unwrap_or_default(),
        width_max: read("max_link_width").unwrap_or_default(),
    })
}

fn system(name: &str) -> Option<String> {
    read(&format!("/sys/devices/system/{name}"))
}

fn attribute(pci_bus_id: &str, name: &str) -> Option<String> {
    // Drivers write the bus id in upper case, the file system has it in lower.
    read(&format!("/sys/bus/pci/devices/{}/{name}", pci_bus_id.to_ascii_lowercase()))
}

fn read(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// Parses `0-3,8,10-11`.
fn parse_list(text: &str) -> Vec<u32> {
    let range = |part: &str| -> Option<std::ops::RangeInclusive<u32>> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_lists_are_ranges_and_numbers() {
        assert_eq!(parse_list("0-3,8,10-11"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(parse_list(""), [0u32; 0]);
    }

    #[test]
    fn a_device_that_is_not_there_is_near_nobody() {
        let facts = DeviceFacts { pci_bus_id: "ffff:ff:1f.7".to_owned(), ..DeviceFacts::default() };
        assert_eq!(near(&facts), Near::default());
        let told = near(&DeviceFacts { host_node: Some(0), ..facts });
        assert_eq!(told.node, Some(0), "the driver's word");
        assert_eq!(link("ffff:ff:1f.7"), None);
    }
}
