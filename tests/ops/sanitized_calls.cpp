/*
 * Random and extreme calls of the CPU kernels through their C interface, for the sanitizers. test_sanitizers.py
 * compiles this file together with csrc/ and runs it:
 *
 *     sanitized_calls local_attention|decode_step|gelu|linear FIRST_SEED COUNT
 *
 * Every tensor is a block of memory of its own that ends with its last number, begins at any multiple of the size of
 * a number, and is filled with NaNs (all bits set) wherever the kernel has nothing to read. So AddressSanitizer sees
 * whatever is read or written beyond a tensor, and the checks here what is read from or written to gaps inside of it.
 * Two callers work at a time, each with threads of its own, so that ThreadSanitizer sees what calls might share.
 */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "decode_step.h"
#include "gelu.h"
#include "linear.h"
#include "local_attention.h"

namespace {

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };  // as in all headers
constexpr unsigned char UNWRITTEN = 0xff;      // a NaN in every type, if all bytes are this

thread_local const char* kernel;
thread_local long seed;

void require(bool condition, const char* what) {
    if (condition) return;
    fprintf(stderr, "FAILED: %s, seed %ld: %s\n", kernel, seed, what);
    _Exit(1);
}

class Random {
    std::mt19937_64 engine;

public:
    explicit Random(long seed) : engine(seed) {}
    int64_t draw(int64_t low, int64_t high) { return low + (int64_t)(engine() % (uint64_t)(high - low + 1)); }
    bool once_in(int times) { return draw(1, times) == 1; }
    double number() { return draw(-1000, 1000) / 1000.0; }
    template <class T>
    T one_of(std::initializer_list<T> of) {
        return of.begin()[draw(0, (int64_t)of.size() - 1)];
    }
};

int64_t size_of(int dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }

// A number of at most 1 in size, rounded towards zero.
void put(char* at, int dtype, double number) {
    const float single = (float)number;
    uint32_t bits;
    memcpy(&bits, &single, 4);
    if (dtype == FLOAT64) memcpy(at, &number, 8);
    if (dtype == FLOAT32) memcpy(at, &single, 4);
    if (dtype == BFLOAT16 || dtype == FLOAT16) {
        const int exponent = (int)(bits >> 23 & 0xff) - 127 + 15;
        const uint32_t half = (bits >> 16 & 0x8000) | (exponent > 0 ? exponent << 10 | (bits >> 13 & 0x3ff) : 0);
        const uint16_t written = (uint16_t)(dtype == BFLOAT16 ? bits >> 16 : half);
        memcpy(at, &written, 2);
    }
}

bool is_finite(const char* at, int dtype) {
    double number;
    float single;
    uint16_t bits;
    switch (dtype) {
        case FLOAT64: return memcpy(&number, at, 8), isfinite(number);
        case FLOAT32: return memcpy(&single, at, 4), isfinite(single);
        case BFLOAT16: return memcpy(&bits, at, 2), (bits & 0x7f80) != 0x7f80;
        default: return memcpy(&bits, at, 2), (bits & 0x7c00) != 0x7c00;
    }
}

// So many numbers, which need not be aligned to more than their own size.
class Numbers {
    struct Free {
        void operator()(void* memory) const { free(memory); }
    };
    std::unique_ptr<char, Free> memory;
    int64_t lead;

public:
    int dtype;
    int64_t count;

    Numbers(Random& random, int dtype, int64_t count)
        : lead(random.draw(0, 2) * size_of(dtype)), dtype(dtype), count(count) {
        memory.reset((char*)malloc(lead + bytes()));
        memset(memory.get(), UNWRITTEN, lead + bytes());
    }
    static Numbers filled(Random& random, int dtype, int64_t count) {
        Numbers numbers(random, dtype, count);
        for (int64_t i = 0; i < count; i++) put(numbers.at(i), dtype, random.number());
        return numbers;
    }
    int64_t bytes() const { return count * size_of(dtype); }
    char* at(int64_t index) const { return memory.get() + lead + index * size_of(dtype); }
    template <class T>
    T* as() const {
        return (T*)at(0);
    }
    bool is_written(int64_t index) const {
        for (int64_t i = 0; i < size_of(dtype); i++)
            if ((unsigned char)at(index)[i] != UNWRITTEN) return true;
        return false;
    }
    bool all_finite() const {
        for (int64_t i = 0; i < count; i++)
            if (!is_finite(at(i), dtype)) return false;
        return true;
    }
};

