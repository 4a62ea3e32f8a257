//! The compiled kernels, as PTX.

macro_rules! ptx {
    ($module:literal) => {
        // The driver wants text that is terminated.
        ($module, concat!(include_str!(concat!("../../../kernels/compiled/ptx/", $module, ".ptx")), "\0"))
    };
}

/// The modules of `kernels/`, by name.
pub(crate) const PTX: &[(&str, &str)] = &[
    ptx!("cast"),
    ptx!("dequantize_any"),
    ptx!("dequantize_rows"),
    ptx!("dequantize_tiles"),
    ptx!("scatter"),
    ptx!("strided"),
];

/// What they are for.
pub(crate) const ARCHITECTURES: &str = "sm_80 and newer";
