// The steps of a recipe, bit for bit what crates/device/src/dequantize/reference.rs does:
//
//     v = element(code)
//     v = v - zero_point[n, g]
//     v = v * s                         s = scale[n, g], or scale * global, or scale / global
//     v = v * factor
//     v = v + bias[n, g]
//     v = v * fold[k]
//
// each rounded to F32, steps that a recipe lacks left out, and at last one rounding to the target's type. Where the result
// is NaN its bits are the device's own.
//
// A recipe is the same for all threads, so branches on it are taken by all of them. They stand outside of loops over
// neighbouring numbers, and what these share, a Group, is fetched once.
#pragma once
#include "dequantize_params.h"
#include "numbers.h"

DEVICE u64 quotient(u64 value, const Divisor &by) {
  return (u64)((unsigned __int128)(2 * value) * by.factor >> 64) >> by.shift;
}

/// A number of the batch, and two indices inside.
struct Place {
  u64 e, i, j;
};

DEVICE Place place_of(const DequantizeParams &params, u64 item) {
  const u64 row = quotient(item, params.inner), e = quotient(row, params.outer);
  return {e, row - e * params.outer.divisor, item - row * params.inner.divisor};
}

/// Reads a value from any address.
template <class T> DEVICE T load_anywhere(u64 address) {
  if (address % sizeof(T) == 0)
    return load<T>(address);
  T value = 0;
#pragma unroll
  for (u32 byte = 0; byte < sizeof(T); ++byte)
    value |= (T)((T)load<u8>(address + byte) << (8 * byte));
  return value;
}

/// Writes a value to any address.
template <class T> DEVICE void store_anywhere(u64 address, T value) {
  if (address % sizeof(T) == 0)
    return store<T>(address, value);
#pragma unroll
  for (u32 byte = 0; byte < sizeof(T); ++byte)
    store<u8>(address + byte, (u8)(value >> (8 * byte)));
}

DEVICE u32 mask_of(u32 bits) { return 0xff >> (8 - bits); }

/// `bits` bits of a stream of bytes, the first of them lowest: 1 to 8, which lie in one byte or two.
DEVICE u32 field(u64 stream, u64 first_bit, u32 bits) {
  const u64 address = stream + first_bit / 8;
  const u32 shift = first_bit % 8;
  u32 both = load<u8>(address);
  if (shift + bits > 8)
    both |= (u32)load<u8>(address + 1) << 8;
  return (both >> shift) & mask_of(bits);
}

/// The nibble of row `8c + row` in AWQ's words: 0, 4, 1, 5, 2, 6, 3, 7.
DEVICE u32 awq_nibble(u32 row) { return (row & 1) << 2 | row >> 1; }

/// A code of words that lie in columns, and goes on in the word below where it straddles.
DEVICE u32 code_in_column(const CodesParams &codes, u64 matrix, u64 n, u64 k) {
  const u64 word = codes.bits * k / 32;
  const u32 first_bit = codes.bits * k % 32;
  const u32 low_bits = first_bit + codes.bits > 32 ? 32 - first_bit : codes.bits;
  const u32 low = field(matrix, 32 * (word * codes.stride + n) + first_bit, low_bits);
  if (low_bits == codes.bits)
    return low;
  return low | field(matrix, 32 * ((word + 1) * codes.stride + n), codes.bits - low_bits) << low_bits;
}

/// A code of planes. Their widths are the powers of two that the code's width is the sum of, the greatest first.
DEVICE u32 code_in_planes(const CodesParams &codes, u64 matrix, u64 n, u64 k) {
  // Words of a column lie a row of words apart, those of a row side by side.
  const bool is_row = codes.kind == CODES_ROW_PLANES;
  const u64 start = is_row ? 8 * n * codes.stride : 32 * n, step = is_row ? 32 : 32 * codes.stride;
  const u64 block = k / 32;
  const u32 j = k % 32;
  u32 code = 0, done_bits = 0;
  for (u32 log2 = 4; log2-- > 0;) {
    const u32 width = 1u << log2;
    if (!(codes.bits & width))
      continue;
    const u32 word = done_bits + (j >> (5 - log2)), first_bit = (j << log2) % 32;
    code |= field(matrix, start + (block * codes.bits + word) * step + first_bit, width) << done_bits;
    done_bits += width;
  }
  return code;
}

