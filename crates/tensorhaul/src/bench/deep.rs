//! Direct reads with many requests in flight, by the `io_uring` engine alone: no plan, no lanes, no device.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tensorhaul_io::uring::Uring;
use tensorhaul_io::{Access, Depth, Done, Engine, Feed, Job, JobMemory, Next, ReadError, Sink};

use super::plain::Plain;
use crate::error::{Error, Result};

/// An `io_uring` that has the files and the memory registered.
pub(super) struct Deep<'p> {
    plain: &'p Plain,
    uring: Uring,
}

impl<'p> Deep<'p> {
    /// Sets it up; the error says why there is none.
    pub(super) fn new(plain: &'p Plain) -> Result<Deep<'p>, String> {
        let uring = Uring::new(Arc::clone(&plain.files), Depth::default(), Some(plain.ring.clone()));
        let uring = uring.map_err(|error| format!("the system has no io_uring: {error}"))?;
        Ok(Deep { plain, uring })
    }

    /// Reads everything.
    pub(super) fn read(&self) -> Result<()> {
        let reading = Reading { plain: self.plain, next: AtomicUsize::new(0), failed: Mutex::default() };
        self.uring.run(&reading, &reading);
        let failed = reading.failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        failed.map_or(Ok(()), Err)
    }
}

/// The pieces as an engine's jobs, in order.
struct Reading<'p> {
    plain: &'p Plain,
    next: AtomicUsize,
    failed: Mutex<Option<Error>>,
}

impl Reading<'_> {
    fn failed(&self) -> MutexGuard<'_, Option<Error>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, error: ReadError) {
        let path = self.plain.files[error.extent.file as usize].path();
        self.failed().get_or_insert(Error::read(error, path, None));
    }
}

impl Feed for Reading<'_> {
    fn next(&self, wait: bool) -> Next {
        let Plain { ring, pieces, .. } = self.plain;
        // The engine asks from one thread, so nobody takes the piece that is seen here.
        let read = self.next.load(Ordering::Relaxed);
        let Some(extent) = pieces.get(read) else { return Next::Done };
        if self.plain.is_cancelled() || self.failed().is_some() {
            return Next::Done;
        }
        let Some(buffer) = (if wait { ring.take() } else { ring.try_take() }) else { return Next::Busy };
        self.next.store(read + 1, Ordering::Relaxed);
        let memory = JobMemory::Staging(buffer);
        Next::Job(Job { read: read as u32, extent: *extent, stride: None, access: Access::Direct, memory })
    }
}

impl Sink for Reading<'_> {
    fn done(&self, done: Done) {
        if let Err(error) = done.result {
            self.fail(error);
        }
    }

    fn lost(&self, _read: u32, error: ReadError) {
        self.fail(error);
    }
}
