// Copies bytes of any alignment, sixteen at a time.
#pragma once
#include "vendor.h"

/// Sixteen bytes that start `shift` bytes (1 to 15) into the thirty-two of two vectors. Bytes count from the low end:
///
///     first  | a b c d ... p |          shift = 3
///     second | q r s t ... F |   ->     | d e f ... p q r s |
DEVICE Vector straddle(Vector first, Vector second, u32 shift) {
  const u32 bits = 8 * (shift & 7);
  const bool is_far = shift >= 8;
  const u64 low = is_far ? first[1] : first[0];
  const u64 middle = is_far ? second[0] : first[1];
  const u64 high = is_far ? second[1] : second[0];
  // A shift by 64 is undefined, so the upper part moves in two steps.
  return Vector{(low >> bits) | (middle << 1 << (63 - bits)), (middle >> bits) | (high << 1 << (63 - bits))};
}

/// Copies `len` bytes, shared by `lanes` threads of which the caller is number `lane`.
///
/// Every access is aligned and inside the piece. Vectors are stored where the target is a multiple of 16; where the
/// source then is not, each is put together from two aligned ones, the second of which is the first of the next
/// thread and still in the cache. What is left at both ends goes byte by byte:
///
///     target  ..|hhhh|vvvvvvvvvvvvvvvv|vvvvvvvvvvvvvvvv|ttt|...     h head, v vectors, t tail
///     source  .|hhhh v:vvvvvvvvvvvvvvv v:vvvvvvvvvvvvvvv ttt|..     : multiples of 16
DEVICE void copy_bytes(u64 target, u64 source, u64 len, u32 lane, u32 lanes) {
  u64 head = -target & (VECTOR_LEN - 1);
  const u32 shift = (source + head) & (VECTOR_LEN - 1);
  // The first of two source vectors starts `shift` bytes early, which is not to be before the piece.
  head += head < shift ? VECTOR_LEN : 0;
  // The second of the last two is not to end behind the piece.
  const u64 beside = head + (shift ? VECTOR_LEN - shift : 0);
  const u64 vectors = len > beside ? (len - beside) / VECTOR_LEN : 0;
  head = vectors ? head : len;

  for (u64 at = lane; at < head; at += lanes)
    store<u8>(target + at, load<u8>(source + at));
  for (u64 vector = lane; vector < vectors; vector += lanes) {
    const u64 at = head + vector * VECTOR_LEN;
    const u64 from = source + at - shift;
    const Vector first = load<Vector>(from);
    store<Vector>(target + at, shift ? straddle(first, load<Vector>(from + VECTOR_LEN), shift) : first);
  }
  for (u64 at = head + vectors * VECTOR_LEN + lane; at < len; at += lanes)
    store<u8>(target + at, load<u8>(source + at));
}
