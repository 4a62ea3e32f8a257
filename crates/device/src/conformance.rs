//! The suite every backend passes: in tests with [`assert_passes`], on a real machine with [`run`].

mod dequantize;
mod operations;
mod peers;

use std::sync::Arc;

use tensorhaul_stage::{HostMemory, Layout, Ring};

use crate::contract::{Allocation, Device, DeviceError, STORAGE_ALIGN_BYTES, Stream, StridedCopy};

/// One promise of the contract, and how a device kept it.
#[derive(Debug)]
pub struct Verdict {
    /// The promise, as a sentence.
    pub promise: &'static str,
    /// What went wrong, if something did.
    pub result: Result<(), String>,
}

/// Tries every promise on a device.
pub fn run(device: &dyn Device) -> Vec<Verdict> {
    PROMISES.iter().map(|(promise, check)| Verdict { promise, result: check(device) }).collect()
}

/// Tries what is promised of two devices, the first of which copies from the second.
pub fn run_pair(device: &dyn Device, peer: &dyn Device) -> Vec<Verdict> {
    let promises = peers::PROMISES.iter();
    promises.map(|(promise, check)| Verdict { promise, result: check(device, peer) }).collect()
}

/// Tries every promise on a device.
///
/// # Panics
/// When one is broken; the message names it.
pub fn assert_passes(device: &dyn Device) {
    for verdict in run(device) {
        if let Err(what) = verdict.result {
            panic!("{}: {}: {what}", device.id(), verdict.promise);
        }
    }
}

type Check = fn(&dyn Device) -> Result<(), String>;
type PairCheck = fn(&dyn Device, &dyn Device) -> Result<(), String>;

const PROMISES: &[(&str, Check)] = &[
    ("allocations are aligned, also empty ones", allocations_are_aligned),
    ("memory is reported with free within total", memory_is_reported),
    ("an impossible allocation is out of memory and names the bytes", impossible_allocations_are_refused),
    ("bytes come back as they went, at every offset around a boundary", bytes_come_back),
    ("memory that was written before it was pinned is copied as it was written", written_memory_is_pinned),
    ("copies of one stream run in order", copies_run_in_order),
    ("strided copies gather and scatter", strided_copies_gather_and_scatter),
    ("a stream ordered after an event sees what was done before it", streams_are_ordered),
    ("an event that was waited for is complete", events_complete),
    ("memory for storage is of whole pages", storage_memory_is_of_whole_pages),
    ("what runs inside the device runs once", acts_run_once_inside),
    ("several threads load at once", threads_load_at_once),
    ("memory is freed with its last handle", memory_is_freed),
    ("what storage writes in place is there on the device", what_storage_writes_is_there),
    ("what operations need is loaded once", operations::operations_are_prepared_once),
    ("casts equal the host's bit for bit", operations::casts_round_as_the_host),
    ("casts start and end anywhere", operations::casts_start_and_end_anywhere),
    (
        "strided copies on the device move their pieces and nothing else",
        operations::strided_copies_on_the_device_keep_their_pieces,
    ),
    ("many small pieces land where they belong", operations::many_small_pieces_land),
    ("dequantization equals the host's bit for bit", dequantize::dequantization_equals_the_host),
    ("bytes are copied from one allocation to another, at every offset around a boundary", |device| {
        peers::bytes_are_copied(device, device)
    }),
];

fn allocations_are_aligned(device: &dyn Device) -> Result<(), String> {
    let align = device.capabilities().align_bytes;
    expect(align >= 256, || format!("align_bytes is {align}"))?;
    for len in [0, 1, 255, 256, 4097, 3 << 20] {
        let allocation = device.allocate(len).map_err(text)?;
        expect(allocation.len_bytes() == len, || format!("{len} bytes became {}", allocation.len_bytes()))?;
        let aligned = len == 0 || allocation.address().is_multiple_of(align);
        expect(aligned, || format!("{len} bytes at {:#x}", allocation.address()))?;
    }
    Ok(())
}

