// SiLU and the weighted sum: plain loops that the compiler vectorises for whatever the including file is built for.
#pragma once

#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "kernels.h"

namespace {

using expertshare::Index;

// exp on [-87, 87]: x = n ln 2 + r with |r| <= ln 2 / 2, n by the addition that leaves no fraction bits, exp(r) by its
// Taylor polynomial of degree 7 (remainder 6e-9). Relative error over the range: below 1.1e-7 (SiLU 1.8e-7).
inline float exp_clamped(float x) {
    const float shift = 12582912.0f;  // 1.5 * 2^23
    const float shifted = x * 1.44269504088896341f + shift;
    const float n = shifted - shift;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in n * part
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    const std::uint32_t power_bits = (bits + 127u) << 23;  // n is in the low bits; those of the shift fall out
    float power;
    std::memcpy(&power, &power_bits, sizeof power);
    return p * power;
}

inline float silu(float gate) {
    float z = -gate;
    z = z > 87.0f ? 87.0f : z;  // a NaN passes both comparisons
    z = z < -87.0f ? -87.0f : z;
    return gate / (1.0f + exp_clamped(z));
}

constexpr Index kPiece = 64;

// V::Act is the scratch type, V::Weight the type to round to, V::place where feature i lies in a scratch row.
template <class V>
void swiglu(const float *gate, const float *up, Index first, Index count, Index depth, void *row) {
    using Act = typename V::Act;
    Act *h = static_cast<Act *>(row);
    float piece[kPiece];
    for (Index start = 0; start < count; start += kPiece) {
        const Index n = count - start < kPiece ? count - start : kPiece;
        for (Index i = 0; i < n; i++) piece[i] = silu(gate[start + i]) * up[start + i];
        for (Index i = 0; i < n; i++) {
            typename V::Weight rounded;
            store(&rounded, piece[i]);
            store(&h[V::place(first + start + i)], load(rounded));
        }
    }
    if (first + count != depth) return;
    for (Index i = depth; i % V::kStep != 0; i++) h[V::place(i)] = 0;  // 0 weights times garbage could be NaN
}

template <class V>
void encode(const void *features, Index depth, void *row) {
    using Weight = typename V::Weight;
    const Weight *x = static_cast<const Weight *>(features);
    typename V::Act *to = static_cast<typename V::Act *>(row);
    if constexpr (sizeof(Weight) == sizeof(typename V::Act)) {
        std::memcpy(to, x, static_cast<std::size_t>(depth) * sizeof(Weight));
    } else {
        for (Index i = 0; i < depth; i++) to[V::place(i)] = load(x[i]);
    }
    for (Index i = depth; i % V::kStep != 0; i++) to[V::place(i)] = 0;
}

template <class V>
void mix(const float *const *outs, const float *weights, Index num_outs, Index count, void *y) {
    typename V::Weight *to = static_cast<typename V::Weight *>(y);
    float sums[kPiece];
    for (Index start = 0; start < count; start += kPiece) {
        const Index n = count - start < kPiece ? count - start : kPiece;
        for (Index i = 0; i < n; i++) sums[i] = 0.0f;
        for (Index k = 0; k < num_outs; k++) {
            const float *out = outs[k] + start;
            const float weight = weights[k];
            // Half of them lie in another core's cache, and each is too short a run for the processor to see a pattern.
            for (Index i = 0; i < n; i += 16) __builtin_prefetch(out + 2 * kPiece + i, 0, 3);
            for (Index i = 0; i < n; i++) sums[i] += weight * out[i];
        }
        for (Index i = 0; i < n; i++) store(&to[start + i], sums[i]);
    }
}

template <class V>
Index row_bytes(Index depth) {
    return (depth + V::kStep - 1) / V::kStep * V::kStep * static_cast<Index>(sizeof(typename V::Act));
}

}  // namespace
