//! Direct storage: reads straight into device memory, by NVIDIA's cuFile or AMD's hipFile.
//!
//! Nothing of either is needed to build this crate. The vendor's library is loaded at run time, after a device was found and opened,
//! and it is never left in compatibility mode, in which it reads through host memory behind the caller's back, unless that is
//! [asked for](Compatibility).
//!
//! Whether direct storage works is found out for each file by use: [`Library::open`], then [`Probe::try_file`], which registers the
//! file and compares its first page, read into the device, with an ordinary read. Whatever stands in the way is a [`Refusal`] that says
//! so. [`Direct`] then is the engine that reads those files, into device memory alone.

mod batch;
mod engine;
mod kernel;
mod library;
mod pieces;
mod probe;
mod refusal;
mod registered;
mod sys;
mod tail;
mod vendor;

pub use engine::{Direct, DirectMode, Unregistered};
pub use kernel::Kernel;
pub use library::{Compatibility, Library};
pub use probe::{DirectFile, Probe};
pub use refusal::{CallFailed, Refusal};
pub use vendor::{CUFILE_LIBRARY_VARIABLE, HIPFILE_LIBRARY_VARIABLE, Vendor};
