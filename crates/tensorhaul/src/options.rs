//! How to load: every choice with its default, its unit, and what it costs.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use tensorhaul_direct::{Compatibility, DirectMode};
use tensorhaul_plan::{DeviceId, DeviceMap, Request};

use crate::error::Error;
use crate::external::{Allocator, ExternalMemory};
use crate::parallel::Parallel;
use crate::progress::Progress;
use crate::quantized::Dequantization;
use crate::report::Fallback;

/// How to load. What to load is the [`Request`].
///
/// ```
/// use tensorhaul::{EngineChoice, LoadOptions};
///
/// let options = LoadOptions::default().engine(EngineChoice::Pread).staging_bytes(16 << 20);
/// ```
#[derive(Clone)]
pub struct LoadOptions {
    pub(crate) request: Request,
    pub(crate) handover: Handover,
    pub(crate) engine: EngineChoice,
    pub(crate) staging_bytes: u64,
    pub(crate) in_place: Preference,
    pub(crate) direct_storage: Preference,
    pub(crate) direct_mode: DirectMode,
    pub(crate) fallbacks: Vec<Fallback>,
    pub(crate) direct_compatibility: Compatibility,
    pub(crate) resident: bool,
    pub(crate) checksums: bool,
    #[cfg(feature = "io-uring")]
    pub(crate) io_uring_refusal: Option<i32>,
    pub(crate) thread_count: Option<u32>,
    pub(crate) dequantization: Option<Dequantization>,
    pub(crate) transient_bytes: Option<u64>,
    pub(crate) parallel: Option<Parallel>,
    pub(crate) targets: Vec<(String, ExternalMemory)>,
    pub(crate) allocator: Option<Arc<dyn Allocator>>,
    /// Streams of the caller's; `None` is the request's own device.
    pub(crate) streams: Vec<(Option<DeviceId>, u64)>,
    pub(crate) progress: Option<Arc<dyn Fn(Progress) + Send + Sync>>,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions {
            request: Request::all(),
            handover: Handover::Auto,
            engine: EngineChoice::Auto,
            staging_bytes: STAGING_BYTES_DEFAULT,
            in_place: Preference::Preferred,
            direct_storage: Preference::Off,
            direct_mode: DirectMode::default(),
            fallbacks: Vec::new(),
            direct_compatibility: Compatibility::Refused,
            resident: false,
            checksums: false,
            #[cfg(feature = "io-uring")]
            io_uring_refusal: None,
            thread_count: None,
            dequantization: None,
            transient_bytes: None,
            parallel: None,
            targets: Vec::new(),
            allocator: None,
            streams: Vec::new(),
            progress: None,
        }
    }
}

impl LoadOptions {
    /// What to load, and onto which device. Default: every tensor, whole, in host memory.
    pub fn request(self, request: Request) -> Self {
        LoadOptions { request, ..self }
    }

    /// Which tensors go to which devices; instead of the request's one device. Every tensor to be loaded must have an entry, and every
    /// entry a tensor. [`Model::device_map`](crate::Model::device_map) makes one by what is free. Makes the load private.
    pub fn device_map(mut self, map: DeviceMap) -> Self {
        self.request.device_map = Some(Arc::new(map));
        self
    }

    /// What host tensors are made of. Default: [`Handover::Auto`].
    pub fn handover(self, handover: Handover) -> Self {
        LoadOptions { handover, ..self }
    }

    /// How bytes are read. Default: [`EngineChoice::Auto`].
    pub fn engine(self, engine: EngineChoice) -> Self {
        LoadOptions { engine, ..self }
    }

    /// The most host memory between storage and device, in bytes. Default: 256 MiB, enough to keep a
    /// disk of 20 GB/s busy for 12 ms. Only what a load needs is taken; reads in place take none. Several devices
    /// share it by what is read for each. The least is 4096 for each device.
    pub fn staging_bytes(self, staging_bytes: u64) -> Self {
        LoadOptions { staging_bytes, ..self }
    }

    /// Whether reads may land in the tensors' own memory instead of a staging buffer. Default:
    /// preferred, which concerns the host and devices that share its memory (GB10, Jetson, MI300A, APUs). Off makes
    /// them load as other accelerators do, one copy more, the latter into ordinary device memory; required is an error where the
    /// device's memory cannot be read into.
    pub fn in_place(self, in_place: Preference) -> Self {
        LoadOptions { in_place, ..self }
    }

