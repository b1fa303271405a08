// Root-mean-square norms: of the residual stream, and of the heads of queries and keys together with their rotation.
#pragma once

#include <algorithm>
#include <cstring>

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

// Between the projection to queries, keys and values and attention: queries and keys are normed and rotated in
// place, and keys and values copied behind earlier ones.
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

constexpr Index kFeaturesPerThread = 16 << 10;  // less than this is not worth waking one more thread

inline int threads_for(Index features, int num_threads) {
    return static_cast<int>(std::min<Index>(num_threads, 1 + features / kFeaturesPerThread));
}

class Norm final : public Work {
   public:
    Norm(const es_norm &call, const NormKernels &kernels) : call_(call), kernels_(kernels) {
        tokens_.fill(call.num_tokens);
    }

    int useful_threads() const { return threads_for(call_.num_tokens * call_.depth, call_.num_threads); }
    void run(int worker) override {
        drain(tokens_, worker, [this](Index token, Index) {
            const Index at = token * call_.depth * (call_.is_bfloat16 ? 2 : 4);
            const auto row = [at](void *of) { return of == nullptr ? nullptr : static_cast<char *>(of) + at; };
            kernels_.norm(static_cast<const char *>(call_.x) + at,
                          call_.delta == nullptr ? nullptr : static_cast<const char *>(call_.delta) + at, call_.scale,
                          call_.depth, call_.eps, row(call_.sum), row(call_.y));
        });
    }

   private:
    const es_norm &call_;
    const NormKernels &kernels_;
    Queue tokens_;
};

class Heads final : public Work {
   public:
    Heads(const es_heads &call, const NormKernels &kernels)
        : call_(call), kernels_(kernels), element_(call.is_bfloat16 ? 2 : 4) {
        tokens_.fill(call.batch * call.length);
    }

    int useful_threads() const {
        const Index heads = call_.num_heads + 2 * call_.num_kv_heads;
        return threads_for(call_.batch * call_.length * heads * call_.head_dim, call_.num_threads);
    }

    void run(int worker) override {
        drain(tokens_, worker, [this](Index token, Index) { norm_and_rotate(token); });
    }

   private:
    void norm_and_rotate(Index token) {
        const Index bytes = call_.head_dim * element_, rotated = call_.num_heads + call_.num_kv_heads;
        char *heads = static_cast<char *>(call_.qkv) + token * (rotated + call_.num_kv_heads) * bytes;
        const char *cos = static_cast<const char *>(call_.cos) + token * call_.rotary_dim * element_;
        const char *sin = static_cast<const char *>(call_.sin) + token * call_.rotary_dim * element_;
        for (Index head = 0; head < rotated; head++) {
            kernels_.norm_and_rotate(heads + head * bytes, head < call_.num_heads ? call_.q_scale : call_.k_scale,
                                     call_.head_dim, call_.eps, cos, sin, call_.rotary_dim);
        }
        if (call_.keys == nullptr) return;
        for (Index head = 0; head < call_.num_kv_heads; head++) {
            append(heads + (call_.num_heads + head) * bytes, token, head, call_.keys, call_.keys_batch_stride,
                   call_.keys_head_stride);
            append(heads + (rotated + head) * bytes, token, head, call_.values, call_.values_batch_stride,
                   call_.values_head_stride);
        }
    }

    void append(const char *head, Index token, Index kv_head, void *to, Index batch_stride, Index head_stride) const {
        const Index row = token / call_.length, position = call_.starts[row] + token % call_.length;
        const Index at = row * batch_stride + kv_head * head_stride + position * call_.head_dim;
        std::memcpy(static_cast<char *>(to) + at * element_, head, static_cast<std::size_t>(call_.head_dim * element_));
    }

    const es_heads &call_;
    const NormKernels &kernels_;
    const Index element_;
    Queue tokens_;
};

}  // namespace expertshare
