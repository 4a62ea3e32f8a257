//! What the machine can do at best, written by hand against the system.
//!
//! | ceiling | bytes go | holds for |
//! |---|---|---|
//! | [`Ceiling::DirectRing`] | storage to 32 MiB of touched memory, again and again | any cold load |
//! | [`Ceiling::DirectFresh`] | storage to new memory, touched by a thread of its own just before | cold loads in place |
//! | [`Ceiling::Buffered`] | storage to the page cache to a touched buffer | cold loads through the page cache |
//! | [`Ceiling::PreadFresh`] | page cache to new memory on huge pages | warm loads |
//! | [`Ceiling::Copy`] | memory to touched memory | whatever copies once more |
//! | [`Ceiling::Touch`] | the page cache, mapped; one byte of each page is read | mapped loads |

use std::any::Any;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use io_uring::{IoUring, opcode, types};
use rustix::fs::{Advice, fadvise};
use rustix::mm::madvise;

use crate::checkpoint::{BLOCK_LEN_BYTES, Checkpoint, block_checksum};
use crate::machine::cores;
use crate::memory::Memory;

/// A way to move all bytes of a checkpoint's files.
#[derive(Clone, Copy, Debug)]
pub enum Ceiling {
    /// `O_DIRECT` through io_uring into registered buffers.
    DirectRing {
        /// Length of a read.
        request_len_bytes: usize,
        /// Reads in flight.
        depth: usize,
    },
    /// `O_DIRECT` through io_uring.
    DirectFresh {
        /// Length of a read.
        request_len_bytes: usize,
        /// Reads in flight.
        depth: usize,
    },
    /// Ordinary reads in file order, with the kernel's read-ahead.
    Buffered {
        /// Length of a read.
        request_len_bytes: usize,
        /// Threads, each with its own share of the bytes.
        thread_count: usize,
    },
    /// `pread` on one thread a core.
    PreadFresh {
        /// Length of a read; a multiple of a huge page, so that no two threads touch the same one.
        request_len_bytes: usize,
    },
    /// `memcpy` on one thread a core.
    Copy,
    /// One thread in file order, on huge pages where the filesystem has them.
    Touch,
}

/// A run that is ready to start.
pub type Ready = Box<dyn FnOnce() -> io::Result<Ran>>;

/// A run that is over.
pub struct Ran {
    /// System calls that moved bytes.
    pub system_calls: u64,
    /// The memory that holds the bytes: a load's result, so letting go of it is no part of the run.
    _result: Box<dyn Any>,
}

impl Ceiling {
    /// Prepares a run.
    ///
    /// With `check`, the run adds every byte it moved to the checksum, and is then not to be timed.
    ///
    /// # Errors
    /// I/O errors, here and in the run.
    pub fn ready(self, checkpoint: &Checkpoint, check: Option<&'static Check>) -> io::Result<Ready> {
        let files = open(checkpoint, self)?;
        match self {
            Ceiling::DirectRing { request_len_bytes, depth } => {
                direct_ring(files, request_len_bytes, depth, check)
            }
            Ceiling::DirectFresh { request_len_bytes, depth } => {
                direct_fresh(files, request_len_bytes, depth, check)
            }
            Ceiling::Buffered { request_len_bytes, thread_count } => {
                let own_files =
                    (0..thread_count).map(|_| open(checkpoint, self)).collect::<io::Result<_>>()?;
                Ok(buffered(own_files, request_len_bytes, check))
            }
            Ceiling::PreadFresh { request_len_bytes } => Ok(pread_fresh(files, request_len_bytes, check)),
            Ceiling::Copy => copy(files, check),
            Ceiling::Touch => Ok(touch(files, check)),
        }
    }
}

/// The checksum of all bytes that a run moved, in whatever order it did.
#[derive(Debug, Default)]
pub struct Check(AtomicU64);

impl Check {
    /// Adds bytes of a file that start at a multiple of [`BLOCK_LEN_BYTES`], and end at one or with the file.
    pub fn add(&self, file: usize, offset_bytes: u64, bytes: &[u8]) {
        for (index, block) in bytes.chunks(BLOCK_LEN_BYTES).enumerate() {
            let offset_bytes = offset_bytes + (index * BLOCK_LEN_BYTES) as u64;
            self.0.fetch_add(block_checksum(file, offset_bytes, block), Ordering::Relaxed); // Wraps around.
        }
    }

