//! Runs the host builds of the kernels, and watches what they touch.

use std::cell::RefCell;
use std::ffi::c_void;

use crate::core::{self, Machine};

/// A kernel of `kernels/`, compiled for the host.
pub(crate) struct HostKernel {
    pub(crate) name: &'static str,
    run: unsafe extern "C" fn(threads: u32, params: *const c_void),
    params_len: unsafe extern "C" fn() -> u32,
}

/// A kernel of a module, as its compiled form describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) params_len: u64,
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// A kernel that was launched.
pub(crate) struct Launch {
    pub(crate) kernel: &'static HostKernel,
    pub(crate) threads: u32,
    /// Words, for their alignment.
    pub(crate) params: Vec<u64>,
    /// Index of the device.
    pub(crate) device: usize,
}

impl HostKernel {
    pub(crate) fn find(name: &str) -> Option<&'static HostKernel> {
        KERNELS.iter().find(|kernel| kernel.name == name)
    }

    pub(crate) fn params_len(&self) -> u32 {
        // SAFETY: returns a constant.
        unsafe { (self.params_len)() }
    }
}

impl Launch {
    /// Runs every thread of the launch. What it may not touch is a violation, and loses the device as on a real one.
    pub(crate) fn run(self) {
        let ranges = core::with(|machine| machine.reachable(self.device));
        WATCH.set(Watch { ranges, ..Watch::default() });
        // SAFETY: the parameters have the length that the kernel takes, checked when it was queued; it touches memory only
        // through `simgpu_touch`.
        unsafe { (self.kernel.run)(self.threads, self.params.as_ptr().cast()) };
        if let Some((code, what)) = WATCH.take().fault {
            core::with(|machine: &mut Machine| {
                machine.violations.push(format!("kernel {}: {what}", self.kernel.name));
                if let Some(device) = machine.devices.get_mut(self.device) {
                    device.lost = Some(code);
                }
            });
        }
    }
}

/// What the kernel on this thread may touch, and the first time it touched something else.
#[derive(Default)]
struct Watch {
    /// Start and end of allocations and pinned memory, ascending.
    ranges: Vec<(u64, u64)>,
    /// Where the last accesses were: mostly a source and a target in turns.
    last: [(u64, u64); 2],
    fault: Option<(i32, String)>,
}

thread_local! {
    static WATCH: RefCell<Watch> = RefCell::default();
}

/// Tells a kernel whether it may touch memory so.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn simgpu_touch(address: u64, len: u32, is_write: bool) -> bool {
    WATCH.with_borrow_mut(|watch| watch.allows(address, u64::from(len), is_write))
}

impl Watch {
    fn allows(&mut self, address: u64, len: u64, is_write: bool) -> bool {
        let holds = |(start, end): (u64, u64)| start <= address && address < end && len <= end - address;
        let is_aligned = address.is_multiple_of(len);
        if is_aligned && holds(self.last[0]) {
            return true;
        }
        self.last.swap(0, 1);
        if is_aligned && holds(self.last[0]) {
            return true;
        }
        let behind = self.ranges.partition_point(|(start, _)| *start <= address);
        let range = behind.checked_sub(1).map(|before| self.ranges[before]).filter(|range| holds(*range));
        if let Some(range) = range.filter(|_| is_aligned) {
            self.last[0] = range;
            return true;
        }
        let access = if is_write { "writes" } else { "reads" };
        let (code, why) = match range {
            Some(_) => (MISALIGNED_ADDRESS, "misaligned"),
            None => (ILLEGAL_ADDRESS, "in no allocation and no pinned memory"),
        };
        self.fault.get_or_insert_with(|| (code, format!("{access} {len} bytes at {address:#x}, {why}")));
        false
    }
}

const ILLEGAL_ADDRESS: i32 = 700;
pub(crate) const MISALIGNED_ADDRESS: i32 = 716;
