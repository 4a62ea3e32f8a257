//! Small quantized checkpoints: of every family, with random bytes, and those that others wrote.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tensorhaul_plan::Dtype::{self, *};
use tensorhaul_plan::header::{NewTensor, encode};
use tensorhaul_plan::quant::{Configs, Quantization, Survey, Values};
use tensorhaul_plan::{Checkpoint, File, Header, TensorId, TensorRef};

/// A checkpoint of one file.
struct Model {
    title: String,
    tensors: Vec<(String, Dtype, Vec<u64>)>,
    metadata: BTreeMap<String, String>,
    configs: Configs,
    bytes: BTreeMap<String, Vec<u8>>,
}

/// A checkpoint that was understood: everything in it that looks quantized is.
pub(crate) struct Found {
    pub(crate) title: String,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) quantization: Quantization,
    bytes: Vec<Vec<u8>>,
}

impl Found {
    fn new(title: &str, checkpoint: Checkpoint, configs: &Configs, bytes: Vec<Vec<u8>>) -> Found {
        let survey = Survey::new(&checkpoint, configs).expect("a readable configuration");
        let mut values = Values::none();
        for need in survey.needs() {
            values.insert(need.tensor, &bytes[need.tensor.0 as usize][..need.len_bytes as usize]);
        }
        let quantization = survey.recognize(&checkpoint, &values);
        assert!(quantization.refused().is_empty(), "{title}: {:?}", quantization.refused());
        assert!(!quantization.groups().is_empty(), "{title}: nothing is quantized");
        Found { title: title.to_owned(), checkpoint, quantization, bytes }
    }

    pub(crate) fn bytes(&self, id: TensorId) -> &[u8] {
        &self.bytes[id.0 as usize]
    }
}

impl Model {
    fn new(title: impl Into<String>, tensors: &[(&str, Dtype, &[u64])]) -> Model {
        let owned = |(name, dtype, shape): &(&str, Dtype, &[u64])| (name.to_string(), *dtype, shape.to_vec());
        Model {
            title: title.into(),
            tensors: tensors.iter().map(owned).collect(),
            metadata: BTreeMap::new(),
            configs: Configs::none(),
            bytes: BTreeMap::new(),
        }
    }

    fn and(mut self, name: &str, dtype: Dtype, shape: &[u64]) -> Model {
        self.tensors.push((name.to_owned(), dtype, shape.to_vec()));
        self
    }

