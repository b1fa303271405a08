#include "linear.h"

namespace expertshare {

Linear::Linear(const Matrix &matrix, void *y, const PassKernels &kernels, Arena &arena, int num_threads)
    : RowPass(matrix, kernels, arena, num_threads, balanced_rows(matrix, num_threads), 0), y_(y) {}

void Linear::take(const Sums &sums) {
    for (Index m = 0; m < sums.num_tokens; m++) {
        const Index at = (sums.first_token + m) * matrix_.num_rows + sums.first_row;
        floats_.round(sums.out + m * sums.stride, sums.num_rows, static_cast<char *>(y_) + at * matrix_.element);
    }
}

}  // namespace expertshare
