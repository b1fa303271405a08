// Activations as small integers: 128 features at a time share a float32 scale, so that one large feature costs only its
// neighbours their precision.
#pragma once

#include "epilogue.h"
#include "kernels.h"
#include "quantised_panel.h"

namespace {

constexpr Index kSpan = 128, kQuad = 4, kMostGroups = 4;

template <int Bits, int Group, bool Minima>
struct Format {
    static constexpr int kBits = Bits, kGroup = Group;  // weights that share a scale; 0: all of a row
    static constexpr bool kMinima = Minima;
    static constexpr Index kRun = Group == 0 ? kSpan : Group;  // features of a span whose products are one integer
    static Index row_bytes(Index depth) { return depth * Bits / 8; }
    static Index scale_bytes(Index depth) { return Group == 0 ? 4 : depth / (Group == 0 ? 1 : Group) * 2; }
};

struct alignas(16) Span {
    std::int8_t codes[kSpan];
    union {  // of each group
        std::int32_t start[kMostGroups];  // sums begin here: minus the code that stands for zero, times the codes
        float sums[kMostGroups];          // with minima: the codes
    };
    float scale;
};

inline void copy_features(const float *from, Index count, float *to) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
}
inline void copy_features(const std::uint16_t *from, Index count, float *to) {
    for (Index i = 0; i < count; i++) to[i] = widen(from[i]);
}

// The largest magnitude, as bits: for these the order of integers is that of floats, infinity and NaN above all.
inline std::int32_t largest_bits(const float *features) {
    std::int32_t largest = 0;
    for (Index i = 0; i < kSpan; i++) {
        std::int32_t bits;
        std::memcpy(&bits, features + i, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// To nearest, ties to even. A span with a NaN or an infinity gets NaN for a scale, and so does all that it enters.
// `zero`: the code of weight zero, as `dot` multiplies it.
template <class F>
void quantise_span(const float *features, std::int32_t zero, Span &to) {
    constexpr std::int32_t kInfinity = 0x7f800000, kTooSmall = 0x0d800000;  // 2^-100: its reciprocal could overflow
    constexpr float kShift = 12582912.0f;                                   // 1.5 * 2^23
    constexpr std::int32_t kShiftBits = 0x4b400000;
    const std::int32_t bits = largest_bits(features);
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    const bool usable = bits >= kTooSmall && bits < kInfinity;
    const float inverse = usable ? 127.0f / largest : 0.0f;
    to.scale = bits >= kInfinity ? __builtin_nanf("") : usable ? largest / 127.0f : 0.0f;
    for (Index i = 0; i < kSpan; i++) {
        const float shifted = features[i] * inverse + kShift;
        std::int32_t shifted_bits;
        std::memcpy(&shifted_bits, &shifted, sizeof shifted_bits);
        to.codes[i] = static_cast<std::int8_t>(shifted_bits - kShiftBits);
    }
    for (Index group = 0; group < kSpan / F::kRun; group++) {
        std::int32_t sum = 0;
        for (Index i = 0; i < F::kRun; i++) sum += to.codes[group * F::kRun + i];
        if constexpr (F::kMinima) {
            to.sums[group] = static_cast<float>(sum);
        } else {
            to.start[group] = -zero * sum;
        }
    }
}

inline Index num_spans(Index depth) { return (depth + kSpan - 1) / kSpan; }

inline Index span_bytes(Index depth) { return num_spans(depth) * static_cast<Index>(sizeof(Span)); }

template <class F, class Token>
void pack_spans(const void *const *x, Index, Index, Index begin, Index end, void *block) {
    const Token *from = static_cast<const Token *>(x[0]);
    Span *to = static_cast<Span *>(block) + begin / kSpan;
    for (Index first = begin; first < end; first += kSpan, to++) {
        const Index count = end - first < kSpan ? end - first : kSpan;
        float span[kSpan];
        copy_features(from + first, count, span);
        for (Index i = count; i < kSpan; i++) span[i] = 0.0f;
        quantise_span<F>(span, zero_of(F::kBits), *to);
    }
}

// `first` is the beginning of a span, and `count` ends one or the row.
template <class F>
void swiglu_spans(const float *gate, const float *up, Index first, Index count, Index, void *block, Index) {
    Span *to = static_cast<Span *>(block) + first / kSpan;
    for (Index start = 0; start < count; start += kSpan, to++) {
        const Index n = count - start < kSpan ? count - start : kSpan;
        float span[kSpan];
        for (Index i = 0; i < n; i++) span[i] = silu(gate[start + i]) * up[start + i];
        for (Index i = n; i < kSpan; i++) span[i] = 0.0f;
        quantise_span<F>(span, zero_of(F::kBits), *to);
    }
}

template <class Token>
struct MixedInto {
    using Weight = Token;
};

}  // namespace
