// What the norms need of an instruction set.
#pragma once

#include "kernels.h"

namespace expertshare {

// Types of features, scales, tables and results are all the same one. Whatever torch rounds to that type is rounded
// here, in the same places; only the order in which squares are added up is our own, and that for all instruction sets.
struct NormKernels {
    // s = x + delta, or x where delta is null (sum may then be null too); y = scale * (s / root mean square of s).
    void (*norm)(const void *x, const void *delta, const void *scale, Index count, float eps, void *sum, void *y);

    // A head in place: its norm, and the first rotary_dim features rotated, each half of them against the other.
    void (*turn)(void *head, const void *scale, Index head_dim, float eps, const void *cos, const void *sin,
                 Index rotary_dim);
};

struct NormPair {
    NormKernels bfloat16, float32;
};

// Null where the compiler could not build for that instruction set.
extern const NormPair *const avx512_norms;
extern const NormPair *const avx2_norms;
extern const NormPair *const portable_norms;

// By number, as isa.h counts them; null unless usable.
const NormKernels *norm_kernels_for(int isa, bool is_bfloat16);

}  // namespace expertshare