    /// Sets `quantization_config`.
    fn config(self, json: impl AsRef<str>) -> Model {
        let json = format!(r#"{{"quantization_config":{}}}"#, json.as_ref());
        self.file("config.json", &json)
    }

    fn file(mut self, name: &str, text: &str) -> Model {
        self.configs.insert(name, text);
        self
    }

    fn metadata(mut self, key: &str, value: &str) -> Model {
        self.metadata.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Sets a tensor's bytes, which are random else.
    fn value(mut self, name: &str, bytes: impl Into<Vec<u8>>) -> Model {
        self.bytes.insert(name.to_owned(), bytes.into());
        self
    }

    fn ints(self, name: &str, numbers: impl IntoIterator<Item = u32>) -> Model {
        self.value(name, numbers.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<_>>())
    }

    fn recognize(&self) -> Found {
        let as_new =
            |(name, dtype, shape): &'_ (String, Dtype, Vec<u64>)| (name.clone(), *dtype, shape.clone());
        let tensors: Vec<_> = self.tensors.iter().map(as_new).collect();
        let list: Vec<NewTensor<'_>> =
            tensors.iter().map(|(name, dtype, shape)| NewTensor { name, dtype: *dtype, shape }).collect();
        let header = encode(&list, &self.metadata, 0).expect("a header");
        let bits =
            |(_, dtype, shape): &(String, Dtype, Vec<u64>)| shape.iter().product::<u64>() * dtype.bits();
        let data_len_bytes: u64 = self.tensors.iter().map(|tensor| bits(tensor) / 8).sum();
        let header =
            Header::parse(&header[8..], header.len() as u64 + data_len_bytes).expect("what was encoded");
        let checkpoint = Checkpoint::new(vec![File::new("model.safetensors", header)]).expect("one file");
        let bytes: Vec<Vec<u8>> = checkpoint
            .tensors()
            .map(|tensor| {
                let info = tensor.info;
                let known = self.bytes.get(info.name).cloned();
                known.unwrap_or_else(|| random(info.dtype, info.len_bytes(), u64::from(tensor.id.0)))
            })
            .collect();
        Found::new(&self.title, checkpoint, &self.configs, bytes)
    }
}

/// Bytes that look like nothing; wide floats are near 1.
fn random(dtype: Dtype, len_bytes: u64, seed: u64) -> Vec<u8> {
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes: Vec<u8> = (0..len_bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect();
    let width = dtype.bits() as usize / 8;
    if matches!(dtype, F32 | F16 | Bf16) {
        bytes.chunks_exact_mut(width).for_each(|number| number[width - 1] = 0x3c | number[width - 1] & 0x80);
    }
    bytes
}

/// Every family, with sizes that are multiples of what is packed and scaled together, and with others; and the public vectors.
pub(crate) fn checkpoints() -> Vec<Found> {
    let families = [
        gptq(),
        awq(),
        fp8(),
        compressed_tensors(),
        bitsandbytes(),
        mx(),
        nvfp4(),
        integers(),
        hqq(),
        mlx(),
        casts(),
    ];
    let models = families.iter().flatten().map(Model::recognize);
    models.chain(vectors()).collect()
}

/// What other people's software packed.
fn vectors() -> impl Iterator<Item = Found> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/quant");
    let read = move |name: &str| std::fs::read(folder.join(name)).expect("a vector");
    let manifest: Value = serde_json::from_slice(&read("manifest.json")).expect("JSON");
    let cases = manifest["cases"].as_array().expect("a list").clone();
    cases.into_iter().map(move |case| {
        let text = |key: &str| case[key].as_str().expect("a text").to_owned();
        let file = read(&text("file"));
        let header_len = u64::from_le_bytes(*file.first_chunk().expect("a length")) as usize;
        let header = Header::parse(&file[8..8 + header_len], file.len() as u64).expect("a header");
        let checkpoint = Checkpoint::new(vec![File::new(text("file"), header)]).expect("one file");
        let bytes = |tensor: TensorRef<'_>| {
            file[tensor.file_offset_bytes as usize..][..tensor.info.len_bytes() as usize].to_vec()
        };
        let bytes = checkpoint.tensors().map(bytes).collect();
        let mut configs = Configs::none();
        let config = serde_json::json!({"quantization_config": case["quantization_config"]});
        configs.insert("config.json", config.to_string());
        Found::new(&text("name"), checkpoint, &configs, bytes)
    })
}

fn gptq() -> Vec<Model> {
    let model = |title: &str, bits: u64, [n, k, g]: [u64; 3], options: &str, zero_words: u64| {
        let groups = k.div_ceil(g);
        Model::new(
            format!("GPTQ, {title}, {bits} bits"),
            &[
                ("a.qweight", I32, &[(k * bits).div_ceil(32), n]),
                ("a.qzeros", I32, &[groups, zero_words]),
                ("a.scales", F16, &[groups, n]),
            ],
        )
        .config(format!(r#"{{"quant_method":"gptq","bits":{bits},"group_size":{g},{options}}}"#))
    };
    let index = |model: Model, k: u32, groups: u32| {
        model.and("a.g_idx", I32, &[k.into()]).ints("a.g_idx", (0..k).map(|k| k * 7 % 11 % groups))
    };
    let mut all = Vec::new();
    for bits in [2u64, 3, 4, 8] {
        let words = (64 * bits).div_ceil(32);
        all.push(model(
            "first format",
            bits,
            [64, 192, 64],
            r#""sym":false,"checkpoint_format":"gptq""#,
            words,
        ));
        all.push(model(
            "second format",
            bits,
            [64, 160, 64],
            r#""sym":false,"checkpoint_format":"gptq_v2""#,
            words,
        ));
        let act_order = model(
            "act-order",
            bits,
            [64, 256, 64],
            r#""sym":false,"checkpoint_format":"gptq","desc_act":true"#,
            words,
        );
        all.push(index(act_order, 256, 4));
        let zeros = middle(bits as u32);
        let symmetric = model("symmetric", bits, [64, 192, 64], r#""sym":true"#, words);
        let symmetric =
            if bits == 3 { symmetric } else { symmetric.ints("a.qzeros", vec![zeros; 3 * words as usize]) };
        all.push(symmetric);
    }
    for bits in [3, 5, 6, 7] {
        let words = 2 * bits;
        all.push(model("planes", bits, [64, 192, 64], r#""sym":false,"checkpoint_format":"gptq_p""#, words));
    }
    all.push(model("one group", 4, [40, 64, 64], r#""sym":false,"checkpoint_format":"gptq""#, 5));
    all
}

/// A word of zero-points that are all the middle of the range.
fn middle(bits: u32) -> u32 {
    (0..32 / bits).fold(0, |word, at| word | 1 << (bits * at + bits - 1))
}

fn awq() -> Vec<Model> {
    let config = |version: &str, g: u32| {
        format!(
            r#"{{"quant_method":"awq","bits":4,"group_size":{g},"zero_point":true,"version":"{version}"}}"#
        )
    };
    vec![
        Model::new(
            "AWQ, GEMM",
            &[("a.qweight", I32, &[256, 9]), ("a.qzeros", I32, &[4, 9]), ("a.scales", F16, &[4, 72])],
        )
        .config(config("gemm", 64)),
        Model::new(
            "AWQ, GEMV",
            &[("a.qweight", I32, &[48, 80]), ("a.qzeros", I32, &[48, 2]), ("a.scales", F16, &[48, 16])],
        )
        .config(config("gemv", 64)),
        Model::new(
            "AWQ, GEMVFast",
            &[("a.qweight", I16, &[12, 256]), ("a.qzeros", F16, &[8, 48]), ("a.scales", F16, &[8, 48])],
        )
        .config(config("gemv_fast", 128)),
    ]
}

fn fp8() -> Vec<Model> {
    let model = |title: &str, shape: &[u64], dtype: Dtype, scale: &[u64]| {
        Model::new(format!("FP8, {title}"), &[("a.weight", F8E4m3, shape), ("a.weight_scale", dtype, scale)])
    };
    let experts = |title: &str, shape: &[u64], scale: &[u64]| {
        Model::new(
            format!("FP8, experts, {title}"),
            &[("e.gate_up_proj", F8E4m3, shape), ("e.gate_up_proj_scale", F32, scale)],
        )
    };
    let blocks = r#"{"quant_method":"fp8","weight_block_size":[128,128]}"#;
    let tiny = r#"{"quant_method":"fp8","weight_block_size":[16,24]}"#;
    vec![
        model("tensor", &[40, 48], F32, &[]),
        model("rows", &[40, 48], Bf16, &[40, 1]),
        model("columns", &[40, 48], F32, &[1, 48]),
        model("convolution", &[24, 6, 3, 3], F32, &[24]),
        model("blocks", &[300, 200], F32, &[3, 2]).config(blocks),
        model("one row of blocks", &[100, 200], F32, &[1, 2]).config(blocks),
        model("exponents", &[48, 72], F8E8m0, &[3, 3]).config(tiny),
        model("ModelOpt's blocks", &[40, 72], F32, &[3, 1, 3, 1]).config(tiny),
        experts("blocks", &[5, 40, 72], &[5, 3, 3]).config(tiny),
        experts("a number each", &[5, 16, 24], &[5]),
        experts("rows", &[5, 16, 24], &[5, 16, 1]),
        experts("columns", &[5, 16, 24], &[5, 1, 24]),
        experts("a number for all", &[5, 16, 24], &[]),
    ]
}

fn compressed_tensors() -> Vec<Model> {
    let config = |bits: u64, is_symmetric: bool, strategy: &str| {
        format!(
            r#"{{"quant_method":"compressed-tensors","format":"pack-quantized","config_groups":{{"group_0":{{"targets":["Linear"],
            "weights":{{"num_bits":{bits},"type":"int","symmetric":{is_symmetric},"strategy":"{strategy}","group_size":64}}}}}}}}"#
        )
    };
    let packed = |title: &str, [n, k, words, groups]: [u64; 4]| {
        Model::new(
            format!("compressed-tensors, {title}"),
            &[
                ("a.weight_shape", I64, &[2]),
                ("a.weight_packed", I32, &[n, words]),
                ("a.weight_scale", Bf16, &[n, groups]),
            ],
        )
        .value("a.weight_shape", [n.to_le_bytes(), k.to_le_bytes()].concat())
    };
    let zeros = "a.weight_zero_point";
    let dense = |bits: u64| {
        packed(&format!("{bits} bits"), [64, 192, 6 * bits, 3]).config(config(bits, true, "group"))
    };
    let asymmetric = |bits: u64| {
        packed(&format!("{bits} bits, asymmetric"), [64, 192, 6 * bits, 3])
            .and(zeros, I32, &[2 * bits, 3])
            .config(config(bits, false, "group"))
    };
    let mut all: Vec<Model> = [1, 2, 3, 4, 5, 6, 7, 8].map(dense).into();
    all.extend([2, 3, 4, 8].map(asymmetric));
    all.extend([
        packed("ragged", [37, 300, 38, 5]).and(zeros, I32, &[5, 5]).config(config(4, false, "group")),
        packed("3 bits, padded", [36, 300, 30, 5]).and(zeros, I32, &[4, 5]).config(config(3, false, "group")),
        packed("8 bits, rows", [37, 64, 16, 1]).config(config(8, true, "channel")),
        packed("bytes of zero-points", [37, 192, 24, 3])
            .and(zeros, I8, &[37, 3])
            .config(config(4, false, "group")),
        packed("another order", [40, 192, 24, 3])
            .and(zeros, I32, &[5, 3])
            .and("a.weight_g_idx", I32, &[192])
            .ints("a.weight_g_idx", (0..192).map(|k| k * 5 % 3))
            .config(config(4, false, "group")),
        Model::new(
            "int8, asymmetric",
            &[("a.weight", I8, &[16, 24]), ("a.weight_scale", F32, &[1]), (zeros, I8, &[1])],
        )
        .config(r#"{"quant_method":"compressed-tensors","format":"int-quantized"}"#),
        Model::new(
            "int8, rows",
            &[("a.weight", I8, &[16, 24]), ("a.weight_scale", Bf16, &[16, 1]), (zeros, I8, &[16, 1])],
        )
        .config(r#"{"quant_method":"compressed-tensors","format":"int-quantized"}"#),
        Model::new("int8, experts", &[("a.weight", I8, &[3, 16, 24]), ("a.weight_scale", F32, &[3, 16, 4])])
            .config(r#"{"quant_method":"compressed-tensors","format":"int-quantized"}"#),
    ]);
    all
}

fn bitsandbytes() -> Vec<Model> {
    let model = |title: &str, [n, k]: [u64; 2], dtype: Dtype, nested: Option<u64>| {
        let nested_json =
            nested.map_or(String::new(), |per| format!(r#","nested_blocksize":{per},"nested_offset":0.125"#));
        let state = format!(
            r#"{{"quant_type":"nf4","blocksize":64,"dtype":"bfloat16","shape":[{n},{k}]{nested_json}}}"#
        );
        let blocks = (n * k).div_ceil(64);
        let elements = (n * k).div_ceil(2).div_ceil(dtype.bits() / 8);
        let model = Model::new(
            format!("bitsandbytes, {title}"),
            &[
                ("a.weight", dtype, &[elements, 1]),
                ("a.weight.absmax", if nested.is_some() { U8 } else { F32 }, &[blocks]),
                ("a.weight.quant_map", F32, &[16]),
                ("a.weight.quant_state.bitsandbytes__nf4", U8, &[state.len() as u64]),
            ],
        );
        let model = model.value("a.weight.quant_state.bitsandbytes__nf4", state);
        match nested {
            None => model,
            Some(per) => {
                let scales = [blocks.div_ceil(per)];
                model.and("a.weight.nested_absmax", F32, &scales).and(
                    "a.weight.nested_quant_map",
                    F32,
                    &[256],
                )
            }
        }
    };
    vec![
        model("blocks within rows", [48, 192], U8, None),
        model("rows within blocks", [48, 32], U8, None),
        model("blocks across rows", [33, 31], U8, None),
        model("blocks across even rows", [24, 96], U8, None),
        model("nested", [48, 192], U8, Some(4)),
        model("nested, rows within blocks", [64, 16], U8, Some(3)),
        model("nested, blocks across rows", [48, 31], U8, Some(5)),
        model("nested, as BF16", [48, 192], Bf16, Some(256)),
        Model::new(
            "bitsandbytes, int8",
            &[("a.weight", I8, &[24, 16]), ("a.SCB", F32, &[24]), ("a.weight_format", U8, &[])],
        )
        .value("a.weight_format", [0])
        .config(r#"{"quant_method":"bitsandbytes","load_in_8bit":true}"#),
    ]
}

fn mx() -> Vec<Model> {
    let quark = |dtype: &str| {
        format!(
            r#"{{"quant_method":"quark","global_quant_config":{{"weight":{{"dtype":"{dtype}","qscheme":"per_group","group_size":32,"scale_format":"e8m0"}}}}}}"#
        )
    };
    vec![
        Model::new(
            "gpt-oss",
            &[("e.down_proj_blocks", U8, &[4, 24, 5, 16]), ("e.down_proj_scales", U8, &[4, 24, 5])],
        ),
        Model::new("MXFP4", &[("a.weight_packed", U8, &[24, 96]), ("a.weight_scale", U8, &[24, 6])])
            .config(r#"{"quant_method":"compressed-tensors","format":"mxfp4-pack-quantized"}"#),
        Model::new("MXFP6", &[("a.weight", U8, &[24, 144]), ("a.weight_scale", U8, &[24, 6])])
            .config(quark("fp6_e3m2")),
        Model::new("MXFP8", &[("a.weight", F8E4m3, &[24, 192]), ("a.weight_scale", U8, &[24, 6])])
            .config(r#"{"quant_method":"compressed-tensors","format":"mxfp8-quantized"}"#),
        Model::new("MX with inline scales", &[("a.weight", U8, &[2, 24, 102])]).config(quark("mx")),
        Model::new("MXFP4 of F4", &[("a.weight", F4, &[24, 192]), ("a.weight_scale", U8, &[24, 6])]),
        Model::new(
            "MXFP8 in tiles",
            &[("c.weight", F8E4m3, &[300, 320]), ("c.weight_scale", F8E8m0, &[384, 12])],
        )
        .metadata("_quantization_metadata", r#"{"layers":{"c":{"format":"mxfp8"}}}"#),
    ]
}

fn nvfp4() -> Vec<Model> {
    vec![
        Model::new(
            "NVFP4",
            &[
                ("a.weight", U8, &[48, 80]),
                ("a.weight_scale", F8E4m3, &[48, 10]),
                ("a.weight_scale_2", F32, &[]),
                ("a.pre_quant_scale", Bf16, &[160]),
            ],
        )
        .file("hf_quant_config.json", r#"{"quantization":{"quant_algo":"NVFP4_AWQ","group_size":16}}"#),
        Model::new(
            "NVFP4, divided",
            &[
                ("a.weight_packed", U8, &[48, 80]),
                ("a.weight_scale", F8E4m3, &[48, 10]),
                ("a.weight_global_scale", F32, &[1]),
            ],
        )
        .config(r#"{"quant_method":"compressed-tensors","format":"nvfp4-pack-quantized"}"#),
        Model::new(
            "NVFP4, experts",
            &[
                ("a.weight", U8, &[3, 16, 40]),
                ("a.weight_scale", F8E4m3, &[3, 16, 5]),
                ("a.weight_scale_2", F32, &[3]),
            ],
        ),
        Model::new(
            "NVFP4 in tiles",
            &[
                ("a.weight", U8, &[304, 160]),
                ("a.weight_scale", F8E4m3, &[384, 20]),
                ("a.weight_scale_2", F32, &[]),
            ],
        )
        .metadata("_quantization_metadata", r#"{"layers":{"a":{"format":"nvfp4"}}}"#),
        Model::new(
            "NVFP4, tiles of one dimension",
            &[
                ("a.weight", U8, &[136, 80]),
                ("a.weight_scale", U8, &[256 * 12]),
                ("a.weight_scale_2", F32, &[]),
            ],
        ),
    ]
}

/// ModelOpt's, Quark's and torchao's.
fn integers() -> Vec<Model> {
    let quark = |dtype: &str, method: &str| {
        format!(
            r#"{{"quant_method":"quark","export":{{"pack_method":"{method}"}},"global_quant_config":{{"weight":{{
            "dtype":"{dtype}","qscheme":"per_group","group_size":32}}}}}}"#
        )
    };
    let words = |title: &str| {
        Model::new(
            format!("Quark, {title}"),
            &[
                ("a.weight", I32, &[96, 8]),
                ("a.weight_scale", F32, &[3, 60]),
                ("a.weight_zero_point", I32, &[3, 8]),
            ],
        )
    };
    let torchao = |kind: &str, data: &str, tensors: &[(&str, Dtype, &[u64])]| {
        Model::new(format!("torchao, {kind}"), tensors)
            .metadata("tensor_names", r#"["a.weight"]"#)
            .metadata("a.weight", &format!(r#"{{"_type":"{kind}","_data":{data}}}"#))
    };
    vec![
        Model::new(
            "ModelOpt INT4",
            &[
                ("a.weight", U8, &[24, 96]),
                ("a.weight_scale", F32, &[48, 3]),
                ("a.pre_quant_scale", Bf16, &[96]),
            ],
        )
        .file("hf_quant_config.json", r#"{"quantization":{"quant_algo":"W4A16_AWQ","group_size":32}}"#),
        words("in order").config(quark("uint4", "order")),
        words("reordered").config(quark("int4", "reorder")),
        torchao(
            "IntxUnpackedToInt8Tensor",
            r#"{"block_size":[1,32]}"#,
            &[
                ("a._weight_qdata", I8, &[24, 96]),
                ("a._weight_scale", Bf16, &[24, 3]),
                ("a._weight_zero_point", I8, &[24, 3]),
            ],
        ),
        torchao(
            "Int8Tensor",
            r#"{"block_size":[8,32]}"#,
            &[
                ("a._weight_qdata", I8, &[24, 96]),
                ("a._weight_scale", F32, &[3, 3]),
                ("a._weight_zero_point", I8, &[3, 3]),
            ],
        ),
        torchao(
            "Int4Tensor",
            r#"{"block_size":[1,32]}"#,
            &[
                ("a._weight_qdata", I8, &[24, 48]),
                ("a._weight_scale", Bf16, &[3, 24]),
                ("a._weight_zero_point", Bf16, &[3, 24]),
            ],
        ),
    ]
}

fn hqq() -> Vec<Model> {
    let model = |bits: u32, axis: u32, packing: &str, [n, k]: [u64; 2]| {
        let groups = n * k / 64;
        let (rows, cols) = if axis == 1 { (groups, 64) } else { (64, groups) };
        let (chunks, dtype) = match packing {
            "4bit_u8" => (2, U8),
            "3bit_32" => (10, I32),
            "2bit_u8" => (4, U8),
            "1bit_u8" => (8, U8),
            _ => (1, U8),
        };
        let scale: &[u64] = if axis == 1 { &[rows, 1] } else { &[1, cols] };
        Model::new(
            format!("HQQ, {bits} bits, axis {axis}, [{n}, {k}]"),
            &[
                ("a.W_q", dtype, &[u64::div_ceil(rows, chunks), cols]),
                ("a.scale", F16, scale),
                ("a.zero", F16, scale),
                ("a.nbits", I32, &[1]),
                ("a.group_size", I32, &[1]),
                ("a.axis", I32, &[1]),
                ("a.shape", I64, &[2]),
                ("a.packing", U8, &[packing.len() as u64]),
            ],
        )
        .ints("a.nbits", [bits])
        .ints("a.group_size", [64])
        .ints("a.axis", [axis])
        .value("a.shape", [n.to_le_bytes(), k.to_le_bytes()].concat())
        .value("a.packing", packing)
    };
    vec![
        model(4, 1, "4bit_u8", [48, 128]),
        model(4, 1, "4bit_u8", [64, 32]),
        model(4, 0, "4bit_u8", [128, 48]),
        model(3, 1, "3bit_32", [48, 128]),
        model(2, 1, "2bit_u8", [48, 128]),
        model(1, 1, "1bit_u8", [48, 128]),
        model(8, 1, "8bit_u8", [48, 128]),
        model(5, 0, "8bit_u8", [48, 128]),
    ]
}

fn mlx() -> Vec<Model> {
    let affine = |bits: u64| {
        Model::new(
            format!("MLX, {bits} bits"),
            &[
                ("a.weight", U32, &[3, 16, 4 * bits]),
                ("a.scales", Bf16, &[3, 16, 2]),
                ("a.biases", Bf16, &[3, 16, 2]),
            ],
        )
        .file("config.json", &format!(r#"{{"quantization":{{"group_size":64,"bits":{bits}}}}}"#))
    };
    [2, 3, 4, 5, 6, 8].map(affine).into()
}

fn casts() -> Vec<Model> {
    [
        (F4, &[6, 8][..]),
        (F4, &[4, 3]),
        (F6E2m3, &[6, 8]),
        (F6E3m2, &[6, 2]),
        (F8E5m2, &[2, 3, 5]),
        (F8E4m3Fnuz, &[7]),
    ]
    .map(|(dtype, shape)| Model::new(format!("a cast of {dtype} {shape:?}"), &[("a.weight", dtype, shape)]))
    .into()
}
