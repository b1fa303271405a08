// A dense projection without bias.
#pragma once

#include "abi.h"
#include "row_pass.h"

namespace expertshare {

class Linear final : public RowPass {
   public:
    Linear(const es_dense &dense, const Kernels &kernels, Arena &arena);

   private:
    void take(const Sums &sums) override;
    void finish(int) override {}

    void *y_;
};

}  // namespace expertshare
