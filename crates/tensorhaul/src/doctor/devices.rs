//! Which devices there are, what drives them, and how fast their links are.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use serde::Serialize;
use tensorhaul_device::gpu::{NoDriver, topology};
use tensorhaul_device::{Device, OperationKind};
use tensorhaul_plan::DeviceId;

use super::Advice;
use super::place::PciPlace;
use crate::devices as opened;
use crate::error::Result;
use crate::link::{CopySpeed, Link};
use crate::vendors::{VENDORS, Vendor};

/// A vendor's driver.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DriverFact {
    /// What its devices are called.
    pub name: &'static str,
    /// Whether its library is there.
    pub found: bool,
    /// Whether it answers.
    pub works: bool,
    /// Whether it does not start, for another reason than that it sees no device.
    pub fails: bool,
    /// The file of its library.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub library: Option<String>,
    /// Its version, as people know it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The version of the kernel's part of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel_module: Option<String>,
    /// Why it does not work, with the likely cause.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A device, or a kind of device of which there is none.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct DeviceFact {
    /// Its name, as in `--device`.
    pub name: String,
    /// Whether tensors can be loaded onto it.
    pub works: bool,
    /// Why not, with the likely cause.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What it is called and its architecture.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Memory in all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// Whether its memory is the host's own, so that reads land in it at once and nothing is copied.
    pub shares_memory: bool,
    /// The host's memory node nearest to it, where anybody knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_node: Option<u32>,
    /// Its PCI Express link, where it has one that the system tells of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<PciLink>,
    /// Where it is on the PCI bus, where it is on one that the system tells of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci: Option<PciPlace>,
    /// Speed of copies from and to pinned memory, measured for some milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copies: Option<CopySpeed>,
    /// Whether kernels run on it, for dequantizing and casts; found out by loading one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernels: Option<KernelFact>,
    /// The driver's library and version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
}

/// Whether kernels run on a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct KernelFact {
    /// Whether they do. Without them tensors load as they are stored.
    pub works: bool,
    /// Why this build's own do not fit and what compiles them instead, on this machine; or why there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl KernelFact {
    /// Loads one, which compiles it where this build has none for the device.
    fn of(device: &dyn Device) -> KernelFact {
        match device.prepare(OperationKind::Cast) {
            Ok(_) => {
                let is_compiled = |(what, _): &(String, String)| what.contains("compiled on this machine");
                let told = device.fallbacks().into_iter().find(is_compiled);
                KernelFact { works: true, why: told.map(|(_, why)| why) }
            }
            Err(error) => {
                let driver = Vendor::of(device.id()).and_then(|vendor| (vendor.driver)().ok());
                let known = driver.map_or_else(String::new, |driver| driver.architectures());
                let why = error.to_string();
                let names_them = why.contains(&known);
                let why = if names_them { why } else { format!("{why}; this build has them for {known}") };
                KernelFact { works: false, why: Some(why) }
            }
        }
    }
}

impl DeviceFact {
    pub(crate) fn new(name: impl Into<String>) -> DeviceFact {
        DeviceFact { name: name.into(), ..DeviceFact::default() }
    }
}

/// A PCI Express link, now (it slows down when idle) and at most.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PciLink {
    /// Its generation now, where the speed is one of a generation.
    pub generation: Option<u32>,
    /// Lanes in use.
    pub width: Option<u32>,
    /// The generation of device and slot at most.
    pub generation_max: Option<u32>,
    /// Lanes the device has.
    pub width_max: Option<u32>,
}

impl PciLink {
    fn of(link: &topology::Link) -> PciLink {
        PciLink {
            generation: generation(&link.speed_now),
            width: link.width_now.parse().ok(),
            generation_max: generation(&link.speed_max),
            width_max: link.width_max.parse().ok(),
        }
    }
}

impl fmt::Display for PciLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |number: Option<u32>| number.map_or("?".to_owned(), |number| number.to_string());
        let (now, lanes) = (number(self.generation), number(self.width));
        let (most, lanes_max) = (number(self.generation_max), number(self.width_max));
        write!(f, "PCIe {now} x{lanes} (at most PCIe {most} x{lanes_max})")
    }
}

