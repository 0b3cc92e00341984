/*
 * The keys of one source as a thread of local attention on the CPU holds them. See local_attention_cpu.cpp.
 */
#ifndef LOCAL_ATTENTION_CPU_KEYS_H
#define LOCAL_ATTENTION_CPU_KEYS_H

#include <initializer_list>

#include "local_attention_cpu_plan.h"

namespace {

// The keys and values of one source as a thread holds them: a few rows at a time, in rings, with their gradients, and
// which lanes of a tile see which of them. T: of the arithmetic, S: of the tensors.
template <class T, class S, int PITCH>
struct Keys {
    const Plan* plan;
    const LocalAttentionSource* source;
    int64_t partial_at;  // where its part of the partial gradients of a unit starts
    int ring;            // rows of keys held at a time

    T *key, *value, *grad_key, *grad_value;  // the rings; null for gradients that are not wanted
    T* bias;                                 // of all keys, in units of log 2, or null
    T *partial_key, *partial_value;          // with several bands: where the gradients of this band go
    int first_row, packed_to;                // of the band, and one past the last row that has been in the rings
    int row, end;                            // rows that the current row of tiles sees
    uint16_t *rows, *before, *same;          // lanes that see them, by their row alone
    int *column, *column_end;                // for each tile across: the columns that it sees
    int most_columns;                        // of any tile
    uint16_t *columns, *upto;  // (tiles across, most_columns): lanes that see them, by their column alone

    // Numbers in a row of the rings.
    int64_t row_size() const { return (int64_t)source->columns * PITCH; }
    int64_t slot(int row) const { return row % ring * row_size(); }

    void lay_out(const Plan& of, int index, Arena& arena) {
        plan = &of;
        source = &of.problem->source[of.source[index]];
        partial_at = of.partial_at[index];
        ring = of.ring[index];
        const LocalAttentionSource& s = *source;
        const bool wants_key = of.backward && s.grad_key.data, wants_value = of.backward && s.grad_value.data;
        key = arena.take<T>(ring * row_size());
        value = arena.take<T>(ring * row_size());
        grad_key = wants_key ? arena.take<T>(ring * row_size()) : nullptr;
        grad_value = wants_value ? arena.take<T>(ring * row_size()) : nullptr;
        bias = s.bias ? arena.take<T>((int64_t)s.rows * s.columns) : nullptr;
        rows = arena.take<uint16_t>(ring);
        before = arena.take<uint16_t>(ring);
        same = arena.take<uint16_t>(ring);
        column = arena.take<int>(of.tiles_across);
        column_end = arena.take<int>(of.tiles_across);
        const int centers = (of.tile_columns - 1 + s.ratio_columns - 1) / s.ratio_columns + 1;
        most_columns = minimum(s.columns, centers + 2 * s.reach_columns);
        columns = arena.take<uint16_t>((int64_t)of.tiles_across * most_columns);
        upto = arena.take<uint16_t>((int64_t)of.tiles_across * most_columns);
    }

    // Lanes that see each column, for every tile across: the same in all rows of tiles.
    void find_columns() {
        const LocalAttentionSource& s = *source;
        for (int tile = 0; tile < plan->tiles_across; tile++) {
            const int x = tile * plan->tile_columns,
                      last = minimum(plan->problem->columns, x + plan->tile_columns) - 1;
            const Range seen = keys_seen(s.columns, s.reach_columns, s.ratio_columns, false, x, last);
            column[tile] = seen.from, column_end[tile] = seen.to;
            for (int k = seen.from; k < seen.to; k++) {
                uint16_t near = 0, not_after = 0;
                for (int lane = 0; lane < LANES; lane++) {
                    const int at = x + lane % plan->tile_columns, center = at / s.ratio_columns;
                    if (at > last) continue;
                    near |= (uint16_t)(abs(k - center) <= s.reach_columns) << lane;
                    not_after |= (uint16_t)(k <= center) << lane;
                }
                columns[(int64_t)tile * most_columns + k - seen.from] = near;
                upto[(int64_t)tile * most_columns + k - seen.from] = not_after;
            }
        }
    }

    // Rows that the row of tiles from row y of the queries on sees, and the lanes that see each.
    void find_rows(int y) {
        const LocalAttentionSource& s = *source;
        const int last = minimum(plan->problem->rows, y + plan->tile_rows) - 1;
        const Range seen = keys_seen(s.rows, s.reach_rows, s.ratio_rows, s.causal, y, last);
        row = seen.from, end = seen.to;
        for (int k = row; k < end; k++) {
            uint16_t near = 0, above = 0, equal = 0;
            for (int lane = 0; lane < LANES; lane++) {
                const int at = y + lane / plan->tile_columns, center = at / s.ratio_rows;
                if (at > last) continue;
                near |= (uint16_t)(abs(k - center) <= s.reach_rows) << lane;
                above |= (uint16_t)(k < center) << lane;
                equal |= (uint16_t)(k == center) << lane;
            }
            rows[k - row] = near;
            before[k - row] = s.causal ? above : 0xffff;
            same[k - row] = s.causal ? equal : 0;
        }
    }

