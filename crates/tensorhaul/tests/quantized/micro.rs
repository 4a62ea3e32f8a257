//! Microscaling: blocks of 32 small floats with a power of two, and of 16 with an 8-bit float.

use serde_json::{Value, json};
use tensorhaul::Dtype;

use crate::case::{Case, Floats, low_bytes};
use crate::check::check;
use crate::fp8::{self, Scales};
use crate::numbers::{self, signed};
use crate::pack::{nibbles_low_first, stream, swizzled};

#[test]
fn experts_of_gpt_oss_keep_their_rows_and_lose_their_suffixes() {
    for (module, gate_up, down, separator) in [
        ("model.layers.0.mlp.experts", "gate_up_proj", "down_proj", "_"),
        ("block.0.mlp", "mlp1_weight", "mlp2_weight", "."),
    ] {
        let config = json!({
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        });
        let mut case =
            if separator == "_" { Case::new("gpt-oss", config) } else { Case::bare("gpt-oss, native") };
        case.keep_the_usual();
        let [experts, hidden, inner] = [3, 96, 64];
        for (name, rows, cols) in [(gate_up, 2 * inner, hidden), (down, hidden, inner)] {
            let name = format!("{module}.{name}");
            let codes = case.codes(experts * rows * cols, 4);
            let scales = case.power_scales(Dtype::U8, &[experts, rows, cols / 32]);
            case.store(
                format!("{name}{separator}blocks"),
                Dtype::U8,
                &[experts, rows, cols / 32, 16],
                nibbles_low_first(&codes),
            );
            case.store_floats(format!("{name}{separator}scales"), &scales);
            let values =
                codes.iter().zip(0..).map(|(code, index)| numbers::e2m1(*code) * scales.values[index / 32]);
            let values = values.collect();
            case.expect_values(name, &[experts, rows, cols], values);
        }
        case.keep("model.layers.0.mlp.experts.gate_up_proj_bias", Dtype::Bf16, &[experts, 2 * inner]);
        case.keep("model.layers.0.mlp.router.weight", Dtype::Bf16, &[experts, hidden]);
        check(&case);
        check(&case.scattered());
    }
}

#[test]
fn compressed_tensors_packs_floats_of_4_6_and_8_bits() {
    for (format, bits, payload, name) in [
        ("mxfp4-pack-quantized", 4, Payload::E2m1, "weight_packed"),
        ("mxfp6-pack-quantized", 6, Payload::E2m3, "weight_packed"),
        ("mxfp8-quantized", 8, Payload::E4m3, "weight"),
    ] {
        let config = json!({
            "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "format": format, "weights": {
                "num_bits": bits, "type": "float", "symmetric": true, "strategy": "group", "group_size": 32, "dynamic": false,
                "scale_dtype": "torch.uint8",
            }}},
        });
        check_blocks(Case::new(format, config), payload, name, "weight_scale", Dtype::U8);
    }
}

#[test]
fn quark_packs_floats_of_4_6_and_8_bits() {
    for (dtype, payload) in [
        ("fp4", Payload::E2m1),
        ("fp6_e2m3", Payload::E2m3),
        ("fp6_e3m2", Payload::E3m2),
        ("fp8_e4m3", Payload::E4m3),
    ] {
        let config = quark(json!({
            "dtype": dtype, "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "ch_axis": -1, "is_dynamic": false,
        }));
        check_blocks(
            Case::new(format!("quark, {dtype}"), config),
            payload,
            "weight",
            "weight_scale",
            Dtype::U8,
        );
    }
}

#[test]
fn quark_shares_scales_between_rows() {
    let config = quark(json!({
        "dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [32, 32], "scale_type": "float8_e8m0fnu", "is_dynamic": false,
    }));
    let mut case = Case::new("quark, mxfp8 of blocks", config);
    fp8::blocks(
        &mut case,
        "model.layers.0.mlp.down_proj",
        "weight_scale",
        [70, 96],
        [32, 32],
        Scales::F8E8m0,
    );
    case.keep_the_usual();
    check(&case);
}

#[test]
fn quark_may_lay_a_signed_exponent_before_each_block() {
    let config = quark(json!({
        "dtype": "mx", "mx_element_dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "is_dynamic": false,
    }));
    let mut case = Case::new("quark, mx", config);
    case.keep_the_usual();
    for (module, rows, cols) in
        [("model.layers.0.mlp.up_proj", 7, 64), ("model.layers.1.mlp.down_proj", 12, 96)]
    {
        let codes = case.codes(rows * cols, 4);
        let exponents = case.codes(rows * cols / 32, 8);
        let blocks = codes.chunks(32).zip(&exponents);
        let bytes =
            blocks.flat_map(|(codes, exponent)| [vec![*exponent as u8], nibbles_low_first(codes)].concat());
        let bytes = bytes.collect();
        case.store(format!("{module}.weight"), Dtype::U8, &[rows, cols / 32 * 17], bytes);
        case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
            let index = row * cols + col;
            numbers::e2m1(codes[index]) * 2f64.powi(signed(exponents[index / 32], 8)) as f32
        });
    }
    check(&case);
}

