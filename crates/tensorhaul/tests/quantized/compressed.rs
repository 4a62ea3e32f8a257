//! compressed-tensors: integers packed along columns, and plain ones.

use serde_json::{Value, json};
use tensorhaul::Dtype;

use crate::case::{Case, low_bytes};
use crate::check::check;
use crate::fp8;
use crate::numbers::signed;
use crate::pack::{bytes_of, padded_words, stream_words, transposed};

#[test]
fn symmetric_codes_of_every_width_are_offset_by_half_their_range() {
    for bits in 2..=8 {
        check_all(Packed { bits, zeros: Zeros::None, ..Packed::default() });
    }
}

#[test]
fn zero_points_are_packed_along_rows_and_offset_too() {
    for bits in 2..=8 {
        check_all(Packed { bits, zeros: Zeros::Packed, ..Packed::default() });
    }
}

#[test]
fn zero_points_of_old_versions_are_plain_bytes() {
    for bits in [2, 4, 8] {
        check_all(Packed { bits, zeros: Zeros::Bytes, ..Packed::default() });
    }
}

#[test]
fn widths_that_do_not_divide_a_word_waste_its_last_bits_in_old_versions() {
    for bits in [3, 5, 6, 7] {
        for zeros in [Zeros::None, Zeros::Bytes] {
            check_all(Packed { bits, zeros, is_padded: true, ..Packed::default() });
        }
    }
}

#[test]
fn zero_points_of_old_versions_waste_the_last_bits_of_words_too() {
    for bits in [3, 5, 6, 7] {
        check_all(Packed { bits, zeros: Zeros::Packed, is_padded: true, ..Packed::default() });
    }
}

#[test]
fn columns_in_any_order_find_their_group() {
    for zeros in [Zeros::None, Zeros::Packed] {
        check(&Packed { is_shuffled: true, zeros, ..Packed::default() }.case());
        check(&Packed { is_shuffled: true, zeros, bits: 8, ..Packed::default() }.case().scattered());
    }
}

#[test]
fn plain_integers_have_a_scale_a_row_or_one_for_all() {
    for (strategy, scale_shape) in [("channel", vec![13, 1]), ("tensor", vec![1])] {
        for has_zero_points in [false, true] {
            let symmetric = !has_zero_points;
            let mut case = Case::new(
                format!("int-quantized, {strategy}, symmetric {symmetric}"),
                config("int-quantized", 8, symmetric, strategy, Value::Null),
            );
            let [rows, cols] = [13, 37];
            let codes = case.codes(rows * cols, 8);
            let zero_points = case.codes(scale_shape[0], 8);
            let scale = case.scales(Dtype::Bf16, &scale_shape);
            let module = "model.layers.0.mlp.down_proj";
            case.store(format!("{module}.weight"), Dtype::I8, &[rows, cols], low_bytes(&codes));
            case.store_floats(format!("{module}.weight_scale"), &scale);
            if has_zero_points {
                case.store(
                    format!("{module}.weight_zero_point"),
                    Dtype::I8,
                    &scale_shape,
                    low_bytes(&zero_points),
                );
            }
            case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
                let place = row % scale_shape[0];
                let zero_point = if has_zero_points { signed(zero_points[place], 8) } else { 0 };
                (signed(codes[row * cols + col], 8) - zero_point) as f32 * scale.values[place]
            });
            case.keep_the_usual();
            check(&case);
        }
    }
}

#[test]
fn groups_of_modules_have_their_own_formats() {
    let mut case = Case::new(
        "compressed-tensors, mixed precision",
        json!({
            "quant_method": "compressed-tensors", "format": "mixed-precision", "quantization_status": "compressed",
            "ignore": ["lm_head", "re:.*router.*"],
            "config_groups": {
                "group_0": {
                    "targets": ["re:.*self_attn.*"], "format": "float-quantized",
                    "weights": {"num_bits": 8, "type": "float", "symmetric": true, "strategy": "channel", "dynamic": false},
                },
                "group_1": {
                    "targets": ["re:.*mlp.*"], "format": "pack-quantized",
                    "weights": {"num_bits": 4, "type": "int", "symmetric": false, "strategy": "group", "group_size": 32, "dynamic": false},
                },
            },
        }),
    );
    let scale = case.scales(Dtype::Bf16, &[20, 1]);
    fp8::weight(&mut case, "model.layers.0.self_attn.q_proj", [20, 64], &scale, |row, _| row);
    case.store_floats("model.layers.0.self_attn.q_proj.weight_scale", &scale);
    let packed = Packed { zeros: Zeros::Packed, group_size: Some(32), ..Packed::default() };
    packed.layer(&mut case, "model.layers.0.mlp.down_proj", [24, 96]);
    case.keep("model.layers.0.mlp.router.weight", Dtype::Bf16, &[8, 64]);
    case.keep_the_usual();
    check(&case);
}

