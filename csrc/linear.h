/*
 * Linear layers on a CPU, with what stands before and after them in a transformer: the description of a call, shared by
 * the kernel and Python (ctypes).
 *
 *     output = residual + layer_norm(gelu(layer_norm(input) weight^T + bias))
 *
 * where each part but the product may be left out. A few rows go through all of it while they are in the cache, so that
 * what is between the parts is never written to memory. Sums are float32 whatever the numbers are, and what a row gets
 * depends neither on the other rows nor on the number of threads.
 *
 * Weights are floating-point numbers as they lie in memory, or, packed, whole numbers from -127 to 127 times a scale for
 * each output. For the latter, what a row is multiplied with is made such numbers too, with a scale of the row: its
 * largest magnitude over 127. Their products are added exactly, as 32-bit numbers, so that all instruction sets give the
 * same sums.
 *
 * Plain C, no PyTorch headers.
 */
#ifndef LINEAR_H
#define LINEAR_H

#include <stdint.h>

#define LINEAR_ABI 1
#define LINEAR_MAX_INPUTS 65536 /* 127 * 127 times as many stay below 2^31 */
#define LINEAR_PANEL 16         /* outputs that lie together in packed weights */
#define LINEAR_MULTIPLE 32      /* packed weights are filled up with zeros to so many outputs */

enum { LINEAR_FLOAT32 = 0, LINEAR_BFLOAT16 = 2, LINEAR_FLOAT16 = 3 };

/* What a call returns. */
enum { LINEAR_OK = 0, LINEAR_UNSUPPORTED = 1 };

/* A layer norm; left out where `weight` is null. */
typedef struct {
    const void *weight, *bias;
    double epsilon;
} LinearNorm;

typedef struct {
    int32_t abi, dtype; /* dtype: of all numbers but `scales` and whole ones */
    int64_t rows;
    int32_t inputs, outputs;
    int32_t gelu; /* whether GELU, in its tanh approximation, comes after the product */
    int32_t int8; /* whether `weight` is whole numbers, packed */
    int32_t threads;
    int32_t isa; /* 0 lets the kernel choose, else 1 + the index among those compiled in */
    LinearNorm input_norm, output_norm;
    const void* input;    /* (rows, inputs), contiguous */
    const void* weight;   /* (outputs, inputs), contiguous; if `int8`, linear_packed_size bytes */
    const float* scales;  /* (outputs,), if `int8` */
    const void* bias;     /* (outputs,); null: none */
    const void* residual; /* (rows, outputs), contiguous; null: none */
    void* output;         /* (rows, outputs), contiguous; it may be `residual` */
    void* scratch;        /* linear_scratch_size bytes, aligned to 64 */
    void* parallel;       /* as in decode_step.h */
} Linear;

#define LINEAR_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* sizeof(Linear), for the caller to compare with its own. */
LINEAR_API int64_t linear_size(void);
/*
 * Packed whole numbers: panels of outputs; in a panel, for each two inputs, these two of each output. Filled up with
 * zeros. `weight` is (outputs, inputs), contiguous.
 */
LINEAR_API int64_t linear_packed_size(int64_t inputs, int64_t outputs);
LINEAR_API int linear_pack(const int8_t* weight, int8_t* packed, int64_t inputs, int64_t outputs);
/* Bytes of `scratch`, of which this needs sizes, `int8`, `output_norm` and threads only. */
LINEAR_API int64_t linear_scratch_size(const Linear* call);
LINEAR_API int linear_cpu(const Linear* call);

#ifdef __cplusplus
}
#endif
#endif
