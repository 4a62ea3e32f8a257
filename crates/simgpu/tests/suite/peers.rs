//! Several devices: the simulator's own answers about whose memory copies and kernels may touch, for which the exported
//! functions are called, and what the backend makes of them.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;

use tensorhaul_device::gpu::{Context, Driver, Gpu, LaunchShape, StreamHandle};
use tensorhaul_device::{Allocation, Device, Location, Stream};

use crate::suite::sim::{Sim, failure, function};
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
fn a_pair_is_refused_one_way_and_let_through_the_other() {
    let _sim = Sim::new("devices=3;no_peer=0:1;no_peer=2:0");
    let _pair = Pair::new();
    assert_eq!([peer::can_access(0, 1), peer::can_access(1, 0)], [(0, 0), (0, 1)]);
    assert_eq!([peer::can_access(2, 0), peer::can_access(0, 2)], [(0, 0), (0, 1)]);
    assert_eq!([peer::enable(1), peer::enable(2)], [217, 0]);
}

#[test]
fn what_a_pool_gave_is_reached_where_the_pool_says_so() {
    let sim = Sim::new("devices=2;delay_us=50");
    let pair = Pair::new();
    pair.fill(1, 2);
    assert_eq!(peer::enable(1), 0);
    assert_eq!(pair.copy(), 1, "the pool says nothing yet");
    assert_eq!(sim.report().violations.len(), 1);
    // Access that somebody else has enabled already is no error.
    assert!(pair.devices[0].can_reach(vendor::id(1)), "{:?}", pair.devices[0].fallbacks());
    assert_eq!(pair.copy(), 0);
    assert!(pair.holds(0, 2));
    pair.launch();
    assert_eq!(sim.report().violations.len(), 1);
}

#[test]
fn a_device_is_let_to_a_peer_once_and_lets_go_of_it_when_it_is_closed() {
    let sim = Sim::new("devices=2");
    let devices = [0, 1].map(|ordinal| vendor::open(ordinal).unwrap());
    for _ in 0..3 {
        assert!(devices[0].can_reach(vendor::id(1)) && devices[0].can_reach(vendor::id(0)));
    }
    for call in [call::ENABLE_PEER, call::OPEN_POOL] {
        assert_eq!(sim.report().calls(call), 1, "{call}");
    }
    assert!(!devices[0].can_reach(tensorhaul::DeviceId::Host));
    let of_the_other_vendor = match vendor::id(0) {
        tensorhaul::DeviceId::Cuda(_) => tensorhaul::DeviceId::Rocm(0),
        _ => tensorhaul::DeviceId::Cuda(0),
    };
    assert!(!devices[0].can_reach(of_the_other_vendor));
    assert!(!devices[0].can_reach(vendor::id(7)), "there are two");
    drop(devices);
    sim.assert_clean("after both devices");
}

#[test]
fn a_pair_that_is_refused_is_told_with_the_reason_and_copies_are_a_typed_error() {
    let refusals = [
        ("no_peer=0:1".to_owned(), "the driver lets no copies through between the two".to_owned()),
        (
            format!("fail={}:1:1", call::CAN_ACCESS_PEER),
            failure(call::CAN_ACCESS_PEER, 1, vendor::INVALID_VALUE),
        ),
        (format!("fail={}:1:1", call::ENABLE_PEER), failure(call::ENABLE_PEER, 1, vendor::INVALID_VALUE)),
        (format!("fail={}:1:1", call::POOL_OF), failure(call::POOL_OF, 1, vendor::INVALID_VALUE)),
        (format!("fail={}:1:1", call::OPEN_POOL), failure(call::OPEN_POOL, 1, vendor::INVALID_VALUE)),
    ];
    for (config, why) in refusals {
        let sim = Sim::new(&format!("devices=2;{config}"));
        let devices = [0, 1].map(|ordinal| vendor::open(ordinal).unwrap());
        let memory = [0, 1].map(|at: usize| devices[at].allocate(64).unwrap());
        assert!(!devices[0].can_reach(vendor::id(1)), "{config}");
        let what = format!("{} does not reach the memory of {}", vendor::FIRST, vendor::SECOND);
        assert_eq!(devices[0].fallbacks(), [(what, why.clone())], "{config}");
        let [target, source] = [0, 1].map(|at| Location { allocation: &memory[at], offset_bytes: 0 });
        // SAFETY: refused, so that nothing is queued.
        let copied = unsafe { devices[0].copy_from_peer(vendor::id(1), source, target, 64, Stream::Copy) };
        let (first, second) = (vendor::FIRST, vendor::SECOND);
        assert_eq!(
            copied.unwrap_err().to_string(),
            format!("{first} does not reach the memory of {second}: {why}; copy through the host")
        );
        assert!(devices[1].can_reach(vendor::id(0)), "the other way: {:?}", devices[1].fallbacks());
        drop((memory, devices));
        sim.assert_clean(&config);
    }
}

#[test]
fn a_failed_copy_between_devices_is_a_typed_error_and_the_next_one_works() {
    let sim = Sim::new("devices=2;delay_us=50");
    let pair = Pair::new();
    pair.fill(0, 1);
    pair.fill(1, 2);
    let copy = || {
        let [target, source] = [0, 1].map(|at| Location { allocation: &pair.memory[at], offset_bytes: 0 });
        let len_bytes = LEN_BYTES as u64;
        // SAFETY: both live until the event below was waited for, and nobody touches them meanwhile.
        let queued =
            unsafe { pair.devices[0].copy_from_peer(vendor::id(1), source, target, len_bytes, Stream::Copy) };
        pair.devices[0].wait(&pair.devices[0].record(Stream::Copy).unwrap()).unwrap();
        queued.map_err(|error| error.to_string())
    };
    sim.fail(&format!("fail={}:1:1", call::COPY_PEER));
    let told = format!("{}: {}", vendor::FIRST, failure(call::COPY_PEER, 1, vendor::INVALID_VALUE));
    assert_eq!(copy(), Err(told));
    assert!(pair.holds(0, 1), "nothing was copied");
    assert_eq!(copy(), Ok(()));
    assert!(pair.holds(0, 2));
    assert!(sim.report().violations.is_empty(), "{:?}", sim.report().violations);
}

#[test]
fn a_copy_touches_another_devices_memory_only_while_that_is_enabled() {
    let sim = Sim::new("devices=2;pools=0;delay_us=50");
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
    let sim = Sim::new("devices=2;pools=0");
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
