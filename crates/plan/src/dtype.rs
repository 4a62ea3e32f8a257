//! Element types of the safetensors format.

use std::fmt;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident $name:literal $bits:literal $kind:ident;)*) => {
        /// An element type, by the name it has in a safetensors header.
        ///
        /// # Source
        /// The `safetensors` crate 0.8.0, `tensor.rs`: the 22 names its reader accepts.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Dtype { $($(#[$doc])* $variant,)* }

        impl Dtype {
            /// Every element type, by width and then in the order of the format's own list.
            pub const ALL: [Dtype; 22] = [$(Dtype::$variant,)*];

            /// Returns the name used in headers, such as `F8_E4M3`.
            pub const fn name(self) -> &'static str {
                match self { $(Dtype::$variant => $name,)* }
            }

            /// Returns the width of one element in bits; F4 and F6 types are narrower than a byte.
            pub const fn bits(self) -> u64 {
                match self { $(Dtype::$variant => $bits,)* }
            }

            /// Returns what the bits of an element mean.
            pub const fn kind(self) -> DtypeKind {
                match self { $(Dtype::$variant => DtypeKind::$kind,)* }
            }

            /// Finds the element type with this header name; names are case-sensitive.
            pub fn from_name(name: &str) -> Option<Dtype> {
                match name { $($name => Some(Dtype::$variant),)* _ => None }
            }
        }
    };
}

dtypes! {
    /// 4-bit float, two exponent bits and one mantissa bit, two to a byte.
    F4 "F4" 4 Float;
    /// 6-bit float, two exponent bits and three mantissa bits, four to three bytes.
    F6E2m3 "F6_E2M3" 6 Float;
    /// 6-bit float, three exponent bits and two mantissa bits, four to three bytes.
    F6E3m2 "F6_E3M2" 6 Float;
    /// Boolean, one byte, 0 or 1.
    Bool "BOOL" 8 Bool;
    /// Unsigned 8-bit integer.
    U8 "U8" 8 Unsigned;
    /// Signed 8-bit integer.
    I8 "I8" 8 Signed;
    /// 8-bit float with infinities (OCP E5M2).
    F8E5m2 "F8_E5M2" 8 Float;
    /// 8-bit float without infinities (OCP E4M3, "FN").
    F8E4m3 "F8_E4M3" 8 Float;
    /// 8-bit power of two, the scale of microscaling formats; 255 is NaN.
    F8E8m0 "F8_E8M0" 8 Float;
    /// 8-bit float without infinities or a negative zero (E4M3 FNUZ).
    F8E4m3Fnuz "F8_E4M3FNUZ" 8 Float;
    /// 8-bit float without infinities or a negative zero (E5M2 FNUZ).
    F8E5m2Fnuz "F8_E5M2FNUZ" 8 Float;
    /// Signed 16-bit integer.
    I16 "I16" 16 Signed;
    /// Unsigned 16-bit integer.
    U16 "U16" 16 Unsigned;
    /// IEEE 754 half precision.
    F16 "F16" 16 Float;
    /// bfloat16: the upper half of an F32.
    Bf16 "BF16" 16 Float;
    /// Signed 32-bit integer.
    I32 "I32" 32 Signed;
    /// Unsigned 32-bit integer.
    U32 "U32" 32 Unsigned;
    /// IEEE 754 single precision.
    F32 "F32" 32 Float;
    /// Two F32: real part, imaginary part.
    C64 "C64" 64 Complex;
    /// IEEE 754 double precision.
    F64 "F64" 64 Float;
    /// Signed 64-bit integer.
    I64 "I64" 64 Signed;
    /// Unsigned 64-bit integer.
    U64 "U64" 64 Unsigned;
}

/// What the bits of an element mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DtypeKind {
    /// 0 or 1.
    Bool,
    /// An integer without a sign.
    Unsigned,
    /// A two's complement integer.
    Signed,
    /// A floating-point number of any width.
    Float,
    /// A pair of floating-point numbers.
    Complex,
}

impl Dtype {
    /// Returns the address alignment a typed view needs: the element's width, 1 for types
    /// narrower than a byte, and 4 for C64, which is two F32.
    pub const fn align_bytes(self) -> u64 {
        match self {
            Dtype::C64 => 4,
            _ if self.bits() < 8 => 1,
            _ => self.bits() / 8,
        }
    }

    /// Returns the bytes of `numel` packed elements, or `None` if the bits overflow a `u64` or
    /// do not fill whole bytes.
    pub fn len_bytes(self, numel: u64) -> Option<u64> {
        let bits = numel.checked_mul(self.bits())?;
        (bits % 8 == 0).then_some(bits / 8)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Returns the product of the dimensions, 1 for a scalar, or `None` if it overflows a `u64`.
pub fn numel(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_parses_back_to_its_dtype() {
        for dtype in Dtype::ALL {
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
        }
        assert_eq!(Dtype::from_name("bf16"), None);
    }

    #[test]
    fn packed_elements_must_fill_whole_bytes() {
        assert_eq!(Dtype::F4.len_bytes(2), Some(1));
        assert_eq!(Dtype::F4.len_bytes(3), None);
        assert_eq!(Dtype::F6E2m3.len_bytes(4), Some(3));
        assert_eq!(Dtype::F64.len_bytes(u64::MAX / 8), None);
    }
}
