//! A driver that is loaded once a process.

use std::fmt;
use std::process;
use std::sync::{Arc, OnceLock};

use super::FORKED;

/// Why a driver cannot be used: in each case a sentence with the likely cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoDriver {
    /// Its library is not there, or not in this build.
    Missing(String),
    /// Its library is there, and sees no device: on many machines there is none to see.
    NoDevice(String),
    /// Its library is there, and does not start, or not in this process.
    Fails(String),
}

impl fmt::Display for NoDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (NoDriver::Missing(why) | NoDriver::NoDevice(why) | NoDriver::Fails(why)) = self;
        f.write_str(why)
    }
}

impl std::error::Error for NoDriver {}

/// A driver, or why there is none. Neither changes for the life of the process, and neither is a child's of a fork.
pub struct Loaded<D>(OnceLock<(u32, Result<Arc<D>, NoDriver>)>);

impl<D> Loaded<D> {
    /// Nothing is loaded yet.
    pub const fn new() -> Loaded<D> {
        Loaded(OnceLock::new())
    }

    /// Returns the driver, loaded with the first call of the process.
    ///
    /// # Errors
    /// What loading it said. In a child forked after the first call: that it was.
    pub fn get(&self, load: impl FnOnce() -> Result<D, NoDriver>) -> Result<Arc<D>, NoDriver> {
        let (process, driver) = self.0.get_or_init(|| (process::id(), load().map(Arc::new)));
        if driver.is_ok() && *process != process::id() {
            return Err(NoDriver::Fails(FORKED.to_owned()));
        }
        driver.clone()
    }

    /// Tells whether this process has loaded it: from then on its children cannot.
    pub fn is_loaded(&self) -> bool {
        self.0.get().is_some_and(|(process, driver)| driver.is_ok() && *process == process::id())
    }
}

impl<D> Default for Loaded<D> {
    fn default() -> Loaded<D> {
        Loaded::new()
    }
}
