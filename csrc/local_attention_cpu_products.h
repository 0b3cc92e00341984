/*
 * The small dense products of local attention on the CPU: of a tile of 16 queries, which sit in the lanes of vectors,
 * with runs of keys. See local_attention_cpu.cpp.
 */
#ifndef LOCAL_ATTENTION_CPU_PRODUCTS_H
#define LOCAL_ATTENTION_CPU_PRODUCTS_H

#include <float.h>

#include "cpu_vectors.h"
#include "local_attention_tiles.h"

namespace {

constexpr int LANES = 16;  // queries in a tile
constexpr int GROUP = 4;   // queries whose outputs are in registers together

// Vectors that hold the lanes of a tile, and how many keys or values fit beside them in the registers.
template <class T>
constexpr int lane_vectors() {
    return LANES / width<T>();
}
template <class T>
constexpr int keys_per_block() {
#if VECTOR_BYTES == 64
    return lane_vectors<T>() == 1 ? 16 : 8;
#else
    return lane_vectors<T>() == 2 ? 6 : lane_vectors<T>() == 4 ? 2 : 1;
#endif
}
template <class T>
constexpr int values_per_block() {
#if VECTOR_BYTES == 64
    return 4;
#else
    return 2;
#endif
}

// Copies a row of head_dim numbers into the compute type, padded with zeros to padded_dim.
template <class T, class S>
inline void copy_row(T* to, const S* from, int head_dim, int padded_dim) {
    for (int d = 0; d < head_dim; d++) to[d] = (T)widen(from[d]);
    for (int d = head_dim; d < padded_dim; d++) to[d] = 0;
}

// The lowest finite number.
template <class T>
constexpr T lowest() {
    return sizeof(T) == 4 ? (T)-FLT_MAX : (T)-DBL_MAX;
}

// A bias in units of log 2. What was finite stays so: the lowest number hides a key only beside others.
template <class T>
inline T to_log2(T bias) {
    const T scaled = bias * (T)LOG2_E;
    return fabs(bias) == (T)INFINITY || fabs(scaled) != (T)INFINITY ? scaled : bias > 0 ? -lowest<T>() : lowest<T>();
}

// ------------------------------------------------------------------------------------------------------ micro kernels
// PITCH is the number of elements from one key to the next in the rings; padded_dim (a multiple of 16, at most PITCH)
// those in use.

// A row of keys on one source, and which lanes see them: key j is seen by rows & columns[j] & (before | (same &
// upto[j])).
template <class T>
struct Run {
    const T *key, *value;
    T *grad_key, *grad_value;
    const T* bias;  // already in units of log 2, or null
    const uint16_t *columns, *upto;
    uint16_t rows, before, same;
    int count, start;  // keys, and the index of the first in the scores

    uint16_t mask(int j) const { return rows & columns[j] & (before | (same & upto[j])); }
};

template <class T>
inline Vec<T> keep_lanes(Vec<T> x, uint16_t mask, int vector, T otherwise) {
    typedef typename Simd<T>::I I;
    I bit;
    for (int i = 0; i < width<T>(); i++) bit[i] = (typename Simd<T>::Int)1 << (vector * width<T>() + i);
    const I masks = (typename Simd<T>::Int)mask - I{};
    return (masks & bit) != 0 ? x : splat<T>(otherwise);
}

// acc[j][lanes] = sum over d of rows[j][d] * columns[d][lanes].
template <class T, int PITCH, int KEYS>
inline void multiply_block(const T* rows, const T* columns, int padded_dim, Vec<T> (&acc)[KEYS][lane_vectors<T>()]) {
    constexpr int N = lane_vectors<T>(), W = width<T>();
    for (int j = 0; j < KEYS; j++)
        for (int n = 0; n < N; n++) acc[j][n] = Vec<T>{};
    for (int d = 0; d < padded_dim; d++) {
        Vec<T> column[N];
        for (int n = 0; n < N; n++) column[n] = load(columns + d * LANES + n * W);
        for (int j = 0; j < KEYS; j++) {
            const Vec<T> x = splat(rows[j * PITCH + d]);
            for (int n = 0; n < N; n++) acc[j][n] += x * column[n];
        }
    }
}

// Calls f.template block<KEYS>(first key) over `count` keys in blocks of nearly equal size.
template <int MOST, class F>
inline void in_blocks_of(int keys, int first, F& f) {
    if constexpr (MOST > 0) {
        if (keys == MOST)
            f.template block<MOST>(first);
        else
            in_blocks_of<MOST - 1>(keys, first, f);
    }
}
template <class T, class F>
inline void in_blocks(int count, F& f) {
    const int blocks = ceil_div(count, keys_per_block<T>());
    for (int i = 0, first = 0; i < blocks; i++) {
        const int next = (int)((int64_t)count * (i + 1) / blocks);
        in_blocks_of<keys_per_block<T>()>(next - first, first, f);
        first = next;
    }
}

// Scores of a run, masked, and their running maximum.
template <class T, int PITCH>
struct ScoreBlock {
    const Run<T>& run;
    const T* query;
    int padded_dim;
    T* scores;
    Vec<T> (&largest)[lane_vectors<T>()];

