//! Ranks that are threads of one process, in host memory: what others are compared with.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{Exchange, ExchangeError, Message};

/// A thread's end. Messages are copied at once, by the thread that receives them; streams mean nothing.
pub struct InProcess {
    rank: u32,
    timeout: Duration,
    node: Arc<Node>,
}

struct Node {
    size: u32,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Sent and not yet taken, by sender and receiver: addresses and lengths.
    posted: HashMap<(u32, u32), VecDeque<(u64, u64)>>,
    /// By sender: what is posted, or being copied.
    unfinished: HashMap<u32, u64>,
    /// By sender: what is being copied.
    copying: HashMap<u32, u64>,
    /// What the ranks of an agreement brought, and what came of the last.
    fingerprints: HashMap<u32, u64>,
    agreements: u64,
    disagrees: Option<u32>,
    /// The rank that ended the exchange.
    aborted: Option<u32>,
}

impl InProcess {
    /// Makes the ends of a node's ranks, in their order; each goes to a thread.
    pub fn ranks(size: u32, timeout: Duration) -> Vec<InProcess> {
        let node = Arc::new(Node { size, state: Mutex::default(), changed: Condvar::new() });
        (0..size).map(|rank| InProcess { rank, timeout, node: Arc::clone(&node) }).collect()
    }

    /// Waits until `take` gives something, the exchange is aborted, or time is up.
    fn wait<T>(
        &self,
        doing: &'static str,
        mut take: impl FnMut(&mut State) -> Option<T>,
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
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
            else {
                return Err(ExchangeError::TimedOut { doing, after: self.timeout });
            };
            state = self.node.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Receives one message.
    fn receive(&self, receive: &Message) -> Result<(), ExchangeError> {
        let (key, sender) = ((receive.peer, self.rank), receive.peer);
        let (address, len_bytes) = self.wait("receiving", |state| {
            let message = state.posted.get_mut(&key)?.pop_front()?;
            *state.copying.entry(sender).or_default() += 1;
            Some(message)
        })?;
        assert_eq!(len_bytes, receive.len_bytes, "both sides of a message agree");
        let source = std::ptr::with_exposed_provenance::<u8>(address as usize);
        let target = std::ptr::with_exposed_provenance_mut::<u8>(receive.address as usize);
        // SAFETY: both callers promise memory that is theirs until their exchange is over; the sender's is not before `copying` is
        // back. They are different ranks' memory.
        unsafe { std::ptr::copy_nonoverlapping(source, target, len_bytes as usize) };
        let mut state = self.lock();
        *state.copying.entry(sender).or_default() -= 1;
        *state.unfinished.entry(sender).or_default() -= 1;
        self.node.changed.notify_all();
        Ok(())
    }

    /// Takes back what nobody has begun to copy, and waits for what somebody has.
    fn take_back(&self) {
        let mut state = self.lock();
        let State { posted, unfinished, .. } = &mut *state;
        for ((sender, _), messages) in posted.iter_mut().filter(|((sender, _), _)| *sender == self.rank) {
            *unfinished.entry(*sender).or_default() -= messages.len() as u64;
            messages.clear();
        }
        while state.copying.get(&self.rank).is_some_and(|copying| *copying > 0) {
            state = self.node.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
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
        let disagrees =
            self.wait("agreeing", |state| (state.agreements > mine).then_some(state.disagrees))?;
        disagrees.map_or(Ok(()), |peer| Err(ExchangeError::Disagree { peer }))
    }

    unsafe fn exchange(
        &self,
        sends: &[Message],
        receives: &[Message],
        _stream: u64,
    ) -> Result<(), ExchangeError> {
        {
            let mut state = self.lock();
            for send in sends {
                let message = (send.address, send.len_bytes);
                state.posted.entry((self.rank, send.peer)).or_default().push_back(message);
                *state.unfinished.entry(self.rank).or_default() += 1;
            }
            self.node.changed.notify_all();
        }
        let received = receives.iter().try_for_each(|receive| self.receive(receive));
        let is_sent = |state: &mut State| {
            (state.unfinished.get(&self.rank).is_none_or(|left| *left == 0)).then_some(())
        };
        let sent = received.and_then(|()| self.wait("sending", is_sent));
        if sent.is_err() {
            self.take_back();
        }
        sent
    }

    fn check(&self) -> Result<(), ExchangeError> {
        let aborted = self.lock().aborted;
        aborted.map_or(Ok(()), |peer| Err(ExchangeError::PeerLost { peer: Some(peer) }))
    }

    fn abort(&self) {
        self.lock().aborted.get_or_insert(self.rank);
        self.node.changed.notify_all();
    }
}
