//! Hands a checkpoint's tensors to candle, in one dependency graph with it.
//!
//! `cargo run --release --example candle -- [PATH]`
//!
//! candle owns its tensors, so each is copied once out of the mapped file; nothing is held twice for longer.

use std::error::Error;

use candle_core::{DType, Device, Tensor};
use tensorhaul::{Dtype, LoadOptions, Model};

fn main() -> Result<(), Box<dyn Error>> {
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-llama");
    let path = std::env::args().nth(1).unwrap_or_else(|| tiny.to_owned());
    let model = Model::open(path)?;

    let (mut taken, mut left) = (0, 0);
    for ready in model.stream(&LoadOptions::default())? {
        let (name, tensor) = ready?;
        let Some(dtype) = candle_dtype(tensor.dtype()) else {
            left += 1;
            continue;
        };
        let shape: Vec<usize> = tensor.shape().iter().map(|dim| *dim as usize).collect();
        let ours = Tensor::from_raw_buffer(tensor.bytes()?, dtype, &shape, &Device::Cpu)?;
        if name == "model.norm.weight" {
            println!("{name}: mean {}", ours.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()?);
        }
        taken += 1;
    }
    println!("{taken} tensors are candle's, {left} have element types it does not know");
    Ok(())
}

fn candle_dtype(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F64 => Some(DType::F64),
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::Bf16 => Some(DType::BF16),
        Dtype::U8 => Some(DType::U8),
        Dtype::U32 => Some(DType::U32),
        Dtype::I64 => Some(DType::I64),
        _ => None,
    }
}
