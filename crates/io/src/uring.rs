//! The `io_uring` engine: many direct reads in flight from one thread.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use io_uring::{IoUring, opcode, squeue, types};
use tensorhaul_stage::Ring;

use crate::engine::{
    Access, Counts, Depth, Done, Engine, Feed, Job, JobMemory, Next, ReadCause, ReadError, Sink,
};
use crate::file::OpenFile;
use crate::pacer::Pacer;
use crate::threads;

/// Reads through an `io_uring`; one thread, as many in flight as the disk rewards.
///
/// Jobs are cut into requests of at most `depth.request_len_bytes`, because the disk's best request
/// and the best staging buffer differ in size. Staging buffers are registered with the kernel where
/// RLIMIT_MEMLOCK allows it, which saves pinning their pages for each request.
pub struct Uring {
    /// Closed before the files and the staging memory it has registered are let go.
    ring: Mutex<IoUring>,
    registered: Registered,
    files: Arc<[OpenFile]>,
    depth: Depth,
    processors: Vec<u32>,
    _staging: Option<Ring>,
}

/// What the kernel was willing to register.
#[derive(Debug)]
pub struct Registered {
    /// Whether descriptors are looked up once instead of for every request.
    pub files: Result<(), io::Error>,
    /// Whether staging buffers are pinned once; `None` when there are none.
    pub buffers: Option<Result<(), BuffersRefused>>,
}

/// The kernel did not pin the staging buffers; reads pin their pages one by one instead.
#[derive(Debug)]
pub struct BuffersRefused {
    /// Bytes that would be pinned.
    pub needed_bytes: usize,
    /// RLIMIT_MEMLOCK, if there is one.
    pub limit_bytes: Option<u64>,
    /// The kernel's answer.
    pub source: io::Error,
}

impl fmt::Display for BuffersRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "registering staging buffers needs {} bytes of locked memory", self.needed_bytes)?;
        match self.limit_bytes {
            Some(limit) => {
                write!(f, ", the limit is {limit} ({}); raise RLIMIT_MEMLOCK or go on without", self.source)
            }
            None => write!(f, " ({})", self.source),
        }
    }
}

impl Uring {
    /// Sets up a ring for these files, and registers them and the staging ring's memory.
    ///
    /// # Errors
    /// The system's, when it has no `io_uring` or forbids it (seccomp, `kernel.io_uring_disabled`).
    pub fn new(files: Arc<[OpenFile]>, depth: Depth, staging: Option<Ring>) -> io::Result<Uring> {
        let ring = build(depth.requests_max)?;
        let registered = Registered {
            files: register_files(&ring, &files),
            buffers: staging.as_ref().map(|staging| register_buffers(&ring, staging)),
        };
        Ok(Uring { ring: ring.into(), registered, files, depth, processors: Vec::new(), _staging: staging })
    }

    /// Keeps the thread that submits and the kernel's workers, who copy what is in the page cache, on these processors, those near the device
    /// that the bytes go to; empty means any. A caller that is bound to others stays there. A kernel that refuses (before 5.14) lets its workers run
    /// anywhere, only slower.
    pub fn near(self, processors: Vec<u32>) -> Uring {
        let processors = threads::permitted(processors);
        if !processors.is_empty() {
            let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = ring.submitter().register_iowq_aff(&processor_set(&processors));
        }
        Uring { processors, ..self }
    }

    /// Returns what the kernel registered, and why not where it refused.
    pub fn registered(&self) -> &Registered {
        &self.registered
    }

    fn buffers_are_registered(&self) -> bool {
        matches!(self.registered.buffers, Some(Ok(())))
    }
}

fn build(entries: u32) -> io::Result<IoUring> {
    // Completions are processed when this thread asks for them, not by interrupting it (Linux 6.1).
    let modern = IoUring::builder().setup_coop_taskrun().build(entries);
    modern.or_else(|_| IoUring::new(entries))
}

fn register_files(ring: &IoUring, files: &[OpenFile]) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let descriptors = files.iter().flat_map(|file| {
        let cached = file.cached().as_raw_fd();
        [cached, file.direct().map_or(cached, |(direct, _)| direct.as_raw_fd())]
    });
    ring.submitter().register_files(&descriptors.collect::<Vec<_>>())
}

/// Returns a set as the kernel takes it.
fn processor_set(processors: &[u32]) -> libc::cpu_set_t {
    // SAFETY: a set of bits, of which none is set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for processor in processors.iter().filter(|processor| **processor < libc::CPU_SETSIZE as u32) {
        // SAFETY: the number is of a bit of the set, as just checked.
        unsafe { libc::CPU_SET(*processor as usize, &mut set) };
    }
    set
}

