//! What the crate promises its users, one module a promise.
#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]
#![allow(clippy::single_range_in_vec_init, reason = "a slice of one dimension is one range")]

#[path = "../common/mod.rs"]
mod common;

#[cfg(feature = "tokio")]
mod asynchronous;
mod bad_input;
mod cancellation;
mod dequantize;
mod fallbacks;
mod faults;
#[cfg(feature = "io-uring")]
mod io_uring;
mod laziness;
mod memory;
mod parallel;
mod same_bytes;
mod slices;
mod streaming;
mod views;
