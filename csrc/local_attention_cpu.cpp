/*
 * Local attention on the CPU, forward and backward, fused, vectorised and threaded.
 *
 * This file is compiled once per instruction set, see cpu_kernels.h.
 *
 * Work is cut into units: one head of one image, or a band of its rows. A unit goes through its rows of tiles from top
 * to bottom. A tile is 16 queries (4x4 cells, or another shape that suits the window), which sit in the lanes of the
 * vectors. The keys that they see form a rectangle on each source; a bit mask of 16 lanes per key says which queries
 * see it. The products are then small dense ones:
 *
 *   scores[key][lane] = sum over d of key[key][d] * query[d][lane]
 *   output[lane][d]   = sum over keys of weight[key][lane] * value[key][d]
 *
 * (key elements are broadcast from memory, the query is transposed)
 * and, in the backward, the same two kernels with other operands, and one that adds an outer product to the gradients
 * of the keys. The softmax needs no work across lanes. Rows of keys are copied once per unit into a ring of float (or
 * double) rows, which turns strides and half precision into contiguous memory that stays in the cache. Gradients of
 * keys and values gather in a ring beside it, and a row is written when no later query can see it: no atomics, and the
 * result does not depend on the number of threads unless rows are split.
 */
#include "cpu_kernels.h"
#include "local_attention_cpu_keys.h"

namespace {

// What a thread does with the units that it takes. T: of the arithmetic, S: of the tensors.
template <class T, class S, int PITCH>
class Worker {
    typedef Keys<T, S, PITCH> Source;

    Plan& plan;
    const LocalAttentionProblem& p;
    const int head_dim, padded_dim;
    Source sources[LOCAL_ATTENTION_SOURCES];
    Run<T>* runs;
    T *scores, *grad_scores;          // (keys, lanes)
    T *query, *grad;                  // of the tile: (dimensions, lanes)
    T *query_rows, *grad_rows, *out;  // of the tile: (lanes, dimensions)
    Unit unit;

    void lay_out(Arena& arena) {
        int most_runs = 0;
        int64_t most_keys = 0;
        for (int i = 0; i < plan.num_sources; i++) {
            sources[i].lay_out(plan, i, arena);
            most_runs += sources[i].ring;
            most_keys += (int64_t)sources[i].ring * sources[i].most_columns;
        }
        runs = arena.take<Run<T>>(most_runs);
        scores = arena.take<T>(most_keys * LANES);
        grad_scores = plan.grad_scores ? arena.take<T>(most_keys * LANES) : nullptr;
        for (T** tile : {&query, &grad, &query_rows, &grad_rows, &out}) *tile = arena.take<T>(PITCH * LANES);
    }

    // The keys that a tile sees, row by row; returns the number of rows.
    int find_runs(int tile) {
        int count = 0, start = 0;
        for (int i = 0; i < plan.num_sources; i++)
            for (int row = sources[i].row; row < sources[i].end; row++) {
                runs[count] = sources[i].run(tile, row, start);
                start += runs[count++].count;
            }
        return count;
    }

    // Position of a lane of the tile at (y, x), or -1 off the grid.
    int64_t position_of(int lane, int y, int x) const {
        const int row = y + lane / plan.tile_columns, column = x + lane % plan.tile_columns;
        return row < p.rows && column < p.columns ? (int64_t)row * p.columns + column : -1;
    }

    void read_tile(T* to, const LocalAttentionTensor& t, int y, int x) const {
        const S* from = head_of<const S>(t, unit);
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t position = position_of(lane, y, x);
            if (position < 0)
                memset(to + lane * PITCH, 0, padded_dim * sizeof(T));
            else
                copy_row(to + lane * PITCH, from + position * t.position_stride, head_dim, padded_dim);
        }
    }

    void write_tile(const LocalAttentionTensor& t, const T* from, const T* factors, int y, int x) const {
        S* to = head_of<S>(t, unit);
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t position = position_of(lane, y, x);
            if (position < 0) continue;
            S* row = to + position * t.position_stride;
            for (int d = 0; d < head_dim; d++) narrow(from[lane * PITCH + d] * factors[lane], row + d);
        }
    }

    int64_t positions() const { return (int64_t)p.rows * p.columns; }
    // The numbers of this head in a tensor of (batch, heads, positions).
    T* of_head(const void* numbers) const {
        return (T*)numbers + ((int64_t)unit.batch * p.heads + unit.head) * positions();
    }
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
            logsumexp[position] = sum == 0              ? -(T)INFINITY
                                  : most == lowest<T>() ? most
                                                        : (T)(((double)most + log_sum) / LOG2_E);
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
        // Through the softmax. The sum is taken from the weights and not from the output, which half precision has
        // rounded.
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

    void compute(const Unit& which) {
        unit = which;
        for (int i = 0; i < plan.num_sources; i++) sources[i].start(unit);
        const int last = minimum(plan.tiles_down, (unit.band + 1) * plan.tiles_per_band);
        for (int down = unit.band * plan.tiles_per_band; down < last; down++) {
            const int y = down * plan.tile_rows;
            for (int i = 0; i < plan.num_sources; i++) {
                sources[i].find_rows(y);
                sources[i].fill(unit);
            }
            for (int tile = 0; tile < plan.tiles_across; tile++) {
                if (plan.backward)
                    backward_tile(tile, y, tile * plan.tile_columns);
                else
                    forward_tile(tile, y, tile * plan.tile_columns);
            }
        }
        if (plan.backward)
            for (int i = 0; i < plan.num_sources; i++) sources[i].finish(unit);
    }

    // Takes tasks, until none is left, with memory of its own.
    template <class F>
    static void work(Plan& plan, int64_t tasks, F task) {
        Worker worker(plan);
        Arena arena;
        worker.lay_out(arena);
        if (!arena.allocate()) {
            __atomic_store_n(&plan.failed, 1, __ATOMIC_RELAXED);
            return;
        }
        worker.lay_out(arena);
        for (int i = 0; i < plan.num_sources; i++) worker.sources[i].find_columns();
        for (int64_t next; (next = __atomic_fetch_add(&plan.next, 1, __ATOMIC_RELAXED)) < tasks;) task(worker, next);
    }

public:
    explicit Worker(Plan& plan)
        : plan(plan), p(*plan.problem), head_dim(p.head_dim), padded_dim(plan.padded_dim), unit(plan, 0) {}

    static void compute_units(void* data) {
        Plan& plan = *(Plan*)data;
        const int64_t units = (int64_t)plan.problem->batch * plan.problem->heads * plan.bands;
        work(plan, units, [&](Worker& worker, int64_t index) { worker.compute(Unit(plan, index)); });
    }

    // Adds up the partial gradients of the bands: a task is one source of one head.
    static void add_up_bands(void* data) {
        Plan& plan = *(Plan*)data;
        const int64_t tasks = (int64_t)plan.problem->batch * plan.problem->heads * plan.num_sources;
        work(plan, tasks, [&](Worker& worker, int64_t index) {
            const Unit first(plan, index / plan.num_sources * plan.bands);
            worker.sources[index % plan.num_sources].add_up(first);
        });
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
    parallel(Worker<T, S, PITCH>::compute_units, &plan, threads, p.parallel);
    if (plan.partial) {
        plan.next = 0;
        if (!plan.failed) parallel(Worker<T, S, PITCH>::add_up_bands, &plan, threads, p.parallel);
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
