//! Ranks that are threads of one process, each with a device of its own.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tensorhaul_device::{Allocation, Device, DeviceError, Event, Location, Stream};

use crate::by_host::Stop;
use crate::{Exchange, ExchangeError, Message};

/// A thread's end. Messages are copied from device to device, on the stream of the one that receives; where that does not reach the other's
/// memory, by way of the host.
pub struct InProcess {
    rank: u32,
    timeout: Duration,
    node: Arc<Node>,
    /// What is being copied from others' memory, which lives until that is over.
    borrowed: Mutex<Vec<Borrowed>>,
    /// By sender, for those whose memory is not reached.
    stops: Mutex<HashMap<u32, Stop>>,
}

struct Node {
    size: u32,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Sent and not yet taken, by sender and receiver.
    posted: HashMap<(u32, u32), VecDeque<Posted>>,
    /// By sender and receiver: messages that nobody has queued the copy of.
    open: HashMap<(u32, u32), u64>,
    /// By sender: behind these nobody reads any more what it sent.
    read: HashMap<u32, Vec<Arc<Event>>>,
    /// What the ranks of an agreement brought, and what came of the last.
    fingerprints: HashMap<u32, u64>,
    agreements: u64,
    disagrees: Option<u32>,
    /// The rank that ended the exchange.
    aborted: Option<u32>,
    /// The ranks whose ends are dropped; nothing more comes of them.
    left: BTreeSet<u32>,
}

/// A message that waits for its receiver.
struct Posted {
    device: Arc<dyn Device>,
    allocation: Arc<dyn Allocation>,
    offset_bytes: u64,
    len_bytes: u64,
    /// The bytes are there when this is complete.
    ready: Arc<Event>,
}

/// Memory of others that is read until an event is complete.
struct Borrowed {
    device: Arc<dyn Device>,
    until: Arc<Event>,
    memory: Vec<Arc<dyn Allocation>>,
}

impl InProcess {
    /// Makes the ends of a node's ranks, in their order; each goes to a thread.
    pub fn ranks(size: u32, timeout: Duration) -> Vec<InProcess> {
        let node = Arc::new(Node { size, state: Mutex::default(), changed: Condvar::new() });
        let end = |rank| InProcess {
            rank,
            timeout,
            node: Arc::clone(&node),
            borrowed: Mutex::default(),
            stops: Mutex::default(),
        };
        (0..size).map(end).collect()
    }

