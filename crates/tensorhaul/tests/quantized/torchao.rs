//! torchao: tensor subclasses taken apart, described in the header's metadata.

use serde_json::{Value, json};
use tensorhaul::Dtype;

use crate::case::{Case, Floats, low_bytes, model_config};
use crate::check::check;
use crate::numbers::{self, signed};
use crate::pack::{nibbles_low_first, swizzled};

#[test]
fn floats_of_8_bits_have_scales_for_rows_tensors_or_blocks() {
    for (block_size, block) in [
        (json!([1, 48]), [1, 48]),
        (json!([20, 48]), [20, 48]),
        (json!([]), [20, 48]),
        (json!([10, 16]), [10, 16]),
    ] {
        let mut case = torchao(format!("torchao, Float8Tensor, {block_size}"));
        let [rows, cols] = [20, 48];
        let grid = [rows / block[0], cols / block[1]];
        let codes = case.codes(rows * cols, 8);
        let scales = case.scales(Dtype::F32, &grid);
        let mut parts = Parts::new(&mut case, "model.layers.0.self_attn.q_proj");
        parts.codes("qdata", Dtype::F8E4m3, &[rows, cols], low_bytes(&codes));
        parts.floats("scale", &scales);
        parts.describe("Float8Tensor", json!({
            "block_size": block_size, "mm_config": null, "act_quant_kwargs": null,
            "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"}, "dtype": dtype("bfloat16"),
        }));
        case.expect("model.layers.0.self_attn.q_proj.weight", [rows, cols], |row, col| {
            let place = row / block[0] * grid[1] + col / block[1];
            numbers::e4m3(codes[row * cols + col]) * scales.values[place]
        });
        finish(case);
    }
}

#[test]
fn integers_in_bytes_have_zero_points_or_not() {
    for (class, bits, block, scale_dtype) in [
        ("Int8Tensor", 8, [1, 96], Dtype::F32),
        ("Int8Tensor", 8, [20, 96], Dtype::Bf16),
        ("IntxUnpackedToInt8Tensor", 4, [1, 32], Dtype::Bf16),
        ("IntxUnpackedToInt8Tensor", 3, [1, 96], Dtype::F32),
        ("IntxUnpackedToInt8Tensor", 8, [4, 32], Dtype::F16),
    ] {
        for has_zero_points in [true, false] {
            if class != "Int8Tensor" && !has_zero_points {
                continue;
            }
            let mut case =
                torchao(format!("torchao, {class}, {bits} bits, {block:?}, zero-points {has_zero_points}"));
            let [rows, cols] = [20, 96];
            let grid = [rows / block[0], cols / block[1]];
            let mut numbers = |count| -> Vec<i32> {
                case.codes(count, bits).into_iter().map(|code| signed(code, bits)).collect()
            };
            let (codes, zero_points) = (numbers(rows * cols), numbers(grid[0] * grid[1]));
            let scales = case.scales(scale_dtype, &grid);
            let bytes = |numbers: &[i32]| numbers.iter().map(|number| *number as u8).collect::<Vec<u8>>();
            let mut parts = Parts::new(&mut case, "model.layers.0.self_attn.q_proj");
            parts.codes("qdata", Dtype::I8, &[rows, cols], bytes(&codes));
            parts.floats("scale", &scales);
            if has_zero_points {
                parts.codes("zero_point", Dtype::I8, &grid, bytes(&zero_points));
            }
            let data = match class {
                "Int8Tensor" => {
                    json!({"block_size": block, "act_quant_kwargs": null, "reduce_range": false, "dtype": dtype("bfloat16")})
                }
                _ => json!({
                    "target_dtype": dtype(&format!("int{bits}")), "block_size": block, "dtype": dtype("bfloat16"), "activation_quantization": null,
                }),
            };
            parts.describe(class, data);
            case.expect("model.layers.0.self_attn.q_proj.weight", [rows, cols], |row, col| {
                let place = row / block[0] * grid[1] + col / block[1];
                let zero_point = if has_zero_points { zero_points[place] } else { 0 };
                (codes[row * cols + col] - zero_point) as f32 * scales.values[place]
            });
            finish(case);
        }
    }
}

#[test]
fn integers_of_4_bits_have_float_zero_points_by_group_and_row() {
    let mut case = torchao("torchao, Int4Tensor".to_owned());
    let ([rows, cols], group_size) = ([21, 96], 32);
    let group_count = cols / group_size;
    let codes = case.codes(rows * cols, 4);
    let scales = case.scales(Dtype::Bf16, &[group_count, rows]);
    let zero_points = case.offsets(Dtype::Bf16, &[group_count, rows]);
    let mut parts = Parts::new(&mut case, "model.layers.0.self_attn.q_proj");
    parts.codes("qdata", Dtype::I8, &[rows, cols / 2], nibbles_low_first(&codes));
    parts.floats("scale", &scales);
    parts.floats("zero_point", &zero_points);
    parts.describe(
        "Int4Tensor",
        json!({"block_size": [1, group_size], "shape": [rows, cols], "activation_dtype": dtype("bfloat16")}),
    );
    case.expect("model.layers.0.self_attn.q_proj.weight", [rows, cols], |row, col| {
        let place = col / group_size * rows + row;
        signed(codes[row * cols + col], 4) as f32 * scales.values[place] + zero_points.values[place]
    });
    finish(case);
}

