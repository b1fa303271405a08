// The head with int8 weights: the best token and its probability, or all logits, in one pass over the vocabulary.
#pragma once

#include "abi.h"
#include "arena.h"
#include "kernels.h"
#include "packed_kernels.h"
#include "pool.h"
#include "queue.h"

namespace expertshare {

// Chunks of the vocabulary are taken from a queue, and merged in their own order: the result does not depend on the
// number of threads, nor on the other tokens.
class QuantisedHead final : public Work {
   public:
    // `floats` are the kernels of the tokens' type: they round logits, and choose among them. Throws std::bad_alloc.
    QuantisedHead(const es_quantised_head &head, const PackedKernels &packed, const Kernels &floats, Arena &arena);

    int useful_threads() const;
    void run(int worker) override;

   private:
    PackedRows block(Index first_row) const;
    void compute(int worker, Index chunk, Index next_chunk);
    void take(Index chunk, float *logits);
    Index rows_of(Index chunk) const;

    const es_quantised_head &head_;
    const PackedKernels &packed_;
    const Kernels &floats_;
    const Index num_chunks_, token_bytes_;  // bytes of a token's feature
    Index token_stride_ = 0;
    char *tokens_ = nullptr;
    const void **x_ = nullptr;  // scratch rows of tokens_
    float *logits_ = nullptr;   // per thread: [num_tokens, kChunkRows]
    char *scratch_ = nullptr;   // per thread
    Best *bests_ = nullptr;     // [num_tokens, num_chunks]
    Queue encode_, chunks_, merge_;
};

}  // namespace expertshare
