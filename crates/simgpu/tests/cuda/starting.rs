//! A driver that is there and does not start, for reasons that HIP has no statuses for.

use crate::suite::missing::probe;
use crate::suite::sim::library_path;

#[test]
fn a_driver_that_does_not_start_says_what_its_code_means() {
    for (code, name, cause) in [
        (802, "SYSTEM_NOT_READY", "start the service nvidia-fabricmanager"),
        (803, "SYSTEM_DRIVER_MISMATCH", "the driver and the kernel module differ in version"),
        (804, "COMPAT_NOT_SUPPORTED_ON_DEVICE", "take it off the library path"),
        (3, "NOT_INITIALIZED", "a driver is installed, but does not start"),
    ] {
        let error = probe(&library_path(), &format!("fail=cuInit:1:{code}"));
        assert!(error.contains(&format!("cuInit failed with {code} (CUDA_ERROR_{name}): ")), "{error}");
        assert!(error.contains(cause), "{code}: {error}");
        assert_eq!(error.contains("differ in version"), code == 803, "{error}");
    }
}
