/*
 * Local attention on the CPU, forward and backward, fused, vectorised and threaded.
 *
 * This file is compiled once per instruction set, see cpu_kernels.h.
 *
 * Work is cut into units: one head of one image, or a band of its rows. A unit goes through its rows of tiles from top to bottom. A tile is
 * 16 queries (4x4 cells, or another shape that suits the window), which sit in the lanes of the vectors. The keys that they see form a
 * rectangle on each source; a bit mask of 16 lanes per key says which queries see it. The products are then small dense ones:
 *
 *   scores[key][lane]  = sum over d of key[key][d] * query[d][lane]      (key elements are broadcast from memory, the query is transposed)
 *   output[lane][d]    = sum over keys of weight[key][lane] * value[key][d]
 *
 * and, in the backward, the same two kernels with other operands, and one that adds an outer product to the gradients of the keys.
 * The softmax needs no work across lanes. Rows of keys are copied once per unit into a ring of float (or double) rows, which turns strides
 * and half precision into contiguous memory that stays in the cache. Gradients of keys and values gather in a ring beside it, and a row is
 * written when no later query can see it: no atomics, and the result does not depend on the number of threads unless rows are split.
 */
#include <float.h>
#include <stdlib.h>

#include <initializer_list>

#include "cpu_kernels.h"
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

// ------------------------------------------------------------------------------------------------------------------------- micro kernels
// PITCH is the number of elements from one key to the next in the rings; padded_dim (a multiple of 16, at most PITCH) those in use.

// A row of keys on one source, and which lanes see them: key j is seen by rows & columns[j] & (before | (same & upto[j])).
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

// to[lane][d] = sum over the keys of all runs of weights[key][lane] * rows[key][d], for the lanes of one group and COUNT vectors of d.
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

// -------------------------------------------------------------------------------------------------------------------------- plan of a call

// How a call is cut into tiles, bands and units.
struct Plan {
    const LocalAttentionProblem* problem;
    bool backward;
    int tile_rows, tile_columns;
    int tiles_down, tiles_across;
    int bands, tiles_per_band;
    int padded_dim, pitch;
    int num_sources, source[LOCAL_ATTENTION_SOURCES];
    int ring[LOCAL_ATTENTION_SOURCES];                // rows of keys held at a time
    int64_t partial_at[LOCAL_ATTENTION_SOURCES];      // where the partial gradients of a band start, in elements
    int64_t partial_size;                             // elements of the partial gradients of a unit
    char* partial;                                    // with several bands: gradients before they are added up
    bool grad_scores;                                 // backward: wanted by any gradient but those of values
    int64_t next_unit, next_sum;                      // work counters of the threads
    int failed;
};

// Rows of keys that a band of tiles sees.
inline Range rows_of_band(const Plan& plan, const LocalAttentionSource& s, int band) {
    const int step = plan.tiles_per_band * plan.tile_rows;
    return keys_seen(s.rows, s.reach_rows, s.ratio_rows, s.causal, band * step, minimum(plan.problem->rows, (band + 1) * step) - 1);
}

// Keys that all tiles of a shape multiply with, as a measure of time: those of the tile for the scores, those of a group for the output.
inline double cost_of_tiles(const LocalAttentionProblem& p, int tile_rows) {
    const int tile_columns = LANES / tile_rows;
    double keys = 0;
    for (int i = 0; i < LOCAL_ATTENTION_SOURCES; i++) {
        const LocalAttentionSource& s = p.source[i];
        if (!s.key.data) continue;
        const int group_rows = tile_columns >= GROUP ? 1 : GROUP / tile_columns;
        const double columns = minimum(s.columns, (tile_columns - 1) / s.ratio_columns + 1 + 2 * s.reach_columns);
        const double rows = minimum(s.rows, (tile_rows - 1) / s.ratio_rows + 1 + 2 * s.reach_rows);
        const double rows_of_group = minimum(s.rows, (group_rows - 1) / s.ratio_rows + 1 + 2 * s.reach_rows);
        keys += columns * (rows + rows_of_group);
    }
    return keys * ceil_div(p.rows, tile_rows) * ceil_div(p.columns, tile_columns);
}

