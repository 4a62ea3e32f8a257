//! Devices that loads use, and the staging rings they leave for the next load.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tensorhaul_device::host::Host;
use tensorhaul_device::{Allocation, Device, Stream};
use tensorhaul_plan::DeviceId;
use tensorhaul_stage::{Layout, Ring};

use crate::cancel::Cancel;
use crate::error::{Error, Result};

/// A device and the ring that the last load on it left.
struct Kept {
    device: Arc<dyn Device>,
    ring: Option<Ring>,
    /// Drivers do not survive a fork; what a parent kept is neither used nor freed in a child.
    process: u32,
}

/// Opening a device takes tenths of a second and pinning half a second for each GB, so both are kept.
static KEPT: Mutex<BTreeMap<DeviceId, Kept>> = Mutex::new(BTreeMap::new());

/// Lets go of the devices and the pinned staging memory that loads of this process have kept. Loads under
/// way and tensors handed over are not touched; the next load opens and pins anew.
pub fn release_devices() {
    let kept = std::mem::take(&mut *lock());
    // Dropped without the lock: a driver may take its time.
    drop(kept.into_values().filter(|kept| kept.process == std::process::id()).collect::<Vec<_>>());
}

/// Returns the device that `auto` means: the accelerator with the most memory, or the host where there is none.
pub fn default_device() -> DeviceId {
    #[cfg(feature = "cuda")]
    if let Ok(driver) = tensorhaul_cuda::driver() {
        use tensorhaul_device::gpu::Driver;
        let memory = |ordinal: &u32| driver.describe(*ordinal).map_or(0, |facts| facts.total_bytes);
        let count = driver.device_count().unwrap_or(0);
        // Of equals the first, which is where people look.
        if let Some(ordinal) = (0..count).rev().max_by_key(memory) {
            return driver.device_id(ordinal);
        }
    }
    DeviceId::Host
}

/// Returns a device, open for work, and the seconds that opening took.
pub(crate) fn open(id: DeviceId) -> Result<(Arc<dyn Device>, f64)> {
    let start = Instant::now();
    if let Some(kept) = lock().get(&id).filter(|kept| kept.process == std::process::id()) {
        return Ok((Arc::clone(&kept.device), start.elapsed().as_secs_f64()));
    }
    let device = backend(id)?;
    if id != DeviceId::Host {
        let kept = Kept { device: Arc::clone(&device), ring: None, process: std::process::id() };
        let before = lock().insert(id, kept);
        // What a parent of this process kept is not this process's to free.
        std::mem::forget(before.filter(|before| before.process != std::process::id()));
    }
    Ok((device, start.elapsed().as_secs_f64()))
}

/// Opens a device that nobody keeps.
pub(crate) fn backend(id: DeviceId) -> Result<Arc<dyn Device>> {
    match id {
        DeviceId::Host => Ok(Arc::new(Host)),
        #[cfg(feature = "cuda")]
        DeviceId::Cuda(ordinal) => Ok(Arc::new(tensorhaul_cuda::open(ordinal)?)),
        other => Err(Error::bad_request(format!("{other}: this build has no backend for it; host works"))),
    }
}

/// Returns a staging ring of the device and the seconds it took: the one kept, if it has this layout, or a new one.
/// One of another layout is let go first: budgets hold for what is kept, too.
pub(crate) fn ring(device: &dyn Device, layout: Layout) -> Result<(Ring, f64)> {
    let start = Instant::now();
    let kept = lock().get_mut(&device.id()).and_then(|kept| kept.ring.take());
    let ring = match kept.filter(|ring| ring.layout() == layout) {
        Some(ring) => {
            ring.reset_peak();
            ring
        }
        None => Ring::from_boxed(device.staging_memory(layout.len_bytes())?, layout),
    };
    Ok((ring, start.elapsed().as_secs_f64()))
}

/// Keeps a ring for the next load on its device, if it came back whole from one that went well.
pub(crate) fn keep(device: &dyn Device, ring: Ring, cancel: &Cancel) {
    cancel.lets_go(); // A cancellation from now on is not of this ring's load.
    if ring.is_whole()
        && !ring.is_closed()
        && let Some(kept) = lock().get_mut(&device.id())
    {
        kept.ring = Some(ring);
    }
}

/// Forgets a device that failed: the next load opens it anew.
pub(crate) fn forget(id: DeviceId) {
    let kept = lock().remove(&id);
    drop(kept);
}

/// Copies a range of device memory to the host, through pinned memory of a few MiB.
pub(crate) fn read_back(
    id: DeviceId,
    source: &Arc<dyn Allocation>,
    offset_bytes: u64,
    len_bytes: u64,
) -> Result<Vec<u8>> {
    let (device, _) = open(id)?;
    let mut bytes = Vec::with_capacity(len_bytes as usize);
    let memory = device.staging_memory(len_bytes.min(READ_BACK_LEN_BYTES) as usize)?;
    while (bytes.len() as u64) < len_bytes {
        let len = (len_bytes - bytes.len() as u64).min(READ_BACK_LEN_BYTES) as usize;
        // SAFETY: staging memory is initialized, at least `len` long, and this function's alone.
        let staged = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr().as_ptr(), len) };
        // SAFETY: both ranges live until the event was waited for; the tensor's bytes are written by nobody any more.
        unsafe { device.copy_back(source, offset_bytes + bytes.len() as u64, staged, Stream::Copy) }?;
        if let Err(error) = device.record(Stream::Copy).and_then(|queued| device.wait(&queued)) {
            std::mem::forget(memory); // The device may still write to it.
            return Err(error.into());
        }
        bytes.extend_from_slice(staged);
    }
    Ok(bytes)
}

fn lock() -> MutexGuard<'static, BTreeMap<DeviceId, Kept>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Long enough for the link's full speed, short enough to pin at once.
const READ_BACK_LEN_BYTES: u64 = 4 << 20;
