//! Host tensors in pinned memory, from which a device copies without the driver's own staging.

use std::any::Any;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use tensorhaul_device::{Allocation, Device, DeviceError, Kept, Stream};
use tensorhaul_plan::DeviceId;
use tensorhaul_stage::StagingMemory;

use crate::devices;
use crate::error::{Error, Result};
use crate::external::Allocator;

/// An [`Allocator`] of host memory that a device's driver has pinned: for weights that stay on the host and are
/// copied to the device when they are needed.
///
/// Give it to [`LoadOptions::allocator`](crate::LoadOptions::allocator) in a load for the host. Pinning takes about 0.5 s
/// for each GB, and pinned memory cannot be swapped out. It is unpinned when its last tensor is dropped, which
/// first waits for the streams named with [`LoadOptions::stream`](crate::LoadOptions::stream) and
/// [`Allocation::release_after`].
///
/// # Example
/// ```no_run
/// use std::sync::Arc;
/// use tensorhaul::{DeviceId, LoadOptions, Model, PinnedAllocator};
///
/// let pinned = Arc::new(PinnedAllocator::new(DeviceId::Cuda(0))?);
/// let loaded = Model::open("model")?.load(&LoadOptions::default().allocator(pinned))?;
/// # Ok::<(), tensorhaul::Error>(())
/// ```
pub struct PinnedAllocator {
    device: Arc<dyn Device>,
}

impl PinnedAllocator {
    /// Opens the device whose driver pins.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`](crate::ErrorKind::BadRequest) for the host, which has no driver to pin;
    /// [`ErrorKind::Device`](crate::ErrorKind::Device) when there is no such device.
    pub fn new(device: DeviceId) -> Result<PinnedAllocator> {
        if device == DeviceId::Host {
            return Err(Error::bad_request(
                "memory is pinned by a device's driver; name one, such as cuda:0",
            ));
        }
        Ok(PinnedAllocator { device: devices::open(device)? })
    }
}

// SAFETY: each allocation is fresh memory of its own.
unsafe impl Allocator for PinnedAllocator {
    fn allocate(
        &self,
        device: DeviceId,
        len_bytes: u64,
    ) -> Result<Arc<dyn Allocation>, Box<dyn std::error::Error + Send + Sync>> {
        if device != DeviceId::Host {
            return Err(format!("pinned memory is memory of the host; the load is for {device}").into());
        }
        Ok(Arc::new(PinnedMemory {
            memory: ManuallyDrop::new(self.device.staging_memory(usize::try_from(len_bytes)?)?),
            device: Arc::clone(&self.device),
            consumers: Mutex::default(),
            kept: Kept::default(),
        }))
    }
}

/// Host memory that a device's driver has pinned.
pub(crate) struct PinnedMemory {
    /// Dropped once no consumer reads it any more, or never.
    memory: ManuallyDrop<Box<dyn StagingMemory>>,
    device: Arc<dyn Device>,
    /// Streams that may still read the memory when it is dropped.
    consumers: Mutex<Vec<u64>>,
    kept: Kept,
}

impl PinnedMemory {
    /// Returns the device whose driver pinned it.
    pub(crate) fn device(&self) -> DeviceId {
        self.device.id()
    }

    /// Unlike a device's memory, host memory is gone at once when it is freed, so the wait is the caller's.
    fn wait_for_consumers(&mut self) -> Result<(), DeviceError> {
        let consumers = std::mem::take(self.consumers.get_mut().unwrap_or_else(PoisonError::into_inner));
        if consumers.is_empty() {
            return Ok(());
        }
        for stream in consumers {
            self.device.follow(stream)?;
        }
        self.device.wait(&self.device.record(Stream::Compute)?)
    }
}

// SAFETY: staging memory is initialized host memory, this value's alone, and freed behind all use.
unsafe impl Allocation for PinnedMemory {
    fn address(&self) -> u64 {
        self.memory.as_ptr().addr().get() as u64
    }

    fn len_bytes(&self) -> u64 {
        self.memory.len_bytes() as u64
    }

    fn host_ptr(&self) -> Option<NonNull<u8>> {
        Some(self.memory.as_ptr())
    }

    fn release_after(&self, stream: u64) {
        // A panic elsewhere cannot leave the list half changed: every change is one push.
        let mut consumers = self.consumers.lock().unwrap_or_else(PoisonError::into_inner);
        if !consumers.contains(&stream) {
            consumers.push(stream);
        }
    }

    fn keep(&self, owner: Arc<dyn Any + Send + Sync>) {
        self.kept.add(owner);
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        if let Err(error) = self.wait_for_consumers() {
            // A device that may still read it must not find somebody else's bytes: it is leaked instead.
            let len_bytes = self.memory.len_bytes();
            tracing::warn!(device = %self.device.id(), len_bytes, %error, "pinned memory leaked");
            return;
        }
        // SAFETY: dropped here and nowhere else.
        unsafe { ManuallyDrop::drop(&mut self.memory) };
    }
}
