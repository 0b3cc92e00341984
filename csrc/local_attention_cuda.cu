/*
 * Local attention on CUDA devices, forward and backward, on tensor cores for half precision and in plain float32
 * arithmetic for float32.
 *
 * Three kernels share one scheme. A block owns a tile of cells, the rows of small matrices; each warp owns 16 of them.
 * The cells that they see (or, for the gradients of keys, the cells that see them) form a rectangle on each grid. The
 * cells of these rectangles, listed row by row and padded to multiples of 16, are the columns. They are copied to
 * shared memory, all at once where they fit, else in chunks. A warp walks over the part of the list that its own 16
 * rows see, 16 columns at a time, and a test of coordinates masks the rest:
 *
 *   forward      rows: queries, columns: keys      S = Q K^T, online softmax, O += P V
 *   grad_query   rows: queries, columns: keys      P and dP = dO V^T again, dQ += dS K
 *   grad_key     rows: keys, columns: queries      P^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q
 *
 * Nothing of the size of positions times window is ever in global memory, and no sum depends on the order of blocks:
 * results are the same in every run. Gradients of coarse and context keys sum over many queries: there the warps of a
 * block share rows and split the columns.
 *
 * With LOCAL_ATTENTION_EMULATION the same file compiles as C++ and runs on the CPU (tests/ops/cuda_emulation.h), to be
 * tested without a GPU.
 */
#include "local_attention_tiles.h"

#include <float.h>
#include <math.h>

#ifndef LOCAL_ATTENTION_EMULATION
#include <cuda_runtime.h>
#define LAUNCH(kernel, blocks, threads, shared, stream, ...) kernel<<<blocks, threads, shared, stream>>>(__VA_ARGS__)
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int ROWS = 16;     // of a warp
constexpr int BLOCK = 16;    // columns at a time
constexpr int SIDE = 16384;  // the longest side of a grid: coordinates are kept in 15 bits
// Logarithm to base 2 of how far a score may lie above the number that weights are relative to.
constexpr float HEADROOM = 8;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <bool VALUE>
struct Constant {
    static constexpr bool value = VALUE;
};

template <class E>
struct IsFloat {
    static constexpr bool value = false;
};
template <>
struct IsFloat<float> {
    static constexpr bool value = true;
};

// ------------------------------------------------------------------------------------------------ device instructions
#ifndef LOCAL_ATTENTION_EMULATION

// c += a b with a of 16x16, b of 16x8, c of 16x8.
template <class E>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply<bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// 16 bytes from global to shared memory, zeros where `valid` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
}

template <class E>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bfloat16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <>
__device__ __forceinline__ uint32_t pack<float16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <class E>
__device__ __forceinline__ float2 unpack(uint32_t x);
template <>
__device__ __forceinline__ float2 unpack<bfloat16>(uint32_t x) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack<float16>(uint32_t x) {
    float2 r;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(r.x), "=f"(r.y) : "r"(x));
    return r;
}
__device__ __forceinline__ float fast_exp2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

#endif

// ---------------------------------------------------------------------------------------------------- work of a block

// How the cells of a grid are cut into the tiles of blocks: groups_down x groups_across groups of 16 cells, each of
// cell_rows rows.
struct Tiling {
    int source;  // grad_key: whose keys
    int cell_rows, cell_columns_log2;
    int groups_down, groups_across;
    int tiles_down, tiles_across;
    int first_block;
};

struct Launch {
    LocalAttentionProblem problem;
    Tiling tiling[LOCAL_ATTENTION_SOURCES];
    int num_tilings;
    int capacity;  // columns in shared memory, a multiple of BLOCK
};

// A rectangle of cells in the list of columns.
struct Segment {
    int source;
    int row, column, width;  // where it starts on its grid
    int start, count;        // in the list; count is padded to a multiple of BLOCK
    int cells;
};

struct Tile {
    int batch, head;
    int row, column;    // of its first cell
    int rows, columns;  // of the grid of the rows
};

template <class E>
__device__ __forceinline__ const E* head_of(const LocalAttentionTensor& t, const Tile& tile) {
    return (const E*)t.data + tile.batch * t.batch_stride + tile.head * t.head_stride;
}

__device__ __forceinline__ Tile
find_tile(const Launch& launch, const Tiling& tiling, int block, int rows, int columns) {
    const int across = block % tiling.tiles_across;
    const int rest = block / tiling.tiles_across;
    const int down = rest % tiling.tiles_down;
    const int index = rest / tiling.tiles_down;
    Tile tile;
    tile.head = index % launch.problem.heads;
    tile.batch = index / launch.problem.heads;
    tile.row = down * tiling.groups_down * tiling.cell_rows;
    tile.column = across * (tiling.groups_across << tiling.cell_columns_log2);
    tile.rows = rows;
    tile.columns = columns;
    return tile;
}

// First cell of a group of a tile, and the cell of one of its 16 rows.
struct Group {
    int row, column, columns_log2;
    int end_row;  // one past its last row on the grid

    __device__ __forceinline__ Group(const Tiling& tiling, const Tile& tile, int group) {
        row = tile.row + group / tiling.groups_across * tiling.cell_rows;
        column = tile.column + (group % tiling.groups_across << tiling.cell_columns_log2);
        columns_log2 = tiling.cell_columns_log2;
        end_row = minimum(tile.rows, row + tiling.cell_rows);
    }
    __device__ __forceinline__ int row_of(int i) const { return row + (i >> columns_log2); }
    __device__ __forceinline__ int column_of(int i) const { return column + (i & ((1 << columns_log2) - 1)); }
    __device__ __forceinline__ int position_of(int i, const Tile& tile) const {
        return row_of(i) < tile.rows && column_of(i) < tile.columns ? row_of(i) * tile.columns + column_of(i) : -1;
    }
};

__device__ __forceinline__ void finish_segment(Segment& segment, Range rows, Range columns, int start) {
    segment.row = rows.from;
    segment.column = columns.from;
    segment.width = maximum(columns.to - columns.from, 1);
    segment.cells = maximum(rows.to - rows.from, 0) * maximum(columns.to - columns.from, 0);
    segment.start = start;
    segment.count = ceil_div(segment.cells, BLOCK) * BLOCK;
}

// Shared memory: two matrices of columns, and for each column its position, coordinates and three numbers.
template <class E, int D>
struct Columns {
    static constexpr int PITCH = D + 16 / (int)sizeof(E);  // 16 bytes more, so that rows start in different banks
    static constexpr int BYTES = 2 * PITCH * (int)sizeof(E) + 20;
    E *first, *second;
    int* position;
    uint32_t* coordinates;
    float *number, *other, *third;

