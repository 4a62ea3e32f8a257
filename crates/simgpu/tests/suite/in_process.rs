//! Ranks of one process that share their reading, each a thread with a simulated device: from device to device where they reach each other,
//! and by way of the host where not.

#[path = "../../../tensorhaul/tests/share/cut.rs"]
mod cut;

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tensorhaul::exchange::{Control, Exchange, InProcess, Launched, Message, Rendezvous, Sockets};
use tensorhaul::share::{Carrier, NodeOptions, SharedLoaded, node_exchange};
use tensorhaul::{Assembly, Dequantization, Dtype, Error, ErrorKind, LoadOptions, Model, Request};
use tensorhaul_device::{Allocation, Device, Location, Stream};

use crate::suite::load::read_back;
use crate::suite::quantized::checkpoint;
use crate::suite::shared::llama::{assemblies, expected, files};
use crate::suite::sim::Sim;
use crate::vendor::{self, call};
use cut::cut;

fn model(folder: &Path) -> Model {
    for (name, bytes) in files() {
        std::fs::write(folder.join(name), &bytes).unwrap();
    }
    Model::open(folder).unwrap()
}

fn on(rank: u32, options: &LoadOptions) -> LoadOptions {
    let mut request = Request::all();
    request.device = vendor::id(rank);
    options.clone().request(request)
}

fn options() -> LoadOptions {
    LoadOptions::default().staging_bytes(512 << 10)
}

/// Loads on all ranks at once, each on a thread.
fn load_on_all(model: &Model, ranks: &[Assembly], options: &LoadOptions) -> Vec<Result<SharedLoaded, Error>> {
    let ends = InProcess::ranks(ranks.len() as u32, Duration::from_secs(20));
    thread::scope(|scope| {
        let start =
            |end: InProcess| scope.spawn(move || model.load_shared(&on(end.rank(), options), ranks, &end));
        let loads: Vec<_> = ends.into_iter().map(start).collect();
        loads.into_iter().map(|load| load.join().unwrap()).collect()
    })
}

#[track_caller]
fn all(loads: Vec<Result<SharedLoaded, Error>>, context: &str) -> Vec<SharedLoaded> {
    loads.into_iter().map(|load| load.unwrap_or_else(|error| panic!("{context}: {error:?}"))).collect()
}

#[test]
fn ranks_of_one_process_end_with_their_bytes_and_each_is_read_once() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = model(folder.path());
    let stored: u64 = model.checkpoint().tensors().map(|tensor| tensor.info.len_bytes()).sum();
    for (size, config) in [
        (2, "devices=2"),
        (4, "devices=4;delay_us=200;seed=3"),
        (4, "devices=4;delay_us=200;pools=0;batches=0"),
        (4, "devices=4;delay_us=100;peers=0"),
        (3, "devices=3;delay_us=100;no_peer=0:1;no_peer=2:0"),
        (8, "devices=8;delay_us=50;seed=7"),
    ] {
        let sim = Sim::new(config);
        let ranks = assemblies(&model, size, size as u64);
        let loads = all(load_on_all(&model, &ranks, &options()), config);
        let happened = sim.report();
        for (rank, (loaded, assembly)) in (0..).zip(loads.iter().zip(&ranks)) {
            let (device, expected) = (vendor::open(rank).unwrap(), expected(&model, assembly));
            assert_eq!(loaded.tensors.len(), expected.len());
            for (name, tensor) in loaded.tensors.iter() {
                let expected = &expected[name];
                let found = read_back(&device, tensor, expected.len());
                assert!(found == *expected, "{config}: {name} on rank {rank}");
            }
        }
        let read: u64 = loads.iter().map(|loaded| loaded.report.read_bytes).sum();
        let reads: u64 = loads.iter().map(|loaded| loaded.report.promised.reads).sum();
        // Reads begin and end at pages, which adds less than two to each.
        assert!((stored..stored + 8192 * reads).contains(&read), "{config}: {read} of {stored}");
        let is_told = loads.iter().flat_map(|loaded| &loaded.report.fallbacks);
        let is_told =
            is_told.filter(|fallback| fallback.what.contains("is copied through the host")).count() > 0;
        assert_eq!(is_told, config.contains("peer"), "{config}");
        assert_eq!(
            happened.calls(call::COPY_OUT) > 0,
            config.contains("peer"),
            "{config}: by way of the host"
        );
        assert!(happened.calls(call::COPY_PEER) > 0, "{config}: from device to device, or within one");
        assert_eq!(happened.calls("ncclSend"), 0, "{config}");
        drop(loads);
        sim.assert_clean(config);
    }
}

