//! Quantized checkpoints come out as the numbers they were made of.
//!
//! Each checkpoint is packed here from chosen codes, scales and zero-points, by code written from the formats'
//! descriptions; what is expected is computed from the choices, and never from the packed bytes.
//! `TENSORHAUL_KEEP_CASES=folder` keeps every checkpoint, with what is expected of it, for other programs to read.
#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

#[path = "../common/mod.rs"]
mod common;

mod awq;
mod bad_input;
mod bitsandbytes;
mod case;
mod check;
mod choices;
mod comfy;
mod compressed;
mod fp8;
mod gptq;
mod hqq;
mod integers;
mod micro;
mod mlx;
mod numbers;
mod pack;
mod plain;
mod ranks;
mod refusals;
mod torchao;