    __device__ __forceinline__ Columns(unsigned char* memory, int capacity) {
        first = (E*)memory;
        second = first + (int64_t)capacity * PITCH;
        position = (int*)(second + (int64_t)capacity * PITCH);
        coordinates = (uint32_t*)(position + capacity);
        number = (float*)(coordinates + capacity);
        other = number + capacity;
        third = other + capacity;
    }
};

// A cell as one number: row and column in 15 bits each, with a set guard bit above either. Subtracting another cell
// without guard bits leaves a guard bit set exactly where the coordinate is not smaller. Whole numbers compare as the
// cells do in raster order.
constexpr uint32_t GUARDS = 0x80008000u, NO_CELL = 0xffffffffu;  // the latter lies in no window, behind all others
constexpr int LAST = 0x7ffe;                                     // the largest coordinate but for that of NO_CELL

__device__ __forceinline__ uint32_t pack_cell(int row, int column) { return (uint32_t)row << 16 | (uint32_t)column; }

// The cells within reach of one, as a rectangle of packed cells; and the cell itself, where causal windows end. Others
// end at `edge`, so that the test is the same for both.
struct Window {
    uint32_t low, high, center;

    __device__ __forceinline__ Window(int row, int column, const LocalAttentionSource& s, bool exists, uint32_t edge) {
        const int down = minimum(row + s.reach_rows, LAST), right = minimum(column + s.reach_columns, LAST);
        low = exists ? pack_cell(maximum(row - s.reach_rows, 0), maximum(column - s.reach_columns, 0)) : ~GUARDS;
        high = (exists ? pack_cell(down, right) : 0) + 2 * GUARDS;  // once for its own, once for the other's
        center = s.causal ? pack_cell(row, column) | GUARDS : edge;
    }
    __device__ __forceinline__ bool holds(uint32_t cell) const {
        return ((cell - low) & (high - cell) & GUARDS) == GUARDS;
    }
};

// Copies columns of a chunk of two tensors, of `size` elements each, whose positions are in the table; absent ones
// become zeros. A thread copies the same piece of every STEP-th column.
template <class E, int D>
__device__ __forceinline__ void load_columns(
    E* to_first, E* to_second, const LocalAttentionTensor& first, const LocalAttentionTensor& second, const Tile& tile,
    const int* positions, int count, int size) {
    constexpr int PIECE = 16 / (int)sizeof(E), PIECES = D / PIECE, STEP = THREADS / PIECES;
    constexpr int PITCH = Columns<E, D>::PITCH;
    const int d = threadIdx.x % PIECES * PIECE, start = threadIdx.x / PIECES;
    const bool inside = d < size;
    const E* from_first = head_of<E>(first, tile) + (inside ? d : 0);
    const E* from_second = head_of<E>(second, tile) + (inside ? d : 0);
    const int64_t stride_first = first.position_stride, stride_second = second.position_stride;
    to_first += start * PITCH + d, to_second += start * PITCH + d;
    for (int c = start; c < count; c += STEP, to_first += STEP * PITCH, to_second += STEP * PITCH) {
        const int position = positions[c], at = position < 0 ? 0 : position;
        const bool valid = inside && position >= 0;
        copy_async(to_first, from_first + at * stride_first, valid);
        copy_async(to_second, from_second + at * stride_second, valid);
    }
}

// ----------------------------------------------------------------------------------------------------- work of a warp
// An engine multiplies 16 rows with blocks of 16 columns. A lane holds NUMBERS of the scores: number n is in its own
// row own_row(n), of which it has OWN, and in its own column own_column(n), of which it has COLUMNS. The i-th own row
// is row row_of(i) of the warp; of_columns reads what belongs to its own columns.

template <class T>
struct Vectors;
template <>
struct Vectors<float> {
    typedef float2 Two;
    typedef float4 Four;
};
template <>
struct Vectors<uint32_t> {
    typedef uint2 Two;
    typedef uint4 Four;
};

// Tensor cores, for half precision: lane l holds rows l / 4 and l / 4 + 8, and columns 2 (l % 4), + 1 of each 8.
template <class E, int D>
struct TensorCores {
    static constexpr int OWN = 2, COLUMNS = 4, NUMBERS = 8, PASSES = 1, PITCH = Columns<E, D>::PITCH;
    typedef uint32_t Rows[D / 16][4];
    typedef float Sum[D / 8][4];
    typedef float Scores[2][4];

    static __device__ __forceinline__ int lane() { return threadIdx.x & 31; }
    static __device__ __forceinline__ int row_of(int i, int) { return lane() / 4 + 8 * i; }

