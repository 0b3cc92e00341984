/*
 * Which cells see which: the arithmetic of tiles, one copy for the CPU kernels, the CUDA kernels and the tests on the host.
 */
#ifndef LOCAL_ATTENTION_TILES_H
#define LOCAL_ATTENTION_TILES_H

#include "local_attention.h"

#ifdef __CUDACC__
#define LOCAL_ATTENTION_INLINE __host__ __device__ __forceinline__
#else
#define LOCAL_ATTENTION_INLINE inline
#endif

namespace {

LOCAL_ATTENTION_INLINE int minimum(int a, int b) { return a < b ? a : b; }
LOCAL_ATTENTION_INLINE int maximum(int a, int b) { return a > b ? a : b; }
LOCAL_ATTENTION_INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Cells from..to (one past the last) of one axis.
struct Range {
    int from, to;
};

// Keys that queries first..last see, on an axis of `size` keys. `upto` leaves out what lies behind the centre (the rows of causal windows).
LOCAL_ATTENTION_INLINE Range keys_seen(int size, int reach, int ratio, bool upto, int first, int last) {
    return {maximum(0, first / ratio - reach), minimum(size, last / ratio + (upto ? 0 : reach) + 1)};
}

// Queries that see any of the keys first..last, on an axis of `size` queries.
LOCAL_ATTENTION_INLINE Range queries_seeing(int size, int reach, int ratio, bool upto, int first, int last) {
    const int64_t from = (int64_t)ratio * (first - (upto ? 0 : reach)), to = (int64_t)ratio * ((int64_t)last + reach + 1);
    return {from < 0 ? 0 : (int)from, to > size ? size : (int)to};
}

// Whether a key cell lies in the window centred on a cell of the same grid.
LOCAL_ATTENTION_INLINE bool in_window(
    int key_row, int key_column, int center_row, int center_column, int reach_rows, int reach_columns, bool causal) {
    const bool near = (unsigned)(key_row - center_row + reach_rows) <= 2u * reach_rows &&
                      (unsigned)(key_column - center_column + reach_columns) <= 2u * reach_columns;
    return near && (!causal || key_row < center_row || (key_row == center_row && key_column <= center_column));
}

}  // namespace
#endif
