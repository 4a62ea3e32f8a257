//! The planner: header bytes and a request in, an immutable [`Plan`] out.
//!
//! This crate is pure. It opens no file, reads no clock or environment, starts no thread and
//! holds no `unsafe`; whatever it decides can be decided again from the same bytes, printed, and
//! kept as a golden file. Engines and backends obey the plan and report what they did.
//!
//! The types follow the flow:
//!
//! - [`Header`] is one file's tensor list, checked; [`Index`] is a sharded checkpoint's file list.
//! - [`Checkpoint`] joins many headers into one tensor table.
//! - [`Request`] says which tensors, which part of each, onto which device.
//! - [`Assembly`] is a result whose tensors are put together from parts of others; [`parallel`] makes one for each rank.
//! - [`Plan`] says which bytes are read, where each byte lands, and what that costs in memory.
//!
//! # Example
//! ```
//! use std::sync::Arc;
//! use tensorhaul_plan::{Checkpoint, File, Header, Machine, Plan, Request};
//!
//! let json = br#"{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#;
//! let file_len_bytes = 8 + json.len() as u64 + 16;
//! let header = Header::parse(json, file_len_bytes)?;
//! let checkpoint = Arc::new(Checkpoint::new(vec![File::new("model.safetensors", header)])?);
//! let plan = Plan::new(&checkpoint, &Request::all(), &Machine::default())?;
//! assert_eq!(plan.promised().payload_bytes, 16);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

pub mod assembly;
pub mod checkpoint;
pub mod device_map;
pub mod dims;
pub mod dtype;
pub mod extent;
pub mod header;
pub mod in_place;
pub mod index;
pub mod machine;
pub mod parallel;
pub mod placement;
pub mod plan;
pub mod quant;
pub mod request;
mod schedule;
pub mod share;
pub mod slice;
mod text;

pub use assembly::{Assembled, Assembly, Padding, Part, Unfused};
pub use checkpoint::{Checkpoint, File, TensorId, TensorRef};
pub use device_map::{DeviceMap, DeviceMapError};
pub use dims::Dims;
pub use dtype::{Dtype, DtypeKind, numel};
pub use extent::{Extent, Stride};
pub use header::{Header, HeaderError, TensorInfo};
pub use in_place::{InPlace, Route};
pub use index::{Index, IndexError};
pub use machine::Machine;
pub use placement::{Arena, DeviceId, Place};
pub use plan::{
    Brought, Copy, Operation, OverRead, OverReadReason, OverReadSum, PlacedTensor, Plan, PlanError, Promised,
    Read, Source, Staged, Steps, Target,
};
pub use request::{Dequantize, External, Layout, Request, Select};
pub use share::{Share, ShareError, SharePromised};
pub use slice::{Slice, SliceError, SliceRange};
