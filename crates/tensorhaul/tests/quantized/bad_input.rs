//! Quantized checkpoints that do not hold together are errors that name the module, and load as they are stored else.

use std::fs;

use serde_json::{Value, json};
use tensorhaul::{Dequantization, Dtype, ErrorKind};

use crate::case::{Case, low_bytes};
use crate::check::{assert_loads_as_stored, dequantized};
use crate::common::{Folder, Stored, stored};
use crate::fp8;
use crate::gptq::{Gptq, Zeros};
use crate::pack::{nibbles_high_first, nibbles_low_first};

const MODULE: &str = "model.layers.0.mlp.up_proj";

#[test]
fn a_missing_scale_is_named() {
    for part in ["scales", "qzeros"] {
        let mut case = gptq();
        case.tensors.retain(|tensor| tensor.name != format!("{MODULE}.{part}"));
        assert_refused(&case, &format!("gptq without {part}"));
    }
    for part in ["weight_scale", "weight_shape"] {
        let mut case = packed();
        case.tensors.retain(|tensor| tensor.name != format!("{MODULE}.{part}"));
        assert_refused(&case, &format!("pack-quantized without {part}"));
    }
    for part in ["weight_scale", "weight_scale_2"] {
        let mut case = nvfp4();
        case.tensors.retain(|tensor| tensor.name != format!("{MODULE}.{part}"));
        assert_refused(&case, &format!("nvfp4 without {part}"));
    }
    for part in ["weight.absmax", "weight.quant_map"] {
        let mut case = coded();
        case.tensors.retain(|tensor| tensor.name != format!("{MODULE}.{part}"));
        assert_refused(&case, &format!("nf4 without {part}"));
    }
    let mut case = experts();
    case.tensors.retain(|tensor| !tensor.name.ends_with("_scales"));
    assert_refused(&case, "gpt-oss without scales");
}

#[test]
fn a_column_of_a_group_that_is_not_there_is_refused() {
    for (column, group) in [(0, 2i32), (255, -1), (17, i32::MAX)] {
        let mut case = gptq();
        let name = format!("{MODULE}.g_idx");
        let indices = case.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
        indices.bytes[4 * column..][..4].copy_from_slice(&group.to_le_bytes());
        assert_refused(&case, &format!("gptq, column {column} of group {group}"));
    }
}

#[test]
fn an_index_that_names_one_group_for_all_columns_is_refused() {
    let mut case = gptq();
    let name = format!("{MODULE}.g_idx");
    let indices = case.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
    indices.bytes.chunks_mut(4).for_each(|index| index.copy_from_slice(&1i32.to_le_bytes()));
    assert_refused(&case, "gptq, all columns of group 1");
}

#[test]
fn scales_of_another_shape_are_refused() {
    for (part, dtype, shape) in [
        ("scales", Dtype::F16, vec![2, 39]),
        ("scales", Dtype::F16, vec![3, 40]),
        ("scales", Dtype::F16, vec![80]),
        ("qzeros", Dtype::I32, vec![2, 4]),
        ("g_idx", Dtype::I32, vec![240]),
    ] {
        let mut case = gptq();
        replace(&mut case, part, dtype, &shape);
        assert_refused(&case, &format!("gptq, {part} {shape:?}"));
    }
    for shape in [vec![2, 2], vec![1, 3], vec![7]] {
        let mut case = fp8_blocks();
        replace(&mut case, "weight_scale_inv", Dtype::F32, &shape);
        assert_refused(&case, &format!("fp8 blocks, {shape:?}"));
    }
    for shape in [vec![24, 2], vec![23, 4]] {
        let mut case = packed();
        replace(&mut case, "weight_scale", Dtype::Bf16, &shape);
        assert_refused(&case, &format!("pack-quantized, {shape:?}"));
    }
    for shape in [vec![16, 3], vec![15, 4]] {
        let mut case = nvfp4();
        replace(&mut case, "weight_scale", Dtype::F8E4m3, &shape);
        assert_refused(&case, &format!("nvfp4, {shape:?}"));
    }
    let mut case = coded();
    replace(&mut case, "weight.absmax", Dtype::F32, &[3]);
    assert_refused(&case, "nf4, short absmax");
    let mut case = experts();
    let name = "model.layers.0.mlp.experts.gate_up_proj_scales";
    let scales = case.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
    *scales = stored(name, Dtype::U8, &[2, 8, 2]);
    assert_refused(&case, "gpt-oss, scales for fewer rows");
}

