//! How ranks of a node find each other, agree, and learn of each other's end: a Unix socket, rank 0 in the middle.
//!
//! Every message is a tag and eight bytes. A peer that ends without a word has failed.

mod meeting;
mod rendezvous;
mod words;

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::error::ExchangeError;
use crate::launch::Launched;
use meeting::{go_to_first, receive_all};
use rendezvous::hash;
use words::{FRAME_LEN, Tag, frame, read, receive_stream, send_stream};

pub use rendezvous::{RENDEZVOUS_VARIABLE, Rendezvous};

/// A rank's connection to the others.
#[derive(Debug)]
pub struct Control {
    rank: u32,
    size: u32,
    rendezvous: Rendezvous,
    /// Of rank 0: to the others, in their order. Of another: to rank 0.
    peers: Mutex<Vec<UnixStream>>,
    /// The same once more, for words that cannot wait until somebody has read.
    words: Vec<UnixStream>,
    is_aborted: AtomicBool,
    /// The rank whose end was noticed first.
    lost: OnceLock<u32>,
}

impl Control {
    /// Meets the other ranks of the node. Rank 0 listens until all have come, and then removes the socket.
    ///
    /// # Errors
    /// [`ExchangeError::NotMet`] when not all come, [`ExchangeError::Stranger`] when somebody of another job does or listens there,
    /// [`ExchangeError::Socket`] when the system refuses.
    pub fn meet(launched: &Launched, rendezvous: Rendezvous) -> Result<Control, ExchangeError> {
        let Launched { local_rank: rank, local_size: size, .. } = *launched;
        let until = Instant::now() + rendezvous.timeout;
        let nonce = hash(launched.job.as_bytes());
        let peers = match (rank, size) {
            (_, 1) => Vec::new(),
            (0, _) => receive_all(&rendezvous, size, nonce, until)?,
            _ => vec![go_to_first(&rendezvous, rank, size, nonce, until)?],
        };
        let words = peers.iter().map(UnixStream::try_clone).collect::<io::Result<_>>();
        let words = words.map_err(|source| ExchangeError::Socket {
            path: rendezvous.path.clone(),
            doing: "keeping the connections",
            source,
        })?;
        let (peers, is_aborted, lost) = (Mutex::new(peers), AtomicBool::new(false), OnceLock::new());
        Ok(Control { rank, size, rendezvous, peers, words, is_aborted, lost })
    }

    /// Returns this rank's place on the node.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Returns the number of ranks on the node.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Returns how long a rank waits for others.
    pub fn timeout(&self) -> Duration {
        self.rendezvous.timeout
    }

    /// Waits until every rank has come, and compares what they brought. See [`Exchange::agree`](crate::Exchange::agree).
    ///
    /// # Errors
    /// [`ExchangeError::Disagree`], [`ExchangeError::PeerLost`], [`ExchangeError::TimedOut`].
    pub fn agree(&self, fingerprint: u64) -> Result<(), ExchangeError> {
        let mut peers = self.lock();
        if self.rank > 0 {
            self.write(&mut peers[0], 0, Tag::Agree, fingerprint)?;
            return match self.read(&mut peers[0], 0, "agreeing")? {
                (Tag::Agreed, _) => Ok(()),
                (Tag::Disagree, peer) => Err(ExchangeError::Disagree { peer: peer as u32 }),
                _ => Err(self.gone(0)),
            };
        }
        let brought = self.hear_all(&mut peers)?;
        let differs = (1..).zip(brought).find(|(_, brought)| *brought != fingerprint).map(|(peer, _)| peer);
        let (tag, value) = differs.map_or((Tag::Agreed, 0), |peer| (Tag::Disagree, u64::from(peer)));
        for (peer, stream) in (1..).zip(peers.iter_mut()) {
            self.write(stream, peer, tag, value)?;
        }
        differs.map_or(Ok(()), |peer| Err(ExchangeError::Disagree { peer }))
    }