inline Plan make_plan(const LocalAttentionProblem& p, bool backward) {
    Plan plan = {};
    plan.problem = &p;
    plan.backward = backward;
    plan.tile_rows = p.tile_rows ? p.tile_rows : 4;
    if (!p.tile_rows)
        for (int rows = 1; rows <= LANES; rows *= 2)
            if (cost_of_tiles(p, rows) < cost_of_tiles(p, plan.tile_rows)) plan.tile_rows = rows;
    plan.tile_columns = LANES / plan.tile_rows;
    plan.tiles_down = ceil_div(p.rows, plan.tile_rows);
    plan.tiles_across = ceil_div(p.columns, plan.tile_columns);
    plan.padded_dim = (p.head_dim + 15) / 16 * 16;
    plan.pitch = plan.padded_dim <= 32 ? 32 : plan.padded_dim <= 64 ? 64 : 128;
    // Bands copy the keys at their edges twice, so rows are split only where there are too few heads to occupy the threads.
    const int64_t heads = (int64_t)p.batch * p.heads;
    plan.bands = heads >= 3 * p.threads || heads % p.threads == 0 ? 1 : (int)((3 * p.threads + heads - 1) / heads);
    plan.tiles_per_band = maximum(ceil_div(plan.tiles_down, plan.bands), 2);
    plan.bands = ceil_div(plan.tiles_down, plan.tiles_per_band);
    for (int i = 0; i < LOCAL_ATTENTION_SOURCES; i++) {
        const LocalAttentionSource& s = p.source[i];
        if (!s.key.data) continue;
        plan.source[plan.num_sources] = i;
        plan.ring[plan.num_sources] = minimum(s.rows, (plan.tile_rows - 1 + s.ratio_rows - 1) / s.ratio_rows + 1 + 2 * s.reach_rows);
        plan.partial_at[plan.num_sources] = plan.partial_size;
        int most = 0;
        for (int band = 0; band < plan.bands; band++) {
            const Range rows = rows_of_band(plan, s, band);
            most = maximum(most, rows.to - rows.from);
        }
        plan.partial_size += 2 * (int64_t)most * s.columns * plan.pitch;
        plan.num_sources++;
        plan.grad_scores |= s.grad_key.data != nullptr;
    }
    plan.grad_scores |= p.grad_query.data != nullptr;
    return plan;
}

// Memory cut from one block: a first pass with no base counts, the second hands out.
struct Arena {
    char* base;
    size_t used;

    template <class T>
    T* take(int64_t count) {
        T* at = (T*)(base + used);
        used += ((size_t)count * sizeof(T) + 63) & ~(size_t)63;
        return at;
    }
};

template <class S>
inline S* row_of(const LocalAttentionTensor& t, int batch, int head) {
    return (S*)t.data + batch * t.batch_stride + head * t.head_stride;
}

// -------------------------------------------------------------------------------------------------------------------------------- a thread

template <class T, class S, int PITCH>
class Worker {
    // One source as a unit sees it.
    struct Side {
        const LocalAttentionSource* source;
        int ring;
        T *key, *value, *grad_key, *grad_value;  // rings of rows; null for gradients that are not wanted
        T *partial_key, *partial_value;          // with several bands
        int partial_row;                         // the key row at which they start
        T* bias;                                 // of all keys, in units of log 2, or null
        int packed_from, packed_to;              // rows that have been in the ring, and the end of those
        int row, end;                            // rows that the current row of tiles sees
        uint16_t *rows, *before, *same;          // lanes that see them, by their row alone
        int *column, *column_end;                // per tile of the row
        uint16_t *columns, *upto;                // per tile: lanes by their column alone
        int most_columns;
    };

    Plan& plan;
    const LocalAttentionProblem& p;
    const int head_dim, padded_dim;
    Side sides[LOCAL_ATTENTION_SOURCES];
    Run<T>* runs;
    T *scores, *grad_scores;
    T *query, *query_rows, *grad_rows, *grad, *out;
    int batch, head;