/// The code of row n and column k in matrix e. The layouts are drawn in README.md.
DEVICE u32 code_at(const CodesParams &codes, u64 e, u64 n, u64 k) {
  const u64 matrix = codes.address + e * codes.batch_stride;
  const u32 bits = codes.bits;
  u64 first_bit;
  switch (codes.kind) {
  case CODES_ROWS: first_bit = 8 * n * codes.stride + bits * k; break;
  case CODES_ROWS_HIGH_FIRST: first_bit = 8 * (n * codes.stride + k / 2) + 4 * (1 - k % 2); break;
  case CODES_ROWS_PADDED: {
    const u64 word = quotient(k, codes.unit);
    first_bit = 8 * n * codes.stride + 32 * word + bits * (k - word * codes.unit.divisor);
    break;
  }
  case CODES_ROWS_WITH_SCALES: first_bit = 8 * (n * codes.stride + 17 * (k / 32) + 1) + 4 * (k % 32); break;
  case CODES_COLUMNS: return code_in_column(codes, matrix, n, k);
  case CODES_COLUMN_PLANES:
  case CODES_ROW_PLANES: return code_in_planes(codes, matrix, n, k);
  case CODES_COLUMNS_PADDED: {
    const u64 word = quotient(k, codes.unit);
    first_bit = 32 * (word * codes.stride + n) + bits * (k - word * codes.unit.divisor);
    break;
  }
  case CODES_WORDS: {
    const u32 row = n % 8;
    first_bit = 32 * (k * codes.stride + n / 8) + 4 * (codes.is_interleaved ? awq_nibble(row) : row);
    break;
  }
  case CODES_ROW_PAIRS: first_bit = 8 * (n / 2 * codes.stride + k) + 4 * (n % 2); break;
  case CODES_ROW_CHUNKS: {
    const u64 chunk = quotient(n, codes.unit), row = n - chunk * codes.unit.divisor;
    first_bit = codes.unit_bits * (row * codes.stride + k) + (codes.top_bit - bits * chunk);
    break;
  }
  default: {
    const u32 r = n % 4, k64 = k % 64;
    const u32 nibble = 64 * r + 32 * (k64 / 32) + k64 / 2 % 4 * 8 + k64 % 2 * 4 + k64 % 32 / 8;
    first_bit = 16 * (n / 4 * codes.stride + k / 64 * 64) + 4 * nibble;
    break;
  }
  }
  return field(matrix, first_bit, bits);
}

/// A group of columns, as the group index says where there is one.
DEVICE u64 col_group(const DequantizeParams &params, const GridParams &grid, u64 k) {
  if (!params.group_index)
    return quotient(k + grid.col_first, grid.cols_per_group);
  const u32 group = load_anywhere<u32>(params.group_index + 4 * k);
  return group < params.group_count ? group : params.group_count - 1;
}

DEVICE u64 row_group(const GridParams &grid, u64 n) { return quotient(n + grid.row_first, grid.rows_per_group); }

/// A number of F32, F16 or BF16.
DEVICE float float_at(u32 number, u64 address, u64 index) {
  switch (number) {
  case NUMBER_F32: return float_of(load_anywhere<u32>(address + 4 * index));
  case NUMBER_F16: return f16_to_f32(load_anywhere<u16>(address + 2 * index));
  default: return bf16_to_f32(load_anywhere<u16>(address + 2 * index));
  }
}

/// 2^exponent; -127 and -128 make subnormal numbers.
DEVICE float signed_power_of_two(int exponent) {
  return float_of(exponent < -126 ? 1u << (exponent + 149) : power_of_two_bits(exponent));
}

/// The number of a grid that belongs to row n and column k of matrix e.
DEVICE float number_at(const DequantizeParams &params, const GridParams &grid, u64 e, u64 n, u64 k) {
  const u64 row = row_group(grid, n), col = col_group(params, grid, k);
  u64 index = e * grid.batch_stride;
  if (grid.is_swizzled) {
    // Tiles of 128 rows by 4 columns; rows 32 apart are side by side.
    const u64 tile = row / 128 * (grid.row_stride / 4) + col / 4;
    index += 512 * tile + row % 32 * 16 + row % 128 / 32 * 4 + col % 4;
  } else {
    index += row * grid.row_stride + col * grid.col_stride;
  }
  if (grid.number <= NUMBER_BF16)
    return float_at(grid.number, grid.address, index);
  const u32 byte = load<u8>(grid.address + index);
  switch (grid.number) {
  case NUMBER_E8M0: return f8_e8m0_to_f32(byte);
  case NUMBER_E4M3: return f8_e4m3_to_f32(byte);
  case NUMBER_I8: return (float)(i8)byte;
  case NUMBER_SIGNED_EXPONENT: return signed_power_of_two((i8)byte);
  default: {
    const float entry = float_at(NUMBER_F32, params.nested_table, byte);
    const u64 nested = quotient(index, params.per_nested_scale);
    return entry * float_at(NUMBER_F32, params.nested_scale, nested) + params.nested_offset;
  }
  }
}

DEVICE int sign_extended(u32 code, u32 bits) { return (int)(code << (32 - bits)) >> (32 - bits); }

