//! Access to peers is a context's, of which HIP has none.

use tensorhaul_device::gpu::{Context, Driver};

use crate::suite::peers::Pair;
use crate::suite::sim::Sim;
use crate::vendor::peer;

#[test]
fn access_is_of_the_current_context() {
    let _sim = Sim::new("devices=2");
    let pair = Pair::new();
    pair.driver.make_current(Context(0)).unwrap();
    assert_eq!(peer::enable(1), peer::NO_PEER, "nothing is current");
}

#[test]
fn access_ends_with_the_context() {
    let sim = Sim::new("devices=2;pools=0");
    let pair = Pair::new();
    assert_eq!(peer::enable(1), 0);
    drop(pair);
    sim.assert_clean("after the first pair");
    let pair = Pair::new();
    assert_eq!(pair.copy(), 1, "a context that is made anew has no peers");
    drop(pair);
}
