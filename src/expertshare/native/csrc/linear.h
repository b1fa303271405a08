// A dense projection without bias.
#pragma once

#include "abi.h"
#include "row_pass.h"

namespace expertshare {

class Linear final : public RowPass {
   public:
    // y: [num_tokens, num_rows] of the type of x.
    Linear(const Matrix &matrix, void *y, const PassKernels &kernels, Arena &arena, int num_threads);

   private:
    void take(const Sums &sums) override;
    void finish(int) override {}

    void *y_;
};

}  // namespace expertshare
