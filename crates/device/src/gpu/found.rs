//! A device before it is open.

use std::sync::Arc;

use super::driver::{DeviceFacts, Driver};
use super::shared::Shared;
use super::{Gpu, capabilities, topology};
use crate::contract::{Capabilities, DeviceError, Near};

/// A device that the driver sees, described and not touched: no context was made, nothing was allocated on it.
pub struct Found<D: Driver> {
    driver: Arc<D>,
    ordinal: u32,
    facts: DeviceFacts,
}

impl<D: Driver> Found<D> {
    /// Finds a device by its ordinal. Takes microseconds where opening takes tenths of a second.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] when there is no such device; [`DeviceError::Driver`] when a call failed.
    pub fn new(driver: Arc<D>, ordinal: u32) -> Result<Found<D>, DeviceError> {
        let device = driver.device_id(ordinal);
        let failed = |error| DeviceError::Driver { device, error };
        let count = driver.device_count().map_err(failed)?;
        if ordinal >= count {
            let have = match count {
                0 => "the driver sees no device".to_owned(),
                1 => "the driver sees one device, number 0".to_owned(),
                count => format!("the driver sees {count} devices, numbers 0 to {}", count - 1),
            };
            return Err(DeviceError::Unavailable { device, why: have });
        }
        let facts = driver.describe(ordinal).map_err(failed)?;
        Ok(Found { driver, ordinal, facts })
    }

    /// Returns what the device is.
    pub fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// Returns what it can do; the same as once it is open.
    pub fn capabilities(&self) -> Capabilities {
        capabilities(&self.facts)
    }

    /// Returns what of the host is nearest to it.
    pub fn near(&self) -> Near {
        topology::near(&self.facts)
    }

    /// Opens it: its context and two streams.
    ///
    /// # Errors
    /// [`DeviceError::Driver`] when a call failed.
    pub fn open(self) -> Result<Gpu<D>, DeviceError> {
        let Found { driver, ordinal, facts } = self;
        Ok(Gpu { shared: Arc::new(Shared::open(driver, ordinal, facts)?) })
    }
}