    static __device__ __forceinline__ void load_rows(
        Rows& rows, const E* from, int64_t stride, const int (&position)[OWN], int size) {
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            for (int part = 0; part < 4; part++) {
                const int d = k * 16 + (part / 2) * 8 + 2 * (lane() % 4);
                const bool valid = position[part % 2] >= 0 && d < size;
                rows[k][part] = valid ? *(const uint32_t*)(from + position[part % 2] * stride + d) : 0;
            }
    }
    static __device__ __forceinline__ void clear(Sum& sum) {
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            for (int e = 0; e < 4; e++) sum[n][e] = 0;
    }
    // Sum over d of the products of two rows, for each own row.
    static __device__ __forceinline__ void dot(float (&result)[OWN], const Rows& a, const Rows& b) {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            float sum = 0;
#pragma unroll
            for (int k = 0; k < D / 16; k++)
                for (int half = 0; half < 2; half++) {
                    const float2 x = unpack<E>(a[k][half * 2 + i]), y = unpack<E>(b[k][half * 2 + i]);
                    sum += x.x * y.x + x.y * y.y;
                }
            result[i] = reduce_sum(sum);
        }
    }
    static __device__ __forceinline__ float reduce_sum(float x) {
        x += __shfl_xor_sync(0xffffffffu, x, 1);
        return x + __shfl_xor_sync(0xffffffffu, x, 2);
    }
    static __device__ __forceinline__ float reduce_max(float x) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
        return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
    }
    // scores = rows . columns, for the 16 columns from `column` on.
    static __device__ __forceinline__ void score(Scores& scores, const Rows& rows, const E* columns, int column) {
#pragma unroll
        for (int j = 0; j < 2; j++)
            for (int e = 0; e < 4; e++) scores[j][e] = 0;
        const E* at = columns + (column + lane() / 16 * 8 + lane() % 8) * PITCH + lane() / 8 % 2 * 8;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t b[4];
            load_matrices(b, at + k * 16);
            multiply<E>(scores[0], rows[k], b[0], b[1]);
            multiply<E>(scores[1], rows[k], b[2], b[3]);
        }
    }
    // sum += weights . columns.
    static __device__ __forceinline__ void add(Sum& sum, const Scores& weights, const E* columns, int column) {
        const uint32_t a[4] = {
            pack<E>(weights[0][0], weights[0][1]), pack<E>(weights[0][2], weights[0][3]),
            pack<E>(weights[1][0], weights[1][1]), pack<E>(weights[1][2], weights[1][3])};
        const E* at = columns + (column + lane() / 8 % 2 * 8 + lane() % 8) * PITCH + lane() / 16 * 8;
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            load_matrices_transposed(b, at + n * 16);
            multiply<E>(sum[2 * n], a, b[0], b[1]);
            multiply<E>(sum[2 * n + 1], a, b[2], b[3]);
        }
    }
    static __device__ __forceinline__ float& number(Scores& scores, int n) { return scores[n / 4][n % 4]; }
    static constexpr __device__ __forceinline__ int own_row(int n) { return n / 2 % 2; }
    static constexpr __device__ __forceinline__ int own_column(int n) { return n / 4 * 2 + n % 2; }
    template <class T>
    static __device__ __forceinline__ void of_columns(T (&to)[COLUMNS], const T* table, int column) {
        typedef typename Vectors<T>::Two Two;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const Two two = *(const Two*)(table + column + j * 8 + 2 * (lane() % 4));
            to[2 * j] = two.x, to[2 * j + 1] = two.y;
        }
    }
    static __device__ __forceinline__ void scale_rows(Sum& sum, const float (&factor)[OWN]) {
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[n][e] *= factor[e / 2];
    }
    // f(own row, d, number) for every element of the sum.
    template <class F>
    static __device__ __forceinline__ void each_sum(const Sum& sum, F f) {
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) f(e / 2, n * 8 + 2 * (lane() % 4) + e % 2, sum[n][e]);
    }
};

// Plain arithmetic, for float32: SHARE lanes share a row, each with every SHARE-th piece of four elements. Columns are
// read by all at once.
template <int D>
struct Fma {
    static constexpr int SHARE = D > 64 ? 4 : 2, MINE = D / SHARE;
    static constexpr int OWN = 1, COLUMNS = BLOCK, NUMBERS = BLOCK, PASSES = ROWS * SHARE / 32;
    static constexpr int PITCH = Columns<float, D>::PITCH;
    typedef float Rows[MINE];
    typedef float Sum[MINE];
    typedef float Scores[BLOCK];

    static __device__ __forceinline__ int lane() { return threadIdx.x & 31; }
    static __device__ __forceinline__ int row_of(int, int pass) { return lane() / SHARE + pass * (32 / SHARE); }
    static __device__ __forceinline__ int element(int m) { return (m / 4 * SHARE + lane() % SHARE) * 4 + m % 4; }

