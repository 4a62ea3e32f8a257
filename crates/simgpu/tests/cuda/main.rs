//! The unmodified CUDA backend over the simulated driver.

#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

mod busy;
mod contexts;
mod cudarc_slices;
mod starting;
#[path = "../suite/mod.rs"]
mod suite;
mod vendor;
