// The instruction sets this build knows, fastest first.
#pragma once

#include "abi.h"
#include "kernels.h"

namespace expertshare {

int num_isas();
const char *isa_name(int isa);
bool isa_usable(int isa);

// For tokens and weights of that type; null unless the instruction set is usable.
const Kernels *kernels_for(int isa, bool is_bfloat16);

// For tokens of that type and such weights; null unless the instruction set is usable and the weights are known.
const Kernels *kernels_for(int isa, bool is_bfloat16, const es_weight &weight);

// Null unless the instruction set is usable.
const RouterKernels *router_kernels_for(int isa);
const NormKernels *norm_kernels_for(int isa, bool is_bfloat16);

}  // namespace expertshare
