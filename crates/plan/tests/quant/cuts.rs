//! Parts of quantized tensors: which bytes, and which slices of what is stored.
#![expect(clippy::single_range_in_vec_init, reason = "a slice of one dimension is one range")]

use std::fmt::Write;
use std::ops::Range;

use proptest::prelude::*;
use tensorhaul_plan::Dtype::*;
use tensorhaul_plan::quant::{Group, Role, Window};

use super::{Found, Model};

/// Whatever was recognised can be cut anywhere, and nothing that the cut recipe reads lies outside the parts.
pub(crate) fn check(found: &Found, group: &Group) -> Result<(), TestCaseError> {
    let recipe = &group.recipe;
    let parts = |len: u64| [0..len, 0..len / 2, len / 2..len, len / 3..(len / 3 + 1).min(len)];
    for batch in parts(recipe.batch) {
        for rows in parts(recipe.rows) {
            for cols in parts(recipe.cols) {
                let window = Window { batch: batch.clone(), rows: rows.clone(), cols };
                let cut = group.cut(&found.checkpoint, &window);
                let cut = cut.map_err(|error| TestCaseError::fail(format!("{error}: {}", found.text())))?;
                for role in Role::READ {
                    let member = cut.members.iter().find(|member| member.role == role);
                    let least = cut.recipe.source_len_bytes(role);
                    let found_len = member.map(|member| member.len_bytes());
                    prop_assert!(least <= found_len, "{role:?} of {window:?}: {}", found.text());
                }
                for member in &cut.members {
                    let len_bytes = found.checkpoint.tensor(member.tensor).info.len_bytes();
                    let pieces = member.pieces().expect("it lies inside");
                    let end = pieces.offsets_bytes().last().map_or(0, |last| last + pieces.piece_len_bytes());
                    prop_assert!(end <= len_bytes && pieces.len_bytes() == member.len_bytes());
                }
                _ = group.stored_slices(&found.checkpoint, &window);
            }
        }
    }
    Ok(())
}

/// Prints a rank's slices, or why there are none.
fn stored(found: &Found, ranges: &[Range<u64>]) -> String {
    let group = found.group();
    let window = match group.window(ranges) {
        Ok(window) => window,
        Err(error) => return format!("{error}\n"),
    };
    match group.stored_slices(&found.checkpoint, &window) {
        Err(error) => format!("{error}\n"),
        Ok(slices) => slices.iter().fold(String::new(), |mut text, (id, slice)| {
            let name = found.checkpoint.tensor(*id).info.name;
            let ranges: Vec<String> = slice.ranges().iter().map(|range| range.to_string()).collect();
            writeln!(text, "{name} [{}]", ranges.join(", ")).expect("a String takes every write");
            text
        }),
    }
}

/// Snapshots what a rank gets of each model.
macro_rules! snapshot {
    ($name:literal, $($title:literal: $model:expr => $([$($range:expr),*]),*;)*) => {{
        let mut text = String::new();
        $(
            let found = $model.recognize();
            $(
                let ranges: &[Range<u64>] = &[$($range),*];
                writeln!(text, "# {} {ranges:?}\n{}", $title, stored(&found, ranges)).expect("a String takes every write");
            )*
        )*
        insta::assert_snapshot!($name, text);
    }};
}

fn gptq(symmetric: bool, with_index: bool) -> Model {
    let mut model = Model::new(&[
        ("a.qweight", I32, &[32, 64]),
        ("a.qzeros", I32, &[4, 8]),
        ("a.scales", F16, &[4, 64]),
    ])
    .config(&format!(
        r#"{{"quant_method":"gptq","bits":4,"group_size":64,"sym":{symmetric},"checkpoint_format":"gptq"}}"#
    ))
    .value("a.qzeros", [0x77; 128]);
    if with_index {
        model.tensors.push(("a.g_idx".to_owned(), I32, vec![256]));
        model = model.value("a.g_idx", (0..256u32).flat_map(|k| (k % 4).to_le_bytes()).collect::<Vec<_>>());
    }
    model
}

fn compressed_tensors() -> Model {
    Model::new(&[
        ("a.weight_shape", I64, &[2]),
        ("a.weight_packed", I32, &[64, 32]),
        ("a.weight_scale", Bf16, &[64, 2]),
        ("a.weight_zero_point", I32, &[8, 2]),
    ])
    .value("a.weight_shape", [64i64.to_le_bytes(), 256i64.to_le_bytes()].concat())
    .config(
        r#"{"quant_method":"compressed-tensors","format":"pack-quantized","config_groups":{"group_0":{"targets":["Linear"],
        "weights":{"num_bits":4,"type":"int","symmetric":false,"strategy":"group","group_size":128}}}}"#,
    )
}

