//! Bytes on their way from one device to another through host memory.

use std::sync::Arc;

use tensorhaul_device::{Device, DeviceError, Location, Stream};
use tensorhaul_stage::StagingMemory;

/// Host memory that a device copies to and from, for whoever holds it alone.
pub(crate) struct Pinned {
    memory: Arc<dyn StagingMemory>,
}

impl Pinned {
    pub(crate) fn new(device: &dyn Device, len_bytes: usize) -> Result<Pinned, DeviceError> {
        Ok(Pinned { memory: device.staging_memory(len_bytes)?.into() })
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.memory.len_bytes()
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        let (start, len) = (self.memory.as_ptr(), self.memory.len_bytes());
        // SAFETY: staging memory is initialized and does not move; whoever queues copies of it waits for them, or leaks it, before it
        // is borrowed again.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) }
    }
}

/// Where bytes stop between two devices: in memory that the one's driver writes, and in memory that the other's reads.
pub(crate) struct Stop {
    source: (Arc<dyn Device>, Pinned),
    target: (Arc<dyn Device>, Pinned),
}

impl Stop {
    pub(crate) fn new(source: &Arc<dyn Device>, target: &Arc<dyn Device>) -> Result<Stop, DeviceError> {
        let side = |device: &Arc<dyn Device>| {
            Ok::<_, DeviceError>((Arc::clone(device), Pinned::new(&**device, STOP_LEN_BYTES)?))
        };
        Ok(Stop { source: side(source)?, target: side(target)? })
    }

    /// Says why bytes stop.
    pub(crate) fn why(&self) -> String {
        format!("{} does not reach the memory of {}", self.target.0.id(), self.source.0.id())
    }

    /// Carries bytes over, behind what is queued on both devices' streams, and waits until they are there.
    ///
    /// # Errors
    /// [`DeviceError`]; nothing of it is under way then.
    ///
    /// # Safety
    /// The bytes are in allocations of the two devices, nobody writes the source and nobody touches the target meanwhile.
    pub(crate) unsafe fn carry(
        &mut self,
        source: Location<'_>,
        target: Location<'_>,
        len_bytes: u64,
        stream: Stream,
    ) -> Result<(), DeviceError> {
        for begin in (0..len_bytes).step_by(STOP_LEN_BYTES) {
            let len = (len_bytes - begin).min(STOP_LEN_BYTES as u64) as usize;
            let (device, memory) = &mut self.source;
            let bytes = &mut memory.bytes()[..len];
            // SAFETY: the source is the caller's promise; the host's bytes are this stop's alone.
            unsafe { device.copy_back(source.allocation, source.offset_bytes + begin, bytes, stream)? };
            settle(&**device, memory, stream)?;
            let (device, theirs) = (&self.target.0, &mut self.target.1);
            theirs.bytes()[..len].copy_from_slice(&self.source.1.bytes()[..len]);
            // SAFETY: as above.
            unsafe {
                device.copy(
                    &theirs.bytes()[..len],
                    target.allocation,
                    target.offset_bytes + begin,
                    stream,
                )?;
            };
            settle(&**device, theirs, stream)?;
        }
        Ok(())
    }
}

/// Waits for copies that use host memory; leaks the memory where they cannot be waited for.
pub(crate) fn settle(device: &dyn Device, memory: &Pinned, stream: Stream) -> Result<(), DeviceError> {
    let waited = device.record(stream).and_then(|event| device.wait(&event));
    // Else nobody has it again: the device may still touch it.
    waited.inspect_err(|_| std::mem::forget(Arc::clone(&memory.memory)))
}

/// Long enough for a link to be at its speed; there are two for each peer that is not reached.
const STOP_LEN_BYTES: usize = 1 << 20;
