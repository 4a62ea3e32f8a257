//! The contract a device backend keeps, the host backend, and the suite every backend passes.
//!
//! A [`Device`] is one place that tensors can live in. Its methods are called once per staging buffer
//! or tensor, so a call through `dyn` costs nothing that can be measured. Arguments are checked above the
//! contract, once: a backend reports only what its caller could not know, such as memory that ran out
//! or a device that is lost.
//!
//! Work goes to one of two in-order queues, [`Stream::Copy`] and [`Stream::Compute`]. A method that
//! queues work returns before the work is done; an [`Event`] recorded behind it tells when it is.
//!
//! The [host backend](host::Host) is a product, not a mock: it loads into the host's own memory, and
//! it is what accelerators are compared with. [`dequantize`] is its arithmetic for quantized tensors.

pub mod cast;
#[cfg(feature = "conformance")]
pub mod conformance;
mod contract;
pub mod dequantize;
pub mod float;
pub mod gpu;
pub mod host;
mod operation;

pub use contract::{
    Allocation, Capabilities, Device, DeviceError, Event, Kept, MemoryInfo, Near, Piece, STORAGE_ALIGN_BYTES,
    Stream, StridedCopy,
};
pub use operation::{Cast, Dequantize, Location, Operation, OperationKind, Source, Strided};
