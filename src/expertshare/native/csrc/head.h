// The best token and its probability, in one pass over the vocabulary and without a logit in memory.
#pragma once

#include "abi.h"
#include "row_pass.h"

namespace expertshare {

// What a chunk of the vocabulary says of a token is kept and merged in the order of chunks, which are the same for any
// number of threads or tokens: so is the result.
class Head final : public RowPass {
   public:
    Head(const es_head &head, const Kernels &kernels, Arena &arena);

   private:
    void take(const Sums &sums) override;
    void finish(int worker) override;

    const es_head &head_;
    Best *bests_ = nullptr;  // [num_tokens, num_chunks]
    Queue merge_;
};

}  // namespace expertshare
