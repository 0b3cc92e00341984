/*
 * Linear layers of 8-bit numbers on the CPU, see int8_linear.h. Compiled once per instruction set, see cpu_kernels.h.
 *
 * A unit of work is a block of rows. A thread makes its inputs whole numbers, as 16-bit ones in memory of its own, and
 * multiplies them with one panel of the weights after the other, which stays in the nearest cache meanwhile. Processors
 * multiply pairs of 16-bit numbers and add the two products as 32-bit ones in one instruction: twice as many products
 * as of float32. It takes the 8-bit weights once they are widened, on their way from the cache.
 */
#include <float.h>

#include "cpu_kernels.h"
#include "cpu_vectors.h"

#if defined(__x86_64__) && !defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int ROWS = 6;  // of inputs, whose sums for two vectors of outputs are in registers at once
constexpr int VECTORS = 2;
constexpr int LARGEST = 127;
constexpr int64_t MOST_ROWS = 48;  // of a unit
constexpr int PANEL = INT8_LINEAR_PANEL;

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

inline int64_t filled_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

struct Call {
    const Int8Linear* call;
    int64_t rows_per_unit, next, next_scratch;
};

template <class S>
class Rows {
    const Int8Linear& c;
    const int64_t stride;  // of rows of whole numbers: a number of vectors
    int16_t* numbers;
    float *values, *row_scales;

    // The inputs of a row as floats.
    void read_row(const S* from) {
        const int size = c.inputs;
        int k = 0;
        for (; k + W <= size; k += W) write(values + k, read(from + k));
        for (; k < size; k++) values[k] = widen(from[k]);
    }

    // Whole numbers, and the scale that gives back the values.
    void quantize(int64_t row) {
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
        int16_t* to = numbers + row * stride;
        // adding this rounds to a whole number, which then stands in the low bits
        const V magic = splat(Simd<float>::magic);
        for (k = 0; k + W <= size; k += W) {
            const Ints whole = (Ints)(read(values + k) * inverse + magic);
            *(HalfShorts*)(to + k) = __builtin_convertvector(whole, HalfShorts);
        }
        for (; k < size; k++) to[k] = (int16_t)float_to_bits(values[k] * inverse + Simd<float>::magic);
        for (; k < stride; k++) to[k] = 0;
    }

    // ROWS rows from `row` on, of which `count` are wanted, times VECTORS vectors of outputs from `first` on.
    template <int N>
    void multiply(int64_t row, int first, S* output) const {
        const int16_t* a = numbers + row * stride;
        const int8_t* b[VECTORS];
        const int64_t panel_size = filled_up(c.inputs, 2) * PANEL;
        for (int v = 0; v < VECTORS; v++) {
            const int from = first + v * W;
            b[v] = c.weight + from / PANEL * panel_size + from % PANEL * 2;
        }
        Ints acc[N][VECTORS];
        for (int r = 0; r < N; r++)
            for (int v = 0; v < VECTORS; v++) acc[r][v] = Ints{};
        for (int k = 0; k < c.inputs; k += 2) {
            Shorts weight[VECTORS];
            for (int v = 0; v < VECTORS; v++) weight[v] = widen_bytes(b[v] + (int64_t)k * PANEL);
            for (int r = 0; r < N; r++) {
                const Shorts pair = repeat_pair(a + r * stride + k);
                for (int v = 0; v < VECTORS; v++) acc[r][v] = add_products(acc[r][v], pair, weight[v]);
            }
        }
        for (int v = 0; v < VECTORS; v++) {
            const int from = first + v * W, left = c.outputs - from;
            if (left <= 0) break;
            const S* biases = (const S*)c.bias + from;
            V scale, bias = V{};
            if (left >= W) {
                scale = read(c.scales + from);
                if (c.bias) bias = read(biases);
            } else {
                scale = read_some(c.scales + from, left);
                if (c.bias) bias = read_some(biases, left);
            }
            for (int r = 0; r < N; r++) {
                V y = __builtin_convertvector(acc[r][v], V) * (scale * row_scales[row + r]) + bias;
                if (c.gelu) y = gelu(y);
                S* to = output + r * (int64_t)c.outputs + from;
                if (left >= W) {
                    write(to, y);
                } else {
                    S all[W];
                    write(all, y);
                    memcpy(to, all, left * sizeof(S));
                }
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

public:
    static int64_t scratch_bytes(const Int8Linear& c) {
        const int64_t stride = filled_up(c.inputs, 32);
        return MOST_ROWS * stride * 2 + stride * 4 + filled_up(MOST_ROWS * 4, 64);
    }

    Rows(const Int8Linear& c, char* scratch) : c(c), stride(filled_up(c.inputs, 32)) {
        numbers = (int16_t*)scratch;
        values = (float*)(scratch + MOST_ROWS * stride * 2);
        row_scales = values + stride;
    }

    void run(int64_t from, int64_t to) {
        for (int64_t row = from; row < to; row++) {
            read_row((const S*)c.input + row * c.inputs);
            quantize(row - from);
        }
        for (int first = 0; first < c.outputs; first += VECTORS * W)
            for (int64_t row = from; row < to; row += ROWS)
                multiply_up_to(to - row, row - from, first, (S*)c.output + row * c.outputs);
    }
};

template <class S>
void run_rows(void* data) {
    Call& call = *(Call*)data;
    const Int8Linear& c = *call.call;
    char* scratch = (char*)c.scratch +
                    __atomic_fetch_add(&call.next_scratch, 1, __ATOMIC_RELAXED) * Rows<S>::scratch_bytes(c);
    Rows<S> rows(c, scratch);
    const int64_t step = call.rows_per_unit;
    for (int64_t from; (from = __atomic_fetch_add(&call.next, step, __ATOMIC_RELAXED)) < c.rows;)
        rows.run(from, from + step < c.rows ? from + step : c.rows);
}

}  // namespace

int64_t CPU_KERNEL(int8_linear_scratch)(const Int8Linear* c) { return c->threads * Rows<float>::scratch_bytes(*c); }

int CPU_KERNEL(int8_linear)(const Int8Linear* c, Parallel parallel) {
    const Task task = c->dtype == INT8_LINEAR_FLOAT32    ? run_rows<float>
                      : c->dtype == INT8_LINEAR_BFLOAT16 ? run_rows<bfloat16>
                      : c->dtype == INT8_LINEAR_FLOAT16  ? run_rows<float16>
                                                         : nullptr;
    if (!task) return INT8_LINEAR_UNSUPPORTED;
    // as large as memory allows, but with some units for each thread
    int64_t rows = filled_up((c->rows + 2 * c->threads - 1) / (2 * c->threads), ROWS);
    rows = rows < MOST_ROWS ? rows : MOST_ROWS;
    Call call = {c, rows, 0, 0};
    const int64_t units = (c->rows + rows - 1) / rows;
    parallel(task, &call, units < c->threads ? (int)units : c->threads, c->parallel);
    return INT8_LINEAR_OK;
}
