//! Engines that read extents of files into memory, and the probe of those files.
//!
//! An engine obeys: its [`Feed`] gives it one [`Job`] after another (which extent, through the page
//! cache or past it, into which memory), and it answers each with one [`Done`]. It chooses nothing
//! but how many requests it keeps in flight, within the [`Depth`] it was built with.
//!
//! | engine | reads with | use |
//! |---|---|---|
//! | [`Pread`](pread::Pread) | `pread` on threads | any system; page-cache hits |
//! | [`Uring`](uring::Uring) | `io_uring`, registered files and buffers | `O_DIRECT` at depth with one thread |
//! | [`Mmap`](mmap::Mmap) | copies out of a mapping on threads | by the caller's choice |
//! | [`Memory`](memory::Memory) | bytes in memory, with seeded faults | tests, examples |
//!
//! Bytes go into memory that the job owns, and the job comes back with its memory whatever happens,
//! so nobody frees what a kernel may still write.

#[cfg(feature = "conformance")]
pub mod conformance;
pub mod engine;
pub mod file;
pub mod memory;
pub mod mmap;
#[cfg(feature = "io-uring")]
mod pacer;
pub mod pread;
pub mod probe;
mod threads;
#[cfg(feature = "io-uring")]
pub mod uring;

pub use engine::{
    Access, Counts, Depth, DeviceLanding, Done, Engine, Feed, Job, JobMemory, Landing, Next, ReadCause,
    ReadError, Sink,
};
pub use file::{OpenError, OpenFile};
pub use probe::{Direct, DirectRefusal, Residency};
