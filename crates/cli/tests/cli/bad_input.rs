//! Bad inputs and bad command lines: one line that says what is wrong, and the code that says whose move it is.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::{copy_of_tiny_llama, tensorhaul, tiny_llama, write_model};

fn load(path: &Path) -> crate::Ran {
    tensorhaul(["load".as_ref(), path.as_os_str()])
}

#[test]
fn a_missing_path_is_the_inputs_fault() {
    let line = tensorhaul(["load", "/no/such/model"]).error(1);
    assert!(line.contains("/no/such/model") && line.contains("No such file"), "{line}");
    assert!(tensorhaul(["inspect", "org/not-in-the-cache"]).error(1).contains("org/not-in-the-cache"));
}

#[test]
fn a_folder_without_weights_is_the_inputs_fault() {
    let folder = tempfile::tempdir().unwrap();
    let line = load(folder.path()).error(1);
    assert!(line.contains("no .safetensors file"), "{line}");
}

#[test]
fn a_fifo_is_refused_and_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("model.safetensors");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let line = load(&fifo).error(1);
    assert!(line.contains("model.safetensors") && line.contains("FIFO"), "{line}");
}

#[test]
fn an_empty_file_and_one_of_noise_are_malformed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    fs::write(&file, "").unwrap();
    load(&file).error(1);
    fs::write(&file, [0xff; 100]).unwrap();
    let line = load(&file).error(1);
    assert!(line.starts_with(&file.display().to_string()), "{line}");
}

#[test]
fn a_truncated_file_names_file_tensor_and_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_of_tiny_llama(folder.path());
    let file = model.join("model-00002-of-00002.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 100]).unwrap();
    for command in ["load", "inspect", "plan"] {
        let line = tensorhaul([command.as_ref(), model.as_os_str()]).error(1);
        for word in
            ["model-00002-of-00002.safetensors", "model.layers.1.mlp.down_proj.weight", "132840", "132740"]
        {
            assert!(line.contains(word), "{word}: {line}");
        }
    }
}

#[test]
fn a_name_with_control_characters_does_not_reach_the_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    write_model(&file, r#""a\u001b[31m\n":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#, 4);
    let shown = tensorhaul(["inspect".as_ref(), file.as_os_str()]).ok();
    assert!(shown.contains(r"a\u{1b}[31m\n") && !shown.contains('\u{1b}'), "{shown}");
    let shown = tensorhaul(["plan".as_ref(), file.as_os_str()]).ok();
    assert!(!shown.contains('\u{1b}'), "{shown}");
    write_model(&file, r#""a\u001b[31m\n":{"dtype":"U8","shape":[5],"data_offsets":[0,4]}"#, 4);
    let line = load(&file).error(1);
    assert!(!line.contains('\u{1b}'), "{line}");
}

#[test]
fn requests_for_what_is_not_there_are_the_command_lines_fault() {
    let error = |args: &[&str]| tensorhaul([&["load", tiny_llama()], args].concat()).error(2);
    assert!(error(&["--tensor", "no.such.*"]).contains("no.such.*"));
    assert!(error(&["--tensor", "a[b"]).contains("not a glob"));
    assert!(error(&["--staging", "0"]).contains("4096"));
    assert!(error(&["--staging", "4095"]).contains("4096"));
    assert!(tensorhaul(["plan", tiny_llama(), "--tensor", "no.such.*"]).error(2).contains("no.such.*"));
    assert!(error(&["--device-map", "auto", "--devices", "tpu"]).contains("tpu"));
    assert!(error(&["--devices", "host"]).contains("--device-map"));
    // A device that is not there is the machine's affair.
    assert!(tensorhaul(["load", tiny_llama(), "--device", "cuda:99"]).error(3).contains("cuda:99: "));
    assert!(tensorhaul(["load", tiny_llama(), "--device", "rocm:99"]).error(3).contains("rocm:99: "));
}

#[test]
fn a_command_line_that_cannot_be_read_exits_with_2() {
    let bare = tensorhaul([""; 0]);
    assert_eq!((bare.code, bare.stdout.as_str()), (Some(2), ""), "{bare:?}");
    assert!(bare.stderr.contains("Usage:"), "{bare:?}");
    let bad: &[&[&str]] = &[
        &["load"],
        &["fly", tiny_llama()],
        &["load", tiny_llama(), "--engine", "steam"],
        &["load", tiny_llama(), "--device", "tpu"],
        &["load", tiny_llama(), "--staging", "lots"],
        &["load", tiny_llama(), "--threads", "0"],
        &["load", tiny_llama(), "--in-place", "maybe"],
        &["load", tiny_llama(), "--gds", "maybe"],
        &["load", tiny_llama(), "--over-read-max", "0.9"],
        &["plan", tiny_llama(), "--over-read-max", "inf"],
        &["convert", tiny_llama(), "out", "--over-read-max", "much"],
        &["verify", tiny_llama()],
        &["verify", tiny_llama(), "--manifest", "a", "--write-manifest", "b"],
        &["convert", tiny_llama()],
        &["convert", tiny_llama(), "out", "--cast", "i8"],
        &["completions", "cobol"],
    ];
    for args in bad {
        let line = tensorhaul(*args).error(2);
        assert!(line.ends_with("see --help") && !line.contains("Usage:"), "{args:?}: {line}");
    }
    let line = tensorhaul(["load", tiny_llama(), "--engine", "steam"]).error(2);
    assert!(line.contains("'steam'") && line.contains("io-uring"), "{line}");
    let line = tensorhaul(["plan", tiny_llama(), "--over-read-max", "0.5"]).error(2);
    assert!(line.contains("'0.5'") && line.contains("a number from 1 on, such as 1.02"), "{line}");
}

#[test]
fn stdout_is_empty_when_json_was_asked_for_and_something_is_wrong() {
    for command in ["inspect", "plan", "load"] {
        tensorhaul([command, "/no/such/model", "--json"]).error(1);
    }
    tensorhaul(["load", tiny_llama(), "--staging", "0", "--json"]).error(2);
}

#[test]
fn direct_storage_that_is_required_of_the_host_exits_with_2() {
    let line = tensorhaul(["load", tiny_llama(), "--device", "host", "--gds", "required"]).error(2);
    assert!(line.contains("direct storage is required, and reads into devices"), "{line}");
}
