//! AWQ: the three layouts that its kernels want.

use serde_json::{Value, json};
use tensorhaul::Dtype;

use crate::case::{Case, Floats};
use crate::check::check;
use crate::pack::{awq_fast, awq_words, stream_words, transposed};

#[test]
fn gemm_words_hold_eight_rows_in_the_order_of_the_kernel() {
    for (group_size, cols) in [(128, 256), (64, 320), (32, 96), (-1, 96)] {
        let mut case = Case::new(format!("awq, gemm, groups of {group_size}"), config("gemm", group_size));
        case.keep_the_usual();
        let group_size = usize::try_from(group_size).unwrap_or(cols);
        gemm_layer(&mut case, "model.layers.0.self_attn.q_proj", [40, cols], group_size);
        gemm_layer(&mut case, "model.layers.1.mlp.down_proj", [72, cols], group_size);
        case.keep("model.layers.0.self_attn.q_proj.bias", Dtype::F16, &[40]);
        case.keep("visual.blocks.0.attn.qkv.weight", Dtype::F16, &[24, 16]);
        check(&case);
    }
}

#[test]
fn square_layers_are_told_from_gptq_by_their_configuration() {
    let mut case = Case::new("awq, gemm, square", config("gemm", 64));
    gemm_layer(&mut case, "model.layers.0.self_attn.o_proj", [128, 128], 64);
    check(&case.scattered());
}

#[test]
fn the_spelling_of_the_packer_itself_is_understood() {
    for key in ["quant_config.json", "config.json"] {
        let own = json!({"zero_point": true, "q_group_size": 64, "w_bit": 4, "version": "GEMM", "quant_method": "awq"});
        let config = if key == "config.json" { json!({"quantization_config": own}) } else { own };
        let mut case = Case::bare(format!("awq, {key}")).config(key, config);
        gemm_layer(&mut case, "model.layers.0.mlp.up_proj", [48, 128], 64);
        case.keep_the_usual();
        check(&case);
    }
}

#[test]
fn auto_round_writes_awq_too() {
    let config = json!({
        "quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 64, "sym": false,
    });
    let mut case = Case::new("auto-round, auto_awq", config);
    gemm_layer(&mut case, "model.layers.0.mlp.up_proj", [48, 128], 64);
    case.keep_the_usual();
    check(&case);
}

#[test]
fn gemv_words_run_along_columns_and_scales_are_padded() {
    for (group_size, cols) in [(128, 384), (64, 320), (32, 160)] {
        let mut case = Case::new(format!("awq, gemv, groups of {group_size}"), config("gemv", group_size));
        case.keep_the_usual();
        gemv_layer(&mut case, "model.layers.0.mlp.gate_proj", [24, cols], group_size as usize);
        gemv_layer(&mut case, "model.layers.1.mlp.down_proj", [40, cols], group_size as usize);
        check(&case);
    }
}

#[test]
fn the_fast_layout_deals_columns_out_and_stores_products_for_zero_points() {
    check_fast("awq, gemv_fast", config("gemv_fast", 128), "qzeros");
}

/// llm-awq calls them so, and AutoAWQ in its first version of the layout.
#[test]
fn products_for_zero_points_may_be_called_scaled_zeros() {
    check_fast("awq, gemv_fast, scaled_zeros", config("gemv_fast", 128), "scaled_zeros");
    let config = json!({"quant_method": "awq", "backend": "llm-awq", "bits": 4, "group_size": 128, "zero_point": true});
    check_fast("llm-awq", config, "scaled_zeros");
}

fn check_fast(name: &str, config: Value, zeros_name: &str) {
    let mut case = Case::new(name, config);
    case.keep_the_usual();
    fast_layer(&mut case, "model.layers.0.mlp.gate_proj", [24, 256], zeros_name);
    fast_layer(&mut case, "model.layers.1.mlp.down_proj", [40, 128], zeros_name);
    check(&case);
}

fn config(version: &str, group_size: i64) -> Value {
    json!({
        "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": true, "version": version,
        "modules_to_not_convert": ["visual"],
    })
}

/// Codes, zero-points and scales of a layer, all in the order of rows.
struct Layer {
    codes: Vec<u32>,
    zero_points: Vec<u32>,
    scales: Floats,
    group_count: usize,
}

