//! How ranks of a node find each other, agree, and learn of each other's end: a Unix socket, rank 0 in the middle.
//!
//! Every message is a tag and eight bytes. A peer that ends without a word has failed.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use crate::error::ExchangeError;
use crate::launch::Launched;

/// Where and how long the ranks of a node look for each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendezvous {
    /// The socket's path, the same on all ranks.
    pub path: PathBuf,
    /// How long a rank waits for the others, then and later. Default: 5 minutes, because ranks come when their process has imported what
    /// it imports.
    pub timeout: Duration,
}

impl Rendezvous {
    /// How long ranks wait where nobody says otherwise.
    pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(300);

    /// Returns the place of a job: what [`RENDEZVOUS_VARIABLE`] says, else a name made of the job in a folder that only this user
    /// enters.
    ///
    /// # Errors
    /// [`ExchangeError::Socket`] when the folder cannot be made, [`ExchangeError::Stranger`] when it is somebody else's.
    pub fn of(launched: &Launched) -> Result<Rendezvous, ExchangeError> {
        let path = match std::env::var_os(RENDEZVOUS_VARIABLE).filter(|path| !path.is_empty()) {
            Some(path) => path.into(),
            None => own_folder()?.join(file_name(&launched.job)),
        };
        Ok(Rendezvous { path, timeout: Rendezvous::TIMEOUT_DEFAULT })
    }
}

/// Makes the folder of this user's sockets, in the place that all processes of the user share.
fn own_folder() -> Result<PathBuf, ExchangeError> {
    let user = rustix::process::geteuid().as_raw();
    let path = std::env::temp_dir().join(format!("tensorhaul-{user}"));
    let failed = |source| ExchangeError::Socket { path: path.clone(), doing: "making the folder", source };
    match fs::DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let found = fs::symlink_metadata(&path).map_err(failed)?;
    if !found.is_dir() || found.uid() != user || found.mode() & 0o077 != 0 {
        let what = "it is no folder that this user alone may enter".to_owned();
        return Err(ExchangeError::Stranger { path, what });
    }
    Ok(path)
}

/// Makes a file name of a job: sockets have paths of at most 108 bytes, so that the rest of a long one becomes a number.
fn file_name(job: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let plain: String =
        job.bytes().map(|byte| if is_plain(byte) { byte as char } else { '_' }).take(40).collect();
    format!("{plain}-{:016x}.sock", hash(job.as_bytes()))
}

/// # Source
/// Fowler, Noll, Vo: FNV-1a, 64 bits.
fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

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
        let mut differs = None;
        for (peer, stream) in (1..).zip(peers.iter_mut()) {
            match self.read(stream, peer, "agreeing")? {
                (Tag::Agree, brought) if brought == fingerprint => {}
                (Tag::Agree, _) => differs = differs.or(Some(peer)),
                _ => return Err(self.gone(peer)),
            }
        }
        let (tag, value) = differs.map_or((Tag::Agreed, 0), |peer| (Tag::Disagree, u64::from(peer)));
        for (peer, stream) in (1..).zip(peers.iter_mut()) {
            self.write(stream, peer, tag, value)?;
        }
        differs.map_or(Ok(()), |peer| Err(ExchangeError::Disagree { peer }))
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

/// Listens until all others have come.
fn receive_all(
    rendezvous: &Rendezvous,
    size: u32,
    nonce: u64,
    until: Instant,
) -> Result<Vec<UnixStream>, ExchangeError> {
    let path = &rendezvous.path;
    let failed = |doing| move |source| ExchangeError::Socket { path: path.clone(), doing, source };
    let listener = listen(path)?;
    let _socket = RemovedAtEnd(path);
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed("closing it to others"))?;
    listener.set_nonblocking(true).map_err(failed("listening"))?;
    let mut peers: Vec<Option<UnixStream>> = (1..size).map(|_| None).collect();
    while peers.iter().any(Option::is_none) {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let missing = (1..).zip(&peers).filter(|(_, peer)| peer.is_none()).map(|(rank, _)| rank);
                wait(rendezvous, until, missing.collect())?;
                continue;
            }
            Err(error) => return Err(failed("accepting a rank")(error)),
        };
        stream.set_nonblocking(false).map_err(failed("accepting a rank"))?;
        stream.set_read_timeout(Some(HELLO_TIMEOUT)).map_err(failed("accepting a rank"))?;
        // Who says nothing that is understood was no rank.
        let Ok(hello) = read_hello(&mut stream) else { continue };
        stream.set_read_timeout(Some(rendezvous.timeout)).map_err(failed("accepting a rank"))?;
        let what = match hello {
            Hello { nonce: other, .. } if other != nonce => "a rank of another job came".to_owned(),
            Hello { size: other, .. } if other != size => {
                format!("a rank came that counts {other} ranks on the node, not {size}")
            }
            Hello { rank, .. } => match peers.get_mut((rank as usize).wrapping_sub(1)) {
                Some(place @ None) => {
                    *place = Some(stream);
                    continue;
                }
                _ => format!("rank {rank} came twice"),
            },
        };
        // The stranger sees its end; the others see this rank's.
        return Err(ExchangeError::Stranger { path: path.clone(), what });
    }
    let mut peers: Vec<_> = peers.into_iter().flatten().collect();
    for stream in &mut peers {
        stream.write_all(&frame(Tag::Welcome, nonce)).map_err(failed("welcoming a rank"))?;
    }
    Ok(peers)
}

