//! What codes of small floats stand for, computed from the fields of their definitions.

/// What a code stands for.
pub(crate) type Number = fn(u32) -> f32;

/// The number of a sign, an exponent and a mantissa, by the definition of IEEE 754 without special values.
fn finite(code: u32, exponent_bits: u32, mantissa_bits: u32, bias: i32) -> f32 {
    let mantissa = code & ((1 << mantissa_bits) - 1);
    let exponent = (code >> mantissa_bits & ((1 << exponent_bits) - 1)) as i32;
    let is_negative = code >> (mantissa_bits + exponent_bits) & 1 == 1;
    let fraction = f64::from(mantissa) / f64::from(1u32 << mantissa_bits);
    let magnitude = match exponent {
        0 => fraction * 2f64.powi(1 - bias),
        _ => (1.0 + fraction) * 2f64.powi(exponent - bias),
    };
    (if is_negative { -magnitude } else { magnitude }) as f32
}

pub(crate) fn e2m1(code: u32) -> f32 {
    finite(code, 2, 1, 1)
}

pub(crate) fn e2m3(code: u32) -> f32 {
    finite(code, 2, 3, 1)
}

pub(crate) fn e3m2(code: u32) -> f32 {
    finite(code, 3, 2, 3)
}

pub(crate) fn e4m3(code: u32) -> f32 {
    if code & 0x7f == 0x7f { f32::NAN } else { finite(code, 4, 3, 7) }
}

pub(crate) fn e5m2(code: u32) -> f32 {
    match code & 0x7f {
        0x7c if code > 0x7f => f32::NEG_INFINITY,
        0x7c => f32::INFINITY,
        0x7d.. => f32::NAN,
        _ => finite(code, 5, 2, 15),
    }
}

pub(crate) fn e4m3fnuz(code: u32) -> f32 {
    if code == 0x80 { f32::NAN } else { finite(code, 4, 3, 8) }
}

pub(crate) fn e5m2fnuz(code: u32) -> f32 {
    if code == 0x80 { f32::NAN } else { finite(code, 5, 2, 16) }
}

pub(crate) fn e8m0(code: u32) -> f32 {
    if code == 255 { f32::NAN } else { 2f64.powi(code as i32 - 127) as f32 }
}

/// The number of a code of `bits` in two's complement.
pub(crate) fn signed(code: u32, bits: u32) -> i32 {
    let half = 1 << (bits - 1);
    if code >= half { code as i32 - 2 * half as i32 } else { code as i32 }
}
