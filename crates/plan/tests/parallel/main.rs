//! Models shared by ranks: golden plans, the ranks' parts against a naive computation, refusals.

#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

mod bound;
mod errors;
mod golden;
mod huggingface;
mod models;
mod plans;
mod property;
mod tables;