// A tensor (batch, positions, heads, head_dim) with its axes in any order and gaps between them.
class Tensor {
    int64_t sizes[3], strides[3], head_dim;
    std::unique_ptr<Numbers> numbers;

    template <class F>
    void for_each_row(F f) const {
        for (int64_t b = 0; b < sizes[0]; b++)
            for (int64_t p = 0; p < sizes[1]; p++)
                for (int64_t h = 0; h < sizes[2]; h++) f(b * strides[0] + p * strides[1] + h * strides[2]);
    }

public:
    Tensor(Random& random, int dtype, int batch, int64_t positions, int heads, int head_dim, bool filled)
        : sizes{batch, positions, heads}, head_dim(head_dim) {
        int axes[3] = {0, 1, 2};
        for (int i = 2; i > 0; i--) std::swap(axes[i], axes[random.draw(0, i)]);
        int64_t extent = head_dim, last = head_dim;
        for (int axis : axes) {
            strides[axis] = extent + (random.once_in(3) ? random.draw(1, 5) : 0);
            last += (sizes[axis] - 1) * strides[axis];
            extent = sizes[axis] * strides[axis];
        }
        numbers = std::make_unique<Numbers>(random, dtype, last);
        if (filled)
            for_each_row([&](int64_t row) {
                for (int64_t d = 0; d < head_dim; d++) put(numbers->at(row + d), dtype, random.number());
            });
    }
    LocalAttentionTensor describe() const { return {numbers->at(0), strides[0], strides[1], strides[2]}; }
    // That every number was written, with one, and nothing between the rows.
    void require_written(const char* name) const {
        std::vector<bool> is_gap(numbers->count, true);
        bool finite = true;
        for_each_row([&](int64_t row) {
            for (int64_t d = 0; d < head_dim; d++) {
                is_gap[row + d] = false;
                finite = finite && is_finite(numbers->at(row + d), numbers->dtype);
            }
        });
        require(finite, (std::string(name) + " is not finite everywhere").c_str());
        for (int64_t i = 0; i < numbers->count; i++)
            require(!is_gap[i] || !numbers->is_written(i), (std::string(name) + ": a gap was written").c_str());
    }
};

// Stands for an OpenMP runtime, which may give fewer threads than were asked for.
void run_in_pool(void (*task)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < std::min(threads, 3u); i++) others.emplace_back(task, data);
    task(data);
    for (std::thread& other : others) other.join();
}
void* any_pool(Random& random) { return random.once_in(2) ? (void*)run_in_pool : nullptr; }

// ---------------------------------------------------------------------------------------------------- local attention

// A side of a window or a ratio: small, or the largest that is allowed.
int side(Random& random, int low, int high) {
    return random.once_in(12) ? LOCAL_ATTENTION_MAX_SIDE : (int)random.draw(low, high);
}

struct Source {
    Tensor key, value, grad_key, grad_value;
    Numbers bias;
};

// Geometry of one source; the centre of every window lies on its grid, and every row of keys is seen.
void draw_geometry(Random& random, const LocalAttentionProblem& p, LocalAttentionSource& s) {
    const int kind = (int)random.draw(0, 2);  // a window, a coarser one, a context
    s.ratio_rows = kind == 0 ? 1 : kind == 1 ? side(random, 1, 4) : std::max(p.rows, side(random, 1, 4));
    s.ratio_columns = kind == 0 ? 1 : kind == 1 ? side(random, 1, 4) : std::max(p.columns, side(random, 1, 4));
    s.rows = (p.rows - 1) / s.ratio_rows + 1;
    s.columns = (p.columns - 1) / s.ratio_columns + 1 + (int)(kind == 2 ? random.draw(0, 40) : 0);
    s.reach_rows = side(random, 0, 4);
    s.reach_columns = kind == 2 ? s.columns : side(random, 0, 4);
    s.causal = kind != 2 && random.once_in(3);
}

