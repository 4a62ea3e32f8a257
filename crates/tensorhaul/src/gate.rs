//! Where reads wait whose bytes land where an operation's sources still lie.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::cancel::Cancel;

/// Knows which operations of a plan are out of the way.
///
/// A read asks before it takes a staging buffer, so that none is held by one that waits: the operation it waits for may need that
/// buffer for sources of its own. The plan's order makes sure that the oldest operation never waits.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    is_past: Vec<bool>,
    /// The number of operations at the front that are all past.
    prefix: u32,
    is_closed: bool,
}

/// What a gate answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passage {
    /// Everything to be waited for is past.
    Free,
    /// Not yet.
    Blocked,
    /// The load is over.
    Closed,
}

impl Gate {
    pub(crate) fn new(operation_count: usize) -> Gate {
        let state = State { is_past: vec![false; operation_count], prefix: 0, is_closed: false };
        Gate { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Notes that an operation is out of the way.
    pub(crate) fn pass(&self, operation: u32) {
        let mut state = self.lock();
        state.is_past[operation as usize] = true;
        let further = state.is_past[state.prefix as usize..].iter().take_while(|past| **past).count();
        state.prefix += further as u32;
        self.changed.notify_all();
    }

    /// Lets everyone go; the load is over.
    pub(crate) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }

    /// Tells whether a read may begin that waits for these operations; with `wait`, when it may or the load is over.
    pub(crate) fn passage(&self, after: &Range<u32>, wait: bool, cancel: &Cancel) -> Passage {
        if after.is_empty() {
            return Passage::Free;
        }
        let mut state = self.lock();
        loop {
            if state.is_closed || cancel.is_cancelled() {
                return Passage::Closed;
            }
            if after.end <= state.prefix {
                return Passage::Free;
            }
            if !wait {
                return Passage::Blocked;
            }
            // A cancellation has no way to wake this: it is asked for now and then.
            let waited = self.changed.wait_timeout(state, CANCEL_POLL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const CANCEL_POLL: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_passes_when_every_older_operation_is_past() {
        let (gate, cancel) = (Gate::new(3), Cancel::new());
        assert_eq!(gate.passage(&(0..0), true, &cancel), Passage::Free);
        assert_eq!(gate.passage(&(1..2), false, &cancel), Passage::Blocked);
        gate.pass(1);
        assert_eq!(gate.passage(&(1..2), false, &cancel), Passage::Blocked, "the first is not past");
        gate.pass(0);
        assert_eq!(gate.passage(&(1..2), true, &cancel), Passage::Free);
        assert_eq!(gate.passage(&(0..3), false, &cancel), Passage::Blocked);
    }

    #[test]
    fn who_waits_is_let_go_when_the_load_ends() {
        let (gate, cancel) = (Gate::new(1), Cancel::new());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| gate.passage(&(0..1), true, &cancel));
            gate.close();
            assert_eq!(waiting.join().unwrap(), Passage::Closed);
        });
        let gate = Gate::new(1);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| gate.passage(&(0..1), true, &cancel));
            cancel.cancel();
            assert_eq!(waiting.join().unwrap(), Passage::Closed);
        });
    }
}