    void lay_out(Arena& arena) {
        int most_runs = 0;
        int64_t most_keys = 0;
        for (int i = 0; i < plan.num_sources; i++) {
            Side& side = sides[i];
            const LocalAttentionSource& s = p.source[plan.source[i]];
            side.source = &s;
            side.ring = plan.ring[i];
            const int64_t row = (int64_t)s.columns * PITCH;
            side.key = arena.take<T>(side.ring * row);
            side.value = arena.take<T>(side.ring * row);
            side.grad_key = plan.backward && s.grad_key.data ? arena.take<T>(side.ring * row) : nullptr;
            side.grad_value = plan.backward && s.grad_value.data ? arena.take<T>(side.ring * row) : nullptr;
            side.bias = s.bias ? arena.take<T>((int64_t)s.rows * s.columns) : nullptr;
            side.rows = arena.take<uint16_t>(side.ring);
            side.before = arena.take<uint16_t>(side.ring);
            side.same = arena.take<uint16_t>(side.ring);
            side.column = arena.take<int>(plan.tiles_across);
            side.column_end = arena.take<int>(plan.tiles_across);
            side.most_columns =
                minimum(s.columns, (plan.tile_columns - 1 + s.ratio_columns - 1) / s.ratio_columns + 1 + 2 * s.reach_columns);
            side.columns = arena.take<uint16_t>((int64_t)plan.tiles_across * side.most_columns);
            side.upto = arena.take<uint16_t>((int64_t)plan.tiles_across * side.most_columns);
            most_runs += side.ring;
            most_keys += (int64_t)side.ring * side.most_columns;
        }
        runs = arena.take<Run<T>>(most_runs);
        scores = arena.take<T>(most_keys * LANES);
        grad_scores = plan.backward ? arena.take<T>(most_keys * LANES) : nullptr;
        query = arena.take<T>(PITCH * LANES);
        query_rows = arena.take<T>(PITCH * LANES);
        grad = arena.take<T>(PITCH * LANES);
        grad_rows = arena.take<T>(PITCH * LANES);
        out = arena.take<T>(PITCH * LANES);
    }

    // Lanes that see each column of keys, for every tile of a row of tiles: the same for all rows.
    void find_columns() {
        for (int i = 0; i < plan.num_sources; i++) {
            Side& side = sides[i];
            const LocalAttentionSource& s = *side.source;
            for (int tile = 0; tile < plan.tiles_across; tile++) {
                const int x = tile * plan.tile_columns, last = minimum(p.columns, x + plan.tile_columns) - 1;
                const Range columns = keys_seen(s.columns, s.reach_columns, s.ratio_columns, false, x, last);
                side.column[tile] = columns.from, side.column_end[tile] = columns.to;
                for (int k = side.column[tile]; k < side.column_end[tile]; k++) {
                    uint16_t seen = 0, upto = 0;
                    for (int lane = 0; lane < LANES; lane++) {
                        const int column = x + lane % plan.tile_columns, center = column / s.ratio_columns;
                        if (column > last) continue;
                        seen |= (uint16_t)(abs(k - center) <= s.reach_columns) << lane;
                        upto |= (uint16_t)(k <= center) << lane;
                    }
                    side.columns[(int64_t)tile * side.most_columns + k - side.column[tile]] = seen;
                    side.upto[(int64_t)tile * side.most_columns + k - side.column[tile]] = upto;
                }
            }
        }
    }

    void find_rows(Side& side, int y) {
        const LocalAttentionSource& s = *side.source;
        const int last = minimum(p.rows, y + plan.tile_rows) - 1;
        const Range visible = keys_seen(s.rows, s.reach_rows, s.ratio_rows, s.causal, y, last);
        side.row = visible.from, side.end = visible.to;
        for (int k = side.row; k < side.end; k++) {
            uint16_t seen = 0, before = 0, same = 0;
            for (int lane = 0; lane < LANES; lane++) {
                const int row = y + lane / plan.tile_columns, center = row / s.ratio_rows;
                if (row > last) continue;
                seen |= (uint16_t)(abs(k - center) <= s.reach_rows) << lane;
                before |= (uint16_t)(k < center) << lane;
                same |= (uint16_t)(k == center) << lane;
            }
            side.rows[k - side.row] = seen;
            side.before[k - side.row] = s.causal ? before : 0xffff;
            side.same[k - side.row] = s.causal ? same : 0;
        }
    }

    void write_gradients(const Side& side, int row) {
        const LocalAttentionSource& s = *side.source;
        write_gradient(side, row, side.grad_key, s.grad_key, side.partial_key, (T)p.scale);
        write_gradient(side, row, side.grad_value, s.grad_value, side.partial_value, (T)1);
    }