fn storage_memory_is_of_whole_pages(device: &dyn Device) -> Result<(), String> {
    for len in [0, 1, 4096, 4097, 3 << 20] {
        let allocation = device.allocate_for_storage(len).map_err(text)?;
        expect(allocation.len_bytes() == len, || format!("{len} bytes became {}", allocation.len_bytes()))?;
        let aligned = len == 0 || allocation.address().is_multiple_of(STORAGE_ALIGN_BYTES);
        expect(aligned, || format!("{len} bytes at {:#x}", allocation.address()))?;
        let sent = pattern(len, len.min(4097) as usize);
        if len > 0 {
            write(device, &sent, &allocation, len - sent.len() as u64)?;
            let back = read(device, &allocation, len - sent.len() as u64, sent.len())?;
            expect(sent == back, || format!("the end of {len} bytes"))?;
        }
    }
    Ok(())
}

fn acts_run_once_inside(device: &dyn Device) -> Result<(), String> {
    let mut runs = 0;
    device.enter(&mut || runs += 1).map_err(text)?;
    expect(runs == 1, || format!("it ran {runs} times"))
}

fn what_storage_writes_is_there(device: &dyn Device) -> Result<(), String> {
    if !device.capabilities().in_place {
        return Ok(()); // Storage cannot write to it.
    }
    for len in [0, 1, BOUNDARY + 1, 3 << 20] {
        let allocation = device.allocate_in_place(len as u64).map_err(text)?;
        expect(allocation.len_bytes() == len as u64, || {
            format!("{len} bytes became {}", allocation.len_bytes())
        })?;
        let start = allocation.host_ptr().ok_or("no host pointer")?;
        expect(start.addr().get().is_multiple_of(BOUNDARY), || format!("{len} bytes at {start:p}"))?;
        let sent = pattern(len as u64, len);
        // SAFETY: `len` bytes of the host's memory, nobody else's.
        unsafe { start.copy_from_nonoverlapping(std::ptr::NonNull::from(&*sent).cast(), len) };
        expect(read(device, &allocation, 0, len)? == sent, || format!("{len} bytes differ on the device"))?;
    }
    match device.allocate_in_place(1 << 60) {
        Err(DeviceError::OutOfMemory { needed_bytes, .. }) if needed_bytes == 1 << 60 => Ok(()),
        Ok(_) => Err("2^60 bytes were allocated".to_owned()),
        Err(other) => Err(format!("the error is {other}")),
    }
}

fn memory_is_reported(device: &dyn Device) -> Result<(), String> {
    let memory = device.memory().map_err(text)?;
    expect(memory.free_bytes <= memory.total_bytes && memory.total_bytes > 0, || format!("{memory:?}"))
}

fn impossible_allocations_are_refused(device: &dyn Device) -> Result<(), String> {
    match device.allocate(1 << 60) {
        Ok(_) => Err("2^60 bytes were allocated".to_owned()),
        Err(DeviceError::OutOfMemory { needed_bytes, .. }) if needed_bytes == 1 << 60 => Ok(()),
        Err(other) => Err(format!("the error is {other}")),
    }
}

fn bytes_come_back(device: &dyn Device) -> Result<(), String> {
    let target = device.allocate(3 * BOUNDARY as u64).map_err(text)?;
    for len in [1, 2, 15, 16, 17, 255, 256, 257, BOUNDARY - 1, BOUNDARY, BOUNDARY + 1] {
        for before in [0, 1, 8, 15, 16, 255] {
            let offset = BOUNDARY - before;
            let sent = pattern(len as u64 * 31 + before as u64, len);
            write(device, &sent, &target, offset as u64)?;
            let back = read(device, &target, offset as u64, len)?;
            expect(sent == back, || format!("{len} bytes at offset {offset}"))?;
        }
    }
    Ok(())
}

