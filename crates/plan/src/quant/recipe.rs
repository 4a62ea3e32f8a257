//! How the bytes of a quantized tensor become numbers, as data.
//!
//! One [`Recipe`] says everything that the three executions need: the scalar twin on the host, and the kernels on
//! either vendor's devices. It is a matrix of [codes](Codes), an [element](Element) that each code stands for, and
//! what is done to it, always in this order and always in `f32`:
//!
//! ```text
//! v = element(code)                 the number a code stands for, exact in f32
//! v = v - zero_point[n, g]          in integers where zero-points are integers, in f32 where they are floats
//! v = v * s                         s = scale[n, g], or scale * global, or scale / global, rounded once to f32
//! v = v * factor                    where the family has one (1/127 of bitsandbytes' int8)
//! v = v + bias[n, g]                where the family has one
//! v = v * fold[k]                   where folding was asked for
//! ```
//!
//! and at last one rounding to the output's dtype, to nearest, ties to even. Steps that a recipe does not have are left out, they
//! are not done with a neutral number. Multiplications and additions are not contracted to fused ones. NaN stays
//! NaN, subnormals are kept.
//!
//! Indices: `e` counts the batch (experts), `n` the rows (out features), `k` the columns (in features), `g` a group of columns.
//! "LSB-first" means that field 0 is in the least significant bits; all words are little-endian.

use serde::Serialize;

use crate::dtype::Dtype;

/// How a quantized tensor becomes numbers: sizes, and for each step where its input lies.
///
/// Every range that a recipe names is one of the [members](Role) of its group. A tensor of any shape is seen as
/// `[batch, rows, cols]`: the leading dimensions as the batch where scales differ by them, all but the last as rows else.
///
/// Where groups or bytes run on across the ends of rows, `rows` and `cols` are not those of the result, whose numbers are the same ones
/// in the same row-major order: HQQ's groups, bitsandbytes' blocks that fit no row (one row of everything), casts whose rows end within a
/// byte.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recipe {
    /// Number of matrices, usually 1; experts otherwise.
    pub batch: u64,
    /// Rows of each matrix, `N` for a linear layer.
    pub rows: u64,
    /// Columns of each matrix, `K` for a linear layer.
    pub cols: u64,
    /// Where the code of `[e, n, k]` lies in [`Role::Payload`]: it is that of row `n + first_row` and column `k + first_col`.
    pub codes: Codes,
    /// Rows of codes before row 0, where a part of a tensor begins inside a word, byte or chunk of rows.
    #[serde(skip_serializing_if = "is_zero")]
    pub first_row: u32,
    /// Columns of codes before column 0, where a part begins inside a word, byte or block of columns.
    #[serde(skip_serializing_if = "is_zero")]
    pub first_col: u32,
    /// The number a code stands for.
    pub element: Element,
    /// What is subtracted from it.
    pub zero_point: ZeroPoint,
    /// What it is multiplied by; `None` for plain casts.
    pub scale: Option<Scale>,
    /// Multiplied after the scale.
    pub factor: Option<f32>,
    /// Added after that, found by [`Role::Bias`].
    pub bias: Option<Grid>,
    /// Multiplied at last: one number a column, found by [`Role::Fold`].
    pub fold: Option<Dtype>,
    /// The group of each column, where [`Role::GroupIndex`] (I32, one a column) says it instead of the grids' `cols_per_group`.
    /// The number of groups, to check the indices against; an index outside, negative ones too, reads the last group. It is the
    /// `g` of every grid and of packed zero-points; no `col_first` is added to it. All matrices of the batch share it.
    pub group_index: Option<u32>,
    /// Whether codes of neighbouring *rows* lie side by side in the file, so that `[cols, rows]` is the cheap output.
    pub is_column_major: bool,
}

