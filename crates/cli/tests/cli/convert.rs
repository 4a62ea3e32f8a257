//! `convert`: the same tensors in other files, checked with the reference reader.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use crate::{copy_of_tiny_llama, names, read_by_reference, tensorhaul, tiny_llama, write_model};

fn convert(source: &Path, out: &Path, args: &[&str]) -> crate::Ran {
    let paths = ["convert".as_ref(), source.as_os_str(), out.as_os_str()];
    tensorhaul(paths.into_iter().chain(args.iter().map(|arg| arg.as_ref())))
}

#[test]
fn shards_hold_the_same_bytes_and_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("a/b/out");
    let report = convert(tiny_llama().as_ref(), &out, &["--max-shard-bytes", "60kB", "--json"]).json();
    let files = report["files"].as_array().unwrap();
    assert!(files.len() >= 5, "{files:?}");
    assert_eq!(read_by_reference(&out), read_by_reference(tiny_llama().as_ref()));
    let shown = tensorhaul(["inspect".as_ref(), out.as_os_str(), "--json".as_ref()]).json();
    assert_eq!(shown["totals"]["bytes"], 261_384);
    assert_eq!(shown["metadata"]["format"], "pt");
    for file in shown["file_details"].as_array().unwrap() {
        assert_eq!(file["data_start"].as_u64().unwrap() % 4096, 0);
    }
    let mut expected = names(tiny_llama().as_ref());
    expected.retain(|name| !name.ends_with(".safetensors"));
    let others: Vec<String> =
        names(&out).into_iter().filter(|name| !name.ends_with(".safetensors")).collect();
    assert_eq!(others, expected);
    let mode = fs::metadata(out.join("model.safetensors.index.json")).unwrap().permissions().mode();
    fs::write(folder.path().join("plain"), "").unwrap();
    assert_eq!(mode, fs::metadata(folder.path().join("plain")).unwrap().permissions().mode());
}

#[test]
fn there_and_back_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (wide, back) = (folder.path().join("wide"), folder.path().join("back"));
    let report = convert(tiny_llama().as_ref(), &wide, &["--cast", "f32", "--json"]).json();
    assert_eq!(report["tensors_cast"], 15);
    let kept = report["kept"].as_array().unwrap();
    assert_eq!(kept.len(), 2);
    assert!(
        kept.iter()
            .all(|kept| kept["dtype"] == "F8_E4M3" && kept["why"].as_str().unwrap().contains("weight_scale"))
    );
    assert!(fs::read_to_string(wide.join("config.json")).unwrap().contains("\"torch_dtype\": \"float32\""));

    let report = convert(&wide, &back, &["--cast", "bf16", "--json"]).json();
    let scales = report["kept"].as_array().unwrap().iter().filter(|kept| kept["dtype"] == "F32");
    assert_eq!(scales.count(), 2);
    let (before, after) = (read_by_reference(tiny_llama().as_ref()), read_by_reference(&back));
    assert_eq!(before.len(), after.len());
    for (name, (dtype, shape, bytes)) in &before {
        let cast = &after[name];
        assert_eq!(shape, &cast.1, "{name}");
        if dtype == "F32" && !name.ends_with("_scale") {
            assert_eq!(cast.0, "BF16", "{name}"); // The norms were F32 before.
        } else {
            assert_eq!((dtype, bytes), (&cast.0, &cast.2), "{name}");
        }
    }
}

#[test]
fn nothing_is_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_of_tiny_llama(folder.path());
    assert!(convert(&model, &model, &[]).error(2).contains("own folder"));
    let out = folder.path().join("out");
    convert(&model, &out, &[]).ok();
    let before = names(&out);
    assert!(convert(&model, &out, &[]).error(2).contains("model.safetensors"));
    assert_eq!(names(&out), before);

    let taken = folder.path().join("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("config.json"), "mine").unwrap();
    assert!(convert(&model, &taken, &[]).error(2).contains("config.json"));
    assert_eq!(fs::read(taken.join("config.json")).unwrap(), b"mine");
    assert_eq!(names(&taken), ["config.json"]);
    let file = taken.join("config.json");
    assert!(convert(&model, &file, &[]).error(2).contains("folder"));
}

#[test]
fn what_is_wrong_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    convert("/no/such/model".as_ref(), &out, &[]).error(1);
    assert!(convert(tiny_llama().as_ref(), &out, &["--max-shard-bytes", "0"]).error(2).contains("least"));
    assert!(!out.exists());
}

#[test]
fn a_folder_that_cannot_be_made_is_told() {
    // Nobody may make files here, not even root.
    let ran = convert(tiny_llama().as_ref(), "/proc/out".as_ref(), &[]);
    let code = ran.code.unwrap_or_default();
    assert!(matches!(code, 2 | 3), "{ran:?}");
    assert!(ran.error(code).contains("/proc/out"));
}

#[test]
fn a_tensor_larger_than_a_shard_gets_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("m.safetensors"), folder.path().join("out"));
    let entries = r#""big":{"dtype":"F16","shape":[50],"data_offsets":[0,100]},"small":{"dtype":"U8","shape":[3],"data_offsets":[100,103]}"#;
    write_model(&file, entries, 103);
    let report = convert(&file, &out, &["--max-shard-bytes", "10", "--json"]).json();
    assert_eq!(report["files"].as_array().unwrap().len(), 2);
    assert_eq!(read_by_reference(&out), read_by_reference(folder.path()));
    assert_eq!(names(&out).len(), 3);
}

#[test]
fn sidecars_come_along_unless_they_are_strangers() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_of_tiny_llama(folder.path());
    fs::write(model.join("tokenizer.json"), "{}").unwrap();
    fs::write(model.join("merges.txt"), "a b").unwrap();
    fs::write(model.join("pytorch_model.bin"), "pickle").unwrap();
    fs::create_dir(model.join("folder.json")).unwrap();
    fs::write(folder.path().join("secret.json"), "secret").unwrap();
    symlink("../secret.json", model.join("linked.json")).unwrap();
    let out = folder.path().join("out");
    let report = convert(&model, &out, &["--json"]).json();
    assert_eq!(names(&out), ["config.json", "merges.txt", "model.safetensors", "tokenizer.json"]);
    let left_out: Vec<_> =
        report["left_out"].as_array().unwrap().iter().map(|it| it["what"].clone()).collect();
    assert_eq!(left_out, ["pytorch_model.bin", "folder.json", "linked.json"]);

    // A file among strangers comes alone.
    fs::copy(out.join("model.safetensors"), folder.path().join("only.safetensors")).unwrap();
    let alone = folder.path().join("alone");
    convert(&folder.path().join("only.safetensors"), &alone, &[]).ok();
    assert_eq!(names(&alone), ["model.safetensors"]);
}
