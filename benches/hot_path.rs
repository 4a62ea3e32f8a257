//! Ways out of the page cache: how fast threads fill a staging ring with bytes that are there, and at what cost.
//!
//! ```text
//! cargo bench -p tensorhaul-benches --bench hot_path -- [PART OF A ROW'S NAME]... [--test]
//! ```
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `TENSORHAUL_BENCH_BYTES` | length of the generated checkpoint | 512 MiB; 32 MB with `--test` |
//! | `TENSORHAUL_BENCH_DIR` | where it is generated | cargo's target folder |
//! | `TENSORHAUL_BENCH_ROUNDS` | timed rounds | 5; 1 with `--test` |
//! | `TENSORHAUL_BENCH_QUIET` | cores: each round first waits until other processes keep no more busy | do not wait |
//!
//! The ring is the loader's: 32 buffers of 4 MiB on huge pages. Its buffers go round in order, because those that a device copies from
//! come back in order: each is filled again when 124 MiB of others have been. A row whose name ends with *device* also copies
//! each buffer to a CUDA device, and ends when the last copy is done. Where there is no driver, the simulated one shows that those
//! rows work; what it copies with is these same cores, so their figures then say nothing.
//!
//! | way | what the clock covers |
//! |---|---|
//! | `pread` | what the loader does |
//! | mapping, faulted | mapping the files, copying out of them, unmapping; pages are mapped when the copy touches them |
//! | mapping, populated | the same, each buffer's pages mapped by `MADV_POPULATE_READ` just before they are copied |
//! | mapping, ready | the copy alone: files were mapped and populated before. No load finds them so; this is the copy's own limit |
//! | mapping, registered | no ring: windows of the mapping are registered with the driver, and the device copies out of them |
//!
//! Each copy is made once by `memcpy` and once with non-temporal stores, which leave the target out of the caches and do not read it
//! in before they overwrite it. *Of pread* is by the `pread` row of the same round, thread count and end, the median of the rounds.
//! *CPU* is less disturbed by other processes than the clock is, and its *least* the least.

use std::collections::VecDeque;
use std::env;
use std::error::Error;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use comfy_table::{CellAlignment, Table, presets};
use memmap2::{Advice, Mmap};
use rustix::thread::{CpuSet, sched_setaffinity};
use tensorhaul_benches::cache::Cache;
use tensorhaul_benches::ceiling::Check;
use tensorhaul_benches::checkpoint::{Checkpoint, Shape};
use tensorhaul_benches::machine::{Machine, cores};
use tensorhaul_benches::meter::{Cost, Meter, wait_until_quiet};
use tensorhaul_benches::simulator;
use tensorhaul_benches::statistics::{least, median, most};
use tensorhaul_cuda::{Cuda, LIBRARY_VARIABLE};
use tensorhaul_device::gpu::Gpu;
use tensorhaul_device::{Allocation, Device, Event, Stream};
use tensorhaul_stage::{Copying, Filled, HostMemory, Layout, Pinned, Ring};

use crate::registered::Registrar;

#[path = "hot_path/non_temporal.rs"]
mod non_temporal;
#[path = "hot_path/registered.rs"]
mod registered;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Row {
    way: Way,
    end: End,
    thread_count: usize,
}

/// How bytes leave the page cache.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Pread,
    Copy(Pages, Stores),
    Registered,
}

/// When the pages of a mapping are mapped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pages {
    Faulted,
    Populated,
    Ready,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stores {
    Ordinary,
    NonTemporal,
}

/// Where a row's bytes have to be when it is over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Ring,
    Device,
}

