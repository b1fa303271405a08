// The gate on 512-bit vectors: 32 tokens a block.
#include "affinity_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "affinity_avx512.h"

namespace {

constexpr expertshare::AffinityKernels kernels = affinity_kernels_of<Tokens512>();

}  // namespace

const expertshare::AffinityKernels *const expertshare::avx512_affinity = &kernels;
#else
const expertshare::AffinityKernels *const expertshare::avx512_affinity = nullptr;
#endif
