//! The simulated machine: devices, memory, handles, and the count of everything.

use std::alloc::{Layout, alloc, dealloc};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::cufile::Storage;
use crate::forward::Forwarding;
use crate::kernels::Entry;
use crate::stream::{Event, Stream};

/// The machine. Handles are numbers that index its tables, so a handle that is dead is found out.
pub(crate) struct Machine {
    pub(crate) config: Config,
    /// Where HIP's calls go instead; lives for the process, as a driver does.
    pub(crate) forwarding: Option<&'static Forwarding>,
    pub(crate) initialized: bool,
    pub(crate) devices: Vec<Device>,
    pub(crate) streams: HashMap<usize, Arc<Stream>>,
    pub(crate) events: HashMap<usize, Arc<Event>>,
    /// Pinned host memory by its start.
    pub(crate) pinned: BTreeMap<usize, Pinned>,
    /// Modules with their kernels.
    pub(crate) modules: HashMap<usize, Vec<Entry>>,
    /// Kernels that were looked up, with their modules.
    pub(crate) functions: HashMap<usize, (usize, Entry)>,
    pub(crate) calls: BTreeMap<&'static str, u64>,
    pub(crate) violations: Vec<String>,
    /// Goes up when it is set which calls are slow.
    pub(crate) pace: u64,
    /// Whether the call at hand copies wrongly.
    pub(crate) flips: bool,
    /// What a library for direct storage keeps.
    pub(crate) storage: Storage,
    next_handle: usize,
}

/// Pinned host memory.
pub(crate) struct Pinned {
    pub(crate) len: usize,
    /// Whether the machine allocated it.
    pub(crate) is_drivers: bool,
    /// Whether kernels reach it.
    pub(crate) is_mapped: bool,
}

/// One device.
#[derive(Default)]
pub(crate) struct Device {
    /// Start to length.
    pub(crate) allocations: BTreeMap<u64, u64>,
    pub(crate) used_bytes: u64,
    /// Freed in the order of a stream, and kept by the pool until somebody waits for the device.
    pub(crate) reserved_bytes: u64,
    pub(crate) retained: u32,
    /// Devices, by their index, whose memory it may touch besides its own, but for what their pools gave.
    pub(crate) peers: BTreeSet<usize>,
    /// Allocations that came from its pool.
    pub(crate) pooled: BTreeSet<u64>,
    /// Devices, by their index, that may touch what its pool gives.
    pub(crate) pool_readers: BTreeSet<usize>,
    /// The code that every call returns once the device is lost.
    pub(crate) lost: Option<i32>,
    /// Stream 0.
    pub(crate) default_stream: Option<Arc<Stream>>,
}

static MACHINE: Mutex<Option<Machine>> = Mutex::new(None);

static HURRY: Condvar = Condvar::new();

thread_local! {
    /// The device whose context is current, from 1; 0 for none.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
    /// The capture mode; threads begin with the strictest.
    static CAPTURE_MODE: Cell<i32> = const { Cell::new(CAPTURE_GLOBAL) };
}

/// Runs `act` on the machine, made at the first use.
pub(crate) fn with<T>(act: impl FnOnce(&mut Machine) -> T) -> T {
    act(machine(&mut MACHINE.lock().unwrap_or_else(PoisonError::into_inner)))
}

fn machine(made: &mut Option<Machine>) -> &mut Machine {
    made.get_or_insert_with(|| {
        let text = std::env::var("SIMGPU").unwrap_or_default();
        Machine::new(Config::parse(&text).unwrap_or_else(|error| panic!("{error}")))
    })
}

/// Wakes the calls that are being slow; those that no longer are go on.
pub(crate) fn hurry() {
    HURRY.notify_all();
}

/// Counts a call and takes the time that the configuration gives it, without holding the machine. Returns its count.
fn begin(name: &'static str) -> (MutexGuard<'static, Option<Machine>>, u64) {
    let mut guard = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let (pace, nth, wait) = {
        let machine = machine(&mut guard);
        let count = machine.calls.entry(name).or_default();
        *count += 1;
        let nth = *count;
        let slow = machine.config.slows.iter().find(|slow| slow.call == name);
        (machine.pace, nth, Duration::from_millis(slow.map_or(0, |slow| slow.millis)))
    };
    let start = Instant::now();
    while let Some(left) = wait.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) {
        guard = HURRY.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        if machine(&mut guard).pace != pace {
            break;
        }
    }
    (guard, nth)
}

