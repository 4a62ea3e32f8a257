//! Casts between floating-point element types, a slice of bytes at a time.
//!
//! Every result is rounded once, to nearest, ties to even. NaN stays NaN, infinities stay infinite, and what is
//! too large becomes infinite. Subnormal numbers are kept, not flushed.

use crate::float::{bf16_to_f32, f8_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use tensorhaul_plan::Dtype;

/// Tells whether elements of `source` can be cast to `target`: from every float of a byte or more to every
/// one of two bytes or more. F4 and F6 cannot; they say nothing without their scales.
pub fn can_cast(source: Dtype, target: Dtype) -> bool {
    use Dtype::{Bf16, F16, F32, F64};
    let byte = matches!(
        source,
        Dtype::F8E5m2 | Dtype::F8E4m3 | Dtype::F8E8m0 | Dtype::F8E4m3Fnuz | Dtype::F8E5m2Fnuz
    );
    (byte || matches!(source, F64 | F32 | F16 | Bf16)) && matches!(target, F64 | F32 | F16 | Bf16)
}

/// Casts elements from little-endian bytes to little-endian bytes, and returns how many finite numbers became
/// infinite.
///
/// # Panics
/// When the dtypes cannot be cast ([`can_cast`]), or the slices differ in their number of elements or hold a
/// part of one.
///
/// # Example
/// ```
/// use tensorhaul_device::cast::cast;
/// use tensorhaul_plan::Dtype;
///
/// let mut half = [0; 4];
/// let overflowed = cast(Dtype::F32, &[1.5f32.to_le_bytes(), 1e6f32.to_le_bytes()].concat(), Dtype::F16, &mut half);
/// assert_eq!((half, overflowed), ([0x00, 0x3e, 0x00, 0x7c], 1));
/// ```
pub fn cast(source_dtype: Dtype, source: &[u8], target_dtype: Dtype, target: &mut [u8]) -> u64 {
    assert!(can_cast(source_dtype, target_dtype), "{source_dtype} cannot be cast to {target_dtype}");
    match source_dtype {
        Dtype::F64 => from_f64(source, target_dtype, target),
        Dtype::F32 => from_f32(source, f32::from_le_bytes, target_dtype, target),
        Dtype::F16 => from_f32(source, |bytes| f16_to_f32(u16::from_le_bytes(bytes)), target_dtype, target),
        Dtype::Bf16 => from_f32(source, |bytes| bf16_to_f32(u16::from_le_bytes(bytes)), target_dtype, target),
        _ => {
            let values: [f32; 256] = std::array::from_fn(|code| f8_to_f32(source_dtype, code as u8));
            from_f32(source, |[code]| values[usize::from(code)], target_dtype, target)
        }
    }
}

/// All but F64 are exact as F32, so what follows rounds once.
fn from_f32<const S: usize>(
    source: &[u8],
    decode: impl Fn([u8; S]) -> f32,
    dtype: Dtype,
    target: &mut [u8],
) -> u64 {
    match dtype {
        Dtype::F64 => each(source, target, |bytes| (f64::from(decode(bytes)).to_le_bytes(), false)),
        Dtype::F32 => each(source, target, |bytes| (decode(bytes).to_le_bytes(), false)),
        Dtype::F16 => each(source, target, |bytes| {
            let value = decode(bytes);
            let code = f32_to_f16(value);
            (code.to_le_bytes(), code & 0x7fff == 0x7c00 && value.is_finite())
        }),
        _ => each(source, target, |bytes| {
            let value = decode(bytes);
            let code = f32_to_bf16(value);
            (code.to_le_bytes(), code & 0x7fff == 0x7f80 && value.is_finite())
        }),
    }
}

fn from_f64(source: &[u8], dtype: Dtype, target: &mut [u8]) -> u64 {
    match dtype {
        Dtype::F64 => each(source, target, |bytes: [u8; 8]| (bytes, false)),
        Dtype::F32 => each(source, target, |bytes| {
            let value = f64::from_le_bytes(bytes);
            let rounded = value as f32;
            (rounded.to_le_bytes(), rounded.is_infinite() && value.is_finite())
        }),
        _ => each(source, target, |bytes| {
            let value = f64::from_le_bytes(bytes);
            let between = f64_to_f32_odd(value);
            let code = if dtype == Dtype::F16 { f32_to_f16(between) } else { f32_to_bf16(between) };
            let infinite = if dtype == Dtype::F16 { 0x7c00 } else { 0x7f80 };
            (code.to_le_bytes(), code & 0x7fff == infinite && value.is_finite())
        }),
    }
}

/// Converts element by element; `convert` also tells whether an element overflowed.
fn each<const S: usize, const T: usize>(
    source: &[u8],
    target: &mut [u8],
    convert: impl Fn([u8; S]) -> ([u8; T], bool),
) -> u64 {
    let ((source, rest), (target, unfilled)) = (source.as_chunks::<S>(), target.as_chunks_mut::<T>());
    assert!(rest.is_empty() && unfilled.is_empty(), "whole elements are cast");
    assert_eq!(source.len(), target.len(), "as many elements are written as are read");
    let mut overflowed = 0;
    for (target, source) in target.iter_mut().zip(source) {
        let (bytes, is_overflow) = convert(*source);
        *target = bytes;
        overflowed += u64::from(is_overflow);
    }
    overflowed
}

/// Rounds to odd: towards zero, then, where that was not exact, the last bit is set.
///
/// Rounding what comes out once more, to at least two bits fewer, is then the same as rounding the F64 once:
/// the set bit keeps it off the ties. Rounding to nearest twice is not: 1 + 2^-11 + 2^-40 is above half way
/// between two F16, but F32 makes it 1 + 2^-11, half way, which goes to even, down.
///
/// # Source
/// S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
/// odd", IEEE Transactions on Computers 57(4), 2008, theorem 3.
fn f64_to_f32_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    if back == value || value.is_nan() {
        return nearest;
    }
    let away = back.abs() > value.abs();
    // One less is the next number towards zero, also from infinity and over the border to the subnormals.
    f32::from_bits((nearest.to_bits() - u32::from(away)) | 1)
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;

    /// A format by its numbers alone, without a bit in common with the code above.
    #[derive(Clone, Copy)]
    struct Format {
        dtype: Dtype,
        mantissa_bits: u32,
        bias: i32,
        /// The largest finite code.
        max: u32,
        /// The code of positive infinity, where there is one.
        infinity: Option<u32>,
        /// Negative zero's code is NaN.
        is_fnuz: bool,
    }

    const fn format(dtype: Dtype, mantissa_bits: u32, bias: i32, max: u32, infinity: Option<u32>) -> Format {
        Format { dtype, mantissa_bits, bias, max, infinity, is_fnuz: false }
    }

    const HALF: Format = format(Dtype::F16, 10, 15, 0x7bff, Some(0x7c00));
    const BFLOAT: Format = format(Dtype::Bf16, 7, 127, 0x7f7f, Some(0x7f80));
    const E4M3: Format = format(Dtype::F8E4m3, 3, 7, 0x7e, None);
    const E5M2: Format = format(Dtype::F8E5m2, 2, 15, 0x7b, Some(0x7c));
    const E4M3_FNUZ: Format = Format { is_fnuz: true, ..format(Dtype::F8E4m3Fnuz, 3, 8, 0x7f, None) };
    const E5M2_FNUZ: Format = Format { is_fnuz: true, ..format(Dtype::F8E5m2Fnuz, 2, 16, 0x7f, None) };

    impl Format {
        fn value(self, code: u32) -> f64 {
            let sign_bit = 1 << (self.dtype.bits() - 1);
            let (magnitude, sign) = (code & (sign_bit - 1), if code & sign_bit == 0 { 1.0 } else { -1.0 });
            if self.is_fnuz && code == sign_bit {
                return f64::NAN;
            }
            if Some(magnitude) == self.infinity {
                return sign * f64::INFINITY;
            }
            if magnitude > self.max {
                return f64::NAN;
            }
            let exponent = (magnitude >> self.mantissa_bits) as i32;
            let mantissa = magnitude & ((1 << self.mantissa_bits) - 1);
            let whole = if exponent == 0 { mantissa } else { mantissa | 1 << self.mantissa_bits };
            let places = exponent.max(1) - self.bias - self.mantissa_bits as i32;
            sign * f64::from(whole) * 2f64.powi(places)
        }

        /// The code nearest to a number, by search; of two as near, the even one.
        fn nearest(self, value: f64) -> u32 {
            let sign_bit = if value.is_sign_negative() { 1 << (self.dtype.bits() - 1) } else { 0 };
            let magnitude = value.abs();
            let infinity = self.infinity.unwrap();
            let (mut low, mut high) = (0, infinity);
            while high - low > 1 {
                let middle = u32::midpoint(low, high);
                if self.value(middle) <= magnitude { low = middle } else { high = middle }
            }
            // Infinity stands where the next finite number would.
            let (last, before_last) = (self.value(self.max), self.value(self.max - 1));
            let above = if high == infinity { last + (last - before_last) } else { self.value(high) };
            let (down, up) = (magnitude - self.value(low), above - magnitude);
            sign_bit | if down < up || down == up && low % 2 == 0 { low } else { high }
        }
    }

    fn codes(width_bytes: u32) -> Vec<u8> {
        let all = 0..1u32 << (8 * width_bytes);
        all.flat_map(|code| code.to_le_bytes()[..width_bytes as usize].to_vec()).collect()
    }

    fn cast_all(source: Dtype, bytes: &[u8], target: Dtype) -> Vec<u64> {
        let width = target.bits() as usize / 8;
        let numel = bytes.len() / (source.bits() as usize / 8);
        let mut cast_bytes = vec![0xaa; numel * width];
        cast(source, bytes, target, &mut cast_bytes);
        let widen = |element: &[u8]| element.iter().rev().fold(0, |code, byte| code << 8 | u64::from(*byte));
        cast_bytes.chunks(width).map(widen).collect()
    }

    fn is_nan(dtype: Dtype, code: u64) -> bool {
        match dtype {
            Dtype::F64 => f64::from_bits(code).is_nan(),
            Dtype::F32 => f32::from_bits(code as u32).is_nan(),
            Dtype::F16 => f16::from_bits(code as u16).is_nan(),
            _ => bf16::from_bits(code as u16).is_nan(),
        }
    }

    fn check(value: f64, target: Dtype, found: u64) {
        let expected = match target {
            _ if value.is_nan() => return assert!(is_nan(target, found), "NaN to {target}: {found:#x}"),
            Dtype::F64 => value.to_bits(),
            Dtype::F32 => u64::from((value as f32).to_bits()),
            Dtype::F16 if value.is_infinite() => u64::from(f16::from_f64(value).to_bits()),
            Dtype::Bf16 if value.is_infinite() => u64::from(bf16::from_f64(value).to_bits()),
            Dtype::F16 => HALF.nearest(value).into(),
            _ => BFLOAT.nearest(value).into(),
        };
        assert_eq!(found, expected, "{value:e} to {target}: {found:#x} instead of {expected:#x}");
    }

    const TARGETS: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16];

    #[test]
    fn every_code_of_one_and_two_bytes_casts_to_the_nearest() {
        for format in [HALF, BFLOAT, E4M3, E5M2, E4M3_FNUZ, E5M2_FNUZ] {
            let bytes = codes(format.dtype.bits() as u32 / 8);
            for target in TARGETS {
                for (code, found) in (0..).zip(cast_all(format.dtype, &bytes, target)) {
                    check(format.value(code), target, found);
                }
            }
        }
    }

    #[test]
    fn every_scale_is_a_power_of_two() {
        for target in TARGETS {
            for (code, found) in (0..).zip(cast_all(Dtype::F8E8m0, &codes(1), target)) {
                check(if code == 255 { f64::NAN } else { 2f64.powi(code - 127) }, target, found);
            }
        }
    }

    #[test]
    fn every_half_way_and_its_neighbours_round_once() {
        for (format, target) in [(HALF, Dtype::F16), (BFLOAT, Dtype::Bf16)] {
            let mut wide = Vec::new();
            for code in 0..=format.max {
                let (this, next) = (format.value(code), format.value(code + 1));
                let next = if next.is_finite() { next } else { this + (this - format.value(code - 1)) };
                let half_way = f64::midpoint(this, next);
                for value in [this, half_way.next_down(), half_way, half_way.next_up()] {
                    wide.extend([value, -value]);
                }
            }
            let bytes: Vec<u8> = wide.iter().flat_map(|value| value.to_le_bytes()).collect();
            for (value, found) in wide.iter().zip(cast_all(Dtype::F64, &bytes, target)) {
                check(*value, target, found);
            }
            // The same for F32, whose neighbours are further away.
            let single = wide.iter().flat_map(|value| {
                let value = *value as f32;
                [value.next_down(), value, value.next_up()]
            });
            let single: Vec<f32> = single.filter(|value| value.is_finite()).collect();
            let bytes: Vec<u8> = single.iter().flat_map(|value| value.to_le_bytes()).collect();
            for (value, found) in single.iter().zip(cast_all(Dtype::F32, &bytes, target)) {
                check(f64::from(*value), target, found);
            }
        }
    }

    #[test]
    fn rounding_twice_would_be_seen() {
        let value = 1.0 + 2f64.powi(-11) + 2f64.powi(-40);
        let twice = f32_to_f16(value as f32);
        let once = cast_all(Dtype::F64, &value.to_le_bytes(), Dtype::F16)[0];
        assert_eq!((u64::from(twice), once), (0x3c00, 0x3c01));
    }

    #[test]
    fn overflows_are_counted_and_infinities_are_not() {
        let values = [65504f32, 65520.0, -1e30, f32::INFINITY, f32::NAN, 65519.996];
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(cast(Dtype::F32, &bytes, Dtype::F16, &mut [0; 12]), 2);
        assert_eq!(cast(Dtype::F32, &bytes, Dtype::Bf16, &mut [0; 12]), 0);
        assert_eq!(
            cast(
                Dtype::F64,
                &[f64::MAX.to_le_bytes(), 1e39f64.to_le_bytes()].concat(),
                Dtype::F32,
                &mut [0; 8]
            ),
            2
        );
    }

    #[test]
    fn a_nan_keeps_its_sign_and_what_fits_of_its_payload() {
        for bits in [0x7fc0_0000u32, 0xffc0_0000, 0x7f80_0001, 0xffbf_ffff, 0x7fff_ffff] {
            let (half, bfloat) = (f32_to_f16(f32::from_bits(bits)), f32_to_bf16(f32::from_bits(bits)));
            assert!(f16::from_bits(half).is_nan() && bf16::from_bits(bfloat).is_nan(), "{bits:#x}");
            assert_eq!((half >> 15, bfloat >> 15), ((bits >> 31) as u16, (bits >> 31) as u16));
        }
    }

    proptest! {
        #[test]
        fn any_f64_rounds_to_the_nearest(bits: u64, exponent in -160i32..140) {
            for value in [f64::from_bits(bits), 2f64.powi(exponent) * (1.0 + (bits >> 12) as f64 / 2f64.powi(52))] {
                for target in TARGETS {
                    check(value, target, cast_all(Dtype::F64, &value.to_le_bytes(), target)[0]);
                }
            }
        }

        #[test]
        fn any_f32_rounds_as_the_half_crate_does(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assume!(!value.is_nan());
            prop_assert_eq!(f32_to_f16(value), f16::from_f32(value).to_bits());
            prop_assert_eq!(f32_to_bf16(value), bf16::from_f32(value).to_bits());
        }
    }
}
