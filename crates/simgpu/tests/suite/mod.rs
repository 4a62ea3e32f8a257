//! What every backend does over the simulated driver, whoever the vendor: `crate::vendor` has the names.

mod bench;
mod capture;
mod conformance;
pub(crate) mod consumer;
mod faults;
mod fork;
mod generated;
mod in_process;
pub(crate) mod kernels;
mod lifetimes;
pub(crate) mod load;
pub(crate) mod memory;
pub(crate) mod missing;
mod overlap;
pub(crate) mod peers;
pub(crate) mod quantized;
mod several;
pub(crate) mod shared;
pub(crate) mod sim;
mod unified;
