//! What is not handled is refused by name when its numbers are asked for, and loads as it is stored else.

use serde_json::{Value, json};
use tensorhaul::{Dequantization, Dtype, ErrorKind};

use crate::case::{Case, model_config};
use crate::check::{assert_loads_as_stored, dequantized};
use crate::common::Folder;

#[test]
fn formats_out_of_scope_are_refused_by_name() {
    for (family, case) in refused() {
        let folder = Folder::on_disk();
        case.write(folder.path());
        assert_loads_as_stored(&case, folder.path());
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let error = dequantized(folder.path(), Dequantization::to(dtype)).map(drop).unwrap_err();
            let line = error.one_line();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{}: {line}", case.name);
            assert!(line.to_lowercase().contains(family), "{}: names no {family}: {line}", case.name);
            assert!(!line.contains('\n'), "{line}");
        }
    }
}

/// A stored tensor's name, which follows its module's, its dtype and shape.
type Part = (&'static str, Dtype, &'static [usize]);

/// Layers as writers of each family store them, small, with what the error must name.
fn refused() -> Vec<(&'static str, Case)> {
    use Dtype::{Bf16, F16, F32, I8, I16, I32, I64, U8};
    let method = |name: &str| json!({"quant_method": name});
    let gptq = |format: &str| json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true, "checkpoint_format": format});
    let compressed = |format: &str| {
        let weights =
            json!({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128});
        json!({
            "quant_method": "compressed-tensors", "format": format,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        })
    };
    let entries: Vec<(&'static str, Value, &[Part])> = vec![
        (
            "aqlm",
            json!({"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 16}),
            &[
                ("codes", I16, &[32, 8, 1]),
                ("codebooks", F16, &[1, 256, 1, 8]),
                ("scales", F16, &[32, 1, 1, 1]),
            ],
        ),
        (
            "vptq",
            method("vptq"),
            &[
                ("centroids.weight", F16, &[1, 2048]),
                ("indices", I32, &[1, 32, 8]),
                ("weight_scale", F16, &[64]),
                ("weight_bias", F16, &[64]),
                ("perm", I16, &[64]),
            ],
        ),
        (
            "higgs",
            json!({"quant_method": "higgs", "bits": 4, "p": 2, "group_size": 256}),
            &[
                ("weight", I16, &[8, 32]),
                ("scales", F16, &[32, 1]),
                ("tables", F16, &[256, 2]),
                ("tables2", F16, &[256, 2]),
            ],
        ),
        (
            "spqr",
            json!({"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16}),
            &[
                ("dense_weights", I64, &[2, 4]),
                ("row_offsets", I32, &[33]),
                ("col_vals", I32, &[5]),
                ("in_perm", I16, &[64]),
            ],
        ),
        (
            "quip",
            json!({"quant_method": "quip", "codebook": "E8P12"}),
            &[("Qidxs", I64, &[32, 2]), ("SU", F16, &[64]), ("SV", F16, &[32]), ("Wscale", F32, &[])],
        ),
        (
            "exl3",
            json!({"quant_method": "exl3", "bits": 4.0, "head_bits": 6}),
            &[("trellis", I16, &[4, 2, 64]), ("suh", F16, &[64]), ("svh", F16, &[32])],
        ),
        (
            "qqq",
            json!({"quant_method": "qqq", "wbits": 4, "group_size": 128}),
            &[("B", I32, &[8, 64]), ("s_channel", F32, &[1, 64]), ("s_group", F16, &[1, 64])],
        ),
        (
            "marlin",
            json!({"quant_method": "marlin", "bits": 4, "group_size": 128}),
            &[("B", I32, &[8, 128]), ("s", F16, &[1, 64])],
        ),
        (
            "marlin",
            gptq("marlin"),
            &[("qweight", I32, &[8, 128]), ("scales", F16, &[1, 64]), ("qzeros", I32, &[1, 8])],
        ),
        (
            "marlin",
            json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true, "is_marlin_format": true}),
            &[("B", I32, &[8, 128]), ("s", F16, &[1, 64])],
        ),
        ("bitblas", gptq("bitblas"), &[("qweight", I8, &[64, 64]), ("scales", F16, &[64, 1])]),
        (
            "quanto",
            json!({"quant_method": "quanto", "weights": "int8"}),
            &[("weight._data", I8, &[32, 64]), ("weight._scale", Bf16, &[32, 1]), ("input_scale", Bf16, &[])],
        ),
        (
            "eetq",
            json!({"quant_method": "eetq", "weights": "int8"}),
            &[("weight", I8, &[64, 32]), ("weight_scales", F16, &[32])],
        ),
        ("bitnet", method("bitnet"), &[("weight", U8, &[8, 64]), ("weight_scale", Bf16, &[1])]),
        (
            "paroquant",
            json!({"quant_method": "paroquant", "bits": 4, "group_size": 128, "krot": 8}),
            &[
                ("qweight", I32, &[128, 8]),
                ("qzeros", I32, &[1, 8]),
                ("scales", F16, &[1, 64]),
                ("theta", F16, &[8, 64]),
                ("pairs", I16, &[8, 128]),
                ("channel_scales", F16, &[1, 128]),
            ],
        ),
        (
            "sparse-24",
            compressed("sparse-24-bitmask"),
            &[("compressed", Bf16, &[32, 32]), ("bitmask", U8, &[32, 8]), ("shape", I64, &[2])],
        ),
        (
            "sparse-bitmask",
            compressed("sparse-bitmask"),
            &[
                ("compressed", Bf16, &[99]),
                ("bitmask", U8, &[32, 8]),
                ("row_offsets", I64, &[32]),
                ("shape", I64, &[2]),
            ],
        ),
        (
            "marlin-24",
            compressed("marlin-24"),
            &[("weight_packed", I32, &[4, 64]), ("scale_packed", F16, &[1, 64]), ("meta", I16, &[64, 4])],
        ),
        (
            "svdquant",
            Value::Null,
            &[
                ("weight", U8, &[32, 32]),
                ("weight_scale", Dtype::F8E4m3, &[128, 4]),
                ("weight_scale_2", F32, &[]),
                ("svdquant_lora_a", Bf16, &[64, 4]),
                ("svdquant_lora_b", Bf16, &[4, 32]),
            ],
        ),
        ("iq2_xs", json!({"quant_method": "modelopt", "quant_algo": "iq2_xs"}), &[("weight", U8, &[32, 74])]),
    ];
    let mut refused = Vec::new();
    for (family, config, parts) in entries {
        let name = format!("{family}: {config}");
        let mut case = if config.is_null() { Case::bare(name) } else { Case::new(name, config) };
        case.keep_the_usual();
        for (part, dtype, shape) in parts {
            case.keep(format!("model.layers.0.mlp.up_proj.{part}"), *dtype, shape);
        }
        refused.push((family, case));
    }
    refused.extend([torchao_tiles(), torchao_words(), rotated_comfy()]);
    refused
}

fn torchao_tiles() -> (&'static str, Case) {
    let parts: [Part; 2] =
        [("qdata", Dtype::I32, &[1, 1, 32, 4]), ("scale_and_zero", Dtype::Bf16, &[4, 8, 2])];
    ("int4tilepackedto4dtensor", torchao("Int4TilePackedTo4dTensor", &parts))
}

fn torchao_words() -> (&'static str, Case) {
    let parts: [Part; 3] = [
        ("qdata", Dtype::I32, &[8, 16]),
        ("scale", Dtype::Bf16, &[4, 8]),
        ("zero_point", Dtype::I8, &[4, 8]),
    ];
    ("int4plainint32tensor", torchao("Int4PlainInt32Tensor", &parts))
}

fn torchao(class: &str, parts: &[Part]) -> Case {
    let mut case = Case::bare(class).config("config.json", model_config(json!({"quant_method": "torchao"})));
    for (part, dtype, shape) in parts {
        case.keep(format!("model.layers.0.mlp.up_proj._weight_{part}"), *dtype, shape);
    }
    let names: Vec<&str> = parts.iter().map(|(part, ..)| *part).collect();
    let entry = json!({"_type": class, "_data": {"block_size": [1, 32], "shape": [8, 128]}, "_tensor_data_names": names});
    case.metadata.insert("model.layers.0.mlp.up_proj.weight".to_owned(), entry.to_string());
    case.metadata.insert("tensor_names".to_owned(), json!(["model.layers.0.mlp.up_proj.weight"]).to_string());
    case
}

fn rotated_comfy() -> (&'static str, Case) {
    let mut case = Case::bare("comfy, convrot");
    case.keep("blocks.0.attn.to_q.weight", Dtype::I8, &[16, 64]);
    case.keep("blocks.0.attn.to_q.weight_scale", Dtype::F32, &[16, 1]);
    let layers = json!({"blocks.0.attn.to_q": {"format": "convrot_w4a4", "convrot_groupsize": 64}});
    let metadata = json!({"format_version": "1.0", "layers": layers});
    case.metadata.insert("_quantization_metadata".to_owned(), metadata.to_string());
    ("convrot", case)
}
