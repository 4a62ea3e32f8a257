//! No driver, no device, a library that is something else: errors with the likely cause, in processes of their own.

use std::process::Command;

use crate::sim::library_path;

/// Runs the probe below with another driver library, and returns what it printed.
fn probe(library: &str, simgpu: &str) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "missing::probe_in_a_process_of_its_own", "--nocapture", "--ignored"])
        .env(tensorhaul_cuda::LIBRARY_VARIABLE, library)
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
    match tensorhaul_cuda::open(0) {
        Ok(device) => println!("probe: {}", device.facts().name),
        Err(error) => println!("probe: {error}"),
    }
}

#[test]
fn a_machine_without_a_driver_says_what_was_tried() {
    let error = probe("/nowhere/libcuda.so.1", "");
    assert!(
        error.starts_with(
            "cuda:0: no driver library found (tried /nowhere/libcuda.so.1); NVIDIA's driver is not installed"
        ),
        "{error}"
    );
}

#[test]
fn a_library_that_is_no_driver_is_named_with_the_symbol_it_lacks() {
    let error = probe("libc.so.6", "");
    assert!(error.starts_with("cuda:0: libc.so.6 lacks cuInit; the driver is too old"), "{error}");
}

#[test]
fn a_file_that_is_no_library_is_named_with_the_loaders_answer() {
    let error = probe("/etc/passwd", "");
    assert!(
        error.contains("/etc/passwd: invalid ELF header") || error.contains("/etc/passwd: file too short"),
        "{error}"
    );
}

#[test]
fn a_driver_without_devices_says_so() {
    let library = library_path().display().to_string();
    let error = probe(&library, "devices=0");
    assert!(error.contains("a driver is installed, but it sees no GPU"), "{error}");
    assert_eq!(probe(&library, "devices=1"), "Simulated GPU 0");
}
