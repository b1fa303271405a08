// Root-mean-square norms: of the residual stream, and of the heads of queries and keys together with their rotation.
#pragma once

#include "abi.h"
#include "kernels.h"
#include "pool.h"
#include "queue.h"

extern "C" {

// y_t = scale * (s_t / sqrt(mean(s_t^2) + eps)) with s = x + delta; each step rounded to the type.
struct es_norm {
    const void *x;      // [num_tokens, depth]
    const void *delta;  // the same; null: s = x
    const void *scale;  // [depth]
    void *sum;          // s, written in full; null without delta
    void *y;            // [num_tokens, depth]; written in full
    int64_t num_tokens, depth;
    float eps;
    int32_t is_bfloat16;  // of all; otherwise float32
    int32_t isa;
    int32_t num_threads;
    es_team team;
};

// Between the projection to queries, keys and values and attention: queries and keys are normed and rotated where they
// lie, and keys and values copied to their place among earlier ones.
struct es_heads {
    void *qkv;             // [batch, length, num_heads + 2 * num_kv_heads, head_dim]; all but values is replaced
    const void *q_scale, *k_scale;  // [head_dim]
    const void *cos, *sin;          // [batch, length, rotary_dim]
    void *keys, *values;   // [batch, num_kv_heads, capacity, head_dim], positions of a head contiguous; or null
    int64_t batch, length, num_heads, num_kv_heads, head_dim, rotary_dim;
    int64_t keys_batch_stride, keys_head_stride, values_batch_stride, values_head_stride;  // elements
    const int64_t *starts;  // [batch]: position of the first new key; not read without keys
    float eps;
    int32_t is_bfloat16;
    int32_t isa;
    int32_t num_threads;
    es_team team;
};

int es_normalise(const es_norm *norm);
int es_turn_heads(const es_heads *heads);
}

namespace expertshare {

// Types of features, scales, tables and results are all the same one. Whatever torch rounds to that type is rounded
// here, in the same places; only the order in which squares are added up is our own, and that for all instruction sets.
struct NormKernels {
    // s = x + delta, or x where delta is null (sum may then be null too); y = scale * (s / root mean square of s).
    void (*norm)(const void *x, const void *delta, const void *scale, Index count, float eps, void *sum, void *y);

    // A head in place: its norm, and the first rotary_dim features rotated, each half of them against the other.
    void (*turn)(void *head, const void *scale, Index head_dim, float eps, const void *cos, const void *sin,
                 Index rotary_dim);
};

struct NormPair {
    NormKernels bfloat16, float32;
};

extern const NormPair *const norm_portable, *const norm_avx2, *const norm_avx512;

// By number, as isa.h counts them; null unless usable.
const NormKernels *norm_kernels_for(int isa, bool is_bfloat16);

class Norm final : public Work {
   public:
    Norm(const es_norm &call, const NormKernels &kernels);

    int useful_threads() const;
    void run(int worker) override;

   private:
    const es_norm &call_;
    const NormKernels &kernels_;
    Queue tokens_;
};

class Heads final : public Work {
   public:
    Heads(const es_heads &call, const NormKernels &kernels);

    int useful_threads() const;
    void run(int worker) override;

   private:
    void turn(Index token);
    void place(const char *head, Index token, Index kv_head, void *to, Index batch_stride, Index head_stride) const;

    const es_heads &call_;
    const NormKernels &kernels_;
    const Index element_;
    Queue tokens_;
};

}  // namespace expertshare