#[test]
fn packed_tensors_are_handed_over_in_whole_words_and_groups() {
    let fp8 =
        |scale: &[u64]| Model::new(&[("a.weight", F8E4m3, &[256, 384]), ("a.weight_scale_inv", F32, scale)]);
    let blocks = r#"{"quant_method":"fp8","weight_block_size":[128,128]}"#;
    let gpt_oss = || {
        Model::new(&[("e.down_proj_blocks", U8, &[4, 64, 6, 16]), ("e.down_proj_scales", U8, &[4, 64, 6])])
    };
    let tiles = || {
        Model::new(&[
            ("a.weight", U8, &[256, 160]),
            ("a.weight_scale", F8E4m3, &[256, 20]),
            ("a.weight_scale_2", F32, &[]),
        ])
        .metadata("_quantization_metadata", r#"{"layers":{"a":{"format":"nvfp4"}}}"#)
    };
    let state = r#"{"quant_type":"nf4","blocksize":64,"dtype":"bfloat16","shape":[64,192]}"#;
    let bitsandbytes = || {
        Model::new(&[
            ("a.weight", U8, &[6144, 1]),
            ("a.weight.absmax", F32, &[192]),
            ("a.weight.quant_map", F32, &[16]),
            ("a.weight.quant_state.bitsandbytes__nf4", U8, &[state.len() as u64]),
        ])
        .value("a.weight.quant_state.bitsandbytes__nf4", state)
    };
    snapshot!("stored_slices",
        "GPTQ": gptq(false, false) => [32..64], [0..64, 128..256], [4..64], [0..64, 100..256], [0..64, 32..64];
        "GPTQ, symmetric": gptq(true, false) => [32..64], [0..64, 128..256], [4..64];
        "GPTQ, act-order": gptq(false, true) => [32..64], [0..64, 8..128];
        "AWQ": Model::new(&[("a.qweight", I32, &[256, 8]), ("a.qzeros", I32, &[2, 8]), ("a.scales", F16, &[2, 64])])
            => [32..64], [0..64, 128..256], [0..20];
        "FP8, tensor": fp8(&[]) => [17..99], [0..256, 7..8];
        "FP8, rows": fp8(&[256, 1]) => [17..99], [0..256, 7..8];
        "FP8, blocks": fp8(&[2, 3]).config(blocks) => [128..256], [0..256, 128..384], [64..128], [0..256, 0..192];
        "compressed-tensors": compressed_tensors() => [32..64], [0..64, 128..256], [0..4], [0..64, 64..128];
        "gpt-oss": gpt_oss() => [1..3], [0..4, 32..64], [0..4, 0..64, 32..128], [0..4, 0..64, 16..64];
        "NVFP4 in tiles": tiles() => [128..256], [0..256, 64..128], [0..100];
        "bitsandbytes": bitsandbytes() => [32..64], [0..64, 64..128];
        "ModelOpt INT4": Model::new(&[("a.weight", U8, &[32, 256]), ("a.weight_scale", F32, &[64, 2]), ("a.pre_quant_scale", Bf16, &[256])])
            .file("hf_quant_config.json", r#"{"quantization":{"quant_algo":"W4A16_AWQ","group_size":128}}"#)
            => [32..64], [0..64, 128..256], [31..64];
        "MLX": Model::new(&[("a.weight", U32, &[16, 16]), ("a.scales", Bf16, &[16, 2]), ("a.biases", Bf16, &[16, 2])])
            .file("config.json", r#"{"quantization":{"group_size":64,"bits":4}}"#)
            => [8..16], [0..16, 64..128];
    );
}

#[test]
fn a_cut_reads_what_covers_it() {
    let bytes = |model: Model, ranges: &[Range<u64>]| {
        let found = model.recognize();
        let window = found.group().window(ranges).expect("a window");
        let cut = found.group().cut(&found.checkpoint, &window).expect("a cut");
        let lens: Vec<(Role, u64)> =
            cut.members.iter().map(|member| (member.role, member.len_bytes())).collect();
        (lens, cut.recipe.first_row, cut.recipe.first_col)
    };
    // Half of the rows is half of all bytes.
    let half = [(Role::Payload, 32 * 32 * 4), (Role::Scale, 4 * 32 * 2), (Role::ZeroPoint, 4 * 16)];
    assert_eq!(bytes(gptq(false, false), &[32..64]).0, half.map(|(role, len)| (role, len)));
    // Columns 100 to 131 are in words 12 to 16, and in groups 1 and 2; column 100 is the fifth of its word.
    let covered = [(Role::Payload, 5 * 64 * 4), (Role::Scale, 2 * 64 * 2), (Role::ZeroPoint, 2 * 32)];
    assert_eq!(bytes(gptq(false, false), &[0..64, 100..132]), (covered.to_vec(), 0, 4));
    // Rows 10 to 19 are in words 1 and 2 of zero-points, whose rows scales follow.
    let covered = [(Role::Payload, 32 * 10 * 4), (Role::Scale, 4 * 12 * 2), (Role::ZeroPoint, 4 * 8)];
    assert_eq!(bytes(gptq(false, false), &[10..20]), (covered.to_vec(), 0, 0));
    // A group index counts the groups of the whole tensor.
    let indexed = [
        (Role::Payload, 16 * 64 * 4),
        (Role::Scale, 4 * 64 * 2),
        (Role::ZeroPoint, 4 * 32),
        (Role::GroupIndex, 512),
    ];
    let (mut found, ..) = bytes(gptq(false, true), &[0..64, 128..256]);
    found.sort();
    assert_eq!(found, {
        let mut indexed = indexed.to_vec();
        indexed.sort();
        indexed
    });
    // Of gpt-oss' blocks of 32 columns, 360 columns from 360 on are bytes 180 to 359, in scales 11 to 22.
    let gpt_oss = || {
        Model::new(&[("e.down_proj_blocks", U8, &[2, 8, 90, 16]), ("e.down_proj_scales", U8, &[2, 8, 90])])
    };
    let bytes_of_rank = [(Role::Payload, 2 * 8 * 180), (Role::Scale, 2 * 8 * 12)];
    assert_eq!(bytes(gpt_oss(), &[0..2, 0..8, 360..720]), (bytes_of_rank.to_vec(), 0, 0));
}

#[test]
fn what_cannot_be_cut_says_what_can() {
    let found = gptq(false, false).recognize();
    let error = |ranges: &[Range<u64>]| found.group().window(ranges).unwrap_err().to_string();
    assert_eq!(error(&[0..65]), r#"tensor "a.weight": 0..65 leaves its 64 elements of dimension 0"#);
    assert_eq!(error(&[0..1, 0..1, 0..1]), r#"tensor "a.weight": the slice has 3 dimensions, the tensor 2"#);
    let window = Window { batch: 0..1, rows: 0..64, cols: 0..257 };
    let error = found.group().cut(&found.checkpoint, &window).unwrap_err().to_string();
    assert_eq!(error, r#"tensor "a.weight": 0..257 leaves its 256 columns"#);

    // Another checkpoint's tensors, which are too short.
    let shorter =
        Model::new(&[("a.qweight", I32, &[8, 64]), ("a.qzeros", I32, &[1, 8]), ("a.scales", F16, &[1, 64])]);
    let error =
        found.group().cut(&shorter.checkpoint(), &Window::all(found.group())).unwrap_err().to_string();
    assert_eq!(
        error,
        r#"tensor "a.qweight": its 2048 bytes are not laid out as "a.weight" needs them (8192 bytes, in lines of equal length)"#
    );

    let hqq = Model::new(&[
        ("a.W_q", U8, &[64, 64]),
        ("a.scale", F16, &[128, 1]),
        ("a.zero", F16, &[128, 1]),
        ("a.nbits", I32, &[1]),
        ("a.group_size", I32, &[1]),
        ("a.shape", I64, &[2]),
    ])
    .value("a.nbits", 4u32.to_le_bytes())
    .value("a.group_size", 64u32.to_le_bytes())
    .value("a.shape", [64u64.to_le_bytes(), 128u64.to_le_bytes()].concat())
    .recognize();
    assert_eq!(
        hqq.group().window(&[0..64, 64..128]).unwrap_err().to_string(),
        r#"tensor "a.weight": [0..64, 64..128] is no rectangle of its 128 by 64 packed codes; whole rows at multiples of 1 would work, or cutting the dequantized tensor"#
    );
}