    // Writes one row of a ring to its tensor, or to the partial gradients of the band.
    void write_gradient(const Side& side, int row, const T* ring, const LocalAttentionTensor& grad, T* partial, T factor) {
        if (!ring) return;
        const int columns = side.source->columns;
        const int64_t size = (int64_t)columns * PITCH;
        const T* from = ring + row % side.ring * size;
        if (partial) {
            memcpy(partial + (row - side.partial_row) * size, from, size * sizeof(T));
            return;
        }
        S* to = row_of<S>(grad, batch, head) + (int64_t)row * columns * grad.position_stride;
        for (int x = 0; x < columns; x++, from += PITCH, to += grad.position_stride)
            for (int d = 0; d < head_dim; d++) narrow(from[d] * factor, to + d);
    }

    // Copies the rows of keys that the current row of tiles needs and that are not in the ring yet.
    void fill_ring(Side& side) {
        const LocalAttentionSource& s = *side.source;
        for (int row = maximum(side.packed_to, side.row); row < side.end; row++) {
            const int64_t slot = (int64_t)(row % side.ring) * s.columns * PITCH, position = (int64_t)row * s.columns;
            if (row - side.ring >= side.packed_from && plan.backward) write_gradients(side, row - side.ring);
            for (T* grad : {side.grad_key, side.grad_value})
                if (grad) memset(grad + slot, 0, (size_t)s.columns * PITCH * sizeof(T));
            const S* key = row_of<const S>(s.key, batch, head) + position * s.key.position_stride;
            const S* value = row_of<const S>(s.value, batch, head) + position * s.value.position_stride;
            for (int64_t x = 0; x < s.columns; x++) {
                copy_row(side.key + slot + x * PITCH, key + x * s.key.position_stride, head_dim, padded_dim);
                copy_row(side.value + slot + x * PITCH, value + x * s.value.position_stride, head_dim, padded_dim);
            }
        }
        side.packed_to = maximum(side.packed_to, side.end);
    }

    int find_runs(int tile) {
        int count = 0, start = 0;
        for (int i = 0; i < plan.num_sources; i++) {
            Side& side = sides[i];
            const int column = side.column[tile], columns = side.column_end[tile] - column;
            for (int row = side.row; row < side.end; row++) {
                const int64_t at = ((int64_t)(row % side.ring) * side.source->columns + column) * PITCH;
                Run<T>& run = runs[count++];
                run.key = side.key + at;
                run.value = side.value + at;
                run.grad_key = side.grad_key ? side.grad_key + at : nullptr;
                run.grad_value = side.grad_value ? side.grad_value + at : nullptr;
                run.bias = side.bias ? side.bias + (int64_t)row * side.source->columns + column : nullptr;
                run.columns = side.columns + (int64_t)tile * side.most_columns;
                run.upto = side.upto + (int64_t)tile * side.most_columns;
                run.rows = side.rows[row - side.row];
                run.before = side.before[row - side.row];
                run.same = side.same[row - side.row];
                run.count = columns;
                run.start = start;
                start += columns;
            }
        }
        return count;
    }

    // Position of a lane of the tile at (y, x), or -1 off the grid.
    int64_t position_of(int lane, int y, int x) const {
        const int row = y + lane / plan.tile_columns, column = x + lane % plan.tile_columns;
        return row < p.rows && column < p.columns ? (int64_t)row * p.columns + column : -1;
    }

