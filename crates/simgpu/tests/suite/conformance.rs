//! The suite that every device passes, and what a driver's handles promise.

use tensorhaul_device::gpu::{Context, Driver};
use tensorhaul_device::{Device, conformance};

use crate::suite::sim::Sim;
use crate::vendor;

#[test]
fn the_backend_passes_the_conformance_suite() {
    for config in [
        "",
        "delay_us=200",
        "pools=0;delay_us=200;seed=7",
        "batches=0",
        "integrated=1;delay_us=50;memory=67108864",
    ] {
        let sim = Sim::new(config);
        let device = vendor::open(0).unwrap();
        for verdict in conformance::run(&device) {
            verdict.result.unwrap_or_else(|what| panic!("{config:?}: {}: {what}", verdict.promise));
        }
        drop(device);
        sim.assert_clean(config);
    }
}

#[test]
fn two_devices_pass_the_conformance_suite() {
    for (config, is_reached) in [
        ("devices=2", true),
        ("devices=2;delay_us=300", true),
        ("devices=2;pools=0;delay_us=300;seed=7", true),
        ("devices=2;no_peer=1:0", true),
        ("devices=2;no_peer=0:1", false),
        ("devices=2;peers=0", false),
    ] {
        let sim = Sim::new(config);
        let (device, peer) = (vendor::open(0).unwrap(), vendor::open(1).unwrap());
        for verdict in conformance::run_pair(&device, &peer) {
            verdict.result.unwrap_or_else(|what| panic!("{config:?}: {}: {what}", verdict.promise));
        }
        assert_eq!(device.can_reach(peer.id()), is_reached, "{config}");
        drop((device, peer));
        sim.assert_clean(config);
    }
}

#[test]
fn an_ordinal_out_of_range_says_what_there_is() {
    let _sim = Sim::new("devices=2");
    let error = vendor::open(2).err().unwrap().to_string();
    assert_eq!(error, format!("{}: the driver sees 2 devices, numbers 0 to 1", vendor::id(2)));
}

#[test]
fn the_callers_current_device_is_put_back() {
    let _sim = Sim::new("devices=2");
    let (first, second) = (vendor::open(0).unwrap(), vendor::open(1).unwrap());
    let driver = vendor::driver().unwrap();
    driver.make_current(Context(1)).unwrap();
    second.memory().unwrap();
    assert_eq!(driver.current().unwrap(), Context(1));
    first.memory().unwrap();
    assert_eq!(driver.current().unwrap(), Context(1));
    driver.make_current(Context(0)).unwrap();
}
