//! How ranks find each other: the first listens at the rendezvous, the others go there and say which they are.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::RecvFlags;

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
                if let Some(gone) = come(&peers).find(|(_, stream)| is_gone(stream)).map(|(rank, _)| rank) {
                    return Err(without(gone, &peers));
                }
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
    for (rank, mut stream) in come(&peers) {
        stream.write_all(&frame(Tag::Welcome, nonce)).map_err(|_| without(rank, &peers))?;
    }
    Ok(peers.into_iter().flatten().collect())
}

/// Walks the ranks that have come.
fn come(peers: &[Option<UnixStream>]) -> impl Iterator<Item = (u32, &UnixStream)> {
    (1..).zip(peers).filter_map(|(rank, stream)| Some((rank, stream.as_ref()?)))
}

/// Tells whether a rank that waits to be welcomed has closed its end; it says nothing meanwhile.
fn is_gone(stream: &UnixStream) -> bool {
    let found = rustix::net::recv(stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
    !matches!(found, Ok((_, 1..)) | Err(Errno::AGAIN | Errno::INTR))
}

/// Tells the ranks that have come which one has ended, for whom they would wait in vain.
fn without(gone: u32, peers: &[Option<UnixStream>]) -> ExchangeError {
    for (_, mut stream) in come(peers) {
        let _ = stream.write_all(&frame(Tag::Aborted, gone.into())); // Who is gone as well needs no word.
    }
    ExchangeError::PeerLost { peer: Some(gone) }
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
        Ok((Tag::Aborted, gone)) => Err(ExchangeError::PeerLost { peer: Some(gone as u32) }),
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]
mod tests {
    use super::*;

    const NONCE: u64 = 7;

    fn at(folder: &Path) -> Rendezvous {
        Rendezvous { path: folder.join("ranks.sock"), timeout: Duration::from_secs(60) }
    }

    /// Goes to rank 0 and says which rank this is.
    fn come(path: &Path, rank: u32, size: u32) -> UnixStream {
        let mut stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        };
        let place = u64::from(rank) << 32 | u64::from(size);
        stream.write_all(&[frame(Tag::Hello, NONCE), frame(Tag::Place, place)].concat()).unwrap();
        stream
    }

    #[test]
    fn a_rank_that_ends_while_others_come_is_named_to_all() {
        let folder = tempfile::tempdir().unwrap();
        let place = at(folder.path());
        // The last to come ends, and one for whose coming rank 0 need not wait any more.
        for size in [3, 4] {
            let until = Instant::now() + place.timeout;
            let told = thread::scope(|scope| {
                let first = scope.spawn(|| receive_all(&place, size, NONCE, until).unwrap_err());
                let mut other = come(&place.path, 1, size);
                drop(come(&place.path, 2, size));
                let mut words = std::iter::from_fn(|| read(&mut other).ok());
                let told = words.find(|(tag, _)| *tag != Tag::Welcome);
                let first = first.join().unwrap();
                assert!(matches!(first, ExchangeError::PeerLost { peer: Some(2) }), "{size}: {first}");
                told
            });
            assert_eq!(told, Some((Tag::Aborted, 2)), "{size}");
        }
    }

    #[test]
    fn a_rank_that_waits_to_be_welcomed_is_told_which_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let place = at(folder.path());
        let listener = UnixListener::bind(&place.path).unwrap();
        let until = Instant::now() + place.timeout;
        let error = thread::scope(|scope| {
            let waits = scope.spawn(|| go_to_first(&place, 1, 3, NONCE, until).unwrap_err());
            let (mut stream, _) = listener.accept().unwrap();
            read_hello(&mut stream).unwrap();
            stream.write_all(&frame(Tag::Aborted, 2)).unwrap();
            waits.join().unwrap()
        });
        assert!(matches!(error, ExchangeError::PeerLost { peer: Some(2) }), "{error}");
    }
}
