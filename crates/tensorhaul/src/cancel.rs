//! The caller's wish to stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tensorhaul_stage::Ring;

/// Tells a load to stop: no new read begins, and whoever waits for a staging buffer wakes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cancel {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    cancelled: AtomicBool,
    rings: Mutex<Vec<Ring>>,
}

impl Cancel {
    pub(crate) fn new() -> Cancel {
        Cancel::default()
    }

    pub(crate) fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Release);
        self.rings().iter().for_each(Ring::close);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::Acquire)
    }

    /// Forgets the rings: the load is over, or takes others.
    pub(crate) fn lets_go(&self) {
        self.rings().clear();
    }

    /// Closes this ring too when the load is cancelled.
    pub(crate) fn closes(&self, ring: &Ring) {
        self.rings().push(ring.clone());
        if self.is_cancelled() {
            ring.close();
        }
    }

    fn rings(&self) -> MutexGuard<'_, Vec<Ring>> {
        self.shared.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
