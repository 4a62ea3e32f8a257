//! The contract of an engine: jobs in, one answer each.

use std::any::Any;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use tensorhaul_plan::{Extent, Stride};
use tensorhaul_stage::Filling;

/// Reads the jobs of one feed.
pub trait Engine: Send + Sync {
    /// Returns the name that reports use.
    fn name(&self) -> &'static str;

    /// Reads jobs until the feed is done, on the calling thread or on threads that end before it returns.
    ///
    /// Every job taken from the feed is answered by exactly one [`Sink::done`] (or, when the kernel no
    /// longer answers, [`Sink::lost`]), also on error, and when it is, neither this process nor the kernel writes to its memory any more.
    fn run(&self, feed: &dyn Feed, sink: &dyn Sink) -> Counts;
}

/// Where an engine's jobs come from.
pub trait Feed: Sync {
    /// Returns the next job. With `wait` it waits for memory to read into and never returns [`Next::Busy`].
    fn next(&self, wait: bool) -> Next;
}

/// What a feed has.
pub enum Next {
    /// Read this.
    Job(Job),
    /// There are more jobs, but no memory to read them into at the moment.
    Busy,
    /// No more jobs: all taken, or the load is cancelled.
    Done,
}

/// Where an engine's answers go.
pub trait Sink: Sync {
    /// Takes the answer to one job.
    fn done(&self, done: Done);

    /// Takes the news that a job's memory is lost: the kernel may write to it for ever, so the engine
    /// leaked it instead of answering with [`Sink::done`].
    fn lost(&self, read: u32, error: ReadError);
}

/// One read to do.
pub struct Job {
    /// Number of the read in its plan.
    pub read: u32,
    /// Which bytes; for [`Access::Direct`] aligned as the file needs it, except at the file's end.
    pub extent: Extent,
    /// The pieces of the extent to read, which land back to back; the rest is left out. Through the page cache only, and only
    /// of engines that read on threads.
    pub stride: Option<Stride>,
    /// Through the page cache or past it.
    pub access: Access,
    /// Where the bytes go; at least as long as what is read, and for direct reads up to the next multiple
    /// of the file's alignment.
    pub memory: JobMemory,
}

/// Through the page cache or past it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// An ordinary read, served from the page cache where the pages are there.
    Cached,
    /// An `O_DIRECT` read: storage writes into the job's memory, and the page cache stays as it was.
    Direct,
}

/// Memory that a job owns while it is read into.
pub enum JobMemory {
    /// A buffer of the staging ring.
    Staging(Filling),
    /// The tensors' own memory.
    InPlace(Landing),
    /// The tensors' own memory on a device, which only engines of direct storage are given.
    Device(DeviceLanding),
}

impl JobMemory {
    /// Returns the memory to write into.
    ///
    /// # Panics
    /// When it is a device's: whoever chose the engine broke the contract.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            JobMemory::Staging(filling) => filling.bytes_mut(),
            JobMemory::InPlace(landing) => landing.bytes_mut(),
            JobMemory::Device(_) => panic!("the host cannot write to a device's memory"),
        }
    }
}

/// A range of the tensors' own memory, owned by one job at a time.
pub struct Landing {
    ptr: NonNull<u8>,
    len_bytes: usize,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl Landing {
    /// Takes a range of memory that `owner` keeps alive.
    ///
    /// # Safety
    /// - The `len_bytes` bytes from `ptr` are initialized, and valid for reads and writes while `owner` lives.
    /// - Until the landing is dropped, nobody else reads or writes them.
    pub unsafe fn new(ptr: NonNull<u8>, len_bytes: usize, owner: Arc<dyn Any + Send + Sync>) -> Landing {
        Landing { ptr, len_bytes, _owner: owner }
    }

    /// Returns the range to write into.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the conditions of `new`: initialized, kept alive by the owner, and ours alone.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len_bytes) }
    }
}

// SAFETY: the range has one owner at a time, this value; the thread that holds it is the one that writes.
unsafe impl Send for Landing {}