fn main() -> Result<ExitCode, Failure> {
    let device = match tensorhaul_cuda::open(0) {
        Ok(device) => device,
        Err(error) if env::var_os(LIBRARY_VARIABLE).is_none() => {
            println!("{error}; the simulated driver instead");
            return with_simulated_driver();
        }
        Err(error) => return Err(error.into()),
    };
    let arguments: Vec<String> = env::args().skip(1).collect();
    let is_test = arguments.iter().any(|argument| argument == "--test");
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let number = |name: &str| env::var(name).ok().map(|text| text.replace('_', "").parse().expect(name));
    let len_bytes = number("TENSORHAUL_BENCH_BYTES").unwrap_or(if is_test { 32_000_000 } else { 512 << 20 });
    let round_count = number("TENSORHAUL_BENCH_ROUNDS").unwrap_or(if is_test { 1 } else { 5 });
    let quiet_cores = env::var("TENSORHAUL_BENCH_QUIET").map_or(Ok(f64::INFINITY), |text| text.parse())?;
    let parent = env::var_os("TENSORHAUL_BENCH_DIR").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());

    let folder = tempfile::Builder::new().prefix("bench-hot-path-").tempdir_in(parent)?;
    let checkpoint = Checkpoint::generate(folder.path(), Shape::FewLarge, len_bytes)?;
    // Evicted and read again, so that pages are as a first reader leaves them, not as the writer did.
    Cache::Cold.prepare(&checkpoint)?;
    Cache::Warm.prepare(&checkpoint)?;
    println!("{}", serde_json::to_string(&Machine::of(folder.path()))?);
    println!("device: {}", device.name());

    let bench = Bench::new(&checkpoint, device)?;
    let mut rows = rows();
    if let Err(why) = bench.registrar.probe(&bench.files[0]) {
        println!("rows of a registered mapping are left out: {why}");
        rows.retain(|row| row.way != Way::Registered);
    }
    rows.retain(|row| {
        let name = row.to_string();
        row.way == Way::Pread || filters.is_empty() || filters.iter().any(|part| name.contains(*part))
    });
    for row in &rows {
        bench.check(*row)?;
    }
    let mut rounds = Vec::new();
    for round in 0..round_count {
        wait_until_quiet(quiet_cores);
        Cache::Warm.prepare(&checkpoint)?;
        let mut costs = vec![None; rows.len()];
        let mut order: Vec<usize> = (0..rows.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            costs[index] = Some(bench.run(rows[index], None)?);
        }
        rounds.push(costs.into_iter().map(|cost| cost.expect("every row ran")).collect::<Vec<_>>());
    }
    println!("{}", table(&rows, &rounds, checkpoint.file_bytes as f64 / 1e9));
    Ok(ExitCode::SUCCESS)
}

