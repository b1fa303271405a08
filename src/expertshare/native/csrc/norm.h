// Root-mean-square norms: of the residual stream, and of the heads of queries and keys together with their rotation.
#pragma once

#include "abi.h"
#include "norm_kernels.h"
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