    void read_tile(T* to, const LocalAttentionTensor& t, int y, int x) const {
        const S* from = row_of<const S>(t, batch, head);
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t position = position_of(lane, y, x);
            if (position < 0)
                memset(to + lane * PITCH, 0, padded_dim * sizeof(T));
            else
                copy_row(to + lane * PITCH, from + position * t.position_stride, head_dim, padded_dim);
        }
    }

    void write_tile(const LocalAttentionTensor& t, const T* from, const T* factors, int y, int x) const {
        S* to = row_of<S>(t, batch, head);
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t position = position_of(lane, y, x);
            if (position < 0) continue;
            S* row = to + position * t.position_stride;
            for (int d = 0; d < head_dim; d++) narrow(from[lane * PITCH + d] * factors[lane], row + d);
        }
    }

    int64_t positions() const { return (int64_t)p.rows * p.columns; }
    // The numbers of this head in a tensor of (batch, heads, positions).
    T* of_head(const void* numbers) const { return (T*)numbers + ((int64_t)batch * p.heads + head) * positions(); }
    // How far apart the two halves of `softmax` are.
    int64_t half_of_softmax() const { return (int64_t)p.batch * p.heads * positions(); }

    void forward_tile(int tile, int y, int x) {
        constexpr int N = lane_vectors<T>(), W = width<T>();
        const int num_runs = find_runs(tile);
        const int num_keys = runs[num_runs - 1].start + runs[num_runs - 1].count;
        read_tile(query_rows, p.query, y, x);
        transpose<T, PITCH>(query, query_rows, padded_dim, (T)(p.scale * LOG2_E));

        Vec<T> largest[N], total[N];
        for (int n = 0; n < N; n++) largest[n] = splat<T>(-(T)INFINITY);
        for (int r = 0; r < num_runs; r++) {
            ScoreBlock<T, PITCH> block = {runs[r], query, padded_dim, scores, largest};
            in_blocks<T>(runs[r].count, block);
        }
        for (int n = 0; n < N; n++) {
            // Lanes without any key (masked context) keep finite numbers: all weights are then 2^-inf = 0.
            const Vec<T> shift = largest[n] == -(T)INFINITY ? Vec<T>{} : largest[n];
            Vec<T> sum = {};
            for (int k = 0; k < num_keys; k++) {
                T* at = scores + (int64_t)k * LANES + n * W;
                const Vec<T> weight = exp2<T>(load(at) - shift);
                store(at, weight);
                sum += weight;
            }
            total[n] = sum;
        }
        gather<T, PITCH>(runs, num_runs, &Run<T>::value, scores, padded_dim, out);

        T factors[LANES];
        T *logsumexp = of_head(p.logsumexp), *softmax = p.softmax ? of_head(p.softmax) : nullptr;
        for (int lane = 0; lane < LANES; lane++) {
            const T sum = total[lane / W][lane % W], most = largest[lane / W][lane % W];
            factors[lane] = sum == 0 ? 0 : 1 / sum;
            const int64_t position = position_of(lane, y, x);
            if (position < 0) continue;
            const double log_sum = log2((double)sum);
            logsumexp[position] = sum == 0 ? -(T)INFINITY : most == lowest<T>() ? most : (T)(((double)most + log_sum) / LOG2_E);
            if (!softmax) continue;
            softmax[position] = sum == 0 ? 0 : most;
            softmax[half_of_softmax() + position] = sum == 0 ? 0 : (T)log_sum;
        }
        write_tile(p.output, out, factors, y, x);
    }

    void backward_tile(int tile, int y, int x) {
        constexpr int N = lane_vectors<T>(), W = width<T>();
        const int num_runs = find_runs(tile);
        const int num_keys = runs[num_runs - 1].start + runs[num_runs - 1].count;
        read_tile(query_rows, p.query, y, x);
        read_tile(grad_rows, p.grad_output, y, x);
        transpose<T, PITCH>(query, query_rows, padded_dim, (T)(p.scale * LOG2_E));
        transpose<T, PITCH>(grad, grad_rows, padded_dim, (T)1);

        alignas(64) T most[LANES], log_sum[LANES], grad_logsumexp[LANES], factors[LANES];
        const T *saved = of_head(p.softmax), *saved_grad = p.grad_logsumexp ? of_head(p.grad_logsumexp) : nullptr;
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t position = position_of(lane, y, x);
            most[lane] = position >= 0 ? saved[position] : 0;
            log_sum[lane] = position >= 0 ? saved[half_of_softmax() + position] : 0;
            grad_logsumexp[lane] = position >= 0 && saved_grad ? saved_grad[position] : 0;
            factors[lane] = (T)p.scale;
        }
        Vec<T> sum[N];
        for (int n = 0; n < N; n++) sum[n] = Vec<T>{};
        for (int r = 0; r < num_runs; r++) {
            WeightBlock<T, PITCH> weight = {runs[r], query, padded_dim, scores, most, log_sum};
            in_blocks<T>(runs[r].count, weight);
            if (!plan.grad_scores) continue;
            GradWeightBlock<T, PITCH> grad_weight = {runs[r], grad, padded_dim, scores, grad_scores, sum};
            in_blocks<T>(runs[r].count, grad_weight);
        }
        scatter<T, PITCH>(runs, num_runs, &Run<T>::grad_value, scores, grad_rows, padded_dim);
        if (!plan.grad_scores) return;
        // Through the softmax. The sum is taken from the weights and not from the output, which half precision has rounded.
        for (int n = 0; n < N; n++) {
            const Vec<T> delta = sum[n] - load(grad_logsumexp + n * W);
            for (int k = 0; k < num_keys; k++) {
                T* at = grad_scores + (int64_t)k * LANES + n * W;
                store(at, load(scores + (int64_t)k * LANES + n * W) * (load(at) - delta));
            }
        }
        if (p.grad_query.data) {
            gather<T, PITCH>(runs, num_runs, &Run<T>::key, grad_scores, padded_dim, out);
            write_tile(p.grad_query, out, factors, y, x);
        }
        scatter<T, PITCH>(runs, num_runs, &Run<T>::grad_key, grad_scores, query_rows, padded_dim);
    }

    void run_unit(int64_t unit) {
        const int band = (int)(unit % plan.bands);
        head = (int)(unit / plan.bands % p.heads);
        batch = (int)(unit / plan.bands / p.heads);
        for (int i = 0; i < plan.num_sources; i++) {
            Side& side = sides[i];
            const Range rows = rows_of_band(plan, *side.source, band);
            side.packed_from = side.packed_to = rows.from;
            if (side.bias) {
                const T* from = (const T*)side.source->bias + batch * side.source->bias_stride;
                const int64_t keys = (int64_t)side.source->rows * side.source->columns;
                for (int64_t k = 0; k < keys; k++) side.bias[k] = to_log2(from[k]);
            }
            side.partial_key = side.partial_value = nullptr;
            if (plan.partial) {
                side.partial_row = side.packed_from;
                side.partial_key = (T*)plan.partial + unit * plan.partial_size + plan.partial_at[i];
                side.partial_value = side.partial_key + (int64_t)(rows.to - rows.from) * side.source->columns * PITCH;
            }
        }
        const int last = minimum(plan.tiles_down, (band + 1) * plan.tiles_per_band);
        for (int down = band * plan.tiles_per_band; down < last; down++) {
            for (int i = 0; i < plan.num_sources; i++) {
                find_rows(sides[i], down * plan.tile_rows);
                fill_ring(sides[i]);
            }
            for (int tile = 0; tile < plan.tiles_across; tile++) {
                if (plan.backward)
                    backward_tile(tile, down * plan.tile_rows, tile * plan.tile_columns);
                else
                    forward_tile(tile, down * plan.tile_rows, tile * plan.tile_columns);
            }
        }
        if (plan.backward)
            for (int i = 0; i < plan.num_sources; i++)
                for (int row = maximum(sides[i].packed_from, sides[i].packed_to - sides[i].ring); row < sides[i].packed_to; row++)
                    write_gradients(sides[i], row);
    }

    // Adds the partial gradients of all bands for one source of one head.
    void add_partial(int64_t task) {
        const int i = (int)(task % plan.num_sources);
        const int64_t index = task / plan.num_sources;
        head = (int)(index % p.heads);
        batch = (int)(index / p.heads);
        const LocalAttentionSource& s = *sides[i].source;
        const int64_t size = (int64_t)s.columns * PITCH;
        for (int part = 0; part < 2; part++) {
            const LocalAttentionTensor& grad = part ? s.grad_value : s.grad_key;
            T* sum = part ? sides[i].grad_value : sides[i].grad_key;  // one row of the ring
            if (!sum) continue;
            const T factor = part ? (T)1 : (T)p.scale;
            for (int row = 0; row < s.rows; row++) {
                memset(sum, 0, size * sizeof(T));
                for (int band = 0; band < plan.bands; band++) {
                    const Range rows = rows_of_band(plan, s, band);
                    if (row < rows.from || row >= rows.to) continue;
                    const T* add = (const T*)plan.partial + (index * plan.bands + band) * plan.partial_size + plan.partial_at[i];
                    add += part * (rows.to - rows.from) * size + (row - rows.from) * size;
                    for (int64_t k = 0; k < size; k++) sum[k] += add[k];
                }
                S* to = row_of<S>(grad, batch, head) + (int64_t)row * s.columns * grad.position_stride;
                for (int x = 0; x < s.columns; x++)
                    for (int d = 0; d < head_dim; d++) narrow(sum[x * PITCH + d] * factor, to + x * grad.position_stride + d);
            }
        }
    }