/// Registers each staging buffer under its own index.
fn register_buffers(ring: &IoUring, staging: &Ring) -> Result<(), BuffersRefused> {
    let (layout, start) = (staging.layout(), staging.memory().as_ptr().as_ptr());
    let vector = |index: u32| libc::iovec {
        iov_base: start.wrapping_add(index as usize * layout.buffer_len_bytes()).cast(),
        iov_len: layout.buffer_len_bytes(),
    };
    let vectors: Vec<_> = (0..layout.buffer_count()).map(vector).collect();
    // SAFETY: the vectors lie in the staging ring's memory, and the engine holds a handle of that ring
    // until after its io_uring is closed.
    let result = unsafe { ring.submitter().register_buffers(&vectors) };
    result.map_err(|source| BuffersRefused {
        needed_bytes: layout.len_bytes(),
        limit_bytes: rustix::process::getrlimit(rustix::process::Resource::Memlock).current,
        source,
    })
}

impl Engine for Uring {
    fn name(&self) -> &'static str {
        "io-uring"
    }

    fn run(&self, feed: &dyn Feed, sink: &dyn Sink) -> Counts {
        threads::stay_on(&self.processors);
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let mut flight = Flight {
            engine: self,
            jobs: Vec::new(),
            free: Vec::new(),
            again: VecDeque::new(),
            requests: 0,
            pacer: Pacer::new(self.depth.requests, self.depth.requests_max),
            counts: Counts::default(),
        };
        flight.run(&mut ring, feed, sink);
        flight.counts
    }
}

/// The jobs a run has taken and not yet answered.
struct Flight<'e> {
    engine: &'e Uring,
    /// Slots; `user_data` of a request names its slot and its place in the job.
    jobs: Vec<Option<Active>>,
    free: Vec<u32>,
    /// Requests to submit before any new job: the job at hand, and what came back incomplete.
    again: VecDeque<Request>,
    requests: u32,
    pacer: Pacer,
    counts: Counts,
}

struct Active {
    job: Job,
    /// Requests of this job that wait or are in flight.
    open: u32,
    failed: Option<ReadCause>,
}

#[derive(Clone, Copy)]
struct Request {
    slot: u32,
    /// Range of the job's extent, from its first byte.
    begin: u32,
    end: u32,
    access: Access,
}

