// Floating-point formats: their codes to F32 and back, bit for bit what crates/device/src/cast.rs does.
//
// Results are rounded once, to nearest, ties to even; NaN stays NaN; what is too large becomes infinite; subnormal
// numbers are kept. NaN is moved by its bits, since devices answer arithmetic on NaN with NaN of their own.
//
// Sources: IEEE 754; OCP 8-bit Floating Point 1.0 (E4M3, E5M2); OCP Microscaling Formats 1.0, 5.4.1 (E8M0);
// Noune et al., arXiv:2206.02915 (FNUZ).
#pragma once
#include "vendor.h"

/// A power of two as an F32.
constexpr u32 power_of_two_bits(int exponent) { return (u32)(exponent + 127) << 23; }

/// A code moved to its places in an F32 lacks only the difference of the biases: a factor, which also normalizes
/// subnormals. `magnitude` is such a code without its sign.
DEVICE float rebias(u32 magnitude, int exponent) {
  return float_of(magnitude) * float_of(power_of_two_bits(exponent));
}

DEVICE float with_sign(float magnitude, u32 sign) { return float_of(bits_of(magnitude) | sign); }

/// 1 sign, 5 exponent, 10 mantissa bits; bias 15 instead of 127.
DEVICE float f16_to_f32(u32 code) {
  const u32 sign = (code & 0x8000) << 16, magnitude = (code & 0x7fff) << 13;
  const float special = float_of(0x7f800000 | magnitude);
  return with_sign(magnitude >= 0x7c00 << 13 ? special : rebias(magnitude, 127 - 15), sign);
}

DEVICE float bits_to_f32(u32 code) { return float_of(code); }

/// The upper half of an F32.
DEVICE float bf16_to_f32(u32 code) { return float_of(code << 16); }

/// The upper half of an F16.
DEVICE float f8_e5m2_to_f32(u32 code) { return f16_to_f32(code << 8); }

/// 1 sign, 4 exponent, 3 mantissa bits; NaN is S.1111.111, and there is no infinity.
DEVICE float f8_e4m3_to_f32(u32 code) {
  const u32 sign = (code & 0x80) << 24, magnitude = code & 0x7f;
  return with_sign(magnitude == 0x7f ? float_of(0x7fc00000) : rebias(magnitude << 20, 127 - 7), sign);
}

/// 2^(code - 127); 255 is NaN, and 0 is a subnormal F32.
DEVICE float f8_e8m0_to_f32(u32 code) {
  return float_of(code == 0xff ? 0x7fc00000 : code == 0 ? 1u << 22 : code << 23);
}

/// FNUZ: the bias is one more, 0x80 is NaN, every other code is finite.
DEVICE float f8_e4m3fnuz_to_f32(u32 code) {
  const u32 sign = (code & 0x80) << 24;
  return code == 0x80 ? float_of(0x7fc00000) : with_sign(rebias((code & 0x7f) << 20, 127 - 8), sign);
}

DEVICE float f8_e5m2fnuz_to_f32(u32 code) {
  const u32 sign = (code & 0x80) << 24;
  return code == 0x80 ? float_of(0x7fc00000) : with_sign(rebias((code & 0x7f) << 21, 127 - 16), sign);
}

/// To nearest.
DEVICE float f64_to_f32(u64 code) {
  if ((code & 0x7fffffffffffffff) <= 0x7ff0000000000000)
    return (float)double_of(code);
  return float_of(((u32)(code >> 32) & 0x80000000) | 0x7fc00000 | ((u32)(code >> 29) & 0x3fffff));
}

/// To odd: towards zero, then, where that was not exact, the last bit is set. Rounded once more, to at least two bits
/// fewer, that is the same as rounding the F64 once.
///
/// Source: S. Boldo, G. Melquiond, IEEE Transactions on Computers 57(4), 2008, theorem 3.
DEVICE float f64_to_f32_odd(u64 code) {
  const float nearest = f64_to_f32(code);
  const double value = double_of(code), back = (double)nearest;
  if (back == value || value != value)
    return nearest;
  const bool is_away = __builtin_fabs(back) > __builtin_fabs(value);
  return float_of((bits_of(nearest) - is_away) | 1);
}

DEVICE u32 f32_to_bits(float value) { return bits_of(value); }

DEVICE u64 f32_to_f64(float value) {
  const u32 bits = bits_of(value);
  if ((bits & 0x7fffffff) <= 0x7f800000)
    return bits_of((double)value);
  return (u64)(bits & 0x80000000) << 32 | 0x7ff8000000000000 | (u64)(bits & 0x3fffff) << 29;
}

DEVICE u32 f32_to_f16(float value) {
  const u32 sign = (bits_of(value) >> 16) & 0x8000, magnitude = bits_of(value) & 0x7fffffff;
  // 13 mantissa bits go: add half of the last place that stays, less one where that place is even. A carry runs into
  // the exponent, as it should.
  const u32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Next to 0.5 the last place of an F32 is 2^-24, that of subnormal F16: the addition rounds.
  const u32 subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const u32 nan = 0x7e00 | ((magnitude >> 13) & 0x1ff);
  const u32 code = magnitude > 0x7f800000    ? nan
                   : magnitude >= 0x477ff000 ? 0x7c00 // From 65520 on, half way between the largest and 65536.
                   : magnitude >= 0x38800000 ? normal // From 2^-14 on.
                                             : subnormal;
  return sign | code;
}

DEVICE u32 f32_to_bf16(float value) {
  const u32 bits = bits_of(value);
  // As above, with 16 bits going. The carry out of the largest finite number makes infinity.
  const u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
}
