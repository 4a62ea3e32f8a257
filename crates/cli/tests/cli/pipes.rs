//! Standard streams that are closed, full or read only in part.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::{Ran, command, tiny_llama, write_model};

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    // More than a pipe holds.
    let entry = |number: u32| {
        format!(r#""a.rather.long.name.{number}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)
    };
    write_model(&file, &(0..20_000).map(entry).collect::<Vec<_>>().join(","), 0);
    for more in [None, Some("--json")] {
        let args = ["inspect".as_ref(), file.as_os_str()].into_iter().chain(more.map(|more| more.as_ref()));
        let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut reader = BufReader::with_capacity(64, child.stdout.take().unwrap());
        reader.fill_buf().unwrap();
        drop(reader);
        let ran = Ran::new(child.wait_with_output().unwrap());
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    }
}

#[test]
fn a_full_disk_behind_stdout_is_the_machines_fault() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = command(["inspect", tiny_llama()]).stdout(full).output().unwrap();
    let line = Ran::new(output).error(3);
    assert!(line.contains("standard output"), "{line}");
}

#[test]
fn closed_streams_change_only_what_is_seen() {
    let closed = |redirections: &str, path: &str| {
        let script = format!("exec \"$0\" inspect \"$1\" {redirections}");
        let binary = env!("CARGO_BIN_EXE_tensorhaul");
        let mut shell = Command::new("sh");
        shell.args(["-c", &script, binary, path]).stdout(Stdio::null()).stderr(Stdio::null());
        shell.status().unwrap().code()
    };
    assert_eq!(closed("<&-", tiny_llama()), Some(0));
    assert_eq!(closed("<&- >&- 2>&-", tiny_llama()), Some(0));
    assert_eq!(closed("2>&-", "/no/such/model"), Some(1));
    assert_eq!(closed("2>/dev/full", "/no/such/model"), Some(1));
}

#[test]
fn progress_is_not_drawn_where_there_is_no_terminal() {
    let stderr = tempfile::NamedTempFile::new().unwrap();
    let args = ["load", tiny_llama(), "--engine", "pread"];
    let status = command(args).stdout(Stdio::null()).stderr(File::create(stderr.path()).unwrap()).status();
    assert!(status.unwrap().success());
    assert_eq!(std::fs::read_to_string(stderr.path()).unwrap(), "");
}
