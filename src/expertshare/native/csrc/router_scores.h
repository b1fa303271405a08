// Router scores: what every expert is to every token. logits = W x in float32, then softmax or sigmoid, and the
// selection bias on top.
#pragma once

#include <algorithm>

#include "abi.h"
#include "arena.h"
#include "kernels.h"
#include "pool.h"
#include "queue.h"

namespace expertshare {

// A few rows of weights meet all tokens, which are packed by pieces of their features first. Logits are written to
// where the affinities will be.
class RouterScores {
   public:
    // So many tokens of a step.
    struct Tokens {
        Index first, count;
        float *affinity;  // [count, num_experts]
        float *choice;    // the same, affinity + bias; null without bias
    };
    static constexpr Index kTokensAtATime = 256;  // bounds the packed copy (2 MiB at 2048 features)

    // Throws std::bad_alloc.
    RouterScores(const es_step &step, const Tokens &tokens, const RouterKernels &kernels, Arena &arena)
        : step_(step),
          tokens_(tokens),
          kernels_(kernels),
          product_(kernels.products[step.is_bfloat16 != 0][step.w_is_bfloat16 != 0]),
          token_blocks_(ceil_div(tokens.count, product_.width)),
          row_blocks_(ceil_div(step.num_experts, kernels.rows)),
          strips_(ceil_div(step.depth, kStripDepth)),
          token_bytes_(step.depth * (step.is_bfloat16 != 0 ? 2 : 4)),
          row_bytes_(step.depth * (step.w_is_bfloat16 != 0 ? 2 : 4)),
          block_bytes_(Arena::padded<char>(product_.block_bytes(step.depth))) {
        arena.lay_out([&] {
            packed_ = arena.carve<char>(token_blocks_ * block_bytes_);
            blocks_ = arena.carve<const void *>(token_blocks_);
        });
        for (Index block = 0; block < token_blocks_; block++) blocks_[block] = packed_ + block * block_bytes_;
        to_pack_.fill(token_blocks_ * strips_);
        to_multiply_.fill(row_blocks_);
    }

    int useful_threads() const {
        const Index macs = tokens_.count * step_.depth * step_.num_experts;
        return static_cast<int>(std::min<Index>(step_.num_threads, 1 + macs / kMacsPerThread));
    }

    // All threads call this; then each token is finished by one of them.
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
        const Index at = token * step_.num_experts;
        kernels_.finish(tokens_.affinity + at, step_.num_experts, step_.is_softmax != 0, step_.bias,
                        tokens_.choice == nullptr ? nullptr : tokens_.choice + at);
    }

   private:
    static constexpr Index kStripDepth = 128;  // features that one item of packing transposes
    static constexpr Index kMacsPerThread = 1 << 19;  // less than this is not worth waking one more thread

    const char *rows(Index item) const {
        return static_cast<const char *>(step_.w) + item * kernels_.rows * row_bytes_;
    }

    // A thread's part of the packing long, from `line` on; returns the line to go on with.
    Index fetch(Index item, Index line) const {
        constexpr Index kLine = 64;
        const Index rows = std::min<Index>(kernels_.rows, step_.num_experts - item * kernels_.rows);
        const Index num_lines = rows * row_bytes_ / kLine;
        const Index end = std::min(num_lines, line + ceil_div(num_lines * step_.num_threads, token_blocks_ * strips_));
        for (; line < end; line++) __builtin_prefetch(this->rows(item) + line * kLine, 0, 3);
        return line;
    }

    void pack(Index item) {
        const Index block = item / strips_, begin = item % strips_ * kStripDepth;
        const char *x = static_cast<const char *>(step_.x) + tokens_.first * token_bytes_;
        pack_block(product_, block * product_.width, tokens_.count, step_.depth, begin,
                   std::min<Index>(step_.depth, begin + kStripDepth), packed_ + block * block_bytes_,
                   [=](Index token) { return x + token * token_bytes_; });
    }

    void multiply(Index item, Index next_item) {
        const Index first = item * kernels_.rows;
        const Index num_rows = std::min<Index>(kernels_.rows, step_.num_experts - first);
        const bool whole_next = next_item >= 0 && (next_item + 1) * kernels_.rows <= step_.num_experts;
        for (Index m = 0; m < tokens_.count; m += kTokenBlock) {
            product_.multiply(floats_at(rows(item)), num_rows, step_.depth, blocks_ + m / product_.width,
                              std::min<Index>(kTokenBlock, tokens_.count - m),
                              tokens_.affinity + m * step_.num_experts + first, step_.num_experts,
                              m == 0 && whole_next ? floats_at(rows(next_item)) : kNothing);
        }
    }

    const es_step &step_;
    const Tokens &tokens_;
    const RouterKernels &kernels_;
    const Kernels &product_;
    const Index token_blocks_, row_blocks_, strips_, token_bytes_, row_bytes_, block_bytes_;
    char *packed_ = nullptr;
    const void **blocks_ = nullptr;
    Queue to_pack_, to_multiply_;
};

}  // namespace expertshare