void fill_bias(Random& random, Numbers& bias) {
    for (int64_t i = 0; i < bias.count; i++) {
        const double most = bias.dtype == FLOAT64 ? DBL_MAX : FLT_MAX;
        const double number = random.once_in(4)    ? -INFINITY
                              : random.once_in(50) ? random.one_of({-most, -most / 3})
                                                   : random.number();
        if (bias.dtype == FLOAT64)
            bias.as<double>()[i] = number;
        else
            bias.as<float>()[i] = (float)number;
    }
}

void local_attention_case(Random& random) {
    LocalAttentionProblem p = {};
    p.abi = LOCAL_ATTENTION_ABI;
    p.dtype = (int)random.draw(FLOAT32, FLOAT16);
    p.batch = (int)random.draw(1, 2), p.heads = (int)random.draw(1, 3);
    p.head_dim = random.one_of({1, 3, 8, 16, 24, 33, 40, 64, 80, 127, 128});
    p.rows = (int)random.draw(1, 14), p.columns = (int)random.draw(1, 14);
    if (random.once_in(8)) p.rows = random.one_of({1, 50}), p.columns = p.rows == 1 ? 60 : 2;
    p.threads = random.once_in(20) ? LOCAL_ATTENTION_MAX_THREADS : (int)random.draw(1, 5);
    p.tile_rows = random.one_of({0, 0, 0, 1, 2, 4, 8, 16});
    p.isa = (int)random.draw(0, cpu_isa_selected() + 1);
    p.scale = random.once_in(2) ? 0.3 : 1 / sqrt(p.head_dim);
    // as many threads as there are bands would be too many to start for all but the smallest calls
    p.parallel = p.threads > 5 ? (void*)run_in_pool : any_pool(random);

    const int64_t positions = (int64_t)p.rows * p.columns, rows = p.batch * p.heads * positions;
    const int statistics = p.dtype == FLOAT64 ? FLOAT64 : FLOAT32;
    auto tensor = [&](int64_t count, bool filled) {
        return Tensor(random, p.dtype, p.batch, count, p.heads, p.head_dim, filled);
    };
    const Tensor query = tensor(positions, true), output = tensor(positions, false);
    const Tensor grad_output = tensor(positions, true), grad_query = tensor(positions, false);
    const Numbers logsumexp(random, statistics, rows), softmax(random, statistics, 2 * rows);
    const Numbers grad_logsumexp = Numbers::filled(random, statistics, rows);
    const bool with_backward = !random.once_in(4);
    p.query = query.describe(), p.output = output.describe();
    p.logsumexp = logsumexp.at(0), p.softmax = with_backward ? softmax.at(0) : nullptr;

    const int there = (int)random.draw(1, (1 << LOCAL_ATTENTION_SOURCES) - 1);
    std::unique_ptr<Source> sources[LOCAL_ATTENTION_SOURCES];
    for (int i = 0; i < LOCAL_ATTENTION_SOURCES; i++) {
        if (!(there >> i & 1)) continue;
        LocalAttentionSource& s = p.source[i];
        draw_geometry(random, p, s);
        const int64_t keys = (int64_t)s.rows * s.columns;
        s.bias_stride = keys + random.draw(0, 2);
        const int64_t biases = (p.batch - 1) * s.bias_stride + keys;
        sources[i].reset(new Source{
            tensor(keys, true), tensor(keys, true), tensor(keys, false), tensor(keys, false),
            Numbers(random, statistics, biases)});
        fill_bias(random, sources[i]->bias);
        s.key = sources[i]->key.describe(), s.value = sources[i]->value.describe();
        s.bias = random.once_in(2) ? sources[i]->bias.at(0) : nullptr;
    }
    for (LocalAttentionSource& s : p.source) {
        if (!s.key.data) continue;
        int32_t* const part = random.one_of({&s.rows, &s.columns, &s.reach_rows, &s.ratio_rows, &s.ratio_columns});
        const int kept = *part;
        *part = random.one_of({-1, INT32_MIN, LOCAL_ATTENTION_MAX_SIDE + 1, INT32_MAX});
        require(local_attention_cpu_forward(&p) == LOCAL_ATTENTION_UNSUPPORTED, "what does not fit was taken");
        *part = kept;
    }
    require(local_attention_cpu_forward(&p) == LOCAL_ATTENTION_OK, "the forward was refused");
    output.require_written("output");
    for (int64_t i = 0; i < rows; i++) {
        require(logsumexp.is_written(i), "a logsumexp was not written");
        const double sum = statistics == FLOAT64 ? logsumexp.as<double>()[i] : logsumexp.as<float>()[i];
        require(!isnan(sum) && sum != INFINITY, "a logsumexp is no number");  // of no keys: minus infinity
    }
    if (!with_backward) return;
    require(softmax.all_finite(), "what the backward needs is not finite everywhere");

    p.grad_output = grad_output.describe();
    p.grad_logsumexp = random.once_in(3) ? nullptr : grad_logsumexp.at(0);
    auto wanted = [&](const Tensor& grad) { return random.once_in(3) ? LocalAttentionTensor{} : grad.describe(); };
    p.grad_query = wanted(grad_query);
    for (int i = 0; i < LOCAL_ATTENTION_SOURCES; i++)
        if (sources[i])
            p.source[i].grad_key = wanted(sources[i]->grad_key),
            p.source[i].grad_value = wanted(sources[i]->grad_value);
    require(local_attention_cpu_backward(&p) == LOCAL_ATTENTION_OK, "the backward was refused");
    if (p.grad_query.data) grad_query.require_written("grad_query");
    for (int i = 0; i < LOCAL_ATTENTION_SOURCES; i++) {
        if (p.source[i].grad_key.data) sources[i]->grad_key.require_written("grad_key");
        if (p.source[i].grad_value.data) sources[i]->grad_value.require_written("grad_value");
    }
}

