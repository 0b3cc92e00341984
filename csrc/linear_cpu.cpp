/*
 * Linear layers on the CPU, see linear.h. Compiled once per instruction set, see cpu_kernels.h.
 *
 * A unit of work is a block of rows. A thread brings what they are multiplied with into memory of its own, normed and,
 * for whole numbers, rounded to 16-bit ones, and multiplies it with one panel of the weights after the other, which stays
 * in the nearest cache meanwhile.
 *
 * Weights that are floating-point numbers are laid out in such panels first, by all threads, in every call: that takes as
 * long as the products of some twenty rows, and leaves no second copy of a model behind. Processors multiply pairs of
 * 16-bit whole numbers and add the two products as 32-bit ones in one instruction: twice as many products as of
 * float32. It takes 8-bit weights once they are widened, on their way from the cache.
 */
#include <float.h>

#include "cpu_kernels.h"
#include "cpu_vectors.h"

#if defined(__x86_64__) && !defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int ROWS = VECTOR_BYTES == 64 ? 12 : 6;  // whose sums for two vectors of outputs are in registers at once
constexpr int VECTORS = 2;
constexpr int LARGEST = 127;
constexpr int64_t MOST_ROWS = 48;            // of a unit
constexpr int64_t BYTES_OF_ROWS = 160 << 10;  // what a unit multiplies, beside a panel of the weights in the second cache
constexpr int PANEL = LINEAR_PANEL;
constexpr int COLUMNS = VECTORS * W;  // outputs that lie together in weights that a call packs

typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef int16_t Shorts __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(2)));
typedef int16_t HalfShorts __attribute__((vector_size(VECTOR_BYTES / 2), may_alias, aligned(2)));
typedef int8_t HalfBytes __attribute__((vector_size(VECTOR_BYTES / 2), may_alias, aligned(1)));

