//! `verify`: a manifest is written once, and every later difference is found.

use std::fs;
use std::path::Path;

use crate::{copy_of_tiny_llama, tensorhaul};

fn verify(model: &Path, flag: &str, manifest: &Path, more: &[&str]) -> crate::Ran {
    let args = ["verify".as_ref(), model.as_os_str(), flag.as_ref(), manifest.as_os_str()];
    tensorhaul(args.into_iter().chain(more.iter().map(|arg| arg.as_ref())))
}

#[test]
fn a_model_is_as_its_manifest_until_a_byte_changes() {
    let folder = tempfile::tempdir().unwrap();
    let (model, manifest) = (copy_of_tiny_llama(folder.path()), folder.path().join("sums.json"));
    assert!(verify(&model, "--write-manifest", &manifest, &[]).ok().contains("24 tensors"));
    assert!(verify(&model, "--manifest", &manifest, &[]).ok().starts_with("ok: 24 tensors"));
    assert_eq!(verify(&model, "--manifest", &manifest, &["--json"]).json()["ok"], true);

    let file = model.join("model-00001-of-00002.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let ran = verify(&model, "--manifest", &manifest, &[]);
    assert_eq!(ran.code, Some(1));
    assert_eq!(ran.stdout.lines().count(), 1);
    assert!(
        ran.stdout.contains("model.layers.0.mlp.down_proj.weight") && ran.stdout.contains("xxh3-64"),
        "{ran:?}"
    );
    assert!(ran.stderr.starts_with("error: ") && ran.stderr.contains("1 tensor "), "{ran:?}");
    let ran = verify(&model, "--manifest", &manifest, &["--json"]);
    let value: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((ran.code, &value["ok"]), (Some(1), &false.into()));
    assert_eq!(value["differences"][0]["what"], "checksum");
}

#[test]
fn other_shards_are_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let (model, manifest) = (copy_of_tiny_llama(folder.path()), folder.path().join("sums.json"));
    let out = folder.path().join("out");
    verify(&model, "--write-manifest", &manifest, &[]).ok();
    let args = [
        "convert".as_ref(),
        model.as_os_str(),
        out.as_os_str(),
        "--max-shard-bytes".as_ref(),
        "50000".as_ref(),
    ];
    tensorhaul(args).ok();
    verify(&out, "--manifest", &manifest, &[]).ok();
}

#[test]
fn a_manifest_that_is_none_is_the_inputs_fault() {
    let folder = tempfile::tempdir().unwrap();
    let (model, manifest) = (copy_of_tiny_llama(folder.path()), folder.path().join("sums.json"));
    verify(&model, "--manifest", &manifest, &[]).error(1);
    let config = model.join("config.json");
    assert!(verify(&model, "--manifest", &config, &[]).error(1).contains("no manifest"));
    let head = r#"{"format":"tensorhaul-manifest","version":1,"algorithm":"xxh3-64","tensors":"#;
    let entry = r#""w":{"dtype":"U8","shape":[0],"bytes":0,"xxh3_64":"2d06800538d394c2"}"#;
    fs::write(&manifest, format!("{head}{{{entry},{entry}}}}}")).unwrap();
    assert!(verify(&model, "--manifest", &manifest, &[]).error(1).contains("twice"));
}

#[test]
fn a_manifest_replaces_a_manifest_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let (model, manifest) = (copy_of_tiny_llama(folder.path()), folder.path().join("sums.json"));
    verify(&model, "--write-manifest", &manifest, &[]).ok();
    verify(&model, "--write-manifest", &manifest, &[]).ok();
    let weights = model.join("model-00001-of-00002.safetensors");
    let before = fs::read(&weights).unwrap();
    verify(&model, "--write-manifest", &weights, &[]).error(2);
    assert_eq!(fs::read(&weights).unwrap(), before);
    verify(&model, "--write-manifest", &folder.path().join("no/folder.json"), &[]).error(2);
}
