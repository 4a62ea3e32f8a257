//! A consumer of tensors with a stream of its own, whose work the tests hold back and let go.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use tensorhaul_device::gpu::{Context, Driver, EventHandle, StreamHandle};
use tensorhaul_device::{Allocation, Device, gpu::Gpu};
use tensorhaul_stage::StagingMemory;

use crate::vendor::{self, Vendor};

/// A stream of device 0, and pinned memory to read tensors into.
pub(crate) struct Consumer {
    // Opened for itself, so that it outlives `release_devices`.
    device: Gpu<Vendor>,
    driver: Arc<Vendor>,
    stream: StreamHandle,
    finished: EventHandle,
}

/// Holds a stream back until it is dropped.
pub(crate) struct Gate {
    _open: Sender<()>,
}

/// What a queued read will have brought.
pub(crate) struct Read {
    memory: Box<dyn StagingMemory>,
}

impl Consumer {
    pub(crate) fn new() -> Consumer {
        let device = vendor::open(0).unwrap();
        let driver = vendor::driver().unwrap();
        let (stream, finished) =
            on_device(&driver, || (driver.stream_create().unwrap(), driver.event_create().unwrap()));
        Consumer { device, driver, stream, finished }
    }

    /// The driver's raw handle.
    pub(crate) fn stream(&self) -> u64 {
        self.stream.0 as u64
    }

    /// Holds back whatever is queued from now on.
    pub(crate) fn hold(&self) -> Gate {
        hold(self.stream.0 as *mut c_void)
    }

    /// Queues a copy of a tensor to the host.
    pub(crate) fn read(&self, tensor: &tensorhaul::Tensor) -> Read {
        let len_bytes = tensor.len_bytes() as usize;
        let read = Read { memory: self.device.staging_memory(len_bytes).unwrap() };
        let target = read.memory.as_ptr().as_ptr().cast();
        // SAFETY: the pinned memory is as long, and kept until `finish`; whether the tensor's is, is what the tests are about.
        unsafe { self.driver.copy_out(target, tensor.address(), len_bytes, self.stream) }.unwrap();
        read
    }

    /// Queues a copy of a pinned tensor of the host to the device.
    pub(crate) fn write(&self, tensor: &tensorhaul::Tensor) -> Arc<dyn Allocation> {
        let bytes = tensor.bytes().unwrap();
        let target = self.device.allocate(bytes.len() as u64).unwrap();
        let source = bytes.as_ptr().cast();
        // SAFETY: the target is as long, and kept by the caller; whether the tensor's is, is what the test is about.
        unsafe { self.driver.copy_in(target.address(), source, bytes.len(), self.stream) }.unwrap();
        target
    }

    /// Waits for everything queued, and returns what was written.
    pub(crate) fn finish_write(&self, written: Arc<dyn Allocation>) -> Vec<u8> {
        let len_bytes = written.len_bytes() as usize;
        let read = Read { memory: self.device.staging_memory(len_bytes).unwrap() };
        let target = read.memory.as_ptr().as_ptr().cast();
        // SAFETY: both are as long, and kept until `finish` returned.
        unsafe { self.driver.copy_out(target, written.address(), len_bytes, self.stream) }.unwrap();
        self.finish(read)
    }

    /// Waits for everything queued, and returns what was read.
    pub(crate) fn finish(&self, read: Read) -> Vec<u8> {
        on_device(&self.driver, || {
            // SAFETY: both are this consumer's, and alive.
            unsafe { self.driver.event_record(self.finished, self.stream) }.unwrap();
            // SAFETY: as above.
            unsafe { self.driver.event_wait(self.finished) }.unwrap();
        });
        // SAFETY: initialized, and written by nobody any more.
        unsafe { std::slice::from_raw_parts(read.memory.as_ptr().as_ptr(), read.memory.len_bytes()) }.to_vec()
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        on_device(&self.driver, || {
            // SAFETY: nobody else has it.
            let _ = unsafe { self.driver.event_destroy(self.finished) };
            // SAFETY: the tests drop their tensors before the stream.
            let _ = unsafe { self.driver.stream_destroy(self.stream) };
        });
    }
}

/// Holds a stream back with a function of the host that ends when the gate is dropped.
pub(crate) fn hold(stream: *mut c_void) -> Gate {
    extern "C" fn wait(opened: *mut c_void) {
        // SAFETY: leaked below, for this call.
        let opened = unsafe { Box::from_raw(opened.cast::<Receiver<()>>()) };
        let _ = opened.recv(); // An error: the gate was dropped, as it should be.
    }
    let (open, opened) = mpsc::channel();
    let opened = Box::into_raw(Box::new(opened)).cast();
    assert_eq!(crate::suite::sim::launch_host_function(stream, wait, opened), 0);
    Gate { _open: open }
}

/// Makes device 0 current meanwhile.
fn on_device<T>(driver: &Vendor, act: impl FnOnce() -> T) -> T {
    let before = driver.current().unwrap();
    driver.make_current(Context(1)).unwrap();
    let result = act();
    driver.make_current(before).unwrap();
    result
}