public:
    explicit Worker(Plan& plan) : plan(plan), p(*plan.problem), head_dim(p.head_dim), padded_dim(plan.padded_dim) {}

    static void run(void* data) {
        Plan& plan = *(Plan*)data;
        Worker worker(plan);
        Arena arena = {nullptr, 0};
        worker.lay_out(arena);
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, arena.used)) {
            __atomic_store_n(&plan.failed, 1, __ATOMIC_RELAXED);
            return;
        }
        arena = {(char*)memory, 0};
        worker.lay_out(arena);
        worker.find_columns();
        const int64_t units = (int64_t)plan.problem->batch * plan.problem->heads * plan.bands;
        for (int64_t unit; (unit = __atomic_fetch_add(&plan.next_unit, 1, __ATOMIC_RELAXED)) < units;) worker.run_unit(unit);
        free(memory);
    }

    static void add_up(void* data) {
        Plan& plan = *(Plan*)data;
        Worker worker(plan);
        Arena arena = {nullptr, 0};
        worker.lay_out(arena);
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, arena.used)) {
            __atomic_store_n(&plan.failed, 1, __ATOMIC_RELAXED);
            return;
        }
        arena = {(char*)memory, 0};
        worker.lay_out(arena);
        const int64_t tasks = (int64_t)plan.problem->batch * plan.problem->heads * plan.num_sources;
        for (int64_t task; (task = __atomic_fetch_add(&plan.next_sum, 1, __ATOMIC_RELAXED)) < tasks;) worker.add_partial(task);
        free(memory);
    }
};

