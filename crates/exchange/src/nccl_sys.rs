//! The functions of NCCL that ranks are connected with; RCCL has the same.
//!
//! # Source
//! NCCL 2.7 `nccl.h`: signatures, `NCCL_UNIQUE_ID_BYTES`, `ncclUint8`, status codes; RCCL's `rccl.h` has them under the same names and
//! numbers. `ncclGetLastError` is of NCCL 2.13.

use std::ffi::{c_char, c_int, c_void};

pub(crate) type Comm = *mut c_void;
pub(crate) type Stream = *mut c_void;

tensorhaul_device::driver_table! {
    /// NCCL, or RCCL.
    pub(crate) struct Table {
        fn ncclGetVersion(*mut c_int);
        fn ncclGetUniqueId(*mut UniqueId);
        fn ncclCommInitRank(*mut Comm, c_int, UniqueId, c_int);
        fn ncclCommDestroy(Comm);
        fn ncclCommAbort(Comm);
        fn ncclGroupStart();
        fn ncclGroupEnd();
        fn ncclSend(*const c_void, usize, c_int, c_int, Comm, Stream);
        fn ncclRecv(*mut c_void, usize, c_int, c_int, Comm, Stream);
        fn ncclGetErrorString(c_int) -> *const c_char;
        optional:
        fn ncclCommGetAsyncError(Comm, *mut c_int);
        fn ncclGetLastError(Comm) -> *const c_char;
    }
}

/// `ncclUniqueId`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UniqueId {
    pub(crate) internal: [u8; UNIQUE_ID_BYTES],
}

pub(crate) const UNIQUE_ID_BYTES: usize = 128;

/// `ncclUint8`.
pub(crate) const UINT8: c_int = 1;
/// `ncclInProgress`.
pub(crate) const IN_PROGRESS: c_int = 7;
/// The first version that sends and receives, as versions before 2.9 are numbered; later ones are numbered higher.
pub(crate) const VERSION_MIN: c_int = 2700;