impl Recipe {
    /// A plain cast of one matrix; what else is done to it is added by whoever recognises it.
    pub(super) fn of(rows: u64, cols: u64, codes: Codes, element: Element) -> Recipe {
        Recipe {
            batch: 1,
            rows,
            cols,
            codes,
            first_row: 0,
            first_col: 0,
            element,
            zero_point: ZeroPoint::None,
            scale: None,
            factor: None,
            bias: None,
            fold: None,
            group_index: None,
            is_column_major: false,
        }
    }
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Where the code of matrix `e`, row `n`, column `k` lies, in matrices of [as many rows and columns](Recipe::codes_size) as there are
/// codes. `e` adds `e * batch_stride_bytes` throughout, which is the length of the tensor that holds the codes,
/// the payload or packed zero-points, divided by the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Codes {
    /// Codes of a row side by side as a dense LSB-first stream of `bits` each, 1 to 8; they may straddle bytes. Row `n` starts at byte
    /// `n * row_stride_bytes`. With `bits = 8`: plain bytes.
    Rows {
        /// Width of a code.
        bits: u8,
        /// From a row to the next.
        row_stride_bytes: u64,
    },
    /// As `Rows` with 4 bits, but the *high* nibble first: code `k` even in bits 4 to 7 of byte `k / 2`.
    RowsHighFirst {
        /// From a row to the next.
        row_stride_bytes: u64,
    },
    /// As `Rows`, but each 32-bit word holds `32 / bits` codes LSB-first and its last bits are unused.
    RowsPadded {
        /// Width of a code.
        bits: u8,
        /// From a row to the next; a multiple of 4.
        row_stride_bytes: u64,
    },
    /// As `Rows` with 4 bits, in blocks of 17 bytes for 32 codes: a scale byte, then 16 bytes of codes, low nibble first.
    RowsWithScales {
        /// From a row to the next.
        row_stride_bytes: u64,
    },
    /// 32-bit words `[ceil(cols * bits / 32), rows]`: column `n` of words is the dense LSB-first stream of row `n`'s codes. A code
    /// may straddle into the word one row of words below.
    Columns {
        /// Width of a code.
        bits: u8,
    },
    /// As `Columns`, but every 32 codes are `bits` words of planes, the low plane first, of widths 2:(2) 3:(2,1) 4:(4) 5:(4,1)
    /// 6:(4,2) 7:(4,2,1) 8:(8). A plane of width w has w words; its word i holds codes `[i*32/w, (i+1)*32/w)`, code j of those at bit `w*j`.
    ColumnPlanes {
        /// Width of a code.
        bits: u8,
    },
    /// The planes of `ColumnPlanes` along rows: the words of row `n` side by side, from byte `n * row_stride_bytes` on.
    RowPlanes {
        /// Width of a code.
        bits: u8,
        /// From a row to the next; a multiple of 4.
        row_stride_bytes: u64,
    },
    /// As `Columns`, but each word holds `32 / bits` codes LSB-first and its last bits are unused.
    ColumnsPadded {
        /// Width of a code.
        bits: u8,
    },
    /// 32-bit words `[cols, words_per_row]`, each with the 4-bit codes of 8 neighbouring rows `n = 8c..8c+8` of one column: row `8c + j` in
    /// nibble `j`, or in nibble `[0, 4, 1, 5, 2, 6, 3, 7][j]` where `is_interleaved`.
    Words {
        /// Words for each column: `ceil(rows / 8)`.
        words_per_row: u64,
        /// Whether nibbles are in AWQ's order.
        is_interleaved: bool,
    },
    /// Bytes `[ceil(rows / 2), cols]`: row `2i` in the low nibble, `2i + 1` in the high one.
    RowPairs,
    /// Units of `unit_bytes` (1 or 4) `[unit_rows, cols]`: rows are cut in `unit_bytes * 8 / bits` chunks of `unit_rows`, chunk `c`
    /// in the bits from `bits * (chunks - 1 - c)` of its unit. The last chunk may reach past `rows`.
    RowChunks {
        /// Width of a code.
        bits: u8,
        /// Bytes of a unit.
        unit_bytes: u8,
        /// Rows of units.
        unit_rows: u64,
    },
    /// 16-bit words `[rows / 4, cols]`, 4 rows by 64 columns in each 64 words; rows count up to a multiple of 4, columns of 64. Of the 256 nibbles of those, numbered word after word and LSB-first,
    /// nibble `64 * r + p` is of row `r` and column `k`, where `p = 32 * (k / 32) + (k / 2 % 4) * 8 + (k % 2) * 4 + k % 32 / 8` with `k` counted
    /// in the 64.
    AwqFast,
}