    template <int KEYS>
    void block(int first) {
        constexpr int N = lane_vectors<T>(), W = width<T>();
        Vec<T> acc[KEYS][N];
        multiply_block<T, PITCH, KEYS>(run.key + (int64_t)first * PITCH, query, padded_dim, acc);
        for (int j = 0; j < KEYS; j++) {
            const uint16_t mask = run.mask(first + j);
            const T bias = run.bias ? run.bias[first + j] : 0;
            T* to = scores + (int64_t)(run.start + first + j) * LANES;
            for (int n = 0; n < N; n++) {
                const Vec<T> s = keep_lanes<T>(acc[j][n] + splat(bias), mask, n, -(T)INFINITY);
                store(to + n * W, s);
                largest[n] = s > largest[n] ? s : largest[n];
            }
        }
    }
};

// The weights of a run, from the scores, their largest and the logarithm of the sum of the weights relative to it.
template <class T, int PITCH>
struct WeightBlock {
    const Run<T>& run;
    const T* query;
    int padded_dim;
    T* weights;
    const T *largest, *log_sum;

    template <int KEYS>
    void block(int first) {
        constexpr int N = lane_vectors<T>(), W = width<T>();
        Vec<T> acc[KEYS][N];
        multiply_block<T, PITCH, KEYS>(run.key + (int64_t)first * PITCH, query, padded_dim, acc);
        for (int j = 0; j < KEYS; j++) {
            const uint16_t mask = run.mask(first + j);
            const T bias = run.bias ? run.bias[first + j] : 0;
            T* to = weights + (int64_t)(run.start + first + j) * LANES;
            for (int n = 0; n < N; n++) {
                // First what may be large, exactly as the forward did.
                const Vec<T> p = exp2<T>(acc[j][n] + splat(bias) - load(largest + n * W) - load(log_sum + n * W));
                store(to + n * W, keep_lanes<T>(p, mask, n, (T)0));
            }
        }
    }
};

// Gradients of the weights of a run, value . grad_output, and their sum weighted with the weights.
template <class T, int PITCH>
struct GradWeightBlock {
    const Run<T>& run;
    const T* grad_output;
    int padded_dim;
    const T* weights;
    T* grad_weights;
    Vec<T> (&sum)[lane_vectors<T>()];

