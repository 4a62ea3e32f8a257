//! The functions of NCCL that ranks are connected with; RCCL has the same.
//!
//! # Source
//! NCCL 2.7 `nccl.h`: signatures, `NCCL_UNIQUE_ID_BYTES`, `ncclUint8`, status codes; RCCL's `rccl.h` has them under the same names and
//! numbers. `ncclGetLastError` is of NCCL 2.13, `ncclCommInitRankConfig` and `ncclConfig_t` with its initializer of 2.14.

use std::ffi::{c_char, c_int, c_void};

pub(crate) type Comm = *mut c_void;
pub(crate) type Stream = *mut c_void;

/// `ncclCommInitRankConfig`.
pub(crate) type BeginFn = unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int;
/// `ncclCommGetAsyncError`.
pub(crate) type AskFn = unsafe extern "C" fn(Comm, *mut c_int) -> c_int;

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
        fn ncclCommInitRankConfig(*mut Comm, c_int, UniqueId, c_int, *mut Config);
        fn ncclCommGetAsyncError(Comm, *mut c_int);
        fn ncclGetLastError(Comm) -> *const c_char;
    }
}

/// A communicator on its way between threads.
#[derive(Clone, Copy)]
pub(crate) struct CommHandle(pub(crate) Comm);

// SAFETY: a communicator may be used by any thread, one at a time; but for `ncclCommAbort`, which NCCL allows beside a call of another.
unsafe impl Send for CommHandle {}

/// `ncclUniqueId`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UniqueId {
    pub(crate) internal: [u8; UNIQUE_ID_BYTES],
}

pub(crate) const UNIQUE_ID_BYTES: usize = 128;

/// `ncclConfig_t` as of 2.14. Later libraries take the fields that they added from it only where its version says that they are there.
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    /// Where 2.14 has padding, and 2.17 a field: undefined, as its initializer says.
    padding: c_int,
}

impl Config {
    /// Returns the configuration of a communicator whose calls do not wait for peers.
    pub(crate) fn not_blocking() -> Config {
        Config {
            size: size_of::<Config>(),
            magic: CONFIG_MAGIC,
            version: VERSION_CONFIG as u32,
            blocking: 0,
            padding: c_int::MIN,
        }
    }
}

const _: () = assert!(size_of::<Config>() == 24, "as the C struct is laid out");

/// What `NCCL_CONFIG_INITIALIZER` sets.
const CONFIG_MAGIC: u32 = 0xcafe_beef;

/// `ncclUint8`.
pub(crate) const UINT8: c_int = 1;
/// `ncclInProgress`.
pub(crate) const IN_PROGRESS: c_int = 7;
/// The first version that sends and receives, as versions before 2.9 are numbered; later ones are numbered higher.
pub(crate) const VERSION_MIN: c_int = 2700;
/// The first version with `ncclCommInitRankConfig`: 2.14.
pub(crate) const VERSION_CONFIG: c_int = 21_400;