/// Runs this bench again where the backend finds the simulated driver: it looks for drivers once a process.
fn with_simulated_driver() -> Result<ExitCode, Failure> {
    let mut command = Command::new(env::current_exe()?);
    command.args(env::args_os().skip(1));
    command.env(LIBRARY_VARIABLE, simulator::library()?).env("SIMGPU", "memory=64000000000;poison=0");
    Ok(if command.status()?.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn rows() -> Vec<Row> {
    let mut ways = vec![Way::Pread];
    let mut stores = vec![Stores::Ordinary];
    if non_temporal::is_available() {
        stores.push(Stores::NonTemporal);
    }
    for pages in [Pages::Faulted, Pages::Populated, Pages::Ready] {
        ways.extend(stores.iter().map(|stores| Way::Copy(pages, *stores)));
    }
    let of_way = |end, way: Way| thread_counts().map(move |thread_count| Row { way, end, thread_count });
    let to_ring = ways.iter().flat_map(|way| of_way(End::Ring, *way));
    let to_device = ways.iter().chain(&[Way::Registered]).flat_map(|way| of_way(End::Device, *way));
    to_ring.chain(to_device).collect()
}

/// Powers of two below the number of cores, and that.
fn thread_counts() -> impl Iterator<Item = usize> {
    let most = cores().min(BUFFER_COUNT);
    (0..).map(|power| 1 << power).take_while(move |count| *count < most).chain([most])
}

/// The checkpoint, and where its bytes go.
struct Bench {
    files: Vec<File>,
    files_checksum: u64,
    /// Mapped before any clock starts; for rows of [`Pages::Ready`].
    mapped: Vec<Mmap>,
    /// In the order of the files.
    pieces: Vec<Piece>,
    registrar: Registrar,
    ring: Ring,
    pinned: Pinned,
    /// Holds the files, back to back.
    allocation: Arc<dyn Allocation>,
    device: Gpu<Cuda>,
    /// The processors nearest to the device; `None` when all are as near.
    near: Option<CpuSet>,
}

/// What goes into one buffer.
#[derive(Clone, Copy)]
struct Piece {
    file: usize,
    offset_bytes: usize,
    len_bytes: usize,
    /// Where it goes on the device.
    target_offset_bytes: u64,
}

impl Bench {
    fn new(checkpoint: &Checkpoint, device: Gpu<Cuda>) -> Result<Bench, Failure> {
        let (files, lens): (Vec<File>, Vec<u64>) = checkpoint.open()?.into_iter().unzip();
        let layout = Layout::new(BUFFER_COUNT * BUFFER_LEN_BYTES, 4096)?;
        assert_eq!((layout.buffer_len_bytes(), layout.buffer_count()), (BUFFER_LEN_BYTES, 32));
        let ring = Ring::unpinned(HostMemory::allocate(layout.len_bytes())?, layout);
        let pinned = ring.pin(|memory| device.pin(memory))?.ok_or("the driver refuses to pin the ring")?;
        Ok(Bench {
            mapped: map(&files)?,
            pieces: pieces(&lens, BUFFER_LEN_BYTES),
            registrar: Registrar::new()?,
            allocation: device.allocate(checkpoint.file_bytes)?,
            files_checksum: checkpoint.files_checksum,
            files,
            ring,
            pinned,
            near: set_of(&device.near().processors),
            device,
        })
    }

    /// Runs a row once, untimed, and looks at every byte where it ended.
    fn check(&self, row: Row) -> Result<(), Failure> {
        let check = Check::default();
        self.run(row, Some(&check).filter(|_| row.end == End::Ring))?;
        if row.end == End::Device {
            self.read_back(&check)?;
        }
        if check.sum() != self.files_checksum {
            return Err(format!("{row}: other bytes arrived").into());
        }
        Ok(())
    }

    fn run(&self, row: Row, check: Option<&Check>) -> Result<Cost, Failure> {
        if matches!(row.way, Way::Copy(Pages::Ready, _)) {
            self.mapped.iter().try_for_each(|mapped| mapped.advise(Advice::PopulateRead))?;
        }
        let meter = Meter::start();
        match row.way {
            Way::Pread | Way::Copy(Pages::Ready, _) => self.fill_all(row, &self.mapped, check)?,
            Way::Copy(..) => self.fill_all(row, &map(&self.files)?, check)?,
            Way::Registered => {
                let mapped = map(&self.files)?;
                let lens: Vec<u64> = mapped.iter().map(|mapped| mapped.len() as u64).collect();
                let windows = Mutex::new(pieces(&lens, WINDOW_LEN_BYTES).into_iter().map(|piece| {
                    let bytes = &mapped[piece.file][piece.offset_bytes..][..piece.len_bytes];
                    (bytes, self.allocation.address() + piece.target_offset_bytes)
                }));
                let next = || windows.lock().unwrap_or_else(PoisonError::into_inner).next();
                on_threads(row.thread_count, || {
                    self.stay_near();
                    self.registrar.copy_all(next)
                })?;
            }
        }
        Ok(meter.stop())
    }

    /// Moves every piece on the row's threads.
    fn fill_all(&self, row: Row, mapped: &[Mmap], check: Option<&Check>) -> Result<(), Failure> {
        let queue = Mutex::new(self.pieces.iter());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        on_threads(row.thread_count, || {
            if row.end == End::Device {
                self.stay_near();
            }
            // Full buffers that this thread holds on to, oldest first, so that all buffers go round.
            let mut full: VecDeque<Full> = VecDeque::new();
            while let Some(piece) = next() {
                if full.len() == BUFFER_COUNT / row.thread_count {
                    self.let_go(full.pop_front())?;
                }
                let mut filling = self.ring.take().expect("the ring is open");
                let target = &mut filling.bytes_mut()[..piece.len_bytes];
                self.fill(row.way, mapped, piece, target)?;
                let filled = filling.filled(piece.len_bytes);
                if let Some(check) = check {
                    check.add(piece.file, piece.offset_bytes as u64, filled.bytes());
                }
                full.push_back(match row.end {
                    End::Ring => Full::Held(filled),
                    End::Device => self.send(filled, piece)?,
                });
            }
            full.into_iter().try_for_each(|buffer| self.let_go(Some(buffer)))
        })
    }

    fn fill(&self, way: Way, mapped: &[Mmap], piece: &Piece, target: &mut [u8]) -> Result<(), Failure> {
        let (offset_bytes, len_bytes) = (piece.offset_bytes, piece.len_bytes);
        let Way::Copy(pages, stores) = way else {
            return Ok(self.files[piece.file].read_exact_at(target, offset_bytes as u64)?);
        };
        let mapped = &mapped[piece.file];
        if pages == Pages::Populated {
            mapped.advise_range(Advice::PopulateRead, offset_bytes, len_bytes)?;
        }
        let source = &mapped[offset_bytes..][..len_bytes];
        match stores {
            Stores::Ordinary => target.copy_from_slice(source),
            Stores::NonTemporal => non_temporal::copy(source, target),
        }
        Ok(())
    }

    fn send(&self, filled: Filled, piece: &Piece) -> Result<Full, Failure> {
        let buffer = filled.copying(&self.pinned);
        let target_offset_bytes = piece.target_offset_bytes;
        // SAFETY: the buffer is of the ring that this device pinned and goes back only when the event below is complete;
        // the range is this piece's alone, within an allocation as long as all pieces.
        unsafe { self.device.copy(buffer.bytes(), &self.allocation, target_offset_bytes, Stream::Copy) }?;
        Ok(Full::Sent(buffer, self.device.record(Stream::Copy)?))
    }

    /// Returns a buffer to the ring, once nobody reads it any more.
    fn let_go(&self, buffer: Option<Full>) -> Result<(), Failure> {
        if let Some(Full::Sent(buffer, event)) = buffer {
            self.device.wait(&event)?;
            buffer.copied();
        }
        Ok(())
    }

    /// Adds what the device holds to a checksum.
    fn read_back(&self, check: &Check) -> Result<(), Failure> {
        for piece in &self.pieces {
            let mut filling = self.ring.take().expect("the ring is open");
            let target = &mut filling.bytes_mut()[..piece.len_bytes];
            let offset_bytes = piece.target_offset_bytes;
            // SAFETY: as in `send`, with the device writing; the event is waited for before anybody reads.
            unsafe { self.device.copy_back(&self.allocation, offset_bytes, target, Stream::Copy) }?;
            self.device.wait(&self.device.record(Stream::Copy)?)?;
            check.add(piece.file, piece.offset_bytes as u64, filling.filled(piece.len_bytes).bytes());
        }
        Ok(())
    }

    /// Keeps the calling thread on the processors nearest to the device, as the loader does.
    fn stay_near(&self) {
        if let Some(near) = &self.near {
            let _ = sched_setaffinity(None, near); // A system that refuses runs it anywhere.
        }
    }
}

/// A full buffer that its thread holds on to.
enum Full {
    Held(#[expect(dead_code, reason = "goes back to the ring when dropped")] Filled),
    Sent(Copying, Event),
}

type Failure = Box<dyn Error + Send + Sync>;

fn set_of(processors: &[u32]) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    let known = processors.iter().map(|number| *number as usize).filter(|number| *number < CpuSet::MAX_CPU);
    known.for_each(|number| set.set(number));
    (set.count() > 0).then_some(set)
}

/// Maps files shared and for reading; no page of them is mapped yet.
fn map(files: &[File]) -> std::io::Result<Vec<Mmap>> {
    // SAFETY: the files are this bench's own, which writes to them no more.
    files.iter().map(|file| unsafe { Mmap::map(file) }).collect()
}

/// Cuts files into pieces, which lie back to back on the device.
fn pieces(lens: &[u64], len_bytes_max: usize) -> Vec<Piece> {
    let (mut pieces, mut start) = (Vec::new(), 0);
    for (file, len_bytes) in lens.iter().enumerate() {
        for offset_bytes in (0..*len_bytes as usize).step_by(len_bytes_max) {
            let len_bytes = (*len_bytes as usize - offset_bytes).min(len_bytes_max);
            let target_offset_bytes = start + offset_bytes as u64;
            pieces.push(Piece { file, offset_bytes, len_bytes, target_offset_bytes });
        }
        start += len_bytes;
    }
    pieces
}

/// Runs the same on each of so many threads.
fn on_threads(thread_count: usize, work: impl Fn() -> Result<(), Failure> + Sync) -> Result<(), Failure> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..thread_count).map(|_| scope.spawn(&work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("moving bytes does not panic"))
    })
}

