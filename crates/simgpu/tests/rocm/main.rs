//! The unmodified ROCm backend over the simulated driver.

#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

mod code_object;
mod forward;
mod runtime;
#[path = "../suite/mod.rs"]
mod suite;
mod vendor;