/// Binds the socket, over one that a process left which is no more.
fn listen(path: &Path) -> Result<UnixListener, ExchangeError> {
    let failed = |source| ExchangeError::Socket { path: path.to_owned(), doing: "listening", source };
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        bound => return bound.map_err(failed),
    }
    if UnixStream::connect(path).is_ok() {
        let what = "another job's rank 0 listens there".to_owned();
        return Err(ExchangeError::Stranger { path: path.to_owned(), what });
    }
    fs::remove_file(path).map_err(failed)?;
    UnixListener::bind(path).map_err(failed)
}

/// Removes a socket when nobody is to come any more.
struct RemovedAtEnd<'p>(&'p Path);

impl Drop for RemovedAtEnd<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0); // If it is gone already, so be it.
    }
}

/// Connects to rank 0, which may come later, or find a socket there that nobody listens to.
fn go_to_first(
    rendezvous: &Rendezvous,
    rank: u32,
    size: u32,
    nonce: u64,
    until: Instant,
) -> Result<UnixStream, ExchangeError> {
    let path = &rendezvous.path;
    let failed = |doing| move |source| ExchangeError::Socket { path: path.clone(), doing, source };
    let mut stream = loop {
        match UnixStream::connect(path) {
            Ok(stream) => break stream,
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                wait(rendezvous, until, vec![0])?;
            }
            Err(error) => return Err(failed("connecting")(error)),
        }
    };
    stream.set_read_timeout(Some(rendezvous.timeout)).map_err(failed("connecting"))?;
    let hello =
        [frame(Tag::Hello, nonce), frame(Tag::Place, u64::from(rank) << 32 | u64::from(size))].concat();
    stream.write_all(&hello).map_err(failed("saying which rank this is"))?;
    match read(&mut stream) {
        Ok((Tag::Welcome, other)) if other == nonce => Ok(stream),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            let (after, missing) = (rendezvous.timeout, Vec::new());
            Err(ExchangeError::NotMet { path: path.clone(), after, missing })
        }
        _ => Err(ExchangeError::PeerLost { peer: Some(0) }),
    }
}

fn wait(rendezvous: &Rendezvous, until: Instant, missing: Vec<u32>) -> Result<(), ExchangeError> {
    if Instant::now() >= until {
        let (path, after) = (rendezvous.path.clone(), rendezvous.timeout);
        return Err(ExchangeError::NotMet { path, after, missing });
    }
    thread::sleep(MEETING_POLL);
    Ok(())
}

/// Hands one end of a connection to a rank.
fn send_stream(to: &UnixStream, end: &UnixStream) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let ends = [end.as_fd()];
    let is_room = control.push(SendAncillaryMessage::ScmRights(&ends));
    assert!(is_room, "the space is for one descriptor");
    rustix::net::sendmsg(to, &[IoSlice::new(&[Tag::Bytes as u8])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Takes what [`send_stream`] handed over; the rank that is gone, where that is what is told instead.
fn receive_stream(from: &mut UnixStream) -> io::Result<Result<UnixStream, u32>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut tag = [0];
    rustix::net::recvmsg(&*from, &mut [IoSliceMut::new(&mut tag)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut received = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut ends) => ends.next(),
        _ => None,
    });
    match received.next() {
        Some(end) => Ok(Ok(end.into())),
        None if tag[0] == Tag::Aborted as u8 => {
            let mut who = [0; FRAME_LEN - 1];
            from.read_exact(&mut who)?;
            Ok(Err(u64::from_le_bytes(who) as u32))
        }
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// What a rank says first.
struct Hello {
    nonce: u64,
    rank: u32,
    size: u32,
}

fn read_hello(stream: &mut UnixStream) -> io::Result<Hello> {
    let ((Tag::Hello, nonce), (Tag::Place, place)) = (read(stream)?, read(stream)?) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    Ok(Hello { nonce, rank: (place >> 32) as u32, size: place as u32 })
}

fn frame(tag: Tag, value: u64) -> [u8; FRAME_LEN] {
    let mut frame = [tag as u8; FRAME_LEN];
    frame[1..].copy_from_slice(&value.to_le_bytes());
    frame
}

fn read(stream: &mut UnixStream) -> io::Result<(Tag, u64)> {
    let mut frame = [0; FRAME_LEN];
    stream.read_exact(&mut frame)?;
    let [tag, value @ ..] = frame;
    let tag = TAGS.into_iter().find(|known| *known as u8 == tag).ok_or(io::ErrorKind::InvalidData)?;
    Ok((tag, u64::from_le_bytes(value)))
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tag {
    Hello = 1,
    Place,
    Welcome,
    Agree,
    Agreed,
    Disagree,
    Bytes,
    Aborted,
    Done,
}

const TAGS: [Tag; 9] = [
    Tag::Hello,
    Tag::Place,
    Tag::Welcome,
    Tag::Agree,
    Tag::Agreed,
    Tag::Disagree,
    Tag::Bytes,
    Tag::Aborted,
    Tag::Done,
];

const FRAME_LEN: usize = 9;

/// How often a rank that meets the others looks again.
const MEETING_POLL: Duration = Duration::from_millis(5);

/// A rank says which it is as soon as it has connected.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Names another path for the ranks' socket, the same on all ranks of a node.
pub const RENDEZVOUS_VARIABLE: &str = "TENSORHAUL_RENDEZVOUS";
