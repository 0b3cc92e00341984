/*
 * Runs the CUDA kernels of csrc/local_attention_cuda.cu on the CPU, to test them without a GPU: compiled with
 *
 *   g++ -x c++ -std=c++17 -DLOCAL_ATTENTION_EMULATION -include cuda_emulation.h -shared -fPIC local_attention_cuda.cu
 *
 * Every thread of a block is a coroutine; barriers and the instructions in which a warp works together (shuffles,
 * votes, ldmatrix, mma) switch to the next one until all have arrived. The layouts of ldmatrix and mma.m16n8k16 are
 * those of the PTX manual. Shared memory starts as NaN, so that reading what was not written shows. Threads take turns
 * in their order or, after `emulation_set_order`, in another one each time, so that a missing barrier shows. Speed is
 * not emulated, and of races only what such orders bring about.
 */
#include <assert.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define SHARED_MEMORY(name) unsigned char* name = emulation::shared.data()
#define LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
    ((void)(stream), emulation::launch(blocks, threads, shared_bytes, [&] { kernel(__VA_ARGS__); }))

struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
typedef void* cudaStream_t;

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx;

namespace emulation {

constexpr int WARP = 32, STACK = 128 * 1024;

struct Barrier {
    int arrived = 0, generation = 0;
};
struct Warp {
    Barrier barrier;
    unsigned char slots[2][WARP][64];
};
struct Thread {
    jmp_buf state;
    ucontext_t start;
    std::vector<unsigned char> stack;
    bool started = false, done = false;
    int parity = 0;
};

static std::vector<unsigned char> shared;
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static Barrier block_barrier;
static jmp_buf scheduler;
static ucontext_t scheduler_start;
static int current;
static uint32_t order_state = 0;  // 0: one thread after the other
static std::vector<int> order;
static std::function<void()> body;

inline void yield() {
    if (!_setjmp(threads[current].state)) _longjmp(scheduler, 1);
    threadIdx.x = current;
}

inline void wait(Barrier& barrier, int all) {
    if (++barrier.arrived == all) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    const int generation = barrier.generation;
    while (barrier.generation == generation) yield();
}

// Publishes what this lane has and returns what all lanes of the warp have.
template <class T>
const unsigned char (*exchange(const T& mine))[64] {
    static_assert(sizeof(T) <= 64, "slot too small");
    Warp& warp = warps[current / WARP];
    const int parity = threads[current].parity ^= 1;
    memcpy(warp.slots[parity][current % WARP], &mine, sizeof(T));
    wait(warp.barrier, WARP);
    return warp.slots[parity];
}

inline void enter() {
    body();
    threads[current].done = true;
    _longjmp(scheduler, 1);
}

inline void next_order() {
    if (!order_state) return;
    for (size_t i = order.size() - 1; i > 0; i--) {
        order_state = order_state * 1664525u + 1013904223u;
        std::swap(order[i], order[(order_state >> 8) % (i + 1)]);
    }
}

inline void launch(unsigned blocks, unsigned count, size_t shared_bytes, std::function<void()> kernel) {
    body = kernel;
    for (unsigned block = 0; block < blocks; block++) {
        blockIdx.x = block;
        shared.assign(shared_bytes, 0xff);
        threads.resize(count);
        order.resize(count);
        for (unsigned i = 0; i < count; i++) order[i] = (int)i;
        warps.assign(count / WARP, Warp());
        block_barrier = Barrier();
        for (Thread& thread : threads) {
            thread.stack.resize(STACK);
            thread.started = thread.done = false;
            thread.parity = 0;
            getcontext(&thread.start);
            thread.start.uc_stack.ss_sp = thread.stack.data();
            thread.start.uc_stack.ss_size = STACK;
            thread.start.uc_link = nullptr;
            makecontext(&thread.start, enter, 0);
        }
        volatile unsigned left = count;
        while (left) {
            left = 0;
            next_order();
            for (volatile unsigned i = 0; i < count; i++) {
                Thread& thread = threads[order[i]];
                if (thread.done) continue;
                left = left + 1;
                current = order[i];
                threadIdx.x = order[i];
                if (_setjmp(scheduler)) continue;
                if (thread.started) _longjmp(thread.state, 1);
                thread.started = true;
                swapcontext(&scheduler_start, &thread.start);
            }
        }
    }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block_barrier, (int)emulation::threads.size()); }