    /// Whether storage writes straight into the device's memory (GPUDirect Storage by cuFile, hipFile), past the host. Decided for each
    /// file by use, once the device is open. Default: off, because opening the library may take seconds and makes contexts on
    /// every device of the machine, and what it brings has not been measured on hardware yet.
    ///
    /// Preferred reads by it what it can and what the page cache does not hold, and the report tells the reason for every other file;
    /// required is an error with those reasons. Runs under 64 KiB are staged all the same. On the host, reads land in place
    /// without it. A [plan](crate::Model::plan) opens no device: it shows every file read so where that is required, and none where
    /// it is preferred.
    pub fn direct_storage(self, direct_storage: Preference) -> Self {
        LoadOptions { direct_storage, ..self }
    }

    /// How many direct reads are in flight, and by which calls. Default: 8 threads with reads of up to 16 MiB. Batches take one thread;
    /// a library without them reads on threads, and the report says so.
    pub fn direct_mode(self, direct_mode: DirectMode) -> Self {
        LoadOptions { direct_mode, ..self }
    }

    /// What was decided otherwise than preferred before the load, such as the [default device](crate::default_device_told): the report tells it
    /// with its own fallbacks. Default: nothing.
    pub fn fallbacks(self, fallbacks: Vec<Fallback>) -> Self {
        LoadOptions { fallbacks, ..self }
    }

    /// Whether the library of direct storage may read into host memory and copy from there where storage cannot write into the device
    /// (compatibility mode). Default: refused, because it is slower than the staging ring and cannot be seen. A setting of the
    /// process: it holds for the library until [`release_devices`](crate::release_devices).
    pub fn direct_compatibility(self, direct_compatibility: Compatibility) -> Self {
        LoadOptions { direct_compatibility, ..self }
    }

    /// Whether a mapped load touches every page before it returns. Default: no, pages come when they
    /// are first read. A private load is always resident.
    pub fn resident(self, resident: bool) -> Self {
        LoadOptions { resident, ..self }
    }

    /// Whether the report holds the xxh3-64 of every tensor's bytes. Default: no. Costs a pass over host
    /// memory, on threads of its own while later bytes arrive; makes a mapped load resident. What a device holds is read back, each copy
    /// of a tensor on several devices too, and a load whose copies differ fails.
    pub fn checksums(self, checksums: bool) -> Self {
        LoadOptions { checksums, ..self }
    }

    /// Threads that copy out of the page cache. Default: one a core, at most 16; a core copies 4 to
    /// 10 GB/s, so 16 pass what memory sustains.
    pub fn threads(self, thread_count: u32) -> Self {
        LoadOptions { thread_count: Some(thread_count.max(1)), ..self }
    }

    /// Which quantized tensors arrive as numbers. Default: none, all arrive as they are stored. Makes the load private.
    pub fn dequantize(self, dequantization: Dequantization) -> Self {
        LoadOptions { dequantization: Some(dequantization), ..self }
    }

    /// The most memory of each device, in bytes, for packed tensors that wait to be dequantized; free again when the load is over. Default:
    /// 256 MiB, or what the largest tensor needs. A smaller limit than that refuses the load.
    pub fn transient_bytes(self, transient_bytes: u64) -> Self {
        LoadOptions { transient_bytes: Some(transient_bytes), ..self }
    }

    /// Loads a rank's part of the model instead of all of it. Names of the request, and of the caller's memory, are then those
    /// of the rank's tensors. Default: everything. Makes the load private.
    pub fn parallel(self, parallel: Parallel) -> Self {
        LoadOptions { parallel: Some(parallel), ..self }
    }

    /// Memory of the caller's own for one tensor, exactly as long as the tensor's bytes (a mismatch is an error
    /// before the first read). May be given for any number of tensors, and for one that goes to several devices once for each. Makes the load
    /// private.
    pub fn target(mut self, tensor: impl Into<String>, memory: ExternalMemory) -> Self {
        self.targets.push((tensor.into(), memory));
        self
    }

    /// Where memory for the result comes from. Default: the device's own allocator, in stream order where it
    /// has that. Makes the load private.
    pub fn allocator(self, allocator: Arc<dyn Allocator>) -> Self {
        LoadOptions { allocator: Some(allocator), ..self }
    }

