//! Tensors that are dropped while a consumer's stream still works on them.

use std::thread;

use tensorhaul::{DeviceId, ErrorKind, ExternalMemory, Loaded, Model, PinnedAllocator, Request};
use tensorhaul_device::Device;

use crate::suite::consumer::Consumer;
use crate::suite::load::{assert_same_bytes, checkpoint, options};
use crate::suite::sim::Sim;
use crate::vendor::{self, call};

const TENSOR: &str = "f0.layers.1.w";

type LetGo = fn(Loaded);

/// Ways to let go of everything.
const WAYS: [(&str, LetGo); 3] = [
    ("where they were loaded", |loaded| drop(loaded)),
    ("one by one", |loaded| loaded.tensors.into_iter().for_each(drop)),
    ("after the devices were released", |loaded| {
        tensorhaul::release_devices();
        drop(loaded);
    }),
];

#[test]
fn memory_outlives_what_a_named_stream_still_reads() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let expected = model.tensor(TENSOR).unwrap().to_host().unwrap();
    for machine in ["", "delay_us=200", "pools=0"] {
        for (way, let_go) in WAYS {
            let sim = Sim::new(machine);
            let consumer = Consumer::new();
            // SAFETY: the stream outlives the tensors, which are dropped below.
            let loaded = model.load(&unsafe { options().stream(consumer.stream()) }).unwrap();
            let live = sim.report().live["live.allocations"];
            let gate = consumer.hold();
            let read = consumer.read(loaded.tensors.get(TENSOR).unwrap());
            // On a thread of its own: without pools, or with the last handle of the device, the drop waits for the stream.
            let dropping = thread::spawn(move || let_go(loaded));
            while sim.report().calls(call::FREE_ORDERED) + sim.report().calls(call::FREE) == 0 {
                thread::yield_now();
            }
            assert_eq!(
                sim.report().live["live.allocations"],
                live,
                "{machine:?}, {way}: nothing is freed yet"
            );
            drop(gate);
            assert!(consumer.finish(read) == expected, "{machine:?}, {way}: other bytes");
            dropping.join().unwrap();
            drop(consumer);
            sim.assert_clean(way);
        }
    }
}

/// The control of the test above: it would see memory that is freed too early.
#[test]
fn memory_of_a_stream_that_nobody_named_is_freed_under_it() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = Sim::new("");
    let consumer = Consumer::new();
    let loaded = model.load(&options()).unwrap();
    let gate = consumer.hold();
    let read = consumer.read(loaded.tensors.get(TENSOR).unwrap());
    drop(loaded);
    while sim.report().live["live.allocations"] > 0 {
        thread::yield_now();
    }
    drop(gate);
    consumer.finish(read);
    let violations = sim.report().violations;
    assert!(
        violations.len() == 1 && violations[0].ends_with("were freed before the copy ran"),
        "{violations:?}"
    );
}

#[test]
fn a_stream_named_after_the_load_holds_too() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let expected = model.tensor(TENSOR).unwrap().to_host().unwrap();
    let sim = Sim::new("");
    let consumer = Consumer::new();
    let loaded = model.load(&options()).unwrap();
    let gate = consumer.hold();
    let read = consumer.read(loaded.tensors.get(TENSOR).unwrap());
    let raw = loaded.tensors.get(TENSOR).unwrap().clone().into_raw();
    assert_eq!((raw.device, raw.len_bytes), (vendor::id(0), expected.len() as u64));
    raw.owner.release_after(consumer.stream());
    drop(loaded);
    thread::spawn(move || drop(raw)).join().unwrap();
    drop(gate);
    assert!(consumer.finish(read) == expected);
    drop(consumer);
    sim.assert_clean("after the raw tensor");
}

#[test]
fn a_struct_of_dlpack_keeps_device_memory_until_its_deleter_ran_on_another_thread() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let expected = model.tensor(TENSOR).unwrap().to_host().unwrap();
    let sim = Sim::new("devices=2");
    let mut request = Request::all();
    request.device = vendor::id(1);
    let tensor = model.load(&options().request(request)).unwrap().tensors.get(TENSOR).unwrap().clone();
    let exported = tensor.to_dlpack().unwrap();
    let inside = &exported.managed().dl_tensor;
    assert_eq!((inside.device.device_type, inside.device.device_id), (vendor::DLPACK_TYPES.0, 1));
    assert_eq!((inside.data as u64, inside.byte_offset), (tensor.address(), 0));
    assert!(tensor.to_host().unwrap() == expected);
    drop(tensor);
    tensorhaul::release_devices();
    assert_eq!(sim.report().live["live.allocations"], 1, "the arena of the tensor's layer");
    let address = exported.into_raw().as_ptr() as usize;
    thread::spawn(move || {
        let raw = address as *mut tensorhaul::dlpack::DLManagedTensorVersioned;
        // SAFETY: handed over above.
        let deleter = unsafe { &*raw }.deleter.unwrap();
        // SAFETY: deleted once.
        unsafe { deleter(raw) };
    })
    .join()
    .unwrap();
    sim.assert_clean("after the deleter");
}

