//! `bench`: which rows there are and what they say of themselves; never how fast anything was.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{Ran, command, copy_of_tiny_llama, names, tensorhaul, tiny_llama};

/// A folder on a filesystem that is not in memory.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Each row has as many figures as runs, or says why not.
#[track_caller]
fn assert_row(row: &Value, runs: usize) {
    let measured = row["runs"].as_array().unwrap();
    assert!(measured.len() == runs || row["why"].is_string(), "{row}");
    assert_eq!(row["gb_per_s"].is_null(), measured.is_empty(), "{row}");
    for run in measured {
        assert!(run["bytes"].as_u64().unwrap() > 0 && run["seconds"].as_f64().unwrap() > 0.0, "{row}");
    }
    if let Some(speed) = row["gb_per_s"].as_object() {
        let [min, median, max] = ["min", "median", "max"].map(|key| speed[key].as_f64().unwrap());
        assert!(min <= median && median <= max, "{row}");
    }
}

#[test]
fn a_bench_of_a_model_has_ceilings_and_loads_with_every_run() {
    let folder = folder();
    let model = copy_of_tiny_llama(folder.path()); // Its pages are evicted; other tests want those of the original.
    let args = ["bench", model.to_str().unwrap(), "--device", "host", "--runs", "2", "--json"];
    let value = tensorhaul(args).json();
    for key in ["version", "kernel", "cores", "memory_bytes", "filesystem", "device"] {
        assert!(value["machine"].get(key).is_some(), "{key}: {value}");
    }
    assert_eq!(
        (&value["device"], &value["tensors"], &value["files"]),
        (&"host".into(), &24.into(), &2.into())
    );
    let names = |rows: &str| -> Vec<String> {
        let rows = value[rows].as_array().unwrap();
        rows.iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect()
    };
    let ceilings = ["direct read (io_uring)", "direct read (threads)", "cached read", "memory copy"];
    assert_eq!(names("ceilings"), ceilings);
    assert_eq!(names("loads"), ["cold load", "hot load"]);
    for row in value["ceilings"].as_array().unwrap().iter().chain(value["loads"].as_array().unwrap()) {
        assert_row(row, 2);
    }
    for load in value["loads"].as_array().unwrap() {
        for run in load["runs"].as_array().unwrap() {
            let report = &run["report"];
            let other = if load["name"] == "hot load" { "bytes_cold" } else { "bytes_hot" };
            assert_eq!((&report["handover"], &report["tensors"]), (&"private".into(), &24.into()));
            assert!(other == "bytes_hot" || report[other] == 0, "{load}");
        }
        assert_eq!(load["ceiling"].is_null(), load["ceiling_fraction"].is_null(), "{load}");
    }
    assert!(value["first_load"]["run"]["report"]["phases"]["prepare_seconds"].is_number());
    assert!(value["verdict"].as_str().unwrap().contains("cold load"), "{value}");
}

#[test]
fn the_text_is_a_table_and_closes_with_a_verdict() {
    let text = tensorhaul(["bench", tiny_llama(), "--device", "host", "--runs", "1"]).ok();
    assert!(text.starts_with(&format!("{}: 24 tensors, ", tiny_llama())), "{text}");
    for word in
        ["of ceiling", "CPU s/GB", "cached read", "memory copy", "first load", "cold", "hot", "fixed costs"]
    {
        assert!(text.contains(word), "{word}: {text}");
    }
    let last = text.lines().last().unwrap();
    assert!(last.starts_with("cold load ") && last.contains("; hot load "), "{last}");
}

#[test]
fn files_in_memory_have_no_cold_row_and_it_says_so() {
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let args = ["bench", "--size", "1MiB", "--device", "host", "--runs", "1", "--json", "--dir"];
    let args = args.map(AsRef::as_ref).into_iter().chain([shm.path().as_os_str()]);
    let value = tensorhaul(args).json();
    for row in [&value["ceilings"][0], &value["ceilings"][1], &value["loads"][0]] {
        assert_row(row, 0);
        assert_eq!(row["why"], "never cold: tmpfs keeps its files in memory", "{row}");
    }
    assert_eq!(value["first_load"]["cache"], "as-found");
    assert!(value["verdict"].as_str().unwrap().contains("cold load not measured: never cold"), "{value}");
}

#[test]
fn the_temporary_checkpoint_is_removed() {
    let folder = folder();
    let args = [
        "bench",
        "--size",
        "2MiB",
        "--device",
        "host",
        "--runs",
        "1",
        "--staging",
        "1MiB",
        "--in-place",
        "off",
    ];
    let ran = Ran::new(
        command(args.into_iter().chain(["--json", "--dir", "."]))
            .current_dir(folder.path())
            .output()
            .unwrap(),
    );
    let value = ran.json();
    assert!(value["files"].as_u64().unwrap() > 1, "{value}");
    let staged = value["loads"][1]["peak_staging_bytes"].as_u64();
    assert!(staged.is_none_or(|staged| staged > 0 && staged <= 1 << 20), "{value}");
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn an_interrupted_bench_removes_its_checkpoint() {
    let folder = folder();
    let args = ["bench", "--size", "64MiB", "--device", "host", "--runs", "1000", "--dir"];
    let args = args.map(AsRef::as_ref).into_iter().chain([folder.path().as_os_str()]);
    let child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let is_written = || {
        let folders = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
        folders.into_iter().any(|folder| folder.join("model.safetensors.index.json").exists())
    };
    let start = Instant::now();
    while !is_written() {
        assert!(start.elapsed() < Duration::from_secs(60), "the checkpoint is written");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status().unwrap().success());
    let line = Ran::new(child.wait_with_output().unwrap()).error(130);
    assert!(line.contains("cancelled"), "{line}");
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn what_cannot_be_measured_is_refused_in_one_line() {
    let folder = folder();
    let bench = |args: &[&str]| {
        Ran::new(command([&["bench"], args].concat()).current_dir(folder.path()).output().unwrap())
    };
    assert!(bench(&["/no/such/model"]).error(1).contains("/no/such/model"));
    assert!(
        bench(&["--size", "8000000TB"])
            .error(2)
            .contains("no room for a checkpoint of 8000000000000000000 bytes")
    );
    assert!(bench(&["--size", "0"]).error(2).contains("the least is 1048576"));
    assert!(bench(&["--dir", "no/such/folder", "--size", "1MiB"]).error(2).contains("no/such/folder"));
    assert!(bench(&["--dir", "/proc", "--size", "1MiB"]).error(2).contains("/proc"));
    assert!(bench(&["--runs", "0"]).error(2).contains("0 is not in 1..=1000"));
    assert!(bench(&[tiny_llama(), "--size", "1MiB"]).error(2).contains("cannot be used with"));
    assert!(bench(&[tiny_llama(), "--staging", "1"]).error(2).contains("4096"));
    assert!(bench(&[tiny_llama(), "--device", "cuda:99"]).error(3).contains("cuda:99"));
    assert_eq!(names(Path::new(folder.path())), [""; 0]);
}
