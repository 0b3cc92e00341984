/*
 * One or more tokens for a few sequences through CogLM on a CPU: the description of a call, shared by the kernel and
 * Python (ctypes).
 *
 * A token costs one reading of all weights and little arithmetic. Done operation by operation, a small model spends
 * most of its time between the operations, and 16-bit weights are slow to multiply on processors without 16-bit
 * arithmetic. Here all of it is one call, which reads weights in the type they are stored in and computes in float32.
 * Several tokens of a sequence are read together with one reading of the weights. Each sees those before it, and its
 * logits are to the bit those that it has alone: no sum depends on what it is computed together with.
 *
 * Matrices are those of torch.nn.Linear: (outputs, inputs), contiguous. Plain C, no PyTorch headers.
 */
#ifndef DECODE_STEP_H
#define DECODE_STEP_H

#include <stdint.h>

#define DECODE_STEP_ABI 2
#define DECODE_STEP_MAX_SEQUENCES 64
#define DECODE_STEP_MAX_ROWS 65536 /* tokens of a call */
#define DECODE_STEP_MAX_KEYS 8192

enum { DECODE_STEP_FLOAT32 = 0, DECODE_STEP_BFLOAT16 = 2, DECODE_STEP_FLOAT16 = 3 };

/* What a call returns. */
enum { DECODE_STEP_OK = 0, DECODE_STEP_UNSUPPORTED = 1, DECODE_STEP_BAD_ID = 2 };

/* A linear layer or a layer norm. */
typedef struct {
    const void *weight, *bias;
} DecodeParameters;

typedef struct {
    DecodeParameters attention_layernorm, query_key_value, dense, attention_output_layernorm;
    DecodeParameters mlp_layernorm, dense_h_to_4h, dense_4h_to_h, mlp_output_layernorm;
    float* cache; /* keys and values: (2, sequences, heads, capacity, hidden / heads) */
} DecodeLayer;

typedef struct {
    int32_t abi, dtype; /* dtype: of all weights */
    int32_t sequences, layers, heads, hidden, intermediate;
    int32_t vocabulary; /* rows of `word_embeddings` */
    int32_t tokens;     /* how many of them are scored, from the first */
    int32_t capacity;   /* keys that the cache has room for */
    int32_t news;       /* new tokens of each sequence, each of which becomes one more key */
    int32_t scored;     /* of how many of them, the last ones, logits are wanted; at least 1 */
    int32_t threads;
    int32_t isa;        /* 0 lets the kernel choose, else 1 + the index among those compiled in */
    int32_t table_rows; /* rows of `position_embeddings` */
    double epsilon;
    DecodeParameters final_layernorm;
    const void* word_embeddings;
    const void* position_embeddings;
    const int64_t *input_ids, *position_ids; /* (sequences, news), contiguous */
    const int64_t* lengths;                  /* (sequences,): keys that the cache holds of each sequence */
    const float* bias;                       /* (sequences, capacity), added to the scores of keys */
    const DecodeLayer* layer;
    float* logits;  /* (sequences, scored, tokens) */
    void* scratch;  /* decode_step_scratch_size bytes, aligned to 64 */
    void* parallel; /* `GOMP_parallel` of the OpenMP runtime in use, or null to start threads */
} DecodeStep;

#define DECODE_STEP_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* sizeof(DecodeStep), for the caller to compare with its own. */
DECODE_STEP_API int64_t decode_step_size(void);
/* Bytes of `scratch`, of which this needs the sizes of the model and the numbers of sequences and new tokens only. */
DECODE_STEP_API int64_t decode_step_scratch_size(const DecodeStep* step);
DECODE_STEP_API int decode_step_cpu(const DecodeStep* step);

/* Name of the i-th instruction set compiled in, null after the last; the index of the one that this processor gets. */
DECODE_STEP_API const char* cpu_isa_name(int index);
DECODE_STEP_API int cpu_isa_selected(void);

#ifdef __cplusplus
}
#endif
#endif