#[test]
fn ranks_of_one_process_dequantize_their_parts_and_keep_their_memory() {
    let folder = checkpoint();
    let model = Model::open(folder.path()).unwrap();
    let dequantize = Dequantization::to(Dtype::Bf16);
    for (size, dim, config) in
        [(2, 0, "delay_us=200"), (4, 1, "delay_us=200;seed=5"), (3, 1, "delay_us=100;peers=0")]
    {
        let context = format!("{size} ranks along {dim}, {config}");
        let ranks = cut(&model, size, dim);
        let options = LoadOptions::default()
            .staging_bytes(64 << 10)
            .transient_bytes(64 << 10)
            .dequantize(dequantize.clone());
        let share = model.plan_shared(&options, &ranks).unwrap();
        let waits =
            (0..share.round_count()).flat_map(|round| share.round(round)).filter(|turn| turn.after.is_some());
        assert!(waits.count() > 0, "{context}: places of sources are taken again");
        let needed = (0..size as u32).map(|rank| share.promised(rank).device_bytes()).max().unwrap();
        // Allocations are rounded up by less than this each.
        let memory = needed + 8192;
        let sim = Sim::new(&format!("devices={size};memory={memory};{config}"));
        let loads = all(load_on_all(&model, &ranks, &options), &context);
        for (rank, (loaded, assembly)) in (0..).zip(loads.iter().zip(&ranks)) {
            let mut request = Request::all();
            request.assembly = Some(Arc::new(assembly.clone()));
            let alone = LoadOptions::default().request(request).dequantize(dequantize.clone());
            let alone = model.load(&alone).unwrap();
            let device = vendor::open(rank).unwrap();
            assert!(loaded.report.operations > 0, "{context}");
            for (name, tensor) in loaded.tensors.iter() {
                let expected = alone.tensors.get(name).unwrap().bytes().unwrap();
                assert!(
                    read_back(&device, tensor, expected.len()) == expected,
                    "{context}: {name} on rank {rank}"
                );
            }
        }
        drop(loads);
        sim.assert_clean(&context);
        drop(sim); // Tests take turns at the machine.
        let sim = Sim::new(&format!("devices={size};memory={};{config}", needed - 1));
        let refused = load_on_all(&model, &ranks, &options);
        let kinds: Vec<_> =
            refused.into_iter().filter_map(|load| load.err().map(|error| error.kind())).collect();
        assert_eq!(kinds.len() as u64, size, "{context}: all fail where one has too little");
        assert!(kinds.contains(&ErrorKind::OutOfMemory), "{context}: {kinds:?}");
        sim.assert_clean(&context);
    }
}

#[test]
fn when_a_device_fails_on_one_rank_all_fail_and_nothing_is_left() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = model(folder.path());
    let ranks = assemblies(&model, 3, 5);
    for (what, peers) in [(call::COPY_PEER, ""), (call::COPY_ROWS, ""), (call::COPY_OUT, "peers=0;")] {
        let sim = Sim::new(&format!("devices=3;delay_us=50;{peers}fail={what}:4:1"));
        let errors: Vec<_> = load_on_all(&model, &ranks, &options())
            .into_iter()
            .map(|load| load.expect_err(what).one_line())
            .collect();
        let failed = errors.iter().filter(|error| error.contains("failed with 1")).count();
        let others = errors.iter().filter(|error| error.contains("of the node failed or ended")).count();
        assert_eq!((failed, others), (1, 2), "{what}: {errors:?}");
        sim.assert_clean(what);
    }
}

