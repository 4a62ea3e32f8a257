//! The host's own memory as a device: copies run at once, on the calling thread.

mod twins;

use std::any::Any;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use tensorhaul_plan::DeviceId;
use tensorhaul_stage::{HostMemory, StagingMemory};

use crate::contract::{
    Allocation, Capabilities, Device, DeviceError, Event, Kept, MemoryInfo, Near, Piece, Stream, StridedCopy,
};
use crate::operation::{Location, Operation, OperationKind};

/// The host. Every event is complete when it is recorded.
#[derive(Clone, Copy, Debug, Default)]
pub struct Host;

struct Arena {
    memory: HostMemory,
    kept: Kept,
}

struct Done;

impl Device for Host {
    fn id(&self) -> DeviceId {
        DeviceId::Host
    }

    fn name(&self) -> String {
        "host memory".to_owned()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { in_place: true, align_bytes: ALIGN_BYTES }
    }

    fn memory(&self) -> Result<MemoryInfo, DeviceError> {
        let failed = |source| DeviceError::Query { device: DeviceId::Host, source };
        let text = std::fs::read_to_string("/proc/meminfo").map_err(failed)?;
        let bytes = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key));
            let kib =
                line.and_then(|rest| rest.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok());
            kib.map(|kib| kib * 1024)
                .ok_or_else(|| failed(io::Error::other(format!("/proc/meminfo has no {key}"))))
        };
        Ok(MemoryInfo { free_bytes: bytes("MemAvailable:")?, total_bytes: bytes("MemTotal:")? })
    }

    fn allocate(&self, len_bytes: u64) -> Result<Arc<dyn Allocation>, DeviceError> {
        let out_of_memory = || DeviceError::OutOfMemory {
            device: DeviceId::Host,
            needed_bytes: len_bytes,
            // Memory that is free and still refused is behind a limit of the process; saying "free" would mislead.
            free_bytes: self.memory().ok().map(|memory| memory.free_bytes).filter(|free| *free < len_bytes),
        };
        let len = usize::try_from(len_bytes).map_err(|_| out_of_memory())?;
        let memory = HostMemory::allocate(len).map_err(|_| out_of_memory())?;
        Ok(Arc::new(Arena { memory, kept: Kept::default() }))
    }

    fn allocate_for_storage(&self, len_bytes: u64) -> Result<Arc<dyn Allocation>, DeviceError> {
        self.allocate(len_bytes) // Pages of the system's are all there is.
    }

    fn enter(&self, act: &mut dyn FnMut()) -> Result<(), DeviceError> {
        act();
        Ok(())
    }

    fn allocate_in_place(&self, len_bytes: u64) -> Result<Arc<dyn Allocation>, DeviceError> {
        self.allocate(len_bytes)
    }

    fn staging_memory(&self, len_bytes: usize) -> Result<Box<dyn StagingMemory>, DeviceError> {
        match HostMemory::allocate(len_bytes) {
            Ok(memory) => Ok(Box::new(memory)),
            Err(error) => {
                Err(DeviceError::OutOfHostMemory { needed_bytes: len_bytes as u64, source: error.into() })
            }
        }
    }

    fn pin(&self, memory: Arc<HostMemory>) -> Result<Option<Box<dyn StagingMemory>>, DeviceError> {
        Ok(Some(Box::new(memory))) // The host copies from any memory.
    }

    unsafe fn copy(
        &self,
        source: &[u8],
        target: &Arc<dyn Allocation>,
        target_offset_bytes: u64,
        _stream: Stream,
    ) -> Result<(), DeviceError> {
        let start = place(target, target_offset_bytes, source.len());
        // SAFETY: the caller owns the range in the target, which `place` keeps inside the allocation; the
        // source is another allocation.
        unsafe { start.copy_from_nonoverlapping(NonNull::from(source).cast(), source.len()) };
        Ok(())
    }

    unsafe fn copy_pieces(
        &self,
        source: &[u8],
        pieces: &[Piece<'_>],
        stream: Stream,
    ) -> Result<(), DeviceError> {
        for piece in pieces {
            // SAFETY: the caller's promise for every piece.
            unsafe { self.copy(piece.source(source), piece.target, piece.target_offset_bytes, stream)? };
        }
        Ok(())
    }

    unsafe fn copy_strided(
        &self,
        source: &[u8],
        target: &Arc<dyn Allocation>,
        copy: StridedCopy,
        stream: Stream,
    ) -> Result<(), DeviceError> {
        for piece in 0..copy.piece_count {
            let begin = (piece * copy.source_stride_bytes) as usize;
            let bytes = &source[begin..begin + copy.piece_len_bytes as usize];
            let target_offset_bytes = copy.target_offset_bytes + piece * copy.target_stride_bytes;
            // SAFETY: the caller's promise for every piece.
            unsafe { self.copy(bytes, target, target_offset_bytes, stream)? };
        }
        Ok(())
    }

    unsafe fn copy_back(
        &self,
        source: &Arc<dyn Allocation>,
        source_offset_bytes: u64,
        target: &mut [u8],
        _stream: Stream,
    ) -> Result<(), DeviceError> {
        let (start, len) = (place(source, source_offset_bytes, target.len()), target.len());
        // SAFETY: as in `copy`, with the allocation as source.
        unsafe { start.copy_to_nonoverlapping(NonNull::from(target).cast(), len) };
        Ok(())
    }

    fn can_reach(&self, peer: DeviceId) -> bool {
        peer == DeviceId::Host
    }

    unsafe fn copy_from_peer(
        &self,
        peer: DeviceId,
        source: Location<'_>,
        target: Location<'_>,
        len_bytes: u64,
        _stream: Stream,
    ) -> Result<(), DeviceError> {
        if !self.can_reach(peer) {
            let why = "the host reads it through staging memory".to_owned();
            return Err(DeviceError::Unreachable { device: DeviceId::Host, peer, why });
        }
        let len = len_bytes as usize;
        let from = place(source.allocation, source.offset_bytes, len);
        let to = place(target.allocation, target.offset_bytes, len);
        // SAFETY: the caller owns both ranges, which `place` keeps inside their allocations and which do not overlap.
        unsafe { to.copy_from_nonoverlapping(from, len) };
        Ok(())
    }

    fn prepare(&self, _kind: OperationKind) -> Result<Duration, DeviceError> {
        Ok(Duration::ZERO)
    }

    unsafe fn run(&self, operation: &Operation<'_>, _stream: Stream) -> Result<(), DeviceError> {
        match operation {
            // SAFETY: the caller owns the ranges, and an operation's source and target do not overlap.
            Operation::Cast(cast) => unsafe { twins::run_cast(cast) },
            // SAFETY: as above.
            Operation::Strided(strided) => unsafe { twins::run_strided(strided) },
            // SAFETY: as above.
            Operation::Dequantize(dequantize) => unsafe { twins::run_dequantize(dequantize) },
        }
        Ok(())
    }

    fn record(&self, _stream: Stream) -> Result<Event, DeviceError> {
        Ok(Event::new(Done))
    }

    fn order(&self, _stream: Stream, _after: &Event) -> Result<(), DeviceError> {
        Ok(())
    }

    fn is_complete(&self, event: &Event) -> Result<bool, DeviceError> {
        debug_assert!(event.handle::<Done>().is_some(), "an event goes back to the device that recorded it");
        Ok(true)
    }

    fn wait(&self, _event: &Event) -> Result<(), DeviceError> {
        Ok(())
    }

    fn follow(&self, _stream: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn lend(&self, _stream: Stream, act: &mut dyn FnMut(u64)) -> Result<(), DeviceError> {
        act(0);
        Ok(())
    }

    fn near(&self) -> Near {
        Near::default()
    }

    fn fallbacks(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}

// SAFETY: private memory, zeroed by the system, that this value alone frees.
unsafe impl Allocation for Arena {
    fn address(&self) -> u64 {
        self.memory.as_ptr().as_ptr().addr() as u64
    }

    fn len_bytes(&self) -> u64 {
        self.memory.len_bytes() as u64
    }

    fn host_ptr(&self) -> Option<NonNull<u8>> {
        Some(self.memory.as_ptr())
    }

    fn release_after(&self, _stream: u64) {}

    fn keep(&self, owner: Arc<dyn Any + Send + Sync>) {
        self.kept.add(owner);
    }
}

/// Returns the address of a range of host memory.
///
/// # Panics
/// When the range leaves the allocation: the caller broke the contract, and going on would write
/// over somebody else's memory.
fn place(allocation: &Arc<dyn Allocation>, offset_bytes: u64, len_bytes: usize) -> NonNull<u8> {
    let end = offset_bytes.checked_add(len_bytes as u64);
    assert!(end.is_some_and(|end| end <= allocation.len_bytes()), "a copy stays inside its allocation");
    let start = allocation.host_ptr().expect("the host's allocations are host memory");
    // SAFETY: the offset was just checked to be inside the allocation.
    unsafe { start.add(offset_bytes as usize) }
}

/// Allocations are whole pages.
const ALIGN_BYTES: u64 = 4096;

#[cfg(all(test, feature = "conformance"))]
mod tests {
    #[test]
    fn the_host_passes_the_conformance_suite() {
        crate::conformance::assert_passes(&super::Host);
    }
}
