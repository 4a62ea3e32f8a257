//! The engine: jobs whose memory is a device's, read by storage itself.

use std::io;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use tensorhaul_device::{Allocation, Device};
use tensorhaul_io::{
    Counts, DeviceLanding, Done, Engine, Feed, Job, JobMemory, Next, OpenFile, ReadCause, ReadError, Sink,
};
use tensorhaul_plan::Extent;

use crate::batch::{self, Batch};
use crate::library::{Library, ReadFailed};
use crate::pieces::{next_piece, resume_at};
use crate::probe::DirectFile;
use crate::refusal::CallFailed;
use crate::registered::RegisteredBuffer;
use crate::tail::Tail;

/// How many reads are in flight, and by which calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DirectMode {
    /// Threads, each with one read in flight that it waits for.
    Threads {
        /// How many; at least one.
        count: u32,
    },
    /// One thread that submits reads in batches, where the library has them and sets one up; else threads.
    Batch {
        /// Reads in flight at once; at least one, and at most what the library takes in a batch.
        entries: u32,
    },
}

impl Default for DirectMode {
    /// 8 threads: with reads of 16 MiB, 128 MiB in flight, as much as `io_uring` keeps. Not measured on hardware yet.
    fn default() -> DirectMode {
        DirectMode::Threads { count: 8 }
    }
}

/// Reads with cuFile or hipFile, straight into device memory.
///
/// Where a library stops answering, reads may be under way for ever. Everything they use is then kept for the life of the process: the
/// memory, its registration, the files and theirs, the library and the device.
pub struct Direct {
    // Dropped in this order: buffers and files are deregistered, when no batch is left, before the library may close.
    /// Where reads go in batches, between runs.
    batch: Mutex<Option<Batch>>,
    pub(crate) buffers: Vec<Buffer>,
    files: Arc<[Option<DirectFile>]>,
    pub(crate) library: Arc<Library>,
    device: Arc<dyn Device>,
    mode: DirectMode,
    /// Why it is not the mode that was asked for, if it is not.
    why: Option<String>,
    /// Whether reads may be under way that nobody waits for.
    is_lost: AtomicBool,
}

/// An allocation that reads go to.
pub(crate) struct Buffer {
    /// Before the allocation, which may be freed with this value.
    _registered: Option<RegisteredBuffer>,
    pub(crate) allocation: Arc<dyn Allocation>,
}

/// Allocations that the library did not register: reads into them make a stop in memory of its own.
#[derive(Debug)]
pub struct Unregistered {
    /// How many.
    pub count: usize,
    /// What it said of the first.
    pub error: CallFailed,
}

impl Direct {
    /// Reads these files, by their numbers, into these allocations. Each allocation is registered once; one that the library refuses is read into all
    /// the same, which is slower and told.
    pub fn new(
        device: &Arc<dyn Device>,
        library: &Arc<Library>,
        files: Arc<[Option<DirectFile>]>,
        allocations: Vec<Arc<dyn Allocation>>,
        mode: DirectMode,
    ) -> (Direct, Option<Unregistered>) {
        let mut unregistered: Option<Unregistered> = None;
        let mut buffers = Vec::with_capacity(allocations.len());
        let mut register = || {
            for allocation in &allocations {
                let (base, len_bytes) = (allocation.address(), allocation.len_bytes());
                // SAFETY: the device is current; `Buffer` keeps the allocation until after it is deregistered.
                let registered = unsafe { RegisteredBuffer::new(library, device, base, len_bytes) };
                let registered = registered.map_err(|error| match &mut unregistered {
                    Some(unregistered) => unregistered.count += 1,
                    None => unregistered = Some(Unregistered { count: 1, error }),
                });
                buffers.push(Buffer { _registered: registered.ok(), allocation: Arc::clone(allocation) });
            }
        };
        let mut reads = (DirectMode::default(), None, None);
        // A device that cannot be made current fails the first read, which says so.
        let _ = device.enter(&mut || {
            register();
            reads = reads_with(library, mode);
        });
        let (mode, batch, why) = reads;
        let (device, library) = (Arc::clone(device), Arc::clone(library));
        let (batch, is_lost) = (Mutex::new(batch), AtomicBool::new(false));
        (Direct { batch, buffers, files, library, device, mode, why, is_lost }, unregistered)
    }

