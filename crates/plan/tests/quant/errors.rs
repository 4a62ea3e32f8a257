//! What cannot be recognised: each error names the tensor or the key, what was found and what would fit.

use std::fmt::Write;

use tensorhaul_plan::Dtype::{self, *};
use tensorhaul_plan::quant::{Configs, QuantError, Survey, Values};

use super::Model;

/// Snapshots the error of each model.
macro_rules! errors {
    ($name:literal, $($title:literal => $model:expr),* $(,)?) => {{
        let mut text = String::new();
        $(writeln!(text, "# {}\n{}", $title, $model.error()).expect("a String takes every write");)*
        insta::assert_snapshot!($name, text);
    }};
}

#[test]
fn configurations_that_make_no_sense() {
    let config = |text: &str| Model::new(&[("a.qweight", I32, &[4, 8])]).config(text);
    let deep = format!("{}{}", "[".repeat(1000), "]".repeat(1000));
    errors!("errors_of_configurations",
        "no JSON" => Model::new(&[]).file("config.json", "{\"a\": nope}"),
        "empty" => Model::new(&[]).file("quantize_config.json", ""),
        "no object" => Model::new(&[]).file("config.json", "[1]"),
        "nested too deeply" => Model::new(&[]).file("config.json", &deep),
        "bits is a text" => config(r#"{"quant_method":"gptq","bits":"four"}"#),
        "bits is too much" => config(r#"{"quant_method":"gptq","bits":4e9}"#),
        "group size is negative" => config(r#"{"quant_method":"gptq","bits":4,"group_size":-7}"#),
        "look-ahead" => config(r#"{"quant_method":"gptq","bits":4,"dynamic":{"-:(?!a).*":{}}}"#),
        "a block of three" => config(r#"{"quant_method":"fp8","weight_block_size":[1,2,3]}"#),
        "a mode of MLX" => Model::new(&[]).file("config.json", r#"{"quantization":{"bits":4,"mode":"new"}}"#),
        "an unknown method" => config(r#"{"quant_method":"quip_sharp"}"#),
        "a repacked layout" => config(r#"{"quant_method":"gptq","checkpoint_format":"marlin"}"#),
        "sparse" => config(r#"{"quant_method":"compressed-tensors","format":"marlin-24"}"#),
        "AWQ's Marlin" => config(r#"{"quant_method":"awq","version":"marlin"}"#),
    );
}

#[test]
fn a_configuration_that_is_too_long_is_not_parsed() {
    let mut configs = Configs::none();
    configs.insert("config.json", vec![b' '; Configs::LEN_BYTES_MAX as usize + 1]);
    let error = Survey::new(&Model::new(&[]).checkpoint(), &configs).expect_err("too long");
    assert!(matches!(error, QuantError::ConfigTooLong { .. }), "{error}");
}

#[test]
fn gptq_and_awq_that_do_not_fit() {
    let model = |qweight: &[u64], qzeros: &[u64], scales: &[u64], config: &str| {
        Model::new(&[("a.qweight", I32, qweight), ("a.qzeros", I32, qzeros), ("a.scales", F16, scales)])
            .config(config)
    };
    let gptq = r#"{"quant_method":"gptq","bits":4,"group_size":128,"sym":false}"#;
    let awq = r#"{"quant_method":"awq","bits":4,"group_size":128}"#;
    let with = |mut model: Model, name: &str, dtype: Dtype, shape: &[u64]| {
        model.tensors.push((name.to_owned(), dtype, shape.to_vec()));
        model
    };
    let whole = || model(&[32, 64], &[2, 8], &[2, 64], gptq);
    errors!("errors_of_gptq_and_awq",
        "no scales" => Model::new(&[("a.qweight", I32, &[32, 64])]),
        "no zero-points" => Model::new(&[("a.qweight", I32, &[32, 64]), ("a.scales", F16, &[2, 64])]).config(gptq),
        "no codes" => Model::new(&[("a.qzeros", I32, &[2, 8]), ("b.weight", F8E4m3, &[1])]),
        "too few groups" => model(&[32, 64], &[1, 8], &[1, 64], gptq),
        "rows that differ" => model(&[32, 64], &[2, 8], &[2, 60], gptq),
        "zero-points of other rows" => model(&[32, 64], &[2, 7], &[2, 64], gptq),
        "scales of integers" => Model::new(&[
            ("a.qweight", I32, &[32, 64]), ("a.qzeros", I32, &[2, 8]), ("a.scales", I32, &[2, 64])]).config(gptq),
        "indices of other columns" => with(whole(), "a.g_idx", I32, &[100]),
        "words of 16 bits" => Model::new(&[
            ("a.qweight", I16, &[64, 64]), ("a.qzeros", I16, &[2, 16]), ("a.scales", F16, &[2, 64])]).config(gptq),
        "an unknown width" => model(&[32, 64], &[2, 8], &[2, 64], r#"{"quant_method":"gptq","bits":5}"#),
        "the weight is there too" => with(whole(), "a.weight", F16, &[64, 256]),
        "AWQ by its shapes" => model(&[256, 8], &[2, 8], &[2, 64], gptq),
        "GPTQ by its shapes" => model(&[32, 64], &[2, 8], &[2, 64], awq),
        "AWQ of 8 bits" => model(&[256, 16], &[2, 16], &[2, 128], r#"{"quant_method":"awq","bits":8}"#),
        "AWQ, groups that do not fit" => model(&[256, 8], &[3, 8], &[3, 64], awq),
        "AWQ, excluded" => model(&[256, 8], &[2, 8], &[2, 64],
            r#"{"quant_method":"awq","bits":4,"group_size":128,"modules_to_not_convert":["a"]}"#),
        "groups of unknown size" => model(&[36, 64], &[3, 8], &[3, 64], r#"{"quant_method":"gptq","bits":4,"sym":true}"#),
    );
}

#[test]
fn compressed_tensors_that_do_not_fit() {
    let config = r#"{"quant_method":"compressed-tensors","format":"pack-quantized","config_groups":{"g":{
        "targets":["Linear"],"weights":{"num_bits":4,"symmetric":false,"strategy":"group","group_size":128}}}}"#;
    let symmetric = config.replace("false", "true");
    let shape = |rows: i64, cols: i64| [rows.to_le_bytes(), cols.to_le_bytes()].concat();
    let model = |scale: &[u64]| {
        Model::new(&[
            ("a.weight_shape", I64, &[2]),
            ("a.weight_packed", I32, &[16, 32]),
            ("a.weight_scale", Bf16, scale),
        ])
    };
    errors!("errors_of_compressed_tensors",
        "no shape" => Model::new(&[("a.weight_packed", I32, &[16, 32]), ("a.weight_scale", Bf16, &[16, 2])]),
        "a shape of other rows" => model(&[16, 2]).config(&symmetric).value("a.weight_shape", shape(17, 256)),
        "a shape of other columns" => model(&[16, 2]).config(&symmetric).value("a.weight_shape", shape(16, 300)),
        "a negative shape" => model(&[16, 2]).config(&symmetric).value("a.weight_shape", shape(16, -1)),
        "scales of other groups" => model(&[16, 3]).config(&symmetric).value("a.weight_shape", shape(16, 256)),
        "no zero-points" => model(&[16, 2]).config(config).value("a.weight_shape", shape(16, 256)),
        "another format" => model(&[16, 2]).config(r#"{"quant_method":"compressed-tensors","config_groups":{"g":{
            "targets":["Linear"],"format":"nvfp4-pack-quantized","weights":{"num_bits":4}}}}"#),
        "no global scale" => Model::new(&[("a.weight_packed", U8, &[16, 32]), ("a.weight_scale", F8E4m3, &[16, 4])]),
        "excluded" => model(&[16, 2]).config(r#"{"quant_method":"compressed-tensors","ignore":["re:^a$"]}"#),
        "zero-points of other rows" => Model::new(&[
            ("a.weight_shape", I64, &[2]), ("a.weight_packed", I32, &[16, 64]), ("a.weight_scale", Bf16, &[16, 2]),
            ("a.weight_zero_point", I32, &[3, 2])])
            .value("a.weight_shape", shape(16, 256)).config(&config.replace(":4,", ":7,")),
    );
}

#[test]
fn floats_that_do_not_fit() {
    let fp8 = |scale: Dtype, shape: &[u64]| {
        Model::new(&[("a.weight", F8E4m3, &[256, 384]), ("a.weight_scale", scale, shape)])
    };
    let blocks = r#"{"quant_method":"fp8","weight_block_size":[128,128],"ignored_layers":["x"]}"#;
    errors!("errors_of_floats",
        "no scale" => Model::new(&[("a.weight", F8E4m3, &[4, 4])]).config(blocks),
        "blocks of unknown size" => fp8(F32, &[2, 3]),
        "blocks that do not fit" => fp8(F32, &[4, 3]).config(blocks),
        "scales of integers" => fp8(I32, &[256]),
        "scales of another shape" => fp8(F32, &[77]),
        "excluded" => fp8(F32, &[]).config(r#"{"quant_method":"fp8","ignored_layers":["a"]}"#),
        "a scale whose weight is missing" => Model::new(&[("a.weight_scale_inv", F32, &[2, 3]), ("b", F8E4m3, &[1])]),
        "NVFP4 without its global scale" => Model::new(&[("a.weight", U8, &[8, 16]), ("a.weight_scale", F8E4m3, &[8, 2])]),
        "NVFP4 with scales of other blocks" => Model::new(&[
            ("a.weight", U8, &[8, 16]), ("a.weight_scale", F8E4m3, &[8, 3]), ("a.weight_scale_2", F32, &[])]),
        "NVFP4 with a vector to fold that is too short" => Model::new(&[
            ("a.weight", U8, &[8, 16]), ("a.weight_scale", F8E4m3, &[8, 2]), ("a.weight_scale_2", F32, &[]),
            ("a.pre_quant_scale", F32, &[31])]),
        "NVFP4 whose scale is missing" => Model::new(&[("a.weight", U8, &[8, 16])])
            .file("hf_quant_config.json", r#"{"quantization":{"quant_algo":"NVFP4"}}"#),
        "MXFP4 with scales of other blocks" => Model::new(&[("a.weight", U8, &[8, 64]), ("a.weight_scale", U8, &[8, 3])]),
        "MXFP6 of either kind" => Model::new(&[("a.weight", U8, &[8, 24]), ("a.weight_scale", U8, &[8, 1])]),
        "blocks without scales" => Model::new(&[("a_blocks", U8, &[2, 4, 3, 16])]),
        "blocks with other scales" => Model::new(&[("a_blocks", U8, &[2, 4, 3, 16]), ("a_scales", U8, &[2, 4, 4])]),
        "INT4 with a second scale" => Model::new(&[
            ("a.weight", U8, &[8, 64]), ("a.weight_scale", F32, &[16, 1]), ("a.weight_scale_2", F32, &[])])
            .file("hf_quant_config.json", r#"{"quantization":{"quant_algo":"W4A8_AWQ","group_size":128}}"#),
        "fused experts of bytes" => Model::new(&[
            ("e.gate_up_proj", U8, &[4, 16, 32]), ("e.gate_up_proj_weight_scale", F8E4m3, &[4, 16, 4])]),
        "a codec of another format" => Model::new(&[("a.weight", U8, &[8, 74]), ("a.weight_scale", F32, &[])])
            .file("hf_quant_config.json", r#"{"quantization":{"quant_algo":"iq2_xs"}}"#),
    );
}

#[test]
fn self_describing_formats_that_do_not_fit() {
    let bnb = |json: &str, blocks: u64| {
        let len_bytes = [json.len() as u64];
        Model::new(&[
            ("a.weight", U8, &[64, 1]),
            ("a.weight.absmax", F32, &[blocks]),
            ("a.weight.quant_map", F32, &[16]),
            ("a.weight.quant_state.bitsandbytes__nf4", U8, &len_bytes),
        ])
        .value("a.weight.quant_state.bitsandbytes__nf4", json)
    };
    let hqq = |nbits: u32, cols: u64| {
        Model::new(&[
            ("a.W_q", U8, &[8, 16]),
            ("a.scale", F16, &[16, 1]),
            ("a.zero", F16, &[16, 1]),
            ("a.nbits", I32, &[1]),
            ("a.group_size", I32, &[1]),
            ("a.shape", I64, &[2]),
        ])
        .value("a.nbits", nbits.to_le_bytes())
        .value("a.group_size", 16u32.to_le_bytes())
        .value("a.shape", [16u64.to_le_bytes(), cols.to_le_bytes()].concat())
    };
    let mlx = r#"{"quantization":{"group_size":64,"bits":4,"b":false}}"#;
    let torchao =
        |kind: &str| Model::default().metadata("tensor_names", r#"["a.weight"]"#).metadata("a.weight", kind);
    errors!("errors_of_self_describing_formats",
        "bitsandbytes, no JSON" => bnb("{", 2),
        "bitsandbytes, an unknown type" => bnb(r#"{"quant_type":"nf3","blocksize":64,"shape":[16,8]}"#, 2),
        "bitsandbytes, another shape" => bnb(r#"{"quant_type":"nf4","blocksize":64,"shape":[16,9]}"#, 2),
        "bitsandbytes, too few scales" => bnb(r#"{"quant_type":"nf4","blocksize":64,"shape":[16,8]}"#, 1),
        "bitsandbytes, no description" => Model::new(&[("a.weight", U8, &[64, 1])])
            .config(r#"{"quant_method":"bitsandbytes","load_in_4bit":true}"#),
        "bitsandbytes, rows in another order" => Model::new(&[
            ("a.weight", I8, &[8, 16]), ("a.SCB", F32, &[8]), ("a.weight_format", U8, &[])]).value("a.weight_format", [1]),
        "HQQ, 7 bits" => hqq(7, 16),
        "HQQ, another shape" => hqq(4, 32),
        "HQQ, a shape beyond everything" => hqq(4, u64::MAX / 2),
        "MLX without a configuration" => Model::new(&[("a.weight", U32, &[16, 32]), ("a.scales", F16, &[16, 4])]),
        "MLX without biases" => Model::new(&[("a.weight", U32, &[16, 32]), ("a.scales", F16, &[16, 4])])
            .file("config.json", mlx),
        "MLX, scales of other groups" => Model::new(&[
            ("a.weight", U32, &[16, 32]), ("a.scales", F16, &[16, 5]), ("a.biases", F16, &[16, 5])])
            .file("config.json", mlx),
        "MLX, excluded" => Model::new(&[
            ("b.weight", U32, &[16, 32]), ("b.scales", F16, &[16, 4]), ("b.biases", F16, &[16, 4])])
            .file("config.json", mlx),
        "torchao, codes that are missing" => torchao(r#"{"_type":"Int8Tensor","_data":{}}"#),
        "torchao, no JSON" => torchao("nope"),
        "ComfyUI, a description that is none" => Model::new(&[
            ("a.weight", U8, &[16, 32]), ("a.weight_scale", F8E4m3, &[128, 4]), ("a.weight_scale_2", F32, &[]),
            ("a.comfy_quant", U8, &[2])]).value("a.comfy_quant", "{}"),
        "Quark without its configuration" => Model::new(&[("a.weight", I32, &[64, 8]), ("a.weight_scale", F32, &[2, 64])]),
    );
}

#[test]
fn layouts_that_are_known_and_not_supported_are_refused_by_name() {
    let two = |first: &str, second: &str| Model::new(&[(first, I16, &[4, 4]), (second, I16, &[4, 4])]);
    errors!("errors_of_foreign_layouts",
        "EXL3" => two("a.trellis", "a.suh"),
        "AQLM" => two("a.codes", "a.codebooks"),
        "Marlin" => two("a.B", "a.s"),
        "quanto" => two("a.weight._data", "a.weight._scale"),
        "sparse" => two("a.compressed", "a.bitmask"),
    );
    // A name alone is no format.
    assert!(Model::new(&[("decoder.codebooks", F32, &[4])]).recognize().quantization.is_empty());
}

#[test]
fn small_tensors_that_were_not_read_are_asked_for_again() {
    let model = Model::new(&[
        ("a.weight_shape", I64, &[2]),
        ("a.weight_packed", I32, &[16, 32]),
        ("a.weight_scale", Bf16, &[16, 2]),
    ]);
    let checkpoint = model.checkpoint();
    let survey = Survey::new(&checkpoint, &model.configs).expect("no configuration");
    assert_eq!(survey.needs().len(), 1);
    let quantization = survey.recognize(&checkpoint, &Values::none());
    let [refusal] = quantization.refused() else { panic!("{quantization:?}") };
    assert_eq!(refusal.error, QuantError::NotRead { tensor: "a.weight_shape".to_owned() });
    assert_eq!(quantization.refusal_of(refusal.tensor.expect("a tensor")), Some(&refusal.error));
}

#[test]
fn an_exclusion_list_that_cannot_be_read_is_a_warning() {
    let config = r#"{"quant_method":"compressed-tensors","ignore":["re:(?!a).*"]}"#;
    let found = Model::new(&[("a.weight", F8E4m3, &[4, 4]), ("a.weight_scale", F32, &[1])])
        .config(config)
        .recognize();
    assert_eq!(found.quantization.groups().len(), 1);
    assert_eq!(found.quantization.warnings().len(), 1, "{}", found.text());
}

#[test]
fn codes_with_scales_that_no_rule_reads_do_not_pass_for_numbers() {
    let refused = |codes: (&str, Dtype, &[u64]), scale: &str| {
        let found = Model::new(&[codes, (scale, F16, &[4])]).recognize();
        let [refusal] = found.quantization.refused() else {
            panic!("{} with {scale}: {}", codes.0, found.text());
        };
        let text = refusal.error.to_string();
        assert!(text.contains(codes.0) && text.contains(scale) && text.contains("as stored"), "{text}");
        assert!(found.quantization.groups().is_empty(), "{}", found.text());
    };
    refused(("a.weight", I8, &[4, 8]), "a.weight_scales");
    refused(("a.weight", I16, &[4, 8]), "a.scales");
    refused(("a.experts.up_packed", I32, &[2, 4, 8]), "a.experts.up_scale");
    refused(("a.experts.up_blocks", U8, &[4, 8]), "a.experts.up_scales");
    refused(("a.experts.up", U8, &[2, 4, 8]), "a.experts.up.absmax");
    // Floats too: unscaled they would be other numbers.
    refused(("a.weight", F8E4m3, &[4, 8]), "a.scales");
    refused(("a.experts.up", F8E4m3, &[2, 4, 8]), "a.experts.up_scales");
    refused(("a.experts.up", F4, &[2, 4, 8]), "a.experts.up_scale");
    refused(("a.weight", F4, &[4, 8]), "a.weight_scales");
}

#[test]
fn integers_beside_numbers_are_no_codes() {
    let found = Model::new(&[
        ("a.position_ids", I32, &[1, 8]),
        ("a.relative_position_index", I32, &[8, 8]),
        ("a.scale", F32, &[4]),
        ("b.mask", U8, &[8, 8]),
        ("b.weight", Bf16, &[8, 8]),
        ("b.scale", F32, &[4]),
        // The scale is the weight's, and the bias has none.
        ("c.bias", F8E4m3, &[8]),
        ("c.weight", F8E4m3, &[8, 8]),
        ("c.weight_scale", F32, &[]),
    ])
    .recognize();
    assert_eq!(found.quantization.refused(), [], "{}", found.text());
    assert_eq!(found.quantization.groups().len(), 2);
}

#[test]
fn experts_of_fp8_need_the_scale_that_the_configuration_promises() {
    let model = Model::new(&[("a.experts.gate_up_proj", F8E4m3, &[2, 4, 8])]);
    let text = model.config(r#"{"quant_method":"fp8","weight_block_size":[128,128]}"#).error();
    assert!(text.contains("\"a.experts.gate_up_proj_scale\" (scale)"), "{text}");
}

#[test]
fn eight_bit_integers_are_held_against_the_configuration() {
    let model = |groups: u64, weights: &str| {
        let tensors: [(&str, Dtype, &[u64]); 2] =
            [("a.weight", I8, &[4, 192]), ("a.weight_scale", Bf16, &[4, groups])];
        Model::new(&tensors).config(&format!(
            r#"{{"quant_method":"compressed-tensors","format":"int-quantized","config_groups":{{"group_0":
                {{"targets":["Linear"],"weights":{{"num_bits":8,"type":"int",{weights}}}}}}}}}"#
        ))
    };
    let by_group = r#""strategy":"group","group_size":128"#;
    // The last group is short; two of 96 columns would be other numbers.
    assert_eq!(model(2, by_group).recognize().group().group_size, Some(128));
    let text = model(3, by_group).error();
    assert!(text.contains("\"a.weight_scale\"") && text.contains("2 groups"), "{text}");
    let text = model(1, r#""strategy":"channel","symmetric":false"#).error();
    assert!(text.contains("\"a.weight_zero_point\" (zero-points)"), "{text}");
}
