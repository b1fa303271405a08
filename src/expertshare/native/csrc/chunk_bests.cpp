#include "chunk_bests.h"

#include <cmath>

namespace expertshare {

void exclude_rows(const int64_t *excluded, Index num_excluded, const ChunkLogits &chunk) {
    for (Index i = 0; i < num_excluded; i++) {
        const Index row = excluded[i] - chunk.first_row;
        if (row < 0 || row >= chunk.num_rows) continue;
        for (Index token = 0; token < chunk.num_tokens; token++) {
            float &logit = chunk.logits[token * chunk.stride + row];
            if (std::isfinite(logit)) logit = kExcluded;
        }
    }
}

void merge_bests(const Best *bests, Index num_chunks, int64_t *id, float *probability) {
    Best best = bests[0];
    for (Index chunk = 1; chunk < num_chunks; chunk++) {
        if (bests[chunk].logit > best.logit) best = bests[chunk];
    }
    double sum = 0.0;
    for (Index chunk = 0; chunk < num_chunks; chunk++) {
        sum += static_cast<double>(bests[chunk].sum * std::exp(bests[chunk].logit - best.logit));
    }
    *id = best.index;
    *probability = static_cast<float>(1.0 / sum);
}

}  // namespace expertshare
