//! GPTQ: every width, version of zero-points, order of columns and size of groups.

use serde_json::json;
use tensorhaul::{Dequantization, Dtype, LoadOptions, Model};

use crate::case::{Case, model_config};
use crate::check::check;
use crate::common::Folder;
use crate::pack::{plane_words, stream_words, transposed};

#[test]
fn symmetric_zero_points_are_half_the_range_whatever_the_file_says_of_its_version() {
    for bits in [2, 3, 4, 8] {
        for zeros in [Zeros::SymmetricV1, Zeros::SymmetricV2, Zeros::SymmetricMislabelled] {
            check_all(Gptq { bits, zeros, ..Gptq::default() });
        }
    }
}

#[test]
fn zero_points_of_the_first_version_are_one_more_than_stored() {
    for bits in [2, 3, 4, 8] {
        check_all(Gptq { bits, zeros: Zeros::V1, ..Gptq::default() });
    }
}

#[test]
fn zero_points_of_0_in_the_first_version_borrow_across_the_fields_of_a_word() {
    for bits in [2, 3, 4, 8] {
        check_all(Gptq { bits, zeros: Zeros::V1WithNoughts, ..Gptq::default() });
    }
}

#[test]
fn zero_points_of_the_second_version_are_stored_as_they_are() {
    for bits in [2, 3, 4, 8] {
        check_all(Gptq { bits, zeros: Zeros::V2, ..Gptq::default() });
    }
}

#[test]
fn planes_of_bits_are_put_together() {
    for bits in 2..=8 {
        check_all(Gptq { bits, zeros: Zeros::PlanarSymmetric, ..Gptq::default() });
    }
}

#[test]
fn zero_points_lie_in_planes_too() {
    for bits in 2..=8 {
        check_all(Gptq { bits, zeros: Zeros::Planar, ..Gptq::default() });
    }
}

#[test]
fn a_file_that_says_symmetric_and_is_not_is_believed_by_its_zero_points() {
    check_all(Gptq { bits: 4, zeros: Zeros::Lying, ..Gptq::default() });
    check_all(Gptq { bits: 8, zeros: Zeros::Lying, ..Gptq::default() });
}

#[test]
fn a_load_reports_what_it_read_otherwise_than_described() {
    let reported = |zeros| {
        let case = Gptq { bits: 4, zeros, ..Gptq::default() }.case();
        let folder = Folder::on_disk();
        case.write(folder.path());
        let options = LoadOptions::default().dequantize(Dequantization::to(Dtype::F32));
        let report = Model::open(folder.path()).unwrap().load(&options).unwrap().report;
        report.fallbacks.iter().any(|fallback| fallback.what.starts_with("quantization"))
    };
    assert!(reported(Zeros::Lying));
    assert!(!reported(Zeros::V2));
}

#[test]
fn a_file_that_does_not_say_whether_it_is_symmetric_is_judged_by_its_zero_points() {
    check_all(Gptq { bits: 4, zeros: Zeros::Unsaid, ..Gptq::default() });
}

#[test]
fn columns_in_any_order_find_their_group() {
    for bits in [2, 3, 4, 8] {
        let cases = [Zeros::SymmetricV1, Zeros::V1WithNoughts, Zeros::V2].map(|zeros| Gptq {
            bits,
            zeros,
            order: Order::ByActivation,
            ..Gptq::default()
        });
        cases.into_iter().for_each(|gptq| check(&gptq.case()));
    }
}

#[test]
fn scales_of_every_float_dtype_are_read() {
    for scale_dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
        check(&Gptq { scale_dtype, zeros: Zeros::V2, ..Gptq::default() }.case());
    }
}

#[test]
fn the_configuration_may_lie_in_quantize_config_json() {
    let mut case = Gptq::default().case();
    case.name += ", quantize_config.json";
    let config = case.configs.remove(0).1["quantization_config"].take();
    check(&case.config("quantize_config.json", config));
}

#[test]
fn the_configuration_may_lie_in_the_text_part_of_a_model() {
    let mut case = Gptq::default().case();
    case.name += ", text_config";
    let config = case.configs.remove(0).1["quantization_config"].take();
    check(&case.config("config.json", json!({"text_config": {"quantization_config": config}})));
}

#[test]
fn the_head_may_be_quantized_and_words_of_the_configuration_older() {
    let config = json!({
        "quant_method": "gptq", "wbits": 4, "q_group_size": 64, "sym": false, "desc_act": false, "lm_head": true, "format": "gptq_v2",
    });
    let mut case = Case::new("gptq, lm_head", config);
    Gptq { zeros: Zeros::V2, group_size: Some(64), ..Gptq::default() }.layer(&mut case, "lm_head", [40, 128]);
    case.keep("model.norm.weight", Dtype::F32, &[24]);
    check(&case);
}

#[test]
fn groups_find_their_tensors_in_other_files() {
    check(&Gptq { order: Order::ByActivation, zeros: Zeros::V1, ..Gptq::default() }.case().scattered());
}

