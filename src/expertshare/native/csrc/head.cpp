#include "head.h"

#include <cmath>

namespace expertshare {

Head::Head(const Matrix &matrix, const Choice &choice, const PassKernels &kernels, Arena &arena, int num_threads)
    : RowPass(matrix, kernels, arena, num_threads, kMostRows,
              Arena::padded<Best>(matrix.num_tokens * num_chunks(matrix, kMostRows))),
      choice_(choice) {
    bests_ = arena.carve<Best>(matrix.num_tokens * num_chunks_);
    merge_.fill(matrix.num_tokens);
}

// Rows that are left out never win and weigh nothing; a logit that is not finite stays, for it must still be told.
void Head::exclude(const Sums &sums) const {
    for (Index i = 0; i < choice_.num_excluded; i++) {
        const Index row = choice_.excluded[i] - sums.first_row;
        if (row < 0 || row >= sums.num_rows) continue;
        for (Index m = 0; m < sums.num_tokens; m++) {
            float &logit = sums.out[m * sums.stride + row];
            if (std::isfinite(logit)) logit = kExcluded;
        }
    }
}

void Head::take(const Sums &sums) {
    exclude(sums);
    for (Index m = 0; m < sums.num_tokens; m++) {
        Best best = floats_.choose(sums.out + m * sums.stride, sums.num_rows);
        best.index += static_cast<int>(sums.first_row);
        bests_[(sums.first_token + m) * num_chunks_ + sums.chunk] = best;
    }
}

void Head::finish(int worker) {
    drain(merge_, worker, [this](Index token, Index) { merge(token); });
}

void Head::merge(Index token) {
    const Best *bests = bests_ + token * num_chunks_;
    Best best = bests[0];
    for (Index chunk = 1; chunk < num_chunks_; chunk++) {
        if (bests[chunk].logit > best.logit) best = bests[chunk];
    }
    double sum = 0.0;
    for (Index chunk = 0; chunk < num_chunks_; chunk++) {
        sum += static_cast<double>(bests[chunk].sum * std::exp(bests[chunk].logit - best.logit));
    }
    choice_.ids[token] = best.index;
    choice_.probabilities[token] = static_cast<float>(1.0 / sum);
}

}  // namespace expertshare