template <class T, class S, int PITCH>
int run_typed(Plan& plan, Parallel parallel) {
    const LocalAttentionProblem& p = *plan.problem;
    const int64_t units = (int64_t)p.batch * p.heads * plan.bands;
    const int threads = units < p.threads ? (int)units : p.threads;
    if (plan.backward && plan.bands > 1) {
        plan.partial = (char*)malloc((size_t)units * plan.partial_size * sizeof(T));
        if (!plan.partial) return LOCAL_ATTENTION_OUT_OF_MEMORY;
    }
    parallel(Worker<T, S, PITCH>::run, &plan, threads, p.parallel);
    if (plan.partial) {
        if (!plan.failed) parallel(Worker<T, S, PITCH>::add_up, &plan, threads, p.parallel);
        free(plan.partial);
    }
    return plan.failed ? LOCAL_ATTENTION_OUT_OF_MEMORY : LOCAL_ATTENTION_OK;
}

template <class T, class S>
int run_pitch(Plan& plan, Parallel parallel) {
    if (plan.pitch == 32) return run_typed<T, S, 32>(plan, parallel);
    if (plan.pitch == 64) return run_typed<T, S, 64>(plan, parallel);
    return run_typed<T, S, 128>(plan, parallel);
}

int run_problem(const LocalAttentionProblem& p, bool backward, Parallel parallel) {
    Plan plan = make_plan(p, backward);
    switch (p.dtype) {
        case LOCAL_ATTENTION_FLOAT32: return run_pitch<float, float>(plan, parallel);
        case LOCAL_ATTENTION_FLOAT64: return run_pitch<double, double>(plan, parallel);
        case LOCAL_ATTENTION_BFLOAT16: return run_pitch<float, bfloat16>(plan, parallel);
        case LOCAL_ATTENTION_FLOAT16: return run_pitch<float, float16>(plan, parallel);
    }
    return LOCAL_ATTENTION_UNSUPPORTED;
}

}  // namespace

int CPU_KERNEL(local_attention)(const LocalAttentionProblem* p, bool backward, Parallel parallel) {
    return run_problem(*p, backward, parallel);
}