#[test]
fn deepseek_stores_floats_of_4_bits_as_signed_bytes_beside_fp8() {
    let config = json!({
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
    });
    let mut case = Case::bare("deepseek v4").config(
        "config.json",
        json!({"model_type": "deepseek_v4", "expert_dtype": "fp4", "quantization_config": config}),
    );
    fp8::blocks(&mut case, "layers.0.attn.wq_a", "scale", [200, 160], [128, 128], Scales::F8E8m0);
    for expert in 0..2 {
        for (name, size) in [("w1", [24, 96]), ("w2", [96, 64]), ("w3", [24, 96])] {
            let module = format!("layers.0.ffn.experts.{expert}.{name}");
            layer(&mut case, &module, size, Payload::E2m1, ("weight", Dtype::I8), ("scale", Dtype::F8E8m0));
        }
    }
    case.keep("layers.0.ffn.gate.weight", Dtype::Bf16, &[2, 96]);
    check(&case);
    check(&case.scattered());
}

#[test]
fn modelopt_packs_microscaled_floats_too() {
    for (algorithm, payload) in
        [("MXFP8", Payload::E4m3), ("W4A8_MXFP4_FP8", Payload::E2m1), ("MXFP4", Payload::E2m1)]
    {
        let config = json!({"producer": {"name": "modelopt"}, "quantization": {
            "quant_algo": algorithm, "group_size": 32, "exclude_modules": ["lm_head"],
        }});
        let case = Case::bare(format!("modelopt, {algorithm}")).config("hf_quant_config.json", config);
        check_blocks(case, payload, "weight", "weight_scale", Dtype::U8);
    }
}

#[test]
fn scales_of_scales_multiply_in_modelopt() {
    for (algorithm, file) in
        [("NVFP4", "config.json"), ("NVFP4_AWQ", "hf_quant_config.json"), ("W4A16_NVFP4", "config.json")]
    {
        let config = if file == "config.json" {
            json!({"quantization_config": {
                "quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], "producer": {"name": "modelopt"},
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": false}}},
            }})
        } else {
            json!({"producer": {"name": "modelopt"}, "quantization": {
                "quant_algo": algorithm, "group_size": 16, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"],
            }})
        };
        let mut case = Case::bare(format!("nvfp4, modelopt, {algorithm}")).config(file, config);
        case.keep_the_usual();
        for (module, size) in
            [("model.layers.0.self_attn.q_proj", [30, 48]), ("model.layers.0.self_attn.k_proj", [17, 160])]
        {
            let global = Floats::of(Dtype::F32, &[], vec![2.3e-5 + case.dice.below(99) as f32 * 1e-6]);
            nvfp4(&mut case, module, size, "weight", |scale| scale * global.values[0]);
            case.store_floats(format!("{module}.weight_scale_2"), &global);
            case.keep(format!("{module}.input_scale"), Dtype::F32, &[]);
        }
        check(&case);
        check(&case.scattered());
    }
}

#[test]
fn every_expert_has_its_own_scale_of_scales() {
    let config =
        json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*router*"]});
    let mut case = Case::new("nvfp4, modelopt, experts", config);
    case.keep("model.layers.0.mlp.router.weight", Dtype::Bf16, &[2, 48]);
    for expert in 0..2 {
        for name in ["gate_proj", "up_proj", "down_proj"] {
            let module = format!("model.layers.0.mlp.experts.{expert}.{name}");
            let global = Floats::of(Dtype::F32, &[], vec![2.3e-5 + case.dice.below(99) as f32 * 1e-6]);
            nvfp4(&mut case, &module, [16, 48], "weight", |scale| scale * global.values[0]);
            case.store_floats(format!("{module}.weight_scale_2"), &global);
            case.keep(format!("{module}.input_scale"), Dtype::F32, &[]);
        }
    }
    check(&case);
}

#[test]
fn scales_in_one_dimension_lie_in_tiles() {
    let config = json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]});
    let mut case = Case::new("nvfp4, modelopt, swizzled", config);
    case.keep_the_usual();
    for (module, [rows, cols]) in
        [("model.layers.0.mlp.up_proj", [128, 64]), ("model.layers.1.mlp.down_proj", [160, 96])]
    {
        let codes = case.codes(rows * cols, 4);
        let scales = case.e4m3_scales(Dtype::U8, &[rows, cols / 16]);
        let global = Floats::of(Dtype::F32, &[], vec![3.1e-5]);
        let tiles = swizzled(&scales.bytes, rows, cols / 16);
        case.store(format!("{module}.weight"), Dtype::U8, &[rows, cols / 2], nibbles_low_first(&codes));
        case.store(format!("{module}.weight_scale"), Dtype::U8, &[tiles.len()], tiles);
        case.store_floats(format!("{module}.weight_scale_2"), &global);
        case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
            let index = row * cols + col;
            numbers::e2m1(codes[index]) * (scales.values[index / 16] * global.values[0])
        });
    }
    check(&case);
}