    /// Waits until `take` gives something, the exchange is aborted, one that is waited for has left, or time is up. `missing` tells who is
    /// waited for.
    fn wait<T>(
        &self,
        doing: &'static str,
        mut take: impl FnMut(&mut State) -> Option<T>,
        missing: impl Fn(&State) -> Vec<u32>,
    ) -> Result<T, ExchangeError> {
        let until = Instant::now() + self.timeout;
        let mut state = self.lock();
        loop {
            if let Some(taken) = take(&mut state) {
                return Ok(taken);
            }
            if let Some(peer) = state.aborted {
                return Err(ExchangeError::PeerLost { peer: Some(peer) });
            }
            let gone = |rank: &u32| state.left.contains(rank);
            if !state.left.is_empty()
                && let Some(peer) = missing(&state).into_iter().find(gone)
            {
                return Err(ExchangeError::PeerLost { peer: Some(peer) });
            }
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
            else {
                let missing = missing(&state);
                return Err(ExchangeError::TimedOut { doing, after: self.timeout, missing });
            };
            state = self.node.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets peers take what is sent, behind what is queued on the stream.
    fn post(
        &self,
        device: &Arc<dyn Device>,
        stream: Stream,
        sends: &[Message<'_>],
    ) -> Result<(), ExchangeError> {
        if sends.is_empty() {
            return Ok(());
        }
        let ready = Arc::new(device.record(stream)?);
        let mut state = self.lock();
        for Message { peer, start, len_bytes } in sends {
            let posted = Posted {
                device: Arc::clone(device),
                allocation: Arc::clone(start.allocation),
                offset_bytes: start.offset_bytes,
                len_bytes: *len_bytes,
                ready: Arc::clone(&ready),
            };
            state.posted.entry((self.rank, *peer)).or_default().push_back(posted);
            *state.open.entry((self.rank, *peer)).or_default() += 1;
        }
        self.node.changed.notify_all();
        Ok(())
    }

    /// Queues the copy of one message, which is among the received before anything reads it.
    fn receive(
        &self,
        device: &Arc<dyn Device>,
        stream: Stream,
        receive: &Message<'_>,
        received: &mut Vec<(u32, Posted)>,
    ) -> Result<(), ExchangeError> {
        let key = (receive.peer, self.rank);
        let take = |state: &mut State| state.posted.get_mut(&key)?.pop_front();
        let posted = self.wait("receiving", take, |_| vec![receive.peer])?;
        assert_eq!(posted.len_bytes, receive.len_bytes, "both sides of a message agree");
        received.push((receive.peer, posted));
        let (_, posted) = received.last().expect("one was just pushed");
        let source = Location { allocation: &posted.allocation, offset_bytes: posted.offset_bytes };
        let peer = posted.device.id();
        if device.can_reach(peer) {
            device.order(stream, &posted.ready)?;
            // SAFETY: the sender keeps its bytes as they are until the event that `hand_back` records behind this, and the allocation
            // is kept until then; the target is the caller's promise. Different ranks' memory does not overlap.
            unsafe { device.copy_from_peer(peer, source, receive.start, receive.len_bytes, stream)? };
            return Ok(());
        }
        let mut stops = self.stops.lock().unwrap_or_else(PoisonError::into_inner);
        let stop = match stops.entry(receive.peer) {
            std::collections::hash_map::Entry::Occupied(stop) => stop.into_mut(),
            std::collections::hash_map::Entry::Vacant(free) => {
                free.insert(Stop::new(&posted.device, device)?)
            }
        };
        // SAFETY: as above; it is over when this returns. The sender's stream is behind what fills its bytes.
        unsafe { stop.carry(source, receive.start, receive.len_bytes, stream)? };
        Ok(())
    }

    /// Keeps what was received from until the copies are over, whether or not the senders do; returns behind what that is.
    fn keep(
        &self,
        device: &Arc<dyn Device>,
        stream: Stream,
        received: &[(u32, Posted)],
    ) -> Result<Arc<Event>, DeviceError> {
        let memory: Vec<_> = received.iter().map(|(_, posted)| Arc::clone(&posted.allocation)).collect();
        match device.record(stream).map(Arc::new) {
            Ok(until) => {
                let (device, until_here) = (Arc::clone(device), Arc::clone(&until));
                let mut borrowed = self.borrowed.lock().unwrap_or_else(PoisonError::into_inner);
                borrowed.retain(|borrowed| !matches!(borrowed.device.is_complete(&borrowed.until), Ok(true)));
                borrowed.push(Borrowed { device, until: until_here, memory });
                Ok(until)
            }
            Err(error) => {
                std::mem::forget(memory); // Nobody can tell when the copies are over.
                Err(error)
            }
        }
    }

    /// Tells senders behind what their messages are read.
    fn hand_back(
        &self,
        device: &Arc<dyn Device>,
        until: &Arc<Event>,
        received: &[(u32, Posted)],
    ) -> Result<(), ExchangeError> {
        if received.iter().any(|(_, posted)| !posted.device.can_reach(device.id())) {
            device.wait(until)?; // A sender that does not reach this device could not wait for it.
        }
        let mut state = self.lock();
        for (sender, posted) in received {
            *state.open.entry((*sender, self.rank)).or_default() -= 1;
            if posted.device.can_reach(device.id()) {
                state.read.entry(*sender).or_default().push(Arc::clone(until));
            }
        }
        self.node.changed.notify_all();
        Ok(())
    }

    /// Takes back what this rank sent and nobody has taken.
    fn leave(&self, note: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        note(&mut state);
        state.posted.retain(|(sender, _), _| *sender != self.rank);
        self.node.changed.notify_all();
    }

    /// A panic elsewhere cannot leave the state half changed: every change is one or two plain writes.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.node.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Exchange for InProcess {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn size(&self) -> u32 {
        self.node.size
    }

    fn name(&self) -> String {
        "in process".to_owned()
    }

    fn fallbacks(&self) -> Vec<(String, String)> {
        let stops = self.stops.lock().unwrap_or_else(PoisonError::into_inner);
        let told = |(peer, stop): (&u32, &Stop)| {
            (format!("what rank {peer} sends is copied through the host"), stop.why())
        };
        stops.iter().map(told).collect()
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn agree(&self, fingerprint: u64) -> Result<(), ExchangeError> {
        let mine = {
            let mut state = self.lock();
            state.fingerprints.insert(self.rank, fingerprint);
            let mine = state.agreements;
            if state.fingerprints.len() as u32 == self.node.size {
                let brought = std::mem::take(&mut state.fingerprints);
                let differs = |rank: &u32| brought[rank] != brought[&0];
                state.disagrees = (1..self.node.size).find(differs);
                state.agreements += 1;
                self.node.changed.notify_all();
            }
            mine
        };
        let outcome = |state: &mut State| (state.agreements > mine).then_some(state.disagrees);
        let missing = |state: &State| {
            (0..self.node.size).filter(|rank| !state.fingerprints.contains_key(rank)).collect()
        };
        let disagrees = self.wait("agreeing", outcome, missing)?;
        disagrees.map_or(Ok(()), |peer| Err(ExchangeError::Disagree { peer }))
    }

    unsafe fn exchange(
        &self,
        device: &Arc<dyn Device>,
        stream: Stream,
        sends: &[Message<'_>],
        receives: &[Message<'_>],
    ) -> Result<(), ExchangeError> {
        self.post(device, stream, sends)?;
        // All have posted before any waits, so nobody waits in a circle.
        let mut received = Vec::new();
        let queued =
            receives.iter().try_for_each(|message| self.receive(device, stream, message, &mut received));
        if !received.is_empty() {
            // Also after a failure: the copies before it are queued.
            let kept = self.keep(device, stream, &received);
            queued?;
            self.hand_back(device, &kept?, &received)?;
        } else {
            queued?;
        }
        if sends.is_empty() {
            return Ok(());
        }
        let waits_for = |state: &State| -> Vec<u32> {
            let open = state.open.iter().filter(|((sender, _), open)| *sender == self.rank && **open > 0);
            open.map(|((_, receiver), _)| *receiver).collect()
        };
        let is_sent = |state: &mut State| waits_for(state).is_empty().then_some(());
        self.wait("sending", is_sent, waits_for)?;
        let read = self.lock().read.remove(&self.rank).unwrap_or_default();
        read.iter().try_for_each(|event| device.order(stream, event))?;
        Ok(())
    }

    fn check(&self) -> Result<(), ExchangeError> {
        let aborted = self.lock().aborted;
        aborted.map_or(Ok(()), |peer| Err(ExchangeError::PeerLost { peer: Some(peer) }))
    }

    fn abort(&self) {
        self.leave(|state| {
            state.aborted.get_or_insert(self.rank);
        });
    }
}

impl Drop for InProcess {
    /// Tells who still waits for this rank, and waits for what reads others' memory; where that cannot be waited for, the memory is
    /// nobody's any more.
    fn drop(&mut self) {
        self.leave(|state| {
            state.left.insert(self.rank);
            if thread::panicking() {
                state.aborted.get_or_insert(self.rank);
            }
        });
        let borrowed = self.borrowed.get_mut().unwrap_or_else(PoisonError::into_inner);
        for Borrowed { device, until, memory } in borrowed.drain(..) {
            if device.wait(&until).is_err() {
                std::mem::forget(memory);
            }
        }
    }
}

impl From<DeviceError> for ExchangeError {
    fn from(error: DeviceError) -> ExchangeError {
        ExchangeError::Device(error)
    }
}
