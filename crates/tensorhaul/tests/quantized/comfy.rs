//! ComfyUI: single files that say in their header, or in tensors, how their layers are stored.

use serde_json::json;
use tensorhaul::Dtype;

use crate::case::{Case, Floats, low_bytes};
use crate::check::check;
use crate::numbers;
use crate::pack::{nibbles_high_first, swizzled};

#[test]
fn the_header_names_the_format_of_each_layer() {
    check(&all_formats(Marks::Header));
}

#[test]
fn layers_name_their_own_format() {
    check(&all_formats(Marks::Tensors));
}

#[test]
fn both_marks_together_are_fine() {
    check(&all_formats(Marks::Both));
}

#[test]
fn scaled_fp8_of_old_has_a_marker_and_its_scales_other_names() {
    let mut case = Case::bare("comfy, scaled_fp8");
    case.store("scaled_fp8", Dtype::F8E4m3, &[2], vec![0, 0]);
    case.optional.push("scaled_fp8".to_owned());
    for module in ["diffusion_model.blocks.0.attn.qkv", "diffusion_model.blocks.1.mlp.fc1"] {
        float8(&mut case, module, "scale_weight", true);
        case.keep(format!("{module}.scale_input"), Dtype::F32, &[]);
    }
    // Not every layer is quantized: one is a cast, one was left alone and has a scale of 1.
    float8(&mut case, "diffusion_model.time_embed.0", "scale_weight", false);
    case.keep("diffusion_model.final_layer.weight", Dtype::Bf16, &[8, 16]);
    case.keep("diffusion_model.norm.weight", Dtype::Bf16, &[16]);
    check(&case);
}

#[test]
fn factors_of_columns_fold_on_request() {
    for is_folded in [false, true] {
        let mut case = Case::bare(format!("comfy, nvfp4 with pre_quant_scale, folded {is_folded}"));
        let module = "blocks.0.attn.to_q";
        let factors = case.offsets(Dtype::Bf16, &[80]);
        let factor = |col: usize| if is_folded { factors.values[col] } else { 1.0 };
        nvfp4(&mut case, module, [48, 80], &factor);
        mark(&mut case, module, "nvfp4");
        case.is_folded = is_folded;
        let name = format!("{module}.pre_quant_scale");
        if is_folded {
            case.store_floats(name.clone(), &factors);
            case.optional.push(name);
        } else {
            case.keep_floats(name, &factors);
        }
        check(&case);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Marks {
    Header,
    Tensors,
    Both,
}

fn all_formats(marks: Marks) -> Case {
    let mut case = Case::bare(format!("comfy, {marks:?}"));
    float8(&mut case, "blocks.0.attn.to_q", "weight_scale", true);
    nvfp4(&mut case, "blocks.0.attn.to_k", [48, 80], &|_| 1.0);
    nvfp4(&mut case, "blocks.1.attn.to_k", [144, 64], &|_| 1.0);
    mxfp8(&mut case, "blocks.0.attn.to_v", [144, 96]);
    integers(&mut case, "blocks.0.mlp.fc1");
    case.keep("blocks.0.attn.to_k.bias", Dtype::Bf16, &[48]);
    case.keep("blocks.0.norm.weight", Dtype::Bf16, &[48]);
    let layers = [
        ("blocks.0.attn.to_q", "float8_e4m3fn"),
        ("blocks.0.attn.to_k", "nvfp4"),
        ("blocks.1.attn.to_k", "nvfp4"),
        ("blocks.0.attn.to_v", "mxfp8"),
        ("blocks.0.mlp.fc1", "int8_tensorwise"),
    ];
    if marks != Marks::Tensors {
        let formats: serde_json::Map<_, _> =
            layers.iter().map(|(layer, format)| ((*layer).to_owned(), json!({"format": format}))).collect();
        let metadata = json!({"format_version": "1.0", "layers": formats});
        case.metadata.insert("_quantization_metadata".to_owned(), metadata.to_string());
    }
    if marks != Marks::Header {
        layers.iter().for_each(|(layer, format)| mark(&mut case, layer, format));
    }
    case
}

/// Stores what names a layer's format.
fn mark(case: &mut Case, module: &str, format: &str) {
    let bytes = json!({"format": format}).to_string().into_bytes();
    let name = format!("{module}.comfy_quant");
    case.store(name.clone(), Dtype::U8, &[bytes.len()], bytes);
    case.optional.push(name);
}

fn float8(case: &mut Case, module: &str, scale_name: &str, is_scaled: bool) {
    let [rows, cols] = [22, 33];
    let codes = case.codes(rows * cols, 8);
    let scale = case.scales(Dtype::F32, &[]);
    case.store(format!("{module}.weight"), Dtype::F8E4m3, &[rows, cols], low_bytes(&codes));
    if is_scaled {
        case.store_floats(format!("{module}.{scale_name}"), &scale);
    }
    case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
        let value = numbers::e4m3(codes[row * cols + col]);
        if is_scaled { value * scale.values[0] } else { value }
    });
}

/// Rows and columns are multiples of 16 here, as the format pads them.
fn nvfp4(case: &mut Case, module: &str, [rows, cols]: [usize; 2], factor: &dyn Fn(usize) -> f32) {
    let codes = case.codes(rows * cols, 4);
    let scales = case.e4m3_scales(Dtype::F8E4m3, &[rows, cols / 16]);
    let global = Floats::of(Dtype::F32, &[], vec![3.7e-5]);
    case.store(format!("{module}.weight"), Dtype::U8, &[rows, cols / 2], nibbles_high_first(&codes));
    store_tiles(case, module, &scales, [rows, cols / 16]);
    case.store_floats(format!("{module}.weight_scale_2"), &global);
    case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
        let index = row * cols + col;
        numbers::e2m1(codes[index]) * (scales.values[index / 16] * global.values[0]) * factor(col)
    });
}

fn mxfp8(case: &mut Case, module: &str, [rows, cols]: [usize; 2]) {
    let codes = case.codes(rows * cols, 8);
    let scales = case.power_scales(Dtype::F8E8m0, &[rows, cols / 32]);
    case.store(format!("{module}.weight"), Dtype::F8E4m3, &[rows, cols], low_bytes(&codes));
    store_tiles(case, module, &scales, [rows, cols / 32]);
    case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
        let index = row * cols + col;
        numbers::e4m3(codes[index]) * scales.values[index / 32]
    });
}

fn store_tiles(case: &mut Case, module: &str, scales: &Floats, [rows, cols]: [usize; 2]) {
    let bytes = swizzled(&scales.bytes, rows, cols);
    let shape = [rows.next_multiple_of(128), cols.next_multiple_of(4)];
    case.store(format!("{module}.weight_scale"), scales.dtype, &shape, bytes);
}

fn integers(case: &mut Case, module: &str) {
    let [rows, cols] = [19, 24];
    let codes = case.codes(rows * cols, 8);
    let scale = case.scales(Dtype::F32, &[]);
    case.store(format!("{module}.weight"), Dtype::I8, &[rows, cols], low_bytes(&codes));
    case.store_floats(format!("{module}.weight_scale"), &scale);
    case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
        numbers::signed(codes[row * cols + col], 8) as f32 * scale.values[0]
    });
}