// ------------------------------------------------------------------------------------------------------- decoding
// step

void decode_step_case(Random& random) {
    DecodeStep s = {};
    s.abi = DECODE_STEP_ABI;
    s.dtype = random.one_of({FLOAT32, BFLOAT16, FLOAT16});
    s.heads = (int)random.draw(1, 3);
    const int head_dim = random.one_of({1, 3, 8, 16, 20, 64});
    s.hidden = s.heads * head_dim;
    s.intermediate = random.one_of({1, 7, 16, 33, 4 * s.hidden});
    s.layers = (int)random.draw(1, 2);
    s.sequences = random.once_in(20) ? DECODE_STEP_MAX_SEQUENCES : (int)random.draw(1, 18);
    s.vocabulary = (int)random.draw(1, 50), s.tokens = (int)random.draw(1, s.vocabulary);
    s.capacity = (int)random.draw(1, 40);
    if (random.once_in(20)) s.sequences = 1, s.capacity = DECODE_STEP_MAX_KEYS;
    s.news = (int)(random.once_in(2) ? 1 : random.draw(1, std::min(s.capacity, 6)));
    s.scored = (int)random.draw(1, s.news);
    s.table_rows = (int)random.draw(1, 9);
    std::vector<int64_t> lengths(s.sequences);
    for (int64_t& length : lengths)
        length = random.once_in(3) ? s.capacity - s.news : random.draw(0, s.capacity - s.news);
    s.lengths = lengths.data();
    s.threads = (int)random.draw(1, 5);
    s.isa = (int)random.draw(1, cpu_isa_selected() + 1);
    s.epsilon = 1e-5;
    s.parallel = any_pool(random);

    std::vector<Numbers> weights;
    auto weight = [&](int64_t rows, int64_t columns) {
        weights.push_back(Numbers::filled(random, s.dtype, rows * columns));
        return (const void*)weights.back().at(0);
    };
    auto norm = [&] { return DecodeParameters{weight(1, s.hidden), weight(1, s.hidden)}; };
    auto linear = [&](int64_t inputs, int64_t outputs) {
        return DecodeParameters{weight(outputs, inputs), weight(1, outputs)};
    };
    s.word_embeddings = weight(s.vocabulary, s.hidden), s.position_embeddings = weight(s.table_rows, s.hidden);
    s.final_layernorm = norm();

    // Keys and values of the tokens so far; what comes later is a NaN, and must stay one but for the new tokens.
    const int64_t rows = 2 * (int64_t)s.sequences * s.heads, row_size = (int64_t)s.capacity * head_dim;
    auto length_of = [&](int64_t row) { return lengths[row / s.heads % s.sequences]; };
    std::vector<Numbers> caches;
    std::vector<DecodeLayer> layers(s.layers);
    for (DecodeLayer& layer : layers) {
        caches.emplace_back(random, FLOAT32, rows * row_size);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < length_of(row) * head_dim; i++)
                put(caches.back().at(row * row_size + i), FLOAT32, random.number());
        layer = {
            norm(),
            linear(s.hidden, 3 * s.hidden),
            linear(s.hidden, s.hidden),
            norm(),
            norm(),
            linear(s.hidden, s.intermediate),
            linear(s.intermediate, s.hidden),
            norm(),
            caches.back().as<float>()};
    }
    s.layer = layers.data();
    const int64_t tokens = (int64_t)s.sequences * s.news;
    std::vector<int64_t> input_ids(tokens), position_ids(tokens);
    for (int64_t& id : input_ids) id = random.draw(0, s.vocabulary - 1);
    for (int64_t& position : position_ids) position = random.draw(0, s.table_rows - 1);
    s.input_ids = input_ids.data(), s.position_ids = position_ids.data();
    Numbers bias(random, FLOAT32, (int64_t)s.sequences * s.capacity);
    fill_bias(random, bias);
    s.bias = bias.as<float>();

    const int64_t scratch_size = decode_step_scratch_size(&s);
    require(scratch_size > 0, "there is no scratch size");
    std::unique_ptr<void, void (*)(void*)> scratch(aligned_alloc(64, scratch_size), free);
    s.scratch = scratch.get();
    const Numbers logits(random, FLOAT32, (int64_t)s.sequences * s.scored * s.tokens);
    const Numbers again(random, FLOAT32, logits.count);
    s.logits = logits.as<float>();
    require(decode_step_cpu(&s) == DECODE_STEP_OK, "the step was refused");
    require(logits.all_finite(), "the logits are not finite");
    for (const Numbers& cache : caches)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = length_of(row) * head_dim; i < row_size; i++)
                require(
                    cache.is_written(row * row_size + i) == (i < (length_of(row) + s.news) * head_dim),
                    "the cache does not hold exactly the new tokens");

    s.threads = 1, s.logits = again.as<float>();
    require(decode_step_cpu(&s) == DECODE_STEP_OK, "the same step was refused");
    require(!memcmp(logits.at(0), again.at(0), logits.bytes()), "the logits depend on the number of threads");

    int64_t& length = lengths[random.draw(0, s.sequences - 1)];
    const int64_t kept = length;
    length = random.one_of<int64_t>({-1, s.capacity - s.news + 1, INT64_MAX, INT64_MIN});
    require(decode_step_cpu(&s) == DECODE_STEP_UNSUPPORTED, "more keys than there is room for were taken");
    length = kept;
    const bool is_id = random.once_in(2);
    (is_id ? input_ids : position_ids)[random.draw(0, tokens - 1)] =
        random.one_of<int64_t>({-1, is_id ? s.vocabulary : s.table_rows, INT64_MAX, INT64_MIN});
    require(decode_step_cpu(&s) == DECODE_STEP_BAD_ID, "a number outside of its table was taken");
}

