/*
 * Which cells see which: the arithmetic of tiles, one copy for the CPU kernels, the CUDA kernels and the tests on the
 * host.
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

// Keys that queries first..last see, on an axis of `size` keys. `upto` leaves out what lies behind the centre (the
// rows of causal windows).
LOCAL_ATTENTION_INLINE Range keys_seen(int size, int reach, int ratio, bool upto, int first, int last) {
    return {maximum(0, first / ratio - reach), minimum(size, last / ratio + (upto ? 0 : reach) + 1)};
}

// Queries that see any of the keys first..last, on an axis of `size` queries.
LOCAL_ATTENTION_INLINE Range queries_seeing(int size, int reach, int ratio, bool upto, int first, int last) {
    const int64_t from = (int64_t)ratio * (first - (upto ? 0 : reach)),
                  to = (int64_t)ratio * ((int64_t)last + reach + 1);
    return {from < 0 ? 0 : (int)from, to > size ? size : (int)to};
}

// Whether a key cell lies in the window centred on a cell of the same grid.
LOCAL_ATTENTION_INLINE bool in_window(
    int key_row, int key_column, int center_row, int center_column, int reach_rows, int reach_columns, bool causal) {
    const bool near = (unsigned)(key_row - center_row + reach_rows) <= 2u * reach_rows &&
                      (unsigned)(key_column - center_column + reach_columns) <= 2u * reach_columns;
    return near && (!causal || key_row < center_row || (key_row == center_row && key_column <= center_column));
}

// Whether there is anything to compute, and tensors have data.
inline bool is_empty(const LocalAttentionProblem& p) { return !p.batch || !p.heads; }

// Whether the sizes and pointers of a call fit together, so that the kernels need not ask.
inline bool is_sound(const LocalAttentionProblem& p, bool backward) {
    const int most = LOCAL_ATTENTION_MAX_SIDE;
    if (p.batch < 0 || p.heads < 0 || p.head_dim < 1 || p.head_dim > LOCAL_ATTENTION_MAX_HEAD_DIM) return false;
    if (p.rows < 1 || p.rows > most || p.columns < 1 || p.columns > most) return false;
    if (is_empty(p)) return true;
    if (!p.query.data ||
        (backward ? !p.output.data || !p.grad_output.data || !p.softmax : !p.output.data || !p.logsumexp))
        return false;
    bool any = false;
    for (const LocalAttentionSource& s : p.source) {
        if (!s.key.data) continue;
        any = true;
        if (!s.value.data || s.rows < 1 || s.rows > most || s.columns < 1 || s.columns > most) return false;
        if (s.reach_rows < 0 || s.reach_rows > most || s.reach_columns < 0 || s.reach_columns > most) return false;
        if (s.ratio_rows < 1 || s.ratio_rows > most || s.ratio_columns < 1 || s.ratio_columns > most) return false;
        // The centre of every window lies on the grid.
        if ((p.rows - 1) / s.ratio_rows >= s.rows || (p.columns - 1) / s.ratio_columns >= s.columns) return false;
    }
    return any;
}

}  // namespace
#endif