    /// Returns the sum.
    pub fn sum(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

type Files = Vec<(File, u64)>;

fn open(checkpoint: &Checkpoint, ceiling: Ceiling) -> io::Result<Files> {
    let direct = matches!(ceiling, Ceiling::DirectRing { .. } | Ceiling::DirectFresh { .. });
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let open = |path| {
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let len_bytes = file.metadata()?.len();
        Ok((file, len_bytes))
    };
    checkpoint.paths.iter().map(open).collect()
}

/// One read.
#[derive(Clone, Copy)]
struct Piece {
    file: usize,
    offset_bytes: u64,
    len_bytes: usize,
}

/// Cuts files into reads, in order.
fn pieces(files: &[(File, u64)], request_len_bytes: usize) -> Vec<Piece> {
    let of_file = |(file, (_, file_len)): (usize, &(File, u64))| {
        let file_len = *file_len;
        (0..file_len).step_by(request_len_bytes).map(move |offset_bytes| {
            let len_bytes = (file_len - offset_bytes).min(request_len_bytes as u64) as usize;
            Piece { file, offset_bytes, len_bytes }
        })
    };
    files.iter().enumerate().flat_map(of_file).collect()
}

fn direct_ring(
    files: Files,
    request_len_bytes: usize,
    depth: usize,
    check: Option<&'static Check>,
) -> io::Result<Ready> {
    let mut memory = Memory::touched(request_len_bytes * depth);
    let ring = IoUring::new(depth as u32)?;
    let start = memory.bytes_mut().as_mut_ptr();
    let slot_start = move |slot: usize| start.wrapping_add(slot * request_len_bytes);
    let vectors: Vec<_> = (0..depth)
        .map(|slot| libc::iovec { iov_base: slot_start(slot).cast(), iov_len: request_len_bytes })
        .collect();
    // SAFETY: the vectors lie in `memory`, and the run drops the ring before it.
    let fixed = unsafe { ring.submitter().register_buffers(&vectors) }.is_ok();
    Ok(Box::new(move || {
        let memory = memory;
        let mut ring = ring; // Dropped first.
        let place = |slot: usize, _: Piece| slot_start(slot);
        let done = |slot: usize, piece: Piece| {
            if let Some(check) = check {
                let begin = slot * request_len_bytes;
                check.add(piece.file, piece.offset_bytes, &memory.bytes()[begin..begin + piece.len_bytes]);
            }
        };
        let requests = Requests { files: &files, len_bytes: request_len_bytes, depth, fixed };
        // SAFETY: each slot is `request_len_bytes` of `memory`, which outlives the call and is read only by
        // `done`, for a slot that no read is writing to.
        let system_calls = unsafe { direct(&mut ring, &requests, &place, &done) }?;
        Ok(Ran { system_calls, _result: Box::new(()) })
    }))
}

fn direct_fresh(
    files: Files,
    request_len_bytes: usize,
    depth: usize,
    check: Option<&'static Check>,
) -> io::Result<Ready> {
    let mut ring = IoUring::new(depth as u32)?;
    Ok(Box::new(move || {
        let mut memories = fresh(&files);
        let starts: Vec<usize> =
            memories.iter_mut().map(|memory| memory.bytes_mut().as_mut_ptr().expose_provenance()).collect();
        let place = |_: usize, piece: Piece| {
            std::ptr::with_exposed_provenance_mut::<u8>(starts[piece.file] + piece.offset_bytes as usize)
        };
        let requests = Requests { files: &files, len_bytes: request_len_bytes, depth, fixed: false };
        let system_calls = thread::scope(|scope| {
            scope.spawn(|| memories.iter().for_each(populate));
            // SAFETY: reads are disjoint in the memories, which are as long as the files in whole huge pages,
            // outlive the call, and are read by nobody until it has returned.
            unsafe { direct(&mut ring, &requests, &place, &|_, _| {}) }
        })?;
        if let Some(check) = check {
            for (index, (memory, (_, len_bytes))) in memories.iter().zip(&files).enumerate() {
                check.add(index, 0, &memory.bytes()[..*len_bytes as usize]);
            }
        }
        Ok(Ran { system_calls, _result: Box::new(memories) })
    }))
}

/// Reserves memory for each file: as long as the file, in whole huge pages.
fn fresh(files: &[(File, u64)]) -> Vec<Memory> {
    files.iter().map(|(_, len_bytes)| Memory::fresh(*len_bytes as usize)).collect()
}

/// Takes memory from the system, piece by piece, ahead of the reads.
fn populate(memory: &Memory) {
    for piece in memory.bytes().chunks(POPULATE_LEN_BYTES) {
        let start = piece.as_ptr().cast_mut().cast();
        // SAFETY: the range is the memory's own; populating changes no contents. A kernel without it (before
        // Linux 5.14) refuses, and the reads touch the memory themselves.
        let _ = unsafe { madvise(start, piece.len(), rustix::mm::Advice::LinuxPopulateWrite) };
    }
}

/// What [`direct`] reads, and in which requests.
struct Requests<'f> {
    files: &'f [(File, u64)],
    len_bytes: usize,
    depth: usize,
    /// Whether memory is registered, each slot under its own index.
    fixed: bool,
}

/// Reads every piece directly, `depth` at a time; returns the number of system calls.
///
/// # Safety
/// `place` returns the start of `requests.len_bytes` bytes (a file's last piece needs fewer), 4096-aligned, valid for
/// writes until the call returns, and in use by nobody between `place` and `done` of the same slot.
unsafe fn direct(
    ring: &mut IoUring,
    requests: &Requests<'_>,
    place: &dyn Fn(usize, Piece) -> *mut u8,
    done: &dyn Fn(usize, Piece),
) -> io::Result<u64> {
    let Requests { files, len_bytes, depth, fixed } = *requests;
    let mut waiting: VecDeque<Piece> = pieces(files, len_bytes).into();
    let mut in_flight: Vec<Option<Piece>> = vec![None; depth];
    let mut free: Vec<usize> = (0..depth).rev().collect();
    let mut calls = 0;
    while !waiting.is_empty() || free.len() < depth {
        while let (Some(slot), Some(piece)) = (free.last().copied(), waiting.front().copied()) {
            let target = place(slot, piece);
            let ask = piece.len_bytes.next_multiple_of(DIRECT_ALIGN_BYTES) as u32;
            let descriptor = types::Fd(files[piece.file].0.as_raw_fd());
            let entry = if fixed {
                opcode::ReadFixed::new(descriptor, target, ask, slot as u16)
                    .offset(piece.offset_bytes)
                    .build()
            } else {
                opcode::Read::new(descriptor, target, ask).offset(piece.offset_bytes).build()
            };
            // SAFETY: the caller's promise about `place`; an early return below leaves reads in flight, after
            // which the bench ends with an error and the process with it.
            unsafe { ring.submission().push(&entry.user_data(slot as u64)) }
                .expect("an entry for every slot");
            in_flight[slot] = Some(piece);
            free.pop();
            waiting.pop_front();
        }
        calls += 1;
        ring.submit_and_wait(1)?;
        for entry in ring.completion() {
            let slot = entry.user_data() as usize;
            let piece = in_flight[slot].take().expect("the kernel answers each read once");
            if entry.result() != piece.len_bytes as i32 {
                return Err(short(piece, entry.result()));
            }
            done(slot, piece);
            free.push(slot);
        }
    }
    Ok(calls)
}

fn short(piece: Piece, result: i32) -> io::Error {
    match result {
        ..0 => io::Error::from_raw_os_error(-result),
        _ => io::Error::other(format!(
            "{result} bytes instead of {} at {}",
            piece.len_bytes, piece.offset_bytes
        )),
    }
}

/// `own_files` holds the files once for each thread, because read-ahead is kept by open file.
fn buffered(own_files: Vec<Files>, request_len_bytes: usize, check: Option<&'static Check>) -> Ready {
    let mut memory = Memory::touched(request_len_bytes * own_files.len());
    Box::new(move || {
        let pieces = pieces(&own_files[0], request_len_bytes);
        let shares = pieces.chunks(pieces.len().div_ceil(own_files.len()));
        let buffers = memory.bytes_mut().chunks_mut(request_len_bytes);
        let read_share = |files: &Files, share: &[Piece], buffer: &mut [u8]| {
            files.iter().try_for_each(|(file, _)| fadvise(file, 0, None, Advice::Sequential))?;
            for piece in share {
                let target = &mut buffer[..piece.len_bytes];
                files[piece.file].0.read_exact_at(target, piece.offset_bytes)?;
                if let Some(check) = check {
                    check.add(piece.file, piece.offset_bytes, target);
                }
            }
            Ok(share.len() as u64)
        };
        let works = own_files
            .iter()
            .zip(shares)
            .zip(buffers)
            .map(|((files, share), buffer)| move || read_share(files, share, buffer));
        let system_calls = on_threads(works)?;
        Ok(Ran { system_calls, _result: Box::new(()) })
    })
}

fn pread_fresh(files: Files, request_len_bytes: usize, check: Option<&'static Check>) -> Ready {
    Box::new(move || {
        let mut memories = fresh(&files);
        let targets = memories.iter_mut().zip(&files).flat_map(|(memory, (_, len_bytes))| {
            memory.bytes_mut()[..*len_bytes as usize].chunks_mut(request_len_bytes)
        });
        let queue = Mutex::new(pieces(&files, request_len_bytes).into_iter().zip(targets));
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let read = || {
            let mut calls = 0;
            while let Some((piece, target)) = next() {
                files[piece.file].0.read_exact_at(target, piece.offset_bytes)?;
                calls += 1;
                if let Some(check) = check {
                    check.add(piece.file, piece.offset_bytes, target);
                }
            }
            Ok(calls)
        };
        let system_calls = on_threads((0..cores()).map(|_| read))?;
        Ok(Ran { system_calls, _result: Box::new(memories) })
    })
}

fn copy(files: Files, check: Option<&'static Check>) -> io::Result<Ready> {
    let (mut sources, mut targets) = (fresh(&files), fresh(&files));
    for ((source, target), (file, len_bytes)) in sources.iter_mut().zip(&mut targets).zip(&files) {
        file.read_exact_at(&mut source.bytes_mut()[..*len_bytes as usize], 0)?;
        target.bytes_mut().fill(1);
    }
    Ok(Box::new(move || {
        {
            let pairs = sources.iter().zip(&mut targets).flat_map(|(source, target)| {
                source.bytes().chunks(COPY_LEN_BYTES).zip(target.bytes_mut().chunks_mut(COPY_LEN_BYTES))
            });
            let queue = Mutex::new(pairs);
            let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let copy = || {
                while let Some((source, target)) = next() {
                    target.copy_from_slice(source);
                }
                Ok(0)
            };
            on_threads((0..cores()).map(|_| copy))?;
        }
        if let Some(check) = check {
            for (index, (target, (_, len_bytes))) in targets.iter().zip(&files).enumerate() {
                check.add(index, 0, &target.bytes()[..*len_bytes as usize]);
            }
        }
        Ok(Ran { system_calls: 0, _result: Box::new((sources, targets)) })
    }))
}

fn touch(files: Files, check: Option<&'static Check>) -> Ready {
    Box::new(move || {
        let mut maps = Vec::new();
        for (index, (file, _)) in files.iter().enumerate() {
            // SAFETY: nobody writes to a checkpoint that a bench reads; who does, ends the bench.
            let map = unsafe { memmap2::Mmap::map(file) }?;
            let _ = map.advise(memmap2::Advice::HugePage); // A refusal costs speed alone.
            for page in map.chunks(rustix::param::page_size()) {
                black_box(page[0]);
            }
            if let Some(check) = check {
                check.add(index, 0, &map);
            }
            maps.push(map);
        }
        Ok(Ran { system_calls: 2 * files.len() as u64, _result: Box::new(maps) })
    })
}

/// Runs each on a thread of its own and adds up what they return.
fn on_threads<F: FnOnce() -> io::Result<u64> + Send>(works: impl Iterator<Item = F>) -> io::Result<u64> {
    thread::scope(|scope| {
        let threads: Vec<_> = works.map(|work| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("reading does not panic")).sum()
    })
}

/// Every disk of this century takes direct reads of whole pages.
const DIRECT_ALIGN_BYTES: usize = 4096;

/// 8 MiB are zeroed in less time than they are read from any disk.
const POPULATE_LEN_BYTES: usize = 8 << 20;

/// Long enough that handing it out costs nothing.
const COPY_LEN_BYTES: usize = 4 << 20;