/// Counts a call, takes its time, lets it fail where the configuration or a lost device says so, else runs it.
pub(crate) fn call(name: &'static str, act: impl FnOnce(&mut Machine) -> Result<(), i32>) -> i32 {
    let (mut guard, nth) = begin(name);
    let machine = machine(&mut guard);
    if let Some(fail) = machine.config.fails.iter().find(|fail| fail.call == name && fail.nth == nth) {
        let code = fail.code;
        if LOST_CODES.contains(&code)
            && let Some(device) = machine.current_device()
        {
            device.lost = Some(code);
        }
        return code;
    }
    if !ANSWERED_ALWAYS.contains(&name)
        && let Some(code) = machine.current_device().and_then(|device| device.lost)
    {
        return code;
    }
    if machine.config.capturing && CAPTURE_MODE.get() != CAPTURE_RELAXED && ENDS_CAPTURES.contains(&name) {
        machine.violations.push(format!("{name} ends a capture of somebody else"));
    }
    machine.flips = machine.config.flips.iter().any(|(call, at)| call == name && *at == nth);
    act(machine).err().unwrap_or(0)
}

impl Machine {
    pub(crate) fn new(config: Config) -> Machine {
        let devices = (0..config.devices).map(|_| Device::default()).collect();
        let forwarding =
            config.forward.as_deref().map(|library| &*Box::leak(Box::new(Forwarding::to(library))));
        Machine {
            config,
            forwarding,
            initialized: false,
            devices,
            streams: HashMap::new(),
            events: HashMap::new(),
            pinned: BTreeMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            calls: BTreeMap::new(),
            violations: Vec::new(),
            pace: 0,
            flips: false,
            storage: Storage::default(),
            next_handle: 0x1000,
        }
    }

    pub(crate) fn new_handle(&mut self) -> usize {
        self.next_handle += 0x10;
        self.next_handle
    }

    pub(crate) fn current(&self) -> usize {
        CURRENT.get()
    }

    pub(crate) fn set_current(&self, context: usize) {
        CURRENT.set(context);
    }

    /// Sets the calling thread's capture mode and returns what it was.
    pub(crate) fn exchange_capture_mode(&self, mode: i32) -> Result<i32, i32> {
        if !(CAPTURE_GLOBAL..=CAPTURE_RELAXED).contains(&mode) {
            return Err(INVALID_VALUE);
        }
        Ok(CAPTURE_MODE.replace(mode))
    }

    pub(crate) fn current_device(&mut self) -> Option<&mut Device> {
        self.devices.get_mut(CURRENT.get().checked_sub(1)?)
    }

