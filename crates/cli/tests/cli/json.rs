//! `--json`: the keys that scripts read.

use serde_json::{Value, json};

use crate::{tensorhaul, tiny_llama};

#[track_caller]
fn assert_keys(value: &Value, keys: &[&str]) {
    for key in keys {
        assert!(value.get(key).is_some(), "{key} is missing in {value}");
    }
}

#[test]
fn inspect_lists_files_tensors_and_metadata() {
    let value = tensorhaul(["inspect", tiny_llama(), "--json"]).json();
    assert_eq!(
        value["files"],
        json!(["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    );
    let tensors = value["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 24);
    let embedding = tensors.iter().find(|tensor| tensor["name"] == "model.embed_tokens.weight").unwrap();
    let expected = json!({
        "name": "model.embed_tokens.weight",
        "dtype": "BF16",
        "shape": [384, 64],
        "file": "model-00001-of-00002.safetensors",
        "data_offsets": [0, 49152],
        "bytes": 49152,
    });
    assert_eq!(*embedding, expected);
    assert_eq!(value["metadata"], json!({"format": "pt"}));
}

#[test]
fn plan_promises() {
    let value = tensorhaul(["plan", tiny_llama(), "--json"]).json();
    assert_keys(&value, &["promised", "machine", "files", "arenas", "reads", "tensors"]);
    assert_eq!(value["promised"]["payload_bytes"], 261_384);
}

#[test]
fn load_reports_what_it_did_with_every_engine() {
    for engine in ["auto", "mmap", "pread", "io-uring"] {
        let value = tensorhaul(["load", tiny_llama(), "--engine", engine, "--checksum", "--json"]).json();
        let keys = [
            "bytes",
            "tensors",
            "seconds",
            "gb_per_s",
            "device",
            "engine",
            "bytes_hot",
            "bytes_cold",
            "peak_staging_bytes",
            "peak_host_bytes",
            "promised",
            "fallbacks",
            "checksums",
        ];
        assert_keys(&value, &keys);
        assert_eq!((&value["bytes"], &value["tensors"]), (&json!(261_384), &json!(24)));
        assert_eq!(value["device"], "host");
        assert_eq!(value["resident"], true);
        let (hot, cold) = (value["bytes_hot"].as_u64().unwrap(), value["bytes_cold"].as_u64().unwrap());
        assert_eq!(hot + cold, 261_384, "{engine}");
        assert!(value["promised"].is_object() && value["fallbacks"].is_array());
        assert_eq!(value["checksums"].as_object().unwrap().len(), 24);
        assert_eq!(value["checksums"]["model.added_tokens.weight"], "2d06800538d394c2"); // Of no bytes.
    }
}

#[test]
fn load_with_a_device_map_tells_what_was_whose() {
    let folder = tempfile::tempdir().unwrap();
    let map = folder.path().join("map.json");
    let load = |json: &str| {
        std::fs::write(&map, json).unwrap();
        tensorhaul([
            "load",
            tiny_llama(),
            "--device",
            "host",
            "--device-map",
            map.to_str().unwrap(),
            "--json",
        ])
    };
    let value = load(r#"{"model.layers": "cpu", "": "host"}"#).json();
    assert_eq!((&value["bytes"], &value["handover"]), (&json!(261_384), &json!("private")));
    let devices = value["devices"].as_array().unwrap();
    assert_eq!((devices.len(), &devices[0]["device"]), (1, &json!("host")));
    assert_eq!((&devices[0]["bytes"], &devices[0]["tensors"]), (&json!(261_384), &json!(24)));
    let text = load(r#"{"model.layers": "cpu", "nobody": "cpu", "": "cpu"}"#).error(2);
    assert!(text.ends_with("device map entry \"nobody\" is about none of the 24 tensors"), "{text}");
    let text = load(r#"{"model.layers": "cpu"}"#).error(2);
    assert!(text.contains("no entry of the device map is about "), "{text}");
    let text = load(r#"{"": 0}"#).error(1);
    assert!(text.contains("map.json: ") && text.contains("write cuda:0 or rocm:0"), "{text}");
    let args = ["load", tiny_llama(), "--device", "host", "--device-map", "auto", "--json"];
    assert_eq!(tensorhaul(args).json()["devices"][0]["tensors"], 24);
}

#[test]
fn load_has_checksums_only_when_asked() {
    let value = tensorhaul(["load", tiny_llama(), "--json"]).json();
    assert!(value.get("checksums").is_none());
}

#[test]
fn a_selection_loads_only_that() {
    let args = ["load", tiny_llama(), "--tensor", "*.q_proj.*", "--tensor", "lm_head.weight", "--json"];
    let value = tensorhaul(args).json();
    assert_eq!((&value["tensors"], &value["bytes"]), (&json!(3), &json!(2 * 8192 + 49152)));
}

#[test]
fn a_small_staging_ring_is_kept_to() {
    let args = [
        "load",
        tiny_llama(),
        "--engine",
        "pread",
        "--in-place",
        "off",
        "--staging",
        "64KiB",
        "--threads",
        "1",
    ];
    let value = tensorhaul(args.into_iter().chain(["--json"])).json();
    let peak = value["peak_staging_bytes"].as_u64().unwrap();
    assert!(peak > 0 && peak <= 64 << 10, "{peak}");
    assert_eq!(value["peak_staging_bytes"], value["promised"]["peak_staging_bytes"]);
}

#[test]
fn a_small_checkpoint_takes_a_ring_no_longer_than_its_reads() {
    let value = tensorhaul(["load", tiny_llama(), "--in-place", "off", "--json"]).json();
    let (used, promised) = (&value["peak_staging_bytes"], &value["promised"]["peak_staging_bytes"]);
    let promised = promised.as_u64().unwrap();
    // Two files, each one read, 261 kB together: buffers of 4 MiB would be 8.4 MB.
    assert!(promised > 0 && promised <= 2 * 261_384, "{promised}");
    assert!(used.as_u64().unwrap() <= promised, "{value}");
}

#[test]
fn doctor_states_facts() {
    let value = tensorhaul(["doctor", "--json"]).json();
    let keys =
        ["kernel", "cores", "memory_bytes", "page_bytes", "huge_pages", "io_uring", "cachestat", "folders"];
    assert_keys(&value, &keys);
    assert_keys(
        &value,
        &["locked_memory_limit_bytes", "open_files_limit", "drivers", "devices", "direct_storage", "advice"],
    );
    assert!(value["io_uring"]["works"].is_boolean());
    for (number, name) in ["cuda", "rocm"].into_iter().enumerate() {
        let driver = &value["drivers"][number];
        assert_eq!(driver["name"], name);
        assert_eq!(driver["works"].as_bool().unwrap(), driver["library"].is_string(), "{driver}");
    }
    assert!(value["folders"][0]["mount"].is_string());
}
