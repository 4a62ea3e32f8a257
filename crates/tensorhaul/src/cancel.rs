//! The caller's wish to stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tensorhaul_stage::Ring;

/// Tells a load to stop: no new read begins, and whoever waits for a staging buffer wakes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cancel {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    cancelled: AtomicBool,
    ring: Mutex<Option<Ring>>,
}

impl Cancel {
    pub(crate) fn new() -> Cancel {
        Cancel::default()
    }

    pub(crate) fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Release);
        if let Some(ring) = &*self.shared.ring.lock().unwrap_or_else(PoisonError::into_inner) {
            ring.close();
        }
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::Acquire)
    }

    /// Forgets the ring: the load is over, or takes another.
    pub(crate) fn lets_go(&self) {
        *self.shared.ring.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Closes this ring too when the load is cancelled.
    pub(crate) fn closes(&self, ring: &Ring) {
        *self.shared.ring.lock().unwrap_or_else(PoisonError::into_inner) = Some(ring.clone());
        if self.is_cancelled() {
            ring.close();
        }
    }
}