    /// Returns the calls it reads with, and why they are not those asked for, if they are not.
    pub fn mode(&self) -> (DirectMode, Option<&str>) {
        (self.mode, self.why.as_deref())
    }

    /// Reads jobs one after another on the calling thread, inside the device.
    fn work(&self, feed: &dyn Feed, sink: &dyn Sink) -> Counts {
        let mut counts = Counts::default();
        let inside = self.device.enter(&mut || {
            while let Next::Job(job) = feed.next(true) {
                sink.done(self.read(job, &mut counts));
            }
        });
        if let Err(error) = inside {
            self.answer_all(feed, sink, &error.to_string());
        }
        counts
    }

    /// Answers every job with what stands in the way of all.
    pub(crate) fn answer_all(&self, feed: &dyn Feed, sink: &dyn Sink, why: &str) {
        while let Next::Job(Job { read, extent, memory, .. }) = feed.next(true) {
            let cause = self.blame(ReadCause::Library(why.into()));
            sink.done(Done { read, memory, result: Err(ReadError { extent, cause }) });
        }
    }

    fn read(&self, job: Job, counts: &mut Counts) -> Done {
        let Job { read, extent, memory, .. } = job;
        counts.requests += 1;
        let result = self.fill(extent, landing(&memory), counts);
        Done { read, memory, result: result.map_err(|cause| ReadError { extent, cause: self.blame(cause) }) }
    }

    /// Asks the device, after a read that failed, whether it lives: where it does not, that is the cause, whatever the library called it.
    pub(crate) fn blame(&self, cause: ReadCause) -> ReadCause {
        match (cause, self.device.memory()) {
            (cause, Err(error)) if error.is_lost() && !matches!(cause, ReadCause::End { .. }) => {
                ReadCause::Library(error.into())
            }
            (cause, _) => cause,
        }
    }

    /// Keeps, from now on, everything that a read may use.
    pub(crate) fn lose(&self) {
        self.is_lost.store(true, Ordering::Relaxed);
    }

    /// Reads until the extent is complete, in as many calls as the library makes of it: one, as a rule.
    fn fill(&self, extent: Extent, landing: &DeviceLanding, counts: &mut Counts) -> Result<(), ReadCause> {
        let (vendor, file) = (self.library.vendor(), self.file(extent.file));
        let mut have = 0;
        while let Some(piece) = next_piece(vendor, extent, have) {
            let (at_bytes, offset_bytes) = (extent.offset_bytes + have, landing.offset_bytes() + have);
            if piece.is_tail {
                self.read_tail(file, at_bytes, piece.len_bytes, landing.base(), offset_bytes)?;
                counts.system_calls += 1;
                have += piece.len_bytes;
                continue;
            }
            counts.system_calls += 1;
            let (handle, len) = (file.registered.handle(), piece.len_bytes as usize);
            // SAFETY: the file is registered. The range is the job's own, inside its memory as `landing` checked, and of the device
            // that is current.
            let result = unsafe { self.library.read(handle, landing.base(), offset_bytes, at_bytes, len) };
            match result {
                Ok(0) => return Err(ReadCause::End { at_bytes }),
                Ok(read) => have = resume_at(vendor, have + read.min(piece.len_bytes), have)?,
                Err(ReadFailed::System(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(cause(error)),
            }
        }
        Ok(())
    }

    pub(crate) fn read_tail(
        &self,
        file: &DirectFile,
        at_bytes: u64,
        len_bytes: u64,
        base: u64,
        offset_bytes: u64,
    ) -> Result<(), ReadCause> {
        let buffer = self.buffers.iter().find(|buffer| buffer.allocation.address() == base);
        let target = &buffer.expect("reads go to the allocations the engine was made with").allocation;
        let tail = Tail { device: &*self.device, file: self.open_file(file), target };
        tail.read(at_bytes, len_bytes as usize, offset_bytes)
    }

    pub(crate) fn file(&self, number: u32) -> &DirectFile {
        let file = self.files.get(number as usize).and_then(Option::as_ref);
        file.expect("only files that direct storage takes are planned to be read by it")
    }

    fn open_file<'f>(&self, file: &'f DirectFile) -> &'f OpenFile {
        &file.files[file.number as usize]
    }

