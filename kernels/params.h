// What kernels are given: one struct each, by value. crates/device/src/gpu/params.rs mirrors every struct here field by
// field; both sides assert the sizes and offsets.
#pragma once
#include "vendor.h"

/// The element types of casts.
enum DtypeCode : u32 {
  DTYPE_F64 = 0,
  DTYPE_F32 = 1,
  DTYPE_F16 = 2,
  DTYPE_BF16 = 3,
  DTYPE_F8_E5M2 = 4,
  DTYPE_F8_E4M3 = 5,
  DTYPE_F8_E8M0 = 6,
  DTYPE_F8_E4M3FNUZ = 7,
  DTYPE_F8_E5M2FNUZ = 8,
};

struct CastParams {
  u64 source; // Address of the first element.
  u64 target;
  u64 numel;
  u32 source_dtype; // DtypeCode.
  u32 target_dtype; // DtypeCode, F64 to BF16.
};
static_assert(sizeof(CastParams) == 32 && __builtin_offsetof(CastParams, source_dtype) == 24);

struct StridedParams {
  u64 source; // Address of the first piece.
  u64 target;
  u64 source_stride; // Bytes from piece to piece.
  u64 target_stride;
  u64 piece_len; // Bytes.
  u64 piece_count;
  u32 lanes_log2; // 2^lanes_log2 threads share a piece.
  u32 reserved;
};
static_assert(sizeof(StridedParams) == 56 && __builtin_offsetof(StridedParams, lanes_log2) == 48);

struct ScatterPiece {
  u32 source_offset; // From ScatterParams::source.
  u32 len;
  u64 target; // Address.
};
static_assert(sizeof(ScatterPiece) == 16 && __builtin_offsetof(ScatterPiece, target) == 8);

/// As many pieces as fit into 4096 bytes, the most that a launch takes everywhere.
constexpr u32 SCATTER_PIECES_MAX = 254;

struct ScatterParams {
  u64 source; // Address of pinned host memory.
  u32 piece_count;
  u32 lanes_log2; // 2^lanes_log2 threads share a piece.
  u64 reserved;
  ScatterPiece pieces[SCATTER_PIECES_MAX];
};
static_assert(sizeof(ScatterParams) == 4088 && __builtin_offsetof(ScatterParams, pieces) == 24);
