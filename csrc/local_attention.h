/*
 * Local attention on a grid of tokens: the description of one call, shared by the CPU kernels, the CUDA kernels and
 * Python (ctypes).
 *
 * Every query cell attends, under one softmax, to the keys of up to three sources. A source is a grid of keys: query
 * cell (y, x) is centred on key cell (y / ratio_rows, x / ratio_columns) and sees the cells at most reach_rows and
 * reach_columns away that lie on the grid. source 0: the window on the grid of the queries, ratio 1; source 1: the
 * window on a coarser grid; source 2: the context, a grid of one row whose window is everything. Each may have a bias
 * for each of its keys.
 *
 * Tensors have the shape (batch, positions, heads, head_dim), any strides but the last, which is 1; strides count
 * elements. Plain C, no PyTorch headers: the library loads with every version of torch.
 */
#ifndef LOCAL_ATTENTION_H
#define LOCAL_ATTENTION_H

#include <stdint.h>

#define LOCAL_ATTENTION_ABI 2
#define LOCAL_ATTENTION_SOURCES 3
#define LOCAL_ATTENTION_MAX_HEAD_DIM 128
#define LOCAL_ATTENTION_MAX_SIDE (1 << 28) /* rows, columns, reaches and ratios; CUDA takes fewer */
#define LOCAL_ATTENTION_MAX_THREADS (1 << 16)

enum {
    LOCAL_ATTENTION_FLOAT32 = 0,
    LOCAL_ATTENTION_FLOAT64 = 1,
    LOCAL_ATTENTION_BFLOAT16 = 2,
    LOCAL_ATTENTION_FLOAT16 = 3
};

/* What a call returns. */
enum {
    LOCAL_ATTENTION_OK = 0,
    LOCAL_ATTENTION_UNSUPPORTED = 1,
    LOCAL_ATTENTION_OUT_OF_MEMORY = 2,
    LOCAL_ATTENTION_CUDA_ERROR = 3
};

typedef struct {
    void* data;
    int64_t batch_stride, position_stride, head_stride;
} LocalAttentionTensor;

typedef struct {
    LocalAttentionTensor key, value;           /* key.data is null where the source is absent */
    LocalAttentionTensor grad_key, grad_value; /* written by the backward; data is null where it is not wanted */
    const void* bias;    /* (batch, keys), added to the scores, of the type of logsumexp, or null */
    int64_t bias_stride; /* from one batch to the next */
    int32_t rows, columns;
    int32_t reach_rows, reach_columns; /* half the window: (kernel - 1) / 2 */
    int32_t ratio_rows, ratio_columns;
    int32_t causal; /* only keys up to and including the centre, in raster order */
    int32_t reserved;
} LocalAttentionSource;

typedef struct {
    int32_t abi, dtype;
    int32_t batch, heads, head_dim;
    int32_t rows, columns; /* the grid of the queries */
    int32_t threads;       /* CPU: how many to use */
    int32_t tile_rows;     /* CPU: rows of a tile of 16 queries, 1, 2, 4, 8 or 16; 0 lets the kernel choose */
    int32_t isa;           /* CPU: 0 lets the kernel choose, else 1 + the index among those compiled in */
    double scale;
    LocalAttentionTensor query, output, grad_output, grad_query; /* grad_query.data is null where it is not wanted */
    void* logsumexp; /* (batch, heads, positions), float, or double for double inputs; written by the forward */
    const void* grad_logsumexp; /* likewise; null means zero */
    /*
     * (2, batch, heads, positions), of the same type: the largest score of a query and the logarithm of the sum of the
     * exponentials over it, both to base 2. Written by the forward where it is not null, read by the backward. Their
     * sum is the logsumexp, but once rounded to one number that no longer gives back the weights of large scores.
     */
    void* softmax;
    LocalAttentionSource source[LOCAL_ATTENTION_SOURCES];
    void* parallel; /* CPU: `GOMP_parallel` of the OpenMP runtime in use, or null to start threads */
    void* stream;   /* CUDA */
    float* delta;   /* CUDA backward: memory of the shape of logsumexp */
} LocalAttentionProblem;

#define LOCAL_ATTENTION_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* sizeof(LocalAttentionProblem), for the caller to compare with its own. All functions return
   LOCAL_ATTENTION_UNSUPPORTED for a description that does not fit together, such as a ratio of 0 or a tensor without
   data. */
LOCAL_ATTENTION_API int64_t local_attention_problem_size(void);

LOCAL_ATTENTION_API int local_attention_cpu_forward(const LocalAttentionProblem* problem);
LOCAL_ATTENTION_API int local_attention_cpu_backward(const LocalAttentionProblem* problem);

/* Only where the CUDA part is built in. Asynchronous, on `stream`, on the current device; rows of heads are aligned to
 * 16 bytes. */
LOCAL_ATTENTION_API int local_attention_cuda_forward(const LocalAttentionProblem* problem);
LOCAL_ATTENTION_API int local_attention_cuda_backward(const LocalAttentionProblem* problem);
/* Compute capabilities with machine code, such as "80;90"; the last as PTX too. */
LOCAL_ATTENTION_API const char* local_attention_cuda_architectures(void);
/* Why the last call of this thread failed. */
LOCAL_ATTENTION_API const char* local_attention_cuda_error(void);

#ifdef __cplusplus
}
#endif
#endif
