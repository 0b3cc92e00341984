/*
 * GELU on the CPU, see gelu.h. Compiled once per instruction set, see cpu_kernels.h.
 */
#include "cpu_kernels.h"
#include "cpu_vectors.h"

namespace {

constexpr int64_t PIECE = 1 << 14;  // numbers that a thread takes at once

struct Call {
    const void *values, *gradients;  // without gradients, GELU itself is wanted
    void* results;
    int64_t count, next;
};

template <class S>
void run_gelu(void* data) {
    Call& call = *(Call*)data;
    for (int64_t from; (from = __atomic_fetch_add(&call.next, PIECE, __ATOMIC_RELAXED)) < call.count;) {
        const int64_t to = from + PIECE < call.count ? from + PIECE : call.count;
        const S *values = (const S*)call.values, *gradients = (const S*)call.gradients;
        S* results = (S*)call.results;
        int64_t i = from;
        if (gradients)
            for (; i + W <= to; i += W) write(results + i, read(gradients + i) * gelu_slope(read(values + i)));
        else
            for (; i + W <= to; i += W) write(results + i, gelu(read(values + i)));
        if (i < to) {
            const int left = (int)(to - i);
            const V value = read_some(values + i, left);
            S rest[W];
            write(rest, gradients ? read_some(gradients + i, left) * gelu_slope(value) : gelu(value));
            memcpy(results + i, rest, left * sizeof(S));
        }
    }
}

}  // namespace

int CPU_KERNEL(gelu)(
    const void* values, const void* gradients, void* results, int64_t count, int dtype, int threads, Parallel parallel,
    void* runtime) {
    Call call = {values, gradients, results, count, 0};
    const Task task = dtype == GELU_FLOAT32    ? run_gelu<float>
                      : dtype == GELU_BFLOAT16 ? run_gelu<bfloat16>
                      : dtype == GELU_FLOAT16  ? run_gelu<float16>
                                               : nullptr;
    if (!task) return GELU_UNSUPPORTED;
    const int64_t pieces = (count + PIECE - 1) / PIECE;
    parallel(task, &call, pieces < threads ? (int)pieces : threads, runtime);
    return GELU_OK;
}
