//! Devices that loads use, and the staging rings they leave for the next load.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use tensorhaul_device::gpu::{self, Driver, NoDriver, topology};
use tensorhaul_device::host::Host;
use tensorhaul_device::{Allocation, Capabilities, Device, DeviceError, Near, Stream};
use tensorhaul_plan::DeviceId;
use tensorhaul_stage::{Layout, Pinned, Ring};

use crate::doctor;
use crate::error::{Error, ErrorKind, Result};
use crate::report::Fallback;
use crate::storage;
use crate::vendors::{VENDORS, Vendor};

/// A device and the ring that the last load on it left.
struct Kept {
    device: Arc<dyn Device>,
    ring: Option<Ring>,
    /// Drivers do not survive a fork; what a parent kept is neither used nor freed in a child.
    process: u32,
}

impl Kept {
    fn is_ours(&self) -> bool {
        self.process == std::process::id()
    }
}

/// Opening a device takes tenths of a second and pinning half a second for each GB, so both are kept.
static KEPT: Mutex<BTreeMap<DeviceId, Kept>> = Mutex::new(BTreeMap::new());

/// Accelerators that refused to pin the last ring given to them.
static REFUSE_TO_PIN: Mutex<BTreeSet<DeviceId>> = Mutex::new(BTreeSet::new());

/// Lets go of the devices and the pinned staging memory that loads of this process have kept. Loads under
/// way and tensors handed over are not touched; the next load opens and pins anew.
pub fn release_devices() {
    storage::release(); // Before the contexts that it has to do with.
    let kept = mem::take(&mut *lock());
    // Dropped without the lock: a driver may take its time.
    drop(kept.into_values().filter(Kept::is_ours).collect::<Vec<_>>());
}

/// Returns the device that `auto` means: the accelerator with the most memory, whoever the vendor, or the host where
/// there is none. What is free of it only a context could tell, which takes tenths of a second on each.
pub fn default_device() -> DeviceId {
    default_device_told().0
}

/// Returns the [`default_device`] and, where it is the host because a driver that is installed does not work, that and why, for
/// [`LoadOptions::fallbacks`](crate::LoadOptions::fallbacks). A driver that is not installed is not missed, nor is one without a device on the bus.
pub fn default_device_told() -> (DeviceId, Vec<Fallback>) {
    let (mut largest, mut told) = ((0, DeviceId::Host), Vec::new());
    for vendor in VENDORS {
        let pass_over = |why: String| {
            let what = format!("the default device is the host, because {} was passed over", vendor.name);
            Fallback::new(what, why)
        };
        let driver = match (vendor.driver)() {
            Ok(driver) => driver,
            Err(NoDriver::Missing(_)) => continue,
            Err(NoDriver::NoDevice(_)) if !doctor::has_device_of(vendor) => continue,
            Err(why) => {
                told.push(pass_over(why.to_string()));
                continue;
            }
        };
        let count = driver.device_count().unwrap_or_else(|error| {
            told.push(pass_over(error.to_string()));
            0
        });
        for ordinal in 0..count {
            let total_bytes = match driver.describe(ordinal) {
                Ok(facts) => facts.total_bytes,
                Err(error) => {
                    told.push(pass_over(error.to_string()));
                    0
                }
            };
            // Of equals the first, which is where people look.
            if total_bytes > largest.0 {
                largest = (total_bytes, driver.device_id(ordinal));
            }
        }
    }
    match largest.1 {
        DeviceId::Host => (DeviceId::Host, told),
        device => (device, Vec::new()),
    }
}

/// A device that is there: what a plan needs of it is known, whether or not it is open for work.
pub(crate) enum Found {
    /// Open: the host, or what an earlier load opened.
    Open(Arc<dyn Device>),
    /// Described by its driver, without a context.
    #[cfg_attr(
        not(any(feature = "cuda", feature = "rocm")),
        allow(dead_code, reason = "without a vendor nothing but the host is found")
    )]
    Described(Box<dyn Described>),
}

/// A device as its driver describes it, whoever the vendor.
pub(crate) trait Described: Send {
    fn capabilities(&self) -> Capabilities;
    fn near(&self) -> Near;
    fn total_bytes(&self) -> u64;
    fn open(self: Box<Self>) -> std::result::Result<Arc<dyn Device>, DeviceError>;
}

impl<D: Driver> Described for gpu::Found<D> {
    fn capabilities(&self) -> Capabilities {
        gpu::Found::capabilities(self)
    }

    fn near(&self) -> Near {
        gpu::Found::near(self)
    }

    fn total_bytes(&self) -> u64 {
        self.facts().total_bytes
    }

    fn open(self: Box<Self>) -> std::result::Result<Arc<dyn Device>, DeviceError> {
        Ok(Arc::new(gpu::Found::open(*self)?))
    }
}

