//! The simulator's own answers about several devices: whose memory copies and kernels may touch. The backend uses one device at
//! a time, so these call the exported functions.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;

use tensorhaul_device::gpu::{Context, Driver, Gpu, LaunchShape, StreamHandle};
use tensorhaul_device::{Allocation, Device, Stream};

use crate::suite::sim::{Sim, function};
use crate::vendor::{self, Vendor, call, peer};

type CopyOnDevice = unsafe extern "C" fn(u64, u64, usize, *mut c_void) -> c_int;

const LEN_BYTES: usize = 4096;

/// Two devices with memory each, and a stream of the first, which is current.
pub(crate) struct Pair {
    pub(crate) driver: Arc<Vendor>,
    devices: [Gpu<Vendor>; 2],
    memory: [Arc<dyn Allocation>; 2],
    stream: StreamHandle,
}

impl Pair {
    pub(crate) fn new() -> Pair {
        let devices = [0, 1].map(|ordinal| vendor::open(ordinal).unwrap());
        let memory = [0, 1].map(|at: usize| devices[at].allocate(LEN_BYTES as u64).unwrap());
        let driver = vendor::driver().unwrap();
        driver.make_current(context(0)).unwrap();
        let stream = driver.stream_create().unwrap();
        Pair { driver, devices, memory, stream }
    }

    /// Queues a copy from the second device to the first, on the first one's stream.
    pub(crate) fn copy(&self) -> c_int {
        let (target, source) = (self.memory[0].address(), self.memory[1].address());
        // SAFETY: both live until the stream was waited for.
        let code = unsafe {
            function::<CopyOnDevice>(call::COPY_ON_DEVICE)(target, source, LEN_BYTES, raw(self.stream))
        };
        self.wait();
        code
    }

    /// Queues a copy between the devices that names them.
    fn copy_peer(&self, target_ordinal: u32, source_ordinal: u32) -> c_int {
        let (target, source) = (self.memory[0].address(), self.memory[1].address());
        let (to, from) = ((target_ordinal, target), (source_ordinal, source));
        // SAFETY: as for `copy`.
        let code = unsafe { peer::copy(to, from, LEN_BYTES, raw(self.stream)) };
        self.wait();
        code
    }

    /// Launches a kernel on the first device that reads and writes the second's memory.
    fn launch(&self) {
        // SAFETY: an image as the driver takes it.
        let module = unsafe { self.driver.module_load(vendor::probe_image()) }.unwrap();
        // SAFETY: just loaded.
        let probe = unsafe { self.driver.function(module, c"probe") }.unwrap();
        let shape = LaunchShape { block_count: 1, block_threads: 32, shared_bytes: 0 };
        let params = self.memory[1].address().to_le_bytes();
        // SAFETY: the simulator leaves out what the kernel must not touch.
        unsafe { self.driver.launch(probe, shape, &params, self.stream) }.unwrap();
        self.wait();
        // SAFETY: nothing of it runs any more. A device that was lost says so here, too.
        let _ = unsafe { self.driver.module_unload(module) };
    }

    fn wait(&self) {
        // SAFETY: alive. Where a kernel has failed already, this says so too.
        let _ = unsafe { self.driver.stream_wait(self.stream) };
    }

    fn fill(&self, ordinal: usize, byte: u8) {
        let device = &self.devices[ordinal];
        let staged = device.staging_memory(LEN_BYTES).unwrap();
        // SAFETY: as long, and nobody else's.
        let bytes = unsafe { std::slice::from_raw_parts_mut(staged.as_ptr().as_ptr(), LEN_BYTES) };
        bytes.fill(byte);
        // SAFETY: both live until the event was waited for.
        unsafe { device.copy(bytes, &self.memory[ordinal], 0, Stream::Copy) }.unwrap();
        device.wait(&device.record(Stream::Copy).unwrap()).unwrap();
    }

    fn holds(&self, ordinal: usize, byte: u8) -> bool {
        let device = &self.devices[ordinal];
        let staged = device.staging_memory(LEN_BYTES).unwrap();
        // SAFETY: as long, and nobody else's.
        let bytes = unsafe { std::slice::from_raw_parts_mut(staged.as_ptr().as_ptr(), LEN_BYTES) };
        // SAFETY: both live until the event was waited for.
        unsafe { device.copy_back(&self.memory[ordinal], 0, bytes, Stream::Copy) }.unwrap();
        device.wait(&device.record(Stream::Copy).unwrap()).unwrap();
        bytes.iter().all(|found| *found == byte)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // SAFETY: every test waits for it. A lost device says so here, too.
        let _ = unsafe { self.driver.stream_destroy(self.stream) };
        let _ = self.driver.make_current(Context(0));
    }
}

