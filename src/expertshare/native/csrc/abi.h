// The C interface of the kernels: what ctypes binds. No C++ type crosses it, no exception leaves it. A function takes
// one structure, which native/calls.py packs and whose tensors it has checked: all pointers are to memory of the
// caller.
#pragma once

#include <cstdint>

extern "C" {

// How another library runs `run(data)` once in each of num_threads threads, the caller among them: GOMP_parallel.
typedef void (*es_team)(void (*run)(void *), void *data, unsigned num_threads, unsigned flags);

// One projection of every expert: rows of `depth` weights, those of one expert contiguous. Codes of 8 and 4 bits, their
// scales and minima lie in panels of 16 rows; what they stand for is said in types.py (QuantisedWeight) and
// kernels/quantise.py.
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
// Weights are read in place and only for experts that ids names.
struct es_layer {
    es_weight gate_up;      // [num_experts, 2 * inner, hidden]: gate rows first
    es_weight down;         // [num_experts, hidden, inner]
    int64_t num_experts, hidden, inner;
    const void *x;          // [num_tokens, hidden]
    const int64_t *ids;     // [num_tokens, top_k]; -1 is an unused slot
    const float *weights;   // [num_tokens, top_k]
    // [num_experts]: 0 while the weights are on their way, 1 when they are there, which another thread writes behind
    // them, 2 if they will not come. Null: all are there.
    const uint8_t *arrivals;
    int64_t *waited_ns;     // the longest that a thread waited for arrivals is added; not null if those are not
    void *y;                // [num_tokens, hidden]; written in full
    int64_t num_tokens, top_k;
    int32_t is_bfloat16;  // of x and y; otherwise float32. Weights of 16 and 32 bits are of the same type
    int32_t isa;          // -1 for the best there is, or ES_ISA_NAMED; here and below
    int32_t num_threads;
    es_team team;  // null: threads of our own
};

// y_t = W x_t, sums in float32, rounded once to the type of x. Without y: of these logits the largest (of equals the
// first) and its softmax probability. With int8 weights tokens are rounded to 8 bits with a scale per 128 features, as
// experts' are.
struct es_projection {
    const void *x;            // [num_tokens, depth]
    const void *w;            // [num_rows, depth]; with scales int8 in panels of 16 rows, the last of them whole
    const float *scales;      // [panels, 16]; null: w is of the type of x
    const int64_t *excluded;  // [num_excluded]: rows of w that cannot be chosen and have no share in the softmax
    int64_t *ids;             // [num_tokens]
    float *probabilities;     // [num_tokens]; NaN where a logit, excluded or not, is not finite
    void *y;                  // [num_tokens, num_rows]; written in full; null: choose
    int64_t num_tokens, num_rows, depth, num_excluded;
    int32_t is_bfloat16;      // otherwise float32
    int32_t isa;
    int32_t num_threads;
    es_team team;
};

// y_bs = softmax over the keys p that mask allows of (scale * q_bhs . k_bgp), times v_bgp; g is the group of head h.
struct es_attention {
    const void *q;        // [batch, num_heads, length, head_dim]; features contiguous
    const void *k, *v;    // [batch, num_kv_heads, num_keys, head_dim]; positions of a head contiguous
    const uint8_t *mask;  // [batch, length, num_keys], keys contiguous; null: every query sees every key
    void *y;              // [batch, length, num_heads, head_dim]; written in full
    int64_t batch, num_heads, num_kv_heads, length, num_keys, head_dim;
    int64_t q_batch_stride, q_head_stride, q_stride;  // elements
    int64_t k_batch_stride, k_head_stride, v_batch_stride, v_head_stride;
    int64_t mask_batch_stride, mask_stride;
    float scale;
    int32_t is_bfloat16;  // of q, k, v and y; otherwise float32
    int32_t isa;
    int32_t num_threads;
    es_team team;
};

// By what a group's experts are ranked.
enum es_ranking {
    ES_ALL_EXPERTS = 0,  // by nothing: all are members
    ES_VOTES = 1,        // sums over the ballots cast, each token's K best
    ES_HIGHEST = 2,      // the highest score that a token gives
    ES_COVERAGE = 3,     // one by one, by what they add to the affinity that the coreset covers
};

// SharingRule, with the model's group limit and K put in.
struct es_rule {
    int64_t size, num_protected;
    double prefix_share, saturation, drop_share;  // below 0: there is none
    int64_t experts_per_token;
    int32_t ranking;  // es_ranking
    int32_t keep_protected, only_masked_vote;
    int32_t ballot_groups, ballot_kept_groups;  // what a ballot may name
    int32_t expert_groups, kept_groups;         // what a token may be given inside its coreset
    int32_t renormalise;
    float scaling;
    int32_t padding;
};

// A layer's routing. kernels/cpu_route.py packs this: what stays the same for a layer, then what a call brings.
struct es_step {
    const void *w;      // [num_experts, depth]
    const float *bias;  // [num_experts], or null
    int64_t depth, num_experts, top_k;
    int32_t w_is_bfloat16, is_softmax;
    es_rule rule;

    const void *x;            // [groups * length, depth]
    const uint8_t *live;      // [groups, length]
    const uint8_t *masked;    // [groups, length]: still to be decided; or null
    const uint8_t *previous;  // [groups, num_experts]: a row with members is that group's coreset; or null
    uint8_t *coreset;         // [groups, num_experts], written in full; or null
    float *affinity;          // [groups * length, num_experts], or null
    float *choice;            // the same, with a bias; or null
    int64_t *ids;             // [groups * length, top_k]
    float *weights;           // [groups * length, top_k]
    uint8_t *active;          // [num_experts]; null: only scores are wanted
    int64_t *load;            // [num_experts]
    int64_t *unique;          // [groups]
    int64_t groups, length;
    int32_t is_bfloat16;
    int32_t isa, num_threads;
    es_team team;  // null: threads of our own
};

enum es_status {
    ES_OK = 0,
    ES_BAD_EXPERT_ID = 1,
    ES_OUT_OF_MEMORY = 2,
    ES_NO_THREADS = 3,
    ES_UNSUPPORTED_ISA = 4,  // or a kind of weights that no kernel takes
    ES_ISA_NAMED = 5,        // the environment names an instruction set: pass its number
    ES_NOT_ARRIVED = 6,      // some weights will not come, or took too long: y is void; wait for them, then call again
};

int es_abi_version();             // ABI_VERSION of native/loading.py when this was built
int es_num_isas();                // instruction sets are numbered from the fastest (0) on
const char *es_isa_name(int isa);
int es_isa_usable(int isa);       // whether this build has it and this processor runs it

int es_moe_ffn(const es_layer *layer);
int es_route(const es_step *step);
int es_project(const es_projection *projection);
int es_attend(const es_attention *attention);
}