    static __device__ __forceinline__ void load_rows(
        Rows& rows, const float* from, int64_t stride, const int (&position)[OWN], int size) {
#pragma unroll
        for (int m = 0; m < MINE; m++)
            rows[m] = position[0] >= 0 && element(m) < size ? from[position[0] * stride + element(m)] : 0.0f;
    }
    static __device__ __forceinline__ void clear(Sum& sum) {
#pragma unroll
        for (int m = 0; m < MINE; m++) sum[m] = 0;
    }
    static __device__ __forceinline__ float share_sum(float x) {
#pragma unroll
        for (int step = 1; step < SHARE; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
        return x;
    }
    static __device__ __forceinline__ void dot(float (&result)[OWN], const Rows& a, const Rows& b) {
        float sum = 0;
#pragma unroll
        for (int m = 0; m < MINE; m++) sum += a[m] * b[m];
        result[0] = share_sum(sum);
    }
    static __device__ __forceinline__ float reduce_sum(float x) { return x; }
    static __device__ __forceinline__ float reduce_max(float x) { return x; }
    static __device__ __forceinline__ void score(Scores& scores, const Rows& rows, const float* columns, int column) {
#pragma unroll
        for (int c = 0; c < BLOCK; c++) {
            const float* at = columns + (column + c) * PITCH + lane() % SHARE * 4;
            float sum = 0;
#pragma unroll
            for (int m = 0; m < MINE; m += 4) {
                const float4 x = *(const float4*)(at + m * SHARE);
                sum += rows[m] * x.x + rows[m + 1] * x.y + rows[m + 2] * x.z + rows[m + 3] * x.w;
            }
            scores[c] = share_sum(sum);
        }
    }
    static __device__ __forceinline__ void add(Sum& sum, const Scores& weights, const float* columns, int column) {
        __syncwarp();  // else the assembler keeps columns from `score` on in registers, far more than there are
#pragma unroll
        for (int c = 0; c < BLOCK; c++) {
            const float* at = columns + (column + c) * PITCH + lane() % SHARE * 4;
#pragma unroll
            for (int m = 0; m < MINE; m += 4) {
                const float4 x = *(const float4*)(at + m * SHARE);
                sum[m] += weights[c] * x.x, sum[m + 1] += weights[c] * x.y;
                sum[m + 2] += weights[c] * x.z, sum[m + 3] += weights[c] * x.w;
            }
        }
    }
    static __device__ __forceinline__ float& number(Scores& scores, int n) { return scores[n]; }
    static constexpr __device__ __forceinline__ int own_row(int) { return 0; }
    static constexpr __device__ __forceinline__ int own_column(int n) { return n; }
    template <class T>
    static __device__ __forceinline__ void of_columns(T (&to)[COLUMNS], const T* table, int column) {
        typedef typename Vectors<T>::Four Four;
#pragma unroll
        for (int j = 0; j < COLUMNS; j += 4) {
            const Four four = *(const Four*)(table + column + j);
            to[j] = four.x, to[j + 1] = four.y, to[j + 2] = four.z, to[j + 3] = four.w;
        }
    }
    static __device__ __forceinline__ void scale_rows(Sum& sum, const float (&factor)[OWN]) {
#pragma unroll
        for (int m = 0; m < MINE; m++) sum[m] *= factor[0];
    }
    template <class F>
    static __device__ __forceinline__ void each_sum(const Sum& sum, F f) {
#pragma unroll
        for (int m = 0; m < MINE; m++) f(0, element(m), sum[m]);
    }
};

template <class E, int D>
struct EngineOf {
    typedef TensorCores<E, D> type;
};
template <int D>
struct EngineOf<float, D> {
    typedef Fma<D> type;
};

template <class E>
__device__ __forceinline__ float exponential(float x) {
    if constexpr (IsFloat<E>::value)
        return exp2f(x);
    else
        return fast_exp2(x);
}

// Adds the sums of the warps up in shared memory (those of the warps that share rows too) and writes rows of the
// tensor.
template <class E, int D, class Engine>
__device__ __forceinline__ void write_rows(
    const Launch& launch, const Tiling& tiling, const LocalAttentionTensor& t, const Tile& tile, unsigned char* memory,
    int group, int split, int splits, int pass, const typename Engine::Sum& sum, const float (&factor)[Engine::OWN]) {
    constexpr int PITCH = D + 4;
    float* stage = (float*)memory;  // groups * ROWS rows
    for (int turn = 0; turn < splits; turn++) {
        __syncthreads();
        if (turn != split) continue;
        Engine::each_sum(sum, [&](int i, int d, float x) {
            float* at = stage + (group * ROWS + Engine::row_of(i, pass)) * PITCH + d;
            *at = turn ? *at + x * factor[i] : x * factor[i];
        });
    }
    __syncthreads();
    constexpr int PIECE = 16 / (int)sizeof(E), PIECES = D / PIECE;
    const int pass_rows = ROWS / Engine::PASSES, groups = WARPS / splits;
    E* to = (E*)head_of<E>(t, tile);
    for (int i = threadIdx.x; i < groups * pass_rows * PIECES; i += THREADS) {
        const int row = i / PIECES % pass_rows + pass * pass_rows, d = i % PIECES * PIECE;
        const int its_group = i / PIECES / pass_rows;
        const int position = Group(tiling, tile, its_group).position_of(row, tile);
        if (position < 0 || d >= launch.problem.head_dim) continue;
        const float* from = stage + (its_group * ROWS + row) * PITCH + d;
        E* at = to + position * t.position_stride + d;
        if constexpr (IsFloat<E>::value) {
            *(float4*)at = *(const float4*)from;
        } else {
            uint4 packed;
            packed.x = pack<E>(from[0], from[1]), packed.y = pack<E>(from[2], from[3]);
            packed.z = pack<E>(from[4], from[5]), packed.w = pack<E>(from[6], from[7]);
            *(uint4*)at = packed;
        }
    }
    __syncthreads();
}

// How far apart the two halves of `softmax` are.
__device__ __forceinline__ int64_t half_of_softmax(const LocalAttentionProblem& p) {
    return (int64_t)p.batch * p.heads * p.rows * p.columns;
}

// The bias of a key in units of log 2. What was finite stays so: the lowest number hides a key only beside others.
__device__ __forceinline__ float bias_of(const LocalAttentionSource& s, int batch, int64_t key) {
    const float bias = ((const float*)s.bias)[batch * s.bias_stride + key], scaled = bias * LOG2_E;
    return fabsf(bias) == INFINITY || fabsf(scaled) != INFINITY ? scaled : copysignf(FLT_MAX, bias);
}

// What a warp knows of its rows while it attends: queries against keys. Weights are relative to `most`, in units of
// log 2, which in the forward lies at most HEADROOM below the largest score.
template <int OWN>
struct Softmax {
    float most[OWN], sum[OWN];
    float log_sum[OWN], delta[OWN];  // backward: of the sum, and dO . O - the gradient of the logsumexp
};

// Scores as logarithms to base 2, minus infinity where a row does not see a column. PLAIN: neither bias nor causal,
// and a positive scale; scores are then left as they are, to be multiplied when their exponentials are taken.
template <class E, int D, bool PLAIN, class Engine, class Windows>
__device__ __forceinline__ void mask_scores(
    typename Engine::Scores& scores, const Columns<E, D>& columns, int block, const Windows& windows, float scale) {
    uint32_t cells[Engine::COLUMNS];
    float bias[Engine::COLUMNS];
    Engine::of_columns(cells, columns.coordinates, block);
    if (!PLAIN) Engine::of_columns(bias, columns.number, block);
#pragma unroll
    for (int n = 0; n < Engine::NUMBERS; n++) {
        float& x = Engine::number(scores, n);
        const Window& window = windows[Engine::own_row(n)];
        const uint32_t cell = cells[Engine::own_column(n)];
        bool seen = window.holds(cell);
        if (!PLAIN) {
            seen = seen && cell <= window.center;
            x = fmaf(x, scale, bias[Engine::own_column(n)]);
        }
        x = seen ? x : -INFINITY;
    }
}

// A masked score relative to `most`.
template <bool PLAIN>
__device__ __forceinline__ float relative(float x, float scale, float most) {
    return PLAIN ? fmaf(x, scale, -most) : x - most;
}

// One block of columns of the forward: the online softmax. All that is added up is multiplied anew only if a score
// lies more than HEADROOM above what weights are relative to, which is rare.
template <class E, int D, bool PLAIN, class Engine, class Windows>
__device__ __forceinline__ void forward_block(
    const Columns<E, D>& columns, int block, const typename Engine::Rows& query, const Windows& windows, float scale,
    Softmax<Engine::OWN>& softmax, typename Engine::Sum& sum) {
    constexpr int OWN = Engine::OWN;
    typename Engine::Scores scores;
    Engine::score(scores, query, columns.first, block);
    mask_scores<E, D, PLAIN, Engine>(scores, columns, block, windows, scale);
    float now[OWN];
    bool grown = false;
#pragma unroll
    for (int k = 0; k < OWN; k++) now[k] = -INFINITY;
#pragma unroll
    for (int n = 0; n < Engine::NUMBERS; n++)
        now[Engine::own_row(n)] = fmaxf(now[Engine::own_row(n)], Engine::number(scores, n));
#pragma unroll
    for (int k = 0; k < OWN; k++) {
        if (PLAIN) now[k] *= scale;
        grown |= now[k] > softmax.most[k] + HEADROOM;
    }
    if (__any_sync(0xffffffffu, grown)) {
        float factor[OWN];
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            const float most = fmaxf(Engine::reduce_max(now[k]), softmax.most[k]);
            factor[k] = exponential<E>(softmax.most[k] - most);
            softmax.sum[k] *= factor[k];
            softmax.most[k] = most;
        }
        Engine::scale_rows(sum, factor);
    }
#pragma unroll
    for (int n = 0; n < Engine::NUMBERS; n++) {
        float& x = Engine::number(scores, n);
        x = exponential<E>(relative<PLAIN>(x, scale, softmax.most[Engine::own_row(n)]));
        softmax.sum[Engine::own_row(n)] += x;
    }
    Engine::add(sum, scores, columns.second, block);
}

