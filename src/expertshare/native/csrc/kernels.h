// The contract between schedulers, which know tokens, threads and memory, and kernels, which know an instruction set
// and a kind of weights. A new instruction set is one more implementation of `pack` and `multiply`.
#pragma once

#include <algorithm>
#include <cstddef>

namespace expertshare {

using Index = std::ptrdiff_t;

constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

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

// Products of weights W [rows, depth] with tokens, and what becomes of the sums. Tokens are packed once, `width` of
// them to a block, in the layout that `multiply` reads; then any number of calls multiplies rows of W with them.
// Experts, dense layers, the head, attention and the router all do these two steps.
struct Kernels {
    // Tokens of a block: a power of two, at most kTokenBlock. 1 where each token is a row of its own, which experts
    // then share; more where tokens are side by side in a vector or a tile.
    Index width;

    // Features that are packed by one call begin at a multiple of this; every whole number of granules may be another
    // thread's. The last of a token are followed by zeros where `multiply` reads whole vectors.
    Index granule;

    // Bytes of a block of tokens with `depth` features. Blocks begin at a multiple of 64 bytes.
    Index (*block_bytes)(Index depth);

    // Features begin .. end of num_tokens <= width tokens, whose features are at x[0], x[1] and so on, into a block.
    // What is behind the last token is for the kernel to fill.
    void (*pack)(const void *const *x, Index num_tokens, Index depth, Index begin, Index end, void *block);

    // out[m * out_stride + r] = dot(row r of w, token m) for r < num_rows, m < num_tokens <= kTokenBlock; token m is in
    // blocks[m / width]. Weights have no alignment but that of their type (panels: 64 bytes). `next` is what will be
    // read after these rows, and is prefetched meanwhile; with null codes nothing is. Every product is summed in
    // float32, in an order that depends on the depth alone: not on other tokens, other rows or the number of either.
    void (*multiply)(const Rows &w, Index num_rows, Index depth, const void *const *blocks, Index num_tokens,
                     float *out, Index out_stride, const Rows &next);

    // Packs features first .. first + count of a hidden token of `depth`, silu(gate) * up, as token `lane` of the
    // block. Null for the router's kernels, as are all below.
    void (*swiglu)(const float *gate, const float *up, Index first, Index count, Index depth, void *block, Index lane);

    // y[i] = sum over k, in order, of weights[k] * outs[k][i], in float32, rounded once to the type of y.
    void (*mix)(const float *const *outs, const float *weights, Index num_outs, Index count, void *y);

    // y[i] = out[i], rounded to the weight type. Null for quantised weights, as are the two below.
    void (*round)(const float *out, Index count, void *y);

    // scores[i] = exp(scale * (scores[i] - the largest)) for scale > 0; -infinity becomes exactly 0 and changes
    // nothing for the others. Returns the sum.
    float (*exponentials)(float *scores, Index count, float scale);

    // Of logits rounded to the weight type; count >= 1. kExcluded passes for a logit that never wins and weighs
    // nothing.
    Best (*choose)(const float *logits, Index count);
};

// Packs features begin .. end of the block whose first token is `first` of num_tokens; at(token) is where its features
// are.
template <class At>
void pack_block(const Kernels &kernels, Index first, Index num_tokens, Index depth, Index begin, Index end, void *block,
                At at) {
    const void *x[kTokenBlock];
    const Index count = std::min(kernels.width, num_tokens - first);
    for (Index i = 0; i < count; i++) x[i] = at(first + i);
    kernels.pack(x, count, depth, begin, end, block);
}

// The router's, by the types of tokens and of weights.
struct RouterKernels {
    Kernels products[2][2];  // [tokens are bfloat16][weights are bfloat16]; otherwise float32
    Index rows;              // that are multiplied at a time

    // A token's logits become affinities: softmax or sigmoid. choice = affinity + bias unless null.
    void (*finish)(float *logits, Index num_experts, bool is_softmax, const float *bias, float *choice);
};

// Types of features, scales, tables and results are all the same one. Whatever torch rounds to that type is rounded
// here, in the same places; only the order in which squares are added up is our own, and that for all instruction sets.
struct NormKernels {
    // s = x + delta, or x where delta is null (sum may then be null too); y = scale * (s / root mean square of s).
    void (*norm)(const void *x, const void *delta, const void *scale, Index count, float eps, void *sum, void *y);

    // A head in place: its norm, and the first rotary_dim features rotated, each half of them against the other.
    void (*norm_and_rotate)(void *head, const void *scale, Index head_dim, float eps, const void *cos, const void *sin,
                            Index rotary_dim);
};

struct NormPair {
    NormKernels bfloat16, float32;
};

// Sources named kernels_* are compiled once for each instruction set that setup.py lists for them. What each defines,
// by the name of the instruction set; null where the compiler could not build for it.
#define EXPERTSHARE_JOIN_(a, b) a##b
#define EXPERTSHARE_JOIN(a, b) EXPERTSHARE_JOIN_(a, b)
#define EXPERTSHARE_TABLE(family) EXPERTSHARE_JOIN(family##_, EXPERTSHARE_ISA)
extern const Kernels *const float32_portable, *const float32_avx2, *const float32_avx512;
extern const Kernels *const bfloat16_portable, *const bfloat16_avx2, *const bfloat16_avx512,
    *const bfloat16_avx512_bf16;
extern const RouterKernels *const router_portable, *const router_avx2, *const router_avx512, *const router_avx512_bf16;
extern const NormPair *const norm_portable, *const norm_avx2, *const norm_avx512;

// For quantised weights: an array with two entries for each format, float32 tokens first.
enum Format { kInt8, kInt4By32, kInt4By64, kInt4By32Minima, kInt4By64Minima, kNumFormats };
extern const Kernels *const quantised_portable, *const quantised_avx2, *const quantised_avx_vnni,
    *const quantised_avx512_vnni;

}  // namespace expertshare