#[test]
fn scales_of_another_dtype_are_refused() {
    for dtype in [Dtype::I32, Dtype::F64, Dtype::Bool] {
        let mut case = gptq();
        replace(&mut case, "scales", dtype, &[2, 40]);
        assert_refused(&case, &format!("gptq, scales of {dtype}"));
    }
    let mut case = nvfp4();
    replace(&mut case, "weight_scale_2", Dtype::I64, &[]);
    assert_refused(&case, "nvfp4, integer scale of scales");
}

#[test]
fn a_group_size_that_does_not_fit_the_scales_is_refused() {
    for group_size in [json!(64), json!(0), json!(-3), json!(300), json!("128")] {
        let mut case = gptq();
        case.configs[0].1["quantization_config"]["group_size"] = group_size.clone();
        assert_refused(&case, &format!("gptq, groups of {group_size}"));
    }
    for group_size in [16, 64] {
        let mut case = packed();
        weights_of(&mut case)["group_size"] = json!(group_size);
        assert_refused(&case, &format!("pack-quantized, groups of {group_size}"));
    }
}

#[test]
fn a_width_that_no_code_has_is_refused() {
    for bits in [json!(0), json!(1), json!(9), json!(16), json!(-4), json!("four")] {
        let mut case = gptq();
        case.configs[0].1["quantization_config"]["bits"] = bits.clone();
        assert_refused(&case, &format!("gptq, {bits} bits"));
    }
    for bits in [0, 9, 16] {
        let mut case = packed();
        weights_of(&mut case)["num_bits"] = json!(bits);
        assert_refused(&case, &format!("pack-quantized, {bits} bits"));
    }
}

#[test]
fn a_configuration_of_other_tensors_is_refused() {
    let mut case = gptq();
    case.configs[0].1["quantization_config"]["bits"] = json!(8);
    assert_refused(&case, "gptq, twice the bits");
    let mut case = packed();
    weights_of(&mut case)["num_bits"] = json!(8);
    assert_refused(&case, "pack-quantized, twice the bits");
    let mut case = fp8_blocks();
    case.configs[0].1["quantization_config"]["weight_block_size"] = json!([64, 64]);
    assert_refused(&case, "fp8 blocks, smaller ones");
    let mut case = fp8_blocks();
    case.configs[0].1["quantization_config"]["weight_block_size"] = json!([0, 128]);
    assert_refused(&case, "fp8 blocks of no rows");
}

#[test]
fn an_excluded_module_that_is_quantized_is_refused() {
    let mut case = packed();
    case.configs[0].1["quantization_config"]["ignore"] = json!([MODULE]);
    assert_refused(&case, "pack-quantized, ignored");
}

#[test]
fn a_description_that_cannot_be_read_is_refused() {
    let name = format!("{MODULE}.weight.quant_state.bitsandbytes__nf4");
    for text in ["", "{", "[]", "{\"quant_type\": \"nf4\"}", "\u{0}\u{0}"] {
        let mut case = coded();
        case.tensors.retain(|tensor| tensor.name != name);
        case.store(name.clone(), Dtype::U8, &[text.len()], text.into());
        assert_refused(&case, &format!("nf4, described by {text:?}"));
    }
    for (key, value) in [
        ("blocksize", json!(0)),
        ("blocksize", json!(-64)),
        ("shape", json!([12, 3000])),
        ("shape", json!([4_294_967_296_u64, 4_294_967_296_u64, 2])),
        ("shape", json!("12")),
    ] {
        let mut case = coded();
        let mut state = state();
        state[key] = value;
        let text = state.to_string();
        case.tensors.retain(|tensor| tensor.name != name);
        case.store(name.clone(), Dtype::U8, &[text.len()], text.into());
        assert_refused(&case, &format!("nf4, {state}"));
    }
}

#[test]
fn shapes_that_lie_about_their_tensors_are_refused() {
    for shape in [[24i64, 129], [25, 128], [-24, 128], [0, 0], [i64::MAX, i64::MAX]] {
        let mut case = packed();
        let name = format!("{MODULE}.weight_shape");
        case.tensors.retain(|tensor| tensor.name != name);
        let bytes = shape.iter().flat_map(|dim| dim.to_le_bytes()).collect();
        case.store(name, Dtype::I64, &[2], bytes);
        assert_refused(&case, &format!("pack-quantized, weight_shape {shape:?}"));
    }
}

