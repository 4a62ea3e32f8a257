//! bitsandbytes: 4-bit codes of a table with nested scales, and 8-bit integers.

use serde_json::{Value, json};
use tensorhaul::Dtype;

use crate::case::{Case, Floats, low_bytes};
use crate::check::check;
use crate::numbers::signed;
use crate::pack::nibbles_high_first;

#[test]
fn codes_of_4_bits_select_from_the_table_in_the_file() {
    for kind in ["nf4", "fp4"] {
        for storage in [Dtype::U8, Dtype::Bf16, Dtype::F16, Dtype::F32] {
            for block_size in [64, 128] {
                check(&Coded { kind, storage, block_size, is_nested: false }.case());
            }
        }
    }
}

#[test]
fn nested_scales_are_codes_themselves() {
    for kind in ["nf4", "fp4"] {
        for storage in [Dtype::U8, Dtype::Bf16] {
            check(&Coded { kind, storage, block_size: 64, is_nested: true }.case());
            check(&Coded { kind, storage, block_size: 64, is_nested: true }.case().scattered());
        }
    }
}

#[test]
fn odd_numbers_of_codes_leave_half_a_byte() {
    for is_nested in [false, true] {
        let coded = Coded { kind: "nf4", storage: Dtype::U8, block_size: 64, is_nested };
        let mut case = Case::new(format!("{coded:?}, odd"), coded.config());
        coded.layer(&mut case, "model.layers.0.mlp.down_proj", [21, 37]);
        case.keep_the_usual();
        check(&case);
    }
}

#[test]
fn a_file_without_a_configuration_describes_itself() {
    let coded = Coded { kind: "fp4", storage: Dtype::U8, block_size: 64, is_nested: true };
    let mut case = Case::bare("bitsandbytes without config.json");
    coded.layer(&mut case, "model.layers.0.mlp.down_proj", [20, 48]);
    check(&case);
}

#[test]
fn integers_of_8_bits_are_parts_of_127_of_their_row_s_scale() {
    let config = json!({"quant_method": "bitsandbytes", "load_in_8bit": true, "load_in_4bit": false, "llm_int8_skip_modules": ["lm_head"]});
    let mut case = Case::new("bitsandbytes, int8", config);
    case.keep_the_usual();
    for (module, [rows, cols]) in
        [("model.layers.0.mlp.up_proj", [23, 45]), ("model.layers.1.mlp.down_proj", [8, 64])]
    {
        let codes = case.codes(rows * cols, 8);
        let scale = case.scales(Dtype::F32, &[rows]);
        case.store(format!("{module}.weight"), Dtype::I8, &[rows, cols], low_bytes(&codes));
        case.store_floats(format!("{module}.SCB"), &scale);
        case.store(format!("{module}.weight_format"), Dtype::U8, &[], vec![0]);
        case.keep(format!("{module}.bias"), Dtype::F16, &[rows]);
        case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
            signed(codes[row * cols + col], 8) as f32 * scale.values[row] * (1.0 / 127.0)
        });
    }
    check(&case);
    check(&case.scattered());
}

/// A variant of the formats of 4 bits.
#[derive(Clone, Copy, Debug)]
struct Coded {
    kind: &'static str,
    /// What dtype the bytes of codes are given.
    storage: Dtype,
    block_size: usize,
    is_nested: bool,
}

impl Coded {
    fn case(self) -> Case {
        let mut case = Case::new(format!("bitsandbytes, {self:?}"), self.config());
        case.keep_the_usual();
        // 960 and 26,400 codes: rows end within blocks, a last block is short, nested scales need a second one.
        self.layer(&mut case, "model.layers.0.self_attn.q_proj", [24, 40]);
        case.keep("model.layers.0.self_attn.q_proj.bias", Dtype::Bf16, &[24]);
        self.layer(&mut case, "model.layers.1.mlp.down_proj", [165, 160]);
        case
    }

    fn config(self) -> Value {
        json!({
            "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false, "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": self.is_nested, "bnb_4bit_quant_storage": "uint8", "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": ["lm_head"],
        })
    }

    fn layer(self, case: &mut Case, module: &str, [rows, cols]: [usize; 2]) {
        let block_size = self.block_size;
        let codes = case.codes(rows * cols, 4);
        let block_count = codes.len().div_ceil(block_size);
        let bytes = nibbles_high_first(&codes);
        let storage_len = self.storage.bits() as usize / 8;
        case.store(format!("{module}.weight"), self.storage, &[bytes.len() / storage_len, 1], bytes);
        let name = |part: &str| format!("{module}.weight.{part}");

        let table = match self.kind {
            "nf4" => NF4,
            _ => FP4,
        };
        case.store_floats(name("quant_map"), &Floats::of(Dtype::F32, &[16], table.to_vec()));
        let mut state = json!({
            "quant_type": self.kind, "blocksize": block_size, "dtype": "bfloat16", "shape": [rows, cols],
        });
        let scales: Vec<f32> = if self.is_nested {
            let (nested_block_size, offset) = (256, 0.037_109_375_f32);
            let nested_codes = case.codes(block_count, 8);
            let nested_scales = case.scales(Dtype::F32, &[block_count.div_ceil(nested_block_size)]);
            let nested_table = case.offsets(Dtype::F32, &[256]);
            case.store(name("absmax"), Dtype::U8, &[block_count], low_bytes(&nested_codes));
            case.store_floats(name("nested_absmax"), &nested_scales);
            case.store_floats(name("nested_quant_map"), &nested_table);
            state["nested_blocksize"] = json!(nested_block_size);
            state["nested_dtype"] = json!("float32");
            state["nested_offset"] = json!(f64::from(offset));
            let scale = |(block, code): (usize, &u32)| {
                nested_table.values[*code as usize] * nested_scales.values[block / nested_block_size] + offset
            };
            nested_codes.iter().enumerate().map(scale).collect()
        } else {
            let scales = case.scales(Dtype::F32, &[block_count]);
            case.store_floats(name("absmax"), &scales);
            scales.values
        };
        let state = state.to_string().into_bytes();
        let state_name = name(&format!("quant_state.bitsandbytes__{}", self.kind));
        case.store(state_name, Dtype::U8, &[state.len()], state);
        case.expect(format!("{module}.weight"), [rows, cols], |row, col| {
            let index = row * cols + col;
            table[codes[index] as usize] * scales[index / block_size]
        });
    }
}

/// # Source
/// Dettmers et al.: "QLoRA", arXiv:2305.14314, appendix E.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Not the order of E2M1: bitsandbytes has a table of its own.
const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];
