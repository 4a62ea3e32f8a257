// dequantize_tiles: codes of 4 or 8 bits whose words lie column after column, tile by tile.
//
//     target[e, n, k..k+8] = round(v(e, n, k..k+8))      or target[e, k, n..n+8] where it is transposed
//
//     a tile of 64 rows n by 128 columns k
//
//     Columns   lines of words [k / 8 or k / 4], in each 64 words: the one of n has 8 or 4 neighbouring k
//     Words     lines of words [k], in each 8 words of 8 neighbouring n
//
//     staged    |the words of columns 0 to 7|..|the words of columns 8 to 15|..| ...      .. two words that nobody reads
//     target    |n: k 0 to 7|8 to 15| ... |      16 bytes each of 16-bit numbers; or |k: n 0 to 7|8 to 15| ... |
//
// Groups hold a multiple of 32 columns and begin at one. Columns are a multiple of 8, lines of words start at multiples of
// 16 bytes; where the target is transposed, rows are a multiple of 8.
//
// Index mapping: item `(e * outer + i) * inner + j` is the tile of rows from 64 * i and columns from 128 * j. First
// neighbouring threads fetch neighbouring vectors of the file, and groups of neighbouring rows; then neighbouring
// threads write neighbouring chunks of eight numbers. Sixteen of them take a row: by the two words between, they and the
// sixteen of the next row read different banks.
#include "dequantize.h"

constexpr u32 TILE_ROWS = 64, TILE_COLS = 128;
constexpr u32 GROUP_COLS = 32;
constexpr u32 CHUNKS = TILE_COLS / CHUNK;
constexpr u32 PADDING = 2;

struct Tile {
  u32 words[CHUNKS * (TILE_ROWS * 2 + PADDING)];
  Group groups[TILE_COLS / GROUP_COLS * TILE_ROWS];
};

/// Fetches the tile's words, four at a time, and its groups.
DEVICE void stage(const DequantizeParams &params, Tile &tile, const Place &at, u32 thread) {
  const CodesParams &codes = params.codes;
  const bool is_words = codes.kind == CODES_WORDS;
  const u64 first_n = TILE_ROWS * at.i, first_k = TILE_COLS * at.j;
  const u64 matrix = codes.address + at.e * codes.batch_stride;
  const u32 chunk_words = TILE_ROWS * codes.bits / 4;
  // Words of a line of the tile, as a power of two, and the first of the tile's in the matrix.
  const u32 line_log2 = is_words ? 3 : 6;
  const u64 first_line = is_words ? first_k : first_k * codes.bits / 32;
  const u64 lines = is_words ? params.cols : params.cols * codes.bits / 32;
  const u64 first_word = is_words ? first_n / 8 : first_n;
  for (u32 word = 4 * thread; word < CHUNKS * chunk_words; word += 4 * BLOCK_THREADS) {
    const u64 line = first_line + (word >> line_log2), in_line = first_word + (word & ((1u << line_log2) - 1));
    if (line >= lines || in_line >= codes.stride)
      continue;
    const Vector vector = load<Vector>(matrix + 4 * (line * codes.stride + in_line));
    u32 *staged = &tile.words[word + (codes.bits == 8 ? word / (2 * TILE_ROWS) : word / TILE_ROWS) * PADDING];
    staged[0] = (u32)vector[0], staged[1] = (u32)(vector[0] >> 32);
    staged[2] = (u32)vector[1], staged[3] = (u32)(vector[1] >> 32);
  }
  for (u32 group = thread; group < TILE_COLS / GROUP_COLS * TILE_ROWS; group += BLOCK_THREADS) {
    const u64 n = first_n + group % TILE_ROWS, k = first_k + group / TILE_ROWS * GROUP_COLS;
    if (n < params.rows && k < params.cols)
      tile.groups[group] = group_at(params, at.e, n, k);
  }
}

