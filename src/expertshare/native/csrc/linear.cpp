#include "linear.h"

namespace expertshare {
namespace {

Matrix matrix_of(const es_dense &dense) {
    return {dense.x, dense.w, dense.num_tokens, dense.num_rows, dense.depth, dense.is_bfloat16 ? 2 : 4};
}

}  // namespace

Linear::Linear(const es_dense &dense, const Kernels &kernels, Arena &arena)
    : RowPass(matrix_of(dense), kernels, arena, dense.num_threads, balanced_rows(matrix_of(dense), dense.num_threads),
              0),
      y_(dense.y) {}

void Linear::take(const Sums &sums) {
    for (Index m = 0; m < sums.num_tokens; m++) {
        const Index at = (sums.first_token + m) * matrix_.num_rows + sums.first_row;
        kernels_.round(sums.out + m * sums.stride, sums.num_rows, static_cast<char *>(y_) + at * matrix_.element);
    }
}

}  // namespace expertshare