// One block of columns of the gradient of the queries.
template <class E, int D, bool PLAIN, class Engine, class Windows>
__device__ __forceinline__ void grad_query_block(
    const Columns<E, D>& columns, int block, const typename Engine::Rows& query,
    const typename Engine::Rows& grad_output, const Windows& windows, float scale,
    const Softmax<Engine::OWN>& softmax, typename Engine::Sum& sum) {
    typename Engine::Scores scores, grads;
    Engine::score(scores, query, columns.first, block);
    mask_scores<E, D, PLAIN, Engine>(scores, columns, block, windows, scale);
    Engine::score(grads, grad_output, columns.second, block);
#pragma unroll
    for (int n = 0; n < Engine::NUMBERS; n++) {
        const int k = Engine::own_row(n);
        float& x = Engine::number(scores, n);
        // First what may be large, exactly as the forward did.
        x = exponential<E>(relative<PLAIN>(x, scale, softmax.most[k]) - softmax.log_sum[k]);
        x *= Engine::number(grads, n) - softmax.delta[k];
    }
    Engine::add(sum, scores, columns.first, block);
}

// One block of columns, which are queries, of the gradients of keys and values. Of the columns, `number` is what
// weights are relative to, `third` the logarithm of their sum, and `other` what is taken off the gradients of weights.
template <class E, int D, bool PLAIN, class Engine, class Windows>
__device__ __forceinline__ void grad_key_block(
    const Columns<E, D>& columns, int block, const typename Engine::Rows& key, const typename Engine::Rows& value,
    const Windows& windows, float scale, const float (&bias)[Engine::OWN], typename Engine::Sum& grad_key,
    typename Engine::Sum& grad_value) {
    constexpr int COLUMNS = Engine::COLUMNS;
    typename Engine::Scores weights, grads;
    Engine::score(weights, key, columns.first, block);
    uint32_t cells[COLUMNS];
    float most[COLUMNS], log_sum[COLUMNS];
    Engine::of_columns(cells, columns.coordinates, block);
    Engine::of_columns(most, columns.number, block);
    Engine::of_columns(log_sum, columns.third, block);
#pragma unroll
    for (int n = 0; n < Engine::NUMBERS; n++) {
        const int k = Engine::own_row(n), c = Engine::own_column(n);
        float& x = Engine::number(weights, n);
        bool seen = windows[k].holds(cells[c]);
        if (!PLAIN) {
            seen = seen && cells[c] >= windows[k].center;
            x = fmaf(x, scale, bias[k]);
        }
        x = exponential<E>(relative<PLAIN>(x, scale, most[c]) - log_sum[c]);
        x = seen ? x : 0.0f;
    }
    Engine::add(grad_value, weights, columns.second, block);
    Engine::score(grads, value, columns.second, block);
    float delta[COLUMNS];
    Engine::of_columns(delta, columns.other, block);
#pragma unroll
    for (int n = 0; n < Engine::NUMBERS; n++) {
        float& x = Engine::number(grads, n);
        x = (x - delta[Engine::own_column(n)]) * Engine::number(weights, n);
    }
    Engine::add(grad_key, grads, columns.first, block);
}

// -------------------------------------------------------------------------------------------------------- the kernels

// Queries against keys. BACKWARD: the gradient of the queries, else the output.
template <class E, int D, bool BACKWARD>
__device__ __forceinline__ void attend(const Launch& launch, unsigned char* memory) {
    typedef typename EngineOf<E, D>::type Engine;
    constexpr int OWN = Engine::OWN;
    const LocalAttentionProblem& p = launch.problem;
    const Tiling& tiling = launch.tiling[0];
    const Tile tile = find_tile(launch, tiling, blockIdx.x, p.rows, p.columns);
    const int group_index = threadIdx.x / 32;
    const Group group(tiling, tile, group_index);
    const Columns<E, D> columns(memory, launch.capacity);
    const float scale = (float)(p.scale * (double)LOG2_E);

    // The keys that the tile sees; in shared memory, since loops over the sources index it.
    __shared__ Segment segments[LOCAL_ATTENTION_SOURCES];
    int total = 0;
    const int last_row = minimum(p.rows, tile.row + tiling.groups_down * tiling.cell_rows) - 1;
    const int last_column = minimum(p.columns, tile.column + (tiling.groups_across << tiling.cell_columns_log2)) - 1;
#pragma unroll 1
    for (int i = 0; i < LOCAL_ATTENTION_SOURCES; i++) {
        const LocalAttentionSource& s = p.source[i];
        Range rows = {0, 0}, across = {0, 0};
        if (s.key.data) {
            rows = keys_seen(s.rows, s.reach_rows, s.ratio_rows, s.causal, tile.row, last_row);
            across = keys_seen(s.columns, s.reach_columns, s.ratio_columns, false, tile.column, last_column);
        }
        Segment segment;
        segment.source = i;
        finish_segment(segment, rows, across, total);
        total += segment.count;
        if (threadIdx.x == 0) segments[i] = segment;
    }
    if (BACKWARD && !p.grad_query.data) total = 0;  // only `delta` is wanted, for the gradients of keys
    __syncthreads();

#pragma unroll 1
    for (int pass = 0; pass < Engine::PASSES; pass++) {
        typename Engine::Rows query, grad_output;
        typename Engine::Sum sum;
        int position[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i++) position[i] = group.position_of(Engine::row_of(i, pass), tile);
        Engine::load_rows(query, head_of<E>(p.query, tile), p.query.position_stride, position, p.head_dim);
        Engine::clear(sum);
        const int64_t of_head = ((int64_t)tile.batch * p.heads + tile.head) * p.rows * p.columns;
        Softmax<OWN> softmax;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            softmax.most[i] = BACKWARD ? 0 : -FLT_MAX;
            softmax.sum[i] = softmax.log_sum[i] = softmax.delta[i] = 0;
        }
        if constexpr (BACKWARD) {
            typename Engine::Rows output;
            Engine::load_rows(output, head_of<E>(p.output, tile), p.output.position_stride, position, p.head_dim);
            Engine::load_rows(
                grad_output, head_of<E>(p.grad_output, tile), p.grad_output.position_stride, position, p.head_dim);
            Engine::dot(softmax.delta, output, grad_output);
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                if (position[i] < 0) continue;
                const float* saved = (const float*)p.softmax + of_head + position[i];
                softmax.most[i] = saved[0], softmax.log_sum[i] = saved[half_of_softmax(p)];
                if (p.grad_logsumexp) softmax.delta[i] -= ((const float*)p.grad_logsumexp)[of_head + position[i]];
                p.delta[of_head + position[i]] = softmax.delta[i];  // every lane of a row writes the same
            }
        }

