//! Does every device do what the loader relies on? The conformance suite, a load compared byte for byte, a bandwidth.

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use tensorhaul_device::{Device, conformance};
use tensorhaul_plan::header::{NewTensor, encode};
use tensorhaul_plan::{DeviceId, Dtype, Request};

use crate::error::{Error, ErrorKind, Result};
use crate::link::{Direction, Link};
use crate::options::{EngineChoice, Handover, LoadOptions};
use crate::vendors::Vendor;
use crate::{Model, devices};

/// How a device did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Verdict {
    /// Which device.
    pub device: String,
    /// The name people know it by.
    pub name: String,
    /// Whether everything held.
    pub passed: bool,
    /// Promises of the contract that were tried, and kept.
    pub promises: usize,
    /// Bytes of the load that was compared.
    pub compared_bytes: u64,
    /// Speed of copies from pinned memory; on the host, of copies in memory.
    pub copy_gb_per_s: f64,
    /// What did not hold.
    pub failures: Vec<String>,
}

impl Verdict {
    /// Of a device that is there and cannot be opened, so that nothing else was tried.
    fn of_closed(id: DeviceId, error: &Error) -> Verdict {
        Verdict {
            device: id.to_string(),
            name: "not opened".to_owned(),
            passed: false,
            promises: 0,
            compared_bytes: 0,
            copy_gb_per_s: 0.0,
            failures: vec![format!("the device opens: {}", error.one_line())],
        }
    }
}

/// Tries a device. `folder` is for a checkpoint of a few MB, removed again.
///
/// # Errors
/// When there is no such device or the checkpoint cannot be written; what does not hold, of a device that is lost too, is in the verdict.
pub fn run(id: DeviceId, folder: &Path) -> Result<Verdict> {
    let device = match devices::open(id) {
        Ok(device) => device,
        Err(error) if error.is_of_device_there() => return Ok(Verdict::of_closed(id, &error)),
        Err(error) => return Err(error),
    };
    let mut promises = conformance::run(&*device);
    let peer = neighbour(id);
    if let Ok(Some(peer)) = &peer {
        promises.extend(conformance::run_pair(&*device, &**peer));
    }
    let mut failures: Vec<String> = promises
        .iter()
        .filter_map(|promise| Some(format!("{}: {}", promise.promise, promise.result.as_ref().err()?)))
        .collect();
    if let Err(error) = peer {
        failures.push(format!("the device beside it opens: {}", error.one_line()));
    }
    let compared_bytes = match compare(id, folder) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(error),
        Err(error) => {
            failures.push(format!("a load compared byte for byte: {}", error.one_line()));
            0
        }
    };
    let copy_gb_per_s = bandwidth(&*device).unwrap_or_else(|error| {
        failures.push(format!("copies from pinned memory: {}", error.one_line()));
        0.0
    });
    Ok(Verdict {
        device: id.to_string(),
        name: device.name(),
        passed: failures.is_empty(),
        promises: promises.len(),
        compared_bytes,
        copy_gb_per_s,
        failures,
    })
}

/// Opens another device of the same vendor, for nobody but the test, where there is one: the next, or the first behind the last.
fn neighbour(id: DeviceId) -> Result<Option<Arc<dyn Device>>> {
    let Some(Ok(driver)) = Vendor::of(id).map(|vendor| (vendor.driver)()) else { return Ok(None) };
    let count = driver.device_count().unwrap_or(0);
    let next =
        (0..count).find(|ordinal| driver.device_id(*ordinal) == id).map(|ordinal| (ordinal + 1) % count);
    match next.map(|ordinal| driver.device_id(ordinal)).filter(|next| *next != id) {
        Some(next) => Ok(Some(devices::find(next)?.open_apart()?)),
        None => Ok(None),
    }
}

/// Loads a checkpoint with tensors of every alignment by every engine, and compares what arrived.
fn compare(id: DeviceId, folder: &Path) -> Result<u64> {
    let path = folder.join(format!(".tensorhaul-selftest-{}.safetensors", std::process::id()));
    let written = std::fs::write(&path, checkpoint())
        .map_err(|error| Error::io("writing the checkpoint", &path, error));
    let result = written.and_then(|()| compare_engines(id, &path));
    // Whatever happened, nothing is left behind; a file that was not written need not be removed.
    let _ = std::fs::remove_file(&path);
    result
}

fn compare_engines(id: DeviceId, path: &Path) -> Result<u64> {
    let model = Model::open(path)?;
    let mut request = Request::all();
    request.device = id;
    let mut compared = 0;
    for engine in [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::IoUring] {
        // A ring of 1 MiB goes round several times.
        let options = LoadOptions::default().request(request.clone()).handover(Handover::Private);
        let loaded = model.load(&options.engine(engine).staging_bytes(1 << 20))?;
        for (name, tensor) in loaded.tensors.iter() {
            let (arrived, stored) = (tensor.to_host()?, model.tensor(name)?);
            if arrived != stored.bytes()? {
                return Err(Error::new(ErrorKind::Device, "other bytes arrived").about_tensor(name));
            }
            compared += arrived.len() as u64;
        }
    }
    Ok(compared)
}

fn checkpoint() -> Vec<u8> {
    let shapes: [(&str, Dtype, &[u64]); 6] = [
        ("scale", Dtype::F32, &[]),
        ("model.layers.0.w", Dtype::Bf16, &[1024, 1100]),
        ("model.layers.1.w", Dtype::Bf16, &[1024, 1100]),
        ("odd", Dtype::U8, &[1001]),
        ("misaligned", Dtype::F32, &[333, 7]),
        ("none", Dtype::F32, &[0, 4]),
    ];
    let tensors = shapes.map(|(name, dtype, shape)| NewTensor { name, dtype, shape });
    let mut file = encode(&tensors, &Default::default(), 8).expect("these tensors have a header");
    let len: u64 =
        shapes.iter().filter_map(|(_, dtype, shape)| dtype.len_bytes(shape.iter().product())).sum();
    file.extend((0..len).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8));
    file
}

/// Copies pinned memory to the device for a while, a staging buffer at a time.
fn bandwidth(device: &dyn Device) -> Result<f64> {
    let (bytes, time) = Link::new(device, COPY_LEN_BYTES)?.pass(Direction::ToDevice, COPIES)?;
    Ok(bytes as f64 / time.as_secs_f64() / 1e9)
}

/// 256 MiB take 5 ms on the fastest link there is, so a few of them are timed.
const COPY_LEN_BYTES: usize = 64 << 20;
const COPIES: u64 = 16;
