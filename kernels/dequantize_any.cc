// dequantize_any: every recipe there is, one number at a time. Formula and layouts: dequantize.h, README.md.
//
//     target[e, n, k] = round(v(e, n, k))      or target[e, k, n] where it is transposed
//
// Index mapping: item `(e * outer + i) * inner + j` is the j-th number of row i of the target, so that neighbouring threads
// write neighbouring numbers. Everything may start at any byte.
#include "dequantize.h"

KERNEL(dequantize_any, DequantizeParams) {
  const u32 width = target_width(params.target_dtype);
  for (u64 item = thread_index(); item < params.item_count; item += thread_count()) {
    const Place at = place_of(params, item);
    const u64 n = params.is_transposed ? at.j : at.i, k = params.is_transposed ? at.i : at.j;
    const u32 codes[1] = {code_at(params.codes, at.e, n + params.first_row, k + params.first_col)};
    float values[1];
    if (params.element == ELEMENT_TABLE)
      values[0] = float_at(NUMBER_F32, params.table, codes[0]);
    else
      decode(params, codes, values, params.codes.bits);
    const Group group = group_at(params, at.e, n, k);
    apply(params, values, [&](u32) { return group; });
    if (params.fold)
      values[0] *= float_at(params.fold_number, params.fold, k);
    store_number(params.target_dtype, params.target + item * width, values[0]);
  }
}
