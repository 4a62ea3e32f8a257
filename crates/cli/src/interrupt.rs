//! Ctrl-C and its kind: at once, or after the files that are being written are removed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use crate::failure::{Failure, Outcome};

/// Makes signals end the process at once, with 128 and the signal's number as its exit code.
pub(crate) fn exit_at_once() -> Outcome {
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // In this order: a signal that finds the flag set ends the process, any other sets it.
        let ends = flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(interrupted()));
        let sets = flag::register(signal, Arc::clone(interrupted()));
        ends.and(sets).map_err(|error| Failure::of_machine(format!("setting up signals failed: {error}")))?;
    }
    Ok(())
}

/// From here on, a first signal sets the flag, and only a second ends the process at once.
pub(crate) fn set_a_flag_instead() -> Arc<AtomicBool> {
    interrupted().store(false, Ordering::Relaxed);
    Arc::clone(interrupted())
}

/// Set from the start: a signal ends the process.
fn interrupted() -> &'static Arc<AtomicBool> {
    static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    INTERRUPTED.get_or_init(|| Arc::new(AtomicBool::new(true)))
}