#[test]
fn single_modules_may_have_other_bits_and_groups() {
    let mut case = Case::bare("gptq, dynamic");
    let config = json!({
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": false, "desc_act": false, "checkpoint_format": "gptq_v2",
        "dynamic": {
            "+:.*\\.down_proj$": {"bits": 8, "group_size": 32},
            "-:.*\\.k_proj$": {},
        },
    });
    case.configs.push(("config.json", model_config(config)));
    let all = Gptq { zeros: Zeros::V2, ..Gptq::default() };
    all.layer(&mut case, "model.layers.0.self_attn.q_proj", [64, 256]);
    let special = Gptq { bits: 8, group_size: Some(32), ..all };
    special.layer(&mut case, "model.layers.0.mlp.down_proj", [40, 96]);
    case.keep("model.layers.0.self_attn.k_proj.weight", Dtype::F16, &[40, 96]);
    case.keep_the_usual();
    check(&case);
}

#[test]
fn auto_round_writes_gptq_too() {
    let mut case = Case::new(
        "auto-round, auto_gptq",
        json!({
            "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32, "sym": false,
            "data_type": "int", "autoround_version": "0.4.2",
            "extra_config": {"model.layers.1.mlp.down_proj": {"bits": 8, "group_size": 64, "sym": false}},
        }),
    );
    let all = Gptq { zeros: Zeros::V1, group_size: Some(32), ..Gptq::default() };
    all.layer(&mut case, "model.layers.0.mlp.down_proj", [64, 96]);
    let special = Gptq { bits: 8, group_size: Some(64), ..all };
    special.layer(&mut case, "model.layers.1.mlp.down_proj", [64, 192]);
    case.keep_the_usual();
    check(&case);
}

#[test]
fn an_index_that_was_never_filled_is_known_whatever_the_group_size() {
    let gptq = Gptq { order: Order::AllZero, group_size: Some(1024), ..Gptq::default() };
    for first_cols in [4096, 1024] {
        let mut case = gptq.no_layers();
        // Of a module with one group an index says nothing.
        gptq.layer(&mut case, "model.layers.0.mlp.down_proj", [32, first_cols]);
        gptq.layer(&mut case, "model.layers.1.mlp.down_proj", [32, 4096]);
        check(&case);
    }
}

/// Checks every order of columns with groups that fit, that do not, and that are one.
fn check_all(gptq: Gptq) {
    for order in [Order::Unsaid, Order::Trivial, Order::AllZero] {
        for group_size in [Some(32), Some(128), None] {
            check(&Gptq { order, group_size, ..gptq }.case());
        }
    }
}

/// A variant of the format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gptq {
    pub(crate) bits: u32,
    /// `None` where a group is all columns.
    pub(crate) group_size: Option<usize>,
    pub(crate) zeros: Zeros,
    pub(crate) order: Order,
    pub(crate) scale_dtype: Dtype,
}

/// What the zero-points are, and how they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Zeros {
    /// Half the range, one less stored.
    SymmetricV1,
    /// Half the range, stored as it is.
    SymmetricV2,
    /// Half the range, stored as it is, in a file that claims the first version.
    SymmetricMislabelled,
    /// Any from 1 on, one less stored.
    V1,
    /// Any, 0 too, one less stored, word by word.
    V1WithNoughts,
    /// Any, stored as they are.
    V2,
    /// Half the range, stored as it is, in planes.
    PlanarSymmetric,
    /// Any, stored as they are, in planes.
    Planar,
    /// Any but half the range and its neighbour, one less stored, in a file that claims to be symmetric.
    Lying,
    /// As `V1`, and the file does not say that it is not symmetric.
    Unsaid,
}

impl Zeros {
    fn are_planar(self) -> bool {
        matches!(self, Zeros::PlanarSymmetric | Zeros::Planar)
    }
}

/// What says the group of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// No `g_idx`.
    Unsaid,
    /// A `g_idx` of neighbours.
    Trivial,
    /// A `g_idx` that was never filled.
    AllZero,
    /// A `g_idx` of a shuffle.
    ByActivation,
}

impl Default for Gptq {
    fn default() -> Gptq {
        Gptq {
            bits: 4,
            group_size: Some(128),
            zeros: Zeros::SymmetricV1,
            order: Order::Trivial,
            scale_dtype: Dtype::F16,
        }
    }
}

impl Gptq {
    pub(crate) fn case(self) -> Case {
        let mut case = self.no_layers();
        self.layer(&mut case, "model.layers.0.self_attn.q_proj", [64, 256]);
        case.keep("model.layers.0.self_attn.q_proj.bias", Dtype::F16, &[64]);
        // Words of zero-points that are not full, and a last group that is short.
        let rows = if self.zeros.are_planar() { 96 } else { 44 };
        self.layer(&mut case, "model.layers.1.mlp.down_proj", [rows, 288]);
        case
    }

