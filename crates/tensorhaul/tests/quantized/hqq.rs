//! HQQ: codes of a reshaped matrix whose parts share bytes, with float zero-points.

use serde_json::json;
use tensorhaul::Dtype;

use crate::case::{Case, Floats};
use crate::check::check;
use crate::pack::bytes_of;

#[test]
fn groups_of_neighbours_are_rows_of_the_packed_matrix() {
    for bits in [8, 6, 5, 4, 3, 2, 1] {
        for group_size in [32, 64] {
            check(&Hqq { bits, axis: 1, group_size, float_dtype: Dtype::F16, is_viewed: false }.case());
        }
    }
}

#[test]
fn groups_that_are_strided_are_columns_of_the_packed_matrix() {
    for bits in [8, 6, 5, 4, 3, 2, 1] {
        for group_size in [32, 64] {
            check(&Hqq { bits, axis: 0, group_size, float_dtype: Dtype::F16, is_viewed: false }.case());
        }
    }
}

#[test]
fn scales_and_zero_points_have_the_dtype_of_the_model() {
    for float_dtype in [Dtype::Bf16, Dtype::F32] {
        check(&Hqq { bits: 4, axis: 1, group_size: 64, float_dtype, is_viewed: false }.case().scattered());
    }
}

#[test]
fn bytes_of_codes_may_have_the_dtype_of_the_model() {
    for bits in [8, 4, 3] {
        for float_dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
            check(&Hqq { bits, axis: 1, group_size: 64, float_dtype, is_viewed: true }.case());
        }
    }
}

/// A variant of the format.
#[derive(Clone, Copy, Debug)]
struct Hqq {
    bits: u32,
    axis: usize,
    group_size: usize,
    float_dtype: Dtype,
    /// Whether the codes' bytes are given the dtype of the model.
    is_viewed: bool,
}

impl Hqq {
    fn case(self) -> Case {
        let config = json!({"quant_method": "hqq", "skip_modules": ["lm_head"], "quant_config": {"weight_quant_params": {
            "nbits": self.bits, "group_size": self.group_size, "axis": self.axis, "channel_wise": true, "optimize": true,
            "round_zero": self.bits == 4,
        }}});
        let mut case = Case::new(format!("{self:?}"), config);
        case.keep_the_usual();
        self.layer(&mut case, "model.layers.0.self_attn.q_proj", [24, 64]);
        case.keep("model.layers.0.self_attn.q_proj.bias", Dtype::F16, &[24]);
        self.layer(&mut case, "model.layers.1.mlp.down_proj", [16, 192]);
        case
    }

    fn layer(self, case: &mut Case, module: &str, [rows, cols]: [usize; 2]) {
        let Hqq { bits, axis, group_size, float_dtype, is_viewed } = self;
        let group_count = rows * cols / group_size;
        let (matrix_rows, matrix_cols) =
            if axis == 1 { (group_count, group_size) } else { (group_size, group_count) };
        // The matrix that is packed is the weight with other dimensions, so one list of codes serves both.
        let codes = case.codes(rows * cols, bits);
        let grid = if axis == 1 { [group_count, 1] } else { [1, group_count] };
        let scales = case.scales(float_dtype, &grid);
        let halves = (0..group_count).map(|_| case.dice.below(2 << bits) as f32 / 2.0 + 0.062_5).collect();
        let zero_points = Floats::of(float_dtype, &grid, halves);

        let (packing, chunk_count, chunk_bits) = match bits {
            1 => ("1bit_u8", 8, 1),
            2 => ("2bit_u8", 4, 2),
            3 => ("3bit_32", 10, 3),
            4 => ("4bit_u8", 2, 4),
            _ => ("8bit_u8", 1, 8),
        };
        let unit_rows = matrix_rows.div_ceil(chunk_count);
        let mut units = vec![0u32; unit_rows * matrix_cols];
        for (index, code) in codes.iter().enumerate() {
            let (row, col) = (index / matrix_cols, index % matrix_cols);
            let (chunk, unit_row) = (row / unit_rows, row % unit_rows);
            units[unit_row * matrix_cols + col] |= code << (chunk_bits * (chunk_count - 1 - chunk));
        }
        let name = |part: &str| format!("{module}.{part}");
        let (unit_dtype, bytes) = match bits {
            3 => (Dtype::I32, bytes_of(&units)),
            _ => (Dtype::U8, units.iter().map(|unit| u8::try_from(*unit).unwrap()).collect()),
        };
        let stored_as = if is_viewed { float_dtype } else { unit_dtype };
        let stored_cols = matrix_cols * unit_dtype.bits() as usize / stored_as.bits() as usize;
        case.store(name("W_q"), stored_as, &[unit_rows, stored_cols], bytes);
        case.store_floats(name("scale"), &scales);
        case.store_floats(name("zero"), &zero_points);
        for (part, number) in [("nbits", bits as usize), ("group_size", group_size), ("axis", axis)] {
            case.store(name(part), Dtype::I32, &[], (number as i32).to_le_bytes().to_vec());
        }
        let shape = [rows, cols].iter().flat_map(|dim| (*dim as i64).to_le_bytes()).collect();
        case.store(name("shape"), Dtype::I64, &[2], shape);
        let unit = if bits == 3 { "torch.int32" } else { "torch.uint8" };
        let compute = match float_dtype {
            Dtype::Bf16 => "torch.bfloat16",
            Dtype::F32 => "torch.float32",
            _ => "torch.float16",
        };
        for (part, text) in [("packing", packing), ("unpack_view_dtype", unit), ("compute_dtype", compute)] {
            case.store(name(part), Dtype::U8, &[text.len()], text.into());
        }
        for (part, flag) in [
            ("view_as_float", is_viewed),
            ("quant_scale", false),
            ("quant_zero", false),
            ("offload_meta", false),
            ("encoded_state_dict", true),
            ("stores_quant_config", true),
            ("channel_wise", true),
            ("optimize", true),
            ("round_zero", bits == 4),
        ] {
            case.store(name(part), Dtype::U8, &[], vec![u8::from(flag)]);
        }

        case.expect(name("weight"), [rows, cols], |row, col| {
            let index = row * cols + col;
            let group = if axis == 1 { index / group_size } else { index % group_count };
            (codes[index] as f32 - zero_points.values[group]) * scales.values[group]
        });
    }
}