impl Flight<'_> {
    fn run(&mut self, ring: &mut IoUring, feed: &dyn Feed, sink: &dyn Sink) {
        let mut sent: Vec<Option<Request>> = vec![None; self.engine.depth.requests_max as usize];
        let mut tags: Vec<u32> = (0..self.engine.depth.requests_max).rev().collect();
        loop {
            let more = self.fill(ring, &mut sent, &mut tags, feed);
            if self.requests == 0 {
                if more {
                    continue;
                }
                return;
            }
            if let Err(error) = self.submit_and_wait(ring) {
                return self.abandon(error, sink);
            }
            let completions: Vec<(u64, i32)> =
                ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
            let now = Instant::now();
            for (tag, result) in completions {
                self.pacer.arrived(result.max(0) as u64, now);
                let request = sent[tag as usize].take().expect("the kernel answers each request once");
                tags.push(tag as u32);
                self.requests -= 1;
                self.complete(request, result, sink);
            }
        }
    }

    /// Queues requests up to the depth; false once the feed has nothing more.
    fn fill(
        &mut self,
        ring: &mut IoUring,
        sent: &mut [Option<Request>],
        tags: &mut Vec<u32>,
        feed: &dyn Feed,
    ) -> bool {
        while let Some(tag) = tags.last().copied().filter(|_| self.requests < self.pacer.depth()) {
            let request = match self.again.pop_front() {
                Some(request) => request,
                // Waiting is right only when nothing is in flight: memory may come back with a completion.
                None => match feed.next(self.requests == 0) {
                    Next::Job(job) => {
                        self.take(job);
                        continue;
                    }
                    Next::Busy => return true,
                    Next::Done => return false,
                },
            };
            tags.pop();
            sent[tag as usize] = Some(request);
            let entry = self.entry(request).user_data(u64::from(tag));
            // SAFETY: the entry points into the job's memory, which stays in `jobs` until the request's
            // completion is here; `abandon` leaks it if completions can no longer be had.
            unsafe { ring.submission().push(&entry) }.expect("the queue has an entry for every tag");
            self.requests += 1;
            self.counts.requests += 1;
        }
        true
    }

    /// Takes a job in and cuts it into requests.
    fn take(&mut self, job: Job) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() as u32 - 1
        });
        assert!(job.stride.is_none(), "reads of pieces go to engines that read on threads");
        let (len, step) = (job.extent.len_bytes as u32, self.engine.depth.request_len_bytes as u32);
        let access = job.access;
        let pieces = (0..len).step_by(step as usize).map(|begin| Request {
            slot,
            begin,
            end: len.min(begin + step),
            access,
        });
        let before = self.again.len();
        self.again.extend(pieces);
        let open = (self.again.len() - before) as u32;
        self.jobs[slot as usize] = Some(Active { job, open, failed: None });
    }

    fn entry(&mut self, request: Request) -> squeue::Entry {
        let engine = self.engine;
        let Active { job, .. } =
            self.jobs[request.slot as usize].as_mut().expect("a request's job is in its slot");
        let file = &engine.files[job.extent.file as usize];
        let offset_bytes = job.extent.offset_bytes + u64::from(request.begin);
        let direct = file.direct().filter(|_| request.access == Access::Direct);
        let buffer = match &job.memory {
            JobMemory::Staging(filling) if engine.buffers_are_registered() => Some(filling.index() as u16),
            _ => None,
        };
        let memory = job.memory.bytes_mut();
        let ask = match direct {
            // A direct read asks for whole sectors, also of the last, partial one.
            Some((_, direct)) => {
                request.end.next_multiple_of(direct.align_bytes as u32).min(memory.len() as u32)
            }
            None => request.end,
        };
        let target = memory[request.begin as usize..ask as usize].as_mut_ptr();
        let len = ask - request.begin;
        let descriptor = 2 * job.extent.file + u32::from(direct.is_some());
        macro_rules! read {
            ($descriptor:expr) => {
                match buffer {
                    Some(buffer) => {
                        opcode::ReadFixed::new($descriptor, target, len, buffer).offset(offset_bytes).build()
                    }
                    None => opcode::Read::new($descriptor, target, len).offset(offset_bytes).build(),
                }
            };
        }
        use std::os::fd::AsRawFd;
        match (&engine.registered.files, direct) {
            (Ok(()), _) => read!(types::Fixed(descriptor)),
            (Err(_), Some((direct, _))) => read!(types::Fd(direct.as_raw_fd())),
            (Err(_), None) => read!(types::Fd(file.cached().as_raw_fd())),
        }
    }

    fn submit_and_wait(&mut self, ring: &mut IoUring) -> io::Result<()> {
        loop {
            self.counts.system_calls += 1;
            match ring.submit_and_wait(1) {
                Ok(_) => return Ok(()),
                // Interrupted, or the completion queue wants draining first: completions are there to take.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes the kernel's answer to one request.
    fn complete(&mut self, request: Request, result: i32, sink: &dyn Sink) {
        let active = self.jobs[request.slot as usize].as_mut().expect("a request's job is in its slot");
        let at_bytes = active.job.extent.offset_bytes + u64::from(request.begin);
        let align = self.engine.files[active.job.extent.file as usize]
            .direct()
            .map_or(1, |(_, direct)| direct.align_bytes as u32);
        let rest = match (-result, result) {
            (_, read) if read > 0 => {
                let begin = request.begin + read as u32;
                // The rest of a read that stopped inside a sector has no direct address.
                let access = if begin.is_multiple_of(align) { request.access } else { Access::Cached };
                (begin < request.end).then_some(Request { begin, access, ..request })
            }
            (_, 0) => {
                // Requests of one job complete in any order: the file ends where the first of them found its end.
                match &mut active.failed {
                    Some(ReadCause::End { at_bytes: known }) => *known = at_bytes.min(*known),
                    failed => _ = failed.get_or_insert(ReadCause::End { at_bytes }),
                }
                None
            }
            (libc::EINTR | libc::EAGAIN, _) => Some(request),
            (libc::EINVAL | libc::EOPNOTSUPP, _) if request.access == Access::Direct => {
                self.counts.direct_refused += 1;
                Some(Request { access: Access::Cached, ..request })
            }
            (errno, _) => {
                active.failed.get_or_insert(ReadCause::Io(io::Error::from_raw_os_error(errno)));
                None
            }
        };
        match rest {
            Some(rest) if !matches!(active.failed, Some(ReadCause::Io(_))) => self.again.push_front(rest),
            _ => active.open -= 1,
        }
        if active.open == 0 {
            self.answer(request.slot, sink);
        }
    }

    fn answer(&mut self, slot: u32, sink: &dyn Sink) {
        let active = self.jobs[slot as usize].take().expect("an answered job is in its slot");
        self.free.push(slot);
        let Job { read, extent, memory, .. } = active.job;
        let result = active.failed.map_or(Ok(()), |cause| Err(ReadError { extent, cause }));
        sink.done(Done { read, memory, result });
    }

    /// Gives up on a ring that no longer answers. The kernel may still write into every job's memory, so
    /// that memory is leaked; the load fails with the error.
    fn abandon(&mut self, error: io::Error, sink: &dyn Sink) {
        for active in self.jobs.drain(..).flatten() {
            let Job { read, extent, memory, .. } = active.job;
            let cause = ReadCause::Io(io::Error::new(error.kind(), format!("io_uring_enter: {error}")));
            sink.lost(read, ReadError { extent, cause });
            std::mem::forget(memory);
        }
    }
}
