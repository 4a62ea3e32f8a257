//! Ranks that meet, agree, exchange and end, as threads.

#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use tensorhaul_exchange::{
    Control, Exchange, ExchangeError, InProcess, Launched, Message, Nccl, Rendezvous, Vendor,
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
    for (how, is_lost) in [("done", false), ("aborts", true)] {
        let noticed = on_all(2, |rank| {
            let control = Control::meet(&launched(rank, 2, "job"), at(folder.path())).unwrap();
            if rank == 1 {
                if how == "aborts" {
                    control.abort();
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
        let error = Nccl::connect(vendor, alone()).map(drop).unwrap_err();
        assert!(error.to_string().contains(variable), "{error}");
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("/nowhere/lib.so"), "{source}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn every_message_arrives_in_its_order(
        size in 1u32..6,
        plan in proptest::collection::vec((0u32..6, 0u32..6, 1usize..3000), 0..40),
        rounds in 1usize..4,
    ) {
        let plan: Vec<_> = plan.into_iter().map(|(from, to, len)| (from % size, to % size, len)).filter(|(from, to, _)| from != to).collect();
        let fill = |message: usize, round: usize| (message * 31 + round * 7) as u8;
        let ends = InProcess::ranks(size, Duration::from_secs(20));
        let plan = &plan;
        let arrived = on_all(size, |rank| {
            let end = &ends[rank as usize];
            (0..rounds).all(|round| {
                let mine = |of: fn(&(u32, u32, usize)) -> u32| {
                    plan.iter().enumerate().filter(move |(_, message)| of(message) == rank)
                };
                let sent: Vec<_> = mine(|message| message.0)
                    .map(|(number, (_, to, len))| (*to, vec![fill(number, round); *len]))
                    .collect();
                let mut received: Vec<_> =
                    mine(|message| message.1).map(|(_, (from, _, len))| (*from, vec![0; *len])).collect();
                let sends: Vec<_> = sent.iter().map(|(peer, bytes)| message(*peer, bytes.as_ptr(), bytes.len())).collect();
                let receives: Vec<_> =
                    received.iter_mut().map(|(peer, bytes)| message(*peer, bytes.as_mut_ptr(), bytes.len())).collect();
                // SAFETY: the memory lives until the call is over, and is this thread's alone.
                unsafe { end.exchange(&sends, &receives, 0) }.unwrap();
                let expected = mine(|message| message.1).map(|(number, (_, _, len))| vec![fill(number, round); *len]);
                received.iter().map(|(_, bytes)| bytes).eq(expected.collect::<Vec<_>>().iter())
            })
        });
        prop_assert!(arrived.into_iter().all(|arrived| arrived));
    }
}

fn message(peer: u32, start: *const u8, len: usize) -> Message {
    Message { peer, address: start.expose_provenance() as u64, len_bytes: len as u64 }
}

#[test]
fn an_exchange_that_is_aborted_lets_everybody_go() {
    let ends = InProcess::ranks(3, Duration::from_secs(20));
    let ended = on_all(3, |rank| {
        let (end, mut target) = (&ends[rank as usize], [0u8; 8]);
        if rank == 2 {
            end.abort();
            return true;
        }
        let receive = message(2, target.as_mut_ptr(), 8);
        // SAFETY: the memory lives until the call is over, and is this thread's alone.
        let error = unsafe { end.exchange(&[], &[receive], 0) }.unwrap_err();
        matches!(error, ExchangeError::PeerLost { peer: Some(2) })
    });
    assert_eq!(ended, [true, true, true]);
}
