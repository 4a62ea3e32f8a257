// What the kernels of dequantization are given: a recipe, flattened. crates/device/src/gpu/dequantize_params.rs mirrors
// every struct and number here; both sides assert the sizes and offsets.
//
// What the words mean is said where recipes are defined, in crates/plan/src/quant/recipe.rs.
#pragma once
#include "params.h"

/// A number to divide by, without dividing: the quotient of any x < 2^63 is `(2 * x * factor >> 64) >> shift`.
struct Divisor {
  u64 divisor;
  u64 factor; // 2^(63 + shift) / divisor, rounded up.
  u32 shift;  // log2(divisor), rounded up.
  u32 reserved;
};
static_assert(sizeof(Divisor) == 24 && __builtin_offsetof(Divisor, shift) == 16);

enum CodesKind : u32 {
  CODES_ROWS = 0,
  CODES_ROWS_HIGH_FIRST = 1,
  CODES_ROWS_PADDED = 2,
  CODES_ROWS_WITH_SCALES = 3,
  CODES_COLUMNS = 4,
  CODES_COLUMN_PLANES = 5,
  CODES_WORDS = 6,
  CODES_ROW_PAIRS = 7,
  CODES_ROW_CHUNKS = 8,
  CODES_AWQ_FAST = 9,
  CODES_ROW_PLANES = 10,
  CODES_COLUMNS_PADDED = 11,
};

/// Where codes lie.
struct CodesParams {
  u64 address;
  u64 batch_stride; // Bytes.
  // From one to the next: for the four of rows, rows, in bytes; for columns and planes, rows of words, in words; for
  // words, columns, in words; for the others, rows of units, in units.
  u64 stride;
  Divisor unit; // CODES_ROWS_PADDED, CODES_COLUMNS_PADDED: codes of a word. CODES_ROW_CHUNKS: rows of units.
  u32 kind;     // CodesKind.
  u32 bits;
  u32 unit_bits;      // CODES_ROW_CHUNKS, as the next.
  u32 top_bit;        // Where the code of a unit's first chunk begins.
  u32 is_interleaved; // CODES_WORDS.
  u32 reserved;
};
static_assert(sizeof(CodesParams) == 72 && __builtin_offsetof(CodesParams, kind) == 48);

enum NumberKind : u32 {
  NUMBER_F32 = 0,
  NUMBER_F16 = 1,
  NUMBER_BF16 = 2,
  NUMBER_E8M0 = 3,
  NUMBER_E4M3 = 4,
  NUMBER_I8 = 5,
  NUMBER_SIGNED_EXPONENT = 6,
  NUMBER_NESTED = 7,
};

/// Where the numbers of groups lie.
struct GridParams {
  u64 address;
  u64 batch_stride; // Numbers, as the next two.
  u64 row_stride;
  u64 col_stride;
  Divisor rows_per_group;
  Divisor cols_per_group;
  u32 row_first;
  u32 col_first;
  u32 number; // NumberKind.
  u32 is_swizzled;
};
static_assert(sizeof(GridParams) == 96 && __builtin_offsetof(GridParams, row_first) == 80);

enum ElementKind : u32 {
  ELEMENT_UNSIGNED = 0,
  ELEMENT_SIGNED = 1,
  ELEMENT_E2M1 = 2,
  ELEMENT_E2M3 = 3,
  ELEMENT_E3M2 = 4,
  ELEMENT_E4M3 = 5,
  ELEMENT_E5M2 = 6,
  ELEMENT_E4M3FNUZ = 7,
  ELEMENT_E5M2FNUZ = 8,
  ELEMENT_E8M0 = 9,
  ELEMENT_TABLE = 10,
};

enum ZeroKind : u32 {
  ZERO_NONE = 0,
  ZERO_CONSTANT = 1,
  ZERO_PACKED = 2,
  ZERO_FLOAT = 3,
};

enum ZeroOffsetKind : u32 {
  OFFSET_CONSTANT = 0,
  OFFSET_WORD_WISE = 1,
  OFFSET_MODULAR = 2,
};

enum GlobalKind : u32 {
  GLOBAL_NONE = 0,
  GLOBAL_FACTOR = 1,
  GLOBAL_DIVISOR = 2,
};

struct DequantizeParams {
  u64 target;
  u64 rows;
  u64 cols;
  // What threads or blocks count: item `(e * outer + i) * inner + j` is j in i in matrix e of the batch.
  u64 item_count;
  Divisor inner;
  Divisor outer;
  CodesParams codes;
  CodesParams zero_codes; // ZERO_PACKED.
  GridParams zero_grid;   // ZERO_FLOAT.
  GridParams scale;
  GridParams bias;
  Divisor per_nested_scale;
  u64 group_index; // Addresses, 0 where there is none.
  u64 table;
  u64 nested_table;
  u64 nested_scale;
  u64 global;
  u64 global_batch_stride; // Numbers.
  u64 fold;
  u32 group_count; // Of the group index.
  u32 element;     // ElementKind.
  u32 zero;        // ZeroKind.
  i32 zero_constant; // The zero-point, or what is added to packed ones.
  u32 zero_offset;   // ZeroOffsetKind.
  u32 is_zero_swapped;
  u32 is_zero_signed;
  u32 has_scale;
  u32 global_kind;   // GlobalKind.
  u32 global_number; // NumberKind, F32 to BF16.
  u32 fold_number;   // As above.
  u32 has_factor;
  float factor;
  float nested_offset;
  u32 has_bias;
  u32 target_dtype; // DtypeCode, F32 to BF16.
  u32 is_transposed; // Whether the target is [batch, cols, rows].
  u32 first_row;     // Rows and columns of codes before those of the target.
  u32 first_col;
  u32 reserved;
};
static_assert(sizeof(DequantizeParams) == 672 && __builtin_offsetof(DequantizeParams, codes) == 80 &&
              __builtin_offsetof(DequantizeParams, scale) == 320 &&
              __builtin_offsetof(DequantizeParams, group_index) == 536 &&
              __builtin_offsetof(DequantizeParams, group_count) == 592);
