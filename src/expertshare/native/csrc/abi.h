// The C interface of the expert kernel: what ctypes binds. No C++ type crosses it, no exception leaves it.
#pragma once

#include <cstdint>

#define EXPERTSHARE_ABI_VERSION 2

extern "C" {

// How another library runs `run(data)` once in each of num_threads threads, the caller among them: GOMP_parallel.
typedef void (*es_team)(void (*run)(void *), void *data, unsigned num_threads, unsigned flags);

// One projection of every expert: rows of `depth` weights, those of one expert contiguous. What the codes of 8 and 4 bits
// stand for, and how they are packed, is said in types.py (QuantisedWeight) and kernels/quantise.py.
struct es_weight {
    const void *codes;      // float32, bfloat16, int8, or two codes of 4 bits a byte
    const void *scales;     // 8 bits: float32, one per row. 4 bits: float16, one per group of a row. Otherwise null
    const void *minima;     // 4 bits: float16 as the scales, or null: then code 8 is zero
    int64_t codes_stride;   // bytes from one expert to the next
    int64_t scales_stride;
    int64_t minima_stride;
    int32_t bits;           // 32, 16, 8 or 4
    int32_t group_size;     // 4 bits: 32 or 64
};

// One expert layer: y_t = sum_k weights[t, k] * down_e(silu(gate_e x_t) * up_e x_t), e = ids[t, k].
// All pointers are to memory of the caller; weights are read in place and only for experts that ids names.
struct es_layer {
    const void *x;          // [num_tokens, hidden]
    const int64_t *ids;     // [num_tokens, top_k]; -1 is an unused slot
    const float *weights;   // [num_tokens, top_k]
    es_weight gate_up;      // [num_experts, 2 * inner, hidden]: gate rows first
    es_weight down;         // [num_experts, hidden, inner]
    void *y;                // [num_tokens, hidden]; written in full
    int64_t num_tokens, top_k, num_experts, hidden, inner;
    int32_t is_bfloat16;  // of x and y; otherwise float32. Weights of 16 and 32 bits are of the same type
    int32_t isa;
    int32_t num_threads;
    es_team team;  // null: threads of our own
};

enum es_status {
    ES_OK = 0,
    ES_BAD_EXPERT_ID = 1,
    ES_OUT_OF_MEMORY = 2,
    ES_NO_THREADS = 3,
    ES_UNSUPPORTED_ISA = 4,  // or a kind of weights that no kernel takes
};

int es_abi_version();
int es_num_isas();                // instruction sets are numbered from the fastest (0) on
const char *es_isa_name(int isa);
int es_isa_usable(int isa);       // whether this build has it and this processor runs it
int es_moe_ffn(const es_layer *layer);
}