#pragma unroll 1
        for (int chunk = 0; chunk < total; chunk += launch.capacity) {
            const int count = minimum(launch.capacity, total - chunk);
            __syncthreads();
            for (int c = threadIdx.x; c < count; c += THREADS) {
                const int at = chunk + c;
                const Segment& segment = at >= segments[2].start   ? segments[2]
                                         : at >= segments[1].start ? segments[1]
                                                                   : segments[0];
                const int cell = at - segment.start, row = segment.row + cell / segment.width,
                          column = segment.column + cell % segment.width;
                const bool valid = cell < segment.cells;
                const LocalAttentionSource& s = p.source[segment.source];
                columns.position[c] = valid ? row * s.columns + column : -1;
                columns.coordinates[c] = valid ? pack_cell(row, column) | GUARDS : NO_CELL;
                columns.number[c] =
                    s.bias && valid ? bias_of(s, tile.batch, (int64_t)row * s.columns + column) : 0;
            }
            __syncthreads();
#pragma unroll 1
            for (int i = 0; i < LOCAL_ATTENTION_SOURCES; i++) {
                const LocalAttentionSource& s = p.source[i];
                const int from = maximum(segments[i].start, chunk),
                          to = minimum(segments[i].start + segments[i].count, chunk + count);
                if (from >= to) continue;
                const int at = from - chunk, offset = at * Columns<E, D>::PITCH;
                load_columns<E, D>(
                    columns.first + offset, columns.second + offset, s.key, s.value, tile, columns.position + at,
                    to - from, p.head_dim);
            }
            copy_wait();
            __syncthreads();

#pragma unroll 1
            for (int i = 0; i < LOCAL_ATTENTION_SOURCES; i++) {
                if (!segments[i].count || group.row >= group.end_row) continue;
                const LocalAttentionSource& s = p.source[i];
                const Range rows =
                    keys_seen(s.rows, s.reach_rows, s.ratio_rows, s.causal, group.row, group.end_row - 1);
                const int width = segments[i].width;
                const int begin = segments[i].start + (rows.from - segments[i].row) * width / BLOCK * BLOCK;
                const int end = segments[i].start + (rows.to - segments[i].row) * width;
                const auto around = [&](int k) {
                    const int cell = Engine::row_of(k, pass);
                    return Window(
                        group.row_of(cell) / s.ratio_rows, group.column_of(cell) / s.ratio_columns, s,
                        position[k] >= 0, NO_CELL);
                };
                const Window windows[2] = {around(0), around(OWN - 1)};
                const int last = minimum(end, chunk + count);
                const auto walk = [&](auto plain) {
                    constexpr bool PLAIN = decltype(plain)::value;
#pragma unroll 1
                    for (int at = maximum(begin, chunk); at < last; at += BLOCK) {
                        if constexpr (BACKWARD)
                            grad_query_block<E, D, PLAIN, Engine>(
                                columns, at - chunk, query, grad_output, windows, scale, softmax, sum);
                        else
                            forward_block<E, D, PLAIN, Engine>(
                                columns, at - chunk, query, windows, scale, softmax, sum);
                    }
                };
                if (s.causal || s.bias || !(scale > 0))
                    walk(Constant<false>());
                else
                    walk(Constant<true>());
            }
        }

        float factor[OWN];
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            if constexpr (BACKWARD) {
                factor[k] = (float)p.scale;
            } else {
                const float all = Engine::reduce_sum(softmax.sum[k]), log_sum = log2f(all), most = softmax.most[k];
                factor[k] = all > 0 || all != all ? 1 / all : 0;
                if (position[k] < 0) continue;
                float* logsumexp = (float*)p.logsumexp + of_head + position[k];
                *logsumexp = all == 0 ? -INFINITY : most == -FLT_MAX ? -FLT_MAX : (most + log_sum) * LN_2;
                if (!p.softmax) continue;
                float* saved = (float*)p.softmax + of_head + position[k];
                saved[0] = all == 0 ? 0 : most;
                saved[half_of_softmax(p)] = all == 0 ? 0 : log_sum;
            }
        }
        if (BACKWARD && !p.grad_query.data) continue;
        write_rows<E, D, Engine>(
            launch, tiling, BACKWARD ? p.grad_query : p.output, tile, memory, group_index, 0, 1, pass, sum, factor);
    }
}

