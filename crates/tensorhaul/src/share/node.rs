//! What connects this process to the other ranks of its node, from what its launcher has set.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tensorhaul_exchange::Vendor as Library;
use tensorhaul_exchange::{Control, Exchange, InProcess, Launched, Nccl, Rendezvous, Sockets, launch};
use tensorhaul_plan::DeviceId;

use crate::devices;
use crate::error::{Error, Result};
use crate::vendors::Vendor;

/// How the ranks of a node find each other, where the defaults do not do.
#[derive(Clone, Debug, Default)]
pub struct NodeOptions {
    /// The path of their socket, the same on all of them. Default: `TENSORHAUL_RENDEZVOUS`, else one made of the job.
    pub path: Option<PathBuf>,
    /// How long a rank waits for others. Default: 5 minutes.
    pub timeout: Option<Duration>,
    /// What moves the bytes. Default: the devices' links, and sockets for the host's memory, which has none.
    pub carrier: Option<Carrier>,
}

/// What moves bytes between the ranks of a node that are processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Carrier {
    /// The links between devices, by NVIDIA's NCCL or AMD's RCCL.
    Links,
    /// The host's memory and its sockets: slower, but everywhere.
    Sockets,
}

impl FromStr for Carrier {
    type Err = Error;

    fn from_str(text: &str) -> Result<Carrier> {
        match text {
            "links" => Ok(Carrier::Links),
            "sockets" => Ok(Carrier::Sockets),
            _ => Err(Error::bad_request(format!("{text:?} carries nothing; links and sockets do"))),
        }
    }
}

/// Tells which rank this process is, by the variables that torchrun, Slurm and MPI's launchers set; `None` where nobody did.
///
/// # Errors
/// [`ErrorKind::BadRequest`](crate::ErrorKind::BadRequest) when they are set in part, or contradict each other.
pub fn launched() -> Result<Option<Launched>> {
    let lookup = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    Ok(launch::launched(lookup)?)
}

/// Returns the device of this rank where none is named: of the kind of [`default_device`](crate::default_device), the one that has the
/// rank's number on the node. Where the launcher shows each rank a GPU of its own, it is the only one there is.
pub fn node_device(launched: &Launched) -> DeviceId {
    let device = devices::default_device();
    let driver = Vendor::of(device).and_then(|vendor| (vendor.driver)().ok());
    let Some(driver) = driver else { return device };
    match driver.device_count() {
        Ok(1) => device,
        // A number that there is not is told when the device is opened.
        _ => driver.device_id(launched.local_rank),
    }
}

/// Connects this process, which loads onto `device`, to the other ranks of its node. Waits for all of them. Each has a device of its own.
///
/// # Errors
/// [`ErrorKind::Device`](crate::ErrorKind::Device) when the device or the vendor's communication library cannot be used; [`ErrorKind::Io`](crate::ErrorKind::Io) when others do not come in time, and
/// [`ErrorKind::BadRequest`](crate::ErrorKind::BadRequest) when those of another job do.
pub fn node_exchange(
    launched: &Launched,
    device: DeviceId,
    options: &NodeOptions,
) -> Result<Box<dyn Exchange>> {
    let timeout = options.timeout.unwrap_or(Rendezvous::TIMEOUT_DEFAULT);
    if launched.local_size == 1 {
        let alone = InProcess::ranks(1, timeout).pop();
        return Ok(Box::new(alone.expect("one rank was asked for")));
    }
    let path = match &options.path {
        Some(path) => path.clone(),
        None => Rendezvous::of(launched)?.path,
    };
    let rendezvous = Rendezvous { path, timeout };
    let links = match device {
        DeviceId::Cuda(_) => Some(Library::Nccl),
        DeviceId::Rocm(_) => Some(Library::Rccl),
        _ => None,
    };
    let vendor = match (options.carrier, links) {
        (Some(Carrier::Links), None) => {
            let what = format!("{device} has no links to other ranks; sockets carry what is there");
            return Err(Error::bad_request(what));
        }
        (Some(Carrier::Sockets), _) | (None, None) => {
            let control = Control::meet(launched, rendezvous)?;
            return Ok(Box::new(Sockets::connect(control)?));
        }
        (_, Some(vendor)) => vendor,
    };
    let device = devices::open(device)?;
    let control = Control::meet(launched, rendezvous)?;
    Ok(Box::new(Nccl::connect(vendor, &device, control)?))
}
