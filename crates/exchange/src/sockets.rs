//! Ranks that are processes, connected by the host's sockets.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tensorhaul_device::{Allocation, Device, Stream};

use crate::by_host::{Pinned, settle};
use crate::control::Control;
use crate::{Exchange, ExchangeError, Message};

/// A process's connections to the others of its node, every two by a socket. Messages go through host memory of both, so it needs no link
/// between devices and no library: for the host's own memory, and where NCCL is missing.
pub struct Sockets {
    control: Control,
    /// By rank; its own is missing.
    peers: Vec<Option<UnixStream>>,
    /// What messages stop in, as long as the longest round so far needed.
    memory: Mutex<Option<Pinned>>,
    is_aborted: AtomicBool,
}

impl Sockets {
    /// Connects the ranks that have met. Waits for all of them.
    ///
    /// # Errors
    /// [`ExchangeError::PeerLost`], [`ExchangeError::TimedOut`], and [`ExchangeError::Socket`] when the system refuses a connection.
    pub fn connect(control: Control) -> Result<Sockets, ExchangeError> {
        let peers = control.connect_all().inspect_err(|_| control.abort())?;
        Ok(Sockets { control, peers, memory: Mutex::default(), is_aborted: AtomicBool::new(false) })
    }

    /// Carries what is sent to host memory, moves all messages, and carries what was received to the device.
    ///
    /// # Safety
    /// As for [`Exchange::exchange`]. On error copies may be under way from and to the host memory.
    unsafe fn carry(
        &self,
        device: &dyn Device,
        stream: Stream,
        (sends, receives): (&[Message<'_>], &[Message<'_>]),
        pinned: &mut Pinned,
    ) -> Result<(), ExchangeError> {
        let ranges = Ranges::of(sends);
        let mut rest = pinned.bytes();
        for (allocation, offset_bytes, len) in &ranges.distinct {
            let bytes = rest.split_off_mut(..*len).expect("there is room for all that is sent");
            // SAFETY: the source is the caller's promise; the host's bytes are this exchange's alone until `settle` has waited.
            unsafe { device.copy_back(allocation, *offset_bytes, bytes, stream)? };
        }
        settle(device, pinned, stream)?;

        let mut ways = Ways::default();
        let (sent, mut rest) = pinned.bytes().split_at_mut(ranges.len);
        for (send, begin) in sends.iter().zip(&ranges.begins) {
            let bytes = &sent[*begin..][..send.len_bytes as usize];
            ways.0.entry((send.peer, Way::Out)).or_default().push_back(Part::Out(bytes));
        }
        for receive in receives {
            let bytes = rest
                .split_off_mut(..receive.len_bytes as usize)
                .expect("there is room for all that is received");
            ways.0.entry((receive.peer, Way::In)).or_default().push_back(Part::In(bytes));
        }
        self.transfer(ways)?;

        let mut received = &pinned.bytes()[ranges.len..];
        for receive in receives {
            let bytes = received
                .split_off(..receive.len_bytes as usize)
                .expect("there is room for all that is received");
            let (allocation, offset_bytes) = (receive.start.allocation, receive.start.offset_bytes);
            // SAFETY: the target is the caller's promise; the host's bytes stay as they are until `settle` has waited.
            unsafe { device.copy(bytes, allocation, offset_bytes, stream)? };
        }
        Ok(settle(device, pinned, stream)?)
    }

    /// Sends and receives until all is through.
    fn transfer(&self, mut ways: Ways<'_>) -> Result<(), ExchangeError> {
        let mut moved_at = Instant::now();
        loop {
            for ((peer, _), parts) in &mut ways.0 {
                match Way::go_on(self.peer(*peer), parts) {
                    Ok(0) => {}
                    Ok(_) => moved_at = Instant::now(),
                    Err(_) => return Err(self.lost(*peer)),
                }
            }
            ways.0.retain(|_, parts| !parts.is_empty());
            if ways.0.is_empty() {
                return Ok(());
            }
            if moved_at.elapsed() > self.timeout() {
                let mut missing: Vec<_> = ways.0.keys().map(|(peer, _)| *peer).collect();
                missing.dedup();
                return Err(ExchangeError::TimedOut { doing: "exchanging", after: self.timeout(), missing });
            }
            let polled =
                |(peer, way): &(u32, Way)| PollFd::from_borrowed_fd(self.peer(*peer).as_fd(), way.flags());
            let mut polled: Vec<_> = ways.0.keys().map(polled).collect();
            // What comes of it is seen at the next attempt.
            if matches!(poll(&mut polled, Some(&PEER_POLL)), Ok(0)) {
                self.check()?;
            }
        }
    }

    fn peer(&self, peer: u32) -> &UnixStream {
        self.peers[peer as usize].as_ref().expect("no rank sends to itself")
    }

