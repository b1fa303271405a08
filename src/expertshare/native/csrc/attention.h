// Attention of a few queries to many keys, grouped heads together: keys and values are read in place.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "abi.h"
#include "arena.h"
#include "kernels.h"
#include "pool.h"
#include "queue.h"

namespace expertshare {

inline Index padded(Index bytes) { return ceil_div(bytes, 64) * 64 + 64; }

template <class Word>
void transpose(const Word *from, Index num_rows, Index num_columns, Index row_stride, Word *to, Index to_stride) {
    for (Index column = 0; column < num_columns; column++) {
        for (Index row = 0; row < num_rows; row++) to[column * to_stride + row] = from[row * row_stride + column];
    }
}

// Scores are products of key rows with the queries of all heads that share them; the output is the product of value
// columns, laid out as rows first, with the softmax's weights. What a query gets depends neither on the other queries
// nor on keys that it must not see, nor on the number of threads.
class Attention final : public Work {
   public:
    // Throws std::bad_alloc.
    Attention(const es_attention &call, const Kernels &kernels, Arena &arena)
        : call_(call),
          kernels_(kernels),
          element_(call.is_bfloat16 ? 2 : 4),
          heads_per_group_(call.num_heads / call.num_kv_heads),
          queries_(heads_per_group_ * call.length),
          tiles_(ceil_div(queries_, kTile)),
          pieces_(ceil_div(call.num_keys, kPiece)) {
        const Index blocks = ceil_div(kTile, kernels.width);
        query_stride_ = padded(kernels.block_bytes(call.head_dim));
        weight_stride_ = padded(kernels.block_bytes(call.num_keys));
        rounded_stride_ = padded(call.num_keys * element_);
        const Index threads = call.num_threads, groups = call.batch * call.num_kv_heads;
        const Index value_bytes = groups * call.head_dim * call.num_keys * element_;
        arena.lay_out([&] {
            values_ = arena.carve<char>(value_bytes);
            packed_queries_ = arena.carve_own<char>(threads, blocks * query_stride_);
            packed_weights_ = arena.carve_own<char>(threads, blocks * weight_stride_);
            rounded_ = arena.carve_own<char>(threads, kernels.width * rounded_stride_);
            scores_ = arena.carve_own<float>(threads, kTile * call.num_keys);
            sums_ = arena.carve_own<float>(threads, kTile * call.head_dim);
            blocks_ = arena.carve_own<const void *>(threads, blocks);
        });
        transpose_.fill(groups * pieces_);
        attend_.fill(groups * tiles_);
    }

    int useful_threads() const {
        const Index macs = call_.batch * call_.num_heads * call_.length * call_.num_keys * call_.head_dim * 2;
        return static_cast<int>(std::min<Index>(call_.num_threads, 1 + macs / kMacsPerThread));
    }

    void run(int worker) override {
        drain(transpose_, worker, [this](Index item, Index) { transpose_values(item); });
        drain(attend_, worker, [this, worker](Index item, Index) { attend(worker, item); });
    }

   private:
    static constexpr Index kTile = 48;  // queries: with 128 features and a few hundred keys their scores fit the cache
    static constexpr Index kPiece = 64;  // positions of values that one item lays out as rows, within the first cache
    static constexpr Index kMacsPerThread = 1 << 18;  // less than this is not worth waking one more thread

    struct Scratch {
        char *queries;   // packed
        char *weights;   // likewise
        char *rounded;   // weights of the queries of a block in the type of the values
        float *scores;   // [kTile, num_keys]
        float *sums;     // [kTile, head_dim]
        const void **blocks;
    };
    Scratch scratch(int worker) const {
        return {packed_queries_.of(worker), packed_weights_.of(worker), rounded_.of(worker),
                scores_.of(worker),          sums_.of(worker),            blocks_.of(worker)};
    }