/// Returns the generation that a lane's speed is of, as in `32.0 GT/s PCIe`.
///
/// # Source
/// Linux, drivers/pci/probe.c, `pci_speed_string`; PCI Express Base Specification, revisions 1 to 6.
fn generation(speed: &str) -> Option<u32> {
    let gigatransfers: f64 = speed.split_whitespace().next()?.parse().ok()?;
    let known = [2.5, 5.0, 8.0, 16.0, 32.0, 64.0];
    Some(known.iter().position(|of_generation| *of_generation == gigatransfers)? as u32 + 1)
}

/// Returns every device this build can load onto, and a line for each kind of which there is none.
pub(crate) fn devices() -> Vec<DeviceFact> {
    let host = DeviceFact { works: true, ..DeviceFact::new("host") };
    std::iter::once(host).chain(VENDORS.iter().flat_map(devices_of)).collect()
}

fn devices_of(vendor: &Vendor) -> Vec<DeviceFact> {
    let fails = |why: String| vec![DeviceFact { why: Some(why), ..DeviceFact::new(vendor.name) }];
    let driver = match (vendor.driver)() {
        Ok(driver) => driver,
        Err(why) => return fails(why.to_string()),
    };
    let count = match driver.device_count() {
        Ok(0) => return fails("the driver sees no device".to_owned()),
        Ok(count) => count,
        Err(error) => return fails(error.to_string()),
    };
    let describe = |ordinal| {
        let name = driver.device_id(ordinal).to_string();
        match driver.describe(ordinal) {
            Ok(facts) => DeviceFact {
                works: true,
                description: Some(format!("{}, {}", facts.name, facts.architecture)),
                total_bytes: Some(facts.total_bytes),
                shares_memory: facts.integrated && facts.reads_pinned,
                host_node: topology::near(&facts).node,
                pci: PciPlace::of(Path::new("/sys"), &facts.pci_bus_id),
                link: topology::link(&facts.pci_bus_id).as_ref().map(PciLink::of),
                driver: Some(format!("{} ({})", driver.library(), driver.version())),
                ..DeviceFact::new(name)
            },
            Err(error) => DeviceFact { why: Some(error.to_string()), ..DeviceFact::new(name) },
        }
    };
    (0..count).map(describe).collect()
}

/// Returns every vendor's driver.
pub(super) fn drivers() -> Vec<DriverFact> {
    VENDORS.iter().map(DriverFact::of).collect()
}

/// Opens the accelerators that work, beside each other, and measures their copies, one after another because they may share a link.
/// Returns those that still work then; what copies in host memory take is not a property of a device, `bench` measures it.
pub(super) fn open(facts: &mut [DeviceFact]) -> Vec<Arc<dyn Device>> {
    let is_accelerator = |id: &DeviceId| *id != DeviceId::Host;
    let working = facts.iter_mut().filter(|fact| fact.works);
    let working = working.filter_map(|fact| Some((fact.name.parse().ok().filter(is_accelerator)?, fact)));
    let working: Vec<(DeviceId, &mut DeviceFact)> = working.collect();
    let devices: Vec<_> = thread::scope(|scope| {
        let open = |id: DeviceId| scope.spawn(move || opened::find(id)?.open_apart());
        let opening: Vec<_> = working.iter().map(|(id, _)| open(*id)).collect();
        opening.into_iter().map(|thread| thread.join().expect("opening a device does not panic")).collect()
    });
    let measure = |(device, (_, fact)): (Result<Arc<dyn Device>>, (DeviceId, &mut DeviceFact))| match device
        .and_then(|device| Ok((speed(&*device)?, device)))
    {
        Ok((speed, device)) => {
            fact.copies = Some(speed);
            fact.kernels = Some(KernelFact::of(&*device));
            Some(device)
        }
        Err(error) => {
            (fact.works, fact.why) = (false, Some(error.one_line()));
            None
        }
    };
    devices.into_iter().zip(working).filter_map(measure).collect()
}

fn speed(device: &dyn Device) -> Result<CopySpeed> {
    let free_bytes = device.memory()?.free_bytes;
    Link::new(device, COPY_LEN_BYTES.min(free_bytes.max(1) as usize))?.speed()
}

/// A device that its driver sees and that does not open is worth a look; one that is not there is the driver's affair.
pub(super) fn advise_repair(device: &DeviceFact) -> Option<Advice> {
    let why = device.why.as_ref().filter(|_| device.name.contains(':'))?;
    Some(Advice {
        what: format!("{} does not work: {why}", device.name),
        remedy: "end what else uses it, or reset it (nvidia-smi --gpu-reset, amd-smi reset); until then name another with --device".to_owned(),
    })
}

