// a * b + c, rounded once, on every processor.
#pragma once

namespace {

// Without the instruction the product is exact in double and the sum rounded twice, which shows once in 2^29 times.
inline float fused(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
    return __builtin_fmaf(a, b, c);
#else
    return static_cast<float>(static_cast<double>(a) * b + c);
#endif
}

}  // namespace