    /// Says why a connection has ended. Who failed first is told by way of rank 0, which may need a moment to notice.
    fn lost(&self, peer: u32) -> ExchangeError {
        let until = Instant::now() + WORD_GRACE;
        while Instant::now() < until {
            if let Err(lost) = self.control.check() {
                return lost;
            }
            thread::sleep(WORD_POLL);
        }
        self.control.gone(peer)
    }
}

impl Exchange for Sockets {
    fn rank(&self) -> u32 {
        self.control.rank()
    }

    fn size(&self) -> u32 {
        self.control.size()
    }

    fn name(&self) -> String {
        "sockets".to_owned()
    }

    fn fallbacks(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    fn timeout(&self) -> Duration {
        self.control.timeout()
    }

    fn agree(&self, fingerprint: u64) -> Result<(), ExchangeError> {
        self.control.agree(fingerprint)
    }

    unsafe fn exchange(
        &self,
        device: &Arc<dyn Device>,
        stream: Stream,
        sends: &[Message<'_>],
        receives: &[Message<'_>],
    ) -> Result<(), ExchangeError> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let needed = sends.iter().chain(receives).map(|message| message.len_bytes as usize).sum();
        let mut pinned = match memory.take().filter(|memory| memory.len_bytes() >= needed) {
            Some(pinned) => pinned,
            None => Pinned::new(&**device, needed)?,
        };
        // SAFETY: the caller's promise; on error what is under way is waited for.
        let carried = unsafe { self.carry(&**device, stream, (sends, receives), &mut pinned) };
        if carried.is_err() {
            settle(&**device, &pinned, stream)?;
        }
        *memory = Some(pinned);
        carried
    }

    fn check(&self) -> Result<(), ExchangeError> {
        if self.is_aborted.load(Ordering::Acquire) {
            return Err(self.control.lost());
        }
        self.control.check()
    }

    fn abort(&self) {
        if !self.is_aborted.swap(true, Ordering::AcqRel) {
            self.control.abort(); // First, so that peers who see an end here know why.
            for peer in self.peers.iter().flatten() {
                let _ = peer.shutdown(Shutdown::Both); // Who is gone already needs no end.
            }
        }
    }
}

/// What is left of a round's messages, for each peer and way in their order.
#[derive(Default)]
struct Ways<'m>(BTreeMap<(u32, Way), VecDeque<Part<'m>>>);

/// What is left of a message in the host's memory. What goes to several peers is there once.
enum Part<'m> {
    In(&'m mut [u8]),
    Out(&'m [u8]),
}

impl Part<'_> {
    /// Moves as much as goes at once; returns how many bytes that were.
    fn go_on(&mut self, mut peer: &UnixStream) -> io::Result<usize> {
        match self {
            Part::In(bytes) => {
                let len = peer.read(bytes)?;
                *bytes = &mut std::mem::take(bytes)[len..];
                Ok(len)
            }
            Part::Out(bytes) => {
                let len = peer.write(bytes)?;
                *bytes = &bytes[len..];
                Ok(len)
            }
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Part::In(bytes) => bytes.is_empty(),
            Part::Out(bytes) => bytes.is_empty(),
        }
    }
}

/// What is copied from the device for a round's messages: each range once, however many peers it goes to.
struct Ranges<'m> {
    distinct: Vec<(&'m Arc<dyn Allocation>, u64, usize)>,
    /// By message: where its bytes begin among those.
    begins: Vec<usize>,
    /// Bytes of all together.
    len: usize,
}

impl<'m> Ranges<'m> {
    fn of(sends: &[Message<'m>]) -> Ranges<'m> {
        let mut ranges = Ranges { distinct: Vec::new(), begins: Vec::new(), len: 0 };
        let mut known = HashMap::new();
        for Message { start, len_bytes, .. } in sends {
            let place = (start.range(*len_bytes), *len_bytes);
            let begin = *known.entry(place).or_insert_with(|| {
                ranges.distinct.push((start.allocation, start.offset_bytes, *len_bytes as usize));
                ranges.len += *len_bytes as usize;
                ranges.len - *len_bytes as usize
            });
            ranges.begins.push(begin);
        }
        ranges
    }
}

/// Which way a message goes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    In,
    Out,
}

impl Way {
    fn flags(self) -> PollFlags {
        match self {
            Way::In => PollFlags::IN,
            Way::Out => PollFlags::OUT,
        }
    }

    /// Moves as much of the parts as goes without waiting; returns how many bytes that were.
    fn go_on(peer: &UnixStream, parts: &mut VecDeque<Part<'_>>) -> io::Result<usize> {
        let mut moved = 0;
        while let Some(part) = parts.front_mut() {
            match part.go_on(peer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => moved += len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(moved),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if part.is_empty() {
                parts.pop_front();
            }
        }
        Ok(moved)
    }
}

/// How long a peer may be gone before this rank notices.
const PEER_POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// How long the word of who failed may take to come: rank 0 asks every 20 ms.
const WORD_GRACE: Duration = Duration::from_millis(200);
const WORD_POLL: Duration = Duration::from_millis(2);
