//! Device memory of one rank in a shared load: its result, what waits to be dequantized, and the buffers of its exchanges.

use std::sync::Arc;

use tensorhaul_device::{Allocation, Device, Location};
use tensorhaul_plan::{Place, Share};

use crate::error::Result;
use crate::options::LoadOptions;

/// Device memory of one rank.
pub(super) struct Memory {
    /// By the plan's places; those of other ranks are missing.
    pub(super) arenas: Vec<Option<Arc<dyn Allocation>>>,
    /// One is sent while the other is filled.
    pub(super) send: [Arc<dyn Allocation>; 2],
    /// Taken apart in the order of the stream that the next exchange is on, so one suffices.
    pub(super) receive: Arc<dyn Allocation>,
}

impl Memory {
    /// Allocates all of it.
    pub(super) fn allocate(
        share: &Share,
        rank: u32,
        options: &LoadOptions,
        device: &dyn Device,
    ) -> Result<Memory> {
        let promised = share.promised(rank);
        let mut arenas: Vec<Option<Arc<dyn Allocation>>> = vec![None; share.plan().arenas().len()];
        for (place, arena) in share.arenas(rank) {
            arenas[place as usize] = Some(device.allocate(arena.len_bytes)?);
        }
        let send =
            [device.allocate(promised.send_buffer_bytes)?, device.allocate(promised.send_buffer_bytes)?];
        let receive = device.allocate(promised.receive_buffer_bytes)?;
        if let Some(stream) = options.stream_of(device.id()) {
            device.follow(stream)?;
            arenas.iter().flatten().for_each(|arena| arena.release_after(stream));
        }
        Ok(Memory { arenas, send, receive })
    }

    /// Returns the bytes that the exchange takes.
    pub(super) fn exchange_bytes(&self) -> u64 {
        self.send.iter().chain([&self.receive]).map(|buffer| buffer.len_bytes()).sum()
    }

    /// Returns where a place of the plan is.
    pub(super) fn location(&self, place: Place) -> Location<'_> {
        let allocation = self.arenas[place.arena as usize].as_ref();
        let allocation = allocation.expect("a rank's bytes land in its own arenas");
        Location { allocation, offset_bytes: place.offset_bytes }
    }

    /// Lets nobody have it again: a device may still write there.
    pub(super) fn leak(&self) {
        let all = self.arenas.iter().flatten().chain(&self.send).chain([&self.receive]);
        all.for_each(|allocation| std::mem::forget(Arc::clone(allocation)));
    }
}