fn written_memory_is_pinned(device: &dyn Device) -> Result<(), String> {
    let layout = Layout::new(16 * BOUNDARY, 4096).map_err(text)?.at_most(1);
    let ring = Ring::unpinned(HostMemory::allocate(layout.len_bytes()).map_err(text)?, layout);
    let target = device.allocate(BOUNDARY as u64).map_err(text)?;
    let (sent, mut filling) = (pattern(5, BOUNDARY), ring.take().ok_or("the ring closed")?);
    filling.bytes_mut()[..BOUNDARY].copy_from_slice(&sent);
    let filled = filling.filled(BOUNDARY);
    let Some(pinned) = ring.pin(|memory| device.pin(memory)).map_err(text)? else {
        return expect(!device.fallbacks().is_empty(), || "refused, and nothing says why".to_owned());
    };
    let buffer = filled.copying(&pinned);
    // SAFETY: the buffer and the target live until the event below was waited for.
    unsafe { device.copy(buffer.bytes(), &target, 0, Stream::Copy) }.map_err(text)?;
    let event = device.record(Stream::Copy).map_err(text)?;
    device.wait(&event).map_err(text)?;
    buffer.copied();
    expect(read(device, &target, 0, BOUNDARY)? == sent, || "other bytes arrived".to_owned())
}

fn copies_run_in_order(device: &dyn Device) -> Result<(), String> {
    let ring = ring(device, 4)?;
    let pinned = ring.pinned().ok_or("staging memory is not pinned")?;
    let target = device.allocate(BOUNDARY as u64).map_err(text)?;
    let mut copying = Vec::new();
    for value in 1..=4u8 {
        let mut filling = ring.take().ok_or("the ring closed")?;
        filling.bytes_mut()[..BOUNDARY].fill(value);
        let buffer = filling.filled(BOUNDARY).copying(&pinned);
        // SAFETY: the buffer and the target live until the event below was waited for.
        unsafe { device.copy(buffer.bytes(), &target, 0, Stream::Copy) }.map_err(text)?;
        copying.push(buffer);
    }
    let event = device.record(Stream::Copy).map_err(text)?;
    device.wait(&event).map_err(text)?;
    copying.into_iter().for_each(|buffer| buffer.copied());
    expect(ring.is_whole(), || "a staging buffer did not come back".to_owned())?;
    let back = read(device, &target, 0, BOUNDARY)?;
    expect(back.iter().all(|byte| *byte == 4), || "the last copy is not on top".to_owned())
}

fn strided_copies_gather_and_scatter(device: &dyn Device) -> Result<(), String> {
    let (rows, row, kept) = (7usize, 40usize, 13usize);
    let target = device.allocate(1024).map_err(text)?;
    write(device, &[0xee; 1024], &target, 0)?;
    let sent = pattern(5, rows * row);
    let gather = StridedCopy {
        piece_len_bytes: kept as u64,
        piece_count: rows as u64,
        source_stride_bytes: row as u64,
        target_stride_bytes: 16,
        target_offset_bytes: 3,
    };
    with_staged(device, &sent, |bytes| {
        // SAFETY: `with_staged` keeps the bytes until the stream is done; the target outlives it.
        unsafe { device.copy_strided(bytes, &target, gather, Stream::Copy) }
    })?;
    let back = read(device, &target, 0, 1024)?;
    let mut expected = vec![0xee; 1024];
    for piece in 0..rows {
        expected[3 + piece * 16..][..kept].copy_from_slice(&sent[piece * row..][..kept]);
    }
    expect(back == expected, || "pieces are not where they belong".to_owned())
}

fn streams_are_ordered(device: &dyn Device) -> Result<(), String> {
    let target = device.allocate(BOUNDARY as u64).map_err(text)?;
    let sent = pattern(9, BOUNDARY);
    let ring = ring(device, 2)?;
    let pinned = ring.pinned().ok_or("staging memory is not pinned")?;
    let (mut first, mut second) =
        (ring.take().ok_or("the ring closed")?, ring.take().ok_or("the ring closed")?);
    first.bytes_mut()[..BOUNDARY].copy_from_slice(&sent);
    let first = first.filled(BOUNDARY).copying(&pinned);
    // SAFETY: both buffers and the target live until the last event below was waited for.
    unsafe { device.copy(first.bytes(), &target, 0, Stream::Copy) }.map_err(text)?;
    let copied = device.record(Stream::Copy).map_err(text)?;
    device.order(Stream::Compute, &copied).map_err(text)?;
    let back = &mut second.bytes_mut()[..BOUNDARY];
    // SAFETY: as above.
    unsafe { device.copy_back(&target, 0, back, Stream::Compute) }.map_err(text)?;
    let done = device.record(Stream::Compute).map_err(text)?;
    device.wait(&done).map_err(text)?;
    first.copied();
    expect(second.bytes_mut()[..BOUNDARY] == sent, || "the compute stream ran ahead of the copy".to_owned())
}