/// The number a code stands for.
///
/// # Source
/// OCP Microscaling Formats (MX) 1.0; OCP 8-bit floating point 1.0; for the FNUZ kinds, the safetensors format's dtypes of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Element {
    /// The code itself.
    Unsigned,
    /// The code as two's complement of its width.
    Signed,
    /// 4 bits: sign, 2 of exponent (bias 1), 1 of mantissa; no NaN.
    E2m1,
    /// 6 bits: sign, 2, 3 (bias 1); no NaN.
    E2m3,
    /// 6 bits: sign, 3, 2 (bias 3); no NaN.
    E3m2,
    /// 8 bits: sign, 4, 3 (bias 7); NaN at 0x7f and 0xff, no infinity.
    E4m3,
    /// 8 bits: sign, 5, 2 (bias 15); infinities and NaN as IEEE.
    E5m2,
    /// As `E4m3` with bias 8, NaN at 0x80 only, no negative zero.
    E4m3Fnuz,
    /// As `E5m2` with bias 16, NaN at 0x80 only, no negative zero, no infinity.
    E5m2Fnuz,
    /// 8 bits of exponent: `2^(x - 127)`, NaN at 255.
    E8m0,
    /// An entry of [`Role::Table`]: F32, 16 of them, for codes of at most 4 bits.
    Table,
}

/// What is subtracted from an element.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub enum ZeroPoint {
    /// Nothing.
    None,
    /// This integer, from every code, which is `Unsigned` or `Signed`. At most 2^16 in magnitude, so that f32 is exact too.
    Constant(i32),
    /// Packed integers in [`Role::ZeroPoint`], one for each scale, subtracted from codes that are `Unsigned` or `Signed`: their matrix
    /// has the scale's groups of rows as one index and its groups of columns as the other, both with `row_first` and `col_first`
    /// of the scale's grid added. Without a scale there are none.
    Packed {
        /// Where a zero-point lies: read as the code of "row" `(n + row_first) / rows_per_group` and "column" `g`, or the other way round
        /// where `is_swapped`, in a matrix of as many rows and columns as the scale's grid has groups.
        codes: Codes,
        /// Whether `codes` counts groups as rows and rows as columns.
        is_swapped: bool,
        /// Whether a zero-point is two's complement of its width: after `WordWise` or `Modular` added to it, before a constant is added.
        is_signed: bool,
        /// What must be added to what is stored.
        offset: ZeroOffset,
    },
    /// Floats in [`Role::ZeroPoint`], subtracted in f32.
    Float(Grid),
}

/// What must be added to a stored integer zero-point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum ZeroOffset {
    /// This number, which may be 0 or negative. At most 2^16 in magnitude.
    Constant(i32),
    /// One to every field of each 32-bit word, by one wrapping addition to the word, so that a carry crosses fields: the inverse of what
    /// writers of the first GPTQ format do. Width 2, 4 and 8, in `Rows` of whole words.
    WordWise,
    /// One, modulo `2^bits`. Any width; what width 3 has.
    Modular,
}

/// What an element is multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Scale {
    /// The scale of each group, found by [`Role::Scale`].
    pub grid: Grid,
    /// A second level, found by [`Role::Global`].
    pub global: Option<Global>,
}

/// A scale of scales: one number, or one for each matrix of the batch, at element `e * batch_stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Global {
    /// F32, F16 or BF16.
    pub dtype: Dtype,
    /// Whether the scale is divided by it instead of multiplied.
    pub is_divisor: bool,
    /// Elements from one matrix's to the next's: 0 where all share one.
    pub batch_stride: u64,
}

