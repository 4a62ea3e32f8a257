//! Device maps beside a checkpoint: whether one serves it, and one made by what is free.

use std::path::Path;

use tensorhaul_plan::{DeviceId, DeviceMap, Machine, Plan, Request};

use crate::devices;
use crate::error::{Error, ErrorKind, Result};
use crate::locate::read_limited;
use crate::model::Inner;
use crate::options::LoadOptions;
use crate::private;

/// Returns the devices that a request names, ascending.
pub(crate) fn devices(request: &Request) -> Vec<DeviceId> {
    match (&request.device_map, &request.assembly) {
        (Some(map), _) => map.devices(),
        (None, Some(assembly)) if !assembly.tensors.is_empty() => {
            let mut devices: Vec<_> = assembly.tensors.iter().map(|tensor| tensor.device).collect();
            devices.sort_unstable();
            devices.dedup();
            devices
        }
        (None, _) => vec![request.device],
    }
}

/// Tells whether a request sends anything to several accelerators.
pub(crate) fn replicates(request: &Request) -> bool {
    let is_accelerator = |device: &&DeviceId| **device != DeviceId::Host;
    let entries = request.device_map.iter().flat_map(|map| map.entries());
    entries.into_iter().any(|(_, devices)| devices.iter().filter(is_accelerator).count() > 1)
}

/// Checks that each entry of a request's device map, if it has one, is about a tensor: of the checkpoint, or of what is made of it. The plan finds
/// tensors without an entry.
pub(crate) fn check(model: &Inner, request: &Request) -> Result<()> {
    let Some(map) = &request.device_map else { return Ok(()) };
    let stored = model.checkpoint.tensors().map(|tensor| tensor.info.name);
    let groups = request.dequantize.iter().flat_map(|dequantize| dequantize.groups.iter());
    let assembled = request.assembly.iter().flat_map(|assembly| &assembly.tensors);
    let made = groups.map(|group| &*group.name).chain(assembled.map(|tensor| &*tensor.name));
    Ok(map.check(stored.chain(made), [])?)
}

/// Reads a device map from a file of JSON; see [`DeviceMap::from_json`], also for what `default` is.
///
/// # Errors
/// [`ErrorKind::NotFound`] and I/O errors; [`ErrorKind::Malformed`] when the file is no device map or is longer than 16 MiB.
pub fn read_device_map(path: impl AsRef<Path>, default: DeviceId) -> Result<DeviceMap> {
    let path = path.as_ref();
    let json = read_limited(path, DEVICE_MAP_LEN_BYTES_MAX)?;
    DeviceMap::from_json(&json, default)
        .map_err(|error| Error::new(ErrorKind::Malformed, error).in_file(path))
}

/// An entry for each of 100,000 tensors.
const DEVICE_MAP_LEN_BYTES_MAX: u64 = 16 << 20;

/// Makes a device map for the tensors of a load by what is free on devices; on all of the vendor of the load's own device where none are given.
pub(crate) fn auto(model: &Inner, options: &LoadOptions, ids: &[DeviceId]) -> Result<DeviceMap> {
    let of_vendor = || devices::of_vendor(options.request.device);
    let ids = if ids.is_empty() { &of_vendor()? } else { ids };
    let plan = on_host(model, private::request(model, options)?)?;
    let mut room = Vec::with_capacity(ids.len());
    for device in devices::open_all(ids)? {
        // Packed bytes wait on the device that they are dequantized on.
        let free_bytes = device.memory()?.free_bytes.saturating_sub(plan.promised().transient_bytes);
        room.push((device.id(), free_bytes));
    }
    let sizes = plan.tensors().iter().map(|tensor| (plan.name(tensor), tensor.len_bytes));
    Ok(DeviceMap::auto(sizes, &room)?)
}

/// Plans a load onto the host, which tells the tensors of the result.
fn on_host(model: &Inner, mut request: Request) -> Result<Plan> {
    (request.device, request.device_map) = (DeviceId::Host, None);
    Ok(Plan::new(&model.checkpoint, &request, &Machine::default())?)
}
