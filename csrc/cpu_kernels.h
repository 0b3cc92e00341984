/*
 * How the CPU kernels are put together: each is compiled once per instruction set (CPU_ISA names it; setup.py gives
 * the flags), and cpu_dispatch.cpp, compiled for all processors, chooses at run time.
 *
 * All else in the files of kernels is in anonymous namespaces, so that no function compiled for a newer processor can
 * be linked into the code for an older one.
 */
#ifndef CPU_KERNELS_H
#define CPU_KERNELS_H

#include "decode_step.h"
#include "gelu.h"
#include "linear.h"
#include "local_attention.h"

#define CPU_JOIN_(a, b) a##_##b
#define CPU_JOIN(a, b) CPU_JOIN_(a, b)
#define CPU_KERNEL(name) CPU_JOIN(name, CPU_ISA)

typedef void (*Task)(void*);
/* Runs a task on up to `threads` threads at once. */
typedef void (*Parallel)(Task, void* data, int threads, void* runtime);

/* CPU_ISAS lists the instruction sets: X(baseline) X(avx2) ... */
#define X(isa)                                                                                 \
    int CPU_JOIN(local_attention, isa)(const LocalAttentionProblem*, bool backward, Parallel); \
    int CPU_JOIN(decode_step, isa)(const DecodeStep*, Parallel);                               \
    int64_t CPU_JOIN(decode_step_scratch, isa)(const DecodeStep*);                             \
    int CPU_JOIN(linear, isa)(const Linear*, Parallel);                                        \
    int64_t CPU_JOIN(linear_scratch, isa)(const Linear*);                                      \
    int CPU_JOIN(gelu, isa)(                                                                   \
        const void*, const void*, void*, int64_t count, int dtype, int threads, Parallel, void* runtime);
CPU_ISAS
#undef X

#endif