    template <int KEYS>
    void block(int first) {
        constexpr int N = lane_vectors<T>(), W = width<T>();
        Vec<T> acc[KEYS][N];
        multiply_block<T, PITCH, KEYS>(run.value + (int64_t)first * PITCH, grad_output, padded_dim, acc);
        for (int j = 0; j < KEYS; j++) {
            const int64_t at = (int64_t)(run.start + first + j) * LANES;
            for (int n = 0; n < N; n++) {
                store(grad_weights + at + n * W, acc[j][n]);
                sum[n] += load(weights + at + n * W) * acc[j][n];
            }
        }
    }
};

// to[lane][d] = sum over the keys of all runs of weights[key][lane] * rows[key][d], for the lanes of one group and
// COUNT vectors of d.
template <class T, int PITCH, int COUNT>
inline void gather_block(
    const Run<T>* runs, int num_runs, const T* Run<T>::*rows, const T* weights, int group, int first, T* to) {
    constexpr int W = width<T>();
    const uint16_t bits = (uint16_t)(((1 << GROUP) - 1) << (group * GROUP));
    Vec<T> acc[GROUP][COUNT];
    for (int q = 0; q < GROUP; q++)
        for (int c = 0; c < COUNT; c++) acc[q][c] = Vec<T>{};
    for (int r = 0; r < num_runs; r++) {
        if (!(runs[r].rows & bits)) continue;
        const T* row = runs[r].*rows + first;
        const T* weight = weights + (int64_t)runs[r].start * LANES + group * GROUP;
        for (int j = 0; j < runs[r].count; j++, row += PITCH, weight += LANES) {
            Vec<T> x[COUNT];
            for (int c = 0; c < COUNT; c++) x[c] = load(row + c * W);
            for (int q = 0; q < GROUP; q++) {
                const Vec<T> w = splat(weight[q]);
                for (int c = 0; c < COUNT; c++) acc[q][c] += w * x[c];
            }
        }
    }
    for (int q = 0; q < GROUP; q++)
        for (int c = 0; c < COUNT; c++) store(to + (group * GROUP + q) * PITCH + first + c * W, acc[q][c]);
}

template <class T, int PITCH>
__attribute__((noinline)) void gather(
    const Run<T>* runs, int num_runs, const T* Run<T>::*rows, const T* weights, int padded_dim, T* to) {
    constexpr int W = width<T>(), MOST = values_per_block<T>();
    for (int group = 0; group < LANES / GROUP; group++) {
        int first = 0;
        for (; first + MOST * W <= padded_dim; first += MOST * W)
            gather_block<T, PITCH, MOST>(runs, num_runs, rows, weights, group, first, to);
        for (; MOST > 2 && first + 2 * W <= padded_dim; first += 2 * W)
            gather_block<T, PITCH, 2>(runs, num_runs, rows, weights, group, first, to);
        for (; first + W <= padded_dim; first += W)
            gather_block<T, PITCH, 1>(runs, num_runs, rows, weights, group, first, to);
    }
}

// to[key][d] += sum over lanes of weights[key][lane] * rows[lane][d], for KEYS keys and COUNT vectors of d.
template <class T, int PITCH, int KEYS, int COUNT>
inline void scatter_block(T* to, const T* weights, const T* rows, int lane, int end) {
    constexpr int W = width<T>();
    Vec<T> acc[KEYS][COUNT];
    for (int j = 0; j < KEYS; j++)
        for (int c = 0; c < COUNT; c++) acc[j][c] = load(to + j * PITCH + c * W);
    for (; lane < end; lane++) {
        Vec<T> x[COUNT];
        for (int c = 0; c < COUNT; c++) x[c] = load(rows + lane * PITCH + c * W);
        for (int j = 0; j < KEYS; j++) {
            const Vec<T> w = splat(weights[j * LANES + lane]);
            for (int c = 0; c < COUNT; c++) acc[j][c] += w * x[c];
        }
    }
    for (int j = 0; j < KEYS; j++)
        for (int c = 0; c < COUNT; c++) store(to + j * PITCH + c * W, acc[j][c]);
}

template <class T, int PITCH, int COUNT>
inline void scatter_columns(T* to, const T* weights, const T* rows, int count, int lane, int end) {
    int j = 0;
    for (; j + 4 <= count; j += 4, to += 4 * PITCH, weights += 4 * LANES)
        scatter_block<T, PITCH, 4, COUNT>(to, weights, rows, lane, end);
    if (count - j == 3) scatter_block<T, PITCH, 3, COUNT>(to, weights, rows, lane, end);
    if (count - j == 2) scatter_block<T, PITCH, 2, COUNT>(to, weights, rows, lane, end);
    if (count - j == 1) scatter_block<T, PITCH, 1, COUNT>(to, weights, rows, lane, end);
}

template <class T, int PITCH>
__attribute__((noinline)) void scatter(
    const Run<T>* runs, int num_runs, T* Run<T>::*grads, const T* weights, const T* rows, int padded_dim) {
    constexpr int W = width<T>(), MOST = values_per_block<T>();
    for (int r = 0; r < num_runs; r++) {
        const Run<T>& run = runs[r];
        if (!run.rows || !(run.*grads)) continue;
        const int lane = __builtin_ctz(run.rows), end = 32 - __builtin_clz(run.rows);
        const T* weight = weights + (int64_t)run.start * LANES;
        T* to = run.*grads;
        int first = 0;
        for (; first + MOST * W <= padded_dim; first += MOST * W)
            scatter_columns<T, PITCH, MOST>(to + first, weight, rows + first, run.count, lane, end);
        for (; MOST > 2 && first + 2 * W <= padded_dim; first += 2 * W)
            scatter_columns<T, PITCH, 2>(to + first, weight, rows + first, run.count, lane, end);
        for (; first + W <= padded_dim; first += W)
            scatter_columns<T, PITCH, 1>(to + first, weight, rows + first, run.count, lane, end);
    }
}

template <class T, int PITCH>
inline void transpose(T* to, const T* from, int padded_dim, T factor) {
    for (int d = 0; d < padded_dim; d++)
        for (int lane = 0; lane < LANES; lane++) to[d * LANES + lane] = from[lane * PITCH + d] * factor;
}

}  // namespace
#endif
