// From float32 sums to what leaves the kernel: rounded features, weights of a softmax, or the best of some logits.
#pragma once

#include "activation.h"
#include "bfloat16.h"
#include "kernels.h"

namespace {

template <class V>
void round_row(const float *out, Index count, void *y) {
    typename V::Weight *to = static_cast<typename V::Weight *>(y);
    for (Index i = 0; i < count; i++) store(&to[i], out[i]);
}

// Sixteen partial results side by side, whatever the vector length: sums do not depend on the instruction set's.
constexpr Index kLanes = 16;
constexpr Index kMostLogits = 256;

inline float softmax_weight(float below) {
    const float weight = exp_clamped(below < -87.0f ? -87.0f : below);
    return below < -87.0f ? 0.0f : weight;
}

inline float exponentials(float *scores, Index count, float scale) {
    float sums[kLanes], lanes[kLanes];
    for (Index j = 0; j < kLanes; j++) {
        sums[j] = 0.0f;
        lanes[j] = scores[0];
    }
    const Index whole = count / kLanes * kLanes;
    for (Index i = 0; i < whole; i += kLanes) {
        for (Index j = 0; j < kLanes; j++) lanes[j] = scores[i + j] > lanes[j] ? scores[i + j] : lanes[j];
    }
    for (Index i = whole; i < count; i++) lanes[i - whole] = scores[i] > lanes[i - whole] ? scores[i] : lanes[i - whole];
    float largest = lanes[0];
    for (Index j = 1; j < kLanes; j++) largest = lanes[j] > largest ? lanes[j] : largest;
    for (Index i = 0; i < whole; i += kLanes) {
        for (Index j = 0; j < kLanes; j++) {
            const float weight = softmax_weight((scores[i + j] - largest) * scale);
            scores[i + j] = weight;
            sums[j] += weight;
        }
    }
    for (Index i = whole; i < count; i++) {
        scores[i] = softmax_weight((scores[i] - largest) * scale);
        sums[i - whole] += scores[i];
    }
    float sum = 0.0f;
    for (Index j = 0; j < kLanes; j++) sum += sums[j];
    return sum;
}

template <class V>
expertshare::Best choose(const float *logits, Index count) {
    float rounded[kMostLogits];
    float largest[kLanes], sums[kLanes];
    for (Index i = 0; i < count; i++) {
        typename V::Weight weight;
        store(&weight, logits[i]);
        rounded[i] = load(weight);
    }
    const Index padded = (count + kLanes - 1) / kLanes * kLanes;
    for (Index i = count; i < padded; i++) rounded[i] = expertshare::kExcluded;
    for (Index j = 0; j < kLanes; j++) {
        largest[j] = expertshare::kExcluded;
        sums[j] = 0.0f;
    }
    for (Index i = 0; i < padded; i += kLanes) {
        for (Index j = 0; j < kLanes; j++) {
            const float logit = rounded[i + j];
            largest[j] = logit > largest[j] ? logit : largest[j];
        }
    }
    expertshare::Best best = {expertshare::kExcluded, static_cast<int>(count), 0.0f};
    for (Index j = 0; j < kLanes; j++) best.logit = largest[j] > best.logit ? largest[j] : best.logit;
    for (int i = 0; i < static_cast<int>(count); i++) {
        const int here = rounded[i] == best.logit ? i : static_cast<int>(count);
        best.index = here < best.index ? here : best.index;
    }
    for (Index i = 0; i < padded; i += kLanes) {
        for (Index j = 0; j < kLanes; j++) {
            const float logit = rounded[i + j];
            float below = logit - best.logit;
            below = below < -87.0f ? -87.0f : below;
            sums[j] += exp_clamped(below) + logit * 0.0f;  // infinity times 0 is NaN
        }
    }
    for (Index j = 0; j < kLanes; j++) best.sum += sums[j];
    return best;
}

}  // namespace
