// The router's gate: what every expert is to every token. logits = W x in float32, then softmax or sigmoid, and the
// selection bias on top.
#pragma once

#include <algorithm>

#include "abi.h"
#include "arena.h"
#include "kernels.h"
#include "pool.h"
#include "queue.h"

extern "C" {

struct es_gate {
    const void *x;        // [num_tokens, depth]; bfloat16 is widened exactly
    const void *w;        // [num_experts, depth]; bfloat16 likewise
    const float *bias;    // [num_experts], or null
    float *affinity;      // [num_tokens, num_experts]
    float *choice;        // the same, affinity + bias; null without bias
    int64_t num_tokens, depth, num_experts;
    int32_t is_bfloat16;  // of x; otherwise float32
    int32_t w_is_bfloat16;
    int32_t is_softmax;   // otherwise sigmoid
    int32_t isa;
    int32_t num_threads;
    es_team team;  // null: threads of our own
};
}

namespace expertshare {

// A few rows of weights meet all tokens, which are packed by pieces of their features first. Logits are written to where
// the affinities will be.
class Affinity final : public Work {
   public:
    static constexpr Index kTokensAtATime = 256;  // bounds the packed copy (2 MiB at 2048 features)

    // Throws std::bad_alloc.
    Affinity(const es_gate &gate, const AffinityKernels &kernels, Arena &arena)
        : gate_(gate),
          kernels_(kernels),
          product_(kernels.products[gate.is_bfloat16 != 0][gate.w_is_bfloat16 != 0]),
          token_blocks_(ceil_div(gate.num_tokens, product_.width)),
          row_blocks_(ceil_div(gate.num_experts, kernels.rows)),
          strips_(ceil_div(gate.depth, kStripDepth)),
          token_bytes_(gate.depth * (gate.is_bfloat16 != 0 ? 2 : 4)),
          row_bytes_(gate.depth * (gate.w_is_bfloat16 != 0 ? 2 : 4)),
          block_bytes_(Arena::padded<char>(product_.block_bytes(gate.depth))) {
        arena.reserve(token_blocks_ * block_bytes_ + Arena::padded<const void *>(token_blocks_));
        packed_ = arena.carve<char>(token_blocks_ * block_bytes_);
        blocks_ = arena.carve<const void *>(token_blocks_);
        for (Index block = 0; block < token_blocks_; block++) blocks_[block] = packed_ + block * block_bytes_;
        to_pack_.fill(token_blocks_ * strips_);
        to_multiply_.fill(row_blocks_);
        to_finish_.fill(gate.num_tokens);
    }

    int useful_threads() const {
        const Index macs = gate_.num_tokens * gate_.depth * gate_.num_experts;
        return static_cast<int>(std::min<Index>(gate_.num_threads, 1 + macs / kMacsPerThread));
    }

    void run(int worker) override {
        multiply_all(worker);
        drain(to_finish_, worker, [this](Index token, Index) { finish(token); });
    }

    // `run` in two parts, for who has more to do with a token: all threads call the first, and then each token is
    // finished by one of them.
    void multiply_all(int worker) {
        const Index first = to_multiply_.take(worker % 2 != 0);  // its weights are fetched while tokens are packed
        Index fetched = 0;
        drain(to_pack_, worker, [&](Index item, Index) {
            if (first >= 0) fetched = fetch(first, fetched);
            pack(item);
        });
        drain_from(worker % 2 != 0, to_multiply_, first, [this](Index item, Index next) { multiply(item, next); });
    }

    void finish(Index token) {
        const Index at = token * gate_.num_experts;
        kernels_.finish(gate_.affinity + at, gate_.num_experts, gate_.is_softmax != 0, gate_.bias,
                        gate_.choice == nullptr ? nullptr : gate_.choice + at);
    }

   private:
    static constexpr Index kStripDepth = 128;  // features that one item of packing transposes
    static constexpr Index kMacsPerThread = 1 << 19;  // less than this is not worth waking one more thread

    const char *rows(Index item) const {
        return static_cast<const char *>(gate_.w) + item * kernels_.rows * row_bytes_;
    }

    // A thread's part of the packing long, from `line` on; returns the line to go on with.
    Index fetch(Index item, Index line) const {
        constexpr Index kLine = 64;
        const Index rows = std::min<Index>(kernels_.rows, gate_.num_experts - item * kernels_.rows);
        const Index num_lines = rows * row_bytes_ / kLine;
        const Index end = std::min(num_lines, line + ceil_div(num_lines * gate_.num_threads, token_blocks_ * strips_));
        for (; line < end; line++) __builtin_prefetch(this->rows(item) + line * kLine, 0, 3);
        return line;
    }

    void pack(Index item) {
        const Index block = item / strips_, begin = item % strips_ * kStripDepth;
        pack_block(product_, block * product_.width, gate_.num_tokens, gate_.depth, begin,
                   std::min<Index>(gate_.depth, begin + kStripDepth), packed_ + block * block_bytes_,
                   [this](Index token) { return static_cast<const char *>(gate_.x) + token * token_bytes_; });
    }

    void multiply(Index item, Index next_item) {
        const Index first = item * kernels_.rows;
        const Index num_rows = std::min<Index>(kernels_.rows, gate_.num_experts - first);
        const bool whole_next = next_item >= 0 && (next_item + 1) * kernels_.rows <= gate_.num_experts;
        for (Index m = 0; m < gate_.num_tokens; m += kTokenBlock) {
            product_.multiply(floats_at(rows(item)), num_rows, gate_.depth, blocks_ + m / product_.width,
                              std::min<Index>(kTokenBlock, gate_.num_tokens - m),
                              gate_.affinity + m * gate_.num_experts + first, gate_.num_experts,
                              m == 0 && whole_next ? floats_at(rows(next_item)) : kNothing);
        }
    }

    const es_gate &gate_;
    const AffinityKernels &kernels_;
    const Kernels &product_;
    const Index token_blocks_, row_blocks_, strips_, token_bytes_, row_bytes_, block_bytes_;
    char *packed_ = nullptr;
    const void **blocks_ = nullptr;
    Queue to_pack_, to_multiply_, to_finish_;
};

}  // namespace expertshare
