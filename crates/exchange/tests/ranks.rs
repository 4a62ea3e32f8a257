//! Ranks that meet, agree, exchange and end, as threads.

#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use std::sync::Arc;

use proptest::prelude::*;
use tensorhaul_device::host::Host;
use tensorhaul_device::{Allocation, Device, Location, Stream};
use tensorhaul_exchange::{
    Control, Exchange, ExchangeError, InProcess, Launched, Message, Nccl, Rendezvous, Sockets, Vendor,
};

fn launched(rank: u32, size: u32, job: &str) -> Launched {
    Launched { rank, size, local_rank: rank, local_size: size, job: job.to_owned(), launcher: "the test" }
}

fn at(folder: &Path) -> Rendezvous {
    Rendezvous { path: folder.join("ranks.sock"), timeout: Duration::from_secs(20) }
}

/// Runs every rank on a thread of its own, in this order.
fn on_all<T: Send>(size: u32, act: impl Fn(u32) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let act = &act;
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || act(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn ranks_meet_agree_and_spread_what_the_first_has() {
    let folder = tempfile::tempdir().unwrap();
    for size in [1, 2, 5] {
        let spread = on_all(size, |rank| {
            let control = Control::meet(&launched(rank, size, "job"), at(folder.path())).unwrap();
            control.agree(7).unwrap();
            let mut bytes = [rank as u8; 130];
            control.spread(&mut bytes).unwrap();
            control.check().unwrap();
            control.agree(8).unwrap();
            bytes
        });
        assert!(spread.iter().all(|bytes| *bytes == [0; 130]));
        assert!(!at(folder.path()).path.exists(), "the socket is removed when all have come");
    }
}

#[test]
fn one_that_differs_is_named_to_all() {
    let folder = tempfile::tempdir().unwrap();
    for error in on_all(3, |rank| {
        let control = Control::meet(&launched(rank, 3, "job"), at(folder.path())).unwrap();
        control.agree(u64::from(rank == 2)).unwrap_err()
    }) {
        assert!(matches!(error, ExchangeError::Disagree { peer: 2 }), "{error}");
    }
}

#[test]
fn a_rank_that_fails_or_vanishes_is_noticed_and_one_that_is_done_is_not() {
    let folder = tempfile::tempdir().unwrap();
    for (how, is_lost) in [("done", false), ("aborts", true), ("panics", true)] {
        let noticed = on_all(2, |rank| {
            let control = Control::meet(&launched(rank, 2, "job"), at(folder.path())).unwrap();
            if rank == 1 {
                if how == "aborts" {
                    control.abort();
                }
                if how == "panics" {
                    panicking_with(control);
                }
                return None;
            }
            // The other is gone when its word is there.
            let lost = (0..200).find_map(|_| {
                thread::sleep(Duration::from_millis(1));
                control.check().err()
            });
            Some(lost.map(|error| error.to_string()))
        });
        let lost = noticed[0].clone().unwrap();
        assert_eq!(lost.is_some(), is_lost, "{how}: {lost:?}");
        assert!(lost.is_none_or(|lost| lost.starts_with("rank 1 of the node failed")));
    }
}

/// Drops it as a panic does that passes it.
fn panicking_with<T>(held: T) {
    let panics = move || {
        let _held = held;
        std::panic::resume_unwind(Box::new("as a rank's own code may"));
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).unwrap_err();
}

#[test]
fn strangers_are_told_from_ranks() {
    let folder = tempfile::tempdir().unwrap();
    // Of another job, or of a job of another size.
    for (job, size, what) in [("other", 2, "another job"), ("job", 3, "counts 3 ranks on the node, not 2")] {
        let errors = on_all(2, |rank| {
            let launched = if rank == 0 { launched(0, 2, "job") } else { launched(1, size, job) };
            Control::meet(&launched, at(folder.path())).unwrap_err().to_string()
        });
        assert!(errors[0].contains(what), "{errors:?}");
        assert!(errors[1].contains("rank 0 of the node failed or ended"), "{errors:?}");
    }
    // Somebody who connects and says nothing is no rank; the others still meet.
    let met = on_all(2, |rank| {
        if rank == 1 {
            while UnixStream::connect(at(folder.path()).path).is_err() {
                thread::sleep(Duration::from_millis(1));
            }
        }
        Control::meet(&launched(rank, 2, "job"), at(folder.path())).is_ok()
    });
    assert_eq!(met, [true, true]);
}

#[test]
fn a_socket_that_nobody_listens_to_any_more_is_taken_over_and_another_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = at(folder.path()).path;
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left behind");
    let met = on_all(2, |rank| Control::meet(&launched(rank, 2, "job"), at(folder.path())).is_ok());
    assert_eq!(met, [true, true]);

    let listener = UnixListener::bind(&path).unwrap();
    let error = Control::meet(&launched(0, 2, "job"), at(folder.path())).unwrap_err();
    assert!(error.to_string().contains("another job's rank 0 listens there"), "{error}");
    drop(listener);
}

#[test]
fn the_socket_is_this_users_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = at(folder.path()).path;
    let mode = on_all(2, |rank| {
        if rank == 1 {
            let mode = loop {
                match std::fs::metadata(&path).map(|found| found.permissions().mode() & 0o777) {
                    Ok(0o600) => break 0o600,
                    _ => thread::sleep(Duration::from_millis(1)),
                }
            };
            drop(Control::meet(&launched(rank, 2, "job"), at(folder.path())).unwrap());
            return mode;
        }
        drop(Control::meet(&launched(rank, 2, "job"), at(folder.path())).unwrap());
        0o600
    });
    assert_eq!(mode, [0o600, 0o600]);
    let own = Rendezvous::of(&launched(0, 2, "a job/with: odd letters")).unwrap();
    let folder = std::fs::metadata(own.path.parent().unwrap()).unwrap();
    assert_eq!(folder.permissions().mode() & 0o777, 0o700);
    assert!(own.path.file_name().unwrap().to_str().unwrap().starts_with("a_job_with__odd_letters-"));
}