inline Shorts widen_bytes(const int8_t* p) {
#if VECTOR_BYTES == 64
    return (Shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif VECTOR_BYTES == 32
    return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
    return __builtin_convertvector(*(const HalfBytes*)p, Shorts);
#endif
}

// Two neighbours, everywhere.
inline Shorts repeat_pair(const int16_t* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return (Shorts)(pair - Ints{});
}

// sums + the products of neighbours, two by two.
inline Ints add_products(Ints sums, Shorts a, Shorts b) {
#if VECTOR_BYTES == 64
    return sums + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif VECTOR_BYTES == 32
    return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return sums + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    for (int i = 0; i < W; i++) sums[i] += (int32_t)a[2 * i] * b[2 * i] + (int32_t)a[2 * i + 1] * b[2 * i + 1];
    return sums;
#endif
}

template <bool FIRST, class A, class B>
struct Choose {
    typedef A type;
};
template <class A, class B>
struct Choose<false, A, B> {
    typedef B type;
};

// Ones, and from `number` on zeros.
inline V ones(int number) {
    V v = V{};
    for (int i = 0; i < number; i++) v[i] = 1;
    return v;
}

inline int64_t filled_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

// ------------------------------------------------------------------------------------------------------------- memory

// Where things are in the memory of a call. Its size must be the same for all instruction sets.
struct Memory {
    int64_t stride, width;  // of rows of inputs and of outputs, in numbers
    int64_t weights, thread;  // bytes of the packed weights, and of each thread

    explicit Memory(const Linear& c)
        : stride(filled_up(c.inputs, LINEAR_MULTIPLE)), width(filled_up(c.outputs, LINEAR_MULTIPLE)) {
        weights = c.int8 ? 0 : width * c.inputs * 4;
        // what is multiplied, one row as floats, scales of rows; results that a norm waits for
        thread = MOST_ROWS * stride * (c.int8 ? 2 : 4) + stride * 4 + filled_up(MOST_ROWS * 4, 64);
        if (c.output_norm.weight) thread += MOST_ROWS * width * 4;
    }
};

struct Call {
    const Linear* call;
    int64_t rows_per_unit, next, next_scratch;
};

// ------------------------------------------------------------------------------------------------------------ packing

typedef Simd<float>::I Lanes;

// Of each lane the number of `a`, or from W on of `b`, that `from` says.
inline V shuffle(V a, V b, Lanes from) {
#ifdef __clang__
    V v;
    for (int i = 0; i < W; i++) v[i] = from[i] < W ? a[from[i]] : b[from[i] - W];
    return v;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

// Rows become columns: numbers that are 1, 2, 4, ... apart change places, as often as that is less than a vector.
template <int DISTANCE = 1>
inline void transpose(V (&rows)[W]) {
    Lanes low, high;
    for (int i = 0; i < W; i++) {
        low[i] = i & DISTANCE ? i - DISTANCE + W : i;
        high[i] = i & DISTANCE ? i + W : i + DISTANCE;
    }
    for (int i = 0; i < W; i++) {
        if (i & DISTANCE) continue;
        const V a = rows[i], b = rows[i + DISTANCE];
        rows[i] = shuffle(a, b, low);
        rows[i + DISTANCE] = shuffle(a, b, high);
    }
    if constexpr (2 * DISTANCE < W) transpose<2 * DISTANCE>(rows);
}

// Panels of COLUMNS outputs: for each input, these of each output.
template <class S>
void pack_panels(void* data) {
    Call& call = *(Call*)data;
    const Linear& c = *call.call;
    for (int64_t from; (from = __atomic_fetch_add(&call.next, COLUMNS, __ATOMIC_RELAXED)) < c.outputs;) {
        float* to = (float*)c.scratch + from * c.inputs;
        const S* weight = (const S*)c.weight + from * c.inputs;
        const int columns = c.outputs - from < COLUMNS ? (int)(c.outputs - from) : COLUMNS;
        int k = 0;
        for (; k + W <= c.inputs; k += W) {
            for (int j = 0; j < COLUMNS; j += W) {
                V part[W];
                for (int i = 0; i < W; i++)
                    part[i] = j + i < columns ? read(weight + (int64_t)(j + i) * c.inputs + k) : V{};
                transpose(part);
                for (int i = 0; i < W; i++) store(to + i * COLUMNS + j, part[i]);
            }
            to += W * COLUMNS;
        }
        for (; k < c.inputs; k++)
            for (int j = 0; j < COLUMNS; j++) *to++ = j < columns ? widen(weight[(int64_t)j * c.inputs + k]) : 0;
    }
}

// ----------------------------------------------------------------------------------------------------------- one row

template <class S>
inline V read_up_to_all(const S* p, int64_t left) {
    return left >= W ? read(p) : read_some(p, (int)left);
}

template <class S>
inline void write_up_to_all(S* to, V values, int64_t left) {
    if (left >= W) return write(to, values);
    S all[W];
    write(all, values);
    memcpy(to, all, left * sizeof(S));
}

// Layer norm of the numbers of a row, which stand in memory up to a whole vector.
template <class S>
void normalise(const LinearNorm& norm, float* values, int size) {
    V total = V{};
    for (int k = 0; k < size; k += W) total += read_up_to_all(values + k, size - k);
    const V mean = splat(sum(total) / size);
    V squares = V{};
    for (int k = 0; k < size; k += W) {
        // beyond the end, no difference
        const V difference = read_up_to_all(values + k, size - k) - (size - k >= W ? mean : mean * ones(size - k));
        squares += difference * difference;
    }
    const V scale = splat((float)(1 / sqrt(sum(squares) / size + norm.epsilon)));
    const S *weight = (const S*)norm.weight, *bias = (const S*)norm.bias;
    for (int k = 0; k < size; k += W) {
        const V factor = read_up_to_all(weight + k, size - k), offset = read_up_to_all(bias + k, size - k);
        write(values + k, (read(values + k) - mean) * scale * factor + offset);
    }
}

// ----------------------------------------------------------------------------------------------------------- products

template <class S, bool INT8>
class Rows {
    typedef typename Choose<INT8, int16_t, float>::type Number;

    const Linear& c;
    const Memory memory;
    Number* numbers;
    float *values, *row_scales, *results;

    // Whole numbers, and the scale that gives back the values.
    void quantize(const float* values, int64_t row, int16_t* to) {
        const int size = c.inputs;
        V most = V{}, nothing = V{};  // the latter is NaN if there is anything that no number stands for
        int k = 0;
        for (; k + W <= size; k += W) {
            const V v = read(values + k), magnitude = v < 0 ? -v : v;
            most = most > magnitude ? most : magnitude;
            nothing += v * 0;
        }
        float largest = 0, zero = sum(nothing);
        for (int i = 0; i < W; i++) largest = largest > most[i] ? largest : most[i];
        for (; k < size; k++) {
            largest = largest > fabsf(values[k]) ? largest : fabsf(values[k]);
            zero += values[k] * 0;
        }
        row_scales[row] = largest / LARGEST + zero;
        const float inverse = largest > FLT_MIN ? LARGEST / largest : 0;
        // adding this rounds to a whole number, which then stands in the low bits
        const V magic = splat(Simd<float>::magic);
        for (k = 0; k + W <= size; k += W) {
            const Ints whole = (Ints)(read(values + k) * inverse + magic);
            *(HalfShorts*)(to + k) = __builtin_convertvector(whole, HalfShorts);
        }
        for (; k < size; k++) to[k] = (int16_t)float_to_bits(values[k] * inverse + Simd<float>::magic);
        for (; k < memory.stride; k++) to[k] = 0;
    }

    // What a row is multiplied with.
    void prepare(const S* from, int64_t row) {
        Number* to = numbers + row * memory.stride;
        float* floats;
        if constexpr (INT8)
            floats = values;
        else
            floats = to;
        for (int k = 0; k < c.inputs; k += W) write(floats + k, read_up_to_all(from + k, c.inputs - k));
        if (c.input_norm.weight) normalise<S>(c.input_norm, floats, c.inputs);
        if constexpr (INT8) quantize(values, row, to);
    }

    // The products of N rows with VECTORS vectors of outputs.
    template <int N>
    void accumulate(const Number* a, int first, V (&y)[N][VECTORS]) const {
        const int64_t stride = memory.stride;
        if constexpr (INT8) {
            Ints acc[N][VECTORS];
            for (int r = 0; r < N; r++)
                for (int v = 0; v < VECTORS; v++) acc[r][v] = Ints{};
            const int8_t* b[VECTORS];
            const int64_t panel_size = filled_up(c.inputs, 2) * PANEL;
            for (int v = 0; v < VECTORS; v++) {
                const int from = first + v * W;
                b[v] = (const int8_t*)c.weight + from / PANEL * panel_size + from % PANEL * 2;
            }
            for (int k = 0; k < c.inputs; k += 2) {
                Shorts weight[VECTORS];
                for (int v = 0; v < VECTORS; v++) weight[v] = widen_bytes(b[v] + (int64_t)k * PANEL);
                for (int r = 0; r < N; r++) {
                    const Shorts pair = repeat_pair(a + r * stride + k);
                    for (int v = 0; v < VECTORS; v++) acc[r][v] = add_products(acc[r][v], pair, weight[v]);
                }
            }
            for (int r = 0; r < N; r++)
                for (int v = 0; v < VECTORS; v++) y[r][v] = __builtin_convertvector(acc[r][v], V);
        } else {
            V acc[N][VECTORS];
            for (int r = 0; r < N; r++)
                for (int v = 0; v < VECTORS; v++) acc[r][v] = V{};
            const float* b = (const float*)c.scratch + (int64_t)first * c.inputs;
            for (int k = 0; k < c.inputs; k++, b += COLUMNS) {
                V weight[VECTORS];
                for (int v = 0; v < VECTORS; v++) weight[v] = load(b + v * W);
                for (int r = 0; r < N; r++) {
                    const V value = splat(a[r * stride + k]);
                    for (int v = 0; v < VECTORS; v++) acc[r][v] += value * weight[v];
                }
            }
            for (int r = 0; r < N; r++)
                for (int v = 0; v < VECTORS; v++) y[r][v] = acc[r][v];
        }
    }

    // N rows from `row` of this unit on, times VECTORS vectors of outputs from `first` on.
    template <int N>
    void multiply(int64_t row, int first, S* output) const {
        V y[N][VECTORS];
        accumulate<N>(numbers + row * memory.stride, first, y);
        for (int v = 0; v < VECTORS; v++) {
            const int from = first + v * W, left = c.outputs - from;
            if (left <= 0) break;
            const V bias = c.bias ? read_up_to_all((const S*)c.bias + from, left) : V{};
            const V scale = INT8 ? read_up_to_all(c.scales + from, left) : splat(1.0f);
            for (int r = 0; r < N; r++) {
                if constexpr (INT8)
                    y[r][v] = y[r][v] * (scale * row_scales[row + r]) + bias;
                else
                    y[r][v] += bias;
                if (c.gelu) y[r][v] = gelu(y[r][v]);
                if (results) {
                    write(results + (row + r) * memory.width + from, y[r][v]);
                    continue;
                }
                const int64_t at = (row + r) * c.outputs + from;
                if (c.residual) y[r][v] += read_up_to_all(residual + at, left);
                write_up_to_all(output + at, y[r][v], left);
            }
        }
    }

    template <int N = ROWS>
    void multiply_up_to(int64_t count, int64_t row, int first, S* output) const {
        if (count >= N)
            multiply<N>(row, first, output);
        else if constexpr (N > 1)
            multiply_up_to<N - 1>(count, row, first, output);
    }

    const S* residual;  // of this unit

public:
    Rows(const Linear& c, char* scratch) : c(c), memory(c), results(nullptr) {
        numbers = (Number*)scratch;
        values = (float*)(scratch + MOST_ROWS * memory.stride * sizeof(Number));
        row_scales = values + memory.stride;
        if (c.output_norm.weight) results = row_scales + filled_up(MOST_ROWS, 16);
    }

    void run(int64_t from, int64_t to) {
        for (int64_t row = from; row < to; row++) prepare((const S*)c.input + row * c.inputs, row - from);
        S* output = (S*)c.output + from * c.outputs;
        residual = c.residual ? (const S*)c.residual + from * c.outputs : nullptr;
        for (int first = 0; first < c.outputs; first += COLUMNS)
            for (int64_t row = 0; row < to - from; row += ROWS) multiply_up_to(to - from - row, row, first, output);
        if (!results) return;
        for (int64_t row = 0; row < to - from; row++) {
            float* y = results + row * memory.width;
            normalise<S>(c.output_norm, y, c.outputs);
            for (int k = 0; k < c.outputs; k += W) {
                const int64_t at = row * c.outputs + k, left = c.outputs - k;
                V value = read(y + k);
                if (residual) value += read_up_to_all(residual + at, left);
                write_up_to_all(output + at, value, left);
            }
        }
    }
};

template <class S, bool INT8>
void run_rows(void* data) {
    Call& call = *(Call*)data;
    const Linear& c = *call.call;
    const Memory memory(c);
    char* scratch =
        (char*)c.scratch + memory.weights + __atomic_fetch_add(&call.next_scratch, 1, __ATOMIC_RELAXED) * memory.thread;
    Rows<S, INT8> rows(c, scratch);
    const int64_t step = call.rows_per_unit;
    for (int64_t from; (from = __atomic_fetch_add(&call.next, step, __ATOMIC_RELAXED)) < c.rows;)
        rows.run(from, from + step < c.rows ? from + step : c.rows);
}

template <class S>
void run_call(const Linear& c, Parallel parallel) {
    if (!c.int8) {
        Call packing = {&c, 0, 0, 0};
        const int64_t panels = (c.outputs + COLUMNS - 1) / COLUMNS;
        parallel(pack_panels<S>, &packing, panels < c.threads ? (int)panels : c.threads, c.parallel);
    }
    // as large as the caches allow, but with some units for each thread
    const int64_t fit = BYTES_OF_ROWS / (Memory(c).stride * (c.int8 ? 2 : 4)) / ROWS * ROWS;
    int64_t rows = filled_up((c.rows + 2 * c.threads - 1) / (2 * c.threads), ROWS);
    rows = rows < fit ? rows : fit;
    rows = rows < ROWS ? ROWS : rows < MOST_ROWS ? rows : MOST_ROWS;
    Call call = {&c, rows, 0, 0};
    const int64_t units = (c.rows + rows - 1) / rows;
    parallel(
        c.int8 ? run_rows<S, true> : run_rows<S, false>, &call, units < c.threads ? (int)units : c.threads, c.parallel);
}

}  // namespace

int64_t CPU_KERNEL(linear_scratch)(const Linear* c) {
    const Memory memory(*c);
    return memory.weights + c->threads * memory.thread;
}

int CPU_KERNEL(linear)(const Linear* c, Parallel parallel) {
    switch (c->dtype) {
        case LINEAR_FLOAT32:
            run_call<float>(*c, parallel);
            return LINEAR_OK;
        case LINEAR_BFLOAT16:
            run_call<bfloat16>(*c, parallel);
            return LINEAR_OK;
        case LINEAR_FLOAT16:
            run_call<float16>(*c, parallel);
            return LINEAR_OK;
    }
    return LINEAR_UNSUPPORTED;
}
