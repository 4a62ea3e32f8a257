//! Tensors of small floats without scales: casts, and checkpoints that hold several families.

use serde_json::json;
use tensorhaul::Dtype;

use crate::case::{Case, low_bytes};
use crate::check::check;
use crate::fp8::FLOATS_OF_A_BYTE;
use crate::gptq::{Gptq, Zeros};
use crate::numbers;
use crate::pack::stream;

#[test]
fn small_floats_without_scales_are_cast() {
    let narrow: [(Dtype, numbers::Number); 4] = [
        (Dtype::F4, numbers::e2m1),
        (Dtype::F6E2m3, numbers::e2m3),
        (Dtype::F6E3m2, numbers::e3m2),
        (Dtype::F8E8m0, numbers::e8m0),
    ];
    for (dtype, value) in narrow.into_iter().chain(FLOATS_OF_A_BYTE) {
        let mut case = Case::bare(format!("plain, {dtype}"));
        let bits = dtype.bits() as u32;
        for (name, shape) in
            [("a.weight", vec![16, 16]), ("b.weight", vec![3, 5, 8]), ("c.weight", vec![256])]
        {
            let count: usize = shape.iter().product();
            let codes: Vec<u32> = (0..count as u32).map(|index| index % (1 << bits)).collect();
            let bytes = if bits == 8 { low_bytes(&codes) } else { stream(&codes, bits) };
            case.store(name, dtype, &shape, bytes);
            case.expect_values(name, &shape, codes.iter().map(|code| value(*code)).collect());
        }
        case.keep("norm.weight", Dtype::F32, &[16]);
        case.keep("position_ids", Dtype::I64, &[1, 16]);
        case.keep("bytes", Dtype::U8, &[1, 16]);
        check(&case);
        check(&case.scattered());
    }
}

#[test]
fn empty_tensors_stay_empty() {
    let mut case = Case::bare("plain, empty");
    case.store("a.weight", Dtype::F8E4m3, &[0, 7], Vec::new());
    case.expect_values("a.weight", &[0, 7], Vec::new());
    case.keep("norm.weight", Dtype::F32, &[16]);
    check(&case);
}

#[test]
fn a_checkpoint_without_quantized_tensors_comes_out_as_it_is() {
    let mut case = Case::bare("dense").config("config.json", json!({"model_type": "llama"}));
    case.keep_the_usual();
    case.keep("model.layers.0.mlp.up_proj.weight", Dtype::Bf16, &[24, 24]);
    check(&case);
}

#[test]
fn families_share_a_checkpoint() {
    let mut case = Case::new(
        "gptq with casts",
        json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": false, "desc_act": false, "checkpoint_format": "gptq_v2"}),
    );
    let gptq = Gptq { zeros: Zeros::V2, ..Gptq::default() };
    gptq.layer(&mut case, "model.layers.0.mlp.up_proj", [40, 256]);
    let codes = case.codes(128, 8);
    case.store("model.layers.0.k_cache", Dtype::F8E5m2, &[8, 16], low_bytes(&codes));
    case.expect("model.layers.0.k_cache", [8, 16], |row, col| numbers::e5m2(codes[row * 16 + col]));
    case.keep_the_usual();
    check(&case);
    check(&case.scattered());
}
