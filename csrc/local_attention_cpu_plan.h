/*
 * How a call of local attention on the CPU is cut into tiles, bands and units, and the memory of a thread.
 */
#ifndef LOCAL_ATTENTION_CPU_PLAN_H
#define LOCAL_ATTENTION_CPU_PLAN_H

#include <stdlib.h>

#include "local_attention_cpu_products.h"

namespace {

// How a call is cut into tiles, bands and units.
struct Plan {
    const LocalAttentionProblem* problem;
    bool backward;
    int tile_rows, tile_columns;
    int tiles_down, tiles_across;
    int bands, tiles_per_band;
    int padded_dim, pitch;
    int num_sources, source[LOCAL_ATTENTION_SOURCES];
    int ring[LOCAL_ATTENTION_SOURCES];            // rows of keys held at a time
    int64_t partial_at[LOCAL_ATTENTION_SOURCES];  // where the partial gradients of a band start, in elements
    int64_t partial_size;                         // elements of the partial gradients of a unit
    char* partial;                                // with several bands: gradients before they are added up
    bool grad_scores;                             // backward: wanted by any gradient but those of values
    int64_t next;                                 // the first task that no thread has taken
    int failed;
};

// Rows of keys that a band of tiles sees.
inline Range rows_of_band(const Plan& plan, const LocalAttentionSource& s, int band) {
    const int step = plan.tiles_per_band * plan.tile_rows;
    return keys_seen(
        s.rows, s.reach_rows, s.ratio_rows, s.causal, band * step, minimum(plan.problem->rows, (band + 1) * step) - 1);
}

// Keys that all tiles of a shape multiply with, as a measure of time: those of the tile for the scores, those of a
// group for the output.
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
    // Bands copy the keys at their edges twice, so rows are split only where there are too few heads to occupy the
    // threads.
    const int64_t heads = (int64_t)p.batch * p.heads;
    plan.bands = heads >= 3 * p.threads || heads % p.threads == 0 ? 1 : (int)((3 * p.threads + heads - 1) / heads);
    plan.tiles_per_band = maximum(ceil_div(plan.tiles_down, plan.bands), 2);
    plan.bands = ceil_div(plan.tiles_down, plan.tiles_per_band);
    for (int i = 0; i < LOCAL_ATTENTION_SOURCES; i++) {
        const LocalAttentionSource& s = p.source[i];
        if (!s.key.data) continue;
        plan.source[plan.num_sources] = i;
        plan.ring[plan.num_sources] =
            minimum(s.rows, (plan.tile_rows - 1 + s.ratio_rows - 1) / s.ratio_rows + 1 + 2 * s.reach_rows);
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

// One head of one image, or a band of its rows.
struct Unit {
    int batch, head, band;
    int64_t index;

    Unit(const Plan& plan, int64_t index)
        : batch((int)(index / plan.bands / plan.problem->heads)),
          head((int)(index / plan.bands % plan.problem->heads)),
          band((int)(index % plan.bands)),
          index(index) {}
};

// The first number of a head in a tensor.
template <class S>
inline S* head_of(const LocalAttentionTensor& t, const Unit& unit) {
    return (S*)t.data + unit.batch * t.batch_stride + unit.head * t.head_stride;
}

// Memory cut from one block: a first pass without a base counts, the second hands out. Pieces start at cache lines.
class Arena {
    static constexpr size_t LINE = 64;
    void* memory = nullptr;
    uintptr_t base = 0;
    size_t used = 0;

public:
    template <class T>
    T* take(int64_t count) {
        T* at = (T*)(base + used);
        used += ((size_t)count * sizeof(T) + LINE - 1) & ~(LINE - 1);
        return at;
    }
    // Allocates what has been counted, and starts to hand it out. False where there is no memory.
    bool allocate() {
        memory = malloc(used + LINE);  // aligned by hand, which works with every C library
        base = ((uintptr_t)memory + LINE - 1) & ~(uintptr_t)(LINE - 1);
        used = 0;
        return memory;
    }
    Arena() = default;
    Arena(const Arena&) = delete;
    ~Arena() { free(memory); }
};

}  // namespace
#endif