#[test]
fn a_load_into_pinned_memory_is_handed_over_as_pinned_and_outlives_its_readers() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = Sim::new("");
    let consumer = Consumer::new();
    let pinned = std::sync::Arc::new(PinnedAllocator::new(vendor::id(0)).unwrap());
    let on_host = options().request(Request::all()).allocator(pinned.clone());
    // SAFETY: the stream outlives the tensors, which are dropped below.
    let loaded = model.load(&unsafe { on_host.stream(consumer.stream()) }).unwrap();
    let tensor = loaded.tensors.get(TENSOR).unwrap();
    let expected = model.tensor(TENSOR).unwrap();
    assert!(tensor.bytes().unwrap() == expected.bytes().unwrap());
    assert_eq!((tensor.device(), tensor.pinned_for()), (DeviceId::Host, Some(vendor::id(0))));
    assert_eq!(expected.pinned_for(), None);
    let exported = tensor.to_dlpack().unwrap();
    let device = exported.managed().dl_tensor.device;
    assert_eq!((device.device_type, device.device_id), (vendor::DLPACK_TYPES.1, 0));
    drop(exported);

    let gate = consumer.hold();
    let written = consumer.write(tensor);
    let live = sim.report().live["live.pinned"];
    let dropping = thread::spawn(move || drop(loaded));
    while sim.report().calls(call::EVENT_WAIT) == 0 {
        thread::yield_now();
    }
    assert_eq!(sim.report().live["live.pinned"], live, "nothing is unpinned yet");
    drop(gate);
    dropping.join().unwrap();
    assert!(consumer.finish_write(written) == expected.bytes().unwrap());
    drop((consumer, pinned));
    sim.assert_clean("after the pinned tensors");

    let error =
        model.load(&options().allocator(std::sync::Arc::new(PinnedAllocator::new(vendor::id(0)).unwrap())));
    let refusal = format!("pinned memory is memory of the host; the load is for {}", vendor::FIRST);
    assert_eq!(error.unwrap_err().one_line(), refusal);
    let error = PinnedAllocator::new(DeviceId::Host).err().unwrap();
    assert_eq!(error.one_line(), "memory is pinned by a device's driver; name one, such as cuda:0");
}

#[test]
fn memory_of_another_device_is_an_error_before_the_first_read() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = Sim::new("devices=2");
    let memory = vendor::open(1).unwrap().allocate(1001).unwrap();
    let start = std::ptr::NonNull::<u8>::dangling();
    let (address, owner) = (memory.address(), std::sync::Arc::new(memory));
    // SAFETY: memory of device 1, kept by its owner.
    let elsewhere = unsafe { ExternalMemory::device(vendor::id(1), address, 1001, owner.clone()) };
    // SAFETY: not memory at all, but refused before anybody looks.
    let on_host = unsafe { ExternalMemory::host(start, 1001, owner) };
    for (given, place) in [(elsewhere, vendor::SECOND), (on_host, "host")] {
        let error = model.load(&options().target("f0.layers.1.odd", given)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadRequest);
        assert_eq!(
            error.one_line(),
            format!(
                "tensor \"f0.layers.1.odd\": the memory given is of {place}, the load is for {}",
                vendor::FIRST
            )
        );
    }
    assert_eq!(sim.report().calls(call::COPY_IN), 0);
}

#[test]
fn a_load_for_an_ordinal_out_of_range_says_what_there_is() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let _sim = Sim::new("devices=2");
    let mut request = Request::all();
    request.device = vendor::id(7);
    let error = model.load(&options().request(request)).unwrap_err();
    assert_eq!(
        (error.kind(), error.one_line()),
        (ErrorKind::Device, format!("{}: the driver sees 2 devices, numbers 0 to 1", vendor::id(7)))
    );
}

#[test]
fn loads_at_once_share_a_device_with_rings_of_one_buffer() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    let sim = Sim::new("delay_us=20");
    thread::scope(|scope| {
        let load = |staging_bytes| model.load(&options().staging_bytes(staging_bytes)).unwrap();
        let loads = [4096, 4096, 64 << 10].map(|budget| scope.spawn(move || load(budget)));
        for load in loads {
            assert_same_bytes(&model, &load.join().unwrap());
        }
    });
    sim.assert_clean("after all");
}