    /// The stream that uses the tensors, as a raw handle of the device's driver (`cudaStream_t` and `CUstream` are the
    /// same). Writes into the result's memory wait for what is queued on it before the load, and the
    /// memory is freed behind what is queued on it at the last drop. Default: none; memory is then freed behind the
    /// default stream.
    ///
    /// Tensors must not be dropped while this stream is under capture (a CUDA graph): freeing behind it records an event
    /// there, which either fails, and the memory is leaked, or ends the capture.
    ///
    /// # Safety
    /// The handle is a stream of the device the load is for, and outlives the load and every tensor of it.
    pub unsafe fn stream(mut self, stream: u64) -> Self {
        self.streams.retain(|(device, _)| device.is_some());
        self.streams.push((None, stream));
        self
    }

    /// As [`stream`](LoadOptions::stream), for one of the devices of a load onto several.
    ///
    /// # Safety
    /// The handle is a stream of this device, and outlives the load and every tensor of it.
    pub unsafe fn stream_on(mut self, device: DeviceId, stream: u64) -> Self {
        self.streams.retain(|(other, _)| *other != Some(device));
        self.streams.push((Some(device), stream));
        self
    }

    /// Returns the caller's stream of a device.
    pub(crate) fn stream_of(&self, device: DeviceId) -> Option<u64> {
        let mut streams = self.streams.iter();
        let of = |wanted: Option<DeviceId>| move |(device, _): &&(Option<DeviceId>, u64)| *device == wanted;
        let named = streams.clone().find(of(Some(device)));
        let own = || streams.find(of(None)).filter(|_| device == self.request.device);
        named.or_else(own).map(|(_, stream)| *stream)
    }

    /// Called from the loading thread after every read, with totals so far; keep it short.
    pub fn on_progress(self, progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        LoadOptions { progress: Some(Arc::new(progress)), ..self }
    }

    /// Makes `io_uring` look refused with this error number, to try out the fallback (1 is what seccomp
    /// answers). For tests.
    #[cfg(feature = "io-uring")]
    pub fn simulate_io_uring_refusal(self, errno: i32) -> Self {
        LoadOptions { io_uring_refusal: Some(errno), ..self }
    }
}

impl fmt::Debug for LoadOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadOptions")
            .field("request", &self.request)
            .field("handover", &self.handover)
            .field("engine", &self.engine)
            .field("staging_bytes", &self.staging_bytes)
            .field("in_place", &self.in_place)
            .field("direct_storage", &self.direct_storage)
            .field("resident", &self.resident)
            .field("dequantization", &self.dequantization)
            .field("checksums", &self.checksums)
            .finish_non_exhaustive()
    }
}

/// What tensors on the host are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Handover {
    /// Mapped on the host when the engine is `auto` or `mmap` and tensors are whole; else private.
    #[default]
    Auto,
    /// Pages of the file: no copy, no memory of one's own, instant when the page cache holds them.
    ///
    /// Whoever truncates the file afterwards kills this process when it touches a page that is gone
    /// (SIGBUS), and whoever writes to it changes the tensors. Choose private for files that others write.
    Mapped,
    /// Memory of one's own, read once, independent of the file from then on.
    Private,
}

/// How bytes are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum EngineChoice {
    /// Mapped for a mapped hand-over; else `pread` threads for what the page cache holds, and `io_uring`
    /// past it for the rest, or `pread` threads where there is no `io_uring`.
    #[default]
    Auto,
    /// A mapping of the file.
    Mmap,
    /// `pread` threads for everything.
    Pread,
    /// `io_uring` for everything; where the system refuses it, `pread`, and the report says so.
    IoUring,
}

impl FromStr for EngineChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<EngineChoice, Error> {
        match text {
            "auto" => Ok(EngineChoice::Auto),
            "mmap" => Ok(EngineChoice::Mmap),
            "pread" => Ok(EngineChoice::Pread),
            "io-uring" => Ok(EngineChoice::IoUring),
            _ => {
                Err(Error::bad_request(format!("{text:?} is no engine; auto, mmap, pread and io-uring are")))
            }
        }
    }
}

/// How much the caller wants something that may be impossible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// An error where it is impossible.
    Required,
    /// Used where it is possible; the report tells where not.
    #[default]
    Preferred,
    /// Never.
    Off,
}

impl FromStr for Preference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Preference, Error> {
        match text {
            "required" => Ok(Preference::Required),
            "preferred" => Ok(Preference::Preferred),
            "off" => Ok(Preference::Off),
            _ => {
                Err(Error::bad_request(format!("{text:?} is no preference; required, preferred and off are")))
            }
        }
    }
}

/// 256 MiB of memory takes about 0.1 s to pin, beside the first reads; see ARCHITECTURE.md.
pub const STAGING_BYTES_DEFAULT: u64 = 256 << 20;
