// The router's gate: what every expert is to every token. logits = W x in float32, then softmax or sigmoid, and the
// selection bias on top.
#pragma once

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
    Affinity(const es_gate &gate, const AffinityKernels &kernels, Arena &arena);

    int useful_threads() const;
    void run(int worker) override;

    // `run` in two parts, for who has more to do with a token: all threads call the first, and then each token is
    // finished by one of them.
    void multiply_all(int worker);
    void finish(Index token);

   private:
    const char *rows(Index item) const;
    Index fetch(Index item, Index line) const;
    void pack(Index item);
    void multiply(Index item, Index next_item);

    const es_gate &gate_;
    const AffinityKernels &kernels_;
    const Kernels &product_;
    const Index token_blocks_, row_blocks_, strips_, token_bytes_, row_bytes_, block_bytes_;
    char *packed_ = nullptr;
    const void **blocks_ = nullptr;
    Queue to_pack_, to_multiply_, to_finish_;
};

}  // namespace expertshare