fn layer(case: &mut Case, module: &str, [rows, cols]: [usize; 2], group_size: usize) -> Layer {
    let group_count = cols.div_ceil(group_size);
    let codes = case.codes(rows * cols, 4);
    let zero_points = case.codes(rows * group_count, 4);
    let scales = case.scales(Dtype::F16, &[rows, group_count]);
    case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
        let group = row * group_count + col / group_size;
        (codes[row * cols + col] as i32 - zero_points[group] as i32) as f32 * scales.values[group]
    });
    Layer { codes, zero_points, scales, group_count }
}

fn gemm_layer(case: &mut Case, module: &str, [rows, cols]: [usize; 2], group_size: usize) {
    let Layer { codes, zero_points, scales, group_count } = layer(case, module, [rows, cols], group_size);
    let by_column = transposed(&codes, cols);
    let words: Vec<u32> = by_column.chunks(rows).flat_map(awq_words).collect();
    case.store_words(format!("{module}.qweight"), &[cols, rows / 8], &words);
    let by_group = transposed(&zero_points, group_count);
    let words: Vec<u32> = by_group.chunks(rows).flat_map(awq_words).collect();
    case.store_words(format!("{module}.qzeros"), &[group_count, rows / 8], &words);
    let by_group = Floats::of(Dtype::F16, &[group_count, rows], transposed(&scales.values, group_count));
    case.store_floats(format!("{module}.scales"), &by_group);
}

fn gemv_layer(case: &mut Case, module: &str, [rows, cols]: [usize; 2], group_size: usize) {
    let Layer { codes, zero_points, scales, group_count } = layer(case, module, [rows, cols], group_size);
    let words: Vec<u32> = codes.chunks(cols).flat_map(|row| stream_words(row, 4)).collect();
    case.store_words(format!("{module}.qweight"), &[rows, cols / 8], &words);
    let zero_words = zero_words(group_count, group_size);
    let mut words = Vec::new();
    for row in zero_points.chunks(group_count) {
        let mut row = stream_words(row, 4);
        row.resize(zero_words, 0);
        words.extend(row);
    }
    case.store_words(format!("{module}.qzeros"), &[rows, zero_words], &words);
    let mut padded = Vec::new();
    for row in scales.values.chunks(group_count) {
        padded.extend_from_slice(row);
        padded.resize(padded.len() + 8 * zero_words - group_count, 0.0);
    }
    case.store_floats(format!("{module}.scales"), &Floats::of(Dtype::F16, &[rows, 8 * zero_words], padded));
}

fn fast_layer(case: &mut Case, module: &str, [rows, cols]: [usize; 2], zeros_name: &str) {
    let group_size = 128;
    let group_count = cols / group_size;
    let codes = case.codes(rows * cols, 4);
    let scales = case.scales(Dtype::F16, &[group_count, rows]);
    let zero_points = case.codes(group_count * rows, 4);
    let products =
        scales.values.iter().zip(&zero_points).map(|(scale, zero)| -(scale * *zero as f32)).collect();
    let products = Floats::of(Dtype::F16, &[group_count, rows], products);
    let words = awq_fast(&codes, rows, cols);
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    case.store(format!("{module}.qweight"), Dtype::I16, &[rows / 4, cols], bytes);
    let padded_groups = 8 * zero_words(group_count, group_size);
    for (name, floats) in [("scales", &scales), (zeros_name, &products)] {
        let mut padded = floats.values.clone();
        padded.resize(padded_groups * rows, 0.0);
        case.store_floats(
            format!("{module}.{name}"),
            &Floats::of(Dtype::F16, &[padded_groups, rows], padded),
        );
    }
    case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
        let group = col / group_size * rows + row;
        codes[row * cols + col] as f32 * scales.values[group] + products.values[group]
    });
}

/// Words of zero-points of a row, in multiples that the matrix-vector kernels want.
fn zero_words(group_count: usize, group_size: usize) -> usize {
    let multiple = match group_size {
        128.. => 1,
        64 => 2,
        _ => 4,
    };
    group_count.div_ceil(8).next_multiple_of(multiple)
}