    /// The configuration, and what is not quantized.
    fn no_layers(self) -> Case {
        let Gptq { bits, group_size, zeros, order, scale_dtype } = self;
        let format = match zeros {
            Zeros::SymmetricV2 | Zeros::V2 => "gptq_v2",
            Zeros::PlanarSymmetric | Zeros::Planar => "gptq_p",
            _ => "gptq",
        };
        let is_symmetric = match zeros {
            Zeros::SymmetricV1
            | Zeros::PlanarSymmetric
            | Zeros::SymmetricV2
            | Zeros::SymmetricMislabelled
            | Zeros::Lying => Some(true),
            Zeros::Unsaid => None,
            _ => Some(false),
        };
        let mut config = json!({
            "quant_method": "gptq", "bits": bits, "group_size": group_size.map_or(-1, |size| size as i64),
            "desc_act": order == Order::ByActivation, "checkpoint_format": format, "damp_percent": 0.1,
            "true_sequential": true, "lm_head": false,
        });
        if let Some(is_symmetric) = is_symmetric {
            config["sym"] = json!(is_symmetric);
        }
        let name = format!("gptq, {bits} bits, {zeros:?}, {order:?}, {group_size:?}, {scale_dtype}");
        let mut case = Case::new(name, config);
        case.keep_the_usual();
        case
    }

    /// Packs a layer; what is expected of it is computed from the codes alone.
    pub(crate) fn layer(self, case: &mut Case, module: &str, [rows, cols]: [usize; 2]) {
        let bits = self.bits;
        let group_size = self.group_size.unwrap_or(cols);
        let group_count = cols.div_ceil(group_size);
        let codes = case.codes(rows * cols, bits);
        let zero_points: Vec<u32> = (0..group_count * rows).map(|_| self.zero_point(case)).collect();
        let scales = case.scales(self.scale_dtype, &[group_count, rows]);

        let mut groups: Vec<usize> = (0..cols).map(|col| col / group_size).collect();
        if self.order == Order::ByActivation {
            for last in (1..cols).rev() {
                groups.swap(last, case.dice.below(last as u64 + 1) as usize);
            }
        }
        match self.order {
            Order::Unsaid => {}
            Order::AllZero => case.store_words(format!("{module}.g_idx"), &[cols], &vec![0; cols]),
            _ => {
                let stored: Vec<u32> = groups.iter().map(|group| *group as u32).collect();
                case.store_words(format!("{module}.g_idx"), &[cols], &stored);
            }
        }

        let pack = if self.zeros.are_planar() { plane_words } else { stream_words };
        let packed_rows: Vec<u32> = codes.chunks(cols).flat_map(|row| pack(row, bits)).collect();
        let word_rows = packed_rows.len() / rows;
        case.store_words(
            format!("{module}.qweight"),
            &[word_rows, rows],
            &transposed(&packed_rows, word_rows),
        );
        let packed_zeros: Vec<u32> =
            zero_points.chunks(rows).flat_map(|group| self.packed_zero_points(group)).collect();
        let word_cols = packed_zeros.len() / group_count;
        case.store_words(format!("{module}.qzeros"), &[group_count, word_cols], &packed_zeros);
        case.store_floats(format!("{module}.scales"), &scales);

        case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
            let place = groups[col] * rows + row;
            (codes[row * cols + col] as i32 - zero_points[place] as i32) as f32 * scales.values[place]
        });
    }

    fn zero_point(self, case: &mut Case) -> u32 {
        let range = 1 << self.bits;
        match self.zeros {
            Zeros::SymmetricV1
            | Zeros::PlanarSymmetric
            | Zeros::SymmetricV2
            | Zeros::SymmetricMislabelled => range / 2,
            Zeros::V1 | Zeros::Unsaid => 1 + case.dice.below(u64::from(range) - 1) as u32,
            // Stored one less, this is neither half the range nor one below.
            Zeros::Lying => 1 + case.dice.below(u64::from(range) / 2 - 2) as u32,
            Zeros::V1WithNoughts if case.dice.below(3) == 0 => 0,
            _ => case.dice.below(u64::from(range)) as u32,
        }
    }

    /// Packs the zero-points of a group, as the writer of the version does.
    fn packed_zero_points(self, zero_points: &[u32]) -> Vec<u32> {
        let is_stored_less = matches!(
            self.zeros,
            Zeros::SymmetricV1 | Zeros::V1 | Zeros::V1WithNoughts | Zeros::Lying | Zeros::Unsaid
        );
        if self.zeros.are_planar() {
            return plane_words(zero_points, self.bits);
        }
        if !is_stored_less {
            return stream_words(zero_points, self.bits);
        }
        let one_in_each_field = match self.bits {
            2 => 0x5555_5555,
            4 => 0x1111_1111,
            8 => 0x0101_0101,
            // Fields of 3 bits straddle words, so each is counted down by itself.
            _ => {
                let less: Vec<u32> = zero_points.iter().map(|zero_point| (zero_point + 7) % 8).collect();
                return stream_words(&less, self.bits);
            }
        };
        let words = stream_words(zero_points, self.bits);
        words.into_iter().map(|word| word.wrapping_sub(one_in_each_field)).collect()
    }
}
