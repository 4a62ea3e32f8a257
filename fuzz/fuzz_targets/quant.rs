//! Recognition of quantized tensors answers for any configuration, header and small tensors.
//!
//! The input is a configuration, a zero byte, and a header's JSON; the data is as long as the header says, and small tensors hold
//! the input itself, over and over.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use tensorhaul_plan::quant::{Configs, Survey, Values};
use tensorhaul_plan::{Checkpoint, File, Header};

fuzz_target!(|input: &[u8]| {
    let Some(cut) = input.iter().position(|byte| *byte == 0) else { return };
    let (config, json) = (&input[..cut], &input[cut + 1..]);
    let file_len_bytes = 8 + json.len() as u64 + data_len_bytes(json);
    let Ok(header) = Header::parse(json, file_len_bytes) else { return };
    let checkpoint = Checkpoint::new(vec![File::new("m", header)]).expect("one file's names are its own");
    for file in Configs::FILES {
        let mut configs = Configs::none();
        configs.insert(file, config);
        match Survey::new(&checkpoint, &configs) {
            Ok(survey) => recognize(&checkpoint, &survey, input),
            Err(error) => check_text(&error.to_string()),
        }
    }
});

fn recognize(checkpoint: &Checkpoint, survey: &Survey, input: &[u8]) {
    let mut values = Values::none();
    for need in survey.needs() {
        let bytes: Vec<u8> = input.iter().copied().cycle().take(need.len_bytes as usize).collect();
        values.insert(need.tensor, bytes);
    }
    let quantization = survey.recognize(checkpoint, &values);
    for group in quantization.groups() {
        let recipe = &group.recipe;
        let numel = group.shape.iter().product::<u64>();
        assert_eq!(numel, recipe.batch * recipe.rows * recipe.cols, "{group:?}");
    }
    for refusal in quantization.refused() {
        check_text(&refusal.error.to_string());
    }
}

fn data_len_bytes(json: &[u8]) -> u64 {
    let Ok(Value::Object(entries)) = serde_json::from_slice(json) else { return 0 };
    let end = |entry: &Value| entry.get("data_offsets")?.get(1)?.as_u64();
    entries.values().filter_map(end).max().unwrap_or(0).min(u64::MAX >> 1)
}

/// An error is one line, however long the names are that it quotes.
fn check_text(text: &str) {
    assert!(text.len() < 10_000 && !text.contains('\n'), "{text}");
}
