//! CUDA's status codes as HIP's, which took over most of the numbers.

use std::ffi::c_int;

/// Returns what HIP says where CUDA says this.
pub(super) fn translate(code: c_int) -> c_int {
    match code {
        // PTX that does not fit the device or the driver, and a driver that has no compiler for it.
        218 | 221..=223 => NO_BINARY_FOR_GPU,
        // NVLink, a contained fault, and the hardware faults, all of which end the context.
        220 | 226 | 714..=718 => LAUNCH_FAILURE,
        code if crate::hip::is_known(code) => code,
        _ => UNKNOWN,
    }
}

/// Returns the status of a call, in HIP's numbers.
pub(super) fn check(code: c_int) -> Result<(), c_int> {
    if code == 0 { Ok(()) } else { Err(translate(code)) }
}

/// `hipErrorNoBinaryForGpu`.
pub(super) const NO_BINARY_FOR_GPU: c_int = 209;
/// `hipErrorLaunchFailure`.
const LAUNCH_FAILURE: c_int = 719;
/// `hipErrorUnknown`.
const UNKNOWN: c_int = 999;
