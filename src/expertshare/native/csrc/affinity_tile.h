// The gate's arithmetic over a vector type V: kLanes, load, splat, zero, fma, add, store; kRows rows at a time against
// a block of two vectors of tokens. Everything has internal linkage, as in tile.h.
//
// A feature of W is spread over a vector and multiplied with two vectors of tokens: no sums across lanes, and the tokens,
// which lie in the second cache, are read once for every kRows experts. Each sum is taken in strips of kStrip features,
// whose sums are added up in order: 2048 terms in one chain would round more than torch's product does.
#pragma once

#include <cmath>

#include "activation.h"
#include "affinity_kernels.h"

namespace {

using expertshare::Index;

constexpr Index kStrip = 256;

template <class V, int Rows>
void multiply_rows(const float *w, Index depth, const float *packed, float *logits, const float *next) {
    constexpr Index kWidth = 2 * V::kLanes, kLineFloats = 16;
    for (Index begin = 0; begin < depth; begin += kStrip) {
        const Index end = begin + kStrip < depth ? begin + kStrip : depth;
        typename V::Vector sums[Rows][2];
        for (int r = 0; r < Rows; r++) sums[r][0] = sums[r][1] = V::zero();
        for (Index line = begin; line < end; line += kLineFloats) {
            if (next != nullptr) {
                for (int r = 0; r < Rows; r++) __builtin_prefetch(next + r * depth + line, 0, 2);
            }
            const Index stop = line + kLineFloats < end ? line + kLineFloats : end;
            for (Index i = line; i < stop; i++) {
                const typename V::Vector x0 = V::load(packed + i * kWidth);
                const typename V::Vector x1 = V::load(packed + i * kWidth + V::kLanes);
                for (int r = 0; r < Rows; r++) {
                    const typename V::Vector spread = V::splat(w[r * depth + i]);
                    sums[r][0] = V::fma(spread, x0, sums[r][0]);
                    sums[r][1] = V::fma(spread, x1, sums[r][1]);
                }
            }
        }
        for (int r = 0; r < Rows; r++) {
            for (int half = 0; half < 2; half++) {
                float *to = logits + r * kWidth + half * V::kLanes;
                V::store(to, begin == 0 ? sums[r][half] : V::add(V::load(to), sums[r][half]));
            }
        }
    }
}

template <class V>
void multiply(const float *w, Index num_rows, Index depth, const float *packed, float *logits, const float *next) {
    if (num_rows == V::kRows) return multiply_rows<V, V::kRows>(w, depth, packed, logits, next);
    for (Index r = 0; r < num_rows; r++) {
        multiply_rows<V, 1>(w + r * depth, depth, packed, logits + r * 2 * V::kLanes, nullptr);
    }
}

template <class V, class Feature>
void pack_of(const Feature *x, Index num_tokens, Index depth, Index begin, Index end, float *packed) {
    constexpr Index kWidth = 2 * V::kLanes;
    Index i = begin;
    for (; i + V::kLanes <= end; i += V::kLanes) {
        for (Index from = 0; from < kWidth; from += V::kLanes) {
            typename V::Vector square[V::kLanes];
            for (Index t = 0; t < V::kLanes; t++) {
                square[t] = from + t < num_tokens ? V::widen_all(x + (from + t) * depth + i) : V::zero();
            }
            V::transpose(square);
            for (Index k = 0; k < V::kLanes; k++) V::store(packed + (i + k) * kWidth + from, square[k]);
        }
    }
    for (; i < end; i++) {
        for (Index t = 0; t < kWidth; t++) packed[i * kWidth + t] = t < num_tokens ? load(x[t * depth + i]) : 0.0f;
    }
}

template <class V>
void pack(const void *x, bool is_bfloat16, Index num_tokens, Index depth, Index begin, Index end, float *packed) {
    if (is_bfloat16) return pack_of<V>(static_cast<const std::uint16_t *>(x), num_tokens, depth, begin, end, packed);
    pack_of<V>(static_cast<const float *>(x), num_tokens, depth, begin, end, packed);
}

inline float clamped(float x) {  // a NaN passes both comparisons
    x = x > 87.0f ? 87.0f : x;
    return x < -87.0f ? -87.0f : x;
}

inline void softmax(float *row, Index count) {
    constexpr Index kSums = 16;
    float most = row[0];
    for (Index e = 1; e < count; e++) most = most < row[e] ? row[e] : most;
    float sums[kSums] = {};
    const Index whole = count / kSums * kSums;
    for (Index e = 0; e < count; e++) row[e] = exp_clamped(clamped(row[e] - most));
    for (Index e = 0; e < whole; e += kSums) {
        for (Index i = 0; i < kSums; i++) sums[i] += row[e + i];
    }
    for (Index e = whole; e < count; e++) sums[0] += row[e];
    float total = 0.0f;
    for (Index i = 0; i < kSums; i++) total += sums[i];
    for (Index e = 0; e < count; e++) row[e] /= total;
}

template <class V>
void finish(const float *logits, Index num_experts, bool is_softmax, const float *bias, float *affinity,
            float *choice) {
    for (Index e = 0; e < num_experts; e++) affinity[e] = logits[e * 2 * V::kLanes];
    if (is_softmax) {
        softmax(affinity, num_experts);
    } else {
        for (Index e = 0; e < num_experts; e++) affinity[e] = 1.0f / (1.0f + exp_clamped(clamped(-affinity[e])));
    }
    if (choice == nullptr) return;
    for (Index e = 0; e < num_experts; e++) choice[e] = affinity[e] + bias[e];
}

template <class V>
constexpr expertshare::AffinityKernels affinity_kernels_of() {
    return {2 * V::kLanes, V::kRows, pack<V>, multiply<V>, finish<V>};
}

}  // namespace
