//! The unmodified CUDA backend over the simulated driver.

#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

mod bench;
mod capture;
mod consumer;
mod cudarc_slices;
mod faults;
mod fork;
mod kernels;
mod lifetimes;
mod load;
mod memory;
mod missing;
mod overlap;
mod peers;
mod quantized;
mod sim;

use sim::Sim;
use tensorhaul_device::conformance;

#[test]
fn the_cuda_backend_passes_the_conformance_suite() {
    for config in ["", "delay_us=200", "pools=0;delay_us=200;seed=7", "batches=0"] {
        let sim = Sim::new(config);
        let device = tensorhaul_cuda::open(0).unwrap();
        for verdict in conformance::run(&device) {
            verdict.result.unwrap_or_else(|what| panic!("{config:?}: {}: {what}", verdict.promise));
        }
        drop(device);
        sim.assert_clean(config);
    }
}

#[test]
fn an_ordinal_out_of_range_says_what_there_is() {
    let _sim = Sim::new("devices=2");
    let error = tensorhaul_cuda::open(2).err().unwrap().to_string();
    assert_eq!(error, "cuda:2: the driver sees 2 devices, numbers 0 to 1");
}

#[test]
fn the_callers_current_device_is_put_back() {
    let _sim = Sim::new("devices=2");
    use tensorhaul_device::Device;
    let (first, second) = (tensorhaul_cuda::open(0).unwrap(), tensorhaul_cuda::open(1).unwrap());
    let driver = tensorhaul_cuda::driver().unwrap();
    use tensorhaul_device::gpu::{Context, Driver};
    driver.make_current(Context(1)).unwrap();
    second.memory().unwrap();
    assert_eq!(driver.current().unwrap(), Context(1));
    first.memory().unwrap();
    assert_eq!(driver.current().unwrap(), Context(1));
    driver.make_current(Context(0)).unwrap();
}
