/*
 * One token for a few sequences through CogLM on the CPU, see decode_step.h. Compiled once per instruction set, see
 * cpu_kernels.h.
 *
 * The step is a list of phases, each of which needs the one before it: norms, products, attention. A phase is cut into
 * units (rows of a matrix, a sequence, a head), which the threads take one after the other; a thread that finds none
 * left waits until all are done. So the work is shared well however many threads there really are, and no sum depends
 * on their number.
 */
#include <float.h>
#include <sched.h>

#include "cpu_kernels.h"
#include "cpu_vectors.h"

namespace {

constexpr int MOST_TOGETHER = 8;  // sequences whose sums are in registers at once

inline float sum(V v) {
    typedef float Four __attribute__((vector_size(16)));
    Four part[VECTOR_BYTES / 16];
    memcpy(part, &v, sizeof v);
    Four s = part[0];
    for (int i = 1; i < VECTOR_BYTES / 16; i++) s += part[i];
    return (s[0] + s[1]) + (s[2] + s[3]);
}

// ----------------------------------------------------------------------------------------------------------- products

// sums[r][m] = w[r] . x[m] over `inputs` numbers.
template <class S, int ROWS, int M>
inline void dot_products(const S* w, const float* x, int inputs, float (&sums)[ROWS][M]) {
    V acc[ROWS][M];
    for (int r = 0; r < ROWS; r++)
        for (int m = 0; m < M; m++) acc[r][m] = V{};
    int k = 0;
    for (; k + W <= inputs; k += W) {
        V weight[ROWS];
        for (int r = 0; r < ROWS; r++) weight[r] = read(w + (int64_t)r * inputs + k);
        for (int m = 0; m < M; m++) {
            const V value = read(x + (int64_t)m * inputs + k);
            for (int r = 0; r < ROWS; r++) acc[r][m] += weight[r] * value;
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int m = 0; m < M; m++) {
            sums[r][m] = sum(acc[r][m]);
            for (int rest = k; rest < inputs; rest++)
                sums[r][m] += widen(w[(int64_t)r * inputs + rest]) * x[(int64_t)m * inputs + rest];
        }
}

// Rows `from`..`to` of y[m][row] = w[row] . x[m] + bias[row] for M sequences.
template <class S, int M>
void multiply_rows(const S* w, const S* bias, const float* x, float* y, int inputs, int outputs, int from, int to) {
    constexpr int ROWS = M <= (VECTOR_BYTES == 64 ? 4 : 2) ? 4 : 2;  // what fits into the registers
    int row = from;
    for (; row + ROWS <= to; row += ROWS) {
        float sums[ROWS][M];
        dot_products<S, ROWS, M>(w + (int64_t)row * inputs, x, inputs, sums);
        for (int m = 0; m < M; m++)
            for (int r = 0; r < ROWS; r++)
                y[(int64_t)m * outputs + row + r] = sums[r][m] + (bias ? widen(bias[row + r]) : 0);
    }
    for (; row < to; row++) {
        float sums[1][M];
        dot_products<S, 1, M>(w + (int64_t)row * inputs, x, inputs, sums);
        for (int m = 0; m < M; m++) y[(int64_t)m * outputs + row] = sums[0][m] + (bias ? widen(bias[row]) : 0);
    }
}

// The same for any number of sequences, a few at a time while the rows are in the cache.
template <class S, int M = MOST_TOGETHER>
void multiply_rows(
    int sequences, const S* w, const S* bias, const float* x, float* y, int inputs, int outputs, int from, int to) {
    if (sequences >= M) {
        multiply_rows<S, M>(w, bias, x, y, inputs, outputs, from, to);
        multiply_rows<S, M>(
            sequences - M, w, bias, x + (int64_t)M * inputs, y + (int64_t)M * outputs, inputs, outputs, from, to);
    } else if constexpr (M > 1) {
        multiply_rows<S, M - 1>(sequences, w, bias, x, y, inputs, outputs, from, to);
    }
}

// ------------------------------------------------------------------------------------------------------------- phases

// What the threads share: taken and finished units of a phase, and the activations.
struct alignas(64) Count {
    int taken, done;
};

struct Scratch {
    Count* counts;
    float *states, *normed, *projected, *attended, *fed;  // (sequences, ...)
    int64_t bytes, num_counts;

    Scratch(const DecodeStep& s, void* memory) {
        char* start = (char*)memory;
        bytes = 0;
        auto take = [&](int64_t count, int64_t size) {
            void* at = start + bytes;
            bytes += (count * size + 63) / 64 * 64;
            return at;
        };
        const int64_t m = s.sequences;
        num_counts = 7 * (int64_t)s.layers + 2;
        counts = (Count*)take(num_counts, sizeof(Count));
        states = (float*)take(m * s.hidden, 4);
        normed = (float*)take(m * s.hidden, 4);
        projected = (float*)take(m * 3 * s.hidden, 4);
        attended = (float*)take(m * s.hidden, 4);
        fed = (float*)take(m * s.intermediate, 4);
    }
};

inline void wait_a_little(int round) {
    if (round % 256 == 255) {
        sched_yield();  // another process may hold the core of whom we wait for
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <class S>
class Step {
    const DecodeStep& s;
    Scratch scratch;
    const int head_dim;
    Count* count;

    template <class F>
    void phase(int units, F work) {
        for (int unit; (unit = __atomic_fetch_add(&count->taken, 1, __ATOMIC_RELAXED)) < units;) {
            work(unit);
            __atomic_fetch_add(&count->done, 1, __ATOMIC_RELEASE);
        }
        for (int round = 0; __atomic_load_n(&count->done, __ATOMIC_ACQUIRE) < units; round++) wait_a_little(round);
        count++;
    }

    // y = x W^T + bias, and then `after` on each run of results (first, number).
    template <class F>
    void product(const DecodeParameters& p, const float* x, float* y, int inputs, int outputs, F after) {
        // large enough that taking a unit costs nothing beside it, small enough that the threads end together
        int rows = outputs / (8 * s.threads);
        rows = rows < 8 ? 8 : rows > 64 ? 64 : rows / 4 * 4;
        phase((outputs + rows - 1) / rows, [&](int unit) {
            const int from = unit * rows, to = from + rows < outputs ? from + rows : outputs;
            multiply_rows<S>(s.sequences, (const S*)p.weight, (const S*)p.bias, x, y, inputs, outputs, from, to);
            for (int m = 0; m < s.sequences; m++) after(y + (int64_t)m * outputs + from, to - from);
        });
    }
    void product(const DecodeParameters& p, const float* x, float* y, int inputs, int outputs) {
        product(p, x, y, inputs, outputs, [](float*, int) {});
    }

    // to = norm(x), or to += norm(x)
    void layer_norm(const DecodeParameters& p, const float* x, float* to, bool add) const {
        const int size = s.hidden;
        V total = V{};
        int k = 0;
        for (; k + W <= size; k += W) total += read(x + k);
        float mean = sum(total);
        for (; k < size; k++) mean += x[k];
        mean /= size;
        V squares = V{};
        for (k = 0; k + W <= size; k += W) {
            const V d = read(x + k) - mean;
            squares += d * d;
        }
        float variance = sum(squares);
        for (; k < size; k++) variance += (x[k] - mean) * (x[k] - mean);
        const float scale = 1 / sqrtf(variance / size + (float)s.epsilon);
        const S *weight = (const S*)p.weight, *bias = (const S*)p.bias;
        for (k = 0; k + W <= size; k += W) {
            const V v = (read(x + k) - mean) * scale * read(weight + k) + read(bias + k);
            write(to + k, add ? read(to + k) + v : v);
        }
        for (; k < size; k++) {
            const float v = (x[k] - mean) * scale * widen(weight[k]) + widen(bias[k]);
            to[k] = add ? to[k] + v : v;
        }
    }

    void embed(int m) {
        const S* word = (const S*)s.word_embeddings + s.input_ids[m * s.input_stride] * s.hidden;
        const S* position = (const S*)s.position_embedding;
        float* to = scratch.states + (int64_t)m * s.hidden;
        for (int k = 0; k < s.hidden; k++) to[k] = widen(word[k]) + widen(position[k]);
    }

    // One head of one sequence: its key and value go to the cache, and it attends to all that is there.
    void attend(const DecodeLayer& layer, int m, int head) {
        const float* query = scratch.projected + (int64_t)m * 3 * s.hidden + head * head_dim;
        const int64_t part = (int64_t)s.capacity * head_dim, values_after = (int64_t)s.sequences * s.heads * part;
        float* keys = layer.cache + ((int64_t)m * s.heads + head) * part;
        float* values = keys + values_after;
        memcpy(keys + (int64_t)s.length * head_dim, query + s.hidden, head_dim * sizeof(float));
        memcpy(values + (int64_t)s.length * head_dim, query + 2 * s.hidden, head_dim * sizeof(float));

        const int count = s.length + 1;
        const float *bias = s.bias + (int64_t)m * s.capacity, scale = 1 / sqrtf((float)head_dim);
        alignas(64) float scores[DECODE_STEP_MAX_KEYS + W];
        float largest = -FLT_MAX;
        for (int j = 0; j < count; j++) {
            const float* key = keys + (int64_t)j * head_dim;
            V acc = V{};
            int d = 0;
            for (; d + W <= head_dim; d += W) acc += read(query + d) * read(key + d);
            float score = sum(acc);
            for (; d < head_dim; d++) score += query[d] * key[d];
            const float in_log2 = (score * scale + bias[j]) * (float)LOG2_E;
            scores[j] =
                in_log2 < -FLT_MAX ? -FLT_MAX : in_log2;  // finite, so that keys that are all hidden share the weight
            largest = scores[j] > largest ? scores[j] : largest;
        }
        for (int j = count; j % W; j++) scores[j] = -INFINITY;
        V total = V{};
        for (int j = 0; j < count; j += W) {
            const V p = exp2<float>(load(scores + j) - largest);
            store(scores + j, p);
            total += p;
        }
        const float inverse = 1 / sum(total);
        float* to = scratch.attended + (int64_t)m * s.hidden + head * head_dim;
        int d = 0;
        for (; d + W <= head_dim; d += W) {
            V acc = V{};
            for (int j = 0; j < count; j++) acc += scores[j] * read(values + (int64_t)j * head_dim + d);
            write(to + d, acc * inverse);
        }
        for (; d < head_dim; d++) {
            float acc = 0;
            for (int j = 0; j < count; j++) acc += scores[j] * values[(int64_t)j * head_dim + d];
            to[d] = acc * inverse;
        }
    }

public:
    Step(const DecodeStep& s, const Scratch& scratch)
        : s(s), scratch(scratch), head_dim(s.hidden / s.heads), count(scratch.counts) {}

    void run() {
        const int hidden = s.hidden;
        auto row = [&](float* of, int m) { return of + (int64_t)m * hidden; };
        for (int index = 0; index < s.layers; index++) {
            const DecodeLayer& layer = s.layer[index];
            phase(s.sequences, [&](int m) {
                if (index == 0)
                    embed(m);
                else
                    layer_norm(
                        s.layer[index - 1].mlp_output_layernorm, row(scratch.projected, m), row(scratch.states, m),
                        true);
                layer_norm(layer.attention_layernorm, row(scratch.states, m), row(scratch.normed, m), false);
            });
            product(layer.query_key_value, scratch.normed, scratch.projected, hidden, 3 * hidden);
            phase(s.sequences * s.heads, [&](int unit) { attend(layer, unit / s.heads, unit % s.heads); });
            product(layer.dense, scratch.attended, scratch.projected, hidden, hidden);
            phase(s.sequences, [&](int m) {
                layer_norm(layer.attention_output_layernorm, row(scratch.projected, m), row(scratch.states, m), true);
                layer_norm(layer.mlp_layernorm, row(scratch.states, m), row(scratch.normed, m), false);
            });
            product(
                layer.dense_h_to_4h, scratch.normed, scratch.fed, hidden, s.intermediate, [](float* y, int number) {
                    int k = 0;
                    for (; k + W <= number; k += W) write(y + k, gelu(read(y + k)));
                    if (k < number) {
                        float rest[W] = {};
                        memcpy(rest, y + k, (number - k) * sizeof(float));
                        write(rest, gelu(read(rest)));
                        memcpy(y + k, rest, (number - k) * sizeof(float));
                    }
                });
            product(layer.dense_4h_to_h, scratch.fed, scratch.projected, s.intermediate, hidden);
        }
        phase(s.sequences, [&](int m) {
            layer_norm(
                s.layer[s.layers - 1].mlp_output_layernorm, row(scratch.projected, m), row(scratch.states, m), true);
            layer_norm(s.final_layernorm, row(scratch.states, m), row(scratch.normed, m), false);
        });
        product({s.word_embeddings, nullptr}, scratch.normed, s.logits, hidden, s.tokens);
    }
};

struct Call {
    const DecodeStep* step;
    const Scratch* scratch;
};

template <class S>
void run_step(void* data) {
    const Call& call = *(const Call*)data;
    Step<S>(*call.step, *call.scratch).run();
}

}  // namespace

int64_t CPU_KERNEL(decode_step_scratch)(const DecodeStep* s) { return Scratch(*s, nullptr).bytes; }

int CPU_KERNEL(decode_step)(const DecodeStep* s, Parallel parallel) {
    const Scratch scratch(*s, s->scratch);
    memset(scratch.counts, 0, scratch.num_counts * sizeof(Count));
    Call call = {s, &scratch};
    const Task task = s->dtype == DECODE_STEP_FLOAT32    ? run_step<float>
                      : s->dtype == DECODE_STEP_BFLOAT16 ? run_step<bfloat16>
                      : s->dtype == DECODE_STEP_FLOAT16  ? run_step<float16>
                                                         : nullptr;
    if (!task) return DECODE_STEP_UNSUPPORTED;
    parallel(task, &call, s->threads, s->parallel);
    return DECODE_STEP_OK;
}
