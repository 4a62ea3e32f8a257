//! Tensors as cudarc's slices. cudarc finds its driver by name, so these run in a process that has the simulator under it.

use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use cudarc::driver::{CudaContext, CudaStream, DevicePtr, PinnedHostSlice};
use tensorhaul::{DeviceId, ErrorKind, Loaded, Model, Request};

use crate::suite::consumer::hold;
use crate::suite::load::{checkpoint, options};
use crate::suite::sim::{Sim, library_path};

#[test]
fn tensors_are_handed_over_as_slices_of_cudarc() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    symlink(library_path(), folder.path().join("libcuda.so")).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["cudarc_slices::with_the_simulator_as_libcuda", "--ignored", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("test result: ok. 4 passed"), "{text}");
}

mod with_the_simulator_as_libcuda {
    use super::*;

    #[test]
    #[ignore = "run by the test above, in another environment"]
    fn a_slice_has_the_tensors_elements_and_leaves_its_memory_alone() {
        let (_folder, model, sim) = model("");
        let loaded = model.load(&options()).unwrap();
        let context = CudaContext::new(0).unwrap();
        for stream in [context.default_stream(), context.new_stream().unwrap()] {
            for (name, tensor) in loaded.tensors.iter() {
                let expected = model.tensor(name).unwrap().to_host().unwrap();
                let slice = tensor.cuda_bytes(&stream).unwrap();
                assert_eq!((slice.len(), slice.device_ptr(&stream).0), (expected.len(), tensor.address()));
                if !expected.is_empty() {
                    let read = read(&stream, &*slice);
                    assert!(read.as_slice().unwrap() == expected, "{name}");
                }
            }
            let tensor = loaded.tensors.get("f0.layers.1.w").unwrap();
            let slice = tensor.cuda_slice::<half::bf16>(&stream).unwrap();
            assert_eq!(slice.len() as u64, tensor.numel());
            let row = read(&stream, &slice.slice(1024..2048));
            let expected = model.tensor("f0.layers.1.w").unwrap().to_vec::<half::bf16>().unwrap();
            assert!(bits(row.as_slice().unwrap()) == bits(&expected[1024..2048]));
            // A clone is memory of cudarc's own.
            let copy = slice.try_clone().unwrap();
            drop(slice);
            assert!(bits(read(&stream, &copy).as_slice().unwrap()) == bits(&expected));
        }
        drop(loaded);
        drop(context);
        sim.assert_clean("after cudarc");
    }

    #[test]
    #[ignore = "run by the test above, in another environment"]
    fn memory_outlives_what_cudarc_has_queued_and_the_stream_outlives_the_memory() {
        for machine in ["", "delay_us=200"] {
            let (_folder, model, sim) = model(machine);
            let expected = model.tensor("f0.layers.1.w").unwrap().to_vec::<half::bf16>().unwrap();
            let Loaded { tensors, .. } = model.load(&options()).unwrap();
            let context = CudaContext::new(0).unwrap();
            let (stream, other) = (context.new_stream().unwrap(), context.new_stream().unwrap());
            let slice = tensors.get("f0.layers.1.w").unwrap().cuda_slice::<half::bf16>(&stream).unwrap();
            let arenas = sim.report().live["live.allocations"];
            drop(tensors);
            let gate = hold(other.cu_stream().cast());
            // Queued on another stream than the slice's: cudarc's events order the two.
            let read = read_later(&other, &*slice);
            drop(stream);
            // On a thread of its own: the simulator's streams end when their work is done, and the last one goes here.
            let dropping = thread::spawn(move || drop(slice));
            while sim.report().calls("cuMemFreeAsync") < arenas {
                thread::yield_now();
            }
            assert_eq!(sim.report().live["live.allocations"], 1, "{machine:?}: nothing is freed yet");
            drop(gate);
            other.synchronize().unwrap();
            dropping.join().unwrap();
            assert!(bits(read.as_slice().unwrap()) == bits(&expected), "{machine:?}");
            drop((read, other, context));
            sim.assert_clean(machine);
        }
    }

    #[test]
    #[ignore = "run by the test above, in another environment"]
    fn a_slice_may_be_the_last_to_go_on_another_thread_after_the_devices_were_released() {
        let (_folder, model, sim) = model("delay_us=100");
        let loaded = model.load(&options()).unwrap();
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let slices: Vec<_> =
            loaded.tensors.iter().map(|(_, tensor)| tensor.cuda_bytes(&stream).unwrap()).collect();
        drop((loaded, stream));
        tensorhaul::release_devices();
        assert!(sim.report().live["live.allocations"] > 0);
        thread::spawn(move || drop(slices)).join().unwrap();
        sim.assert_clean("after the slices");
    }

    #[test]
    #[ignore = "run by the test above, in another environment"]
    fn what_cannot_be_a_slice_is_refused_with_the_reason() {
        let (_folder, model, sim) = model("devices=2");
        let loaded = model.load(&options()).unwrap();
        let mut on_host = Request::all();
        on_host.device = DeviceId::Host;
        let host = model.load(&options().request(on_host)).unwrap();
        let (first, second) = (CudaContext::new(0).unwrap(), CudaContext::new(1).unwrap());
        let (tensor, on_host) =
            (loaded.tensors.get("f0.layers.1.w").unwrap(), host.tensors.get("f0.layers.1.w").unwrap());
        let per_thread = first.per_thread_stream();
        let refusals = [
            (
                tensor.cuda_slice::<half::f16>(&first.default_stream()).map(drop),
                "the tensor holds BF16, not F16",
            ),
            (
                tensor.cuda_bytes(&second.default_stream()).map(drop),
                "the tensor is on cuda:0, the stream on cuda:1",
            ),
            (
                tensor.cuda_bytes(&per_thread).map(drop),
                "the per-thread default stream is another one on each thread; give a stream of its own",
            ),
            (
                on_host.cuda_bytes(&first.default_stream()).map(drop),
                "the tensor is in memory of host; only those of a cuda device can be a CudaSlice",
            ),
        ];
        for (result, text) in refusals {
            let error = result.unwrap_err();
            assert_eq!((error.kind(), error.one_line().as_str()), (ErrorKind::BadRequest, text));
        }
        drop((loaded, per_thread, first, second));
        sim.assert_clean("after the refusals");
    }
}

fn model(machine: &str) -> (tempfile::TempDir, Model, Sim) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = Model::open(checkpoint(folder.path())).unwrap();
    (folder, model, Sim::new(machine))
}

/// Not a number is not equal to itself; its bits are.
fn bits(elements: &[half::bf16]) -> Vec<u16> {
    elements.iter().map(|element| element.to_bits()).collect()
}

/// Queues a copy to pinned memory.
fn read_later<T: cudarc::driver::DeviceRepr + Copy>(
    stream: &Arc<CudaStream>,
    slice: &impl DevicePtr<T>,
) -> PinnedHostSlice<T> {
    // SAFETY: written before it is read.
    let mut pinned = unsafe { stream.context().alloc_pinned_with_flags::<T>(slice.len(), 0) }.unwrap();
    stream.memcpy_dtoh(slice, &mut pinned).unwrap();
    pinned
}

/// Copies to pinned memory.
fn read<T: cudarc::driver::DeviceRepr + Copy>(
    stream: &Arc<CudaStream>,
    slice: &impl DevicePtr<T>,
) -> PinnedHostSlice<T> {
    let pinned = read_later(stream, slice);
    stream.synchronize().unwrap();
    pinned
}
