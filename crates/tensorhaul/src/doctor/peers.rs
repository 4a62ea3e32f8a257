//! Which devices copy from each other's memory without the host.

use std::sync::Arc;

use serde::Serialize;
use tensorhaul_device::Device;

use super::Feature;

/// What a device reaches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PeerFact {
    /// The device.
    pub device: String,
    /// The other devices of its vendor, in their order.
    pub from: Vec<Reach>,
}

/// Whether a device copies straight from another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Reach {
    /// The other.
    pub device: String,
    /// Whether it does. Where it does not, what both need comes through the staging ring to each.
    #[serde(flatten)]
    pub verdict: Feature,
}

/// Asks every device about every other of its vendor; devices that are alone are left out.
pub(super) fn examine(devices: &[Arc<dyn Device>]) -> Vec<PeerFact> {
    let fact = |device: &Arc<dyn Device>| {
        let id = device.id();
        let kin = |other: &&Arc<dyn Device>| {
            other.id() != id && std::mem::discriminant(&other.id()) == std::mem::discriminant(&id)
        };
        let from: Vec<_> = devices.iter().filter(kin).map(|other| reach(&**device, &**other)).collect();
        (!from.is_empty()).then(|| PeerFact { device: id.to_string(), from })
    };
    devices.iter().filter_map(fact).collect()
}

fn reach(device: &dyn Device, other: &dyn Device) -> Reach {
    let name = other.id().to_string();
    let verdict = if device.can_reach(other.id()) {
        Ok(())
    } else {
        let is_about_it = |(what, _): &(String, String)| what.split(' ').any(|word| word == name);
        let told = device.fallbacks().into_iter().find(is_about_it);
        Err(told.map_or("the device does not say why".to_owned(), |(_, why)| why))
    };
    Reach { device: name, verdict: Feature::new(verdict) }
}