// Keys of one source against the queries that see them: the gradients of keys and values.
template <class E, int D>
__device__ __forceinline__ void attend_keys(const Launch& launch, unsigned char* memory) {
    typedef typename EngineOf<E, D>::type Engine;
    constexpr int OWN = Engine::OWN;
    const LocalAttentionProblem& p = launch.problem;
    int which = 0;
    while (which + 1 < launch.num_tilings && (int)blockIdx.x >= launch.tiling[which + 1].first_block) which++;
    const Tiling& tiling = launch.tiling[which];
    const LocalAttentionSource& s = p.source[tiling.source];
    const Tile tile = find_tile(launch, tiling, blockIdx.x - tiling.first_block, s.rows, s.columns);
    const int groups = tiling.groups_down * tiling.groups_across, splits = WARPS / groups;
    const int group_index = threadIdx.x / 32 % groups, split = threadIdx.x / 32 / groups;
    const Group group(tiling, tile, group_index);
    const Columns<E, D> columns(memory, launch.capacity);
    const float scale = (float)(p.scale * (double)LOG2_E);

    Segment segment;
    const int last_row = minimum(s.rows, tile.row + tiling.groups_down * tiling.cell_rows) - 1;
    const int last_column = minimum(s.columns, tile.column + (tiling.groups_across << tiling.cell_columns_log2)) - 1;
    finish_segment(
        segment, queries_seeing(p.rows, s.reach_rows, s.ratio_rows, s.causal, tile.row, last_row),
        queries_seeing(p.columns, s.reach_columns, s.ratio_columns, false, tile.column, last_column), 0);
    int begin = 0, end = 0;
    if (group.row < group.end_row) {
        const Range rows = queries_seeing(p.rows, s.reach_rows, s.ratio_rows, s.causal, group.row, group.end_row - 1);
        begin = (rows.from - segment.row) * segment.width / BLOCK * BLOCK;
        end = (rows.to - segment.row) * segment.width;
    }

#pragma unroll 1
    for (int pass = 0; pass < Engine::PASSES; pass++) {
        typename Engine::Rows key, value;
        typename Engine::Sum grad_key, grad_value;
        int position[OWN];
        float bias[OWN];
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            position[k] = group.position_of(Engine::row_of(k, pass), tile);
            bias[k] = s.bias && position[k] >= 0 ? bias_of(s, tile.batch, position[k]) : 0;
        }
        const auto around = [&](int k) {
            const int cell = Engine::row_of(k, pass);
            return Window(group.row_of(cell), group.column_of(cell), s, position[k] >= 0, 0);
        };
        const Window windows[2] = {around(0), around(OWN - 1)};
        Engine::load_rows(key, head_of<E>(s.key, tile), s.key.position_stride, position, p.head_dim);
        Engine::load_rows(value, head_of<E>(s.value, tile), s.value.position_stride, position, p.head_dim);
        Engine::clear(grad_key);
        Engine::clear(grad_value);
        const int64_t of_head = ((int64_t)tile.batch * p.heads + tile.head) * p.rows * p.columns;

#pragma unroll 1
        for (int chunk = 0; chunk < segment.count; chunk += launch.capacity) {
            const int count = minimum(launch.capacity, segment.count - chunk);
            __syncthreads();
            for (int c = threadIdx.x; c < count; c += THREADS) {
                const int cell = chunk + c, row = segment.row + cell / segment.width,
                          column = segment.column + cell % segment.width;
                const bool valid = cell < segment.cells;
                const int64_t at = row * p.columns + column;
                columns.position[c] = valid ? (int)at : -1;
                columns.coordinates[c] =
                    valid ? pack_cell(row / s.ratio_rows, column / s.ratio_columns) | GUARDS : NO_CELL;
                columns.number[c] = valid ? ((const float*)p.softmax)[of_head + at] : 0;
                columns.other[c] = valid ? p.delta[of_head + at] : 0;
                columns.third[c] = valid ? ((const float*)p.softmax)[half_of_softmax(p) + of_head + at] : 0;
            }
            __syncthreads();
            load_columns<E, D>(
                columns.first, columns.second, p.query, p.grad_output, tile, columns.position, count, p.head_dim);
            copy_wait();
            __syncthreads();

            const int last = minimum(end, chunk + count), start = maximum(begin, chunk);
            const auto walk = [&](auto plain) {
                constexpr bool PLAIN = decltype(plain)::value;
#pragma unroll 1
                for (int at = start + split * BLOCK; at < last; at += splits * BLOCK)
                    grad_key_block<E, D, PLAIN, Engine>(
                        columns, at - chunk, key, value, windows, scale, bias, grad_key, grad_value);
            };
            if (s.causal || s.bias || !(scale > 0))
                walk(Constant<false>());
            else
                walk(Constant<true>());
        }
        float factor[OWN];
#pragma unroll
        for (int k = 0; k < OWN; k++) factor[k] = (float)p.scale;
        if (s.grad_key.data)
            write_rows<E, D, Engine>(
                launch, tiling, s.grad_key, tile, memory, group_index, split, splits, pass, grad_key, factor);
#pragma unroll
        for (int k = 0; k < OWN; k++) factor[k] = 1;
        if (s.grad_value.data)
            write_rows<E, D, Engine>(
                launch, tiling, s.grad_value, tile, memory, group_index, split, splits, pass, grad_value, factor);
    }
}

// How many blocks share a multiprocessor: two where their registers fit (128 a thread), else one (255). The gradients
// of keys have two sums, which fit into 128 registers with 32 dimensions only.
template <class E, int D>
constexpr int forward_blocks() {
    return D > 64 || IsFloat<E>::value ? 1 : 2;
}
template <class E, int D>
constexpr int grad_key_blocks() {
    return D > 32 || IsFloat<E>::value ? 1 : 2;
}

template <class E, int D>
__global__ void __launch_bounds__(THREADS, forward_blocks<E, D>())
    forward_kernel(const __grid_constant__ Launch launch) {
    SHARED_MEMORY(memory);
    attend<E, D, false>(launch, memory);
}
template <class E, int D>
__global__ void __launch_bounds__(THREADS, forward_blocks<E, D>())
    grad_query_kernel(const __grid_constant__ Launch launch) {
    SHARED_MEMORY(memory);
    attend<E, D, true>(launch, memory);
}
template <class E, int D>
__global__ void __launch_bounds__(THREADS, grad_key_blocks<E, D>())
    grad_key_kernel(const __grid_constant__ Launch launch) {
    SHARED_MEMORY(memory);
    attend_keys<E, D>(launch, memory);
}

// --------------------------------------------------------------------------------------------------------------- host

thread_local const char* last_error = "";

// Longest list of columns of a tile with these extents, padded segment by segment.
int columns_of_extent(const LocalAttentionProblem& p, int source, int rows, int columns) {
    int total = 0;
    for (int i = 0; i < LOCAL_ATTENTION_SOURCES; i++) {
        const LocalAttentionSource& s = p.source[i];
        if (!s.key.data || (source >= 0 && i != source)) continue;
        int64_t down, across;
        if (source < 0) {
            down = minimum(s.rows, (rows + s.ratio_rows - 2) / s.ratio_rows + 1 + 2 * s.reach_rows);
            across = minimum(s.columns, (columns + s.ratio_columns - 2) / s.ratio_columns + 1 + 2 * s.reach_columns);
        } else {
            const int64_t wide_down = (int64_t)s.ratio_rows * (rows + 2 * s.reach_rows);
            const int64_t wide_across = (int64_t)s.ratio_columns * (columns + 2 * (int64_t)s.reach_columns);
            down = wide_down < p.rows ? wide_down : p.rows;
            across = wide_across < p.columns ? wide_across : p.columns;
        }
        total += ceil_div((int)(down * across), BLOCK) * BLOCK;
    }
    return total;
}