    // Begins a unit: nothing is in the rings yet.
    void start(const Unit& unit) {
        const Range band = rows_of_band(*plan, *source, unit.band);
        first_row = packed_to = band.from;
        if (bias) {
            const T* from = (const T*)source->bias + unit.batch * source->bias_stride;
            const int64_t keys = (int64_t)source->rows * source->columns;
            for (int64_t k = 0; k < keys; k++) bias[k] = to_log2(from[k]);
        }
        partial_key = partial_value = nullptr;
        if (plan->partial) {
            partial_key = (T*)plan->partial + unit.index * plan->partial_size + partial_at;
            partial_value = partial_key + (band.to - band.from) * row_size();
        }
    }

    // Copies the rows that the current row of tiles needs and that are not in the rings yet, in place of the oldest.
    void fill(const Unit& unit) {
        const LocalAttentionSource& s = *source;
        const int head_dim = plan->problem->head_dim;
        for (int r = maximum(packed_to, row); r < end; r++) {
            if (plan->backward && r - ring >= first_row) write_gradients(unit, r - ring);
            for (T* grad : {grad_key, grad_value})
                if (grad) memset(grad + slot(r), 0, row_size() * sizeof(T));
            const int64_t position = (int64_t)r * s.columns;
            const S* from_key = head_of<const S>(s.key, unit) + position * s.key.position_stride;
            const S* from_value = head_of<const S>(s.value, unit) + position * s.value.position_stride;
            T *to_key = key + slot(r), *to_value = value + slot(r);
            for (int64_t x = 0; x < s.columns; x++) {
                copy_row(to_key + x * PITCH, from_key + x * s.key.position_stride, head_dim, plan->padded_dim);
                copy_row(to_value + x * PITCH, from_value + x * s.value.position_stride, head_dim, plan->padded_dim);
            }
        }
        packed_to = maximum(packed_to, end);
    }

    // Ends a unit: the gradients that are still in the rings.
    void finish(const Unit& unit) {
        for (int r = maximum(first_row, packed_to - ring); r < packed_to; r++) write_gradients(unit, r);
    }

    // The part of a row of the rings that a tile sees.
    Run<T> run(int tile, int r, int start) const {
        const int64_t at = slot(r) + (int64_t)column[tile] * PITCH;
        Run<T> run;
        run.key = key + at, run.value = value + at;
        run.grad_key = grad_key ? grad_key + at : nullptr;
        run.grad_value = grad_value ? grad_value + at : nullptr;
        run.bias = bias ? bias + (int64_t)r * source->columns + column[tile] : nullptr;
        run.columns = columns + (int64_t)tile * most_columns;
        run.upto = upto + (int64_t)tile * most_columns;
        run.rows = rows[r - row], run.before = before[r - row], run.same = same[r - row];
        run.count = column_end[tile] - column[tile];
        run.start = start;
        return run;
    }

    void write_gradients(const Unit& unit, int r) {
        write_gradient(unit, r, grad_key, source->grad_key, partial_key, (T)plan->problem->scale);
        write_gradient(unit, r, grad_value, source->grad_value, partial_value, (T)1);
    }

    // A row of a ring goes to its tensor, or to the partial gradients of the band.
    void write_gradient(
        const Unit& unit, int r, const T* of, const LocalAttentionTensor& grad, T* partial, T factor) const {
        if (!of) return;
        if (partial)
            memcpy(partial + (r - first_row) * row_size(), of + slot(r), row_size() * sizeof(T));
        else
            write_row(unit, r, of + slot(r), grad, factor);
    }

    void write_row(const Unit& unit, int r, const T* from, const LocalAttentionTensor& grad, T factor) const {
        S* to = head_of<S>(grad, unit) + (int64_t)r * source->columns * grad.position_stride;
        for (int x = 0; x < source->columns; x++, from += PITCH, to += grad.position_stride)
            for (int d = 0; d < plan->problem->head_dim; d++) narrow(from[d] * factor, to + d);
    }

    // Adds up the partial gradients of all bands of a head, whose first unit this is.
    void add_up(const Unit& first) {
        add_up(first, grad_key, source->grad_key, 0, (T)plan->problem->scale);
        add_up(first, grad_value, source->grad_value, 1, (T)1);
    }

    void add_up(const Unit& first, T* sum, const LocalAttentionTensor& grad, int part, T factor) {
        if (!sum) return;  // else one row of the ring
        for (int r = 0; r < source->rows; r++) {
            memset(sum, 0, row_size() * sizeof(T));
            for (int band = 0; band < plan->bands; band++) {
                const Range rows = rows_of_band(*plan, *source, band);
                if (r < rows.from || r >= rows.to) continue;
                const T* add = (const T*)plan->partial + (first.index + band) * plan->partial_size + partial_at;
                add += (part * (rows.to - rows.from) + r - rows.from) * row_size();
                for (int64_t k = 0; k < row_size(); k++) sum[k] += add[k];
            }
            write_row(first, r, sum, grad, factor);
        }
    }
};

}  // namespace
#endif
