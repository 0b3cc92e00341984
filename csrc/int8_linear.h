/*
 * Linear layers whose products are those of 8-bit numbers, on a CPU: the description of a call, shared by the kernel and
 * Python (ctypes).
 *
 * Weights are whole numbers from -127 to 127 times a scale for each output. The inputs of a row are made such numbers
 * too, with a scale of the row: its largest magnitude over 127. Their products are added exactly, as 32-bit numbers, so
 * that all instruction sets and numbers of threads give the same sums. GELU after it is part of the call, and saves a
 * pass over memory.
 *
 * Plain C, no PyTorch headers.
 */
#ifndef INT8_LINEAR_H
#define INT8_LINEAR_H

#include <stdint.h>

#define INT8_LINEAR_ABI 1
#define INT8_LINEAR_MAX_INPUTS 65536 /* 127 * 127 times as many stay below 2^31 */
#define INT8_LINEAR_PANEL 16         /* outputs that lie together in packed weights */
#define INT8_LINEAR_MULTIPLE 32      /* packed weights are filled up with zeros to so many outputs */

enum { INT8_LINEAR_FLOAT32 = 0, INT8_LINEAR_BFLOAT16 = 2, INT8_LINEAR_FLOAT16 = 3 };

/* What a call returns. */
enum { INT8_LINEAR_OK = 0, INT8_LINEAR_UNSUPPORTED = 1 };

typedef struct {
    int32_t abi, dtype; /* dtype: of the floating-point numbers but `scales` */
    int64_t rows;
    int32_t inputs, outputs;
    int32_t gelu; /* whether GELU, in its tanh approximation, comes after it */
    int32_t threads;
    int32_t isa; /* 0 lets the kernel choose, else 1 + the index among those compiled in */
    int32_t reserved;
    const void* input;    /* (rows, inputs), contiguous */
    const int8_t* weight; /* int8_linear_packed_size bytes */
    const float* scales;  /* (outputs,) */
    const void* bias;     /* null: none */
    void* output;         /* (rows, outputs), contiguous */
    void* scratch;        /* int8_linear_scratch_size bytes, aligned to 64 */
    void* parallel;       /* as in decode_step.h */
} Int8Linear;

#define INT8_LINEAR_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* sizeof(Int8Linear), for the caller to compare with its own. */
INT8_LINEAR_API int64_t int8_linear_size(void);
/*
 * Packed weights: panels of outputs; in a panel, for each two inputs, these two of each output. Filled up with zeros.
 * `weight` is (outputs, inputs), contiguous.
 */
INT8_LINEAR_API int64_t int8_linear_packed_size(int64_t inputs, int64_t outputs);
INT8_LINEAR_API int int8_linear_pack(const int8_t* weight, int8_t* packed, int64_t inputs, int64_t outputs);
/* Bytes of `scratch`, of which this needs sizes and threads only. */
INT8_LINEAR_API int64_t int8_linear_scratch_size(const Int8Linear* call);
INT8_LINEAR_API int int8_linear_cpu(const Int8Linear* call);

#ifdef __cplusplus
}
#endif
#endif
