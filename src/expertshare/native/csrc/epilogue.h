// From float32 sums to what leaves a kernel: SiLU and the weighted sum, rounded features, weights of a softmax, the
// best of some logits. Plain loops that the compiler vectorises for each instruction set.
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

inline float clamped(float x) {  // a NaN passes both comparisons
    x = x > 87.0f ? 87.0f : x;
    return x < -87.0f ? -87.0f : x;
}

inline float silu(float gate) { return gate / (1.0f + exp_clamped(clamped(-gate))); }

constexpr Index kPiece = 64;

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
            // Half of them are in another core's cache, and each is too short a run for the processor to see a pattern.
            for (Index i = 0; i < n; i += 16) __builtin_prefetch(out + 2 * kPiece + i, 0, 3);
            for (Index i = 0; i < n; i++) sums[i] += weight * out[i];
        }
        for (Index i = 0; i < n; i++) store(&to[start + i], sums[i]);
    }
}

template <class V>
void round_row(const float *out, Index count, void *y) {
    typename V::Weight *to = static_cast<typename V::Weight *>(y);
    for (Index i = 0; i < count; i++) store(&to[i], out[i]);
}

// Sixteen partial results side by side, whatever the vector length: sums do not depend on the instruction set's.
constexpr Index kPartials = 16;
constexpr Index kMostLogits = 256;

// All lanes in one, by halves: a chain of sixteen would take longer than what it follows.
template <class Merge>
inline float folded(float (&lanes)[kPartials], Merge merge) {
    for (Index half = kPartials / 2; half > 0; half /= 2) {
        for (Index j = 0; j < half; j++) lanes[j] = merge(lanes[j], lanes[j + half]);
    }
    return lanes[0];
}

inline float sum_of(float (&lanes)[kPartials]) {
    return folded(lanes, [](float a, float b) { return a + b; });
}
inline float largest_of(float (&lanes)[kPartials]) {
    return folded(lanes, [](float a, float b) { return b > a ? b : a; });
}

inline float softmax_weight(float below) {
    const float weight = exp_clamped(below < -87.0f ? -87.0f : below);
    return below < -87.0f ? 0.0f : weight;
}

inline float exponentials(float *scores, Index count, float scale) {
    alignas(64) float sums[kPartials], lanes[kPartials];
    for (Index j = 0; j < kPartials; j++) {
        sums[j] = 0.0f;
        lanes[j] = scores[0];
    }
    const Index whole = count / kPartials * kPartials;
    for (Index i = 0; i < whole; i += kPartials) {
        for (Index j = 0; j < kPartials; j++) lanes[j] = scores[i + j] > lanes[j] ? scores[i + j] : lanes[j];
    }
    for (Index i = whole; i < count; i++) {
        lanes[i - whole] = scores[i] > lanes[i - whole] ? scores[i] : lanes[i - whole];
    }
    const float largest = largest_of(lanes);
    for (Index i = 0; i < whole; i += kPartials) {
        for (Index j = 0; j < kPartials; j++) {
            const float weight = softmax_weight((scores[i + j] - largest) * scale);
            scores[i + j] = weight;
            sums[j] += weight;
        }
    }
    for (Index i = whole; i < count; i++) {
        scores[i] = softmax_weight((scores[i] - largest) * scale);
        sums[i - whole] += scores[i];
    }
    return sum_of(sums);
}

template <class V>
expertshare::Best choose(const float *logits, Index count) {
    alignas(64) float rounded[kMostLogits];
    alignas(64) float largest[kPartials], sums[kPartials];
    for (Index i = 0; i < count; i++) {
        typename V::Weight weight;
        store(&weight, logits[i]);
        rounded[i] = load(weight);
    }
    const Index padded = (count + kPartials - 1) / kPartials * kPartials;
    for (Index i = count; i < padded; i++) rounded[i] = expertshare::kExcluded;
    for (Index j = 0; j < kPartials; j++) {
        largest[j] = expertshare::kExcluded;
        sums[j] = 0.0f;
    }
    for (Index i = 0; i < padded; i += kPartials) {
        for (Index j = 0; j < kPartials; j++) {
            const float logit = rounded[i + j];
            largest[j] = logit > largest[j] ? logit : largest[j];
        }
    }
    expertshare::Best best = {largest_of(largest), static_cast<int>(count), 0.0f};
    for (int i = 0; i < static_cast<int>(count); i++) {
        const int here = rounded[i] == best.logit ? i : static_cast<int>(count);
        best.index = here < best.index ? here : best.index;
    }
    for (Index i = 0; i < padded; i += kPartials) {
        for (Index j = 0; j < kPartials; j++) {
            const float logit = rounded[i + j];
            float below = logit - best.logit;
            below = below < -87.0f ? -87.0f : below;
            sums[j] += exp_clamped(below) + logit * 0.0f;  // infinity times 0 is NaN
        }
    }
    best.sum = sum_of(sums);
    return best;
}

}  // namespace
