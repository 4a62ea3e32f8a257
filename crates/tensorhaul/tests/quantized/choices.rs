//! What a caller may choose: which tensors, which way round, which numbers.

use serde_json::json;
use tensorhaul::{Dequantization, Dtype, ErrorKind};

use crate::case::Case;
use crate::check::{assert_is_stored, assert_numbers, dequantized};
use crate::common::Folder;
use crate::compressed::Packed;
use crate::gptq::{Gptq, Zeros};

const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

#[test]
fn only_what_is_asked_for_by_its_result_s_name_is_dequantized() {
    let (case, folder) = two_layers();
    for (glob, chosen, packed) in [
        ("*q_proj.weight", Q, "model.layers.1.mlp.down_proj."),
        ("model.layers.1.*", DOWN, "model.layers.0.self_attn.q_proj."),
    ] {
        let tensors = dequantized(folder.path(), Dequantization::to(Dtype::F32).only([glob])).unwrap();
        let expected = case.expected.iter().find(|expected| expected.name == chosen).unwrap();
        assert_numbers(case.tolerance, expected, tensors.get(chosen).unwrap(), glob);
        for stored in &case.tensors {
            let is_left = stored.name.starts_with(packed) || case.dense.contains(&stored.name);
            match tensors.get(&stored.name) {
                Some(tensor) if is_left => assert_is_stored(tensor, stored, glob),
                found => assert!(found.is_none() && !is_left, "{glob}: {}", stored.name),
            }
        }
    }
}

#[test]
fn a_glob_that_matches_nothing_is_an_error() {
    let (_, folder) = two_layers();
    let only = Dequantization::to(Dtype::F32).only(["*q_proj.weight", "*nothing*"]);
    let error = dequantized(folder.path(), only).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadRequest);
    assert!(error.one_line().contains("*nothing*"), "{}", error.one_line());
}

#[test]
fn what_is_refused_does_not_stand_in_the_way_of_what_is_not_asked_for() {
    let (mut case, _) = two_layers();
    case.keep("model.layers.2.mlp.up_proj.trellis", Dtype::I16, &[4, 2, 64]);
    case.keep("model.layers.2.mlp.up_proj.suh", Dtype::F16, &[64]);
    case.keep("model.layers.2.mlp.up_proj.svh", Dtype::F16, &[32]);
    let folder = Folder::on_disk();
    case.write(folder.path());
    let tensors = dequantized(folder.path(), Dequantization::to(Dtype::F32).only([Q, DOWN])).unwrap();
    for expected in &case.expected {
        assert_numbers(
            case.tolerance,
            expected,
            tensors.get(&expected.name).unwrap(),
            "beside a refused layer",
        );
    }
    for stored in case.tensors.iter().filter(|stored| case.dense.contains(&stored.name)) {
        assert_is_stored(tensors.get(&stored.name).unwrap(), stored, "beside a refused layer");
    }
}

#[test]
fn formats_of_neighbouring_rows_come_out_by_columns_on_request() {
    let (case, folder) = two_layers();
    let tensors = dequantized(folder.path(), Dequantization::to(Dtype::F32).as_stored()).unwrap();
    for expected in &case.expected {
        let tensor = tensors.get(&expected.name).unwrap();
        let [rows, cols] = [expected.shape[0] as usize, expected.shape[1] as usize];
        assert_eq!(tensor.shape(), [expected.shape[1], expected.shape[0]], "{}", expected.name);
        let found = tensor.as_slice::<f32>().unwrap();
        for (index, due) in expected.values.iter().enumerate() {
            let place = index % cols * rows + index / cols;
            assert!(found[place] == *due, "{} element {index}: {}, not {due}", expected.name, found[place]);
        }
    }
}

#[test]
fn formats_of_neighbouring_columns_stay_as_they_are() {
    let mut case = Case::bare("packed, as stored");
    let weights = json!({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128, "dynamic": false});
    let config = json!({"quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }});
    case.configs.push(("config.json", config));
    Packed::default().layer(&mut case, "model.layers.0.mlp.down_proj", [24, 256]);
    let folder = Folder::on_disk();
    case.write(folder.path());
    let tensors = dequantized(folder.path(), Dequantization::to(Dtype::F32).as_stored()).unwrap();
    let expected = &case.expected[0];
    let tensor = tensors.get(&expected.name).unwrap();
    assert_eq!(tensor.shape(), expected.shape);
    assert_numbers(case.tolerance, expected, tensor, "as stored");
}

#[test]
fn other_dtypes_are_no_numbers_to_dequantize_to() {
    let (_, folder) = two_layers();
    for dtype in [Dtype::F64, Dtype::I32, Dtype::U8, Dtype::F8E4m3] {
        let error = dequantized(folder.path(), Dequantization::to(dtype)).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadRequest, "{dtype}");
        assert!(error.one_line().contains(dtype.name()), "{}", error.one_line());
    }
}

fn two_layers() -> (Case, Folder) {
    let case = Gptq { zeros: Zeros::V2, ..Gptq::default() }.case();
    let folder = Folder::on_disk();
    case.write(folder.path());
    (case, folder)
}
