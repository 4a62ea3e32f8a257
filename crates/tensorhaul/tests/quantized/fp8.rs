//! FP8 with scales for tensors, channels and blocks, as every producer names and shapes them.

use serde_json::{Value, json};
use tensorhaul::Dtype;

use crate::case::{Case, Floats, low_bytes};
use crate::check::check;
use crate::numbers;

#[test]
fn one_scale_of_no_dimensions_is_for_the_whole_tensor() {
    let config = json!({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]});
    let mut case = Case::new("fp8, tensor, 0-d", config);
    case.keep_the_usual();
    for module in ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"] {
        let scale = case.scales(Dtype::F32, &[]);
        let input_scale = case.scales(Dtype::F32, &[]);
        weight(&mut case, module, [49, 33], &scale, |_, _| 0);
        case.store_floats(format!("{module}.weight_scale"), &scale);
        case.keep_floats(format!("{module}.input_scale"), &input_scale);
    }
    case.keep("model.layers.0.self_attn.k_scale", Dtype::F32, &[]);
    case.keep("model.layers.0.self_attn.v_scale", Dtype::F32, &[]);
    check(&case);
}

#[test]
fn an_inverse_scale_of_a_whole_tensor_multiplies() {
    let config = json!({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": null});
    let mut case = Case::new("fp8, tensor, weight_scale_inv", config);
    let scale = case.scales(Dtype::F32, &[]);
    weight(&mut case, "model.layers.0.mlp.up_proj", [20, 48], &scale, |_, _| 0);
    case.store_floats("model.layers.0.mlp.up_proj.weight_scale_inv", &scale);
    case.keep("model.layers.0.mlp.up_proj.activation_scale", Dtype::F32, &[]);
    case.keep_the_usual();
    check(&case);
}

#[test]
fn mistral_calls_them_qscale() {
    let config = json!({"quant_method": "fp8", "activation_scheme": "static"});
    let mut case =
        Case::bare("fp8, qscale_weight").config("config.json", json!({"quantization_config": config}));
    let scale = case.scales(Dtype::F32, &[]);
    weight(&mut case, "layers.0.attention.wq", [20, 48], &scale, |_, _| 0);
    case.store_floats("layers.0.attention.wq.qscale_weight", &scale);
    case.keep("layers.0.attention.wq.qscale_act", Dtype::F32, &[]);
    case.keep("norm.weight", Dtype::Bf16, &[48]);
    check(&case);
}

#[test]
fn one_scale_of_one_dimension_is_for_the_whole_tensor() {
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        let mut case =
            Case::new(format!("fp8, tensor, [1], {dtype}"), float_quantized("tensor", &Value::Null));
        let scale = case.scales(dtype, &[1]);
        weight(&mut case, "model.layers.0.mlp.up_proj", [20, 48], &scale, |_, _| 0);
        case.store_floats("model.layers.0.mlp.up_proj.weight_scale", &scale);
        case.keep("model.layers.0.mlp.up_proj.input_scale", Dtype::Bf16, &[1]);
        case.keep_the_usual();
        check(&case);
    }
}

#[test]
fn a_scale_for_each_row_may_have_one_dimension_or_two() {
    for (name, config, shape, dtype) in [
        ("compressed-tensors", float_quantized("channel", &Value::Null), vec![50, 1], Dtype::Bf16),
        (
            "fbgemm",
            json!({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}),
            vec![50, 1],
            Dtype::F32,
        ),
        (
            "modelopt",
            json!({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": ["lm_head"]}),
            vec![50],
            Dtype::F32,
        ),
        ("quark", quark("per_channel"), vec![50], Dtype::F32),
    ] {
        let mut case = Case::new(format!("fp8, channel, {name}"), config);
        let scale = case.scales(dtype, &shape);
        weight(&mut case, "model.layers.0.mlp.up_proj", [50, 31], &scale, |row, _| row);
        case.store_floats("model.layers.0.mlp.up_proj.weight_scale", &scale);
        case.keep("model.layers.0.mlp.up_proj.bias", Dtype::Bf16, &[50]);
        case.keep_the_usual();
        check(&case);
        check(&case.scattered());
    }
}

#[test]
fn blocks_have_partial_edges() {
    for (block, sizes) in [
        ([128, 128], [[200, 136], [64, 300]]),
        ([32, 16], [[70, 50], [31, 15]]),
        // A grid of one column is no scale a row.
        ([128, 128], [[200, 100], [3, 384]]),
    ] {
        let config = json!({
            "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block, "activation_scheme": "dynamic",
        });
        let mut case = Case::new(format!("fp8, blocks, {block:?}, {sizes:?}"), config);
        case.keep_the_usual();
        for (module, size) in
            ["model.layers.0.self_attn.kv_a_proj_with_mqa", "model.layers.1.mlp.down_proj"].iter().zip(sizes)
        {
            blocks(&mut case, module, "weight_scale_inv", size, block, Scales::F32);
        }
        check(&case);
        check(&case.scattered());
    }
}

#[test]
fn blocks_of_compressed_tensors_name_their_size_in_their_group() {
    for structure in [json!([128, 128]), json!("128x128")] {
        let mut case = Case::new(
            format!("fp8, blocks, compressed-tensors, {structure}"),
            float_quantized("block", &structure),
        );
        blocks(&mut case, "model.layers.0.mlp.up_proj", "weight_scale", [140, 260], [128, 128], Scales::Bf16);
        case.keep_the_usual();
        check(&case);
    }
}

#[test]
fn scales_of_blocks_may_be_powers_of_two() {
    for scales in [Scales::F8E8m0, Scales::U8] {
        let config = json!({
            "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
        });
        let mut case = Case::new(format!("fp8, blocks, {scales:?}"), config);
        blocks(&mut case, "layers.0.attn.wq_a", "scale", [200, 1400], [128, 128], scales);
        case.keep("layers.0.attn_norm.weight", Dtype::Bf16, &[64]);
        check(&case);
    }
}

#[test]
fn modelopt_writes_blocks_in_four_dimensions() {
    let config = json!({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8_PB_WO", "exclude_modules": ["lm_head"]}});
    let mut case = Case::bare("fp8, blocks, modelopt").config("hf_quant_config.json", config);
    let scale = case.scales(Dtype::F32, &[2, 1, 3, 1]);
    weight(&mut case, "model.layers.0.mlp.up_proj", [200, 300], &scale, |row, col| row / 128 * 3 + col / 128);
    case.store_floats("model.layers.0.mlp.up_proj.weight_scale", &scale);
    case.keep_the_usual();
    check(&case);
}

#[test]
fn modelopt_writes_one_scale_in_none_or_one_dimension() {
    for shape in [vec![], vec![1]] {
        let config = json!({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}});
        let mut case =
            Case::bare(format!("fp8, tensor, modelopt, {shape:?}")).config("hf_quant_config.json", config);
        let scale = case.scales(Dtype::F32, &shape);
        weight(&mut case, "model.layers.0.mlp.up_proj", [20, 30], &scale, |_, _| 0);
        case.store_floats("model.layers.0.mlp.up_proj.weight_scale", &scale);
        case.keep("model.layers.0.mlp.up_proj.input_scale", Dtype::F32, &shape);
        case.keep("model.layers.0.self_attn.k_proj.k_scale", Dtype::F32, &[]);
        case.keep_the_usual();
        check(&case);
    }
}

#[test]
fn quark_writes_tensors_and_blocks() {
    let mut case = Case::new("fp8, tensor, quark", quark("per_tensor"));
    let scale = case.scales(Dtype::F32, &[]);
    weight(&mut case, "model.layers.0.mlp.up_proj", [20, 30], &scale, |_, _| 0);
    case.store_floats("model.layers.0.mlp.up_proj.weight_scale", &scale);
    case.keep_the_usual();
    check(&case);
    let mut config = quark("per_block");
    config["global_quant_config"]["weight"]["block_size"] = json!([128, 128]);
    let mut case = Case::new("fp8, blocks, quark", config);
    blocks(&mut case, "model.layers.0.mlp.up_proj", "weight_scale", [140, 260], [128, 128], Scales::F32);
    case.keep_the_usual();
    check(&case);
}

#[test]
fn other_floats_of_a_byte_are_read_by_their_dtype() {
    for (dtype, value) in FLOATS_OF_A_BYTE {
        let config = json!({"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": []});
        let mut case = Case::new(format!("fp8, tensor, {dtype}"), config);
        let scale = case.scales(Dtype::F32, &[]);
        let codes: Vec<u32> = (0..256).collect();
        case.store("model.layers.0.mlp.up_proj.weight", dtype, &[16, 16], low_bytes(&codes));
        case.store_floats("model.layers.0.mlp.up_proj.weight_scale", &scale);
        case.expect("model.layers.0.mlp.up_proj.weight", [16, 16], |row, col| {
            value(codes[row * 16 + col]) * scale.values[0]
        });
        case.keep_the_usual();
        check(&case);
    }
}

#[test]
fn fused_experts_keep_their_columns_first() {
    let config = json!({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]});
    let mut case = Case::new("fp8, experts of llama 4", config);
    case.keep_the_usual();
    let [experts, hidden, inner] = [3, 20, 12];
    let experts_name = "language_model.model.layers.0.feed_forward.experts";
    for (name, rows, cols, scale_shape) in [
        ("gate_up_proj", hidden, 2 * inner, [experts, 1, 2 * inner]),
        ("down_proj", inner, hidden, [experts, inner, 1]),
    ] {
        let codes = case.codes(experts * rows * cols, 8);
        let scale = case.scales(Dtype::F32, &scale_shape);
        case.store(
            format!("{experts_name}.{name}"),
            Dtype::F8E4m3,
            &[experts, rows, cols],
            low_bytes(&codes),
        );
        case.store_floats(format!("{experts_name}.{name}_scale"), &scale);
        let [_, scale_rows, scale_cols] = scale_shape;
        let value = |(index, code): (usize, &u32)| {
            let (expert, row, col) = (index / (rows * cols), index / cols % rows, index % cols);
            let place = (expert * scale_rows + row % scale_rows) * scale_cols + col % scale_cols;
            numbers::e4m3(*code) * scale.values[place]
        };
        let values = codes.iter().enumerate().map(value).collect();
        case.expect_values(format!("{experts_name}.{name}"), &[experts, rows, cols], values);
    }
    check(&case);
}

#[test]
fn a_module_that_is_ignored_and_has_no_scale_is_a_cast_of_its_codes() {
    let config =
        json!({"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]});
    let mut case = Case::new("fp8, some without scales", config);
    let scale = case.scales(Dtype::F32, &[]);
    weight(&mut case, "model.layers.0.mlp.up_proj", [20, 30], &scale, |_, _| 0);
    case.store_floats("model.layers.0.mlp.up_proj.weight_scale", &scale);
    let codes = case.codes(20 * 6, 8);
    case.store("lm_head.weight", Dtype::F8E5m2, &[20, 6], low_bytes(&codes));
    case.expect("lm_head.weight", [20, 6], |row, col| numbers::e5m2(codes[row * 6 + col]));
    check(&case);
}

/// Every float of a byte, and what its codes stand for.
pub(crate) const FLOATS_OF_A_BYTE: [(Dtype, numbers::Number); 4] = [
    (Dtype::F8E4m3, numbers::e4m3),
    (Dtype::F8E5m2, numbers::e5m2),
    (Dtype::F8E4m3Fnuz, numbers::e4m3fnuz),
    (Dtype::F8E5m2Fnuz, numbers::e5m2fnuz),
];

/// How the scales of blocks are stored.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Scales {
    F32,
    Bf16,
    F8E8m0,
    U8,
}

/// Stores an F8_E4M3 weight of any codes, NaN among them, and expects each times the scale that `place` says.
pub(crate) fn weight(
    case: &mut Case,
    module: &str,
    [rows, cols]: [usize; 2],
    scale: &Floats,
    place: impl Fn(usize, usize) -> usize,
) {
    let mut codes = case.codes(rows * cols, 8);
    (codes[1], codes[2], codes[rows * cols - 1]) = (0x7f, 0xff, 0x80);
    case.store(format!("{module}.weight"), Dtype::F8E4m3, &[rows, cols], low_bytes(&codes));
    case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
        numbers::e4m3(codes[row * cols + col]) * scale.values[place(row, col)]
    });
}

/// Stores a weight with a scale for each block, and its scales by this name.
pub(crate) fn blocks(
    case: &mut Case,
    module: &str,
    scale_name: &str,
    [rows, cols]: [usize; 2],
    [block_rows, block_cols]: [usize; 2],
    scales: Scales,
) {
    let grid = [rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
    let scale = match scales {
        Scales::F32 => case.scales(Dtype::F32, &grid),
        Scales::Bf16 => case.scales(Dtype::Bf16, &grid),
        Scales::F8E8m0 => case.power_scales(Dtype::F8E8m0, &grid),
        Scales::U8 => case.power_scales(Dtype::U8, &grid),
    };
    weight(case, module, [rows, cols], &scale, |row, col| row / block_rows * grid[1] + col / block_cols);
    case.store_floats(format!("{module}.{scale_name}"), &scale);
}

fn float_quantized(strategy: &str, block_structure: &Value) -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": null,
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": null, "weights": {
            "num_bits": 8, "type": "float", "symmetric": true, "strategy": strategy, "block_structure": block_structure,
            "dynamic": false, "group_size": null,
        }}},
    })
}

fn quark(scheme: &str) -> Value {
    json!({
        "quant_method": "quark", "exclude": ["lm_head"], "layer_quant_config": {},
        "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": scheme, "is_dynamic": false}},
        "export": {"pack_method": "reorder"},
    })
}