/// The packed zero-point of the group of row n and column k.
DEVICE int packed_zero_point(const DequantizeParams &params, u64 e, u64 n, u64 k) {
  const CodesParams &codes = params.zero_codes;
  const u64 row = row_group(params.scale, n), col = col_group(params, params.scale, k);
  const u64 zero_n = params.is_zero_swapped ? col : row, zero_k = params.is_zero_swapped ? row : col;
  u32 stored;
  if (params.zero_offset == OFFSET_WORD_WISE) {
    // One is added to every field of the word at once, and carries cross fields: 0x7777777f + 0x11111111 = 0x88888890.
    const u64 first_bit = 8 * zero_n * codes.stride + codes.bits * zero_k;
    const u32 ones = codes.bits == 2 ? 0x55555555 : codes.bits == 4 ? 0x11111111 : 0x01010101;
    const u32 word = load_anywhere<u32>(codes.address + e * codes.batch_stride + first_bit / 32 * 4) + ones;
    stored = (word >> (first_bit % 32)) & mask_of(codes.bits);
  } else {
    stored = code_at(codes, e, zero_n, zero_k);
    if (params.zero_offset == OFFSET_MODULAR)
      stored = (stored + 1) & mask_of(codes.bits);
  }
  const int zero_point = params.is_zero_signed ? sign_extended(stored, codes.bits) : (int)stored;
  return params.zero_offset == OFFSET_CONSTANT ? zero_point + params.zero_constant : zero_point;
}

/// What the numbers of a group share.
struct Group {
  float zero_point;
  float scale;
  float bias;
};

/// The group of row n and column k. Integer zero-points are exact in F32, as are their differences to codes.
DEVICE Group group_at(const DequantizeParams &params, u64 e, u64 n, u64 k) {
  Group group = {};
  switch (params.zero) {
  case ZERO_NONE: break;
  case ZERO_CONSTANT: group.zero_point = (float)params.zero_constant; break;
  case ZERO_PACKED: group.zero_point = (float)packed_zero_point(params, e, n, k); break;
  default: group.zero_point = number_at(params, params.zero_grid, e, n, k); break;
  }
  if (params.has_scale) {
    group.scale = number_at(params, params.scale, e, n, k);
    if (params.global_kind != GLOBAL_NONE) {
      const float of_all = float_at(params.global_number, params.global, e * params.global_batch_stride);
      group.scale = params.global_kind == GLOBAL_FACTOR ? group.scale * of_all : group.scale / of_all;
    }
  }
  if (params.has_bias)
    group.bias = number_at(params, params.bias, e, n, k);
  return group;
}

/// 4 or 6 bits: sign, exponent, mantissa, all finite. `to_f32` moves a magnitude to its place in an F32.
DEVICE float small_float(u32 code, u32 magnitude_bits, u32 to_f32, int exponent) {
  const u32 magnitude = code & ((1u << magnitude_bits) - 1);
  return with_sign(rebias(magnitude << to_f32, exponent), code >> magnitude_bits << 31);
}

/// An integer of less than 23 bits as the mantissa of 2^23, which is then taken away: cheaper than a conversion.
DEVICE float float_of_integer(u32 value) { return float_of(0x4b000000 | value) - 0x1p23f; }

template <u32 N, class Decode>
DEVICE void decode_each(const u32 (&codes)[N], float (&values)[N], const Decode &decode) {
#pragma unroll
  for (u32 at = 0; at < N; ++at)
    values[at] = decode(codes[at]);
}

/// The numbers that codes of a width stand for, exact.
template <u32 N>
DEVICE void decode(const DequantizeParams &params, const u32 (&codes)[N], float (&values)[N], u32 bits) {
  switch (params.element) {
  case ELEMENT_UNSIGNED: return decode_each(codes, values, [](u32 code) { return float_of_integer(code); });
  case ELEMENT_SIGNED: {
    // With its sign bit turned, a code is its number plus half of the codes.
    const u32 half = 1u << (bits - 1);
    const float subtracted = 0x1p23f + half;
    return decode_each(codes, values, [=](u32 code) { return float_of(0x4b000000 | (code ^ half)) - subtracted; });
  }
  case ELEMENT_E2M1: return decode_each(codes, values, [](u32 code) { return small_float(code, 3, 22, 126); });
  case ELEMENT_E2M3: return decode_each(codes, values, [](u32 code) { return small_float(code, 5, 20, 126); });
  case ELEMENT_E3M2: return decode_each(codes, values, [](u32 code) { return small_float(code, 5, 21, 124); });
  case ELEMENT_E4M3: return decode_each(codes, values, [](u32 code) { return f8_e4m3_to_f32(code); });
  case ELEMENT_E5M2: return decode_each(codes, values, [](u32 code) { return f8_e5m2_to_f32(code); });
  case ELEMENT_E4M3FNUZ: return decode_each(codes, values, [](u32 code) { return f8_e4m3fnuz_to_f32(code); });
  case ELEMENT_E5M2FNUZ: return decode_each(codes, values, [](u32 code) { return f8_e5m2fnuz_to_f32(code); });
  case ELEMENT_E8M0: return decode_each(codes, values, [](u32 code) { return f8_e8m0_to_f32(code); });
  default: {
    const u64 table = params.table;
    return decode_each(codes, values, [=](u32 code) { return float_of(load<u32>(table + 4 * code)); });
  }
  }
}

