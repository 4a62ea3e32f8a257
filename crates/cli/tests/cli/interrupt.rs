//! Ctrl-C while files are written leaves none.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Ran, command, names};

/// A file of one tensor that is all hole: a conversion of it takes longer than the signal.
fn write_large_model(path: &Path) {
    let len_bytes = 1u64 << 30;
    let json =
        format!(r#"{{"w":{{"dtype":"F32","shape":[{}],"data_offsets":[0,{len_bytes}]}}}}"#, len_bytes / 4);
    fs::write(path, [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat()).unwrap();
    File::options().write(true).open(path).unwrap().set_len(8 + json.len() as u64 + len_bytes).unwrap();
}

#[test]
fn an_interrupted_conversion_leaves_no_file_and_no_folder() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("m.safetensors"), folder.path().join("out"));
    write_large_model(&model);
    let args = ["convert".as_ref(), model.as_os_str(), out.as_os_str(), "--cast".as_ref(), "bf16".as_ref()];
    let child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while !out.is_dir() || names(&out).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(60), "the conversion begins");
        thread::sleep(Duration::from_millis(5));
    }
    let kill = Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let line = Ran::new(child.wait_with_output().unwrap()).error(130);
    assert!(line.contains("cancelled"), "{line}");
    assert!(!out.exists());
}
