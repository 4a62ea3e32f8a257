//! Direct storage over simulated libraries: whole loads, and what goes wrong.

#![allow(clippy::unwrap_used, reason = "a failed expectation is the test's own report")]

#[path = "../cuda/vendor.rs"]
#[allow(dead_code, unused_imports, reason = "shared with tests that ask for more")]
mod cuda;
mod doctor;
mod faults;
mod hipfile;
mod load;
mod opening;
mod processes;
mod quantized;
mod several;
mod vendor {
    //! What the simulator's set-up asks: here, both vendors' libraries are the simulator.

    pub(crate) use super::cuda::{LIBRARY_VARIABLE, NOT_SUPPORTED, call};
    pub(crate) const LIBRARY_VARIABLE_OF_OTHERS: &str = "SIMGPU_HAS_NO_OTHERS";
}
#[path = "../suite/sim.rs"]
#[allow(dead_code, reason = "shared with tests that ask for more")]
mod sim;
mod suite {
    pub(crate) use crate::sim;
}

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Once;

use sim::Sim;
use tensorhaul::{DeviceId, LoadOptions, Loaded, Model, Preference, Request, Select};

/// Sets a machine up whose libraries for direct storage are the simulator's.
fn machine(config: &str) -> Sim {
    static VARIABLES: Once = Once::new();
    VARIABLES.call_once(|| {
        if std::env::var_os(tensorhaul_rocm::LIBRARY_VARIABLE).is_none() {
            // SAFETY: the first use in the process; tests take turns from here on.
            unsafe { std::env::set_var(tensorhaul_rocm::LIBRARY_VARIABLE, sim::library_path()) };
        }
    });
    Sim::new(config)
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A checkpoint of three files, each with layers long enough for arenas of their own, short tensors, and an end inside a page. None of
/// it is in the page cache.
fn checkpoint(folder: &Path) -> PathBuf {
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    for file in 0..FILES {
        let bytes = |len: usize, salt: usize| {
            (0..len).map(|at| (((at + salt + file) * 2_654_435_761) >> 11) as u8).collect::<Vec<_>>()
        };
        let mut data: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        for layer in 0..3 {
            let shape = vec![1100 + file, 1024];
            let len = shape.iter().product::<usize>() * 2;
            data.push((format!("f{file}.layers.{layer}.w"), Dtype::BF16, shape, bytes(len, layer)));
            data.push((format!("f{file}.layers.{layer}.odd"), Dtype::U8, vec![1001], bytes(1001, layer)));
            data.push((format!("f{file}.layers.{layer}.scale"), Dtype::F32, vec![], bytes(4, layer)));
        }
        // The last of its file: 100 kB that end wherever they end.
        data.push((format!("f{file}.zz"), Dtype::U8, vec![100_003 + file], bytes(100_003 + file, 9)));
        let views = data.iter().map(|(name, dtype, shape, bytes)| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let path = folder.join(format!("part-{file}.safetensors"));
        serialize_to_file(views, None, &path).unwrap();
        evict(&path);
    }
    folder.to_owned()
}

const FILES: usize = 3;

/// Takes a file out of the page cache.
fn evict(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    // SAFETY: advice about an open descriptor.
    assert_eq!(unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) }, 0);
}

fn evict_all(folder: &Path) {
    for entry in std::fs::read_dir(folder).unwrap() {
        evict(&entry.unwrap().path());
    }
}

/// A device that loads go to: NVIDIA's, or AMD's in the process that runs the same tests for it.
fn id(ordinal: u32) -> DeviceId {
    if is_amd() { DeviceId::Rocm(ordinal) } else { DeviceId::Cuda(ordinal) }
}

/// The name of a call of the library's of that device's vendor.
fn call(name: &str) -> String {
    let library = if is_amd() { "hipFile" } else { "cuFile" };
    format!("{library}{name}")
}

fn is_amd() -> bool {
    std::env::var_os(AMD_VARIABLE).is_some()
}

/// Set in the process that runs tests for AMD's devices.
const AMD_VARIABLE: &str = "SIMGPU_DIRECT_AMD";

/// Asserts that storage itself has read, and nobody through the host instead; and that nothing is left.
fn assert_direct_and_clean(sim: &Sim, when: &str) {
    let happened = sim.report();
    assert!(happened.calls(&call("Read")) > 0, "{when}: {:?}", happened.calls);
    assert_eq!(happened.calls("storage_compatible_reads"), 0, "{when}");
    sim.assert_clean(when);
}

/// Onto the device, by direct storage.
fn options(direct_storage: Preference) -> LoadOptions {
    let mut request = Request::all();
    request.device = id(0);
    LoadOptions::default().request(request).staging_bytes(1 << 20).direct_storage(direct_storage)
}

/// As [`options`], of long tensors alone, so that nothing is staged and no copy fails before a read does.
fn options_of_long_ones(direct_storage: Preference) -> LoadOptions {
    let mut request = Request::all();
    request.device = id(0);
    request.select = Select::Globs(vec!["*.w".to_owned()]);
    options(direct_storage).request(request)
}

/// Compares every tensor with the file's own bytes.
fn assert_same_bytes(model: &Model, loaded: &Loaded) {
    assert_eq!(loaded.tensors.len(), model.checkpoint().len());
    for (name, tensor) in loaded.tensors.iter() {
        assert_eq!(tensor.device(), id(0));
        assert!(tensor.to_host().unwrap() == model.tensor(name).unwrap().bytes().unwrap(), "{name}");
    }
}

/// Says why the staging ring was used instead, one line for each reason.
fn reasons(loaded: &Loaded) -> Vec<String> {
    let told = loaded.report.fallbacks.iter().filter(|fallback| fallback.what.contains("direct storage"));
    told.map(|fallback| format!("{}: {}", fallback.what, fallback.why)).collect()
}