#[test]
fn the_configuration_may_have_its_old_name() {
    let mut case = Packed::default().case();
    case.name += ", compression_config";
    let config = case.configs.remove(0).1["quantization_config"].take();
    check(&case.config("config.json", json!({"compression_config": config})));
}

/// Checks groups that fit, that do not, and a scale a row.
fn check_all(packed: Packed) {
    for group_size in [Some(32), Some(128), None] {
        check(&Packed { group_size, ..packed }.case());
    }
}

/// A variant of the packed format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed {
    bits: u32,
    /// `None` where a scale is for a row.
    group_size: Option<usize>,
    zeros: Zeros,
    /// Whether each word holds whole codes only.
    is_padded: bool,
    /// Whether `weight_g_idx` shuffles the columns' groups.
    is_shuffled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Zeros {
    None,
    Packed,
    Bytes,
}

impl Default for Packed {
    fn default() -> Packed {
        Packed { bits: 4, group_size: Some(128), zeros: Zeros::None, is_padded: false, is_shuffled: false }
    }
}

impl Packed {
    pub(crate) fn case(self) -> Case {
        let symmetric = self.zeros == Zeros::None;
        let strategy = if self.group_size.is_some() { "group" } else { "channel" };
        let mut config = config("pack-quantized", self.bits, symmetric, strategy, json!(self.group_size));
        if self.is_shuffled {
            config["config_groups"]["group_0"]["weights"]["actorder"] = json!("group");
        }
        let mut case = Case::new(format!("pack-quantized, {self:?}"), config);
        case.keep_the_usual();
        self.layer(&mut case, "model.layers.0.self_attn.q_proj", [64, 256]);
        case.keep("model.layers.0.self_attn.q_proj.bias", Dtype::Bf16, &[64]);
        // Last words that are not full; groups end where rows end only for a scale a row.
        let cols = if self.group_size.is_none() { 101 } else { 384 };
        self.layer(&mut case, "model.layers.1.mlp.down_proj", [41, cols]);
        case
    }

    pub(crate) fn layer(self, case: &mut Case, module: &str, [rows, cols]: [usize; 2]) {
        let Packed { bits, zeros, .. } = self;
        let group_size = self.group_size.unwrap_or(cols);
        let group_count = cols.div_ceil(group_size);
        let pack = if self.is_padded { padded_words } else { stream_words };
        let codes = case.codes(rows * cols, bits);
        let zero_points = case.codes(rows * group_count, bits);
        let scales = case.scales(Dtype::Bf16, &[rows, group_count]);

        let mut groups: Vec<usize> = (0..cols).map(|col| col / group_size).collect();
        if self.is_shuffled {
            for last in (1..cols).rev() {
                groups.swap(last, case.dice.below(last as u64 + 1) as usize);
            }
            let stored: Vec<u32> = groups.iter().map(|group| *group as u32).collect();
            case.store_words(format!("{module}.weight_g_idx"), &[cols], &stored);
        }
        let words: Vec<u32> = codes.chunks(cols).flat_map(|row| pack(row, bits)).collect();
        case.store_words(format!("{module}.weight_packed"), &[rows, words.len() / rows], &words);
        let shape: Vec<u8> = [rows, cols].iter().flat_map(|dim| (*dim as i64).to_le_bytes()).collect();
        case.store(format!("{module}.weight_shape"), Dtype::I64, &[2], shape);
        case.store_floats(format!("{module}.weight_scale"), &scales);
        let half = 1i32 << (bits - 1);
        match zeros {
            Zeros::None => {}
            Zeros::Packed => {
                let by_group = transposed(&zero_points, group_count);
                let words: Vec<u32> = by_group.chunks(rows).flat_map(|group| pack(group, bits)).collect();
                let word_rows = words.len() / group_count;
                let bytes = bytes_of(&transposed(&words, word_rows));
                case.store(
                    format!("{module}.weight_zero_point"),
                    Dtype::I32,
                    &[word_rows, group_count],
                    bytes,
                );
            }
            Zeros::Bytes => {
                let bytes = zero_points.iter().map(|code| (*code as i32 - half) as u8).collect();
                case.store(format!("{module}.weight_zero_point"), Dtype::I8, &[rows, group_count], bytes);
            }
        }
        case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
            let place = row * group_count + groups[col];
            let zero_point = if zeros == Zeros::None { 0 } else { zero_points[place] as i32 - half };
            (codes[row * cols + col] as i32 - half - zero_point) as f32 * scales.values[place]
        });
    }
}

fn config(format: &str, bits: u32, symmetric: bool, strategy: &str, group_size: Value) -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": null, "global_compression_ratio": 1.9,
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": null, "output_activations": null, "weights": {
            "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group_size,
            "dynamic": false, "actorder": null, "block_structure": null, "observer": "minmax",
        }}},
    })
}