// The tile shape with the least work: columns that warps multiply with, and columns that are copied. source < 0: the
// queries.
Tiling choose_tiling(const LocalAttentionProblem& p, int source) {
    const int rows = source < 0 ? p.rows : p.source[source].rows,
              columns = source < 0 ? p.columns : p.source[source].columns;
    Tiling best = {};
    double least = INFINITY;
    for (int log2 = 0; log2 <= 4; log2++)
        for (int groups = source < 0 ? WARPS : 1; groups <= WARPS; groups *= 2)
            for (int down = 1; down <= groups; down *= 2) {
                Tiling t = {};
                t.source = source;
                t.cell_columns_log2 = log2;
                t.cell_rows = ROWS >> log2;
                t.groups_down = down;
                t.groups_across = groups / down;
                const int tile_rows = down * t.cell_rows, tile_columns = t.groups_across << log2;
                t.tiles_down = ceil_div(rows, tile_rows);
                t.tiles_across = ceil_div(columns, tile_columns);
                const int splits = WARPS / groups;
                // A warp walks over whole rows of the rectangle of the tile.
                const int walked = columns_of_extent(p, source, t.cell_rows, tile_columns);
                const double cost =
                    (double)t.tiles_down * t.tiles_across *
                    (columns_of_extent(p, source, tile_rows, tile_columns) + WARPS * ceil_div(walked, splits));
                if (cost < least) least = cost, best = t;
            }
    return best;
}

#ifndef LOCAL_ATTENTION_EMULATION
int fail(cudaError_t error) {
    last_error = cudaGetErrorString(error);
    return LOCAL_ATTENTION_CUDA_ERROR;
}

// Shared memory that a block may use, of which each multiprocessor is to hold `blocks`. What there is depends on the
// architecture: 228 KB on sm_90 and sm_100, 164 KB on sm_80, 100 KB on sm_86, sm_89 and sm_120. A block takes 1 KB for
// itself, and the kernels hold some bytes beside this.
int shared_memory_limit(int blocks) {
    int device = 0, of_block = 0, of_processor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&of_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    return minimum(of_block, of_processor / blocks - 1024) - 1024;
}
#endif

template <class E, int D, class Kernel>
int launch_kernel(Kernel kernel, int blocks_per_processor, Launch& launch, int columns) {
    const LocalAttentionProblem& p = launch.problem;
    int64_t blocks = 0;
    const int64_t heads = (int64_t)p.batch * p.heads;
    int stage = 0;
    for (int i = 0; i < launch.num_tilings; i++) {
        Tiling& t = launch.tiling[i];
        t.first_block = (int)blocks;
        blocks += heads * t.tiles_down * t.tiles_across;
        stage = maximum(stage, t.groups_down * t.groups_across * ROWS * (D + 4) * (int)sizeof(float));
    }
    if (!blocks) return LOCAL_ATTENTION_OK;
    if (blocks > 0x7fffffff) return LOCAL_ATTENTION_UNSUPPORTED;
    launch.capacity =
        minimum(columns, shared_memory_limit(blocks_per_processor) / Columns<E, D>::BYTES / BLOCK * BLOCK);
    const int shared = maximum(stage, launch.capacity * Columns<E, D>::BYTES);
#ifndef LOCAL_ATTENTION_EMULATION
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return fail(error);
#endif
    LAUNCH(kernel, (unsigned)blocks, THREADS, shared, (cudaStream_t)p.stream, launch);
#ifndef LOCAL_ATTENTION_EMULATION
    error = cudaGetLastError();
    if (error != cudaSuccess) return fail(error);
#endif
    return LOCAL_ATTENTION_OK;
}

template <class E, int D>
int run_typed(const LocalAttentionProblem& p, bool backward) {
    Launch launch = {};
    launch.problem = p;
    launch.num_tilings = 1;
    launch.tiling[0] = choose_tiling(p, -1);
    const Tiling& t = launch.tiling[0];
    const int columns = columns_of_extent(p, -1, t.groups_down * t.cell_rows, t.groups_across << t.cell_columns_log2);
    if (!backward) return launch_kernel<E, D>(forward_kernel<E, D>, forward_blocks<E, D>(), launch, columns);
    const int failure = launch_kernel<E, D>(grad_query_kernel<E, D>, forward_blocks<E, D>(), launch, columns);
    if (failure) return failure;
    // The keys of all sources in one launch, those that sum over the most queries first.
    launch.num_tilings = 0;
    int most = 0;
    for (int i = LOCAL_ATTENTION_SOURCES - 1; i >= 0; i--) {
        if (!p.source[i].key.data || (!p.source[i].grad_key.data && !p.source[i].grad_value.data)) continue;
        const Tiling key = choose_tiling(p, i);
        launch.tiling[launch.num_tilings++] = key;
        most = maximum(
            most,
            columns_of_extent(p, i, key.groups_down * key.cell_rows, key.groups_across << key.cell_columns_log2));
    }
    return launch.num_tilings ? launch_kernel<E, D>(grad_key_kernel<E, D>, grad_key_blocks<E, D>(), launch, most)
                              : LOCAL_ATTENTION_OK;
}

template <class E>
int run_dim(const LocalAttentionProblem& p, bool backward) {
    if (p.head_dim <= 32) return run_typed<E, 32>(p, backward);
    if (p.head_dim <= 64) return run_typed<E, 64>(p, backward);
    return run_typed<E, 128>(p, backward);
}

int run(const LocalAttentionProblem* problem, bool backward) {
    last_error = "";
    if (!problem || problem->abi != LOCAL_ATTENTION_ABI || !is_sound(*problem, backward))
        return LOCAL_ATTENTION_UNSUPPORTED;
    const LocalAttentionProblem& p = *problem;
    if (is_empty(p)) return LOCAL_ATTENTION_OK;
    if (p.head_dim % 8 || p.rows > SIDE || p.columns > SIDE || (backward && !p.delta))
        return LOCAL_ATTENTION_UNSUPPORTED;
    for (const LocalAttentionSource& s : p.source)
        if (s.key.data && (s.rows > SIDE || s.columns > SIDE)) return LOCAL_ATTENTION_UNSUPPORTED;
    switch (p.dtype) {
        case LOCAL_ATTENTION_FLOAT32: return run_dim<float>(p, backward);
        case LOCAL_ATTENTION_BFLOAT16: return run_dim<bfloat16>(p, backward);
        case LOCAL_ATTENTION_FLOAT16: return run_dim<float16>(p, backward);
    }
    return LOCAL_ATTENTION_UNSUPPORTED;
}

}  // namespace

#ifndef LOCAL_ATTENTION_CUDA_ARCHITECTURES
#define LOCAL_ATTENTION_CUDA_ARCHITECTURES ""
#endif

extern "C" {
int local_attention_cuda_forward(const LocalAttentionProblem* p) { return run(p, false); }
int local_attention_cuda_backward(const LocalAttentionProblem* p) { return run(p, true); }
const char* local_attention_cuda_architectures(void) { return LOCAL_ATTENTION_CUDA_ARCHITECTURES; }
const char* local_attention_cuda_error(void) { return last_error; }
}