#[test]
fn a_library_that_is_missing_is_an_error_that_says_how_to_name_one() {
    let alone = || Control::meet(&launched(0, 1, "job"), at(Path::new("/nowhere"))).unwrap();
    for (vendor, variable) in
        [(Vendor::Nccl, "TENSORHAUL_NCCL_LIBRARY"), (Vendor::Rccl, "TENSORHAUL_RCCL_LIBRARY")]
    {
        // SAFETY: this test alone reads or sets it.
        unsafe { std::env::set_var(variable, "/nowhere/lib.so") };
        let error = Nccl::connect(vendor, &host(), alone()).map(drop).unwrap_err();
        assert!(error.to_string().contains(variable), "{error}");
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("/nowhere/lib.so"), "{source}");
    }
}

/// The ends of ranks that are threads, in one of the ways that need no device.
#[derive(Clone, Copy, Debug)]
enum Kind {
    InProcess,
    Sockets,
}

fn ends(kind: Kind, size: u32, timeout: Duration) -> Vec<Box<dyn Exchange>> {
    if let Kind::InProcess = kind {
        let ends = InProcess::ranks(size, timeout).into_iter();
        return ends.map(|end| Box::new(end) as Box<dyn Exchange>).collect();
    }
    let folder = tempfile::tempdir().unwrap();
    on_all(size, |rank| {
        let rendezvous = Rendezvous { timeout, ..at(folder.path()) };
        let control = Control::meet(&launched(rank, size, "job"), rendezvous).unwrap();
        Box::new(Sockets::connect(control).unwrap()) as Box<dyn Exchange>
    })
}

fn host() -> Arc<dyn Device> {
    Arc::new(Host)
}

fn memory(bytes: &[u8]) -> Arc<dyn Allocation> {
    let memory = Host.allocate(bytes.len() as u64).unwrap();
    // SAFETY: the memory was just allocated, and is this thread's alone.
    unsafe { Host.copy(bytes, &memory, 0, Stream::Copy) }.unwrap();
    memory
}

fn bytes(memory: &Arc<dyn Allocation>) -> Vec<u8> {
    let mut bytes = vec![0; memory.len_bytes() as usize];
    // SAFETY: the memory is this thread's alone.
    unsafe { Host.copy_back(memory, 0, &mut bytes, Stream::Copy) }.unwrap();
    bytes
}

