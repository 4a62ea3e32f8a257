//! Where a device is on the PCI bus, and the disks beside it.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// A device's place on the PCI bus.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PciPlace {
    /// Its address there: `0000:41:00.0`.
    pub bus_id: String,
    /// The host bridge above it: `pci0000:40`. What is below the same one reaches it without passing through the processor's own fabric.
    pub root: Option<String>,
    /// The disks below the same host bridge, by their names in `/dev`: those that direct storage serves best.
    pub disks: Vec<String>,
}

impl PciPlace {
    /// Looks a device up in the system's tree of devices, `/sys`; `None` when it is not there.
    ///
    /// # Source
    /// Linux, Documentation/PCI/sysfs-pci.rst, Documentation/ABI/testing/sysfs-bus-pci and sysfs-block; a disk of
    /// several controllers (native NVMe multipath) is a virtual device with a link to each.
    pub(super) fn of(sys: &Path, bus_id: &str) -> Option<PciPlace> {
        // Drivers write the bus id in upper case, the file system has it in lower.
        let bus_id = Some(bus_id.to_ascii_lowercase()).filter(|bus_id| !bus_id.is_empty())?;
        let device = fs::canonicalize(sys.join("bus/pci/devices").join(&bus_id)).ok()?;
        let root = root(&device);
        let disks = root.as_deref().map_or(Vec::new(), |root| disks(sys, root));
        Some(PciPlace { bus_id, root, disks })
    }
}

impl fmt::Display for PciPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PCI {}", self.bus_id)?;
        if let Some(root) = &self.root {
            write!(f, " below {root}")?;
        }
        if !self.disks.is_empty() {
            write!(f, " beside {}", self.disks.join(", "))?;
        }
        Ok(())
    }
}

/// Returns the host bridge in the path of a device.
fn root(device: &Path) -> Option<String> {
    let mut names = device.components().filter_map(|name| name.as_os_str().to_str());
    names.find(|name| name.starts_with("pci") && name.contains(':')).map(str::to_owned)
}

/// Returns the disks below a host bridge, sorted.
fn disks(sys: &Path, below: &str) -> Vec<String> {
    let disks = entries(&sys.join("block")).into_iter().filter(|disk| {
        let Ok(device) = fs::canonicalize(disk) else { return false };
        match root(&device) {
            Some(root) => root == below,
            None => {
                let controllers = device.parent().map_or(Vec::new(), entries);
                let controllers = controllers.iter().filter(|entry| entry.is_symlink());
                let mut roots = controllers.filter_map(|entry| root(&fs::canonicalize(entry).ok()?));
                roots.any(|root| root == below)
            }
        }
    });
    let names = disks.filter_map(|disk| Some(disk.file_name()?.to_str()?.to_owned()));
    let mut names: Vec<_> = names.collect();
    names.sort_unstable();
    names
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Makes a folder of the tree, and a link to it from elsewhere in the tree.
    fn device(sys: &Path, path: &str, link: &str) -> PathBuf {
        let (folder, link) = (sys.join("devices").join(path), sys.join(link));
        fs::create_dir_all(&folder).unwrap();
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(&folder, link).unwrap();
        folder
    }

    #[test]
    fn a_device_is_told_with_the_disks_beside_it() {
        let sys = tempfile::tempdir().unwrap();
        let sys = sys.path();
        device(sys, "pci0000:40/0000:40:01.1/0000:41:00.0", "bus/pci/devices/0000:41:00.0");
        device(sys, "pci0000:40/0000:40:03.1/0000:42:00.0/nvme/nvme1/nvme1n1", "block/nvme1n1");
        device(sys, "pci0000:00/0000:00:05.0/virtio2/block/vda", "block/vda");
        device(sys, "virtual/block/loop0", "block/loop0");
        // Of two controllers, one beside the device and one elsewhere.
        let subsystem = "virtual/nvme-subsystem/nvme-subsys0";
        device(sys, &format!("{subsystem}/nvme0n1"), "block/nvme0n1");
        for (number, below) in ["pci0000:00/0000:01:00.0", "pci0000:40/0000:43:00.0"].iter().enumerate() {
            let link = format!("devices/{subsystem}/nvme{number}");
            device(sys, &format!("{below}/nvme/nvme{number}"), &link);
        }
        let place = PciPlace::of(sys, "0000:41:00.0").unwrap();
        assert_eq!(place.to_string(), "PCI 0000:41:00.0 below pci0000:40 beside nvme0n1, nvme1n1");
        assert_eq!(PciPlace::of(sys, "0000:99:00.0"), None);
        assert_eq!(PciPlace::of(sys, ""), None);
    }
}
