// dequantize_rows: codes of 4 or 8 bits that lie row after row, eight neighbouring columns at a time.
//
//     target[e, n, k..k+8] = round(v(e, n, k..k+8))
//
//     4 bits, low first   |1 0|3 2|5 4|7 6|            one load of 4 bytes
//     4 bits, high first  |0 1|2 3|4 5|6 7|
//     8 bits              |0|1|2|3|4|5|6|7|            one load of 8 bytes
//     target, 16 bits     |0 |1 |2 |3 |4 |5 |6 |7 |    one store of 16 bytes; of F32 two
//
// Groups hold a multiple of eight columns and begin at one, so that the eight share scale, zero-point and bias, which are
// fetched once. Rows of codes and of the target allow such accesses, or there is only one.
//
// Index mapping: item `(e * outer + n) * inner + chunk` is columns `8 * chunk` and on of row n; neighbouring threads take
// neighbouring chunks. The last chunk of an only row may be short: it goes byte by byte.
#include "dequantize.h"

/// The eight codes of a whole chunk, or as many as are left of them.
DEVICE void load_chunk(const CodesParams &codes, u64 address, u64 left, u32 (&chunk)[CHUNK]) {
  u64 packed = 0;
  if (left < CHUNK) {
    for (u32 byte = 0; 8 * byte < left * codes.bits; ++byte)
      packed |= (u64)load<u8>(address + byte) << (8 * byte);
  } else {
    packed = codes.bits == 8 ? load<u64>(address) : load<u32>(address);
  }
  if (codes.bits == 8)
    return unpack<8>(packed, chunk);
  const u32 word = packed;
  const bool is_high_first = codes.kind == CODES_ROWS_HIGH_FIRST;
  unpack<4>(is_high_first ? (word >> 4 & 0x0f0f0f0f) | (word & 0x0f0f0f0f) << 4 : word, chunk);
}

KERNEL(dequantize_rows, DequantizeParams) {
  const u32 dtype = params.target_dtype, width = target_width(dtype);
  for (u64 item = thread_index(); item < params.item_count; item += thread_count()) {
    const Place at = place_of(params, item);
    const u64 k = CHUNK * at.j, left = params.cols - k;
    const u64 matrix = params.codes.address + at.e * params.codes.batch_stride;
    u32 codes[CHUNK];
    load_chunk(params.codes, matrix + at.i * params.codes.stride + at.j * params.codes.bits, left, codes);
    const Group group = group_at(params, at.e, at.i, k);
    const Rounded chunk = dequantized_chunk(params, codes, [&](u32) { return group; });
    const u64 target = params.target + ((at.e * params.rows + at.i) * params.cols + k) * width;
    if (left >= CHUNK)
      store_chunk(dtype, target, chunk);
    else
      store_part(dtype, target, chunk, left);
  }
}
