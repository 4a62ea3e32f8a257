//! The suite every engine passes: in tests with [`assert_passes`], on a real machine with [`run`].
//!
//! It writes a handful of files whose lengths end on, before and behind sectors and pages, and gives the
//! engine one small job after another: every offset and length around those boundaries, into staging
//! buffers and in place, through the page cache and past it where the folder's filesystem allows that.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tensorhaul_plan::Extent;
use tensorhaul_stage::{HostMemory, Layout, Ring, StagingMemory};

use crate::engine::{
    Access, Counts, Done, Engine, Feed, Job, JobMemory, Landing, Next, ReadCause, ReadError, Sink,
};
use crate::file::OpenFile;

/// One promise of the contract, and how an engine kept it.
#[derive(Debug)]
pub struct Verdict {
    /// The promise, as a sentence.
    pub promise: &'static str,
    /// What went wrong, if something did.
    pub result: Result<(), String>,
}

/// The files that an engine under test is to read.
#[derive(Clone)]
pub struct Files {
    /// The files, open, and tried for direct reads.
    pub open: Arc<[OpenFile]>,
    /// What they hold.
    pub bytes: Vec<Arc<[u8]>>,
    /// A file that is cut short once the engine stands, and where it ends then. Engines that read files find
    /// out by reading; one that holds bytes in memory has to be told.
    pub cut: Option<(u32, u64)>,
}

/// Makes the engine under test for these files, to read into buffers of this ring among other memory.
pub type Make<'m> = dyn Fn(&Files, &Ring) -> Box<dyn Engine> + 'm;

