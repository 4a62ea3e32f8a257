//! Whatever headers, configurations and small tensors say, recognition answers.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use tensorhaul_plan::Dtype;
use tensorhaul_plan::quant::{Codes, Global, Grid, Group, Number, Part, Role, ZeroPoint};

use super::Model;

const LEAVES: [&str; 38] = [
    "weight",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    "weight_g_idx",
    "scale",
    "scale_weight",
    "biases",
    "SCB",
    "weight_format",
    "weight.absmax",
    "weight.quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "W_q",
    "zero",
    "nbits",
    "shape",
    "axis",
    "group_size",
    "packing",
    "x_blocks",
    "x_scales",
    "_weight_qdata",
    "_weight_scale",
    "_weight_zero_point",
    "comfy_quant",
    "pre_quant_scale",
    "input_scale",
];

const CONFIGS: [&str; 16] = [
    r#"{"quant_method":"gptq","bits":4,"group_size":2,"sym":true}"#,
    r#"{"quant_method":"gptq","bits":3,"group_size":-1,"sym":false,"dynamic":{"-:a":{},"b":{"bits":8}}}"#,
    r#"{"quant_method":"gptq","bits":6,"checkpoint_format":"gptq_p"}"#,
    r#"{"quant_method":"awq","bits":4,"group_size":2,"version":"gemv","modules_to_not_convert":["b"]}"#,
    r#"{"quant_method":"awq","backend":"llm-awq"}"#,
    r#"{"quant_method":"fp8","weight_block_size":[2,2]}"#,
    r#"{"quant_method":"fbgemm_fp8"}"#,
    r#"{"quant_method":"compressed-tensors","config_groups":{"g":{"targets":["Linear"],"weights":{"num_bits":3,"group_size":4,"strategy":"group"}}}}"#,
    r#"{"quant_method":"compressed-tensors","config_groups":{"g":{"targets":["re:."],"weights":{"num_bits":8,"type":"float","strategy":"block","block_structure":[1,2]}}}}"#,
    r#"{"quant_method":"modelopt","quant_algo":"NVFP4","ignore":["a*"]}"#,
    r#"{"quant_method":"modelopt","quant_algo":"W4A16_AWQ","group_size":0}"#,
    r#"{"quant_method":"quark","export":{"pack_method":"order"},"global_quant_config":{"weight":{"dtype":"int4","qscheme":"per_group","group_size":1}}}"#,
    r#"{"quant_method":"quark","global_quant_config":{"weight":{"dtype":"mx"}}}"#,
    r#"{"quant_method":"bitsandbytes","load_in_4bit":true}"#,
    r#"{"bits":3,"group_size":4,"mode":"affine","quant_method":"mlx"}"#,
    r#"{"quant_method":"mxfp4"}"#,
];

fn tensors() -> impl Strategy<Value = Vec<(String, Dtype, Vec<u64>)>> {
    let module = prop_oneof![Just("a."), Just("b."), Just("")];
    let dtype = prop::sample::select(Dtype::ALL.to_vec());
    // Whole bytes for every dtype: the last dim is a multiple of 4.
    let last = prop_oneof![Just(0u64), Just(4), Just(8), Just(16), Just(32), Just(64)];
    let shape = (vec(prop_oneof![Just(0u64), 1..5u64, Just(8), Just(16)], 0..4), last).prop_map(
        |(mut shape, last)| {
            shape.push(last);
            shape
        },
    );
    let name =
        (module, prop::sample::select(LEAVES.to_vec())).prop_map(|(module, leaf)| format!("{module}{leaf}"));
    vec((name, dtype, shape), 0..24).prop_map(|list| {
        let once: BTreeMap<_, _> =
            list.into_iter().map(|(name, dtype, shape)| (name, (dtype, shape))).collect();
        once.into_iter().map(|(name, (dtype, shape))| (name, dtype, shape)).collect()
    })
}