fn table(rows: &[Row], rounds: &[Vec<Cost>], gb: f64) -> Table {
    let mut table = Table::new();
    let head = ["", "threads", "GB/s", "spread", "of pread", "CPU s/GB", "least", "others' cores"];
    table.load_style(presets::ASCII_MARKDOWN).set_header(head);
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    for (index, row) in rows.iter().enumerate() {
        let of = |value: fn(&Cost) -> f64| rounds.iter().map(move |costs| value(&costs[index]));
        let cpu_seconds = of(|cost| cost.cpu_seconds);
        let pread = rows.iter().position(|other| *other == Row { way: Way::Pread, ..*row });
        let pread = pread.expect("no filter drops these rows");
        let by_pread = rounds.iter().map(|costs| costs[pread].seconds / costs[index].seconds);
        let speed = |seconds: f64| gb / seconds;
        table.add_row([
            row.to_string(),
            row.thread_count.to_string(),
            format!("{:.2}", speed(median(of(|cost| cost.seconds)))),
            format!(
                "{:.2} - {:.2}",
                speed(most(of(|cost| cost.seconds))),
                speed(least(of(|cost| cost.seconds)))
            ),
            format!("{:.0}%", 100.0 * median(by_pread)),
            format!("{:.3}", median(cpu_seconds.clone()) / gb),
            format!("{:.3}", least(cpu_seconds) / gb),
            format!("{:.1}", median(of(|cost| cost.others_cores))),
        ]);
    }
    table
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.way {
            Way::Pread => f.write_str("pread")?,
            Way::Registered => f.write_str("mapping, registered")?,
            Way::Copy(pages, stores) => {
                f.write_str(match pages {
                    Pages::Faulted => "mapping, faulted",
                    Pages::Populated => "mapping, populated",
                    Pages::Ready => "mapping, ready",
                })?;
                f.write_str(match stores {
                    Stores::Ordinary => "; memcpy",
                    Stores::NonTemporal => "; non-temporal",
                })?;
            }
        }
        f.write_str(match self.end {
            End::Ring => "; ring",
            End::Device => "; device",
        })
    }
}

/// As in the loader's ring of 128 MiB.
const BUFFER_COUNT: usize = 32;
const BUFFER_LEN_BYTES: usize = 4 << 20;

/// Long enough that a call to register it costs little beside pinning its 16384 pages, short enough that two of them overlap.
const WINDOW_LEN_BYTES: usize = 64 << 20;
