//! Output for people: what it must say, not how.

use crate::{Ran, command, tensorhaul, tiny_llama};

#[test]
fn load_says_how_much_how_fast_and_through_what() {
    for engine in ["auto", "pread"] {
        let text = tensorhaul(["load", tiny_llama(), "--engine", engine]).ok();
        assert!(
            text.starts_with(&format!("{}: 24 tensors, 261,384 bytes on host\n", tiny_llama())),
            "{text}"
        );
        for word in
            ["GB/s", "hot", "cold", "staging", "promised", if engine == "auto" { "mmap" } else { "pread" }]
        {
            assert!(text.contains(word), "{word}: {text}");
        }
    }
    let text = tensorhaul(["load", tiny_llama(), "--checksum", "--tensor", "model.added_tokens.weight"]).ok();
    assert!(text.contains("2d06800538d394c2  model.added_tokens.weight\n"), "{text}");
}

#[test]
fn inspect_is_a_table_with_totals() {
    let text = tensorhaul(["inspect", tiny_llama()]).ok();
    let line = text.lines().find(|line| line.starts_with("model.embed_tokens.weight ")).unwrap();
    let columns: Vec<&str> = line.split("  ").map(str::trim).filter(|column| !column.is_empty()).collect();
    let expected =
        ["model.embed_tokens.weight", "BF16", "[384, 64]", "49,152", "model-00001-of-00002.safetensors"];
    assert_eq!(columns, expected);
    assert!(text.contains("24 tensors in 2 files, 261,384 bytes"), "{text}");
}

#[test]
fn plan_shows_reads_and_promises() {
    let text = tensorhaul(["plan", tiny_llama(), "--tensor", "lm_head.weight"]).ok();
    assert!(text.contains("payload") && text.contains("reads") && text.contains("lm_head.weight"), "{text}");
}

#[test]
fn what_passes_the_bound_on_reading_is_told_with_its_reason() {
    // Rank 0's columns of tiny-llama's row-parallel matrices are pieces of 32 bytes and more.
    let plan = |bound: &str, more: &[&str]| {
        let rank =
            ["plan", tiny_llama(), "--tp-size", "4", "--unmatched", "replicate", "--over-read-max", bound];
        tensorhaul([&rank[..], more].concat()).ok()
    };
    let reason = "bytes are too short to be read apart";
    assert!(plan("1.02", &["--tp-rank", "0"]).contains(reason));
    assert!(!plan("9", &["--tp-rank", "0"]).contains(reason), "so much may be read");
    let all = plan("1.02", &["--all-ranks"]);
    assert!(all.contains("read in vain for") && all.contains(reason), "{all}");
    let json: serde_json::Value = serde_json::from_str(&plan("1.02", &["--tp-rank", "0", "--json"])).unwrap();
    let over_reads = json["over_reads"].as_array().unwrap();
    let is_short = |over: &&serde_json::Value| over["reason"] == "short_pieces";
    let over = over_reads.iter().find(is_short).unwrap();
    assert!(over["over_bytes"].as_u64() > Some(0) && over["piece_len_bytes"].as_u64() < Some(512), "{over}");
    assert!(over["name"].as_str().unwrap().ends_with("proj.weight"), "{over}");
}

#[test]
fn doctor_names_every_device() {
    let text = tensorhaul(["doctor"]).ok();
    let words =
        ["kernel", "huge pages", "io_uring", "locked memory", "cachestat", "current folder", "mounted at"];
    for word in words.into_iter().chain(["driver", "host: works", "cuda", "rocm", "advice"]) {
        assert!(text.contains(word), "{word}: {text}");
    }
}

#[test]
fn doctor_says_once_why_there_is_no_driver() {
    let output = command(["doctor"]).env("TENSORHAUL_CUDA_LIBRARY", "/nowhere/libcuda.so.1").output();
    let text = Ran::new(output.expect("the command starts")).ok();
    assert_eq!(
        text.matches("/nowhere/libcuda.so.1").count(),
        text.matches("no driver library found").count()
    );
    assert_eq!(text.matches("no driver library found").count(), 1, "{text}");
    assert!(text.contains("cuda: does not work without its driver"), "{text}");
}

#[test]
fn doctor_looks_where_it_is_told() {
    let text = tensorhaul(["doctor", "/dev/shm", tiny_llama()]).ok();
    assert!(text.contains("/dev/shm (given) on tmpfs, mounted at /dev/shm: no direct reads"), "{text}");
    assert!(
        text.contains(&format!("{} (given)", tiny_llama())) && !text.contains("current folder"),
        "{text}"
    );
    assert!(tensorhaul(["doctor", "/no/such/folder"]).error(1).contains("/no/such/folder"));
}