#[test]
fn scales_of_scales_divide_in_compressed_tensors() {
    let config = json!({
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "format": "nvfp4-pack-quantized", "weights": {
            "num_bits": 4, "type": "float", "symmetric": true, "strategy": "tensor_group", "group_size": 16, "dynamic": false,
        }}},
    });
    let mut case = Case::new("nvfp4, compressed-tensors", config);
    case.keep_the_usual();
    for (module, size) in
        [("model.layers.0.self_attn.q_proj", [30, 48]), ("model.layers.0.self_attn.k_proj", [17, 160])]
    {
        let global = Floats::of(Dtype::F32, &[1], vec![26880.0 + case.dice.below(999) as f32]);
        nvfp4(&mut case, module, size, "weight_packed", |scale| scale / global.values[0]);
        case.store_floats(format!("{module}.weight_global_scale"), &global);
        case.keep(format!("{module}.input_global_scale"), Dtype::F32, &[1]);
    }
    check(&case);
    check(&case.scattered());
}

#[test]
fn scales_of_scales_multiply_in_quark() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let config = quark(json!([
            {"dtype": "fp4", "qscheme": "per_group", "group_size": 16, "scale_format": "e4m3", "is_dynamic": false, "ch_axis": -1},
            {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": false, "is_scale_quant": true},
        ]));
        let mut case = Case::new(format!("nvfp4, quark, {dtype}"), config);
        case.keep_the_usual();
        let module = "model.layers.0.mlp.down_proj";
        let global = Floats::of(dtype, &[], vec![3.1e-5]);
        nvfp4(&mut case, module, [30, 48], "weight", |scale| scale * global.values[0]);
        case.store_floats(format!("{module}.weight_scale_2"), &global);
        check(&case);
    }
}

/// What the elements of a block are.
#[derive(Clone, Copy, Debug)]
enum Payload {
    E2m1,
    E2m3,
    E3m2,
    E4m3,
}

/// Checks two layers of blocks of 32 with powers of two.
fn check_blocks(mut case: Case, payload: Payload, name: &str, scale_name: &str, scale_dtype: Dtype) {
    case.keep_the_usual();
    let stored_as = if matches!(payload, Payload::E4m3) { Dtype::F8E4m3 } else { Dtype::U8 };
    for (module, size) in
        [("model.layers.0.mlp.up_proj", [25, 64]), ("model.layers.1.mlp.down_proj", [34, 160])]
    {
        layer(&mut case, module, size, payload, (name, stored_as), (scale_name, scale_dtype));
    }
    case.keep("model.layers.0.mlp.up_proj.bias", Dtype::Bf16, &[25]);
    check(&case);
    check(&case.scattered());
}

fn layer(
    case: &mut Case,
    module: &str,
    [rows, cols]: [usize; 2],
    payload: Payload,
    (name, dtype): (&str, Dtype),
    (scale_name, scale_dtype): (&str, Dtype),
) {
    let bits = match payload {
        Payload::E2m1 => 4,
        Payload::E2m3 | Payload::E3m2 => 6,
        Payload::E4m3 => 8,
    };
    let codes = case.codes(rows * cols, bits);
    let scales = case.power_scales(scale_dtype, &[rows, cols / 32]);
    let bytes = match payload {
        Payload::E2m1 => nibbles_low_first(&codes),
        Payload::E2m3 | Payload::E3m2 => stream(&codes, 6),
        Payload::E4m3 => low_bytes(&codes),
    };
    case.store(format!("{module}.{name}"), dtype, &[rows, cols * bits as usize / 8], bytes);
    case.store_floats(format!("{module}.{scale_name}"), &scales);
    let value = match payload {
        Payload::E2m1 => numbers::e2m1,
        Payload::E2m3 => numbers::e2m3,
        Payload::E3m2 => numbers::e3m2,
        Payload::E4m3 => numbers::e4m3,
    };
    case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
        let index = row * cols + col;
        value(codes[index]) * scales.values[index / 32]
    });
}

/// Stores blocks of 16, whose scales become what `effective` makes of them.
fn nvfp4(
    case: &mut Case,
    module: &str,
    [rows, cols]: [usize; 2],
    name: &str,
    effective: impl Fn(f32) -> f32,
) {
    let codes = case.codes(rows * cols, 4);
    let scales = case.e4m3_scales(Dtype::F8E4m3, &[rows, cols / 16]);
    case.store(format!("{module}.{name}"), Dtype::U8, &[rows, cols / 2], nibbles_low_first(&codes));
    case.store_floats(format!("{module}.weight_scale"), &scales);
    case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
        let index = row * cols + col;
        numbers::e2m1(codes[index]) * effective(scales.values[index / 16])
    });
}

fn quark(weight: Value) -> Value {
    json!({
        "quant_method": "quark", "exclude": ["lm_head"], "layer_quant_config": {},
        "global_quant_config": {"weight": weight, "input_tensors": null},
        "export": {"pack_method": "reorder", "weight_format": "real_quantized"},
    })
}