/// Tries every promise on engines that `make` makes, with files in `folder`, which are removed again.
pub fn run(folder: &Path, make: &Make<'_>) -> Vec<Verdict> {
    let verdict = |(promise, check): &(&'static str, Check)| Verdict { promise, result: check(folder, make) };
    PROMISES.iter().map(verdict).collect()
}

/// Tries every promise on engines that `make` makes, with files in `folder`, which are removed again.
///
/// # Panics
/// When one is broken; the message names it.
pub fn assert_passes(folder: &Path, make: &Make<'_>) {
    for verdict in run(folder, make) {
        if let Err(what) = verdict.result {
            panic!("{}: {what}", verdict.promise);
        }
    }
}

type Check = fn(&Path, &Make<'_>) -> Result<(), String>;

const PROMISES: &[(&str, Check)] = &[
    ("every extent around a boundary arrives byte for byte", extents_arrive),
    ("every tail of a file arrives, up to its last byte", tails_arrive),
    ("jobs longer than a request arrive whole", long_jobs_arrive),
    ("one run reads many files", many_files_are_read),
    ("jobs wait for memory when there is less of it than jobs", jobs_wait_for_memory),
    ("a feed that closes early ends the run, and what it gave out is answered", a_closed_feed_ends_the_run),
    ("a feed without jobs is left alone", an_empty_feed_ends_the_run),
    ("an engine runs again", an_engine_runs_again),
    ("a file that was cut short is an error that says where it ends", a_cut_file_is_an_error),
];

fn extents_arrive(folder: &Path, make: &Make<'_>) -> Result<(), String> {
    let scene = Scene::new(folder, RING_BUFFERS)?;
    let mut extents = Vec::new();
    for offset_bytes in around(&[0, 512, 4096, 2 * 4096, LONG as u64 / 3]) {
        for len_bytes in around(&[1, 512, 4096, 2 * 4096]).into_iter().filter(|len| *len > 0) {
            extents.push(Extent { file: 0, offset_bytes, len_bytes });
        }
    }
    scene.expect_all(&*make(&scene.files, &scene.ring), &extents)
}

fn tails_arrive(folder: &Path, make: &Make<'_>) -> Result<(), String> {
    let scene = Scene::new(folder, RING_BUFFERS)?;
    let mut extents = Vec::new();
    for (file, bytes) in scene.files.bytes.iter().enumerate() {
        let end = bytes.len() as u64;
        for len_bytes in around(&[1, 512, 4096, 2 * 4096, end]) {
            if (1..=end.min(BUFFER_LEN_BYTES as u64)).contains(&len_bytes) {
                extents.push(Extent { file: file as u32, offset_bytes: end - len_bytes, len_bytes });
            }
        }
    }
    scene.expect_all(&*make(&scene.files, &scene.ring), &extents)
}

fn long_jobs_arrive(folder: &Path, make: &Make<'_>) -> Result<(), String> {
    let scene = Scene::new(folder, RING_BUFFERS)?;
    let mut extents = Vec::new();
    for (offset_bytes, len_bytes) in
        [(0, 1 << 20), (1, 1 << 20), (4095, (1 << 20) + 2), (0, LONG as u64), (5, LONG as u64 - 5)]
    {
        extents.push(Extent { file: 0, offset_bytes, len_bytes });
    }
    let engine = make(&scene.files, &scene.ring);
    for access in scene.accesses() {
        scene.expect(&*engine, scene.jobs(&extents, access, Place::InPlace))?;
    }
    Ok(())
}

fn many_files_are_read(folder: &Path, make: &Make<'_>) -> Result<(), String> {
    let scene = Scene::new(folder, RING_BUFFERS)?;
    let mut extents = Vec::new();
    for round in 0..40 {
        for (file, bytes) in scene.files.bytes.iter().enumerate() {
            let offset_bytes = (round * 997) % bytes.len() as u64;
            let len_bytes = (bytes.len() as u64 - offset_bytes).min(1 + round * 211);
            extents.push(Extent { file: file as u32, offset_bytes, len_bytes });
        }
    }
    scene.expect_all(&*make(&scene.files, &scene.ring), &extents)
}

fn jobs_wait_for_memory(folder: &Path, make: &Make<'_>) -> Result<(), String> {
    for buffer_count in [1, 2] {
        let scene = Scene::new(folder, buffer_count)?;
        scene.expect_all(&*make(&scene.files, &scene.ring), &row(200))?;
    }
    Ok(())
}

fn a_closed_feed_ends_the_run(folder: &Path, make: &Make<'_>) -> Result<(), String> {
    let scene = Scene::new(folder, RING_BUFFERS)?;
    let engine = make(&scene.files, &scene.ring);
    for given in [1, 2, 7, 60] {
        for access in scene.accesses() {
            let jobs = scene.jobs(&row(100), access, Place::Staging);
            let answers = scene.drive(&*engine, &jobs, given).0;
            scene.check(&jobs, &answers, given)?;
        }
    }
    Ok(())
}

fn an_empty_feed_ends_the_run(folder: &Path, make: &Make<'_>) -> Result<(), String> {
    let scene = Scene::new(folder, RING_BUFFERS)?;
    let (answers, counts) = scene.drive(&*make(&scene.files, &scene.ring), &[], 0);
    expect(answers.is_empty(), || format!("{} answers to no job", answers.len()))?;
    expect(counts == Counts::default(), || format!("{counts:?}"))
}

fn an_engine_runs_again(folder: &Path, make: &Make<'_>) -> Result<(), String> {
    let scene = Scene::new(folder, RING_BUFFERS)?;
    let engine = make(&scene.files, &scene.ring);
    (0..3).try_for_each(|_| scene.expect_all(&*engine, &row(20)))
}

fn a_cut_file_is_an_error(folder: &Path, make: &Make<'_>) -> Result<(), String> {
    for end in [0, 1, 4096, 10_000, LONG as u64 - 1] {
        for place in [Place::Staging, Place::InPlace] {
            let mut scene = Scene::new(folder, RING_BUFFERS)?;
            scene.files.cut = Some((0, end));
            let engine = make(&scene.files, &scene.ring);
            scene.cut(end)?;
            let mut extents = vec![Extent { file: 2, offset_bytes: 0, len_bytes: 1 }];
            for offset_bytes in around(&[0, 4096, end.saturating_sub(4096), end, end + 5000]) {
                for len_bytes in [1, 4096, BUFFER_LEN_BYTES as u64] {
                    let fits = offset_bytes + len_bytes <= LONG as u64;
                    extents.extend(fits.then_some(Extent { file: 0, offset_bytes, len_bytes }));
                }
            }
            for access in scene.accesses() {
                scene.expect(&*engine, scene.jobs(&extents, access, place))?;
            }
        }
    }
    Ok(())
}

/// Returns a layout whose buffers hold at least `len_bytes`; how a budget becomes buffers is the layout's to decide.
fn ring_layout(len_bytes: usize) -> Result<Layout, String> {
    let mut budget_bytes = len_bytes;
    loop {
        let layout = Layout::new(budget_bytes, 4096).map_err(text)?;
        if layout.buffer_len_bytes() >= len_bytes {
            return Ok(layout);
        }
        budget_bytes *= 2;
    }
}

/// Small extents one behind the other.
fn row(count: u64) -> Vec<Extent> {
    (0..count).map(|index| Extent { file: 0, offset_bytes: index * 3001, len_bytes: 4000 }).collect()
}

/// The places, and their neighbours on both sides.
fn around(places: &[u64]) -> Vec<u64> {
    let mut values: Vec<u64> =
        places.iter().flat_map(|place| [place.saturating_sub(1), *place, place + 1]).collect();
    values.sort_unstable();
    values.dedup();
    values
}

/// Files, and a ring to read them into.
struct Scene {
    files: Files,
    ring: Ring,
    paths: Vec<PathBuf>,
}

impl Scene {
    fn new(folder: &Path, buffer_count: usize) -> Result<Scene, String> {
        let layout = ring_layout(BUFFER_LEN_BYTES)?.at_most(buffer_count as u64);
        let ring = Ring::new(HostMemory::allocate(layout.len_bytes()).map_err(text)?, layout);
        let (mut paths, mut bytes, mut open) = (Vec::new(), Vec::new(), Vec::new());
        let scene = SCENES.fetch_add(1, Ordering::Relaxed);
        for (number, len) in LENGTHS.iter().enumerate() {
            let path = folder.join(format!("conformance-{}-{scene}-{number}", std::process::id()));
            let contents: Arc<[u8]> = noise(number as u64, *len).into();
            fs::write(&path, &contents).map_err(text)?;
            paths.push(path);
            bytes.push(contents);
            let file = OpenFile::open(&paths[number]).map_err(text)?;
            // Where the filesystem refuses, the suite reads through the page cache alone.
            let _ = file.probe_direct();
            open.push(file);
        }
        Ok(Scene { files: Files { open: open.into(), bytes, cut: None }, ring, paths })
    }

    /// Returns the ways in which these files can be read.
    fn accesses(&self) -> Vec<Access> {
        let direct = self.files.open.iter().all(|file| file.direct().is_some());
        if direct { vec![Access::Cached, Access::Direct] } else { vec![Access::Cached] }
    }

    /// Cuts the first file short.
    fn cut(&self, end: u64) -> Result<(), String> {
        File::options().write(true).open(&self.paths[0]).and_then(|file| file.set_len(end)).map_err(text)
    }

    /// Reads the extents in every way into every memory.
    fn expect_all(&self, engine: &dyn Engine, extents: &[Extent]) -> Result<(), String> {
        for access in self.accesses() {
            for place in [Place::Staging, Place::InPlace] {
                self.expect(engine, self.jobs(extents, access, place))?;
            }
        }
        Ok(())
    }

    /// Turns extents into jobs: direct ones read the aligned cover.
    fn jobs(&self, extents: &[Extent], access: Access, place: Place) -> Vec<Wanted> {
        let wanted = extents.iter().map(|extent| {
            let file = &self.files.open[extent.file as usize];
            let align = file.direct().map_or(1, |(_, direct)| direct.align_bytes);
            let (extent, len_bytes) = match access {
                Access::Direct => {
                    let mut cover = extent.cover(align, file.len_bytes());
                    if place == Place::Staging {
                        cover.len_bytes = cover.len_bytes.min(self.ring.layout().buffer_len_bytes() as u64);
                    }
                    (cover, cover.len_bytes.next_multiple_of(align))
                }
                Access::Cached => (*extent, extent.len_bytes),
            };
            Wanted { extent, access, place, len_bytes: len_bytes as usize }
        });
        wanted.collect()
    }

    /// Reads jobs, and checks every answer.
    fn expect(&self, engine: &dyn Engine, jobs: Vec<Wanted>) -> Result<(), String> {
        let (answers, counts) = self.drive(engine, &jobs, jobs.len());
        self.check(&jobs, &answers, jobs.len())?;
        let jobs = jobs.len() as u64;
        expect(counts.requests >= jobs && counts.system_calls > 0, || format!("{counts:?} for {jobs} jobs"))?;
        expect(counts.direct_refused == 0, || format!("{counts:?}"))
    }

    /// Lets an engine read the first `given` jobs, and returns its answers by job.
    fn drive(&self, engine: &dyn Engine, jobs: &[Wanted], given: usize) -> (Vec<Vec<Answer>>, Counts) {
        let blocks = jobs.iter().map(|_| Mutex::new(None)).collect();
        let answers = Mutex::new(jobs.iter().map(|_| Vec::new()).collect());
        let bench = Bench { scene: self, jobs: &jobs[..given], next: Mutex::new(0), blocks, answers };
        let counts = engine.run(&bench, &bench);
        (bench.answers.into_inner().unwrap_or_else(PoisonError::into_inner), counts)
    }

    fn check(&self, jobs: &[Wanted], answers: &[Vec<Answer>], given: usize) -> Result<(), String> {
        for (number, (job, answers)) in jobs.iter().zip(answers).enumerate() {
            let expected = usize::from(number < given);
            expect(answers.len() == expected, || {
                format!("{} answers to {job:?}, number {number}", answers.len())
            })?;
            for answer in answers {
                self.check_answer(job, answer).map_err(|what| format!("{job:?}: {what}"))?;
            }
        }
        expect(self.ring.is_whole(), || format!("after the run: {:?}", self.ring))
    }

    fn check_answer(&self, job: &Wanted, answer: &Answer) -> Result<(), String> {
        let ends =
            self.files.cut.filter(|(file, end)| *file == job.extent.file && *end < job.extent.end_bytes());
        match (answer, ends) {
            (Answer::Filled, None) => Ok(()),
            (Answer::Failed(ReadError { extent, cause: ReadCause::End { at_bytes } }), Some((_, end))) => {
                expect(*extent == job.extent, || format!("the error is about {extent:?}"))?;
                let end = end.max(job.extent.offset_bytes);
                expect(*at_bytes == end, || {
                    format!("the file ends at byte {at_bytes}, says the error, not {end}")
                })
            }
            (Answer::Filled, Some((_, end))) => Err(format!("filled, though the file ends at byte {end}")),
            (Answer::Failed(error), _) => Err(format!("{error}: {:?}", error.cause)),
            (Answer::Wrong(what), _) => Err(what.clone()),
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for path in &self.paths {
            let _ = fs::remove_file(path);
        }
    }
}

/// A job that the engine is to do.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    extent: Extent,
    access: Access,
    place: Place,
    /// Bytes of the job's memory.
    len_bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Staging,
    InPlace,
}

/// What came of a job.
#[derive(Debug)]
enum Answer {
    Filled,
    Failed(ReadError),
    /// The engine says that it did what it did not, or wrote where it may not.
    Wrong(String),
}

/// Gives the jobs out, and takes the answers.
struct Bench<'b> {
    scene: &'b Scene,
    jobs: &'b [Wanted],
    next: Mutex<usize>,
    /// The memory of jobs in place, by job.
    blocks: Vec<Mutex<Option<Arc<HostMemory>>>>,
    answers: Mutex<Vec<Vec<Answer>>>,
}

impl Feed for Bench<'_> {
    fn next(&self, wait: bool) -> Next {
        let mut next = lock(&self.next);
        let Some(job) = self.jobs.get(*next) else {
            return Next::Done;
        };
        let memory = match job.place {
            Place::InPlace => JobMemory::InPlace(self.landing(*next, job.len_bytes)),
            // Whoever waits may keep the others out: buffers come back without asking for the next job.
            Place::Staging if wait => match self.scene.ring.take() {
                Some(filling) => JobMemory::Staging(filling),
                None => return Next::Done,
            },
            Place::Staging => match self.scene.ring.try_take() {
                Some(filling) => JobMemory::Staging(filling),
                None => return Next::Busy,
            },
        };
        let read = *next as u32;
        *next += 1;
        drop(next);
        let mut job = Job { read, extent: job.extent, stride: None, access: job.access, memory };
        job.memory.bytes_mut().fill(UNTOUCHED);
        Next::Job(job)
    }
}