    void transpose_values(Index item) {
        const Index group = item / pieces_, first = item % pieces_ * kPiece;
        const Index batch = group / call_.num_kv_heads, head = group % call_.num_kv_heads;
        const Index count = std::min(kPiece, call_.num_keys - first);
        const Index from = batch * call_.v_batch_stride + head * call_.v_head_stride + first * call_.head_dim;
        const Index to = group * call_.head_dim * call_.num_keys + first;
        if (call_.is_bfloat16) {
            transpose(static_cast<const std::uint16_t *>(call_.v) + from, count, call_.head_dim, call_.head_dim,
                      reinterpret_cast<std::uint16_t *>(values_) + to, call_.num_keys);
        } else {
            transpose(static_cast<const float *>(call_.v) + from, count, call_.head_dim, call_.head_dim,
                      reinterpret_cast<float *>(values_) + to, call_.num_keys);
        }
    }

    void attend(int worker, Index item) {
        const Scratch own = scratch(worker);
        const Index group = item / tiles_, first = item % tiles_ * kTile, count = std::min(kTile, queries_ - first);
        const Index batch = group / call_.num_kv_heads, kv_head = group % call_.num_kv_heads;
        const auto head = [&](Index m) { return kv_head * heads_per_group_ + (first + m) / call_.length; };
        const auto position = [&](Index m) { return (first + m) % call_.length; };
        for (Index m = 0; m < count; m += kernels_.width) {
            char *block = own.queries + m / kernels_.width * query_stride_;
            pack_block(kernels_, m, count, call_.head_dim, 0, call_.head_dim, block, [&](Index query) {
                const Index at = batch * call_.q_batch_stride + head(query) * call_.q_head_stride;
                return static_cast<const char *>(call_.q) + (at + position(query) * call_.q_stride) * element_;
            });
            own.blocks[m / kernels_.width] = block;
        }
        const Index keys = (batch * call_.k_batch_stride + kv_head * call_.k_head_stride) * element_;
        kernels_.multiply(floats_at(static_cast<const char *>(call_.k) + keys), call_.num_keys, call_.head_dim,
                          own.blocks, count, own.scores, call_.num_keys, kNothing);
        float totals[kTile];
        for (Index m = 0; m < count; m++) {
            float *scores = own.scores + m * call_.num_keys;
            if (call_.mask != nullptr) hide(scores, batch, position(m));
            totals[m] = kernels_.exponentials(scores, call_.num_keys, call_.scale);
            char *rounded = own.rounded + m % kernels_.width * rounded_stride_;
            kernels_.round(scores, call_.num_keys, rounded);
            if ((m + 1) % kernels_.width != 0 && m + 1 != count) continue;
            const Index first = m / kernels_.width * kernels_.width;
            char *block = own.weights + m / kernels_.width * weight_stride_;
            pack_block(kernels_, first, m + 1, call_.num_keys, 0, call_.num_keys, block,
                       [&](Index query) { return own.rounded + (query - first) * rounded_stride_; });
            own.blocks[m / kernels_.width] = block;
        }
        kernels_.multiply(floats_at(values_ + group * call_.head_dim * call_.num_keys * element_), call_.head_dim,
                          call_.num_keys, own.blocks, count, own.sums, call_.head_dim, kNothing);
        for (Index m = 0; m < count; m++) {
            const float *out = own.sums + m * call_.head_dim;
            const float share = 1.0f / totals[m];
            const Index at = ((batch * call_.length + position(m)) * call_.num_heads + head(m)) * call_.head_dim;
            kernels_.mix(&out, &share, 1, call_.head_dim, static_cast<char *>(call_.y) + at * element_);
        }
    }

    void hide(float *scores, Index batch, Index position) const {
        const std::uint8_t *seen = call_.mask + batch * call_.mask_batch_stride + position * call_.mask_stride;
        for (Index key = 0; key < call_.num_keys; key++) scores[key] = seen[key] ? scores[key] : -INFINITY;
    }

    const es_attention &call_;
    const Kernels &kernels_;
    const Index element_, heads_per_group_, queries_, tiles_, pieces_;
    Index query_stride_, weight_stride_, rounded_stride_;
    char *values_ = nullptr;  // [batch, num_kv_heads, head_dim, num_keys]
    Own<char> packed_queries_, packed_weights_, rounded_;
    Own<float> scores_, sums_;
    Own<const void *> blocks_;
    Queue transpose_, attend_;
};

}  // namespace expertshare
