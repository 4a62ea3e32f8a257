//! Quantized tensors become the numbers they stand for.

mod cases;
mod cuts;
mod models;
mod packing;
mod properties;
mod vectors;
