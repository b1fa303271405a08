// Norms on 256-bit vectors.
#include "norm_kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "norm_rows.h"

const expertshare::NormPair *const expertshare::avx2_norms = &norms;
#else
const expertshare::NormPair *const expertshare::avx2_norms = nullptr;
#endif