/// Where the number of `[e, n, k]` lies in a tensor of one number a group.
///
/// At element `e * batch_stride + ((n + row_first) / rows_per_group) * row_stride + g * col_stride`, where `g` is
/// `(k + col_first) / cols_per_group`, or what the recipe's group index says.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Grid {
    /// How a number is stored.
    pub number: Number,
    /// Rows that share a number; 1 or more.
    pub rows_per_group: u32,
    /// Columns that share a number; 1 or more. A last group may be shorter.
    pub cols_per_group: u32,
    /// Elements from a matrix to the next.
    pub batch_stride: u64,
    /// Elements from a group of rows to the next.
    pub row_stride: u64,
    /// Elements from a group of columns to the next.
    pub col_stride: u64,
    /// Rows of the first group that lie before row 0, where the rows are a part of a tensor's.
    pub row_first: u32,
    /// Columns of the first group that lie before column 0.
    pub col_first: u32,
    /// Whether the grid lies in tiles of 128 rows by 4 columns: `[row groups, column groups]` padded to multiples of those, tiles in row-major
    /// order of 512 elements, in a tile at `(r % 32) * 16 + (r / 32) * 4 + c` with `r` and `c` counted in the tile. `row_stride` is then
    /// the padded number of columns, and `col_stride` is not used.
    pub is_swizzled: bool,
}

/// How a number of a grid is stored.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub enum Number {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 2 bytes.
    Bf16,
    /// 1 byte, `2^(x - 127)`, NaN at 255.
    E8m0,
    /// 1 byte, see [`Element::E4m3`].
    E4m3,
    /// 1 byte, two's complement.
    I8,
    /// 1 byte, `2^x` of two's complement `x`: the inline scales of [`Codes::RowsWithScales`], which lie in [`Role::Payload`], so that the
    /// grid's strides count the payload's bytes (`row_stride` is `row_stride_bytes`, `col_stride` 17). 2^-128 is a subnormal f32.
    SignedExponent,
    /// 1 byte that selects an F32 of [`Role::NestedTable`] (256 of them), times the F32 of [`Role::NestedScale`] at the number's index in the
    /// grid's tensor divided by `per_scale`, plus `offset`; each rounded to f32.
    Nested {
        /// Numbers that share a nested scale.
        per_scale: u32,
        /// Added to the product.
        offset: f32,
    },
}

/// What a tensor is to its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[non_exhaustive]
pub enum Role {
    /// The packed codes.
    Payload,
    /// Scales.
    Scale,
    /// The scale of scales.
    Global,
    /// Zero-points.
    ZeroPoint,
    /// The group of each column.
    GroupIndex,
    /// Additive numbers.
    Bias,
    /// Numbers that codes select.
    Table,
    /// Numbers that scales select.
    NestedTable,
    /// Scales of scales that are themselves codes.
    NestedScale,
    /// One number a column to fold in.
    Fold,
    /// Says sizes or parameters, which the plan has read already: not needed to dequantize.
    Description,
}

impl Role {
    /// Every role whose bytes a recipe reads.
    pub const READ: [Role; 10] = [
        Role::Payload,
        Role::Scale,
        Role::Global,
        Role::ZeroPoint,
        Role::GroupIndex,
        Role::Bias,
        Role::Table,
        Role::NestedTable,
        Role::NestedScale,
        Role::Fold,
    ];

    /// Returns the word for it, as plans print it.
    pub fn name(self) -> &'static str {
        match self {
            Role::Payload => "payload",
            Role::Scale => "scale",
            Role::Global => "global",
            Role::ZeroPoint => "zero_point",
            Role::GroupIndex => "group_index",
            Role::Bias => "bias",
            Role::Table => "table",
            Role::NestedTable => "nested_table",
            Role::NestedScale => "nested_scale",
            Role::Fold => "fold",
            Role::Description => "description",
        }
    }
}
