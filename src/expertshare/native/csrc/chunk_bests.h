// What a head keeps of the vocabulary's chunks: shared by heads with float and with quantised weights.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace expertshare {

// Logits of rows first_row .. first_row + num_rows: logits[token * stride + row - first_row].
struct ChunkLogits {
    Index first_row, num_rows, num_tokens;
    float *logits;
    Index stride;
};

// Rows that are left out never win and weigh nothing; a logit that is not finite stays, for it must still be told.
void exclude_rows(const int64_t *excluded, Index num_excluded, const ChunkLogits &chunk);

// One token's bests, in the order of chunks: the largest logit's id, and its probability.
void merge_bests(const Best *bests, Index num_chunks, int64_t *id, float *probability);

}  // namespace expertshare
