// strided: equal pieces at equal distances, such as the columns of its rows that a slice keeps.
//
//     target[p * target_stride + i] = source[p * source_stride + i]      0 <= p < piece_count, 0 <= i < piece_len
//
//     source  |p0......|p1......|p2......|        source_stride = 8, piece_len = 2
//     target  |p0|p1|p2|                          target_stride = 2
//
// All are counted in bytes and of any alignment.
//
// Index mapping: 2^lanes_log2 neighbouring threads are a group; group g takes pieces g, g + groups, ...; the
// threads of a group take the 16-byte vectors of a piece in turn. So a piece of 2 bytes costs one thread, one of
// many megabytes has them all, and nothing is divided.
#include "copy.h"
#include "params.h"

KERNEL(strided, StridedParams) {
  const u32 lanes = 1u << params.lanes_log2;
  const u32 lane = thread_index() & (lanes - 1);
  const u32 groups = thread_count() >> params.lanes_log2;
  for (u64 piece = thread_index() >> params.lanes_log2; piece < params.piece_count; piece += groups)
    copy_bytes(params.target + piece * params.target_stride, params.source + piece * params.source_stride,
               params.piece_len, lane, lanes);
}
