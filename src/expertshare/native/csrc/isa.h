// The instruction sets this build knows, fastest first.
#pragma once

#include "kernels.h"

namespace expertshare {

int num_isas();
const char *isa_name(int isa);
bool isa_usable(int isa);

// Null unless the instruction set is usable.
const Kernels *kernels_for(int isa, bool is_bfloat16);

}  // namespace expertshare