// ----------------------------------------------------------------------------------------------------------------
// gelu

void gelu_case(Random& random) {
    const int dtype = random.one_of({FLOAT32, BFLOAT16, FLOAT16}), isa = (int)random.draw(1, cpu_isa_selected() + 1);
    const int64_t count =
        random.once_in(3) ? random.draw(0, 70) : random.draw(1, 4) * (1 << 14) + random.draw(-20, 20);
    const Numbers values = Numbers::filled(random, dtype, count);
    const Numbers results(random, dtype, count), again(random, dtype, count);
    const int threads = (int)random.draw(2, 5);
    require(
        gelu_cpu(values.at(0), results.at(0), count, dtype, threads, isa, any_pool(random)) == GELU_OK, "was refused");
    require(results.all_finite(), "a result is not finite");
    require(gelu_cpu(values.at(0), again.at(0), count, dtype, 1, isa, nullptr) == GELU_OK, "was refused again");
    require(!memcmp(results.at(0), again.at(0), results.bytes()), "the results depend on the number of threads");
    const Numbers gradients = Numbers::filled(random, dtype, count);
    require(
        gelu_backward_cpu(
            values.at(0), gradients.at(0), results.at(0), count, dtype, threads, isa, any_pool(random)) == GELU_OK,
        "the backward pass was refused");
    require(results.all_finite(), "a gradient is not finite");
    require(
        gelu_backward_cpu(values.at(0), gradients.at(0), again.at(0), count, dtype, 1, isa, nullptr) == GELU_OK,
        "the backward pass was refused again");
    require(!memcmp(results.at(0), again.at(0), results.bytes()), "gradients depend on the number of threads");
}

