//! Quantized tensors become the numbers they stand for.

mod cases;
mod packing;
mod properties;
mod vectors;
