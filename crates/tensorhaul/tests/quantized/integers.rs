//! Integers of ModelOpt and Quark.

use serde_json::json;
use tensorhaul::parallel::{Parallel, Ranks, Rules};
use tensorhaul::{Dequantization, Dtype, LoadOptions, Model};

use crate::case::{Case, low_bytes};
use crate::check::check;
use crate::common::Folder;
use crate::numbers::signed;
use crate::pack::{awq_words, padded_words, transposed};

#[test]
fn modelopt_pairs_rows_and_leaves_activations_to_the_caller() {
    for file in ["config.json", "hf_quant_config.json"] {
        let mut case = modelopt_int4(file);
        case.name += ", not folded";
        let factors = case.offsets(Dtype::Bf16, &[96]);
        modelopt_layer(&mut case, "model.layers.0.self_attn.o_proj", [26, 96], 32, &|_| 1.0);
        case.keep_floats("model.layers.0.self_attn.o_proj.pre_quant_scale", &factors);
        modelopt_layer(&mut case, "model.layers.0.mlp.up_proj", [40, 128], 32, &|_| 1.0);
        case.keep_the_usual();
        check(&case);
        check(&case.scattered());
    }
}

#[test]
fn modelopt_s_factors_of_columns_fold_into_weights_on_request() {
    let mut case = modelopt_int4("hf_quant_config.json");
    case.name += ", folded";
    case.is_folded = true;
    let factors = case.offsets(Dtype::Bf16, &[96]);
    modelopt_layer(&mut case, "model.layers.0.self_attn.o_proj", [26, 96], 32, &|col| factors.values[col]);
    case.store_floats("model.layers.0.self_attn.o_proj.pre_quant_scale", &factors);
    case.optional.push("model.layers.0.self_attn.o_proj.pre_quant_scale".to_owned());
    case.keep_the_usual();
    check(&case);
}

#[test]
fn ranks_have_the_factors_of_their_columns_where_those_are_not_folded() {
    let mut case = modelopt_int4("hf_quant_config.json");
    let (row, column) = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj");
    let mut factors = Vec::new();
    for (module, size) in [(row, [26, 96]), (column, [40, 128])] {
        let own = case.offsets(Dtype::Bf16, &[size[1]]);
        modelopt_layer(&mut case, module, size, 32, &|_| 1.0);
        case.keep_floats(format!("{module}.pre_quant_scale"), &own);
        factors.push(own.bytes);
    }
    let folder = Folder::on_disk();
    case.write(folder.path());
    let model = Model::open(folder.path()).unwrap();
    let rules = |by: &str| {
        let rules = format!(
            r#"{{"numbers":{{"num_attention_heads":6}},"rules":{{"{row}":{{"rule":"row"{by}}},"{column}":"column"}}}}"#
        );
        Rules::parse(&rules).unwrap()
    };
    let by_heads = rules(r#","by":"heads""#);
    for (rules, rank, size) in [(rules(""), 0, 1), (rules(""), 0, 2), (rules(""), 1, 2), (by_heads, 1, 2)] {
        let parallel = Parallel::rank(Ranks::alone().tp(rank, size)).rules(rules);
        let options = LoadOptions::default().parallel(parallel);
        let tensors =
            model.load(&options.clone().dequantize(Dequantization::to(Dtype::F32))).unwrap().tensors;
        let factor = |module: &str| {
            tensors.get(&format!("{module}.pre_quant_scale")).unwrap().bytes().unwrap().to_vec()
        };
        let len_bytes = 96 * 2 / size as usize;
        assert_eq!(factor(row), factors[0][len_bytes * rank as usize..][..len_bytes]);
        assert_eq!(factor(column), factors[1]);
        assert_eq!(tensors.len(), 4);
        let folded = options.dequantize(Dequantization::to(Dtype::F32).fold());
        assert_eq!(model.load(&folded).unwrap().tensors.len(), 2);
    }
}

#[test]
fn modelopt_s_integers_of_8_bits_have_a_scale_a_row() {
    for algorithm in ["W8A16", "W8A8_SQ_PER_CHANNEL"] {
        let config = json!({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]}});
        let mut case = Case::bare(format!("modelopt, {algorithm}")).config("hf_quant_config.json", config);
        let [rows, cols] = [27, 45];
        let codes = case.codes(rows * cols, 8);
        let scale = case.scales(Dtype::F32, &[rows]);
        let module = "model.layers.0.mlp.up_proj";
        case.store(format!("{module}.weight"), Dtype::I8, &[rows, cols], low_bytes(&codes));
        case.store_floats(format!("{module}.weight_scale"), &scale);
        case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
            signed(codes[row * cols + col], 8) as f32 * scale.values[row]
        });
        case.keep_the_usual();
        check(&case);
    }
}

