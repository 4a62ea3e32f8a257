//! No driver, no device, a library that is something else or lacks something: in processes of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tensorhaul::Model;
use tensorhaul_device::conformance;

use crate::suite::kernels::{misaligned, run_everything};
use crate::suite::load::{assert_same_bytes, options};
use crate::suite::sim::library_path;
use crate::vendor;

/// Runs the probe below with another driver library, and returns what it printed.
pub(crate) fn probe(library: &Path, simgpu: &str) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "suite::missing::probe_in_a_process_of_its_own", "--nocapture", "--ignored"])
        .env(vendor::LIBRARY_VARIABLE, library)
        .env("SIMGPU", simgpu)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text.lines()
        .find_map(|line| line.split_once("probe: "))
        .map(|(_, line)| line.to_owned())
        .expect("the probe prints a line")
}

#[test]
#[ignore = "run by the tests below, with another environment"]
fn probe_in_a_process_of_its_own() {
    match vendor::open(0) {
        Ok(device) => {
            run_everything().unwrap();
            for verdict in conformance::run_pair(&device, &device) {
                verdict.result.unwrap_or_else(|what| panic!("{}: {what}", verdict.promise));
            }
            let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let model = Model::open(misaligned(folder.path(), "small", 500, 401)).unwrap();
            assert_same_bytes(&model, &model.load(&options()).unwrap());
            println!("probe: {}, {}", device.facts().name, device.facts().architecture);
        }
        Err(error) => println!("probe: {error}"),
    }
}

/// Copies the simulated driver without one of its functions.
pub(crate) fn without(symbol: &str, folder: &Path) -> PathBuf {
    let mut library = fs::read(library_path()).unwrap();
    // Names stand between zeroes in the table of symbols. One that begins otherwise is not found under either name.
    let name = format!("\0{symbol}\0");
    let mut found = 0;
    while let Some(at) = library.windows(name.len()).position(|bytes| bytes == name.as_bytes()) {
        library[at + 1] = b'X';
        found += 1;
    }
    assert!(found > 0, "{symbol}");
    let path = folder.join("libdriver.so");
    fs::write(&path, library).unwrap();
    path
}

#[test]
fn a_machine_without_a_driver_says_what_was_tried() {
    let error = probe(Path::new("/nowhere/libdriver.so.1"), "");
    let expected = format!(
        "{}: no driver library found (tried /nowhere/libdriver.so.1); {}",
        vendor::FIRST,
        vendor::NO_DRIVER
    );
    assert!(error.starts_with(&expected), "{error}");
}

#[test]
fn a_library_that_is_no_driver_is_named_with_the_symbol_it_lacks() {
    let error = probe(Path::new("libc.so.6"), "");
    let expected =
        format!("{}: libc.so.6 lacks {}; the driver is too old", vendor::FIRST, vendor::FIRST_SYMBOL);
    assert!(error.starts_with(&expected), "{error}");
}

#[test]
fn a_driver_that_lacks_one_function_is_named_with_it() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let library = without(vendor::call::STREAM_CREATE, folder.path());
    let lacks = format!("libdriver.so lacks {}; the driver is too old", vendor::call::STREAM_CREATE);
    let error = probe(&library, "");
    assert!(error.contains(&lacks), "{error}");
}

#[test]
fn a_driver_without_what_newer_ones_have_loads_and_runs_all_the_same() {
    for symbol in vendor::OPTIONAL_SYMBOLS {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let found = probe(&without(symbol, folder.path()), "");
        assert!(found.starts_with("Simulated GPU 0, "), "{symbol}: {found}");
        assert!(found.len() > "Simulated GPU 0, ".len(), "{symbol}: {found}");
    }
}

#[test]
fn a_file_that_is_no_library_is_named_with_the_loaders_answer() {
    let error = probe(Path::new("/etc/passwd"), "");
    assert!(
        error.contains("/etc/passwd: invalid ELF header") || error.contains("/etc/passwd: file too short"),
        "{error}"
    );
}

#[test]
fn a_driver_without_devices_says_so() {
    let error = probe(&library_path(), "devices=0");
    assert!(vendor::NO_DEVICE.iter().any(|words| error.contains(words)), "{error}");
    let found = probe(&library_path(), "devices=1");
    assert!(found.starts_with("Simulated GPU 0, "), "{found}");
}
