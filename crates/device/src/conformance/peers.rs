//! What is promised of copies between devices.

use std::sync::Arc;

use super::{BOUNDARY, PairCheck, expect, pattern, read, text, write};
use crate::contract::{Allocation, Device, DeviceError, Stream};
use crate::operation::Location;

pub(super) const PROMISES: &[(&str, PairCheck)] = &[
    ("bytes of another device are copied, at every offset around a boundary", bytes_are_copied),
    ("a copy from another device runs behind its event", copies_wait_for_events_of_the_other),
];

/// Copies from the second device to the first; from one that is not reached they are refused, by name and with a reason.
pub(super) fn bytes_are_copied(device: &dyn Device, peer: &dyn Device) -> Result<(), String> {
    let source = peer.allocate(2 * BOUNDARY as u64).map_err(text)?;
    let target = device.allocate(2 * BOUNDARY as u64).map_err(text)?;
    let sent = pattern(21, 2 * BOUNDARY);
    write(peer, &sent, &source, 0)?;
    for len in [0, 1, 15, 16, 17, 255, 256, 257, BOUNDARY - 1, BOUNDARY] {
        for (from, to) in [(0, 0), (1, 0), (0, 1), (15, 16), (256, 255), (BOUNDARY - 1, BOUNDARY)] {
            write(device, &vec![0xee; 2 * BOUNDARY], &target, 0)?;
            if !device.can_reach(peer.id()) {
                return is_refused(copy(device, peer, (&source, from), (&target, to), len));
            }
            copy(device, peer, (&source, from), (&target, to), len).map_err(text)?;
            device.wait(&device.record(Stream::Copy).map_err(text)?).map_err(text)?;
            let mut expected = vec![0xee; 2 * BOUNDARY];
            expected[to..][..len].copy_from_slice(&sent[from..][..len]);
            let is_right = read(device, &target, 0, 2 * BOUNDARY)? == expected;
            expect(is_right, || format!("{len} bytes from offset {from} to {to}"))?;
        }
    }
    Ok(())
}

fn copies_wait_for_events_of_the_other(device: &dyn Device, peer: &dyn Device) -> Result<(), String> {
    if !device.can_reach(peer.id()) {
        return Ok(()); // That copies are refused is the promise above.
    }
    let source = peer.allocate(LONG as u64).map_err(text)?;
    let target = device.allocate(LONG as u64).map_err(text)?;
    let staged = peer.staging_memory(LONG).map_err(text)?;
    // SAFETY: the memory is initialized, that long, and nobody else has it.
    let bytes = unsafe { std::slice::from_raw_parts_mut(staged.as_ptr().as_ptr(), LONG) };
    for round in 0..4 {
        bytes.copy_from_slice(&pattern(round, LONG));
        // SAFETY: the bytes and the source live until both events below were waited for.
        unsafe { peer.copy(bytes, &source, 0, Stream::Copy) }.map_err(text)?;
        let arrived = peer.record(Stream::Copy).map_err(text)?;
        device.order(Stream::Copy, &arrived).map_err(text)?;
        let queued = copy(device, peer, (&source, 0), (&target, 0), LONG);
        let copied = device.record(Stream::Copy).map_err(text)?;
        // Both are waited for whatever happened, because both touch what is dropped here.
        let waited = (device.wait(&copied), peer.wait(&arrived));
        queued.and(waited.0).and(waited.1).map_err(text)?;
        expect(read(device, &target, 0, LONG)? == *bytes, || format!("the copy ran ahead in round {round}"))?;
    }
    Ok(())
}

/// Queues a copy on the copy stream.
fn copy(
    device: &dyn Device,
    peer: &dyn Device,
    source: (&Arc<dyn Allocation>, usize),
    target: (&Arc<dyn Allocation>, usize),
    len: usize,
) -> Result<(), DeviceError> {
    let [source, target] =
        [source, target].map(|(allocation, offset)| Location { allocation, offset_bytes: offset as u64 });
    // SAFETY: the callers keep both until the copy stream was waited for, and touch neither before.
    unsafe { device.copy_from_peer(peer.id(), source, target, len as u64, Stream::Copy) }
}

fn is_refused(result: Result<(), DeviceError>) -> Result<(), String> {
    match result {
        Err(DeviceError::Unreachable { why, .. }) if !why.is_empty() => Ok(()),
        Err(other) => Err(format!("the error is {other}")),
        Ok(()) => Err("a copy was queued from a device that is not reached".to_owned()),
    }
}

/// Long enough that a copy of it is still under way when the next call is made.
const LONG: usize = 1 << 20;
