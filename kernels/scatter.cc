// scatter: many small pieces of one staging buffer go where they belong, in one launch.
//
//     target[p][i] = source[source_offset[p] + i]      for every piece p, 0 <= i < len[p]
//
//     pinned host memory   |  p0  |gap| p1 |   p2   | ...
//                              |        |       '-------> an arena
//                              |        '---------------> another
//                              '------------------------> ...
//
// The list of pieces is inside the parameters, and the device reads the pinned memory itself, so a launch needs
// neither scratch memory nor a copy before it. Offsets, lengths and addresses are of any alignment.
//
// Index mapping: 2^lanes_log2 neighbouring threads are a group; group g takes pieces g, g + groups, ...; the
// threads of a group take the 16-byte vectors of a piece in turn.
#include "copy.h"
#include "params.h"

KERNEL(scatter, ScatterParams) {
  const u32 lanes = 1u << params.lanes_log2;
  const u32 lane = thread_index() & (lanes - 1);
  const u32 groups = thread_count() >> params.lanes_log2;
  for (u32 at = thread_index() >> params.lanes_log2; at < params.piece_count; at += groups) {
    const ScatterPiece piece = params.pieces[at];
    copy_bytes(piece.target, params.source + piece.source_offset, piece.len, lane, lanes);
  }
}
