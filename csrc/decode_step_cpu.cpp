/*
 * One or more tokens for a few sequences through CogLM on the CPU, see decode_step.h. Compiled once per instruction
 * set, see cpu_kernels.h.
 *
 * The step is a list of phases, each of which needs the one before it: norms, products, attention. A phase is cut into
 * units (rows of a matrix, a token, a head), which the threads take one after the other; a thread that finds none
 * left waits until all are done. So the work is shared well however many threads there really are, and no sum depends
 * on their number, nor on how many tokens are read together.
 */
#include <float.h>
#include <sched.h>

#include "cpu_kernels.h"
#include "cpu_vectors.h"

namespace {

// Tokens, and rows of a matrix for them, whose sums are in registers at once.
constexpr int MOST_TOGETHER = VECTOR_BYTES == 64 ? 8 : 4;
constexpr int rows_together(int tokens) { return tokens <= (VECTOR_BYTES == 64 ? 4 : 2) ? 4 : 3; }
constexpr int BYTES_TOGETHER = 1 << 16;  // of a matrix, which stay in the cache while all tokens are multiplied

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
    if (k < inputs) {  // in whole vectors too, so that the sums of no size of a tile are rounded in another way
        V weight[ROWS];
        for (int r = 0; r < ROWS; r++) weight[r] = read_some(w + (int64_t)r * inputs + k, inputs - k);
        for (int m = 0; m < M; m++) {
            const V value = read_some(x + (int64_t)m * inputs + k, inputs - k);
            for (int r = 0; r < ROWS; r++) acc[r][m] += weight[r] * value;
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int m = 0; m < M; m++) sums[r][m] = sum(acc[r][m]);
}

// Rows `from`..`to` of y[m][row] = w[row] . x[m] + bias[row] for M tokens.
template <class S, int M>
void multiply_rows(const S* w, const S* bias, const float* x, float* y, int inputs, int outputs, int from, int to) {
    constexpr int ROWS = rows_together(M);
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

// The same for any number of tokens, a few at a time while the rows are in the cache.
template <class S, int M = MOST_TOGETHER>
void multiply_rows(
    int tokens, const S* w, const S* bias, const float* x, float* y, int inputs, int outputs, int from, int to) {
    for (; tokens >= M; tokens -= M, x += (int64_t)M * inputs, y += (int64_t)M * outputs)
        multiply_rows<S, M>(w, bias, x, y, inputs, outputs, from, to);
    if constexpr (M > 1) {
        if (tokens) multiply_rows<S, M - 1>(tokens, w, bias, x, y, inputs, outputs, from, to);
    }
}

// ------------------------------------------------------------------------------------------------------------- phases

// What the threads share: taken and finished units of a phase, and the activations.
struct alignas(64) Count {
    int taken, done;
};

struct Scratch {
    Count* counts;
    float *states, *normed, *projected, *attended, *fed;  // (sequences, news, ...)
    int64_t bytes, num_counts;

    Scratch(const DecodeStep& s, void* memory) {
        char* start = (char*)memory;
        bytes = 0;
        auto take = [&](int64_t count, int64_t size) {
            void* at = start + bytes;
            bytes += (count * size + 63) / 64 * 64;
            return at;
        };
        const int64_t m = (int64_t)s.sequences * s.news;
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
    const int head_dim, tokens;  // the latter of all sequences
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

    // y = x W^T + bias of m tokens, and then `after` on each run of results (first, number).
    template <class F>
    void product(const DecodeParameters& p, int m, const float* x, float* y, int inputs, int outputs, F after) {
        // large enough that taking a unit costs nothing beside it, small enough that the threads end together and that
        // the rows stay in the cache
        int rows = outputs / (8 * s.threads);
        const int64_t fit = m > MOST_TOGETHER ? BYTES_TOGETHER / ((int64_t)inputs * sizeof(S)) : 60;
        rows = rows < fit ? rows : (int)fit;
        rows = rows < 12 ? 12 : rows > 60 ? 60 : rows / 12 * 12;
        phase((outputs + rows - 1) / rows, [&](int unit) {
            const int from = unit * rows, to = from + rows < outputs ? from + rows : outputs;
            multiply_rows<S>(m, (const S*)p.weight, (const S*)p.bias, x, y, inputs, outputs, from, to);
            for (int row = 0; row < m; row++) after(y + (int64_t)row * outputs + from, to - from);
        });
    }
    void product(const DecodeParameters& p, int m, const float* x, float* y, int inputs, int outputs) {
        product(p, m, x, y, inputs, outputs, [](float*, int) {});
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

    void embed(int token) {
        const S* word = (const S*)s.word_embeddings + s.input_ids[token] * s.hidden;
        const S* position = (const S*)s.position_embeddings + s.position_ids[token] * s.hidden;
        float* to = scratch.states + (int64_t)token * s.hidden;
        for (int k = 0; k < s.hidden; k++) to[k] = widen(word[k]) + widen(position[k]);
    }

    // One head of one sequence: the keys and values of its new tokens go to the cache, and each attends to all that is
    // there before it, and to itself.
    void attend(const DecodeLayer& layer, int m, int head) {
        const int64_t part = (int64_t)s.capacity * head_dim, values_after = (int64_t)s.sequences * s.heads * part;
        float* keys = layer.cache + ((int64_t)m * s.heads + head) * part;
        float* values = keys + values_after;
        const int64_t length = s.lengths[m], first = (int64_t)m * s.news;
        const float* query = scratch.projected + first * 3 * s.hidden + head * head_dim;
        for (int64_t i = 0; i < s.news; i++) {
            const float* from = query + i * 3 * s.hidden;
            memcpy(keys + (length + i) * head_dim, from + s.hidden, head_dim * sizeof(float));
            memcpy(values + (length + i) * head_dim, from + 2 * s.hidden, head_dim * sizeof(float));
        }
        float* to = scratch.attended + first * s.hidden + head * head_dim;
        for (int64_t i = 0; i < s.news; i++)
            attend_one(
                query + i * 3 * s.hidden, keys, values, s.bias + (int64_t)m * s.capacity, (int)(length + i + 1),
                to + i * s.hidden);
    }

    void attend_one(
        const float* query, const float* keys, const float* values, const float* bias, int count, float* to) const {
        constexpr int TOGETHER = 4;  // keys whose sums do not wait for one another
        const float scale = 1 / sqrtf((float)head_dim);
        alignas(64) float scores[DECODE_STEP_MAX_KEYS + W];
        float largest = -FLT_MAX;
        auto note = [&](int j, float score) {
            const float in_log2 = (score * scale + bias[j]) * (float)LOG2_E;
            scores[j] =
                in_log2 < -FLT_MAX ? -FLT_MAX : in_log2;  // finite, so that keys that are all hidden share the weight
            largest = scores[j] > largest ? scores[j] : largest;
        };
        int j = 0;
        for (; j + TOGETHER <= count; j += TOGETHER) {
            float sums[TOGETHER][1];
            dot_products<float, TOGETHER, 1>(keys + (int64_t)j * head_dim, query, head_dim, sums);
            for (int i = 0; i < TOGETHER; i++) note(j + i, sums[i][0]);
        }
        for (; j < count; j++) {
            float sums[1][1];
            dot_products<float, 1, 1>(keys + (int64_t)j * head_dim, query, head_dim, sums);
            note(j, sums[0][0]);
        }
        for (; j % W; j++) scores[j] = -INFINITY;
        V total = V{};
        for (j = 0; j < count; j += W) {
            const V p = exp2<float>(load(scores + j) - largest);
            store(scores + j, p);
            total += p;
        }
        const float inverse = 1 / sum(total);
        int d = 0;
        for (; d + TOGETHER * W <= head_dim; d += TOGETHER * W)
            weigh<TOGETHER>(scores, values + d, count, inverse, to + d);
        for (; d + W <= head_dim; d += W) weigh<1>(scores, values + d, count, inverse, to + d);
        for (; d < head_dim; d++) {
            float acc = 0;
            for (j = 0; j < count; j++) acc += scores[j] * values[(int64_t)j * head_dim + d];
            to[d] = acc * inverse;
        }
    }

    // The weighted mean of N vectors of the values.
    template <int N>
    void weigh(const float* weights, const float* values, int count, float inverse, float* to) const {
        V acc[N];
        for (int n = 0; n < N; n++) acc[n] = V{};
        for (int j = 0; j < count; j++)
            for (int n = 0; n < N; n++) acc[n] += weights[j] * read(values + (int64_t)j * head_dim + n * W);
        for (int n = 0; n < N; n++) write(to + n * W, acc[n] * inverse);
    }

public:
    Step(const DecodeStep& s, const Scratch& scratch)
        : s(s), scratch(scratch), head_dim(s.hidden / s.heads), tokens(s.sequences * s.news), count(scratch.counts) {}

    void run() {
        const int hidden = s.hidden;
        auto row = [&](float* of, int m) { return of + (int64_t)m * hidden; };
        for (int index = 0; index < s.layers; index++) {
            const DecodeLayer& layer = s.layer[index];
            phase(tokens, [&](int m) {
                if (index == 0)
                    embed(m);
                else
                    layer_norm(
                        s.layer[index - 1].mlp_output_layernorm, row(scratch.projected, m), row(scratch.states, m),
                        true);
                layer_norm(layer.attention_layernorm, row(scratch.states, m), row(scratch.normed, m), false);
            });
            product(layer.query_key_value, tokens, scratch.normed, scratch.projected, hidden, 3 * hidden);
            phase(s.sequences * s.heads, [&](int unit) { attend(layer, unit / s.heads, unit % s.heads); });
            product(layer.dense, tokens, scratch.attended, scratch.projected, hidden, hidden);
            phase(tokens, [&](int m) {
                layer_norm(layer.attention_output_layernorm, row(scratch.projected, m), row(scratch.states, m), true);
                layer_norm(layer.mlp_layernorm, row(scratch.states, m), row(scratch.normed, m), false);
            });
            product(
                layer.dense_h_to_4h, tokens, scratch.normed, scratch.fed, hidden, s.intermediate,
                [](float* y, int number) {
                    int k = 0;
                    for (; k + W <= number; k += W) write(y + k, gelu(read(y + k)));
                    if (k < number) {
                        float rest[W] = {};
                        memcpy(rest, y + k, (number - k) * sizeof(float));
                        write(rest, gelu(read(rest)));
                        memcpy(y + k, rest, (number - k) * sizeof(float));
                    }
                });
            product(layer.dense_4h_to_h, tokens, scratch.fed, scratch.projected, s.intermediate, hidden);
        }
        // what is not scored ends here
        phase(s.sequences * s.scored, [&](int unit) {
            const int m = unit / s.scored * s.news + s.news - s.scored + unit % s.scored;
            layer_norm(
                s.layer[s.layers - 1].mlp_output_layernorm, row(scratch.projected, m), row(scratch.states, m), true);
            layer_norm(s.final_layernorm, row(scratch.states, m), row(scratch.normed, unit), false);
        });
        product({s.word_embeddings, nullptr}, s.sequences * s.scored, scratch.normed, s.logits, hidden, s.tokens);
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