fn messages(of: &[(u32, Arc<dyn Allocation>)]) -> Vec<Message<'_>> {
    let message = |(peer, allocation): &'_ (u32, Arc<dyn Allocation>)| (*peer, allocation.len_bytes());
    let start = |allocation| Location { allocation, offset_bytes: 0 };
    of.iter()
        .map(|part| (message(part), start(&part.1)))
        .map(|((peer, len_bytes), start)| Message { peer, start, len_bytes })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn every_message_arrives_in_its_order(
        kind in prop_oneof![Just(Kind::InProcess), Just(Kind::Sockets)],
        size in 1u32..6,
        plan in proptest::collection::vec((0u32..6, 0u32..6, prop_oneof![1usize..3000, 100_000usize..2_000_000]), 0..20),
        rounds in 1usize..4,
    ) {
        let plan: Vec<_> = plan.into_iter().map(|(from, to, len)| (from % size, to % size, len)).filter(|(from, to, _)| from != to).collect();
        let fill = |message: usize, round: usize| (message * 31 + round * 7) as u8;
        let ends = ends(kind, size, Duration::from_secs(20));
        let plan = &plan;
        let arrived = on_all(size, |rank| {
            let end = &ends[rank as usize];
            (0..rounds).all(|round| {
                let mine = |of: fn(&(u32, u32, usize)) -> u32| {
                    plan.iter().enumerate().filter(move |(_, message)| of(message) == rank)
                };
                let sent: Vec<_> = mine(|message| message.0)
                    .map(|(number, (_, to, len))| (*to, memory(&vec![fill(number, round); *len])))
                    .collect();
                let received: Vec<_> =
                    mine(|message| message.1).map(|(_, (from, _, len))| (*from, memory(&vec![0; *len]))).collect();
                // SAFETY: the memory lives until the call is over, and is this thread's alone.
                unsafe { end.exchange(&host(), Stream::Compute, &messages(&sent), &messages(&received)) }.unwrap();
                let expected = mine(|message| message.1).map(|(number, (_, _, len))| vec![fill(number, round); *len]);
                received.iter().map(|(_, memory)| bytes(memory)).eq(expected)
            })
        });
        prop_assert!(arrived.into_iter().all(|arrived| arrived));
    }
}

#[test]
fn an_exchange_that_is_aborted_lets_everybody_go_and_names_the_rank() {
    for kind in [Kind::InProcess, Kind::Sockets] {
        for failing in 0..3 {
            let ends = ends(kind, 3, Duration::from_secs(20));
            let named = on_all(3, |rank| {
                let (end, target) = (&ends[rank as usize], [(failing, memory(&[0; 8]))]);
                if rank == failing {
                    end.abort();
                    return true;
                }
                // SAFETY: the memory lives until the call is over, and is this thread's alone.
                let error =
                    unsafe { end.exchange(&host(), Stream::Compute, &[], &messages(&target)) }.unwrap_err();
                end.abort(); // As a load does that fails.
                assert!(end.check().is_err());
                matches!(error, ExchangeError::PeerLost { peer: Some(peer) } if peer == failing)
            });
            assert_eq!(named, [true, true, true], "{kind:?} {failing}");
        }
    }
}

#[test]
fn a_rank_that_ends_without_a_word_is_named_to_all() {
    for gone in 0..3 {
        let ends: Vec<_> = ends(Kind::Sockets, 3, Duration::from_secs(20));
        let ends: Vec<_> = ends.into_iter().map(|end| std::sync::Mutex::new(Some(end))).collect();
        let named = on_all(3, |rank| {
            let end = ends[rank as usize].lock().unwrap().take().unwrap();
            if rank == gone {
                return true; // Its connections close.
            }
            let target = [(gone, memory(&[0; 8]))];
            // SAFETY: the memory lives until the call is over, and is this thread's alone.
            let error =
                unsafe { end.exchange(&host(), Stream::Compute, &[], &messages(&target)) }.unwrap_err();
            end.abort();
            matches!(error, ExchangeError::PeerLost { peer: Some(peer) } if peer == gone)
        });
        assert_eq!(named, [true, true, true], "{gone}");
    }
}

