//! Where reads wait whose bytes land where an operation's sources still lie.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::cancel::Cancel;

/// Knows which operations of a plan are out of the way.
///
/// A read asks before it takes a staging buffer, so that none is held by one that waits: the operation it waits for may need that
/// buffer for sources of its own. The plan's order makes sure that the oldest operation never waits. Operations of one device do not
/// stand in the way of another's reads.
#[derive(Debug)]
pub(crate) struct Gate {
    /// For each operation, the number of its device.
    device_of: Vec<usize>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    is_past: Vec<bool>,
    /// For each device, the first of its operations that is not past; the number of all operations where all of its are.
    next: Vec<usize>,
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
    /// Takes the number of each operation's device.
    pub(crate) fn new(device_of: &[usize]) -> Gate {
        let count = device_of.iter().max().map_or(0, |device| device + 1);
        let is_past = vec![false; device_of.len()];
        let first = |device| device_of.iter().position(|other| *other == device).unwrap_or(device_of.len());
        let state = State { is_past, next: (0..count).map(first).collect(), is_closed: false };
        Gate { device_of: device_of.to_vec(), state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Notes that an operation is out of the way.
    pub(crate) fn pass(&self, operation: u32) {
        let device = self.device_of[operation as usize];
        let mut state = self.lock();
        state.is_past[operation as usize] = true;
        let is_in_the_way = |number: &usize| self.device_of[*number] == device && !state.is_past[*number];
        let next = (state.next[device]..self.device_of.len()).find(is_in_the_way);
        state.next[device] = next.unwrap_or(self.device_of.len());
        self.changed.notify_all();
    }

    /// Lets everyone go; the load is over.
    pub(crate) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }

    /// Tells whether a read may begin that waits for these operations, as far as they are of the devices that it feeds; with `wait`, when it may or
    /// the load is over.
    ///
    /// A read that feeds several devices may wait for more than it has to: of each, for all that are older than the last of the range.
    pub(crate) fn passage(&self, after: &Range<u32>, fed: &[usize], wait: bool, cancel: &Cancel) -> Passage {
        let mut state = self.lock();
        loop {
            if state.is_closed || cancel.is_cancelled() {
                return Passage::Closed;
            }
            let is_past =
                |device: &usize| state.next.get(*device).is_none_or(|next| after.end as usize <= *next);
            if after.is_empty() || fed.iter().all(is_past) {
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
        let (gate, cancel) = (Gate::new(&[0; 3]), Cancel::new());
        assert_eq!(gate.passage(&(0..0), &[0], true, &cancel), Passage::Free);
        assert_eq!(gate.passage(&(1..2), &[0], false, &cancel), Passage::Blocked);
        gate.pass(1);
        assert_eq!(gate.passage(&(1..2), &[0], false, &cancel), Passage::Blocked, "the first is not past");
        gate.pass(0);
        assert_eq!(gate.passage(&(1..2), &[0], true, &cancel), Passage::Free);
        assert_eq!(gate.passage(&(0..3), &[0], false, &cancel), Passage::Blocked);
    }

    #[test]
    fn a_read_does_not_wait_for_another_device() {
        let (gate, cancel) = (Gate::new(&[0, 1, 0, 1]), Cancel::new());
        gate.pass(1);
        assert_eq!(
            gate.passage(&(1..2), &[1], false, &cancel),
            Passage::Free,
            "the other device's first is not past"
        );
        assert_eq!(gate.passage(&(0..1), &[0], false, &cancel), Passage::Blocked);
        gate.pass(0);
        assert_eq!(gate.passage(&(0..1), &[0], false, &cancel), Passage::Free);
        assert_eq!(
            gate.passage(&(1..4), &[1], false, &cancel),
            Passage::Blocked,
            "its own third is not past"
        );
        gate.pass(3);
        assert_eq!(gate.passage(&(1..4), &[1], false, &cancel), Passage::Free);
        assert_eq!(gate.passage(&(0..3), &[0], false, &cancel), Passage::Blocked);
        gate.pass(2);
        assert_eq!(gate.passage(&(0..4), &[0], false, &cancel), Passage::Free);
    }

    #[test]
    fn a_read_for_two_devices_waits_for_both() {
        let (gate, cancel) = (Gate::new(&[0, 1]), Cancel::new());
        for first in 0..2 {
            let gate = Gate::new(&[0, 1]);
            gate.pass(first);
            assert_eq!(gate.passage(&(0..2), &[0, 1], false, &cancel), Passage::Blocked);
            gate.pass(1 - first);
            assert_eq!(gate.passage(&(0..2), &[0, 1], true, &cancel), Passage::Free);
        }
        assert_eq!(gate.passage(&(0..0), &[0, 1], false, &cancel), Passage::Free);
        gate.close();
        assert_eq!(
            gate.passage(&(0..0), &[0, 1], false, &cancel),
            Passage::Closed,
            "the load is over for all"
        );
    }

    #[test]
    fn who_waits_is_let_go_when_the_load_ends() {
        let (gate, cancel) = (Gate::new(&[0]), Cancel::new());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| gate.passage(&(0..1), &[0], true, &cancel));
            gate.close();
            assert_eq!(waiting.join().unwrap(), Passage::Closed);
        });
        let gate = Gate::new(&[0]);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| gate.passage(&(0..1), &[0], true, &cancel));
            cancel.cancel();
            assert_eq!(waiting.join().unwrap(), Passage::Closed);
        });
    }
}
