// cast: elements of one floating-point type become elements of another.
//
//     target[i] = round(source[i])      0 <= i < numel; numbers.h says how each type rounds
//
// Index mapping: where both addresses allow vectors, a thread takes eight neighbouring elements at a time: it loads
// them with one access (F8), one vector (16 bits), two or four, and stores them likewise. The last numel % 8, and all
// elements where an address does not allow it, go one by one, from and to any alignment.
//
// The types are the same for all threads, so the branches on them cost next to nothing beside memory.
#include "numbers.h"
#include "params.h"

constexpr u32 GROUP = 8;

/// N elements as F32. All types but F64 are exact in it, so that encoding rounds once; F64 is rounded to nearest where
/// F32 is the target, else to odd.
template <u32 N> struct Values {
  float of[N];
};

/// The codes of N elements, one behind the other as in memory: eight elements of W bytes are W words.
template <u32 N, u32 W> struct Codes {
  u64 words[N == 1 ? 1 : W];
};

template <u32 N, u32 W> DEVICE Codes<N, W> load_codes(u64 address) {
  Codes<N, W> codes = {};
  if constexpr (N == 1) {
#pragma unroll
    for (u32 byte = 0; byte < W; ++byte)
      codes.words[0] |= (u64)load<u8>(address + byte) << (8 * byte);
  } else if constexpr (W == 1) {
    codes.words[0] = load<u64>(address);
  } else {
#pragma unroll
    for (u32 at = 0; at < W; at += 2) {
      const Vector vector = load<Vector>(address + 8 * at);
      codes.words[at] = vector[0], codes.words[at + 1] = vector[1];
    }
  }
  return codes;
}

template <u32 N, u32 W> DEVICE void store_codes(u64 address, const Codes<N, W> &codes) {
  if constexpr (N == 1) {
#pragma unroll
    for (u32 byte = 0; byte < W; ++byte)
      store<u8>(address + byte, (u8)(codes.words[0] >> (8 * byte)));
  } else {
#pragma unroll
    for (u32 at = 0; at < W; at += 2)
      store<Vector>(address + 8 * at, Vector{codes.words[at], codes.words[at + 1]});
  }
}

template <u32 N, u32 W, auto DECODE> DEVICE Values<N> read(u64 address) {
  const Codes<N, W> codes = load_codes<N, W>(address);
  Values<N> values;
#pragma unroll
  for (u32 at = 0; at < N; ++at)
    values.of[at] = DECODE((codes.words[at * W / 8] >> (8 * W * at % 64)) & (~0ull >> (64 - 8 * W)));
  return values;
}

template <u32 N, u32 W, auto ENCODE> DEVICE void write(u64 address, const Values<N> &values) {
  Codes<N, W> codes = {};
#pragma unroll
  for (u32 at = 0; at < N; ++at)
    codes.words[at * W / 8] |= (u64)ENCODE(values.of[at]) << (8 * W * at % 64);
  store_codes<N, W>(address, codes);
}

/// Casts N elements; with N of 8 the addresses are multiples of 16, or of 8 for F8.
template <u32 N> DEVICE void cast_elements(const CastParams &params, u64 source, u64 target) {
  Values<N> values;
  switch (params.source_dtype) {
  case DTYPE_F64:
    values = params.target_dtype == DTYPE_F32 ? read<N, 8, f64_to_f32>(source) : read<N, 8, f64_to_f32_odd>(source);
    break;
  case DTYPE_F32: values = read<N, 4, bits_to_f32>(source); break;
  case DTYPE_F16: values = read<N, 2, f16_to_f32>(source); break;
  case DTYPE_BF16: values = read<N, 2, bf16_to_f32>(source); break;
  case DTYPE_F8_E5M2: values = read<N, 1, f8_e5m2_to_f32>(source); break;
  case DTYPE_F8_E4M3: values = read<N, 1, f8_e4m3_to_f32>(source); break;
  case DTYPE_F8_E8M0: values = read<N, 1, f8_e8m0_to_f32>(source); break;
  case DTYPE_F8_E4M3FNUZ: values = read<N, 1, f8_e4m3fnuz_to_f32>(source); break;
  default: values = read<N, 1, f8_e5m2fnuz_to_f32>(source); break;
  }
  switch (params.target_dtype) {
  case DTYPE_F64: write<N, 8, f32_to_f64>(target, values); break;
  case DTYPE_F32: write<N, 4, f32_to_bits>(target, values); break;
  case DTYPE_F16: write<N, 2, f32_to_f16>(target, values); break;
  default: write<N, 2, f32_to_bf16>(target, values); break;
  }
}

DEVICE u32 width_of(u32 dtype) {
  return dtype == DTYPE_F64 ? 8 : dtype == DTYPE_F32 ? 4 : dtype <= DTYPE_BF16 ? 2 : 1;
}

KERNEL(cast, CastParams) {
  const u32 source_width = width_of(params.source_dtype), target_width = width_of(params.target_dtype);
  const u32 source_align = source_width == 1 ? GROUP : VECTOR_LEN;
  const bool is_aligned = params.source % source_align == 0 && params.target % VECTOR_LEN == 0;
  const u64 groups = is_aligned ? params.numel / GROUP : 0;
  for (u64 group = thread_index(); group < groups; group += thread_count())
    cast_elements<GROUP>(params, params.source + group * GROUP * source_width,
                         params.target + group * GROUP * target_width);
  for (u64 at = groups * GROUP + thread_index(); at < params.numel; at += thread_count())
    cast_elements<1>(params, params.source + at * source_width, params.target + at * target_width);
}