    /// Allocates poisoned memory of a device.
    pub(crate) fn allocate(&mut self, len_bytes: u64) -> Result<u64, i32> {
        let (capacity, poison) = (self.config.memory_bytes, self.config.poison);
        let device = self.current_device().ok_or(INVALID_CONTEXT)?;
        if len_bytes == 0 {
            return Err(INVALID_VALUE);
        }
        if len_bytes > capacity - device.used_bytes {
            return Err(OUT_OF_MEMORY);
        }
        let layout = layout(len_bytes);
        // SAFETY: the length is not 0.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            return Err(OUT_OF_MEMORY);
        }
        if poison {
            // SAFETY: just allocated, `len_bytes` long.
            unsafe { start.write_bytes(POISON_NEW, len_bytes as usize) };
        }
        device.allocations.insert(start.expose_provenance() as u64, len_bytes);
        device.used_bytes += len_bytes;
        device.reserved_bytes = device.reserved_bytes.saturating_sub(len_bytes);
        Ok(start.expose_provenance() as u64)
    }

    /// Gives the bytes of an allocation back to its device's capacity. A free that is only queued does so too: in
    /// the order of its stream, later allocations may have the memory. Nobody else has it before [`Machine::trim_pools`].
    pub(crate) fn give_back(&mut self, address: u64) -> Result<(), i32> {
        for device in &mut self.devices {
            if let Some(len_bytes) = device.allocations.get(&address) {
                device.used_bytes -= len_bytes;
                device.reserved_bytes += len_bytes;
                return Ok(());
            }
        }
        self.violations.push(format!("free of {address:#x}, which is not allocated"));
        Err(INVALID_VALUE)
    }

    /// Lets the pools give back what they keep, but for what is not freed yet.
    pub(crate) fn trim_pools(&mut self) {
        for device in &mut self.devices {
            device.reserved_bytes = device.allocations.values().sum::<u64>() - device.used_bytes;
        }
    }

    /// Frees memory whose bytes were given back.
    pub(crate) fn free(&mut self, address: u64) -> Result<(), i32> {
        let removed = self.devices.iter_mut().find_map(|device| {
            device.pooled.remove(&address);
            device.allocations.remove(&address)
        });
        let len_bytes = removed.ok_or(INVALID_VALUE)?;
        let start = std::ptr::with_exposed_provenance_mut::<u8>(address as usize);
        if self.config.poison {
            // SAFETY: allocated above with this length, and still the machine's own.
            unsafe { start.write_bytes(POISON_FREED, len_bytes as usize) };
        }
        // SAFETY: allocated above with this layout.
        unsafe { dealloc(start, layout(len_bytes)) };
        Ok(())
    }

    /// Checks that a range is inside one allocation of a device, or of another that it may touch.
    pub(crate) fn check_device_range(
        &mut self,
        device: usize,
        address: u64,
        len_bytes: u64,
    ) -> Result<(), i32> {
        let why = match self.owner(address, len_bytes) {
            Some(owner) if self.may_touch(device, owner, address) => return Ok(()),
            Some(owner) => format!("are of device {owner}, which device {device} may not touch"),
            None if self.config.integrated && self.is_mapped(address, len_bytes) => return Ok(()),
            None => "are not inside an allocation".to_owned(),
        };
        self.violations.push(format!("{len_bytes} bytes at {address:#x} {why}"));
        Err(INVALID_VALUE)
    }

    /// Tells whether a range is in pinned memory that kernels reach.
    fn is_mapped(&self, address: u64, len_bytes: u64) -> bool {
        let before = self.pinned.range(..=address as usize).next_back();
        before.is_some_and(|(start, pinned)| {
            pinned.is_mapped && address + len_bytes <= (start + pinned.len) as u64
        })
    }

    /// Returns the index of the device that has the allocation around a range.
    pub(crate) fn owner(&self, address: u64, len_bytes: u64) -> Option<usize> {
        self.devices.iter().position(|device| {
            let before = device.allocations.range(..=address).next_back();
            before.is_some_and(|(start, len)| address + len_bytes <= start + len)
        })
    }

    /// Tells whether a device may touch an allocation of another, given by an address in it.
    fn may_touch(&self, device: usize, owner: usize, address: u64) -> bool {
        let owners = &self.devices[owner];
        let start = owners.allocations.range(..=address).next_back().map(|(start, _)| *start);
        device == owner
            || match start.is_some_and(|start| owners.pooled.contains(&start)) {
                true => owners.pool_readers.contains(&device),
                false => self.devices.get(device).is_some_and(|device| device.peers.contains(&owner)),
            }
    }

    /// Checks that one end of a copy about to run, which was valid when it was queued, is neither freed nor unpinned.
    pub(crate) fn check_not_freed(&mut self, start: usize, len_bytes: usize) -> bool {
        let ends_within = |first: usize, len: usize| start + len_bytes <= first + len;
        let on_device = self.devices.iter().any(|device| {
            let before = device.allocations.range(..=start as u64).next_back();
            before.is_some_and(|(first, len)| ends_within(*first as usize, *len as usize))
        });
        let before = self.pinned.range(..=start).next_back();
        let is_valid = on_device || before.is_some_and(|(first, pinned)| ends_within(*first, pinned.len));
        if !is_valid {
            self.violations.push(format!("{len_bytes} bytes at {start:#x} were freed before the copy ran"));
        }
        is_valid
    }

    /// Checks that host memory of a copy is pinned.
    pub(crate) fn check_pinned(&mut self, start: usize, len_bytes: usize) {
        let before = self.pinned.range(..=start).next_back();
        if before.is_none_or(|(first, pinned)| start + len_bytes > first + pinned.len) {
            self.violations.push(format!("{len_bytes} bytes of host memory at {start:#x} are not pinned"));
        }
    }

    /// Returns what kernels of a device may touch: the start and end of each allocation, of its own and of its peers', and
    /// of pinned memory that kernels reach, ascending.
    pub(crate) fn reachable(&self, device: usize) -> Vec<(u64, u64)> {
        let of_owner = |(owner, device): (usize, &Device)| {
            device
                .allocations
                .iter()
                .map(move |(start, len)| (owner, *start, start + len))
                .collect::<Vec<_>>()
        };
        let allocations = self.devices.iter().enumerate().flat_map(of_owner);
        let touched = allocations.filter(|(owner, start, _)| self.may_touch(device, *owner, *start));
        let pinned = self.pinned.iter().filter(|(_, pinned)| pinned.is_mapped);
        let pinned = pinned.map(|(start, pinned)| (*start as u64, (start + pinned.len) as u64));
        let mut ranges: Vec<_> = touched.map(|(_, start, end)| (start, end)).chain(pinned).collect();
        ranges.sort_unstable();
        ranges
    }

    /// Returns the stream of a handle; 0 is the default stream of the current device.
    pub(crate) fn stream(&mut self, handle: usize) -> Result<Arc<Stream>, i32> {
        if handle != 0 {
            return self.streams.get(&handle).cloned().ok_or(INVALID_HANDLE);
        }
        let config = self.config.clone();
        let device = self.current_device().ok_or(INVALID_CONTEXT)?;
        let start = || Arc::new(Stream::start(&config, CURRENT.get() - 1));
        Ok(Arc::clone(device.default_stream.get_or_insert_with(start)))
    }

    pub(crate) fn all_streams(&self) -> impl Iterator<Item = &Arc<Stream>> {
        let defaults = self.devices.iter().filter_map(|device| device.default_stream.as_ref());
        self.streams.values().chain(defaults)
    }

    pub(crate) fn event(&self, handle: usize) -> Result<Arc<Event>, i32> {
        self.events.get(&handle).cloned().ok_or(INVALID_HANDLE)
    }
}

