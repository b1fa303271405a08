// Norms on vectors of AVX-512.
#include "norm_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "norm_rows.h"

const expertshare::NormPair *const expertshare::avx512_norms = &norms;
#else
const expertshare::NormPair *const expertshare::avx512_norms = nullptr;
#endif