fn context(ordinal: u32) -> Context {
    Context(ordinal as usize + 1)
}

fn raw(stream: StreamHandle) -> *mut c_void {
    ptr::without_provenance_mut(stream.0)
}

#[test]
fn access_is_asked_for_enabled_once_and_disabled_once() {
    let sim = Sim::new("devices=2");
    let pair = Pair::new();
    assert_eq!(
        [peer::can_access(0, 1), peer::can_access(1, 0), peer::can_access(0, 0)],
        [(0, 1), (0, 1), (0, 0)]
    );
    assert_eq!(peer::can_access(0, 2).0, 101);
    assert_eq!(peer::disable(1), 705, "not enabled yet");
    assert_eq!([peer::enable(1), peer::enable(1)], [0, 704]);
    assert_eq!([peer::disable(1), peer::disable(1)], [0, 705]);
    let wrong = [peer::enable(0), peer::enable(2)];
    assert_eq!(wrong, [peer::NO_PEER; 2], "the current device, and one that is none");
    drop(pair);
    sim.assert_clean("after the answers");
}

#[test]
fn a_machine_without_peers_refuses_access() {
    let _sim = Sim::new("devices=2;peers=0");
    let _pair = Pair::new();
    assert_eq!([peer::can_access(0, 1), peer::can_access(1, 0)], [(0, 0), (0, 0)]);
    assert_eq!(peer::enable(1), 217);
}

#[test]
fn a_copy_touches_another_devices_memory_only_while_that_is_enabled() {
    let sim = Sim::new("devices=2;delay_us=50");
    let pair = Pair::new();
    pair.fill(0, 1);
    pair.fill(1, 2);
    assert_eq!(pair.copy(), 1);
    assert!(pair.holds(0, 1), "nothing was copied");
    let violations = sim.report().violations;
    assert!(
        violations.len() == 1 && violations[0].ends_with("are of device 1, which device 0 may not touch"),
        "{violations:?}"
    );
    assert_eq!(peer::enable(1), 0);
    assert_eq!(pair.copy(), 0);
    assert!(pair.holds(0, 2));
    // The other way needs the other device's leave.
    pair.driver.make_current(context(1)).unwrap();
    let theirs = pair.driver.stream_create().unwrap();
    let (target, source) = (pair.memory[1].address(), pair.memory[0].address());
    let copy = function::<CopyOnDevice>(call::COPY_ON_DEVICE);
    // SAFETY: both live until the stream ends, below.
    assert_eq!(unsafe { copy(target, source, LEN_BYTES, raw(theirs)) }, 1);
    // SAFETY: made above, used by nobody any more.
    unsafe { pair.driver.stream_destroy(theirs) }.unwrap();
    pair.driver.make_current(context(0)).unwrap();
    assert_eq!(peer::disable(1), 0);
    assert_eq!(pair.copy(), 1);
    assert_eq!(sim.report().violations.len(), 3);
}

#[test]
fn a_copy_that_names_both_devices_needs_no_access_but_the_right_devices() {
    let sim = Sim::new("devices=2;peers=0;delay_us=50");
    let pair = Pair::new();
    pair.fill(0, 1);
    pair.fill(1, 2);
    assert_eq!(pair.copy_peer(0, 1), 0);
    assert!(pair.holds(0, 2));
    assert!(sim.report().violations.is_empty());
    assert_eq!([pair.copy_peer(1, 0), pair.copy_peer(0, 5)], [1, peer::NO_PEER]);
    let violations = sim.report().violations;
    assert!(violations[0].ends_with("are not inside an allocation of device 0"), "{violations:?}");
}

#[test]
fn a_kernel_touches_another_devices_memory_only_while_that_is_enabled() {
    let sim = Sim::new("devices=2");
    let pair = Pair::new();
    assert_eq!(peer::enable(1), 0);
    pair.launch();
    assert!(sim.report().violations.is_empty(), "{:?}", sim.report().violations);
    assert_eq!(peer::disable(1), 0);
    pair.launch();
    let violations = sim.report().violations;
    assert!(violations[0].ends_with("in no allocation and no pinned memory"), "{violations:?}");
    let error = pair.devices[0].record(Stream::Copy).unwrap_err().to_string();
    assert!(error.contains(&format!("failed with 700 ({})", vendor::ILLEGAL_ADDRESS)), "{error}");
    // The other device is as it was, for those who do not have the lost one current.
    std::thread::scope(|scope| drop(scope.spawn(|| pair.devices[1].memory().unwrap())));
}
