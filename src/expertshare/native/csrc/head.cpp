#include "head.h"

#include <cmath>

namespace expertshare {
namespace {

Matrix matrix_of(const es_head &head) {
    return {head.x, head.w, head.num_tokens, head.vocabulary, head.depth, head.is_bfloat16 ? 2 : 4};
}

}  // namespace

Head::Head(const es_head &head, const Kernels &kernels, Arena &arena)
    : RowPass(matrix_of(head), kernels, arena, head.num_threads, cached_rows(matrix_of(head)),
              Arena::padded<Best>(head.num_tokens * num_chunks(matrix_of(head), cached_rows(matrix_of(head))))),
      head_(head) {
    bests_ = arena.carve<Best>(head.num_tokens * num_chunks_);
    merge_.fill(head.num_tokens);
}

void Head::take(const Sums &sums) {
    exclude(sums);
    for (Index m = 0; m < sums.num_tokens; m++) {
        Best best = kernels_.choose(sums.out + m * sums.stride, sums.num_rows);
        best.index += static_cast<int>(sums.first_row);
        bests_[(sums.first_token + m) * num_chunks_ + sums.chunk] = best;
    }
}

void Head::exclude(const Sums &sums) const {
    for (Index i = 0; i < head_.num_excluded; i++) {
        const Index row = head_.excluded[i] - sums.first_row;
        if (row < 0 || row >= sums.num_rows) continue;
        for (Index m = 0; m < sums.num_tokens; m++) {
            float &logit = sums.out[m * sums.stride + row];
            if (std::isfinite(logit)) logit = kExcluded;  // what is not must still be told
        }
    }
}

void Head::finish(int worker) {
    drain(merge_, worker, [this](Index token, Index) { merge(token); });
}

void Head::merge(Index token) const {
    const Best *bests = bests_ + token * num_chunks_;
    Best best = bests[0];
    for (Index chunk = 1; chunk < num_chunks_; chunk++) {
        if (bests[chunk].logit > best.logit) best = bests[chunk];
    }
    double sum = 0.0;
    for (Index chunk = 0; chunk < num_chunks_; chunk++) {
        sum += static_cast<double>(bests[chunk].sum * std::exp(bests[chunk].logit - best.logit));
    }
    head_.ids[token] = best.index;
    head_.probabilities[token] = static_cast<float>(1.0 / sum);
}

}  // namespace expertshare
