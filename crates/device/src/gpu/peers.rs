//! Memory of other devices of the same vendor: whether it is reached, and copies from it.

use std::collections::HashMap;
use std::sync::Mutex;

use tensorhaul_plan::DeviceId;

use super::driver::{Context, Driver, Peer, PeerCopy};
use super::{Shared, lock, within};
use crate::contract::{DeviceError, Stream};
use crate::operation::Location;

/// What is known of other devices, by their ordinals: the context of one whose memory is reached, which is retained, or
/// why it is not.
pub(super) type Peers = Mutex<HashMap<u32, Result<Context, String>>>;

impl<D: Driver> Shared<D> {
    /// Returns the context of a device whose memory this one reaches, or says why it does not. What is found out once
    /// holds for the life of the device. The device is current.
    pub(super) fn reach(&self, peer: DeviceId) -> Result<Context, String> {
        let ordinal = match peer {
            DeviceId::Cuda(ordinal) | DeviceId::Rocm(ordinal) if self.driver.device_id(ordinal) == peer => {
                ordinal
            }
            _ => return Err("it is of another kind".to_owned()),
        };
        // Held meanwhile, so that of several threads one lets the device to its peer.
        let mut peers = lock(&self.peers);
        let reached = peers.entry(ordinal).or_insert_with(|| self.connect(ordinal));
        if let Err(why) = reached {
            // What happens instead is for the caller to say: an exchange does something else than a load.
            self.note(&format!("{} does not reach the memory of {peer}", self.id()), why.clone());
        }
        reached.clone()
    }

    fn connect(&self, ordinal: u32) -> Result<Context, String> {
        match self.driver.can_access_peer(self.ordinal, ordinal) {
            None => return Err("the driver has no copies between devices".to_owned()),
            Some(_) if ordinal == self.ordinal => return Ok(self.context),
            Some(Ok(true)) => {}
            Some(Ok(false)) => {
                return Err("the driver lets no copies through between the two".to_owned());
            }
            Some(Err(error)) => return Err(error.to_string()),
        }
        let context = self.driver.open(ordinal).map_err(|error| error.to_string())?;
        let enabled = self.driver.enable_peer(self.ordinal, Peer { ordinal, context });
        enabled.map(|()| context).map_err(|error| {
            self.driver.close(ordinal, context);
            error.to_string()
        })
    }

    /// Queues a copy from a device that is reached, or from this one. The device is current.
    ///
    /// # Safety
    /// As for [`crate::Device::copy_from_peer`].
    pub(super) unsafe fn copy_from_peer(
        &self,
        peer: DeviceId,
        source: Location<'_>,
        target: Location<'_>,
        len_bytes: u64,
        stream: Stream,
    ) -> Result<(), DeviceError> {
        let unreachable = |why| DeviceError::Unreachable { device: self.id(), peer, why };
        let source_context = self.reach(peer).map_err(unreachable)?;
        let copy = PeerCopy {
            source: within(source.allocation, source.offset_bytes, len_bytes),
            source_context,
            target: within(target.allocation, target.offset_bytes, len_bytes),
            target_context: self.context,
            len_bytes: len_bytes as usize,
        };
        if len_bytes == 0 {
            return Ok(()); // Memory of no length is nowhere, which drivers refuse.
        }
        // SAFETY: the ranges are the caller's promise; both contexts are retained for the life of this device.
        unsafe { self.driver.copy_peer(copy, self.stream(stream)) }.map_err(|error| self.failed(error))
    }

    /// Lets go of the other devices' contexts.
    pub(super) fn leave_peers(&self) {
        let peers = std::mem::take(&mut *lock(&self.peers));
        for (ordinal, context) in peers {
            if let Some(context) = context.ok().filter(|_| ordinal != self.ordinal) {
                self.driver.close(ordinal, context);
            }
        }
    }
}