    /// Returns what every other rank brings to agree on. Whoever fails meanwhile is heard, whomever else rank 0 waits for.
    fn hear_all(&self, peers: &mut [UnixStream]) -> Result<Vec<u64>, ExchangeError> {
        let until = Instant::now() + self.timeout();
        let mut brought: Vec<Option<u64>> = vec![None; peers.len()];
        loop {
            let silent: Vec<usize> = (0..peers.len()).filter(|peer| brought[*peer].is_none()).collect();
            if silent.is_empty() {
                return Ok(brought.into_iter().flatten().collect());
            }
            let mut polled: Vec<_> =
                silent.iter().map(|peer| PollFd::new(&peers[*peer], PollFlags::IN)).collect();
            let left = until.saturating_duration_since(Instant::now());
            let left = left.try_into().expect("a timeout is no longer than the system counts");
            let heard = match poll(&mut polled, Some(&left)) {
                Ok(0) => {
                    let missing = silent.iter().map(|peer| *peer as u32 + 1).collect();
                    return Err(ExchangeError::TimedOut {
                        doing: "agreeing",
                        after: self.timeout(),
                        missing,
                    });
                }
                Ok(_) => silent.iter().zip(&polled).filter(|(_, polled)| !polled.revents().is_empty()),
                Err(Errno::INTR) => continue,
                Err(_) => return Err(self.gone(silent[0] as u32 + 1)),
            };
            let heard: Vec<usize> = heard.map(|(peer, _)| *peer).collect();
            for peer in heard {
                let rank = peer as u32 + 1;
                match self.read(&mut peers[peer], rank, "agreeing")? {
                    (Tag::Agree, value) => brought[peer] = Some(value),
                    _ => return Err(self.gone(rank)),
                }
            }
        }
    }

    /// Gives every rank the bytes that rank 0 has; the others pass as many of their own, which are written over.
    ///
    /// # Errors
    /// [`ExchangeError::PeerLost`], [`ExchangeError::TimedOut`].
    pub fn spread(&self, bytes: &mut [u8]) -> Result<(), ExchangeError> {
        let mut peers = self.lock();
        for (peer, stream) in (0..).zip(peers.iter_mut()) {
            for piece in bytes.chunks_mut(8) {
                let mut word = [0; 8];
                if self.rank == 0 {
                    word[..piece.len()].copy_from_slice(piece);
                    self.write(stream, peer + 1, Tag::Bytes, u64::from_le_bytes(word))?;
                    continue;
                }
                match self.read(stream, 0, "spreading the communicator's name")? {
                    (Tag::Bytes, value) => piece.copy_from_slice(&value.to_le_bytes()[..piece.len()]),
                    _ => return Err(self.gone(0)),
                }
            }
        }
        Ok(())
    }

    /// Connects every two ranks; returns a connection that does not block to each other rank, by its place.
    ///
    /// # Errors
    /// [`ExchangeError::PeerLost`], [`ExchangeError::TimedOut`], and [`ExchangeError::Socket`] when the system refuses.
    pub(crate) fn connect_all(&self) -> Result<Vec<Option<UnixStream>>, ExchangeError> {
        let mut peers = self.lock();
        let failed = |source| {
            let path = self.rendezvous.path.clone();
            ExchangeError::Socket { path, doing: "connecting all ranks", source }
        };
        let mut all: Vec<Option<UnixStream>> = (0..self.size).map(|_| None).collect();
        if self.rank > 0 {
            for peer in (0..self.size).filter(|peer| *peer != self.rank) {
                let received = receive_stream(&mut peers[0]);
                let received = received.map_err(|error| self.failed(&error, 0, "connecting all ranks"))?;
                let end = received.map_err(|lost| self.gone(lost))?;
                all[peer as usize] = Some(end);
            }
            all.iter().flatten().try_for_each(|end| end.set_nonblocking(true)).map_err(failed)?;
            return Ok(all);
        }
        let mut ends: Vec<Vec<UnixStream>> = (0..self.size).map(|_| Vec::new()).collect();
        for first in 0..self.size as usize {
            for second in first + 1..self.size as usize {
                let (one, other) = UnixStream::pair().map_err(failed)?;
                ends[first].push(one);
                ends[second].push(other);
            }
        }
        // A rank's ends are by the other's place, because lower ones came first.
        for ((rank, stream), ends) in (1..).zip(peers.iter_mut()).zip(&ends[1..]) {
            let sent = ends.iter().try_for_each(|end| send_stream(stream, end));
            sent.map_err(|error| self.failed(&error, rank, "connecting all ranks"))?;
        }
        for (peer, end) in (1..).zip(ends.swap_remove(0)) {
            end.set_nonblocking(true).map_err(failed)?;
            all[peer] = Some(end);
        }
        Ok(all)
    }