#[test]
fn abort_lets_go_whoever_waits_for_a_rank_that_has_not_come() {
    for kind in [Kind::InProcess, Kind::Sockets] {
        for waiting in [0, 1] {
            let ends = ends(kind, 3, Duration::from_secs(20));
            let end = &ends[waiting];
            let (sender, receiver) = std::sync::mpsc::channel();
            let error = thread::scope(|scope| {
                let waits = scope.spawn(move || {
                    sender.send(()).unwrap();
                    end.agree(1).unwrap_err()
                });
                receiver.recv().unwrap();
                thread::sleep(Duration::from_millis(20)); // It most likely waits by now; if not, it need not wait at all.
                end.abort();
                waits.join().unwrap()
            });
            assert!(matches!(error, ExchangeError::PeerLost { .. }), "{kind:?}, rank {waiting}: {error}");
            assert!(end.check().is_err());
            if waiting == 0 {
                let other = ends[2].agree(1).unwrap_err().to_string();
                assert!(other.contains("rank 0 of the node failed"), "{kind:?}: {other}");
            }
        }
    }
}

#[test]
fn who_fails_is_heard_before_who_is_waited_for_has_come() {
    for kind in [Kind::InProcess, Kind::Sockets] {
        let ends = ends(kind, 4, Duration::from_secs(20));
        let error = thread::scope(|scope| {
            let waits = scope.spawn(|| ends[0].agree(1).unwrap_err());
            ends[3].abort();
            waits.join().unwrap()
        });
        assert!(matches!(error, ExchangeError::PeerLost { peer: Some(3) }), "{kind:?}: {error}");
    }
}

#[test]
fn a_thread_that_leaves_is_named_to_those_that_wait_for_it() {
    for panics in [false, true] {
        let target = || [(2, memory(&[0; 8]))];
        let mut ends = ends(Kind::InProcess, 4, Duration::from_secs(20));
        let last = ends.remove(2);
        let (agreeing, receiving, sending) = (&ends[0], &ends[1], &ends[2]);
        let errors = thread::scope(|scope| {
            let agrees = scope.spawn(|| agreeing.agree(1));
            let receives = scope.spawn(|| {
                // SAFETY: the memory lives until the call is over, and is this thread's alone.
                unsafe { receiving.exchange(&host(), Stream::Compute, &[], &messages(&target())) }
            });
            let sends = scope.spawn(|| {
                // SAFETY: as above.
                unsafe { sending.exchange(&host(), Stream::Compute, &messages(&target()), &[]) }
            });
            if panics {
                panicking_with(last)
            } else {
                drop(last)
            }
            [agrees, receives, sends].map(|thread| thread.join().unwrap().unwrap_err())
        });
        for error in errors {
            assert!(matches!(error, ExchangeError::PeerLost { peer: Some(2) }), "{error}");
        }
        assert_eq!(agreeing.check().is_err(), panics, "who waits for nothing of it need not end");
    }
}

#[test]
fn a_rank_that_goes_before_all_are_connected_is_named() {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..20 {
        let named = on_all(4, |rank| {
            let control = Control::meet(&launched(rank, 4, "job"), at(folder.path())).unwrap();
            if rank == 3 {
                return true;
            }
            // Rank 0 may not notice before others ask; whoever does names the right one.
            let connected = Sockets::connect(control).map(|end| end.agree(1).inspect_err(|_| end.abort()));
            let error = connected.and_then(|agreed| agreed).unwrap_err();
            matches!(error, ExchangeError::PeerLost { peer: Some(3) })
        });
        assert_eq!(named, [true; 4]);
    }
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let soon = || Rendezvous { timeout: Duration::from_millis(300), ..at(folder.path()) };
    let errors =
        on_all(2, |rank| Control::meet(&launched(rank, 4, "job"), soon()).map(drop).unwrap_err().to_string());
    let where_to = format!(
        "to {}; all need the same path, which TENSORHAUL_RENDEZVOUS sets, and else TMPDIR and the job",
        soon().path.display()
    );
    assert_eq!(errors[0], format!("meeting: ranks 2, 3 of the node did not come within 0.3 s {where_to}"));
    let error = Control::meet(&launched(1, 2, "job"), soon()).map(drop).unwrap_err().to_string();
    assert_eq!(error, format!("meeting: rank 0 of the node did not come within 0.3 s {where_to}"));
    for (kind, waiting, missing) in [(Kind::InProcess, 1, "0, 2"), (Kind::Sockets, 0, "1, 2")] {
        let end = &ends(kind, 3, Duration::from_millis(50))[waiting];
        let error = end.agree(1).unwrap_err().to_string();
        assert_eq!(error, format!("agreeing: ranks {missing} of the node did not come within 0.05 s"));
    }
}
