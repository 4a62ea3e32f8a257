//! A model named by its Hugging Face id is found in the local cache, whose snapshots are links to blobs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::{Ran, command, names, read_by_reference, tiny_llama};

fn with_home<const N: usize>(home: &Path, args: [&str; N]) -> Ran {
    let mut command = command(args);
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"] {
        command.env_remove(name);
    }
    Ran::new(command.env("HF_HOME", home).output().unwrap())
}

fn cache_tiny_llama(home: &Path) {
    let model = home.join("hub/models--tiny--llama");
    let snapshot = model.join("snapshots/0123abcd");
    for folder in ["blobs", "refs", "snapshots/0123abcd"] {
        fs::create_dir_all(model.join(folder)).unwrap();
    }
    fs::write(model.join("refs/main"), "0123abcd").unwrap();
    for (number, name) in names(tiny_llama().as_ref()).into_iter().enumerate() {
        let blob = model.join(format!("blobs/{number}"));
        fs::copy(Path::new(tiny_llama()).join(&name), &blob).unwrap();
        symlink(format!("../../blobs/{number}"), snapshot.join(&name)).unwrap();
    }
}

#[test]
fn an_id_is_found_through_the_links_of_a_snapshot() {
    let home = tempfile::tempdir().unwrap();
    cache_tiny_llama(home.path());
    assert_eq!(with_home(home.path(), ["load", "tiny/llama", "--json"]).json()["tensors"], 24);
    assert!(with_home(home.path(), ["load", "tiny/other"]).error(1).contains("tiny/other"));
}

#[test]
fn a_cached_model_converts_with_its_sidecars() {
    let home = tempfile::tempdir().unwrap();
    cache_tiny_llama(home.path());
    let out = home.path().join("out");
    with_home(home.path(), ["convert", "tiny/llama", out.to_str().unwrap()]).ok();
    assert_eq!(names(&out), ["config.json", "model.safetensors"]);
    assert!(!out.join("config.json").is_symlink());
    assert_eq!(read_by_reference(&out), read_by_reference(tiny_llama().as_ref()));
}