fn events_complete(device: &dyn Device) -> Result<(), String> {
    for stream in [Stream::Copy, Stream::Compute] {
        let event = device.record(stream).map_err(text)?;
        device.wait(&event).map_err(text)?;
        expect(device.is_complete(&event).map_err(text)?, || format!("not on {stream:?}"))?;
    }
    Ok(())
}

fn threads_load_at_once(device: &dyn Device) -> Result<(), String> {
    let load = |seed: u64| {
        let target = device.allocate(1 << 20).map_err(text)?;
        let sent = pattern(seed, 1 << 20);
        write(device, &sent, &target, 0)?;
        expect(read(device, &target, 0, 1 << 20)? == sent, || format!("thread {seed} got other bytes"))
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|seed| scope.spawn(move || load(seed))).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_owned())?)
    })
}

fn memory_is_freed(device: &dyn Device) -> Result<(), String> {
    let total = device.memory().map_err(text)?.total_bytes;
    // Sixteen times a quarter of the device fits only if each is freed before the next.
    for _ in 0..16 {
        device.allocate(total / 4).map_err(text)?;
    }
    Ok(())
}

/// Copies bytes into device memory through the staging ring, and waits.
fn write(
    device: &dyn Device,
    bytes: &[u8],
    target: &Arc<dyn Allocation>,
    offset_bytes: u64,
) -> Result<(), String> {
    with_staged(device, bytes, |bytes| {
        // SAFETY: `with_staged` keeps the bytes until the stream is done; the target outlives it.
        unsafe { device.copy(bytes, target, offset_bytes, Stream::Copy) }
    })
}

/// Stages bytes, queues work on them, and waits for the copy stream.
fn with_staged(
    device: &dyn Device,
    bytes: &[u8],
    queue: impl FnOnce(&[u8]) -> Result<(), DeviceError>,
) -> Result<(), String> {
    let memory = device.staging_memory(bytes.len()).map_err(text)?;
    // SAFETY: the memory is initialized, `bytes.len()` long, and nobody else has it.
    let staged = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr().as_ptr(), bytes.len()) };
    staged.copy_from_slice(bytes);
    queue(staged).map_err(text)?;
    let event = device.record(Stream::Copy).map_err(text)?;
    device.wait(&event).map_err(text)
}

/// Copies bytes back from device memory, and waits.
fn read(
    device: &dyn Device,
    source: &Arc<dyn Allocation>,
    offset_bytes: u64,
    len: usize,
) -> Result<Vec<u8>, String> {
    let memory = device.staging_memory(len).map_err(text)?;
    // SAFETY: the memory is initialized, `len` long, and nobody else has it.
    let staged = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr().as_ptr(), len) };
    // SAFETY: source and target live until the event was waited for.
    unsafe { device.copy_back(source, offset_bytes, staged, Stream::Copy) }.map_err(text)?;
    let event = device.record(Stream::Copy).map_err(text)?;
    device.wait(&event).map_err(text)?;
    Ok(staged.to_vec())
}

fn ring(device: &dyn Device, buffer_count: usize) -> Result<Ring, String> {
    let layout = Layout::new(16 * BOUNDARY, 4096).map_err(text)?.at_most(buffer_count as u64);
    Ok(Ring::from_boxed(device.staging_memory(layout.len_bytes()).map_err(text)?, layout))
}

/// Bytes that repeat at no power of two.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|index| (((index + seed) * 2_654_435_761) >> 13) as u8).collect()
}

fn expect(kept: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if kept { Ok(()) } else { Err(otherwise()) }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

const BOUNDARY: usize = 4096;
