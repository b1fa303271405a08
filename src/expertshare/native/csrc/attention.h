// Attention of a few queries to many keys, grouped heads together: keys and values are read in place.
#pragma once

#include "abi.h"
#include "arena.h"
#include "kernels.h"
#include "pool.h"
#include "queue.h"

namespace expertshare {

// Scores are products of key rows with the queries of all heads that share them; the output is the product of value
// columns, laid out as rows first, with the softmax's weights. What a query gets depends neither on the other queries
// nor on keys that it must not see, nor on the number of threads.
class Attention final : public Work {
   public:
    Attention(const es_attention &call, const Kernels &kernels, Arena &arena);  // throws std::bad_alloc

    int useful_threads() const;
    void run(int worker) override;

   private:
    struct Scratch {
        char *queries;   // packed
        char *weights;   // likewise
        char *rounded;   // weights of the queries of a block in the type of the values
        float *scores;   // [kTile, num_keys]
        float *sums;     // [kTile, head_dim]
        const void **blocks;
    };
    Scratch scratch(int worker) const;
    void turn_values(Index item);
    void attend(int worker, Index item);
    void hide(float *scores, Index batch, Index position) const;

    const es_attention &call_;
    const Kernels &kernels_;
    const Index element_, heads_per_group_, queries_, tiles_, pieces_;
    Index query_stride_, weight_stride_, rounded_stride_;
    char *values_ = nullptr;  // [batch, num_kv_heads, head_dim, num_keys]
    Own<char> packed_queries_, packed_weights_, rounded_;
    Own<float> scores_, sums_;
    Own<const void *> blocks_;
    Queue turn_, attend_;
};

}  // namespace expertshare