/// Finds a device; the first call in a process loads and initializes its driver.
pub(crate) fn find(id: DeviceId) -> Result<Found> {
    if let Some(kept) = lock().get(&id).filter(|kept| kept.is_ours()) {
        return Ok(Found::Open(Arc::clone(&kept.device)));
    }
    match id {
        DeviceId::Host => Ok(Found::Open(Arc::new(Host))),
        #[cfg(feature = "cuda")]
        DeviceId::Cuda(ordinal) => Ok(Found::Described(Box::new(tensorhaul_cuda::find(ordinal)?))),
        #[cfg(feature = "rocm")]
        DeviceId::Rocm(ordinal) => Ok(Found::Described(Box::new(tensorhaul_rocm::find(ordinal)?))),
        other => Err(Error::bad_request(format!("{other}: this build has no backend for it; host works"))),
    }
}

/// Finds a device without initializing its driver: `None` where this process has not done so yet, and where there is no such device.
pub(crate) fn find_known(id: DeviceId) -> Option<Found> {
    let is_known = Vendor::of(id).is_none_or(|vendor| (vendor.is_initialized)());
    is_known.then(|| find(id).ok())?
}

/// Finds the devices of a load. Accelerators of different vendors are refused: what one's driver pins, the other's cannot copy from.
pub(crate) fn find_all(ids: &[DeviceId]) -> Result<Vec<Found>> {
    let vendor = |id: &DeviceId| mem::discriminant(id);
    let mut accelerators = ids.iter().filter(|id| **id != DeviceId::Host);
    if let Some(first) = accelerators.next()
        && let Some(other) = accelerators.find(|id| vendor(id) != vendor(first))
    {
        let what = format!("{first} and {other} are of different vendors; one load is for one, and the host");
        return Err(Error::bad_request(what));
    }
    // The first call loads and initializes the driver, the others take microseconds.
    ids.iter().map(|id| find(*id)).collect()
}

impl Found {
    /// Opens the device, unless it is open, and keeps it for the next load.
    pub(crate) fn open(self) -> Result<Arc<dyn Device>> {
        let device = match self {
            Found::Open(device) => return Ok(device),
            found => found.open_apart()?,
        };
        let kept = Kept { device: Arc::clone(&device), ring: None, process: std::process::id() };
        let before = lock().insert(device.id(), kept);
        // What a parent of this process kept is not this process's to free.
        mem::forget(before.filter(|before| !before.is_ours()));
        Ok(device)
    }

    /// Opens the device, unless it is open, for nobody but the caller.
    pub(crate) fn open_apart(self) -> Result<Arc<dyn Device>> {
        match self {
            Found::Open(device) => Ok(device),
            Found::Described(found) => Ok(found.open()?),
        }
    }

    /// Returns the device if it is open.
    pub(crate) fn opened(&self) -> Option<&Arc<dyn Device>> {
        match self {
            Found::Open(device) => Some(device),
            Found::Described(_) => None,
        }
    }

    /// Returns what it can do.
    pub(crate) fn capabilities(&self) -> Capabilities {
        match self {
            Found::Open(device) => device.capabilities(),
            Found::Described(found) => found.capabilities(),
        }
    }

    /// Returns what of the host is nearest to it.
    pub(crate) fn near(&self) -> Near {
        match self {
            Found::Open(device) => device.near(),
            Found::Described(found) => found.near(),
        }
    }

    /// Returns its memory in all; `None` for one that is open, which can be asked what is free.
    pub(crate) fn total_bytes(&self) -> Option<u64> {
        match self {
            Found::Open(_) => None,
            Found::Described(found) => Some(found.total_bytes()),
        }
    }
}

/// Returns every device of a device's vendor; of the host, itself.
pub(crate) fn of_vendor(id: DeviceId) -> Result<Vec<DeviceId>> {
    let Some(vendor) = Vendor::of(id) else { return Ok(vec![DeviceId::Host]) };
    let unavailable = |why: NoDriver| DeviceError::Unavailable { device: id, why: why.to_string() };
    let driver = (vendor.driver)().map_err(unavailable)?;
    let count = driver.device_count().map_err(|error| DeviceError::Driver { device: id, error })?;
    Ok((0..count).map(|ordinal| driver.device_id(ordinal)).collect())
}

/// Returns devices, open for work, opened beside each other.
pub(crate) fn open_all(ids: &[DeviceId]) -> Result<Vec<Arc<dyn Device>>> {
    let found = find_all(ids)?;
    thread::scope(|scope| {
        let opening: Vec<_> = found.into_iter().map(|found| scope.spawn(|| found.open())).collect();
        let opened =
            opening.into_iter().map(|thread| thread.join().expect("opening a device does not panic"));
        opened.collect()
    })
}