/// All steps from the second on but the fold. `group_of` returns the group of each number.
template <u32 N, class GroupOf>
DEVICE void apply(const DequantizeParams &params, float (&values)[N], const GroupOf &group_of) {
  if (params.zero != ZERO_NONE) {
#pragma unroll
    for (u32 at = 0; at < N; ++at)
      values[at] -= group_of(at).zero_point;
  }
  if (params.has_scale) {
#pragma unroll
    for (u32 at = 0; at < N; ++at)
      values[at] *= group_of(at).scale;
  }
  if (params.has_factor) {
#pragma unroll
    for (u32 at = 0; at < N; ++at)
      values[at] *= params.factor;
  }
  if (params.has_bias) {
#pragma unroll
    for (u32 at = 0; at < N; ++at)
      values[at] += group_of(at).bias;
  }
}

DEVICE u32 target_width(u32 dtype) { return dtype == DTYPE_F32 ? 4 : 2; }

/// Rounds a number and writes it, to any address.
DEVICE void store_number(u32 dtype, u64 address, float value) {
  switch (dtype) {
  case DTYPE_F32: return store_anywhere<u32>(address, bits_of(value));
  case DTYPE_F16: return store_anywhere<u16>(address, (u16)f32_to_f16(value));
  default: return store_anywhere<u16>(address, (u16)f32_to_bf16(value));
  }
}

/// Numbers that are taken at once: neighbours in the target.
constexpr u32 CHUNK = 8;

/// The eight codes of a chunk, packed one behind the other. Codes have 4 or 8 bits.
template <u32 BITS> DEVICE void unpack(u64 packed, u32 (&codes)[CHUNK]) {
#pragma unroll
  for (u32 at = 0; at < CHUNK; ++at)
    codes[at] = (u32)(packed >> (BITS * at)) & mask_of(BITS);
}

/// The rounded numbers of a chunk, one behind the other: two words of 16 bits each, or four of F32.
struct Rounded {
  u64 words[4];
};

template <auto ENCODE> DEVICE Rounded rounded_halves(const float (&values)[CHUNK]) {
  Rounded rounded = {};
#pragma unroll
  for (u32 at = 0; at < CHUNK; ++at)
    rounded.words[at / 4] |= (u64)ENCODE(values[at]) << (16 * at % 64);
  return rounded;
}

DEVICE Rounded rounded_chunk(u32 dtype, const float (&values)[CHUNK]) {
  if (dtype == DTYPE_F16)
    return rounded_halves<f32_to_f16>(values);
  if (dtype == DTYPE_BF16)
    return rounded_halves<f32_to_bf16>(values);
  Rounded rounded;
#pragma unroll
  for (u32 at = 0; at < CHUNK; at += 2)
    rounded.words[at / 2] = bits_of(values[at]) | (u64)bits_of(values[at + 1]) << 32;
  return rounded;
}

/// Writes a chunk to an address that is a multiple of 16.
DEVICE void store_chunk(u32 dtype, u64 address, const Rounded &chunk) {
  store<Vector>(address, Vector{chunk.words[0], chunk.words[1]});
  if (dtype == DTYPE_F32)
    store<Vector>(address + VECTOR_LEN, Vector{chunk.words[2], chunk.words[3]});
}

/// Writes the first numbers of a chunk.
DEVICE void store_part(u32 dtype, u64 address, Rounded chunk, u32 count) {
  const u32 width = target_width(dtype), bits = 8 * width;
  for (u32 at = 0; at < count; ++at) {
    if (width == 4)
      store<u32>(address + 4 * at, (u32)chunk.words[0]);
    else
      store<u16>(address + 2 * at, (u16)chunk.words[0]);
#pragma unroll
    for (u32 word = 0; word < 3; ++word)
      chunk.words[word] = chunk.words[word] >> bits | chunk.words[word + 1] << (64 - bits);
    chunk.words[3] >>= bits;
  }
}

/// All steps for a chunk whose codes and groups are known.
template <class GroupOf>
DEVICE Rounded dequantized_chunk(const DequantizeParams &params, const u32 (&codes)[CHUNK], const GroupOf &group_of) {
  float values[CHUNK];
  decode(params, codes, values, params.codes.bits);
  apply(params, values, group_of);
  return rounded_chunk(params.target_dtype, values);
}