/// The codes of row `row` and chunk `chunk` of the tile.
DEVICE void unstage(const CodesParams &codes, const Tile &tile, u32 row, u32 chunk, u32 (&unpacked)[CHUNK]) {
  const u32 *staged = &tile.words[chunk * (TILE_ROWS * codes.bits / 4 + PADDING)];
  if (codes.kind == CODES_WORDS) {
    const u32 nibble = codes.is_interleaved ? awq_nibble(row % 8) : row % 8;
#pragma unroll
    for (u32 at = 0; at < CHUNK; ++at)
      unpacked[at] = (staged[at * (TILE_ROWS / 8) + row / 8] >> (4 * nibble)) & 15;
  } else if (codes.bits == 8) {
    unpack<8>(staged[row] | (u64)staged[TILE_ROWS + row] << 32, unpacked);
  } else {
    unpack<4>(staged[row], unpacked);
  }
}

/// Writes the tile's numbers, eight columns of a row at a time.
DEVICE void write(const DequantizeParams &params, const Tile &tile, const Place &at, u32 thread) {
  const u32 dtype = params.target_dtype;
#pragma unroll 1
  for (u32 item = thread; item < TILE_ROWS * CHUNKS; item += BLOCK_THREADS) {
    const u32 row = item / CHUNKS, chunk = item % CHUNKS;
    const u64 n = TILE_ROWS * at.i + row, k = TILE_COLS * at.j + CHUNK * chunk;
    if (n >= params.rows || k >= params.cols)
      continue;
    u32 codes[CHUNK];
    unstage(params.codes, tile, row, chunk, codes);
    const Group &group = tile.groups[chunk / (GROUP_COLS / CHUNK) * TILE_ROWS + row];
    const u64 target = params.target + ((at.e * params.rows + n) * params.cols + k) * target_width(dtype);
    store_chunk(dtype, target, dequantized_chunk(params, codes, [&](u32) { return group; }));
  }
}

/// The code of row `row` and column `col` of the tile.
DEVICE u32 code_of(const CodesParams &codes, const Tile &tile, u32 row, u32 col) {
  const u32 *staged = &tile.words[col / CHUNK * (TILE_ROWS * codes.bits / 4 + PADDING)];
  const u32 in_chunk = col % CHUNK;
  if (codes.kind == CODES_WORDS) {
    const u32 nibble = codes.is_interleaved ? awq_nibble(row % 8) : row % 8;
    return (staged[in_chunk * (TILE_ROWS / 8) + row / 8] >> (4 * nibble)) & 15;
  }
  if (codes.bits == 8)
    return (staged[in_chunk / 4 * TILE_ROWS + row] >> (8 * (in_chunk % 4))) & 0xff;
  return (staged[row] >> (4 * in_chunk)) & 15;
}

/// Writes the tile's numbers into columns, eight rows of a column at a time.
DEVICE void write_transposed(const DequantizeParams &params, const Tile &tile, const Place &at, u32 thread) {
  constexpr u32 COL_CHUNKS = TILE_ROWS / CHUNK;
  const u32 dtype = params.target_dtype;
#pragma unroll 1
  for (u32 item = thread; item < TILE_COLS * COL_CHUNKS; item += BLOCK_THREADS) {
    const u32 col = item / COL_CHUNKS, row = item % COL_CHUNKS * CHUNK;
    const u64 n = TILE_ROWS * at.i + row, k = TILE_COLS * at.j + col;
    if (n >= params.rows || k >= params.cols)
      continue;
    u32 codes[CHUNK];
#pragma unroll
    for (u32 of = 0; of < CHUNK; ++of)
      codes[of] = code_of(params.codes, tile, row + of, col);
    const Group *groups = &tile.groups[col / GROUP_COLS * TILE_ROWS + row];
    const Rounded chunk = dequantized_chunk(params, codes, [&](u32 of) { return groups[of]; });
    store_chunk(dtype, params.target + ((at.e * params.cols + k) * params.rows + n) * target_width(dtype), chunk);
  }
}

KERNEL_PHASES(dequantize_tiles, DequantizeParams, Tile, 2) {
  const Place at = place_of(params, item);
  if (phase == 0)
    stage(params, shared, at, thread);
  else if (params.is_transposed)
    write_transposed(params, shared, at, thread);
  else
    write(params, shared, at, thread);
}