inline float __shfl_xor_sync(uint32_t, float x, int step) {
    float result;
    memcpy(&result, emulation::exchange(x)[(emulation::current % 32) ^ step], sizeof(result));
    return result;
}
inline void __syncwarp() { emulation::exchange(0); }
inline bool __any_sync(uint32_t, bool x) {
    const auto slots = emulation::exchange(x);
    bool any = false;
    for (int lane = 0; lane < 32; lane++) any |= slots[lane][0] != 0;
    return any;
}

// Bytes of shared memory that a block may have: the tests make it small to have several chunks.
static int emulated_shared_memory = 112 * 1024;
inline int shared_memory_limit(int) { return emulated_shared_memory; }
extern "C" __attribute__((visibility("default"))) void emulation_set_shared_memory(int bytes) {
    emulated_shared_memory = bytes;
}
extern "C" __attribute__((visibility("default"))) void emulation_set_order(unsigned seed) {
    emulation::order_state = seed;
}

namespace {

struct bfloat16;
struct float16;

template <class E>
struct Number;
template <>
struct Number<bfloat16> {
    static float widen(uint16_t x) {
        const uint32_t bits = (uint32_t)x << 16;
        float result;
        memcpy(&result, &bits, 4);
        return result;
    }
    static uint16_t narrow(float x) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
};
template <>
struct Number<float16> {
    static float widen(uint16_t x) {
        _Float16 half;
        memcpy(&half, &x, 2);
        return (float)half;
    }
    static uint16_t narrow(float x) {
        const _Float16 half = (_Float16)x;
        uint16_t bits;
        memcpy(&bits, &half, 2);
        return bits;
    }
};

template <class E>
uint32_t pack(float low, float high) {
    return (uint32_t)Number<E>::narrow(low) | (uint32_t)Number<E>::narrow(high) << 16;
}
template <class E>
float2 unpack(uint32_t x) {
    return {Number<E>::widen((uint16_t)x), Number<E>::widen((uint16_t)(x >> 16))};
}

struct Operands {
    uint32_t a[4], b[2];
};

template <class E>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const Operands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const auto slots = emulation::exchange(mine);
    const int lane = emulation::current % 32;
    for (int e = 0; e < 4; e++) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 16; k++) {
            const Operands& of_a = *(const Operands*)slots[row % 8 * 4 + k % 8 / 2];
            const Operands& of_b = *(const Operands*)slots[column * 4 + k % 8 / 2];
            const float x = Number<E>::widen((uint16_t)(of_a.a[row / 8 + k / 8 * 2] >> (k % 2 * 16)));
            c[e] += x * Number<E>::widen((uint16_t)(of_b.b[k / 8] >> (k % 2 * 16)));
        }
    }
}

template <class P>
void load_matrices(uint32_t (&r)[4], const P* row) {
    assert((uintptr_t)row % 16 == 0);
    const auto slots = emulation::exchange((const uint16_t*)row);
    const int lane = emulation::current % 32;
    for (int m = 0; m < 4; m++) memcpy(&r[m], *(const uint16_t* const*)slots[m * 8 + lane / 4] + lane % 4 * 2, 4);
}
template <class P>
void load_matrices_transposed(uint32_t (&r)[4], const P* row) {
    assert((uintptr_t)row % 16 == 0);
    const auto slots = emulation::exchange((const uint16_t*)row);
    const int lane = emulation::current % 32;
    for (int m = 0; m < 4; m++) {
        uint32_t numbers[2];
        for (int i = 0; i < 2; i++) numbers[i] = (*(const uint16_t* const*)slots[m * 8 + lane % 4 * 2 + i])[lane / 4];
        r[m] = numbers[0] | numbers[1] << 16;
    }
}
inline void copy_async(void* to, const void* from, bool valid) {
    assert((uintptr_t)to % 16 == 0 && (!valid || (uintptr_t)from % 16 == 0));
    if (valid)
        memcpy(to, from, 16);
    else
        memset(to, 0, 16);
}
inline void copy_wait() {}
inline float fast_exp2(float x) { return exp2f(x); }

}  // namespace
