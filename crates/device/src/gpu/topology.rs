//! Where a device is: which processors are near, how wide its link is.

use std::fs;

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

/// Returns the processors on the node of a PCI device; empty when every processor is, or the system does not say.
///
/// # Source
/// Linux, Documentation/ABI/testing/sysfs-bus-pci: `local_cpulist`.
pub fn near_processors(pci_bus_id: &str) -> Vec<u32> {
    let (near, all) =
        (attribute(pci_bus_id, "local_cpulist"), fs::read_to_string("/sys/devices/system/cpu/online"));
    match (near, all) {
        (Some(near), Ok(all)) if near != all.trim() => parse_list(&near),
        _ => Vec::new(),
    }
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

fn attribute(pci_bus_id: &str, name: &str) -> Option<String> {
    // Drivers write the bus id in upper case, the file system has it in lower.
    let path = format!("/sys/bus/pci/devices/{}/{name}", pci_bus_id.to_ascii_lowercase());
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
        assert_eq!(near_processors("ffff:ff:1f.7"), [0u32; 0]);
        assert_eq!(link("ffff:ff:1f.7"), None);
    }
}
