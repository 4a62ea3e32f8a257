//! How fast a device copies from and to its staging memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tensorhaul_device::{Allocation, Device, Event, Stream};
use tensorhaul_stage::StagingMemory;

use crate::error::Result;

/// Staging memory, device memory of the same length, and the way between them.
pub(crate) struct Link<'d> {
    device: &'d dyn Device,
    /// `Some` until the drop.
    memory: Option<Box<dyn StagingMemory>>,
    target: Arc<dyn Allocation>,
    len_bytes: usize,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    ToDevice,
    ToHost,
}

/// Speed of copies between a device and its staging memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CopySpeed {
    /// From the host to the device, in 1e9 bytes a second.
    pub to_device_gb_per_s: f64,
    /// From the device to the host.
    pub to_host_gb_per_s: f64,
}

impl<'d> Link<'d> {
    /// Takes memory on both sides, and passes over it once each way: the first touch of both costs more.
    pub(crate) fn new(device: &'d dyn Device, len_bytes: usize) -> Result<Link<'d>> {
        let target = device.allocate(len_bytes as u64)?;
        let memory = Some(device.staging_memory(len_bytes)?);
        let link = Link { device, memory, target, len_bytes };
        link.pass(Direction::ToDevice, 1)?;
        link.pass(Direction::ToHost, 1)?;
        Ok(link)
    }

    /// Copies everything `count` times; returns the bytes and the time they took.
    pub(crate) fn pass(&self, direction: Direction, count: u64) -> Result<(u64, Duration)> {
        let start = Instant::now();
        let mut before: Option<Event> = None;
        for _ in 0..count {
            self.queue(direction)?;
            let queued = self.device.record(Stream::Copy)?;
            // One pass is always queued behind the one that runs, and never more.
            if let Some(before) = before.replace(queued) {
                self.device.wait(&before)?;
            }
        }
        before.iter().try_for_each(|last| self.device.wait(last))?;
        Ok((count * self.len_bytes as u64, start.elapsed()))
    }

    /// Measures both ways for a few milliseconds.
    pub(crate) fn speed(&self) -> Result<CopySpeed> {
        let gb_per_s = |direction| -> Result<f64> {
            let (_, once) = self.pass(direction, 1)?;
            let count = (SHORT_SECONDS / once.as_secs_f64().max(1e-9)).clamp(1.0, SHORT_PASSES_MAX) as u64;
            let (bytes, time) = self.pass(direction, count)?;
            Ok(bytes as f64 / time.as_secs_f64().max(1e-9) / 1e9)
        };
        let to_device_gb_per_s = gb_per_s(Direction::ToDevice)?;
        Ok(CopySpeed { to_device_gb_per_s, to_host_gb_per_s: gb_per_s(Direction::ToHost)? })
    }

    /// Queues a copy of everything, a staging buffer at a time.
    fn queue(&self, direction: Direction) -> Result<()> {
        let Some(memory) = &self.memory else { return Ok(()) };
        let start = memory.as_ptr().as_ptr();
        for begin in (0..self.len_bytes).step_by(BUFFER_LEN_BYTES) {
            let len = BUFFER_LEN_BYTES.min(self.len_bytes - begin);
            let place = start.wrapping_add(begin);
            match direction {
                Direction::ToDevice => {
                    // SAFETY: staging memory is initialized, and this range lies in it; nobody but the device's
                    // copy stream touches it, which does one copy after another.
                    let source = unsafe { std::slice::from_raw_parts(place, len) };
                    // SAFETY: both sides live until `drop`, which waits for the stream or leaks the staging memory.
                    unsafe { self.device.copy(source, &self.target, begin as u64, Stream::Copy) }?;
                }
                Direction::ToHost => {
                    // SAFETY: as above.
                    let target = unsafe { std::slice::from_raw_parts_mut(place, len) };
                    // SAFETY: as above.
                    unsafe { self.device.copy_back(&self.target, begin as u64, target, Stream::Copy) }?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Link<'_> {
    /// Waits for what is queued: after an error that may be a copy.
    fn drop(&mut self) {
        let drained = self.device.record(Stream::Copy).and_then(|queued| self.device.wait(&queued));
        if drained.is_err() {
            std::mem::forget(self.memory.take()); // The device may touch it for ever.
        }
    }
}

/// The longest staging buffer that loads copy from.
const BUFFER_LEN_BYTES: usize = 4 << 20;

/// What a short measurement takes each way.
const SHORT_SECONDS: f64 = 0.005;

/// A copy that takes no time at all is not measured for ever.
const SHORT_PASSES_MAX: f64 = 64.0;

#[cfg(test)]
mod tests {
    use tensorhaul_device::host::Host;

    use super::*;

    #[test]
    fn passes_copy_as_many_bytes_as_they_say() {
        let link = Link::new(&Host, BUFFER_LEN_BYTES + 4096).unwrap();
        let (bytes, _) = link.pass(Direction::ToDevice, 3).unwrap();
        assert_eq!(bytes, 3 * (BUFFER_LEN_BYTES as u64 + 4096));
        let speed = link.speed().unwrap();
        assert!(speed.to_device_gb_per_s > 0.0 && speed.to_host_gb_per_s > 0.0);
    }
}
