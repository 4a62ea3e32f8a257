//! What the command says of a machine with accelerators, over simulated drivers.

use std::path::PathBuf;

use crate::{Ran, command, tiny_llama};

/// Runs the command on a simulated machine, on which both vendors' libraries are the simulator.
fn on_machine(machine: &str, args: &[&str]) -> Ran {
    let mut command = command(args);
    for variable in ["CUDA", "HIP", "CUFILE", "HIPFILE"] {
        command.env(format!("TENSORHAUL_{variable}_LIBRARY"), simulator());
    }
    Ran::new(command.env("SIMGPU", machine).output().expect("the command starts"))
}

/// Cargo puts a package's dynamic library beside the tests that depend on it.
pub(crate) fn simulator() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().join("libsimgpu.so");
    assert!(path.exists(), "{}", path.display());
    path
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

#[test]
fn doctor_tells_which_devices_reach_each_other() {
    let folder = folder();
    let args = ["doctor", folder.path().to_str().unwrap()];
    let text = on_machine("devices=3;no_peer=0:2;no_peer=2:0", &args).ok();
    let rows = "\
peers              from  cuda:0  cuda:1  cuda:2  rocm:0  rocm:1  rocm:2
              to cuda:0  -       direct  ring    -       -       -
              to cuda:1  direct  -       direct  -       -       -
              to cuda:2  ring    direct  -       -       -       -
              to rocm:0  -       -       -       -       direct  ring
";
    assert!(text.contains(rows), "{text}");
    assert_eq!(text.matches("ring: the driver lets no copies through between the two").count(), 1, "{text}");

    let alone = on_machine("devices=1", &args).ok();
    assert!(!alone.contains("peers"), "{alone}");
    let args = ["doctor", "--json", args[1]];
    let value = on_machine("devices=2;no_peer=1:0", &args).json();
    let [first, second] = [0, 1].map(|device| &value["peers"][device]);
    assert_eq!((&first["device"], &first["from"][0]["device"]), (&"cuda:0".into(), &"cuda:1".into()));
    assert_eq!(first["from"][0]["works"], true, "{value}");
    assert_eq!(second["from"][0]["works"], false, "{value}");
    assert!(second["from"][0]["why"].is_string(), "{value}");
}

#[test]
fn doctor_tries_direct_storage_into_every_device() {
    let folder = folder();
    let path = folder.path().to_str().unwrap();
    let value = on_machine("devices=2", &["doctor", "--json", path]).json();
    let facts = value["direct_storage"].as_array().unwrap();
    let devices: Vec<_> = facts.iter().map(|fact| fact["device"].as_str().unwrap()).collect();
    assert_eq!(devices, ["cuda:0", "cuda:1", "rocm:0", "rocm:1"], "{value}");
    for fact in &facts[..2] {
        assert_eq!((&fact["works"], &fact["folders"][0]["works"]), (&true.into(), &true.into()), "{fact}");
    }
    assert_eq!(facts[2]["works"], false, "hipFile may fall back, and nothing forbids it: {value}");
    let text = on_machine("devices=2", &["doctor", path]).ok();
    assert!(text.contains("into cuda:0, cuda:1: cuFile 1.14 ("), "what is alike is told once: {text}");

    // What stands in the way of one device alone is told of that one.
    let text = on_machine("devices=2;fail=cuFileRead:2:5008", &["doctor", path]).ok();
    assert!(text.contains("into cuda:0: cuFile") && text.contains("into cuda:1: cuFile"), "{text}");
    let told = text.matches("cuFileRead returned 5008 (not supported on this file)").count();
    assert_eq!(told, 2, "of the one device, and once among the advice: {text}");
}

#[test]
fn doctor_tells_of_memory_that_is_shared_with_the_host() {
    let folder = folder();
    let path = folder.path().to_str().unwrap();
    let text = on_machine("integrated=1", &["doctor", path]).ok();
    assert!(text.contains("memory shared with the host"), "{text}");
    assert!(
        text.contains("into cuda:0: loads do not need it: reads land in memory that is shared"),
        "{text}"
    );
    let value = on_machine("integrated=1", &["doctor", "--json", path]).json();
    assert_eq!(value["devices"][1]["shares_memory"], true, "{value}");
    assert_eq!(value["direct_storage"][0]["needed"], false, "{value}");
    let value = on_machine("", &["doctor", "--json", path]).json();
    assert_eq!(value["devices"][1]["shares_memory"], false, "{value}");
}

#[test]
fn a_device_that_does_not_open_is_told_and_the_others_are_tried() {
    let folder = folder();
    let args = ["doctor", "--json", folder.path().to_str().unwrap()];
    let value = on_machine("devices=2;fail=cuDevicePrimaryCtxRetain:1:46", &args).json();
    let cuda = &value["devices"].as_array().unwrap()[1..3];
    assert_eq!(cuda.iter().filter(|device| device["works"] == true).count(), 1, "{value}");
    let refused = cuda.iter().find(|device| device["works"] == false).unwrap();
    assert!(refused["why"].as_str().unwrap().contains("cuDevicePrimaryCtxRetain failed with 46"), "{value}");
    let storage = value["direct_storage"].as_array().unwrap();
    assert_eq!(storage.iter().filter(|fact| fact["kind"] == "cuFile").count(), 1, "{value}");
}

