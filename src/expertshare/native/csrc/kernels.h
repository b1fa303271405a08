// What one instruction set offers for one weight type. The scheduler knows nothing else about either.
#pragma once

#include <cstddef>

namespace expertshare {

using Index = std::ptrdiff_t;

// The lowest finite bfloat16: stands for a logit that is left out.
constexpr float kExcluded = -3.3895313892515355e38f;

// The largest of some logits, the first if several are, and the sum of exp(logit - largest) over all of them.
struct Best {
    float logit;
    int index;
    float sum;  // NaN where a logit was not finite
};

// The first of some rows of weights. Floats have neither scales nor minima.
struct Rows {
    const char *codes, *scales, *minima;
};
constexpr Index kTokenBlock = 64;  // at most so many tokens meet the rows of one call
constexpr Rows kNothing = {nullptr, nullptr, nullptr};
constexpr Index kPanelRows = 16;  // of quantised weights, which are read in whole panels
inline Rows floats_at(const void *weights) { return {static_cast<const char *>(weights), nullptr, nullptr}; }

struct Kernels {
    // A hidden row is written by `swiglu` in pieces that begin at multiples of this.
    Index granule;

    // Bytes of one activation row of `depth` features in the scratch: padded with zeros to whole vectors.
    Index (*row_bytes)(Index depth);

    // Copy a token's features into a scratch row, in the order and type in which `rows` wants them.
    void (*encode)(const void *features, Index depth, void *row);

    // out[m * out_stride + r] = dot(row r of w, x[m]) for r < num_rows, m < num_tokens <= kTokenBlock. `next` is what will
    // be read after these rows, and is prefetched meanwhile; with null codes nothing is prefetched at all. Every product
    // is summed in an order that depends on the depth alone.
    void (*rows)(const Rows &w, Index num_rows, Index depth, const void *const *x, Index num_tokens, float *out,
                 Index out_stride, const Rows &next);

    // Features first .. first + count of the hidden row of `depth`: silu(gate) * up, in the order and type
    // in which `rows` wants them.
    void (*swiglu)(const float *gate, const float *up, Index first, Index count, Index depth, void *row);

    // y[i] = sum over k, in order, of weights[k] * outs[k][i], in float32, rounded once to the type of y.
    void (*mix)(const float *const *outs, const float *weights, Index num_outs, Index count, void *y);

    // y[i] = out[i], rounded to the weight type. Null for quantised weights, as are the two below.
    void (*round)(const float *out, Index count, void *y);

    // scores[i] = exp(scale * (scores[i] - the largest)) for scale > 0; -infinity becomes exactly 0 and changes
    // nothing for the others. Returns the sum.
    float (*exponentials)(float *scores, Index count, float scale);

    // Of logits rounded to the weight type; count >= 1. kExcluded passes for a logit that never wins and weighs nothing.
    Best (*choose)(const float *logits, Index count);
};

// Sources named kernels_* are compiled once for each instruction set that setup.py lists for them. What each defines, by
// the name of the instruction set; null where the compiler could not build for it.
#define EXPERTSHARE_JOIN_(a, b) a##b
#define EXPERTSHARE_JOIN(a, b) EXPERTSHARE_JOIN_(a, b)
#define EXPERTSHARE_TABLE(family) EXPERTSHARE_JOIN(family##_, EXPERTSHARE_ISA)
extern const Kernels *const float32_portable, *const float32_avx2, *const float32_avx512;
extern const Kernels *const bfloat16_portable, *const bfloat16_avx2, *const bfloat16_avx512,
    *const bfloat16_avx512_bf16;

// For quantised weights: an array with two entries for each format, float32 tokens first.
enum Format { kInt8, kInt4By32, kInt4By64, kInt4By32Minima, kInt4By64Minima, kNumFormats };
extern const Kernels *const quantised_portable, *const quantised_avx2, *const quantised_avx_vnni,
    *const quantised_avx512_vnni;

}  // namespace expertshare