#[test]
fn microscaled_floats_have_plain_or_tiled_scales() {
    for is_swizzled in [false, true] {
        for (element, bits) in [("float8_e4m3fn", 8), ("float8_e5m2", 8), ("float4_e2m1fn_x2", 4)] {
            for [rows, cols] in [[48, 128], [144, 160]] {
                let mut case =
                    torchao(format!("torchao, MXTensor, {element}, {rows} x {cols}, swizzled {is_swizzled}"));
                let codes = case.codes(rows * cols, bits);
                let scales = case.power_scales(Dtype::F8E8m0, &[rows, cols / 32]);
                let mut parts = Parts::new(&mut case, "model.layers.0.self_attn.q_proj");
                let value = match element {
                    "float8_e4m3fn" => {
                        parts.codes("qdata", Dtype::F8E4m3, &[rows, cols], low_bytes(&codes));
                        numbers::e4m3
                    }
                    "float8_e5m2" => {
                        parts.codes("qdata", Dtype::F8E5m2, &[rows, cols], low_bytes(&codes));
                        numbers::e5m2
                    }
                    _ => {
                        parts.codes("qdata", Dtype::U8, &[rows, cols / 2], nibbles_low_first(&codes));
                        numbers::e2m1
                    }
                };
                parts.floats("scale", &if is_swizzled { tiles(&scales) } else { scales.clone() });
                parts.describe("MXTensor", json!({
                    "elem_dtype": dtype(element), "block_size": 32, "orig_dtype": dtype("bfloat16"),
                    "kernel_preference": {"_type": "KernelPreference", "_data": "EMULATED"}, "act_quant_kwargs": null,
                    "is_swizzled_scales": is_swizzled,
                }));
                case.expect("model.layers.0.self_attn.q_proj.weight", [rows, cols], |row, col| {
                    let index = row * cols + col;
                    value(codes[index]) * scales.values[index / 32]
                });
                finish(case);
            }
        }
    }
}

#[test]
fn nvfp4_has_a_scale_of_scales_or_none() {
    for is_swizzled in [false, true] {
        for has_global in [true, false] {
            let [rows, cols] = [144, 80];
            let mut case =
                torchao(format!("torchao, NVFP4Tensor, global {has_global}, swizzled {is_swizzled}"));
            let codes = case.codes(rows * cols, 4);
            let scales = case.e4m3_scales(Dtype::F8E4m3, &[rows, cols / 16]);
            let global = Floats::of(Dtype::F32, &[], vec![0.001_234_5]);
            let mut parts = Parts::new(&mut case, "model.layers.0.self_attn.q_proj");
            if has_global {
                parts.floats("per_tensor_scale", &global);
            }
            parts.codes("qdata", Dtype::U8, &[rows, cols / 2], nibbles_low_first(&codes));
            parts.floats("scale", &if is_swizzled { tiles(&scales) } else { scales.clone() });
            parts.describe("NVFP4Tensor", json!({
                "is_swizzled_scales": is_swizzled, "use_triton_kernel": false, "act_quant_kwargs": null, "block_size": 16,
                "orig_dtype": dtype("bfloat16"),
            }));
            case.expect("model.layers.0.self_attn.q_proj.weight", [rows, cols], |row, col| {
                let index = row * cols + col;
                let scale = scales.values[index / 16];
                numbers::e2m1(codes[index]) * if has_global { scale * global.values[0] } else { scale }
            });
            finish(case);
        }
    }
}

/// A tensor taken apart.
struct Parts<'c> {
    case: &'c mut Case,
    module: &'static str,
    names: Vec<&'static str>,
}

impl<'c> Parts<'c> {
    fn new(case: &'c mut Case, module: &'static str) -> Parts<'c> {
        Parts { case, module, names: Vec::new() }
    }

    fn codes(&mut self, part: &'static str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        self.case.store(format!("{}._weight_{part}", self.module), dtype, shape, bytes);
        self.names.push(part);
    }

    fn floats(&mut self, part: &'static str, floats: &Floats) {
        self.case.store_floats(format!("{}._weight_{part}", self.module), floats);
        self.names.push(part);
    }

    /// Writes the entry of the metadata.
    fn describe(self, class: &str, data: Value) {
        let entry = json!({"_type": class, "_data": data, "_tensor_data_names": self.names});
        self.case.metadata.insert(format!("{}.weight", self.module), entry.to_string());
    }
}

fn torchao(name: String) -> Case {
    let config = json!({"quant_method": "torchao", "quant_type": {"default": {"_type": "AnyConfig", "_version": 2, "_data": {}}}});
    let mut case = Case::bare(name).config("config.json", model_config(config));
    case.keep_the_usual();
    case.keep("model.layers.0.self_attn.q_proj.bias", Dtype::Bf16, &[20]);
    case
}

/// Lists all tensors in the metadata, the plain ones too, and checks.
fn finish(mut case: Case) {
    let mut names: Vec<String> = case.expected.iter().map(|expected| expected.name.clone()).collect();
    for name in case.dense.clone() {
        case.metadata.insert(name.clone(), json!({"_type": "Tensor"}).to_string());
        names.push(name);
    }
    case.metadata.insert("tensor_names".to_owned(), json!(names).to_string());
    case.metadata.insert("format".to_owned(), "pt".to_owned());
    check(&case);
}

fn dtype(name: &str) -> Value {
    json!({"_type": "torch.dtype", "_data": name})
}

/// Scales in tiles, in the shape that torchao gives them: 32 by 16 for each tile.
fn tiles(scales: &Floats) -> Floats {
    let [rows, cols] = [scales.shape[0] as usize, scales.shape[1] as usize];
    let bytes = swizzled(&scales.bytes, rows, cols);
    let shape = [rows.div_ceil(128) as u64 * 32, cols.div_ceil(4) as u64 * 16];
    Floats { dtype: scales.dtype, shape: shape.to_vec(), bytes, values: scales.values.clone() }
}