fn json() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        Just("true".to_owned()),
        any::<i32>().prop_map(|number| number.to_string()),
        Just("4".to_owned()),
        Just("1e400".to_owned()),
        Just("-1".to_owned()),
        Just("\"int4\"".to_owned()),
        Just("\"re:[\"".to_owned()),
        Just("\"*[\"".to_owned()),
    ];
    let keys = [
        "quant_method",
        "bits",
        "group_size",
        "dynamic",
        "config_groups",
        "weights",
        "targets",
        "ignore",
        "quant_algo",
        "quantized_layers",
        "global_quant_config",
        "weight",
        "layer_quant_config",
        "weight_block_size",
        "format",
        "a",
    ];
    leaf.prop_recursive(4, 32, 6, move |inner| {
        let key = prop::sample::select(keys.to_vec());
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(|list| format!("[{}]", list.join(","))),
            vec((key, inner), 0..6).prop_map(|map| {
                let entries: Vec<String> =
                    map.iter().map(|(key, value)| format!("\"{key}\":{value}")).collect();
                format!("{{{}}}", entries.join(","))
            }),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn recognition_answers_for_any_header(
        tensors in tensors(),
        config in prop::option::of(prop::sample::select(CONFIGS.to_vec())),
        byte in any::<u8>(),
        is_torchao in any::<bool>(),
    ) {
        let mut model = Model { tensors, ..Model::default() };
        for (name, _, _) in &model.tensors {
            model.values.insert(name.clone(), vec![byte; 4096]);
        }
        let state = r#"{"quant_type":"nf4","blocksize":4,"shape":[4,8]}"#.to_owned();
        model.values.insert("a.weight.quant_state.bitsandbytes__nf4".to_owned(), state.into_bytes());
        if let Some(config) = config {
            model = model.config(config);
        }
        if is_torchao {
            let entry = r#"{"_type":"IntxUnpackedToInt8Tensor","_data":{"block_size":[1,4]}}"#;
            model = model.metadata("tensor_names", r#"["a.weight","b.weight"]"#).metadata("a.weight", entry);
        }
        if let Ok(found) = model.try_recognize() {
            check(&found)?;
        }
    }

    #[test]
    fn recognition_answers_for_any_configuration(text in json(), method in prop::sample::select(vec![
        "gptq", "awq", "fp8", "compressed-tensors", "modelopt", "quark", "auto-round", "mlx", "hqq", "none"])
    ) {
        let text = text.replacen('{', &format!("{{\"quant_method\":\"{method}\","), 1).replace(",}", "}");
        let model = Model::new(&[("a.weight", Dtype::U8, &[8, 8]), ("a.weight_scale", Dtype::F32, &[16, 1])]);
        if let Ok(found) = model.file("config.json", &format!(r#"{{"quantization_config":{text}}}"#)).try_recognize() {
            check(&found)?;
        }
    }

    #[test]
    fn recognition_answers_for_any_text(text in "\\PC*") {
        _ = Model::new(&[("a.qweight", Dtype::I32, &[8, 8])]).file("config.json", &text).try_recognize();
    }
}

/// Every group has one payload, every tensor one part, and results are as many numbers as recipes make.
pub(crate) fn check(found: &super::Found) -> Result<(), TestCaseError> {
    for (place, group) in found.quantization.groups().iter().enumerate() {
        let payloads = group.members.iter().filter(|(role, _)| *role == Role::Payload).count();
        prop_assert_eq!(payloads, 1);
        for (_, id) in &group.members {
            prop_assert_eq!(found.quantization.role_of(*id), Part::Member(place as u32));
        }
        check_bounds(found, group)?;
        super::cuts::check(found, group)?;
        let numbers: u64 = group.shape.iter().product();
        prop_assert_eq!(
            numbers,
            group.recipe.batch * group.recipe.rows * group.recipe.cols,
            "{}",
            found.text()
        );
    }
    Ok(())
}

/// Nothing that a recipe reads lies outside its members: kernels rely on it.
fn check_bounds(found: &super::Found, group: &Group) -> Result<(), TestCaseError> {
    let recipe = &group.recipe;
    let len_bytes = |role| {
        let (_, id) = group.members.iter().find(|(member, _)| *member == role).expect("the recipe's members");
        found.checkpoint.tensor(*id).info.len_bytes()
    };
    let groups_of = |grid: &Grid| match recipe.group_index {
        Some(groups) => u64::from(groups),
        None => recipe.cols.div_ceil(u64::from(grid.cols_per_group)),
    };
    let check_grid = |grid: &Grid, role| {
        let groups = [recipe.rows.div_ceil(u64::from(grid.rows_per_group)), groups_of(grid)];
        let last = match grid.is_swizzled {
            true => groups[0].next_multiple_of(128) * grid.row_stride - 1,
            false => (groups[0] - 1) * grid.row_stride + (groups[1] - 1) * grid.col_stride,
        };
        let bytes = match grid.number {
            Number::F32 => 4,
            Number::F16 | Number::Bf16 => 2,
            _ => 1,
        };
        let end = ((recipe.batch - 1) * grid.batch_stride + last + 1) * bytes;
        prop_assert!(end <= len_bytes(role), "{role:?} ends at {end}: {}", found.text());
        Ok(())
    };
    let payload = codes_len_bytes(recipe.codes, recipe.rows, recipe.cols) * recipe.batch;
    prop_assert!(payload <= len_bytes(Role::Payload), "payload of {payload}: {}", found.text());
    if let Some(scale) = &recipe.scale {
        let role = if scale.grid.number == Number::SignedExponent { Role::Payload } else { Role::Scale };
        check_grid(&scale.grid, role)?;
        if let Some(Global { dtype, batch_stride, .. }) = scale.global {
            let end = (1 + batch_stride * (recipe.batch - 1)) * dtype.bits() / 8;
            prop_assert!(end <= len_bytes(Role::Global), "{}", found.text());
        }
    }
    if let Some(bias) = &recipe.bias {
        check_grid(bias, Role::Bias)?;
    }
    match recipe.zero_point {
        ZeroPoint::Packed { codes, is_swapped, .. } => {
            let groups = groups_of(&recipe.scale.as_ref().expect("zero-points come with scales").grid);
            let (rows, cols) = if is_swapped { (groups, recipe.rows) } else { (recipe.rows, groups) };
            let end = codes_len_bytes(codes, rows, cols);
            prop_assert!(end <= len_bytes(Role::ZeroPoint), "zero-points of {end}: {}", found.text());
        }
        ZeroPoint::Float(grid) => check_grid(&grid, Role::ZeroPoint)?,
        _ => {}
    }
    if recipe.fold.is_some() {
        prop_assert!(recipe.cols * 2 <= len_bytes(Role::Fold), "{}", found.text());
    }
    if recipe.group_index.is_some() {
        prop_assert_eq!(recipe.cols * 4, len_bytes(Role::GroupIndex));
    }
    Ok(())
}

/// Returns the bytes that codes of one matrix take.
fn codes_len_bytes(codes: Codes, rows: u64, cols: u64) -> u64 {
    if rows == 0 {
        return 0;
    }
    let last_row = |row_stride_bytes: u64, row_bytes: u64| (rows - 1) * row_stride_bytes + row_bytes;
    match codes {
        Codes::Rows { bits, row_stride_bytes } => {
            last_row(row_stride_bytes, (cols * u64::from(bits)).div_ceil(8))
        }
        Codes::RowsHighFirst { row_stride_bytes } => last_row(row_stride_bytes, cols.div_ceil(2)),
        Codes::RowsPadded { bits, row_stride_bytes } => {
            last_row(row_stride_bytes, cols.div_ceil(u64::from(32 / bits)) * 4)
        }
        Codes::RowsWithScales { row_stride_bytes } => last_row(row_stride_bytes, cols / 32 * 17),
        Codes::Columns { bits } => (cols * u64::from(bits)).div_ceil(32) * rows * 4,
        Codes::ColumnPlanes { bits } => cols.div_ceil(32) * u64::from(bits) * rows * 4,
        Codes::Words { words_per_row, .. } => {
            assert!(rows.div_ceil(8) <= words_per_row);
            cols * words_per_row * 4
        }
        Codes::RowPairs => rows.div_ceil(2) * cols,
        Codes::RowChunks { bits, unit_bytes, unit_rows } => {
            assert!(unit_rows * (u64::from(unit_bytes) * 8 / u64::from(bits)) >= rows);
            unit_rows * cols * u64::from(unit_bytes)
        }
        Codes::AwqFast => rows / 4 * cols * 2,
        Codes::RowPlanes { bits, row_stride_bytes } => {
            last_row(row_stride_bytes, cols.div_ceil(32) * u64::from(bits) * 4)
        }
        Codes::ColumnsPadded { bits } => cols.div_ceil(u64::from(32 / bits)) * rows * 4,
        other => unreachable!("{other:?} is new"),
    }
}