/// A range of a device's memory, owned by one job at a time.
pub struct DeviceLanding {
    base: u64,
    offset_bytes: u64,
    len_bytes: u64,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl DeviceLanding {
    /// Takes a range of an allocation that begins at the address `base` of its device, and that `owner` keeps alive.
    ///
    /// # Safety
    /// - The `len_bytes` bytes from `base + offset_bytes` are device memory that is valid while `owner` lives.
    /// - Until the landing is dropped, nobody else reads or writes them, also not by work queued earlier.
    pub unsafe fn new(
        base: u64,
        offset_bytes: u64,
        len_bytes: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> DeviceLanding {
        DeviceLanding { base, offset_bytes, len_bytes, _owner: owner }
    }

    /// Returns the address of the allocation's first byte, by which it may be registered.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Returns the distance of the range from there.
    pub fn offset_bytes(&self) -> u64 {
        self.offset_bytes
    }

    /// Returns the length of the range.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}

/// The answer to one job.
pub struct Done {
    /// Number of the read in its plan.
    pub read: u32,
    /// The memory, back from the engine; filled when `result` is `Ok`.
    pub memory: JobMemory,
    /// Whether every byte of the extent is there.
    pub result: Result<(), ReadError>,
}

/// What an engine did, in numbers that a noisy machine cannot blur.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// System calls made to read.
    pub system_calls: u64,
    /// Read requests given to the system; a job may take several.
    pub requests: u64,
    /// Requests that the system refused to do directly and that were read through the page cache instead.
    pub direct_refused: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.system_calls += other.system_calls;
        self.requests += other.requests;
        self.direct_refused += other.direct_refused;
    }
}

/// How much an engine keeps in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Requests in flight at once, to begin with.
    pub requests: u32,
    /// The most requests in flight; the depth grows up to this while that brings more bytes a second.
    pub requests_max: u32,
    /// The longest single request; a multiple of 4096.
    pub request_len_bytes: usize,
}

impl Default for Depth {
    /// 32 requests of 1 MiB, growing to 128: 32 MiB in flight keep a disk of 20 GB/s busy for 1.6 ms, more
    /// than it takes to answer; 128 MiB bridge the 6 ms of a network. Measured on a virtual disk, GB/s is flat within 3% from 512 KiB requests and 2 MiB in
    /// flight on, and 64 KiB requests lose 10% to half (ARCHITECTURE.md).
    fn default() -> Depth {
        Depth { requests: 32, requests_max: 128, request_len_bytes: 1 << 20 }
    }
}

/// A read that failed.
#[derive(Debug)]
pub struct ReadError {
    /// What was being read.
    pub extent: Extent,
    /// What happened.
    pub cause: ReadCause,
}

/// What ended a read.
#[derive(Debug)]
#[non_exhaustive]
pub enum ReadCause {
    /// The system reported an error.
    Io(io::Error),
    /// A library that reads in the system's stead reported an error.
    Library(Box<dyn std::error::Error + Send + Sync>),
    /// The file ended before the extent did.
    End {
        /// Offset in the file at which nothing more came.
        at_bytes: u64,
    },
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (begin, end) = (self.extent.offset_bytes, self.extent.end_bytes());
        match &self.cause {
            ReadCause::Io(_) | ReadCause::Library(_) => write!(f, "reading bytes {begin}..{end} failed"),
            // Reads behind the end know only that it is somewhere before them.
            ReadCause::End { at_bytes } if *at_bytes == begin => {
                write!(
                    f,
                    "reading bytes {begin}..{end}: the file ends before them; it was longer when it was opened"
                )
            }
            ReadCause::End { at_bytes } => {
                write!(
                    f,
                    "reading bytes {begin}..{end}: the file ends at byte {at_bytes}; it was longer when it was opened"
                )
            }
        }
    }
}

impl std::error::Error for ReadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.cause {
            ReadCause::Io(error) => Some(error),
            ReadCause::Library(error) => Some(&**error),
            ReadCause::End { .. } => None,
        }
    }
}