impl Bench<'_> {
    /// Returns memory with a page of untouched bytes before and behind it.
    fn landing(&self, job: usize, len_bytes: usize) -> Landing {
        let block =
            Arc::new(HostMemory::allocate(len_bytes + 2 * FENCE_LEN_BYTES).expect("a test has memory"));
        // SAFETY: the block is new, initialized, and seen by nobody else yet.
        unsafe { block.as_ptr().write_bytes(UNTOUCHED, block.len_bytes()) };
        *lock(&self.blocks[job]) = Some(Arc::clone(&block));
        // SAFETY: the block is longer than the fence.
        let start = unsafe { block.as_ptr().add(FENCE_LEN_BYTES) };
        // SAFETY: the range is inside the block, which `block` keeps; its fences are read only once the
        // landing has been dropped.
        unsafe { Landing::new(start, len_bytes, block) }
    }

    fn answer(&self, done: Done) -> Answer {
        let Done { read, mut memory, result } = done;
        if let Err(error) = result {
            return Answer::Failed(error);
        }
        let job = &self.jobs[read as usize];
        let (begin, end) = (job.extent.offset_bytes as usize, job.extent.end_bytes() as usize);
        let expected = &self.scene.files.bytes[job.extent.file as usize][begin..end];
        let (read_bytes, behind) = memory.bytes_mut().split_at(expected.len());
        if let Some(at) = (0..expected.len()).find(|at| read_bytes[*at] != expected[*at]) {
            return Answer::Wrong(format!("byte {at} of {} differs", expected.len()));
        }
        // A direct read may fill its last sector; a cached one writes what was asked for.
        if job.access == Access::Cached && behind.iter().any(|byte| *byte != UNTOUCHED) {
            return Answer::Wrong("bytes behind the extent were written".to_owned());
        }
        drop(memory);
        match lock(&self.blocks[read as usize]).take() {
            Some(block) if !fences_are_whole(&block) => {
                Answer::Wrong("bytes beside the memory were written".to_owned())
            }
            _ => Answer::Filled,
        }
    }
}

