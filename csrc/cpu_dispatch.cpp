/*
 * The instruction set and the threads of the CPU kernels, chosen at run time, and their interface in C.
 */
#include <pthread.h>
#include <string.h>

#include <initializer_list>

#include "cpu_kernels.h"
#include "local_attention_tiles.h"

namespace {

struct Isa {
    const char* name;
    int (*local_attention)(const LocalAttentionProblem*, bool, Parallel);
    int (*decode_step)(const DecodeStep*, Parallel);
    int (*linear)(const Linear*, Parallel);
    int (*gelu)(const void*, const void*, void*, int64_t, int, int, Parallel, void*);
};

// From the most general to the most particular.
const Isa isas[] = {
#define X(isa) \
    {#isa, CPU_JOIN(local_attention, isa), CPU_JOIN(decode_step, isa), CPU_JOIN(linear, isa), CPU_JOIN(gelu, isa)},
    CPU_ISAS
#undef X
};
constexpr int num_isas = sizeof(isas) / sizeof(isas[0]);

bool supported(const char* name) {
#if defined(__x86_64__)
    // All with these two have F16C, a name that older compilers do not know here.
    if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(name, "avx512"))
        return supported("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return !strcmp(name, "baseline");
}

int select_isa() {
    for (int i = num_isas - 1; i > 0; i--)
        if (supported(isas[i].name)) return i;
    return 0;
}

// The instruction set that a call asks for (0: the best), or null if there is none.
const Isa* find_isa(int asked) {
    if (asked < 0 || asked > num_isas) return nullptr;
    const Isa* isa = &isas[asked ? asked - 1 : select_isa()];
    return supported(isa->name) ? isa : nullptr;
}

struct Start {
    Task task;
    void* data;
};
void* start_thread(void* start) {
    ((Start*)start)->task(((Start*)start)->data);
    return nullptr;
}

// Runs `task` on `threads` threads: those of the OpenMP runtime that torch uses, so that no second pool competes with
// it, or new ones.
void run_parallel(Task task, void* data, int threads, void* runtime) {
    if (threads <= 1) return task(data);
    if (runtime) return ((void (*)(Task, void*, unsigned, unsigned))runtime)(task, data, (unsigned)threads, 0);
    constexpr int most = 256;
    pthread_t ids[most];
    Start start = {task, data};
    int started = 0;
    for (; started < threads - 1 && started < most; started++)
        if (pthread_create(&ids[started], nullptr, start_thread, &start)) break;
    task(data);
    for (int i = 0; i < started; i++) pthread_join(ids[i], nullptr);
}

int run_local_attention(const LocalAttentionProblem* p, bool backward) {
    const Isa* isa = p && p->abi == LOCAL_ATTENTION_ABI ? find_isa(p->isa) : nullptr;
    if (!isa || !is_sound(*p, backward) || p->threads < 1 || p->threads > LOCAL_ATTENTION_MAX_THREADS ||
        p->tile_rows < 0 || p->tile_rows > 16 || (p->tile_rows & (p->tile_rows - 1)))
        return LOCAL_ATTENTION_UNSUPPORTED;
    return is_empty(*p) ? LOCAL_ATTENTION_OK : isa->local_attention(p, backward, run_parallel);
}

// The sizes that the memory of a decoding step depends on.
bool has_sound_sizes(const DecodeStep& s) {
    constexpr int most = 1 << 24;
    return s.sequences > 0 && s.sequences <= DECODE_STEP_MAX_SEQUENCES && s.news > 0 &&
           s.news <= DECODE_STEP_MAX_ROWS / s.sequences && s.layers > 0 && s.layers < most && s.hidden > 0 &&
           s.hidden < most && s.intermediate > 0 && s.intermediate < most && s.heads > 0 && s.hidden % s.heads == 0;
}

// The sizes of a call, and that nothing which it reads or writes is missing.
bool has_all_data(const DecodeStep& s) {
    if (s.threads < 1 || s.threads > (1 << 16) || s.scored < 1 || s.scored > s.news || !s.lengths) return false;
    const int64_t room = (s.capacity < DECODE_STEP_MAX_KEYS ? s.capacity : DECODE_STEP_MAX_KEYS) - s.news;
    for (int i = 0; i < s.sequences; i++)
        if (s.lengths[i] < 0 || s.lengths[i] > room) return false;
    if (s.tokens < 1 || s.tokens > s.vocabulary || !s.layer || !s.final_layernorm.weight || !s.final_layernorm.bias)
        return false;
    for (int i = 0; i < s.layers; i++) {
        const DecodeLayer& l = s.layer[i];
        for (const DecodeParameters& p :
             {l.attention_layernorm, l.query_key_value, l.dense, l.attention_output_layernorm, l.mlp_layernorm,
              l.dense_h_to_4h, l.dense_4h_to_h, l.mlp_output_layernorm})
            if (!p.weight || !p.bias) return false;
        if (!l.cache) return false;
    }
    return s.word_embeddings && s.position_embeddings && s.input_ids && s.position_ids && s.bias && s.logits &&
           s.scratch;
}

bool has_sound_sizes(const Linear& c) {
    constexpr int64_t most = 1 << 24;
    return c.rows > 0 && c.rows < most * most / 64 && c.inputs > 0 && c.inputs <= LINEAR_MAX_INPUTS && c.outputs > 0 &&
           c.outputs < most && c.threads > 0 && c.threads <= (1 << 16);
}

int64_t in_panels(int64_t outputs) { return (outputs + LINEAR_MULTIPLE - 1) / LINEAR_MULTIPLE * LINEAR_MULTIPLE; }

}  // namespace

extern "C" {
int64_t local_attention_problem_size(void) { return sizeof(LocalAttentionProblem); }
int local_attention_cpu_forward(const LocalAttentionProblem* p) { return run_local_attention(p, false); }
int local_attention_cpu_backward(const LocalAttentionProblem* p) { return run_local_attention(p, true); }

int64_t decode_step_size(void) { return sizeof(DecodeStep); }
int64_t decode_step_scratch_size(const DecodeStep* s) {
    return s && has_sound_sizes(*s) ? decode_step_scratch_baseline(s) : 0;
}
int decode_step_cpu(const DecodeStep* s) {
    const Isa* isa = s && s->abi == DECODE_STEP_ABI ? find_isa(s->isa) : nullptr;
    if (!isa || !has_sound_sizes(*s) || !has_all_data(*s)) return DECODE_STEP_UNSUPPORTED;
    for (int i = 0; i < s->sequences * s->news; i++) {
        const int64_t id = s->input_ids[i], position = s->position_ids[i];
        if (id < 0 || id >= s->vocabulary || position < 0 || position >= s->table_rows) return DECODE_STEP_BAD_ID;
    }
    return isa->decode_step(s, run_parallel);
}

int64_t linear_size(void) { return sizeof(Linear); }
int64_t linear_packed_size(int64_t inputs, int64_t outputs) {
    return inputs > 0 && outputs > 0 ? (inputs + 1) / 2 * 2 * in_panels(outputs) : 0;
}
int linear_pack(const int8_t* weight, int8_t* packed, int64_t inputs, int64_t outputs) {
    if (!weight || !packed || inputs <= 0 || outputs <= 0) return LINEAR_UNSUPPORTED;
    for (int64_t first = 0; first < in_panels(outputs); first += LINEAR_PANEL)
        for (int64_t k = 0; k < inputs; k += 2)
            for (int64_t output = first; output < first + LINEAR_PANEL; output++)
                for (int64_t i = k; i < k + 2; i++)
                    *packed++ = output < outputs && i < inputs ? weight[output * inputs + i] : 0;
    return LINEAR_OK;
}
int64_t linear_scratch_size(const Linear* c) { return c && has_sound_sizes(*c) ? linear_scratch_baseline(c) : 0; }
int linear_cpu(const Linear* c) {
    const Isa* isa = c && c->abi == LINEAR_ABI ? find_isa(c->isa) : nullptr;
    if (!isa || !has_sound_sizes(*c) || !c->input || !c->output || !c->weight || !c->scratch)
        return LINEAR_UNSUPPORTED;
    for (const LinearNorm& norm : {c->input_norm, c->output_norm})
        if (!norm.weight != !norm.bias) return LINEAR_UNSUPPORTED;
    if (c->int8 && !c->scales) return LINEAR_UNSUPPORTED;
    return isa->linear(c, run_parallel);
}

int gelu_cpu(
    const void* values, void* results, int64_t count, int32_t dtype, int32_t threads, int32_t isa, void* parallel) {
    const Isa* chosen = threads > 0 && count >= 0 && (!count || (values && results)) ? find_isa(isa) : nullptr;
    return chosen ? chosen->gelu(values, nullptr, results, count, dtype, threads, run_parallel, parallel)
                  : GELU_UNSUPPORTED;
}
int gelu_backward_cpu(
    const void* values, const void* gradients, void* results, int64_t count, int32_t dtype, int32_t threads,
    int32_t isa, void* parallel) {
    const bool is_whole = threads > 0 && count >= 0 && (!count || (values && gradients && results));
    const Isa* chosen = is_whole ? find_isa(isa) : nullptr;
    return chosen ? chosen->gelu(values, gradients, results, count, dtype, threads, run_parallel, parallel)
                  : GELU_UNSUPPORTED;
}

const char* cpu_isa_name(int index) { return index >= 0 && index < num_isas ? isas[index].name : nullptr; }
int cpu_isa_selected(void) { return select_isa(); }
}