/// A slot or riser with fewer lanes than the device has is the commonest reason for slow copies.
pub(super) fn advise(device: &DeviceFact) -> Option<Advice> {
    let link = device.link.as_ref()?;
    let (width, width_max) = link.width.zip(link.width_max).filter(|(now, most)| now < most)?;
    Some(Advice {
        what: format!(
            "{} uses {width} of its {width_max} PCIe lanes: copies are slower by as much",
            device.name
        ),
        remedy: "put it into a slot with all lanes, or look for lanes that another device shares".to_owned(),
    })
}

impl DriverFact {
    fn of(vendor: &Vendor) -> DriverFact {
        let kernel_module = fs::read_to_string(vendor.module_version).ok();
        let fact = DriverFact {
            name: vendor.name,
            kernel_module: kernel_module.map(|version| version.trim().to_owned()),
            ..DriverFact::default()
        };
        match (vendor.driver)() {
            Ok(driver) => {
                let (name, version) = (driver.library(), driver.version());
                let library = mapped_file(&name).unwrap_or(name);
                DriverFact {
                    found: true,
                    works: true,
                    library: Some(library),
                    version: Some(version),
                    ..fact
                }
            }
            Err(why) => {
                let found = !matches!(why, NoDriver::Missing(_));
                let fails = matches!(why, NoDriver::Fails(_));
                DriverFact { found, fails, why: Some(why.to_string()), ..fact }
            }
        }
    }

    /// A machine without GPUs and drivers lacks nothing.
    pub(super) fn advise(&self) -> Option<Advice> {
        if let Some(why) = self.why.as_ref().filter(|_| self.fails) {
            return Some(Advice {
                what: format!("the driver for {} is installed and does not work: {why}", self.name),
                remedy: "do what its answer says; until then loads go to other devices, or to the host"
                    .to_owned(),
            });
        }
        let vendor = VENDORS.iter().find(|vendor| vendor.name == self.name)?;
        self.why.as_ref().filter(|_| has_device_of(vendor))?;
        let maker = vendor.maker;
        Some(Advice {
            what: format!("{maker} device is on the PCI bus, but its driver does not work"),
            remedy: vendor.remedy.to_owned(),
        })
    }
}

/// Returns where the library of a name came from: its file is mapped into this process.
fn mapped_file(name: &str) -> Option<String> {
    if name.contains('/') {
        return Some(name.to_owned());
    }
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    // The file behind a link has a version behind the name, as in libcuda.so.570.86.
    let stem = name.split_inclusive(".so").next()?;
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|start| &line[start..]));
    let is_it = |path: &&str| path.rsplit('/').next().is_some_and(|file| file.starts_with(stem));
    paths.find(is_it).map(str::to_owned)
}

/// Tells whether a device of a vendor is on the PCI bus that is there to be used.
pub(crate) fn has_device_of(vendor: &Vendor) -> bool {
    let devices = fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten();
    devices.map(|entry| entry.path()).any(|device| {
        let read = |name: &str| fs::read_to_string(device.join(name)).unwrap_or_default();
        let class = read("class");
        read("vendor").trim() == vendor.pci_vendor
            && vendor.pci_classes.iter().any(|start| class.starts_with(start))
    })
}

/// Pinned in some milliseconds, and long enough to fill a link.
const COPY_LEN_BYTES: usize = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_have_generations_and_narrow_ones_get_advice() {
        let link = topology::Link {
            speed_now: "2.5 GT/s PCIe".to_owned(),
            width_now: "8".to_owned(),
            speed_max: "32.0 GT/s PCIe".to_owned(),
            width_max: "16".to_owned(),
        };
        let mut device = DeviceFact { link: Some(PciLink::of(&link)), ..DeviceFact::new("cuda:0") };
        assert_eq!(device.link.as_ref().unwrap().to_string(), "PCIe 1 x8 (at most PCIe 5 x16)");
        assert!(advise(&device).unwrap().what.starts_with("cuda:0 uses 8 of its 16 PCIe lanes"));
        device.link = Some(PciLink::of(&topology::Link { width_now: "16".to_owned(), ..link }));
        assert_eq!(advise(&device), None); // An idle link is slow and nothing is wrong.
        assert_eq!(generation("Unknown"), None);
    }
}