/// Writes as much of a text as fits, with its terminator.
///
/// # Safety
/// `target` is writable for `len` bytes.
pub(crate) unsafe fn write_text(target: *mut std::ffi::c_char, len: usize, text: &str) {
    // SAFETY: the caller's promise; any byte is initialized enough to be written over.
    let target = unsafe { std::slice::from_raw_parts_mut(target.cast::<std::mem::MaybeUninit<u8>>(), len) };
    let kept = text.len().min(len.saturating_sub(1));
    for (byte, value) in target.iter_mut().zip(text.bytes().take(kept).chain([0])) {
        byte.write(value);
    }
}

fn layout(len_bytes: u64) -> Layout {
    Layout::from_size_align(len_bytes as usize, 256).expect("a length below the device's memory")
}

/// New memory holds this, so that whoever reads before writing sees it.
const POISON_NEW: u8 = 0xa5;
/// Freed memory held this last.
const POISON_FREED: u8 = 0xdd;

// Both vendors have these under the same numbers.
pub(crate) const INVALID_VALUE: i32 = 1;
pub(crate) const OUT_OF_MEMORY: i32 = 2;
pub(crate) const NOT_INITIALIZED: i32 = 3;
pub(crate) const NO_DEVICE: i32 = 100;
pub(crate) const INVALID_DEVICE: i32 = 101;
pub(crate) const INVALID_CONTEXT: i32 = 201;
pub(crate) const INVALID_HANDLE: i32 = 400;
pub(crate) const NOT_FOUND: i32 = 500;
pub(crate) const NOT_READY: i32 = 600;
pub(crate) const NOT_SUPPORTED: i32 = 801;

pub(crate) const PEER_ACCESS_UNSUPPORTED: i32 = 217;
pub(crate) const PEER_ACCESS_ALREADY_ENABLED: i32 = 704;
pub(crate) const PEER_ACCESS_NOT_ENABLED: i32 = 705;

const CAPTURE_GLOBAL: i32 = 0;
const CAPTURE_RELAXED: i32 = 2;

/// Calls that a driver refuses while anybody captures, because they may wait for, or have to do with, what is captured.
const ENDS_CAPTURES: &[&str] = &[
    "cuCtxSynchronize",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuMemAllocAsync",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamSynchronize",
    "hipEventQuery",
    "hipEventSynchronize",
    "hipFree",
    "hipHostFree",
    "hipHostMalloc",
    "hipHostRegister",
    "hipHostUnregister",
    "hipMalloc",
    "hipMallocAsync",
    "hipModuleLoadData",
    "hipModuleUnload",
    "hipStreamSynchronize",
];

/// Whatever became of the device: HIP keeps for the thread which one is current, and libraries for direct storage keep lists of their own.
const ANSWERED_ALWAYS: &[&str] = &[
    "cuFileBufDeregister",
    "cuFileDriverClose",
    "cuFileHandleDeregister",
    "hipFileBufDeregister",
    "hipFileDriverClose",
    "hipFileHandleDeregister",
    "hipGetDevice",
    "hipSetDevice",
];

/// These end a context: illegal addresses and hardware faults.
pub(crate) const LOST_CODES: std::ops::RangeInclusive<i32> = 700..=719;
