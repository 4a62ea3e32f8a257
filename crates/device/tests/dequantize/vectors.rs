//! Tensors that other people's software packed become what it says they are.

use std::path::Path;

use half::bf16;
use safetensors::SafeTensors;
use tensorhaul_device::dequantize::{Layout, Output, Sources, dequantize, reference};
use tensorhaul_plan::Dtype;
use tensorhaul_plan::quant::{
    Codes, Element, Global, Grid, Number, Recipe, Role, Scale, ZeroOffset, ZeroPoint,
};

use crate::cases::{grid, plain};

/// One result of a file: its name there, its members, and how they become it.
struct Case {
    file: &'static str,
    result: &'static str,
    members: Vec<(Role, &'static str)>,
    recipe: Recipe,
    /// The most that a BF16 may differ, in units of its last place.
    ulp_max: u16,
}

fn cases() -> Vec<Case> {
    vec![
        gptq("gptq_b4_g128_actorder", 4, 64, 320, 3),
        gptq("gptq_b8_g64", 8, 72, 192, 3),
        awq(),
        compressed_tensors(),
        fp8(
            "fp8_per_tensor",
            "model.layers.0.self_attn.k_proj.weight",
            "model.layers.0.self_attn.k_proj.weight_scale",
            96,
            120,
            Grid { rows_per_group: 96, cols_per_group: 120, ..grid(Number::F32, 0, 0) },
        ),
        fp8(
            "fp8_block_128x128",
            "model.layers.3.mlp.experts.0.gate_proj.weight",
            "model.layers.3.mlp.experts.0.gate_proj.weight_scale_inv",
            170,
            150,
            Grid { rows_per_group: 128, cols_per_group: 128, ..grid(Number::F32, 2, 1) },
        ),
        mxfp4(
            "model.layers.0.mlp.experts.gate_up_proj",
            "model.layers.0.mlp.experts.gate_up_proj_blocks",
            "model.layers.0.mlp.experts.gate_up_proj_scales",
            32,
            64,
        ),
        mxfp4(
            "model.layers.0.mlp.experts.down_proj",
            "model.layers.0.mlp.experts.down_proj_blocks",
            "model.layers.0.mlp.experts.down_proj_scales",
            64,
            32,
        ),
        nvfp4(),
    ]
}

/// Both files are of the first format, which stores zero-points less one.
fn gptq(file: &'static str, bits: u8, rows: u64, cols: u64, group_count: u32) -> Case {
    let words_per_group = rows * u64::from(bits) / 32;
    Case {
        file,
        result: "model.layers.0.self_attn.q_proj.weight",
        members: vec![
            (Role::Payload, "model.layers.0.self_attn.q_proj.qweight"),
            (Role::Scale, "model.layers.0.self_attn.q_proj.scales"),
            (Role::ZeroPoint, "model.layers.0.self_attn.q_proj.qzeros"),
            (Role::GroupIndex, "model.layers.0.self_attn.q_proj.g_idx"),
        ],
        recipe: Recipe {
            zero_point: ZeroPoint::Packed {
                codes: Codes::Rows { bits, row_stride_bytes: 4 * words_per_group },
                is_swapped: true,
                is_signed: false,
                offset: ZeroOffset::WordWise,
            },
            scale: Some(Scale { grid: grid(Number::F16, 1, rows), global: None }),
            group_index: Some(group_count),
            is_column_major: true,
            ..plain(rows, cols, Codes::Columns { bits }, Element::Unsigned)
        },
        ulp_max: 0,
    }
}

fn awq() -> Case {
    let (rows, cols) = (96, 256);
    let codes = Codes::Words { words_per_row: rows / 8, is_interleaved: true };
    Case {
        file: "awq_b4_g128",
        result: "model.layers.0.mlp.up_proj.weight",
        members: vec![
            (Role::Payload, "model.layers.0.mlp.up_proj.qweight"),
            (Role::Scale, "model.layers.0.mlp.up_proj.scales"),
            (Role::ZeroPoint, "model.layers.0.mlp.up_proj.qzeros"),
        ],
        recipe: Recipe {
            zero_point: ZeroPoint::Packed {
                codes,
                is_swapped: false,
                is_signed: false,
                offset: ZeroOffset::Constant(0),
            },
            scale: Some(Scale {
                grid: Grid { cols_per_group: 128, ..grid(Number::F16, 1, rows) },
                global: None,
            }),
            is_column_major: true,
            ..plain(rows, cols, codes, Element::Unsigned)
        },
        ulp_max: 0,
    }
}

fn compressed_tensors() -> Case {
    Case {
        file: "ct_pack_int4_g128",
        result: "model.layers.0.mlp.gate_proj.weight",
        members: vec![
            (Role::Payload, "model.layers.0.mlp.gate_proj.weight_packed"),
            (Role::Scale, "model.layers.0.mlp.gate_proj.weight_scale"),
        ],
        recipe: Recipe {
            zero_point: ZeroPoint::Constant(8),
            scale: Some(Scale {
                grid: Grid { cols_per_group: 128, ..grid(Number::Bf16, 2, 1) },
                global: None,
            }),
            ..plain(76, 256, Codes::Rows { bits: 4, row_stride_bytes: 128 }, Element::Unsigned)
        },
        ulp_max: 0,
    }
}

fn fp8(
    file: &'static str,
    weight: &'static str,
    scale: &'static str,
    rows: u64,
    cols: u64,
    grid: Grid,
) -> Case {
    Case {
        file,
        result: weight,
        members: vec![(Role::Payload, weight), (Role::Scale, scale)],
        recipe: Recipe {
            scale: Some(Scale { grid, global: None }),
            ..plain(rows, cols, Codes::Rows { bits: 8, row_stride_bytes: cols }, Element::E4m3)
        },
        ulp_max: 0,
    }
}

/// Two experts.
fn mxfp4(result: &'static str, blocks: &'static str, scales: &'static str, rows: u64, cols: u64) -> Case {
    let scale =
        Grid { cols_per_group: 32, batch_stride: rows * cols / 32, ..grid(Number::E8m0, cols / 32, 1) };
    Case {
        file: "mxfp4_experts",
        result,
        members: vec![(Role::Payload, blocks), (Role::Scale, scales)],
        recipe: Recipe {
            batch: 2,
            scale: Some(Scale { grid: scale, global: None }),
            ..plain(rows, cols, Codes::Rows { bits: 4, row_stride_bytes: cols / 2 }, Element::E2m1)
        },
        ulp_max: 0,
    }
}

fn nvfp4() -> Case {
    Case {
        file: "nvfp4_modelopt",
        result: "model.layers.0.mlp.down_proj.weight",
        members: vec![
            (Role::Payload, "model.layers.0.mlp.down_proj.weight"),
            (Role::Scale, "model.layers.0.mlp.down_proj.weight_scale"),
            (Role::Global, "model.layers.0.mlp.down_proj.weight_scale_2"),
        ],
        recipe: Recipe {
            scale: Some(Scale {
                grid: Grid { cols_per_group: 16, ..grid(Number::E4m3, 10, 1) },
                global: Some(Global { dtype: Dtype::F32, is_divisor: false, batch_stride: 0 }),
            }),
            ..plain(48, 160, Codes::Rows { bits: 4, row_stride_bytes: 80 }, Element::E2m1)
        },
        ulp_max: 1,
    }
}

#[test]
fn tensors_that_others_packed_are_what_they_say() {
    for case in cases() {
        let read = |name: &str| std::fs::read(vectors().join(format!("{name}.safetensors"))).unwrap();
        let (file, expected) = (read(case.file), read(&format!("{}.expected", case.file)));
        let (file, expected) =
            (SafeTensors::deserialize(&file).unwrap(), SafeTensors::deserialize(&expected).unwrap());
        let sources: Sources<'_> =
            case.members.iter().map(|(role, name)| (*role, file.tensor(name).unwrap().data())).collect();
        let exact = expected.tensor(case.result).unwrap();
        let rounded = expected.tensor(&format!("{}.bf16", case.result)).unwrap();
        type Execution = fn(&Recipe, &Sources<'_>, Output, &mut [u8]);
        let executions: [Execution; 2] = [reference::dequantize, |recipe, sources, output, target| {
            dequantize(recipe, sources, output, target, 2);
        }];
        for execution in executions {
            let run = |dtype| {
                let mut target = vec![0xaa; case.recipe.target_len_bytes(dtype).unwrap() as usize];
                execution(&case.recipe, &sources, Output { dtype, layout: Layout::Rows }, &mut target);
                target
            };
            same_f32(&case, &run(Dtype::F32), exact.data());
            near_bf16(&case, &run(Dtype::Bf16), rounded.data());
        }
    }
}

fn same_f32(case: &Case, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "{}", case.result);
    for (i, (found, expected)) in found.as_chunks().0.iter().zip(expected.as_chunks().0).enumerate() {
        let (found, expected) = (f32::from_le_bytes(*found), f32::from_le_bytes(*expected));
        // NaN is equal to NaN, and zero to minus zero; other numbers are equal in all bits when they are equal.
        let is_same = found == expected || found.is_nan() && expected.is_nan();
        assert!(is_same, "{}: {}[{i}] is {found:e}, expected {expected:e}", case.file, case.result);
    }
}

fn near_bf16(case: &Case, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "{}", case.result);
    for (i, (found, expected)) in found.as_chunks().0.iter().zip(expected.as_chunks().0).enumerate() {
        let (found, expected) = (bf16::from_le_bytes(*found), bf16::from_le_bytes(*expected));
        let both_nan = found.is_nan() && expected.is_nan();
        let same_sign = found.to_bits() >> 15 == expected.to_bits() >> 15;
        let ulp = found.to_bits().abs_diff(expected.to_bits());
        let is_near = both_nan || found == expected || same_sign && ulp <= case.ulp_max;
        assert!(is_near, "{}: {}[{i}] is {found}, expected {expected}", case.file, case.result);
    }
}

fn vectors() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/quant")
}
