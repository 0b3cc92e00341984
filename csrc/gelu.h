/*
 * GELU in its tanh approximation, on a CPU, and its gradient. Plain C, no PyTorch headers.
 */
#ifndef GELU_H
#define GELU_H

#include <stdint.h>

enum { GELU_FLOAT32 = 0, GELU_BFLOAT16 = 2, GELU_FLOAT16 = 3 };
enum { GELU_OK = 0, GELU_UNSUPPORTED = 1 };

#define GELU_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* `values` and `results`: `count` numbers, contiguous; `isa` and `parallel` as in decode_step.h. */
GELU_API int gelu_cpu(
    const void* values, void* results, int64_t count, int32_t dtype, int32_t threads, int32_t isa, void* parallel);
/* `results`: the gradients of `values`, where `gradients` are those of their GELU. */
GELU_API int gelu_backward_cpu(
    const void* values, const void* gradients, void* results, int64_t count, int32_t dtype, int32_t threads,
    int32_t isa, void* parallel);

#ifdef __cplusplus
}
#endif
#endif
