//! What all handles of one open device share, and how the device becomes current.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use tensorhaul_plan::DeviceId;

use super::driver::{CallError, CaptureMode, Context, DeviceFacts, Driver, EventHandle, StreamHandle};
use super::kernels::Modules;
use super::peers::Peers;
use super::{FORKED, lock, topology};
use crate::contract::{DeviceError, Near, Stream};

pub(crate) struct Shared<D: Driver> {
    pub(super) driver: Arc<D>,
    pub(super) ordinal: u32,
    pub(super) context: Context,
    pub(super) copy: StreamHandle,
    pub(super) compute: StreamHandle,
    pub(super) facts: DeviceFacts,
    /// What of the host is nearest, which does not change.
    pub(super) near: Near,
    /// Events that nobody waits for any more.
    pub(super) events: Mutex<Vec<EventHandle>>,
    /// Whether the driver has batched copies, as far as is known.
    pub(super) batches: AtomicBool,
    /// Whether small pieces can be moved by a kernel, as far as is known.
    pub(super) scatters: AtomicBool,
    pub(super) modules: Modules,
    pub(super) peers: Peers,
    /// Whether the driver pins memory that it did not allocate, as far as is known.
    pub(super) registers: AtomicBool,
    /// What could not be done as preferred: what, why.
    pub(super) fallbacks: Mutex<Vec<(String, String)>>,
    /// Drivers do not survive a fork.
    pub(super) process: u32,
}

impl<D: Driver> Shared<D> {
    /// Makes a device's context and its two streams.
    pub(super) fn open(driver: Arc<D>, ordinal: u32, facts: DeviceFacts) -> Result<Shared<D>, DeviceError> {
        let device = driver.device_id(ordinal);
        let failed = |error| DeviceError::Driver { device, error };
        let context = driver.open(ordinal).map_err(failed)?;
        // From here on dropping `shared` undoes what was done, whatever fails.
        let (scatters, near) = (AtomicBool::new(facts.reads_pinned), topology::near(&facts));
        let mut shared = Shared {
            driver,
            ordinal,
            context,
            copy: StreamHandle(0),
            compute: StreamHandle(0),
            facts,
            near,
            events: Mutex::default(),
            batches: AtomicBool::new(true),
            scatters,
            modules: Modules::default(),
            peers: Peers::default(),
            registers: AtomicBool::new(true),
            fallbacks: Mutex::default(),
            process: std::process::id(),
        };
        let bound = shared.bind()?;
        let (copy, compute) = (shared.driver.stream_create(), shared.driver.stream_create());
        drop(bound);
        shared.copy = copy.as_ref().copied().unwrap_or(StreamHandle(0));
        shared.compute = compute.as_ref().copied().unwrap_or(StreamHandle(0));
        copy.and(compute).map_err(failed)?;
        Ok(shared)
    }

    pub(super) fn id(&self) -> DeviceId {
        self.driver.device_id(self.ordinal)
    }

    pub(super) fn stream(&self, stream: Stream) -> StreamHandle {
        match stream {
            Stream::Copy => self.copy,
            Stream::Compute => self.compute,
        }
    }

    pub(super) fn failed(&self, error: CallError) -> DeviceError {
        DeviceError::Driver { device: self.id(), error }
    }

    /// Makes the device current on this thread until the guard is dropped, and the thread's capture mode relaxed: a
    /// library that captures a graph in this process would else have its capture ended by our allocations and queries.
    pub(super) fn bind(&self) -> Result<Bound<'_, D>, DeviceError> {
        if std::process::id() != self.process {
            return Err(DeviceError::Unavailable { device: self.id(), why: FORKED.to_owned() });
        }
        let before = self.driver.current().map_err(|error| self.failed(error))?;
        let mut bound = Bound { driver: &*self.driver, before: None, capture_mode: None };
        if before != self.context {
            self.driver.make_current(self.context).map_err(|error| self.failed(error))?;
            bound.before = Some(before);
        }
        // From here on dropping `bound` undoes what was done.
        if let Some(exchanged) = self.driver.exchange_capture_mode(CaptureMode::RELAXED) {
            let mode = exchanged.map_err(|error| self.failed(error))?;
            bound.capture_mode = Some(mode).filter(|mode| *mode != CaptureMode::RELAXED);
        }
        Ok(bound)
    }

    /// Records an event on a stream, taking one that is free.
    pub(super) fn record(&self, stream: StreamHandle) -> Result<EventHandle, CallError> {
        let free = lock(&self.events).pop();
        let event = match free {
            Some(event) => event,
            None => self.driver.event_create()?,
        };
        // SAFETY: both are of this device's context, and alive.
        match unsafe { self.driver.event_record(event, stream) } {
            Ok(()) => Ok(event),
            Err(error) => {
                lock(&self.events).push(event);
                Err(error)
            }
        }
    }

    /// Makes one stream wait for what is queued on another.
    pub(super) fn fence(&self, before: StreamHandle, after: StreamHandle) -> Result<(), CallError> {
        let event = self.record(before)?;
        // SAFETY: both are alive. A wait that is queued refers to this recording, also once the event is recorded anew.
        let result = unsafe { self.driver.stream_wait_event(after, event) };
        lock(&self.events).push(event);
        result
    }

    pub(super) fn note(&self, what: &str, why: String) {
        let mut fallbacks = lock(&self.fallbacks);
        if !fallbacks.iter().any(|(noted, _)| noted == what) {
            fallbacks.push((what.to_owned(), why));
        }
    }
}

impl<D: Driver> Drop for Shared<D> {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            return; // The parent's driver state is not ours to end.
        }
        if let Ok(bound) = self.bind() {
            self.unload();
            for event in lock(&self.events).drain(..) {
                // SAFETY: nobody holds an event that came back. A failure leaves it to the context's end.
                let _ = unsafe { self.driver.event_destroy(event) };
            }
            for stream in [self.copy, self.compute] {
                if stream != StreamHandle(0) {
                    // SAFETY: the last handle of this device goes away, and with it all use of its streams.
                    let _ = unsafe { self.driver.stream_destroy(stream) };
                }
            }
            drop(bound);
        }
        self.leave_peers();
        self.driver.close(self.ordinal, self.context);
    }
}

/// The device is current on this thread, and the thread's capture mode relaxed.
pub(super) struct Bound<'d, D: Driver> {
    driver: &'d D,
    /// What was current, where that was something else.
    before: Option<Context>,
    /// The capture mode, where that was stricter.
    capture_mode: Option<CaptureMode>,
}

impl<D: Driver> Drop for Bound<'_, D> {
    fn drop(&mut self) {
        // When one of these fails, the next caller's own call says so.
        if let Some(mode) = self.capture_mode {
            let _ = self.driver.exchange_capture_mode(mode);
        }
        if let Some(before) = self.before {
            let _ = self.driver.make_current(before);
        }
    }
}