#[test]
fn modelopt_may_quantize_each_layer_in_its_own_way() {
    let config = json!({"producer": {"name": "modelopt"}, "quantization": {
        "quant_algo": "MIXED_PRECISION", "exclude_modules": ["lm_head"],
        "quantized_layers": {
            "model.layers.0.mlp.up_proj": {"quant_algo": "W4A16_AWQ", "group_size": 32},
            "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
        },
    }});
    let mut case = Case::bare("modelopt, mixed").config("hf_quant_config.json", config);
    modelopt_layer(&mut case, "model.layers.0.mlp.up_proj", [26, 96], 32, &|_| 1.0);
    let scale = case.scales(Dtype::F32, &[]);
    crate::fp8::weight(&mut case, "model.layers.0.self_attn.q_proj", [20, 30], &scale, |_, _| 0);
    case.store_floats("model.layers.0.self_attn.q_proj.weight_scale", &scale);
    case.keep_the_usual();
    check(&case);
}

#[test]
fn quark_packs_signed_and_unsigned_integers_with_and_without_reordering() {
    for dtype in ["int4", "uint4"] {
        for pack_method in ["reorder", "order"] {
            let config = json!({
                "quant_method": "quark", "exclude": ["lm_head"], "layer_quant_config": {},
                "global_quant_config": {"weight": {
                    "dtype": dtype, "qscheme": "per_group", "group_size": 32, "symmetric": false, "ch_axis": -1, "is_dynamic": false,
                }},
                "export": {"pack_method": pack_method, "weight_format": "real_quantized"},
            });
            let mut case = Case::new(format!("quark, {dtype}, {pack_method}"), config);
            case.keep_the_usual();
            // Rows that do not fill a last word.
            quark_layer(&mut case, "model.layers.0.mlp.up_proj", [37, 96], dtype, pack_method);
            quark_layer(&mut case, "model.layers.1.mlp.down_proj", [48, 128], dtype, pack_method);
            check(&case);
            check(&case.scattered());
        }
    }
}

fn modelopt_int4(file: &'static str) -> Case {
    let config = match file {
        "config.json" => json!({"quantization_config": {
            "quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "ignore": ["lm_head"], "producer": {"name": "modelopt"},
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32, "dynamic": false}}},
        }}),
        _ => json!({"producer": {"name": "modelopt"}, "quantization": {
            "quant_algo": "W4A16_AWQ", "group_size": 32, "has_zero_point": false, "pre_quant_scale": true, "exclude_modules": ["lm_head"],
        }}),
    };
    Case::bare(format!("modelopt, int4, {file}")).config(file, config)
}

fn modelopt_layer(
    case: &mut Case,
    module: &str,
    [rows, cols]: [usize; 2],
    group_size: usize,
    factor: &dyn Fn(usize) -> f32,
) {
    let group_count = cols / group_size;
    let codes = case.codes(rows * cols, 4);
    let scales = case.scales(Dtype::F32, &[rows, group_count]);
    let mut bytes = Vec::new();
    for pair in codes.chunks(2 * cols) {
        let (even, odd) = pair.split_at(cols);
        bytes.extend(even.iter().zip(odd).map(|(even, odd)| (even | odd << 4) as u8));
    }
    case.store(format!("{module}.weight"), Dtype::U8, &[rows / 2, cols], bytes);
    case.store_floats(format!("{module}.weight_scale"), &scales);
    case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
        let scale = scales.values[row * group_count + col / group_size];
        signed(codes[row * cols + col], 4) as f32 * scale * factor(col)
    });
}

fn quark_layer(case: &mut Case, module: &str, [rows, cols]: [usize; 2], dtype: &str, pack_method: &str) {
    let group_size = 32;
    let group_count = cols / group_size;
    let codes = case.codes(rows * cols, 4);
    let zero_points = case.codes(group_count * rows, 4);
    let scales = case.scales(Dtype::F32, &[group_count, rows]);
    let pack =
        |codes: &[u32]| if pack_method == "reorder" { awq_words(codes) } else { padded_words(codes, 4) };
    let words: Vec<u32> = transposed(&codes, cols).chunks(rows).flat_map(pack).collect();
    case.store_words(format!("{module}.weight"), &[cols, rows.div_ceil(8)], &words);
    let words: Vec<u32> = zero_points.chunks(rows).flat_map(pack).collect();
    case.store_words(format!("{module}.weight_zero_point"), &[group_count, rows.div_ceil(8)], &words);
    case.store_floats(format!("{module}.weight_scale"), &scales);
    let number = |code: u32| if dtype == "int4" { signed(code, 4) } else { code as i32 };
    case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
        let group = col / group_size * rows + row;
        (number(codes[row * cols + col]) - number(zero_points[group])) as f32 * scales.values[group]
    });
}
