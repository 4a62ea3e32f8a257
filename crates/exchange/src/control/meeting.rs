//! How ranks find each other: the first listens at the rendezvous, the others go there and say which they are.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::rendezvous::Rendezvous;
use super::words::{Tag, frame, read};
use crate::error::ExchangeError;

/// Listens until all others have come.
pub(super) fn receive_all(
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
pub(super) fn go_to_first(
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

/// How often a rank that meets the others looks again.
const MEETING_POLL: Duration = Duration::from_millis(5);

/// A rank says which it is as soon as it has connected.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