    fn run_threads(&self, count: u32, feed: &dyn Feed, sink: &dyn Sink) -> Counts {
        let total = Mutex::new(Counts::default());
        let worker = || {
            let counts = self.work(feed, sink);
            *total.lock().unwrap_or_else(PoisonError::into_inner) += counts;
        };
        thread::scope(|scope| {
            for number in 1..count {
                let name = format!("tensorhaul-{}-{number}", self.name());
                // A system that refuses a thread still has this one.
                let _ = thread::Builder::new().name(name).spawn_scoped(scope, worker);
            }
            worker();
        });
        total.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// One run at a time has the batch; another that begins meanwhile is answered.
    fn run_batches(&self, feed: &dyn Feed, sink: &dyn Sink) -> Counts {
        let mut counts = Counts::default();
        let Some(mut batch) = self.batch().take() else {
            self.answer_all(feed, sink, "another run of this engine has its batch");
            return counts;
        };
        let inside = self.device.enter(&mut || counts = batch::run(self, &mut batch, feed, sink));
        *self.batch() = Some(batch);
        if let Err(error) = inside {
            self.answer_all(feed, sink, &error.to_string());
        }
        counts
    }

    /// A panic elsewhere leaves a batch that is whole, or none.
    fn batch(&self) -> MutexGuard<'_, Option<Batch>> {
        self.batch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Decides with which calls the library reads, by use, with the device current: a batch is set up, or there is a reason why not.
fn reads_with(library: &Arc<Library>, mode: DirectMode) -> (DirectMode, Option<Batch>, Option<String>) {
    let DirectMode::Batch { entries: asked } = mode else { return (mode, None, None) };
    let asked = asked.max(1);
    let most = library.batch_entries_max().unwrap_or(asked);
    let entries = asked.min(most);
    let batch = match library.lacks_batches() {
        Some(why) => Err(why.to_owned()),
        None => Batch::set_up(library, entries),
    };
    match batch {
        Ok(batch) => {
            let why = (entries < asked).then(|| format!("the library takes {most} reads in a batch"));
            (DirectMode::Batch { entries }, Some(batch), why)
        }
        Err(why) => (DirectMode::default(), None, Some(why)),
    }
}

impl Engine for Direct {
    fn name(&self) -> &'static str {
        self.library.vendor().engine()
    }

    fn run(&self, feed: &dyn Feed, sink: &dyn Sink) -> Counts {
        match self.mode {
            DirectMode::Threads { count } => self.run_threads(count, feed, sink),
            DirectMode::Batch { .. } => self.run_batches(feed, sink),
        }
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        if *self.is_lost.get_mut() {
            mem::forget(mem::take(&mut self.buffers));
            mem::forget((Arc::clone(&self.files), Arc::clone(&self.library), Arc::clone(&self.device)));
        }
    }
}

/// Returns where a job's bytes go.
pub(crate) fn landing(memory: &JobMemory) -> &DeviceLanding {
    match memory {
        JobMemory::Device(landing) => landing,
        _ => panic!("direct storage is given jobs whose memory is a device's"),
    }
}

pub(crate) fn cause(error: ReadFailed) -> ReadCause {
    match error {
        ReadFailed::System(error) => ReadCause::Io(error),
        ReadFailed::Call(error) => ReadCause::Library(error.into()),
        ReadFailed::Unsaid => ReadCause::Library(error.to_string().into()),
    }
}