#[test]
fn sockets_carry_what_devices_hold() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = model(folder.path());
    let sim = Sim::new("devices=3;delay_us=50;peers=0");
    let ranks = assemblies(&model, 3, 8);
    thread::scope(|scope| {
        for rank in 0..3 {
            let (model, ranks, path) = (&model, &ranks, folder.path().join("ranks.sock"));
            scope.spawn(move || {
                let (job, launcher) = ("a-job".to_owned(), "the test");
                let launched = Launched { rank, size: 3, local_rank: rank, local_size: 3, job, launcher };
                let node = NodeOptions {
                    path: Some(path),
                    carrier: Some(Carrier::Sockets),
                    ..NodeOptions::default()
                };
                let exchange = node_exchange(&launched, vendor::id(rank), &node).unwrap();
                let loaded = model.load_shared(&on(rank, &options()), ranks, &*exchange).unwrap();
                assert_eq!(loaded.report.exchange, "sockets");
                let (device, expected) =
                    (vendor::open(rank).unwrap(), expected(model, &ranks[rank as usize]));
                for (name, tensor) in loaded.tensors.iter() {
                    let expected = &expected[name];
                    assert!(read_back(&device, tensor, expected.len()) == *expected, "{name} on rank {rank}");
                }
            });
        }
    });
    assert_eq!(sim.report().calls("ncclSend"), 0);
    sim.assert_clean("sockets");
}

#[test]
fn what_a_sender_gave_stays_until_it_is_read_also_when_a_later_message_fails() {
    for seed in 0..4 {
        let context = format!("devices=3;delay_us_of=0:20000;seed={seed}");
        let sim = Sim::new(&context);
        let ends = InProcess::ranks(3, Duration::from_secs(20));
        let devices = [0, 1].map(open);
        let memory = |ordinal: usize| devices[ordinal].allocate(4096).unwrap();
        let targets = [memory(0), memory(0)];
        thread::scope(|scope| {
            let sends = scope.spawn(|| {
                let source = memory(1);
                let sent = [message(0, &source)];
                // SAFETY: the memory lives until the receiver, which holds it as well, is through; nobody writes it.
                let sent = unsafe { ends[1].exchange(&devices[1], Stream::Compute, &sent, &[]) };
                sent.unwrap_err();
                devices[1].wait(&devices[1].record(Stream::Compute).unwrap()).unwrap();
            });
            let receives = scope.spawn(|| {
                // Rank 2 sends nothing.
                let received = [message(1, &targets[0]), message(2, &targets[1])];
                // SAFETY: the memory lives until the stream was waited for, below, and nobody touches it.
                unsafe { ends[0].exchange(&devices[0], Stream::Compute, &[], &received) }.unwrap_err();
            });
            while sim.report().calls(call::COPY_PEER) == 0 {
                thread::yield_now();
            }
            ends[1].abort();
            sends.join().unwrap();
            receives.join().unwrap();
        });
        devices[0].wait(&devices[0].record(Stream::Compute).unwrap()).unwrap();
        drop((ends, targets, devices));
        sim.assert_clean(&context);
    }
}

fn open(ordinal: u32) -> Arc<dyn Device> {
    Arc::new(vendor::open(ordinal).unwrap())
}

fn message(peer: u32, allocation: &Arc<dyn Allocation>) -> Message<'_> {
    Message { peer, start: Location { allocation, offset_bytes: 0 }, len_bytes: allocation.len_bytes() }
}

#[test]
fn sockets_take_what_goes_to_several_ranks_from_the_device_once() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let sim = Sim::new("devices=3;delay_us=50");
    thread::scope(|scope| {
        for rank in 0..3 {
            let path = folder.path().join("ranks.sock");
            scope.spawn(move || {
                let (job, launcher) = ("a-job".to_owned(), "the test");
                let launched = Launched { rank, size: 3, local_rank: rank, local_size: 3, job, launcher };
                let rendezvous = Rendezvous { path, timeout: Duration::from_secs(20) };
                let end = Sockets::connect(Control::meet(&launched, rendezvous).unwrap()).unwrap();
                let device = open(rank);
                let memory = device.allocate(1 << 16).unwrap();
                let messages: Vec<_> = match rank {
                    0 => [1, 2].map(|peer| message(peer, &memory)).to_vec(),
                    _ => vec![message(0, &memory)],
                };
                let (sends, receives) =
                    if rank == 0 { (&messages[..], &[][..]) } else { (&[][..], &messages[..]) };
                // SAFETY: the memory lives until the exchange, which waits, is over; nobody else touches it.
                unsafe { end.exchange(&device, Stream::Compute, sends, receives) }.unwrap();
            });
        }
    });
    assert_eq!(sim.report().calls(call::COPY_OUT), 1);
    sim.assert_clean("sockets");
}
