//! A device that another process has for itself, which HIP has no status for.

use tensorhaul::Model;

use crate::suite::load::{assert_same_bytes, checkpoint, options};
use crate::suite::sim::Sim;

#[test]
fn a_device_that_somebody_else_has_is_not_called_lost() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = Sim::new("fail=cuDevicePrimaryCtxRetain:1:46");
    let error = model.load(&options()).unwrap_err().one_line();
    assert!(error.contains("(CUDA_ERROR_DEVICE_UNAVAILABLE); another process has the device"), "{error}");
    assert_same_bytes(&model, &model.load(&options()).unwrap());
    sim.assert_clean("after the load");
}