// --------------------------------------------------------------------------------------------------------------
// linear

void linear_case(Random& random) {
    Linear c = {};
    c.abi = LINEAR_ABI;
    c.dtype = random.one_of({FLOAT32, BFLOAT16, FLOAT16});
    c.rows = random.one_of<int64_t>({1, 2, 3, 17, random.draw(1, 90)});
    c.inputs = (int)random.draw(1, 70), c.outputs = (int)random.draw(1, 70);
    c.int8 = random.once_in(2), c.gelu = random.once_in(2), c.threads = (int)random.draw(2, 5);
    c.isa = (int)random.draw(1, cpu_isa_selected() + 1);
    c.parallel = any_pool(random);

    const int64_t weights = (int64_t)c.inputs * c.outputs, size = linear_packed_size(c.inputs, c.outputs);
    // bytes: blocks of memory that end with their last number, too
    std::unique_ptr<int8_t, void (*)(void*)> whole((int8_t*)malloc(weights), [](void* p) { free(p); });
    std::unique_ptr<int8_t, void (*)(void*)> packed((int8_t*)malloc(size), [](void* p) { free(p); });
    for (int64_t i = 0; i < weights; i++) whole.get()[i] = (int8_t)random.draw(-127, 127);
    require(linear_pack(whole.get(), packed.get(), c.inputs, c.outputs) == LINEAR_OK, "was not packed");
    auto filled = [&](int64_t count) { return Numbers::filled(random, c.dtype, count); };
    const Numbers weight = filled(weights), input = filled(c.rows * c.inputs), residual = filled(c.rows * c.outputs);
    const Numbers bias = filled(c.outputs), scales = Numbers::filled(random, FLOAT32, c.outputs);
    const Numbers input_norm[] = {filled(c.inputs), filled(c.inputs)};
    const Numbers output_norm[] = {filled(c.outputs), filled(c.outputs)};
    const Numbers output(random, c.dtype, c.rows * c.outputs), again(random, c.dtype, c.rows * c.outputs);
    c.input = input.at(0), c.weight = c.int8 ? (const void*)packed.get() : weight.at(0);
    c.scales = c.int8 ? scales.as<float>() : nullptr;
    c.bias = random.once_in(3) ? nullptr : bias.at(0), c.residual = random.once_in(2) ? nullptr : residual.at(0);
    if (random.once_in(2)) c.input_norm = {input_norm[0].at(0), input_norm[1].at(0), 1e-5};
    if (random.once_in(2)) c.output_norm = {output_norm[0].at(0), output_norm[1].at(0), 1e-5};
    for (const Numbers* each : {&output, &again}) {
        c.output = each->at(0);
        std::unique_ptr<void, void (*)(void*)> scratch(
            aligned_alloc(64, (linear_scratch_size(&c) + 63) / 64 * 64), free);
        c.scratch = scratch.get();
        require(linear_cpu(&c) == LINEAR_OK, "was refused");
        c.threads = 1, c.parallel = nullptr;
    }
    require(output.all_finite(), "a result is not finite");
    require(!memcmp(output.at(0), again.at(0), output.bytes()), "the results depend on the number of threads");
}

struct Kernel {
    const char* name;
    void (*run_case)(Random&);
};
const Kernel kernels[] = {
    {"local_attention", local_attention_case},
    {"decode_step", decode_step_case},
    {"gelu", gelu_case},
    {"linear", linear_case}};

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    for (const Kernel& each : kernels) {
        if (strcmp(argv[1], each.name)) continue;
        const long first = atol(argv[2]), end = first + atol(argv[3]);
        auto call = [&](long from) {
            for (long which = from; which < end; which += 2) {
                kernel = each.name, seed = which;
                Random random(which);
                each.run_case(random);
            }
        };
        std::thread other(call, first + 1);
        call(first);
        other.join();
        printf("%s: %ld cases\n", each.name, end - first);
        return 0;
    }
    return 2;
}