#[test]
fn doctor_has_advice_for_what_does_not_work() {
    let folder = folder();
    let args = ["doctor", folder.path().to_str().unwrap()];
    let text = on_machine("fail=cuInit:1:802", &args).ok();
    assert!(text.contains("cuda: does not work: ") && !text.contains("cuda: not found"), "{text}");
    assert!(text.contains("the driver for cuda is installed and does not work: "), "{text}");
    let text = on_machine("devices=2;fail=cuDevicePrimaryCtxRetain:1:46", &args).ok();
    assert!(
        text.contains("another process has the device") && text.contains("-> end what else uses it"),
        "{text}"
    );
    let text = on_machine("devices=2;direct=0", &args).ok();
    assert_eq!(text.matches("direct storage by cuFile does not work (").count(), 1, "{text}");
    let value = on_machine("devices=2;direct=0", &[&args[..], &["--json"]].concat()).json();
    let advice = value["advice"].as_array().unwrap();
    assert!(
        advice.iter().any(|advice| advice["remedy"].as_str().unwrap().contains("use_pci_p2pdma")),
        "{value}"
    );
}

#[test]
fn a_device_that_is_lost_fails_the_selftest_with_the_promise_that_it_broke() {
    let args = ["doctor", "--selftest", "--device", "cuda:0"];
    // While it is examined, and while it is tried: nothing before that copies by rows.
    for (call, broken) in [
        ("cuMemcpyHtoDAsync_v2", "  the device opens: cuda:0: "),
        ("cuMemcpy2DAsync_v2", "  strided copies gather and scatter: cuda:0: "),
    ] {
        let ran = on_machine(&format!("fail={call}:1:700"), &args);
        assert_eq!(ran.code, Some(3), "{ran:?}");
        assert!(ran.stdout.contains("cuda:0: FAILED: ") && ran.stdout.contains(broken), "{ran:?}");
    }
    let ran = on_machine("fail=cuDevicePrimaryCtxRetain:1:46;fail=cuDevicePrimaryCtxRetain:2:46", &args[..2]);
    assert_eq!(ran.code, Some(3), "what does not open is not left out: {ran:?}");
}

#[test]
fn auto_tells_of_a_driver_that_fails_when_it_means_the_host() {
    let load = |machine: &str, args: &[&str]| {
        let value = on_machine(machine, &[&["load", tiny_llama(), "--json"], args].concat()).json();
        (value["device"].as_str().unwrap().to_owned(), value["fallbacks"].to_string())
    };
    for args in [&[][..], &["--device-map", "auto"]] {
        let (device, told) = load("fail=cuInit:1:802;fail=hipInit:1:3", args);
        assert_eq!(device, "host", "{told}");
        assert!(
            told.contains("because cuda was passed over") && told.contains("nvidia-fabricmanager"),
            "{told}"
        );
        assert!(told.contains("because rocm was passed over"), "{told}");
    }
    let (device, told) = load("fail=cuInit:1:802", &[]);
    assert!(device == "rocm:0" && !told.contains("passed over"), "{told}");
    let (device, told) = load("fail=cuInit:1:802;fail=hipInit:1:3", &["--device", "host"]);
    assert!(device == "host" && !told.contains("passed over"), "{told}");
}

#[test]
fn doctor_tells_which_devices_have_kernels() {
    let folder = folder();
    let path = folder.path().to_str().unwrap();
    let text = on_machine("", &["doctor", path]).ok();
    assert_eq!(text.matches("kernels built in").count(), 2, "{text}");
    let machine = "fail=cuModuleLoadData:1:218;gfx=gfx906;fail=hiprtcCompileProgram:1:6";
    let value = on_machine(machine, &["doctor", "--json", path]).json();
    for (device, known) in [(1, "sm_80 and newer"), (2, "gfx90a")] {
        let kernels = &value["devices"][device]["kernels"];
        assert_eq!(kernels["works"], false, "{value}");
        assert!(kernels["why"].as_str().unwrap().contains(known), "{kernels}");
    }
    let text = on_machine("gfx=gfx906", &["doctor", path]).ok();
    assert!(text.contains("kernels compiled on this machine (this build has none for gfx906"), "{text}");
}

#[test]
fn ranks_on_devices_of_one_process_miss_no_copies_of_each_other() {
    let args = ["load", tiny_llama(), "--json", "--unmatched", "replicate", "--tp-devices", "cuda:0,cuda:1"];
    for machine in ["devices=2", "devices=2;peers=0"] {
        let value = on_machine(machine, &args).json();
        assert_eq!(value["devices"].as_array().unwrap().len(), 2, "{value}");
        assert_eq!(value["fallbacks"].as_array().unwrap().len(), 0, "{machine}: {value}");
    }
}
