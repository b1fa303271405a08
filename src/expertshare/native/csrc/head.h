// The best token and its probability, in one pass over the vocabulary and without a logit in memory.
#pragma once

#include "abi.h"
#include "row_pass.h"

namespace expertshare {

// What a chunk of the vocabulary says of a token is kept and merged in the order of chunks, which are the same for any
// number of threads or tokens: so is the result.
class Head final : public RowPass {
   public:
    // The fields of es_head and es_quantised_head of these names.
    struct Choice {
        const int64_t *excluded;
        Index num_excluded;
        int64_t *ids;
        float *probabilities;
    };
    Head(const Matrix &matrix, const Choice &choice, const PassKernels &kernels, Arena &arena, int num_threads);

   private:
    void take(const Sums &sums) override;
    void finish(int worker) override;
    void exclude(const Sums &sums) const;
    void merge(Index token);

    const Choice choice_;
    Best *bests_ = nullptr;  // [num_tokens, num_chunks]
    Queue merge_;
};

}  // namespace expertshare