    /// Tells whether the peers that this rank is connected to are there, without waiting. Rank 0 knows of all, and tells the others.
    ///
    /// # Errors
    /// [`ExchangeError::PeerLost`].
    pub fn check(&self) -> Result<(), ExchangeError> {
        let Ok(peers) = self.peers.try_lock() else { return Ok(()) }; // Somebody waits for them just now.
        let first = u32::from(self.rank == 0);
        for (peer, stream) in (first..).zip(peers.iter()) {
            let mut found = [0; FRAME_LEN];
            let looked =
                rustix::net::recv(stream.as_fd(), &mut found[..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
            let lost = match looked {
                Ok((_, FRAME_LEN)) if found[0] == Tag::Aborted as u8 => {
                    let [_, who @ ..] = found;
                    Some(u64::from_le_bytes(who) as u32)
                }
                Ok((_, 0)) => Some(peer),
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => None,
                Err(_) => Some(peer),
            };
            if let Some(lost) = lost {
                return Err(self.gone(lost));
            }
        }
        Ok(())
    }

    /// Notes that a rank is gone. The first that is noticed is why others end.
    pub(crate) fn gone(&self, peer: u32) -> ExchangeError {
        if !self.is_aborted.load(Ordering::Acquire) {
            let _ = self.lost.set(peer);
        } // Else this rank itself has closed the connection.
        self.lost()
    }

    /// Returns the error of a rank whose peer is gone.
    pub(crate) fn lost(&self) -> ExchangeError {
        ExchangeError::PeerLost { peer: self.lost.get().copied() }
    }

    /// Tells the peers that this rank has failed, or which other it knows to have. Whoever waits for them on another thread is let go.
    pub fn abort(&self) {
        if self.is_aborted.swap(true, Ordering::AcqRel) {
            return;
        }
        self.leave(Tag::Aborted);
        for stream in &self.words {
            let _ = stream.shutdown(Shutdown::Both); // Who is gone already needs no end.
        }
    }

    fn leave(&self, tag: Tag) {
        let who = self.lost.get().copied().unwrap_or(self.rank);
        for mut stream in &self.words {
            // Who is gone already needs no word.
            let _ = stream.write_all(&frame(tag, who.into()));
        }
    }

    fn write(&self, stream: &mut UnixStream, peer: u32, tag: Tag, value: u64) -> Result<(), ExchangeError> {
        stream.write_all(&frame(tag, value)).map_err(|_| match read(stream) {
            // What it said before it closed its end.
            Ok((Tag::Aborted, who)) => self.gone(who as u32),
            _ => self.gone(peer),
        })
    }

    fn read(
        &self,
        stream: &mut UnixStream,
        peer: u32,
        doing: &'static str,
    ) -> Result<(Tag, u64), ExchangeError> {
        match read(stream) {
            Ok((Tag::Aborted, who)) => Err(self.gone(who as u32)),
            Ok(message) => Ok(message),
            Err(error) => Err(self.failed(&error, peer, doing)),
        }
    }

    fn failed(&self, error: &io::Error, peer: u32, doing: &'static str) -> ExchangeError {
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                // Rank 0 is in the middle: what it does not answer may wait for any other.
                let missing = if self.rank == 0 { vec![peer] } else { Vec::new() };
                ExchangeError::TimedOut { doing, after: self.timeout(), missing }
            }
            _ => self.gone(peer),
        }
    }

    /// A panic elsewhere leaves at worst a message half read, which the next reader takes for a lost peer.
    fn lock(&self) -> MutexGuard<'_, Vec<UnixStream>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Control {
    /// Says that this rank is done; not where a panic drops it, whose peers would wait for what it still had to do.
    fn drop(&mut self) {
        if thread::panicking() {
            self.abort();
        } else if !self.is_aborted.load(Ordering::Acquire) {
            self.leave(Tag::Done);
        }
    }
}
