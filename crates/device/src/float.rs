//! Conversions of single numbers between F32 and the narrower floating-point formats.
//!
//! Every result is rounded once, to nearest, ties to even. NaN stays NaN and infinities stay infinite; subnormal numbers are kept.

use tensorhaul_plan::Dtype;

/// Returns the value of an F16 code.
///
/// F16 is 1 sign, 5 exponent and 10 mantissa bits. Moved to their places in an F32 they lack only the bias,
/// 127 - 15 = 112: a factor of 2^112, which also normalizes subnormals.
#[inline]
pub fn f16_to_f32(code: u16) -> f32 {
    let (sign, magnitude) = (u32::from(code & 0x8000) << 16, u32::from(code & 0x7fff));
    let finite = (f32::from_bits(magnitude << 13) * TWO_TO_112).to_bits();
    let special = 0x7f80_0000 | magnitude << 13;
    f32::from_bits(sign | if magnitude >= 0x7c00 { special } else { finite })
}

/// Returns the value of a BF16 code.
///
/// BF16 is the upper half of an F32.
#[inline]
pub fn bf16_to_f32(code: u16) -> f32 {
    f32::from_bits(u32::from(code) << 16)
}

/// Rounds to F16, to nearest, ties to even. What is too large becomes infinite; NaN keeps its sign and what fits of its payload.
#[inline]
pub fn f32_to_f16(value: f32) -> u16 {
    let sign = (value.to_bits() >> 16) & 0x8000;
    let magnitude = value.to_bits() & 0x7fff_ffff;
    // 13 mantissa bits go: add half of the last place that stays, less one where that place is even. A carry runs
    // into the exponent, as it should.
    let rebiased = magnitude.wrapping_sub(112 << 23);
    let normal = rebiased.wrapping_add(0xfff + (magnitude >> 13 & 1)) >> 13;
    // Next to 0.5 the last place of an F32 is 2^-24, that of subnormal F16: the addition rounds.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let nan = 0x7e00 | (magnitude >> 13 & 0x1ff);
    let code = match magnitude {
        0x7f80_0001.. => nan,
        0x477f_f000.. => 0x7c00, // From 65520 on, half way between the largest and 65536.
        0x3880_0000.. => normal, // From 2^-14 on.
        _ => subnormal,
    };
    (sign | code) as u16
}

/// Rounds to BF16 as [`f32_to_f16`] does to F16.
#[inline]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    // As above, with 16 bits going. The carry out of the largest finite number makes infinity.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let nan = bits >> 16 | 0x40;
    (if value.is_nan() { nan } else { rounded }) as u16
}

/// Returns the value of an F8 code.
///
/// # Panics
/// When the dtype is no F8.
///
/// # Source
/// OCP 8-bit Floating Point Specification (OFP8) 1.0: E4M3 has NaN at S.1111.111 and no infinity, E5M2 is an
/// upper half of F16. OCP Microscaling Formats 1.0, 5.4.1: E8M0 is 2^(code - 127), 255 is NaN. FNUZ: Noune et
/// al., arXiv:2206.02915: the bias is one more, 0x80 is NaN, there are no infinities.
#[inline]
pub fn f8_to_f32(dtype: Dtype, code: u8) -> f32 {
    match dtype {
        Dtype::F8E5m2 => f16_to_f32(u16::from(code) << 8),
        Dtype::F8E8m0 if code == 0xff => f32::NAN,
        Dtype::F8E8m0 => power_of_two(i32::from(code) - 127),
        Dtype::F8E4m3 if code & 0x7f == 0x7f => f32::NAN.copysign(sign(code)),
        Dtype::F8E4m3Fnuz | Dtype::F8E5m2Fnuz if code == 0x80 => f32::NAN,
        Dtype::F8E4m3 => minifloat(code, 3, 7),
        Dtype::F8E4m3Fnuz => minifloat(code, 3, 8),
        Dtype::F8E5m2Fnuz => minifloat(code, 2, 16),
        _ => unreachable!("{dtype} is no F8"),
    }
}

/// A finite number of 1 sign bit, then exponent, then mantissa.
fn minifloat(code: u8, mantissa_bits: u32, bias: i32) -> f32 {
    let exponent = i32::from(code & 0x7f) >> mantissa_bits;
    let mantissa = f32::from(code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits) as f32;
    let magnitude = match exponent {
        0 => mantissa * power_of_two(1 - bias),
        _ => (1.0 + mantissa) * power_of_two(exponent - bias),
    };
    magnitude.copysign(sign(code))
}

fn sign(code: u8) -> f32 {
    if code & 0x80 == 0 { 1.0 } else { -1.0 }
}

/// 2^exponent, from the least that E8M0 has, 2^-127, which is a subnormal F32.
fn power_of_two(exponent: i32) -> f32 {
    match exponent {
        -127 => f32::from_bits(1 << 22),
        _ => f32::from_bits(((exponent + 127) as u32) << 23),
    }
}

const TWO_TO_112: f32 = f32::from_bits((112 + 127) << 23);