#[test]
fn a_scale_in_a_file_that_is_not_there_is_an_error() {
    let case = gptq().scattered();
    for number in 1..=3 {
        let folder = Folder::on_disk();
        case.write(folder.path());
        let name = format!("model-{number:05}-of-00003.safetensors");
        fs::remove_file(folder.path().join(&name)).unwrap();
        let error = dequantized(folder.path(), Dequantization::to(Dtype::F32)).map(drop).unwrap_err();
        assert!(error.one_line().contains(&name), "{}", error.one_line());
    }
}

/// Checks that a checkpoint loads as it is stored, and does not dequantize.
fn assert_refused(case: &Case, context: &str) {
    let folder = Folder::on_disk();
    case.write(folder.path());
    assert_loads_as_stored(case, folder.path());
    let error = dequantized(folder.path(), Dequantization::to(Dtype::F32)).map(drop).expect_err(context);
    let line = error.one_line();
    assert!(matches!(error.kind(), ErrorKind::Malformed | ErrorKind::Unsupported), "{context}: {line}");
    let names_place = line.contains("model.layers.0.mlp") || line.contains("config.json");
    assert!(names_place && !line.contains('\n'), "{context}: {line}");
}

fn replace(case: &mut Case, part: &str, dtype: Dtype, shape: &[u64]) {
    let name = format!("{MODULE}.{part}");
    let tensor: &mut Stored = case.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
    *tensor = stored(&name, dtype, shape);
}

fn weights_of(case: &mut Case) -> &mut Value {
    &mut case.configs[0].1["quantization_config"]["config_groups"]["group_0"]["weights"]
}

fn gptq() -> Case {
    let mut case = Case::new(
        "bad gptq",
        json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": false, "desc_act": false, "checkpoint_format": "gptq_v2"}),
    );
    Gptq { zeros: Zeros::V2, ..Gptq::default() }.layer(&mut case, MODULE, [40, 256]);
    case
}

fn packed() -> Case {
    let weights = json!({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32, "dynamic": false});
    let mut case = Case::new(
        "bad pack-quantized",
        json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }),
    );
    case.keep(format!("{MODULE}.weight_packed"), Dtype::I32, &[24, 16]);
    case.keep(format!("{MODULE}.weight_scale"), Dtype::Bf16, &[24, 4]);
    let shape = [24i64, 128].iter().flat_map(|dim| dim.to_le_bytes()).collect();
    case.store(format!("{MODULE}.weight_shape"), Dtype::I64, &[2], shape);
    case
}

fn fp8_blocks() -> Case {
    let config = json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"});
    let mut case = Case::new("bad fp8", config);
    fp8::blocks(&mut case, MODULE, "weight_scale_inv", [200, 300], [128, 128], fp8::Scales::F32);
    case
}

fn nvfp4() -> Case {
    let mut case = Case::new(
        "bad nvfp4",
        json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}),
    );
    let codes = case.codes(16 * 64, 4);
    case.store(format!("{MODULE}.weight"), Dtype::U8, &[16, 32], nibbles_low_first(&codes));
    case.keep(format!("{MODULE}.weight_scale"), Dtype::F8E4m3, &[16, 4]);
    case.keep(format!("{MODULE}.weight_scale_2"), Dtype::F32, &[]);
    case
}

fn coded() -> Case {
    let config = json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"});
    let mut case = Case::new("bad nf4", config);
    let codes = case.codes(12 * 32, 4);
    case.store(format!("{MODULE}.weight"), Dtype::U8, &[192, 1], nibbles_high_first(&codes));
    case.keep(format!("{MODULE}.weight.absmax"), Dtype::F32, &[6]);
    case.keep(format!("{MODULE}.weight.quant_map"), Dtype::F32, &[16]);
    let text = state().to_string();
    case.store(
        format!("{MODULE}.weight.quant_state.bitsandbytes__nf4"),
        Dtype::U8,
        &[text.len()],
        text.into(),
    );
    case
}

fn state() -> Value {
    json!({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [12, 32]})
}

fn experts() -> Case {
    let mut case =
        Case::new("bad gpt-oss", json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}));
    let codes = case.codes(2 * 16 * 64 / 2, 8);
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    case.store(format!("{name}_blocks"), Dtype::U8, &[2, 16, 2, 16], low_bytes(&codes));
    case.keep(format!("{name}_scales"), Dtype::U8, &[2, 16, 2]);
    case
}
