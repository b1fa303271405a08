#include "head.h"

#include "chunk_bests.h"

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
    exclude_rows(head_.excluded, head_.num_excluded,
                 {sums.first_row, sums.num_rows, sums.num_tokens, sums.out, sums.stride});
    for (Index m = 0; m < sums.num_tokens; m++) {
        Best best = kernels_.choose(sums.out + m * sums.stride, sums.num_rows);
        best.index += static_cast<int>(sums.first_row);
        bests_[(sums.first_token + m) * num_chunks_ + sums.chunk] = best;
    }
}

void Head::finish(int worker) {
    drain(merge_, worker, [this](Index token, Index) {
        merge_bests(bests_ + token * num_chunks_, num_chunks_, head_.ids + token, head_.probabilities + token);
    });
}

}  // namespace expertshare
