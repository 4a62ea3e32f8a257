//! MLX: unsigned codes with a scale and a bias for each group, and microscaled floats.

use serde_json::{Value, json};
use tensorhaul::Dtype;

use crate::case::{Case, Floats};
use crate::check::check;
use crate::numbers;
use crate::pack::{bytes_of, stream_words};

#[test]
fn affine_codes_of_every_width_have_a_scale_and_a_bias() {
    for bits in [2, 3, 4, 5, 6, 8] {
        for group_size in [32, 64, 128] {
            let config = json!({"group_size": group_size, "bits": bits, "mode": "affine"});
            let mut case = mlx(format!("mlx, {bits} bits, groups of {group_size}"), config);
            affine(
                &mut case,
                "model.layers.0.self_attn.q_proj",
                [21, 128],
                bits,
                group_size,
                Dtype::Bf16,
                "biases",
            );
            affine(
                &mut case,
                "model.layers.1.mlp.down_proj",
                [9, 384],
                bits,
                group_size,
                Dtype::F16,
                "biases",
            );
            case.keep("model.layers.0.self_attn.q_proj.bias", Dtype::Bf16, &[21]);
            check(&case);
        }
    }
}

#[test]
fn embeddings_are_quantized_as_layers_are() {
    let mut case = mlx("mlx, embedding".to_owned(), json!({"group_size": 64, "bits": 4}));
    affine(&mut case, "model.embed", [37, 64], 4, 64, Dtype::F32, "biases");
    check(&case.scattered());
}

#[test]
fn experts_lie_behind_each_other() {
    let ([experts, rows, cols], group_size) = ([3, 10, 128], 64);
    for bits in [3, 4] {
        let config = json!({"group_size": group_size, "bits": bits});
        let mut case = mlx(format!("mlx, experts of {bits} bits"), config);
        let name = "model.layers.0.mlp.switch_mlp.up_proj";
        let codes = case.codes(experts * rows * cols, bits);
        let grid = [experts, rows, cols / group_size];
        let scales = case.offsets(Dtype::Bf16, &grid);
        let biases = case.offsets(Dtype::Bf16, &grid);
        let words: Vec<u32> = codes.chunks(cols).flat_map(|row| stream_words(row, bits)).collect();
        let shape = [experts, rows, cols * bits as usize / 32];
        case.store(format!("{name}.weight"), Dtype::U32, &shape, bytes_of(&words));
        case.store_floats(format!("{name}.scales"), &scales);
        case.store_floats(format!("{name}.biases"), &biases);
        let value = |(index, code): (usize, &u32)| {
            *code as f32 * scales.values[index / group_size] + biases.values[index / group_size]
        };
        let values = codes.iter().enumerate().map(value).collect();
        case.expect_values(format!("{name}.weight"), &[experts, rows, cols], values);
        check(&case);
    }
}

#[test]
fn biases_may_have_a_longer_name() {
    let config =
        json!({"quant_method": "metal", "bits": 4, "group_size": 64, "modules_to_not_convert": ["lm_head"]});
    let mut case = Case::new("mlx, metal", config);
    case.keep_the_usual();
    affine(&mut case, "model.layers.0.mlp.up_proj", [12, 128], 4, 64, Dtype::Bf16, "qbiases");
    check(&case);
}

#[test]
fn single_modules_may_have_other_bits_groups_and_modes() {
    let config = json!({
        "group_size": 64, "bits": 4, "mode": "affine",
        "model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 6},
        "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "model.layers.0.self_attn.k_proj": false,
    });
    let mut case = mlx("mlx, mixed".to_owned(), config);
    affine(&mut case, "model.layers.0.self_attn.q_proj", [21, 128], 4, 64, Dtype::Bf16, "biases");
    affine(&mut case, "model.layers.0.mlp.down_proj", [9, 96], 6, 32, Dtype::Bf16, "biases");
    floats(&mut case, "model.layers.0.mlp.up_proj", [10, 96], Mode::Mxfp4);
    case.keep("model.layers.0.self_attn.k_proj.weight", Dtype::Bf16, &[8, 128]);
    check(&case);
}

#[test]
fn floats_have_scales_but_no_biases() {
    for (name, bits, group_size, mode) in
        [("mxfp4", 4, 32, Mode::Mxfp4), ("mxfp8", 8, 32, Mode::Mxfp8), ("nvfp4", 4, 16, Mode::Nvfp4)]
    {
        let mut case =
            mlx(format!("mlx, {name}"), json!({"group_size": group_size, "bits": bits, "mode": name}));
        floats(&mut case, "model.layers.0.self_attn.q_proj", [21, 128], mode);
        floats(&mut case, "model.layers.1.mlp.down_proj", [9, 96], mode);
        check(&case);
        check(&case.scattered());
    }
}

fn mlx(name: String, quantization: Value) -> Case {
    let config = json!({"model_type": "llama", "quantization": quantization.clone(), "quantization_config": quantization});
    let mut case = Case::bare(name).config("config.json", config);
    case.metadata.insert("format".to_owned(), "mlx".to_owned());
    case.keep_the_usual();
    case
}

fn affine(
    case: &mut Case,
    module: &str,
    [rows, cols]: [usize; 2],
    bits: u32,
    group_size: usize,
    dtype: Dtype,
    biases_name: &str,
) {
    let group_count = cols / group_size;
    let codes = case.codes(rows * cols, bits);
    let scales = case.offsets(dtype, &[rows, group_count]);
    let biases = case.offsets(dtype, &[rows, group_count]);
    store_weight(case, module, [rows, cols], &codes, bits);
    case.store_floats(format!("{module}.scales"), &scales);
    case.store_floats(format!("{module}.{biases_name}"), &biases);
    case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
        let group = row * group_count + col / group_size;
        codes[row * cols + col] as f32 * scales.values[group] + biases.values[group]
    });
}

#[derive(Clone, Copy)]
enum Mode {
    Mxfp4,
    Mxfp8,
    Nvfp4,
}

fn floats(case: &mut Case, module: &str, [rows, cols]: [usize; 2], mode: Mode) {
    let (bits, group_size): (u32, usize) = match mode {
        Mode::Mxfp4 => (4, 32),
        Mode::Mxfp8 => (8, 32),
        Mode::Nvfp4 => (4, 16),
    };
    let codes = case.codes(rows * cols, bits);
    let grid = [rows, cols / group_size];
    let scales: Floats = match mode {
        Mode::Nvfp4 => case.e4m3_scales(Dtype::U8, &grid),
        _ => case.power_scales(Dtype::U8, &grid),
    };
    store_weight(case, module, [rows, cols], &codes, bits);
    case.store_floats(format!("{module}.scales"), &scales);
    let number = if bits == 8 { numbers::e4m3 } else { numbers::e2m1 };
    case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
        let index = row * cols + col;
        number(codes[index]) * scales.values[index / group_size]
    });
}

fn store_weight(case: &mut Case, module: &str, [rows, cols]: [usize; 2], codes: &[u32], bits: u32) {
    let words: Vec<u32> = codes.chunks(cols).flat_map(|row| stream_words(row, bits)).collect();
    case.store(format!("{module}.weight"), Dtype::U32, &[rows, cols * bits as usize / 32], bytes_of(&words));
}
