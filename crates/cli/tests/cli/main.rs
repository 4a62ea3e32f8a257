//! The contract of the command line, as scripts see it: exit codes, stdout, stderr.
// A failed expectation is the test's own report, in its helpers too.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod bench;
mod cache;
mod convert;
mod help;
mod interrupt;
mod json;
mod pipes;
mod ranks;
mod share;
mod simulated;
mod text;
mod verify;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// What a run of the command left.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn new(output: Output) -> Ran {
        let text = |bytes| String::from_utf8(bytes).expect("the command prints UTF-8");
        Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Checks that it succeeded and said nothing on stderr, and returns stdout.
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""), "{self:?}");
        self.stdout
    }

    /// Checks that it succeeded and printed one JSON object on a line, and returns that.
    #[track_caller]
    fn json(self) -> Value {
        let stdout = self.ok();
        let value: Value = serde_json::from_str(&stdout).expect("stdout is JSON");
        assert!(value.is_object() && stdout.ends_with('\n') && stdout.lines().count() == 1, "{stdout}");
        value
    }

    /// Checks that it failed with this code, nothing on stdout and one line on stderr, and returns that line.
    #[track_caller]
    fn error(self, code: i32) -> String {
        assert_eq!((self.code, self.stdout.as_str()), (Some(code), ""), "{self:?}");
        assert_eq!(self.stderr.lines().count(), 1, "{self:?}");
        let line = self.stderr.trim_end().strip_prefix("error: ");
        line.unwrap_or_else(|| panic!("stderr begins with `error: `: {}", self.stderr)).to_owned()
    }
}

fn command<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tensorhaul"));
    command.args(args).stdin(Stdio::null());
    // Whatever launcher runs the tests.
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"] {
        command.env_remove(name);
    }
    command
}

fn tensorhaul<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Ran {
    Ran::new(command(args).output().expect("the command starts"))
}

/// The checkpoint in the repository: two shards, BF16, F32 and F8_E4M3, a scalar, an empty tensor.
fn tiny_llama() -> &'static str {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/models/tiny-llama")
}

/// Copies the checkpoint into a folder of the test's own.
fn copy_of_tiny_llama(folder: &Path) -> PathBuf {
    let copy = folder.join("model");
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(tiny_llama()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    copy
}

/// Writes a file of these entries, whose data is `len_bytes` bytes that count up.
fn write_model(path: &Path, entries: &str, len_bytes: usize) {
    let json = format!("{{{entries}}}");
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json.as_bytes());
    file.extend((0..len_bytes).map(|place| place as u8));
    fs::write(path, file).unwrap();
}

/// Reads every tensor of a folder's files with the reference reader.
fn read_by_reference(folder: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let mut tensors = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = fs::read(path).unwrap();
            for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let tensor = (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec());
                assert!(tensors.insert(name, tensor).is_none());
            }
        }
    }
    tensors
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