/// Tells which devices (the source first) copy to which others directly.
pub(crate) fn peers(opened: &[Arc<dyn Device>]) -> Vec<(DeviceId, DeviceId)> {
    let ids = || opened.iter().map(|device| device.id());
    let pairs = opened.iter().flat_map(|target| ids().map(move |source| (source, target)));
    let others = pairs.filter(|(source, target)| *source != target.id() && target.can_reach(*source));
    others.map(|(source, target)| (source, target.id())).collect()
}

/// Returns a device, open for work.
pub(crate) fn open(id: DeviceId) -> Result<Arc<dyn Device>> {
    find(id)?.open()
}

/// Returns a staging ring for a device: the one kept, if it has this layout, or one of the host's own memory, which
/// reads may fill before the device has pinned it, near the device. One of another layout is let go first: budgets hold for what
/// is kept, too.
pub(crate) fn ring(id: DeviceId, layout: Layout, near: &Near) -> Result<Ring> {
    let kept = lock().get_mut(&id).filter(|kept| kept.is_ours()).and_then(|kept| kept.ring.take());
    if let Some(ring) = kept.filter(|ring| ring.layout() == layout) {
        ring.reset_peak();
        return Ok(ring);
    }
    // Its first touch is a read's, or the driver's when it pins.
    let memory = near.allocate(layout.len_bytes())?;
    memory.keep_from_children();
    Ok(Ring::unpinned(memory, layout))
}

/// Lets a device pin a ring, unless it is pinned; `None` when the device refuses. [`drivers_own_ring`] then helps.
pub(crate) fn pin(device: &dyn Device, ring: &Ring) -> Result<Option<Pinned>> {
    if let Some(pinned) = ring.pinned() {
        return Ok(Some(pinned));
    }
    let pinned = ring.pin(|memory| device.pin(memory))?;
    let mut refuse = REFUSE_TO_PIN.lock().unwrap_or_else(PoisonError::into_inner);
    match pinned {
        None if device.id() != DeviceId::Host => refuse.insert(device.id()),
        _ => refuse.remove(&device.id()),
    };
    drop(refuse);
    Ok(pinned)
}

/// Tells whether an accelerator refused to pin the last ring. What refuses (a container, a platform) does so for the life of the
/// process, and a load that reads before it pins would read twice.
pub(crate) fn pinning_was_refused(id: DeviceId) -> bool {
    REFUSE_TO_PIN.lock().unwrap_or_else(PoisonError::into_inner).contains(&id)
}

/// Returns a staging ring of memory that the device's driver allocated.
pub(crate) fn drivers_own_ring(device: &dyn Device, layout: Layout) -> Result<Ring> {
    Ok(Ring::from_boxed(device.staging_memory(layout.len_bytes())?, layout))
}

/// Tells that a device's staging memory may lie far from it. On a machine with one node there is no far.
pub(crate) fn placement_fallback(id: DeviceId, ring: &Ring) -> Option<Fallback> {
    let (node, why) = topology::refused(ring.placement())?;
    let what = format!("staging memory of {id} lies on any memory node, not on node {node}, its nearest");
    Some(Fallback::new(what, why))
}

/// Keeps a ring for the next load on its device, if it came back whole from one that went well.
pub(crate) fn keep(device: &dyn Device, ring: Ring) {
    if ring.is_whole()
        && !ring.is_closed()
        && let Some(kept) = lock().get_mut(&device.id())
    {
        kept.ring = Some(ring);
    }
}

/// Forgets the device that failed, if one did: the next load opens it anew.
pub(crate) fn forget_failed(error: &Error) {
    if error.kind() == ErrorKind::Device
        && let Some(id) = error.device()
    {
        storage::release_opened_inside(id);
        let kept = lock().remove(&id);
        if let Some(parents) = kept.filter(|kept| !kept.is_ours()) {
            mem::forget(parents); // What a parent of this process kept is not this process's to free.
        }
    }
}

/// Copies a range of device memory to the host, through pinned memory of a few MiB.
pub(crate) fn read_back(
    id: DeviceId,
    source: &Arc<dyn Allocation>,
    offset_bytes: u64,
    len_bytes: u64,
) -> Result<Vec<u8>> {
    let device = open(id)?;
    let mut bytes = Vec::with_capacity(len_bytes as usize);
    let memory = device.staging_memory(len_bytes.min(READ_BACK_LEN_BYTES) as usize)?;
    while (bytes.len() as u64) < len_bytes {
        let len = (len_bytes - bytes.len() as u64).min(READ_BACK_LEN_BYTES) as usize;
        // SAFETY: staging memory is initialized, at least `len` long, and this function's alone.
        let staged = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr().as_ptr(), len) };
        // SAFETY: both ranges live until the event was waited for; the tensor's bytes are written by nobody any more.
        unsafe { device.copy_back(source, offset_bytes + bytes.len() as u64, staged, Stream::Copy) }?;
        let copied = || device.record(Stream::Copy).and_then(|queued| device.wait(&queued));
        if let Err(error) = copied() {
            if copied().is_err() {
                mem::forget(memory); // The device may still write to it.
            }
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
