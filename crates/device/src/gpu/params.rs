//! What kernels are given: the structs of `kernels/params.h`, field by field.

use std::ffi::CStr;
use std::mem::offset_of;

use tensorhaul_plan::Dtype;

/// A kernel by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kernel {
    /// The file of `kernels/` that it is in.
    pub(super) module: &'static str,
    /// Its own name.
    pub(super) name: &'static CStr,
}

/// The parameters of one kernel.
///
/// # Safety
/// The type is `#[repr(C)]`, has no padding, and is what [`Params::KERNEL`] takes.
pub(super) unsafe trait Params: Copy {
    /// The kernel that takes them.
    const KERNEL: Kernel;

    /// Returns the parameters as the driver takes them.
    fn bytes(&self) -> &[u8] {
        // SAFETY: without padding, every byte of the value is initialized.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct CastParams {
    pub(super) source: u64,
    pub(super) target: u64,
    pub(super) numel: u64,
    pub(super) source_dtype: u32,
    pub(super) target_dtype: u32,
}

const _: () = assert!(size_of::<CastParams>() == 32 && offset_of!(CastParams, source_dtype) == 24);

// SAFETY: the sum of the fields is the size.
unsafe impl Params for CastParams {
    const KERNEL: Kernel = Kernel { module: "cast", name: c"cast" };
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct StridedParams {
    pub(super) source: u64,
    pub(super) target: u64,
    pub(super) source_stride: u64,
    pub(super) target_stride: u64,
    pub(super) piece_len: u64,
    pub(super) piece_count: u64,
    pub(super) lanes_log2: u32,
    pub(super) reserved: u32,
}

const _: () = assert!(size_of::<StridedParams>() == 56 && offset_of!(StridedParams, lanes_log2) == 48);

// SAFETY: the sum of the fields is the size.
unsafe impl Params for StridedParams {
    const KERNEL: Kernel = Kernel { module: "strided", name: c"strided" };
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct ScatterPiece {
    pub(super) source_offset: u32,
    pub(super) len: u32,
    pub(super) target: u64,
}

const _: () = assert!(size_of::<ScatterPiece>() == 16 && offset_of!(ScatterPiece, target) == 8);

/// As many pieces as fit into 4096 bytes, the most that a launch takes everywhere.
pub(super) const SCATTER_PIECES_MAX: usize = 254;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ScatterParams {
    pub(super) source: u64,
    pub(super) piece_count: u32,
    pub(super) lanes_log2: u32,
    pub(super) reserved: u64,
    pub(super) pieces: [ScatterPiece; SCATTER_PIECES_MAX],
}

const _: () = assert!(size_of::<ScatterParams>() == 4088 && offset_of!(ScatterParams, pieces) == 24);

// SAFETY: the sum of the fields is the size.
unsafe impl Params for ScatterParams {
    const KERNEL: Kernel = Kernel { module: "scatter", name: c"scatter" };
}

/// Returns the number by which kernels know an element type.
///
/// # Panics
/// When casts do not know it.
pub(super) fn dtype_code(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F64 => 0,
        Dtype::F32 => 1,
        Dtype::F16 => 2,
        Dtype::Bf16 => 3,
        Dtype::F8E5m2 => 4,
        Dtype::F8E4m3 => 5,
        Dtype::F8E8m0 => 6,
        Dtype::F8E4m3Fnuz => 7,
        Dtype::F8E5m2Fnuz => 8,
        other => unreachable!("{other} was not checked with `can_cast`"),
    }
}
