//! Loads safetensors checkpoints, straight to where they belong, and says what it did.
//!
//! Bytes go one way: open, header, plan, read, stage, copy, hand over. Only errors and the
//! [`Report`] come back. Nothing in a model file can run code.
//!
//! - [`Model::open`] finds the files of a checkpoint and checks their headers.
//! - [`Model::load`] hands over all tensors, [`Model::stream`] each as soon as it is ready,
//!   [`Model::load_async`] the same without blocking a runtime.
//! - [`Model::tensor`] and [`Model::slice`] read one tensor, or a part of one, when it is touched.
//! - [`Model::plan`] shows every read and every byte of memory before the first byte is read.
//!
//! # Example
//! ```
//! use tensorhaul::{LoadOptions, Model};
//!
//! # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/models/tiny-llama");
//! let model = Model::open(path)?;
//! let loaded = model.load(&LoadOptions::default())?;
//! let norm = loaded.tensors.get("model.norm.weight").expect("a Llama has one");
//! println!("{:?}, first {}", norm, norm.as_slice::<f32>()?[0]);
//! println!("{:.1} GB/s from {}", loaded.report.gb_per_s, loaded.report.engine);
//! # Ok::<(), tensorhaul::Error>(())
//! ```

mod arrivals;
mod assignment;
#[cfg(feature = "tokio")]
mod asynchronous;
mod atomic;
pub mod bench;
mod cancel;
mod checksum;
pub mod convert;
mod copies;
#[cfg(feature = "cudarc")]
mod cuda_slice;
mod devices;
pub mod dlpack;
pub mod doctor;
mod error;
mod external;
mod fan_out;
mod gate;
mod handover;
mod lanes;
mod link;
mod loaded;
mod locate;
pub mod manifest;
mod mapped;
mod mapping;
mod model;
mod operations;
mod options;
mod over_read;
pub mod parallel;
mod pinned;
mod pipeline;
mod prepare;
mod private;
mod probed;
mod progress;
mod quantized;
mod queue;
mod raw;
mod report;
pub mod save;
#[cfg(feature = "conformance")]
pub mod selftest;
pub mod share;
mod sidecar;
mod storage;
mod stream;
mod tensor;
mod vendors;

#[cfg(feature = "tokio")]
pub use asynchronous::{LoadFuture, ProgressStream};
#[cfg(feature = "cudarc")]
pub use cuda_slice::BorrowedSlice;
pub use devices::{default_device, default_device_told, release_devices};
pub use error::{Error, ErrorKind, Result};
pub use external::{Allocator, ExternalMemory};
pub use loaded::{IntoIter, Loaded, Tensors};
pub use mapping::read_device_map;
pub use model::Model;
pub use options::{EngineChoice, Handover, LoadOptions, Preference, STAGING_BYTES_DEFAULT};
pub use pinned::PinnedAllocator;
pub use progress::Progress;
pub use quantized::Dequantization;
pub use raw::{MemoryOwner, RawTensor};
pub use report::{DeviceReport, Fallback, Phases, Report};
pub use stream::TensorStream;
pub use tensor::{Element, Tensor};

#[cfg(feature = "conformance")]
pub use tensorhaul_device::conformance;
pub use tensorhaul_device::{Allocation, Kept, cast};
pub use tensorhaul_direct::{Compatibility, DirectMode};
pub use tensorhaul_exchange as exchange;
pub use tensorhaul_io::memory::{Disk, FailsAt, Faults};
pub use tensorhaul_plan::placement::UnknownDevice;
pub use tensorhaul_plan::{
    Assembled, Assembly, Checkpoint, DeviceId, DeviceMap, DeviceMapError, Dims, Dtype, DtypeKind, File,
    OverRead, OverReadReason, OverReadSum, Part, Plan, Promised, Request, Select, Share, SharePromised,
    Slice, TensorId, TensorInfo, TensorRef, assembly, quant,
};
