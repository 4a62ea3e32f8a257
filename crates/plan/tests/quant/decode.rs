//! Recipes carried out number by number, slowly: enough of them to decode the public vectors.

use half::{bf16, f16};
use tensorhaul_plan::Dtype;
use tensorhaul_plan::quant::{
    Codes, Element, Global, Grid, Group, Number, Recipe, Role, ZeroOffset, ZeroPoint,
};

/// Returns the numbers of a group in row-major order, in f32.
pub(crate) fn decode<'b>(group: &Group, bytes: impl Fn(Role) -> &'b [u8]) -> Vec<f32> {
    let recipe = &group.recipe;
    let mut numbers = Vec::new();
    for e in 0..recipe.batch {
        for n in 0..recipe.rows {
            for k in 0..recipe.cols {
                numbers.push(number(recipe, [e, n, k], &bytes));
            }
        }
    }
    numbers
}

fn number<'b>(recipe: &Recipe, [e, n, k]: [u64; 3], bytes: &impl Fn(Role) -> &'b [u8]) -> f32 {
    let payload = bytes(Role::Payload);
    let payload = &payload[payload.len() / recipe.batch as usize * e as usize..];
    let code = code(payload, recipe.codes, recipe.rows, n, k);
    let index = recipe.group_index.map(|_| {
        let bytes = &bytes(Role::GroupIndex)[4 * k as usize..][..4];
        u64::from(u32::from_le_bytes(bytes.try_into().expect("4 bytes")))
    });
    let scale = recipe.scale.expect("every vector has scales");
    let g = index.unwrap_or_else(|| k / u64::from(scale.grid.cols_per_group));
    let zero_point = match recipe.zero_point {
        ZeroPoint::None => None,
        ZeroPoint::Constant(zero_point) => Some(zero_point),
        ZeroPoint::Packed { codes, is_swapped, is_signed, offset } => {
            assert!(!is_signed && offset == ZeroOffset::Constant(0), "no vector has others");
            let groups = recipe.cols.div_ceil(u64::from(scale.grid.cols_per_group));
            let (rows, row, col) = if is_swapped { (groups, g, n) } else { (recipe.rows, n, g) };
            Some(self::code(bytes(Role::ZeroPoint), codes, rows, row, col) as i32)
        }
        ZeroPoint::Float(_) | _ => unreachable!("no vector has float zero-points"),
    };
    let value = match (recipe.element, zero_point) {
        (Element::Unsigned, zero_point) => (code as i32 - zero_point.unwrap_or(0)) as f32,
        (element, None) => float(element, code),
        (element, Some(_)) => unreachable!("{element:?} with a zero-point"),
    };
    let mut scaled = at(scale.grid, bytes(Role::Scale), e, n, g);
    if let Some(Global { dtype, is_divisor, batch_stride }) = scale.global {
        assert_eq!((dtype, is_divisor, batch_stride), (Dtype::F32, false, 0), "no vector has others");
        scaled *= f32::from_le_bytes(bytes(Role::Global)[..4].try_into().expect("4 bytes"));
    }
    value * scaled
}

fn code(payload: &[u8], codes: Codes, rows: u64, n: u64, k: u64) -> u32 {
    let stream = |word_of: &dyn Fn(u64) -> u64, bits: u64, index: u64| {
        (0..bits).fold(0, |code, bit| {
            let at = index * bits + bit;
            let byte = word_of(at / 32) * 4 + at % 32 / 8;
            code | u32::from(payload[byte as usize] >> (at % 8) & 1) << bit
        })
    };
    match codes {
        Codes::Rows { bits, row_stride_bytes } => {
            let row = &payload[(n * row_stride_bytes) as usize..];
            let bits = u64::from(bits);
            (0..bits).fold(0, |code, bit| {
                let at = k * bits + bit;
                code | u32::from(row[(at / 8) as usize] >> (at % 8) & 1) << bit
            })
        }
        Codes::Columns { bits } => stream(&|word| word * rows + n, u64::from(bits), k),
        Codes::Words { words_per_row, is_interleaved } => {
            let nibble = if is_interleaved { [0, 4, 1, 5, 2, 6, 3, 7][n as usize % 8] } else { n % 8 };
            stream(&|_| k * words_per_row + n / 8, 4, nibble)
        }
        other => unreachable!("no vector has {other:?}"),
    }
}

fn float(element: Element, code: u32) -> f32 {
    let small = |exponent_bits: u32, mantissa_bits: u32, bias: i32| {
        let sign = if code >> (exponent_bits + mantissa_bits) & 1 == 1 { -1.0 } else { 1.0 };
        let exponent = (code >> mantissa_bits & ((1 << exponent_bits) - 1)) as i32;
        let mantissa = (code & ((1 << mantissa_bits) - 1)) as f32 / (1 << mantissa_bits) as f32;
        match exponent {
            0 => sign * mantissa * 2f32.powi(1 - bias),
            _ => sign * (1.0 + mantissa) * 2f32.powi(exponent - bias),
        }
    };
    match element {
        Element::E2m1 => small(2, 1, 1),
        Element::E4m3 if code & 0x7f == 0x7f => f32::NAN,
        Element::E4m3 => small(4, 3, 7),
        other => unreachable!("no vector has {other:?}"),
    }
}

fn at(grid: Grid, bytes: &[u8], e: u64, n: u64, g: u64) -> f32 {
    let row = n / u64::from(grid.rows_per_group);
    let index = (e * grid.batch_stride + row * grid.row_stride + g * grid.col_stride) as usize;
    let two = || [bytes[2 * index], bytes[2 * index + 1]];
    match grid.number {
        Number::F32 => f32::from_le_bytes(bytes[4 * index..][..4].try_into().expect("4 bytes")),
        Number::F16 => f16::from_le_bytes(two()).to_f32(),
        Number::Bf16 => bf16::from_le_bytes(two()).to_f32(),
        Number::E8m0 if bytes[index] == 255 => f32::NAN,
        Number::E8m0 => 2f64.powi(i32::from(bytes[index]) - 127) as f32,
        Number::E4m3 => float(Element::E4m3, u32::from(bytes[index])),
        other => unreachable!("no vector has {other:?}"),
    }
}
