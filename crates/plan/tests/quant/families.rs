//! Each family by what its files look like: names, dtypes, shapes, configurations.

use tensorhaul_plan::Dtype::*;
use tensorhaul_plan::quant::{Codes, Element, Family, Number, Role, ZeroOffset, ZeroPoint};

use super::Model;

/// Snapshots what each model becomes, under the caller's name.
macro_rules! snapshot {
    ($name:literal, $($title:literal => $model:expr),* $(,)?) => {{
        let mut text = String::new();
        $(
            let found = $model.recognize();
            super::property::check(&found).expect($title);
            text += &format!("# {}\n{}\n", $title, found.text());
        )*
        insta::assert_snapshot!($name, text);
    }};
}

fn gptq(bits: u64, group_size: u64) -> Model {
    let (k, n) = (256, 64);
    let groups = k / group_size;
    Model::new(&[
        ("a.g_idx", I32, &[k]),
        ("a.qweight", I32, &[k * bits / 32, n]),
        ("a.qzeros", I32, &[groups, n * bits / 32]),
        ("a.scales", F16, &[groups, n]),
    ])
    .value("a.g_idx", (0..k as u32).flat_map(|k| (k / group_size as u32).to_le_bytes()).collect::<Vec<_>>())
}

#[test]
fn gptq_of_each_width_and_format() {
    let config = |bits, sym, format| {
        let method = r#""quant_method":"gptq","group_size":64,"desc_act":false"#;
        format!(r#"{{{method},"bits":{bits},"sym":{sym},"checkpoint_format":"{format}"}}"#)
    };
    snapshot!("gptq",
        "2 bits, asymmetric, first format" => gptq(2, 64).config(&config(2, false, "gptq")),
        "3 bits, asymmetric, first format" => gptq(3, 64).config(&config(3, false, "gptq")),
        "4 bits, asymmetric, second format" => gptq(4, 64).config(&config(4, false, "gptq_v2")),
        "8 bits, symmetric, labelled as either" =>
            gptq(8, 64).config(&config(8, true, "gptq")).value("a.qzeros", [0x80; 256]),
        "5 bits in planes, symmetric" => gptq(5, 64).config(&config(5, true, "gptq_p")).value("a.qzeros", [0x00; 160]),
        "quantize_config.json, one group" => gptq(4, 256)
            .file("config.json", "{}")
            .file("quantize_config.json", r#"{"bits":4,"group_size":-1,"desc_act":true,"sym":false}"#),
    );
}

#[test]
fn gptq_symmetry_is_what_zero_points_say_where_the_label_is_not_enough() {
    let config = |sym: &str| format!(r#"{{"quant_method":"gptq","bits":4,"group_size":64{sym}}}"#);
    let zero_point = |sym, byte: u8| {
        gptq(4, 64).config(&config(sym)).value("a.qzeros", [byte; 128]).recognize().group().recipe.zero_point
    };
    let is_read = |zero_point| matches!(zero_point, ZeroPoint::Packed { offset: ZeroOffset::WordWise, .. });
    assert_eq!(zero_point(r#","sym":true"#, 0x88), ZeroPoint::Constant(8));
    assert_eq!(zero_point(r#","sym":true"#, 0x77), ZeroPoint::Constant(8));
    assert!(is_read(zero_point(r#","sym":true"#, 0x33)), "the flag is a lie");
    assert!(is_read(zero_point(r#","sym":false"#, 0x77)));
    // Without a flag: labelled as the first format, but holding the second's middle.
    assert_eq!(zero_point("", 0x88), ZeroPoint::Constant(8));
    assert!(is_read(zero_point("", 0x77)), "reading them is right either way");
    let warnings = gptq(4, 64).config(&config(r#","sym":true"#)).value("a.qzeros", [0x33; 128]).recognize();
    assert_eq!(warnings.quantization.warnings().len(), 1);
}

#[test]
fn gptq_without_a_configuration_is_recognised_where_its_zero_points_leave_no_doubt() {
    let found = gptq(4, 64).value("a.qzeros", [0x77; 128]).recognize();
    assert_eq!((found.group().bits, found.group().group_size), (4, Some(64)));
    assert_eq!(found.group().recipe.zero_point, ZeroPoint::Constant(8));
    let error = gptq(4, 64).value("a.qzeros", [0x35; 128]).error();
    assert!(error.contains("checkpoint_format in config.json would decide"), "{error}");
}

#[test]
fn gptq_indices_that_were_never_filled_are_not_read() {
    let config = r#"{"quant_method":"gptq","bits":4,"group_size":64,"sym":true}"#;
    let filled = gptq(4, 64).config(config).recognize();
    assert_eq!(filled.group().recipe.group_index, Some(4));
    let unfilled = gptq(4, 64).config(config).value("a.g_idx", [0; 1024]).recognize();
    assert_eq!(unfilled.group().recipe.group_index, None);
    assert!(unfilled.group().members.iter().all(|(role, _)| *role != Role::GroupIndex));
}

#[test]
fn gptq_indices_are_judged_by_a_module_with_several_groups() {
    let module = |name: &str, cols: u64, group_size: u64| {
        let leaf = |leaf: &str| format!("{name}.{leaf}");
        [
            (leaf("g_idx"), I32, vec![cols]),
            (leaf("qweight"), I32, vec![cols / 8, 64]),
            (leaf("qzeros"), I32, vec![cols / group_size, 8]),
            (leaf("scales"), F16, vec![cols / group_size, 64]),
        ]
    };
    let is_indexed = |modules: &[(u64, u64)], group_size: u64| {
        let named = modules.iter().zip(["a", "b"]);
        let tensors = named.flat_map(|((cols, size), name)| module(name, *cols, *size)).collect();
        let config = format!(r#"{{"quant_method":"gptq","bits":4,"group_size":{group_size},"sym":true}}"#);
        let found = Model { tensors, ..Model::default() }.config(&config).recognize();
        let groups = found.quantization.groups().iter();
        groups.map(|group| group.recipe.group_index.is_some()).collect::<Vec<_>>()
    };
    // None of them was ever filled.
    assert_eq!(is_indexed(&[(32, 32), (256, 32)], 32), [false, false]);
    assert_eq!(is_indexed(&[(2048, 1024)], 1024), [false]);
    // 65536 entries are read: more than one group's here, and no more than that there.
    assert_eq!(is_indexed(&[(1 << 17, 1 << 15)], 1 << 15), [false]);
    let huge = Model { tensors: module("a", 1 << 17, 1 << 16).into(), ..Model::default() };
    let error = huge.config(r#"{"quant_method":"gptq","bits":4,"group_size":65536,"sym":true}"#).error();
    assert_eq!(
        error,
        "tensor \"a.g_idx\": may be an index that was never filled, or one whose first 65536 columns are of one group; the rest of it, which is not read, would decide"
    );
}

#[test]
fn gptq_with_a_short_last_group_takes_its_size_from_the_configuration() {
    let tensors =
        Model::new(&[("a.qweight", I32, &[36, 64]), ("a.qzeros", I32, &[3, 8]), ("a.scales", F16, &[3, 64])]);
    let found = tensors.config(r#"{"quant_method":"gptq","bits":4,"group_size":128,"sym":true}"#).recognize();
    assert_eq!(found.group().shape, [64, 288]);
    assert_eq!(found.group().recipe.scale.expect("a scale").grid.cols_per_group, 128);
}

#[test]
fn gptq_overrides_by_the_first_pattern_that_matches() {
    let tensor = |layer: &str, bits: u64| {
        [
            (format!("model.layers.{layer}.qweight"), I32, vec![256 * bits / 32, 64]),
            (format!("model.layers.{layer}.qzeros"), I32, vec![2, 64 * bits / 32]),
            (format!("model.layers.{layer}.scales"), F16, vec![2, 64]),
        ]
    };
    let tensors = [tensor("0.up", 4), tensor("1.up", 8), tensor("2.up", 4)].concat();
    // The last pattern also matches layers 1 and 2, too late.
    let config = r#"{"quant_method":"gptq","bits":8,"group_size":128,"sym":true,
        "dynamic":{"+:.*\\.1\\.up":{"bits":8},"-:.*\\.2\\.":{},".*":{"bits":4}}}"#;
    let found = Model { tensors, ..Model::default() }.config(config).recognize();
    let bits: Vec<u8> = found.quantization.groups().iter().map(|group| group.bits).collect();
    assert_eq!(bits, [4, 8]);
    let [refusal] = found.quantization.refused() else { panic!("{}", found.text()) };
    let text = refusal.error.to_string();
    assert!(text.contains("quantization_config.dynamic excludes its module by \".*\\\\.2\\\\.\""), "{text}");
}

#[test]
fn awq_in_its_three_layouts() {
    let config = |version: &str, group_size: u32| {
        format!(
            r#"{{"quant_method":"awq","bits":4,"group_size":{group_size},"zero_point":true,"version":"{version}"}}"#
        )
    };
    let gemm = || {
        Model::new(&[("a.qweight", I32, &[256, 8]), ("a.qzeros", I32, &[2, 8]), ("a.scales", F16, &[2, 64])])
    };
    let gemv = || {
        Model::new(&[
            ("a.qweight", I32, &[64, 32]),
            ("a.qzeros", I32, &[64, 2]),
            ("a.scales", F16, &[64, 16]),
        ])
    };
    let fast = || {
        Model::new(&[
            ("a.qweight", I16, &[16, 256]),
            ("a.qzeros", F16, &[8, 64]),
            ("a.scales", F16, &[8, 64]),
        ])
    };
    snapshot!("awq",
        "GEMM" => gemm().config(&config("gemm", 128)),
        "GEMM without a configuration" => gemm(),
        "GEMV" => gemv().config(&config("gemv", 64)),
        "GEMVFast" => fast().config(&config("gemv_fast", 128)),
        "auto-round" => gemm().config(
            r#"{"quant_method":"auto-round","bits":4,"group_size":128,"packing_format":"auto_round:auto_awq"}"#),
    );
}

#[test]
fn fp8_in_every_spelling() {
    let fp8 = |scale: &str, dtype, shape: &[u64]| {
        Model::new(&[("a.weight", F8E4m3, &[256, 384]), (scale, dtype, shape)])
    };
    let blocks = r#"{"quant_method":"fp8","weight_block_size":[128,128]}"#;
    snapshot!("fp8",
        "tensor" => fp8("a.weight_scale", F32, &[]),
        "tensor, legacy ComfyUI" => Model::new(&[
            ("a.weight", F8E5m2, &[256, 384]), ("a.scale_weight", F32, &[]), ("a.scale_input", F32, &[]),
            ("scaled_fp8", F8E4m3, &[2])]),
        "tensor, Mistral" => Model::new(&[
            ("a.weight", F8E4m3, &[256, 384]), ("a.qscale_weight", F32, &[]), ("a.qscale_act", F32, &[])])
            .config(r#"{"quant_method":"fp8","activation_scheme":"static"}"#),
        "rows" => fp8("a.weight_scale", Bf16, &[256, 1]),
        "rows of ModelOpt" => fp8("a.weight_scale", F32, &[256])
            .file("hf_quant_config.json", r#"{"quantization":{"quant_algo":"FP8_PER_CHANNEL_PER_TOKEN"}}"#),
        "blocks of DeepSeek" => fp8("a.weight_scale_inv", F32, &[2, 3]).config(blocks),
        "blocks with exponents" => fp8("a.scale", F8E8m0, &[2, 3]).config(blocks),
        "blocks of ModelOpt" => fp8("a.weight_scale", F32, &[2, 1, 3, 1])
            .file("hf_quant_config.json", r#"{"quantization":{"quant_algo":"FP8_PB_WO"}}"#),
        "blocks of compressed-tensors" => fp8("a.weight_scale", Bf16, &[2, 3]).config(
            r#"{"quant_method":"compressed-tensors","format":"float-quantized","config_groups":{"group_0":{
            "targets":["Linear"],"weights":{"num_bits":8,"type":"float","strategy":"block","block_structure":"128x128"}}}}"#),
        "blocks of Quark" => fp8("a.weight_scale", F32, &[2, 3]).config(
            r#"{"quant_method":"quark","global_quant_config":{"weight":{"dtype":"fp8_e4m3","qscheme":"per_block",
            "block_size":[128,128]}}}"#),
        "FNUZ" => Model::new(&[("a.weight", F8E4m3Fnuz, &[4, 8]), ("a.weight_scale", F32, &[1])]),
        "experts, blocks" => Model::new(&[
            ("e.gate_up_proj", F8E4m3, &[4, 256, 384]), ("e.gate_up_proj_scale_inv", F32, &[4, 2, 3])]).config(blocks),
        "experts, a number each" => Model::new(&[
            ("e.gate_up_proj", F8E4m3, &[4, 256, 384]), ("e.gate_up_proj_scale", F32, &[4])]),
        "experts of Llama 4" => Model::new(&[
            ("e.gate_up_proj", F8E4m3, &[4, 64, 32]), ("e.gate_up_proj_scale", F32, &[4, 1, 32]),
            ("e.down_proj", F8E4m3, &[4, 16, 64]), ("e.down_proj_scale", F32, &[4, 64, 1])])
            .config(r#"{"quant_method":"fbgemm_fp8"}"#),
    );
}

#[test]
fn compressed_tensors_integers() {
    let config = |bits: u32, symmetric: bool, strategy: &str| {
        format!(
            r#"{{"quant_method":"compressed-tensors","format":"pack-quantized","config_groups":{{"group_0":{{
            "targets":["Linear"],"weights":{{"num_bits":{bits},"type":"int","symmetric":{symmetric},
            "strategy":"{strategy}","group_size":128}}}}}}}}"#
        )
    };
    let shape = |rows: i64, cols: i64| [rows.to_le_bytes(), cols.to_le_bytes()].concat();
    let packed = |words: u64, groups: u64| {
        Model::new(&[
            ("a.weight_shape", I64, &[2]),
            ("a.weight_packed", I32, &[76, words]),
            ("a.weight_scale", Bf16, &[76, groups]),
        ])
        .value("a.weight_shape", shape(76, 320))
    };
    let with = |mut model: Model, name: &str, dtype, shape: &[u64]| {
        model.tensors.push((name.to_owned(), dtype, shape.to_vec()));
        model
    };
    snapshot!("compressed_tensors",
        "4 bits" => packed(40, 3).config(&config(4, true, "group")),
        "8 bits, rows" => packed(80, 1).config(&config(8, true, "channel")),
        "3 bits, dense" => packed(30, 3).config(&config(3, true, "group")),
        "3 bits, padded" => packed(32, 3).config(&config(3, true, "group")),
        "4 bits, asymmetric" => with(packed(40, 3), "a.weight_zero_point", I32, &[10, 3]).config(&config(4, false, "group")),
        "4 bits, asymmetric, before 0.9.4" =>
            with(packed(40, 3), "a.weight_zero_point", I8, &[76, 3]).config(&config(4, false, "group")),
        "4 bits, in another order" => with(packed(40, 3), "a.weight_g_idx", I32, &[320]).config(&config(4, true, "group")),
        "int-quantized" => Model::new(&[("a.weight", I8, &[16, 8]), ("a.weight_scale", Bf16, &[16, 1])])
            .config(r#"{"quant_method":"compressed-tensors","format":"int-quantized"}"#),
        "int-quantized, asymmetric" => Model::new(&[
            ("a.weight", I8, &[16, 8]), ("a.weight_scale", F32, &[1]), ("a.weight_zero_point", I8, &[1])])
            .config(r#"{"quant_method":"compressed-tensors","format":"int-quantized"}"#),
    );
}

#[test]
fn compressed_tensors_targets_select_by_name_then_pattern_then_class() {
    let config = r#"{"quant_method":"compressed-tensors","format":"mixed-precision","config_groups":{
        "group_0":{"targets":["Linear"],"format":"pack-quantized","weights":{"num_bits":4,"group_size":32,"strategy":"group"}},
        "group_1":{"targets":["re:.*down.*"],"format":"pack-quantized","weights":{"num_bits":8,"strategy":"channel"}},
        "group_2":{"targets":["l.1.down"],"format":"pack-quantized","weights":{"num_bits":2,"strategy":"channel"}}}}"#;
    let mut model = Model::default().config(config);
    for (module, bits, groups) in [("l.0.up", 4, 2), ("l.0.down", 8, 1), ("l.1.down", 2, 1)] {
        model.tensors.push((format!("{module}.weight_shape"), I64, vec![2]));
        model.tensors.push((format!("{module}.weight_packed"), I32, vec![16, 64 * bits / 32]));
        model.tensors.push((format!("{module}.weight_scale"), F16, vec![16, groups]));
        let shape = [16i64.to_le_bytes(), 64i64.to_le_bytes()].concat();
        model.values.insert(format!("{module}.weight_shape"), shape);
    }
    let found = model.recognize();
    let bits: Vec<u8> = found.quantization.groups().iter().map(|group| group.bits).collect();
    assert_eq!(bits, [4, 8, 2], "{}", found.text());
}

#[test]
fn microscaling_in_every_spelling() {
    let quark = |dtype: &str| {
        format!(
            r#"{{"quant_method":"quark","global_quant_config":{{"weight":{{"dtype":"{dtype}","qscheme":"per_group",
            "group_size":32,"scale_format":"e8m0"}}}}}}"#
        )
    };
    let mx = |dtype, cols, scale| Model::new(&[("a.weight", dtype, &[16, cols]), (scale, U8, &[16, 3])]);
    let ct = |format: &str| format!(r#"{{"quant_method":"compressed-tensors","format":"{format}"}}"#);
    let packed = |cols| Model::new(&[("a.weight_packed", U8, &[16, cols]), ("a.weight_scale", U8, &[16, 3])]);
    snapshot!("mx",
        "gpt-oss, OpenAI's names" => Model::new(&[
            ("block.0.mlp.mlp1_weight.blocks", U8, &[2, 32, 3, 16]), ("block.0.mlp.mlp1_weight.scales", U8, &[2, 32, 3])]),
        "compressed-tensors MXFP4" => packed(48).config(&ct("mxfp4-pack-quantized")),
        "compressed-tensors MXFP6" => packed(72).config(&ct("mxfp6-pack-quantized")),
        "compressed-tensors MXFP8" => mx(F8E4m3, 96, "a.weight_scale").config(&ct("mxfp8-quantized")),
        "Quark MXFP4" => mx(U8, 48, "a.weight_scale").config(&quark("fp4")),
        "Quark MXFP6" => mx(U8, 72, "a.weight_scale").config(&quark("fp6_e3m2")),
        "Quark MX with inline scales" => Model::new(&[("a.weight", U8, &[16, 51])]).config(&quark("mx")),
        "DeepSeek-V4 experts" => Model::new(&[
            ("layers.3.ffn.experts.7.w1.weight", I8, &[16, 48]), ("layers.3.ffn.experts.7.w1.scale", F8E8m0, &[16, 3])])
            .config(r#"{"quant_method":"fp8","weight_block_size":[128,128],"scale_fmt":"ue8m0"}"#),
        "ModelOpt MXFP8" => mx(F8E4m3, 96, "a.weight_scale")
            .file("hf_quant_config.json", r#"{"quantization":{"quant_algo":"MXFP8"}}"#),
        "native F4" => mx(F4, 96, "a.weight_scale"),
    );
}

#[test]
fn nvfp4_of_each_writer() {
    let nvfp4 = |payload: &str, global: &str, global_shape: &[u64]| {
        let names = [format!("a.{payload}"), format!("a.{global}")];
        Model::new(&[
            (&names[0], U8, &[48, 80]),
            ("a.weight_scale", F8E4m3, &[48, 10]),
            (&names[1], F32, global_shape),
        ])
    };
    let mut awq = nvfp4("weight", "weight_scale_2", &[]);
    awq.tensors.push(("a.pre_quant_scale".to_owned(), Bf16, vec![160]));
    awq.tensors.push(("a.input_scale".to_owned(), F32, vec![]));
    awq.tensors.push(("a.k_scale".to_owned(), F32, vec![]));
    snapshot!("nvfp4",
        "ModelOpt with a scale to fold" => awq.file("hf_quant_config.json",
            r#"{"producer":{"name":"modelopt"},"quantization":{"quant_algo":"NVFP4_AWQ","group_size":16}}"#),
        "compressed-tensors" => nvfp4("weight_packed", "weight_global_scale", &[1])
            .config(r#"{"quant_method":"compressed-tensors","format":"nvfp4-pack-quantized"}"#),
        "ModelOpt, scales in tiles" => Model::new(&[
            ("a.weight", U8, &[48, 80]), ("a.weight_scale", U8, &[128 * 12]), ("a.weight_scale_2", F32, &[])]),
        "ComfyUI" => Model::new(&[
            ("a.weight", U8, &[48, 80]), ("a.weight_scale", F8E4m3, &[128, 12]), ("a.weight_scale_2", F32, &[])])
            .metadata("_quantization_metadata", r#"{"format_version":"1.0","layers":{"a":{"format":"nvfp4"}}}"#),
    );
}

#[test]
fn modelopt_and_quark_integers() {
    let modelopt =
        |algorithm: &str| format!(r#"{{"quantization":{{"quant_algo":"{algorithm}","group_size":128}}}}"#);
    let quark = |dtype: &str, method: &str| {
        format!(
            r#"{{"quant_method":"quark","export":{{"pack_method":"{method}"}},"global_quant_config":{{"weight":{{
            "dtype":"{dtype}","qscheme":"per_group","group_size":128}}}}}}"#
        )
    };
    let words = || {
        Model::new(&[
            ("a.weight", I32, &[256, 8]),
            ("a.weight_scale", F32, &[2, 60]),
            ("a.weight_zero_point", I32, &[2, 8]),
        ])
    };
    snapshot!("modelopt_and_quark",
        "ModelOpt INT4" => Model::new(&[
            ("a.weight", U8, &[32, 256]), ("a.weight_scale", F32, &[64, 2]), ("a.pre_quant_scale", Bf16, &[256])])
            .file("hf_quant_config.json", &modelopt("W4A16_AWQ")),
        "ModelOpt int8" => Model::new(&[("a.weight", I8, &[32, 256]), ("a.weight_scale", F32, &[32])])
            .file("hf_quant_config.json", &modelopt("W8A8_SQ_PER_CHANNEL")),
        "Quark int4" => words().config(&quark("int4", "reorder")),
        "Quark uint4, in order" => words().config(&quark("uint4", "order")),
    );
}

fn state(extra: &str, shape: &str, block: u32) -> String {
    format!(r#"{{"quant_type":"nf4","blocksize":{block},"dtype":"bfloat16","shape":{shape}{extra}}}"#)
}

fn bnb(json: &str, bytes: u64, blocks: u64) -> Model {
    let len_bytes = [json.len() as u64];
    Model::new(&[
        ("a.weight", U8, &[bytes, 1]),
        ("a.weight.absmax", F32, &[blocks]),
        ("a.weight.quant_map", F32, &[16]),
        ("a.weight.quant_state.bitsandbytes__nf4", U8, &len_bytes),
    ])
    .value("a.weight.quant_state.bitsandbytes__nf4", json)
}

#[test]
fn bitsandbytes_describes_itself() {
    let nested =
        state(r#","nested_blocksize":256,"nested_dtype":"float32","nested_offset":0.125"#, "[64,128]", 64);
    let nested_len = [nested.len() as u64];
    let config = r#"{"quant_method":"bitsandbytes","load_in_4bit":true}"#;
    snapshot!("bitsandbytes",
        "blocks within rows" => bnb(&state("", "[64,128]", 64), 4096, 128).config(config),
        "rows within blocks" => bnb(&state("", "[64,32]", 64), 1024, 32),
        "blocks across rows" => bnb(&state("", "[5,7]", 64), 18, 1),
        "nested, stored as BF16" => Model::new(&[
            ("a.weight", Bf16, &[2048, 1]), ("a.weight.absmax", U8, &[128]), ("a.weight.quant_map", F32, &[16]),
            ("a.weight.nested_absmax", F32, &[1]), ("a.weight.nested_quant_map", F32, &[256]),
            ("a.weight.quant_state.bitsandbytes__nf4", U8, &nested_len)])
            .value("a.weight.quant_state.bitsandbytes__nf4", nested),
        "int8" => Model::new(&[("a.weight", I8, &[8, 16]), ("a.SCB", F32, &[8]), ("a.weight_format", U8, &[])])
            .config(r#"{"quant_method":"bitsandbytes","load_in_8bit":true}"#),
    );
}

fn hqq(bits: u64, axis: u64, packing: &str, codes: &[u64], dtype: tensorhaul_plan::Dtype) -> Model {
    let scales: &[u64] = if axis == 1 { &[128, 1] } else { &[1, 128] };
    let packing_len = [packing.len() as u64];
    Model::new(&[
        ("a.W_q", dtype, codes),
        ("a.scale", F16, scales),
        ("a.zero", F16, scales),
        ("a.nbits", I32, &[1]),
        ("a.group_size", I32, &[1]),
        ("a.axis", I32, &[1]),
        ("a.shape", I64, &[2]),
        ("a.packing", U8, &packing_len),
        ("a.view_as_float", U8, &[1]),
    ])
    .value("a.nbits", (bits as u32).to_le_bytes())
    .value("a.group_size", 64u32.to_le_bytes())
    .value("a.axis", (axis as u32).to_le_bytes())
    .value("a.shape", [64u64.to_le_bytes(), 128u64.to_le_bytes()].concat())
    .value("a.packing", packing)
}

#[test]
fn hqq_describes_itself() {
    snapshot!("hqq",
        "4 bits, rows" => hqq(4, 1, "4bit_u8", &[64, 64], U8),
        "4 bits, columns" => hqq(4, 0, "4bit_u8", &[32, 128], U8),
        "4 bits, seen as floats" => hqq(4, 1, "4bit_u8", &[64, 32], F16),
        "3 bits" => hqq(3, 1, "3bit_32", &[13, 64], I32),
        "2 bits" => hqq(2, 1, "2bit_u8", &[32, 64], U8),
        "1 bit" => hqq(1, 1, "1bit_u8", &[16, 64], U8),
        "8 bits" => hqq(8, 1, "8bit_u8", &[128, 64], U8),
        "5 bits in bytes" => hqq(5, 1, "8bit_u8", &[128, 64], U8),
    );
}

#[test]
fn mlx_of_each_width_and_mode() {
    let affine = |bits: u64| {
        Model::new(&[
            ("a.weight", U32, &[16, 128 * bits / 32]),
            ("a.scales", Bf16, &[16, 2]),
            ("a.biases", Bf16, &[16, 2]),
        ])
        .file("config.json", &format!(r#"{{"quantization":{{"group_size":64,"bits":{bits}}}}}"#))
    };
    for bits in [2, 3, 4, 5, 6, 8] {
        let found = affine(bits).recognize();
        let group = found.group();
        assert_eq!((group.shape.as_slice(), group.family), (&[16, 128][..], Family::Mlx));
        assert_eq!(group.recipe.codes, Codes::Rows { bits: bits as u8, row_stride_bytes: 16 * bits });
    }
    let mode = |mode: &str, words, groups| {
        let quantization = format!(r#"{{"quantization":{{"group_size":32,"bits":4,"mode":"{mode}"}}}}"#);
        Model::new(&[("a.weight", U32, &[16, words]), ("a.scales", U8, &[16, groups])])
            .file("config.json", &quantization)
    };
    snapshot!("mlx",
        "affine" => affine(3),
        "MXFP4" => mode("mxfp4", 16, 4),
        "MXFP8" => mode("mxfp8", 32, 4),
        "NVFP4" => mode("nvfp4", 16, 8),
        "experts, with an override, and both keys" => Model::new(&[
            ("a.weight", U32, &[4, 16, 32]), ("a.scales", F16, &[4, 16, 2]), ("a.biases", F16, &[4, 16, 2])])
            .file("config.json", r#"{"quantization":{"group_size":64,"bits":4,"a":{"group_size":64,"bits":8}},
                "quantization_config":{"group_size":64,"bits":4,"a":{"group_size":64,"bits":8}}}"#),
    );
}

#[test]
fn torchao_is_described_by_the_header() {
    let entry = |kind: &str, data: &str| {
        let kind = format!(r#"{{"_type":"{kind}","_data":{data},"_tensor_data_names":["qdata","scale"]}}"#);
        move |model: Model| {
            model.metadata("tensor_names", r#"["a.weight","a.bias"]"#).metadata("a.weight", &kind)
        }
    };
    let scaled = |payload, scale, shape: &[u64]| {
        Model::new(&[
            ("a._weight_qdata", payload, &[64, 128]),
            ("a._weight_scale", scale, shape),
            ("a.bias", Bf16, &[64]),
        ])
    };
    let int4 = Model::new(&[
        ("a._weight_qdata", I8, &[64, 64]),
        ("a._weight_scale", Bf16, &[4, 64]),
        ("a._weight_zero_point", Bf16, &[4, 64]),
    ]);
    let intx = Model::new(&[
        ("a._weight_qdata", I8, &[64, 128]),
        ("a._weight_scale", Bf16, &[64, 4]),
        ("a._weight_zero_point", I8, &[64, 4]),
    ]);
    let nvfp4 = Model::new(&[
        ("a._weight_qdata", U8, &[64, 64]),
        ("a._weight_scale", F8E4m3, &[128, 8]),
        ("a._weight_per_tensor_scale", F32, &[]),
    ]);
    snapshot!("torchao",
        "Float8, rows" => entry("Float8Tensor", r#"{"block_size":[1,128]}"#)(scaled(F8E4m3, F32, &[64, 1])),
        "Float8, tensor" => entry("Float8Tensor", r#"{"block_size":[]}"#)(scaled(F8E4m3, F32, &[1, 1])),
        "Int8, rows" => entry("Int8Tensor", r#"{"block_size":[1,128]}"#)(scaled(I8, F32, &[64, 1])),
        "Intx, groups" => entry("IntxUnpackedToInt8Tensor", r#"{"block_size":[1,32]}"#)(intx),
        "Int4" => entry("Int4Tensor", r#"{"block_size":[1,32]}"#)(int4),
        "MXFP8" => entry("MXTensor", r#"{"block_size":32,"is_swizzled_scales":false}"#)(scaled(F8E4m3, F8E8m0, &[64, 4])),
        "NVFP4 in tiles" => entry("NVFP4Tensor", r#"{"block_size":16,"is_swizzled_scales":true}"#)(nvfp4),
        "tinygemm" => entry("Int4TilePackedTo4dTensor", "{}")(scaled(I8, Bf16, &[64, 1])),
    );
}

#[test]
fn comfy_is_described_by_the_header_or_beside_each_weight() {
    let json = r#"{"format":"float8_e4m3fn"}"#;
    let json_len = [json.len() as u64];
    let layers = r#"{"layers":{"b":{"format":"int8_tensorwise"},"c":{"format":"mxfp8"},"d":{"format":"svdquant_w4a4"}}}"#;
    snapshot!("comfy",
        "both ways" => Model::new(&[
            ("a.weight", F8E4m3, &[64, 64]), ("a.weight_scale", F32, &[]), ("a.comfy_quant", U8, &json_len),
            ("b.weight", I8, &[64, 64]), ("b.weight_scale", F32, &[]),
            ("c.weight", F8E4m3, &[64, 64]), ("c.weight_scale", F8E8m0, &[128, 4]),
            ("d.weight", U8, &[64, 64])])
            .value("a.comfy_quant", json)
            .metadata("_quantization_metadata", layers),
    );
}

#[test]
fn floats_below_16_bits_without_scales_are_casts() {
    for (dtype, element) in [
        (F4, Element::E2m1),
        (F6E2m3, Element::E2m3),
        (F6E3m2, Element::E3m2),
        (F8E4m3, Element::E4m3),
        (F8E5m2, Element::E5m2),
        (F8E4m3Fnuz, Element::E4m3Fnuz),
        (F8E5m2Fnuz, Element::E5m2Fnuz),
        (F8E8m0, Element::E8m0),
    ] {
        let found = Model::new(&[("a.weight", dtype, &[3, 8])]).recognize();
        let group = found.group();
        assert_eq!((group.family, group.recipe.element), (Family::Plain, element));
        assert_eq!((group.recipe.rows, group.recipe.cols), (3, 8));
        assert!(group.recipe.scale.is_none());
    }
    // Rows that end within a byte are one row.
    let found = Model::new(&[("a", F4, &[4, 3])]).recognize();
    assert_eq!((found.group().recipe.rows, found.group().recipe.cols), (1, 12));
}

#[test]
fn scales_of_bytes_are_read_by_family() {
    let number = |model: Model| model.recognize().group().recipe.scale.expect("a scale").grid.number;
    let tensors = |scales: u64| Model::new(&[("a.weight", U32, &[16, 16]), ("a.scales", U8, &[16, scales])]);
    let nvfp4 =
        tensors(8).file("config.json", r#"{"quantization":{"group_size":16,"bits":4,"mode":"nvfp4"}}"#);
    let mxfp4 =
        tensors(4).file("config.json", r#"{"quantization":{"group_size":32,"bits":4,"mode":"mxfp4"}}"#);
    assert_eq!(number(nvfp4), Number::E4m3);
    assert_eq!(number(mxfp4), Number::E8m0);
}

#[test]
fn a_checkpoint_without_quantization_needs_nothing_and_is_all_plain() {
    let model = Model::new(&[
        ("a.weight", Bf16, &[4, 4]),
        ("a.bias", F32, &[4]),
        ("ids", I64, &[3]),
        ("mask", U8, &[9]),
    ]);
    let found = model.file("config.json", r#"{"model_type":"llama"}"#).recognize();
    assert!(found.quantization.is_empty());
    assert_eq!(found.text(), "");
}

#[test]
fn a_mixed_checkpoint_is_recognised_tensor_by_tensor() {
    let found = Model::new(&[
        ("a.weight", F8E4m3, &[256, 128]),
        ("a.weight_scale_inv", F32, &[2, 1]),
        ("b.weight", Bf16, &[8, 8]),
        ("c.experts.0.w1.weight", I8, &[16, 16]),
        ("c.experts.0.w1.scale", F8E8m0, &[16, 1]),
    ])
    .config(r#"{"quant_method":"fp8","weight_block_size":[128,128],"ignored_layers":["b"]}"#)
    .recognize();
    let families: Vec<Family> = found.quantization.groups().iter().map(|group| group.family).collect();
    assert_eq!(families, [Family::Fp8, Family::Mx], "{}", found.text());
}
