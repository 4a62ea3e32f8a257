//! Loads a checkpoint into memory of its own and prints what the load did.
//!
//! `cargo run --release --example load -- [PATH] [auto|mmap|pread|io-uring]`

use std::error::Error;

use tensorhaul::{EngineChoice, Handover, LoadOptions, Model};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments
        .next()
        .unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama").to_owned());
    let engine: EngineChoice = arguments.next().as_deref().unwrap_or("auto").parse()?;

    let model = Model::open(path)?;
    let options = LoadOptions::default().handover(Handover::Private).engine(engine);
    let loaded = model.load(&options)?;

    for (name, tensor) in loaded.tensors.iter().take(3) {
        println!("{name}: {} {:?}", tensor.dtype(), tensor.shape());
    }
    println!("{:#?}", loaded.report);
    Ok(())
}