impl Sink for Bench<'_> {
    fn done(&self, done: Done) {
        let read = done.read as usize;
        let answer = self.answer(done);
        lock(&self.answers)[read].push(answer);
    }

    fn lost(&self, read: u32, error: ReadError) {
        lock(&self.answers)[read as usize].push(Answer::Wrong(format!("the memory is lost: {error}")));
    }
}

fn fences_are_whole(block: &Arc<HostMemory>) -> bool {
    // SAFETY: the block is initialized, and the landing in it was dropped: nobody writes any more.
    let bytes = unsafe { std::slice::from_raw_parts(block.as_ptr().as_ptr(), block.len_bytes()) };
    let (before, rest) = bytes.split_at(FENCE_LEN_BYTES);
    let behind = &rest[rest.len() - FENCE_LEN_BYTES..];
    before.iter().chain(behind).all(|byte| *byte == UNTOUCHED)
}

/// Bytes that repeat at no power of two.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|index| (((index + 1) * (seed + 2_654_435_761)) >> 11) as u8).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn expect(kept: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if kept { Ok(()) } else { Err(otherwise()) }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Long enough for two requests of the default length, and ends inside a sector.
const LONG: usize = (3 << 20) + 777;

/// Lengths of the files: on, before and behind a sector and a page.
const LENGTHS: &[usize] = &[LONG, 5 * 4096, 1, 511, 512, 513, 4095, 4097, 100_001];

/// Four requests of the shortest length.
const BUFFER_LEN_BYTES: usize = 4 * 4096;

const RING_BUFFERS: usize = 4;

/// Memory that must stay as it is on both sides of a job's.
const FENCE_LEN_BYTES: usize = 4096;

/// What memory holds before it is read into.
const UNTOUCHED: u8 = 0xa5;

/// Scenes of one process, which may run side by side in one folder.
static SCENES: AtomicUsize = AtomicUsize::new(0);
