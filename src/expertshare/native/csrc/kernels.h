// What one instruction set offers for one weight type. The scheduler knows nothing else about either.
#pragma once

#include <cstddef>

namespace expertshare {

using Index = std::ptrdiff_t;

struct Kernels {
    // Bytes of one activation row of `depth` features in the scratch: padded with zeros to whole vectors.
    Index (*row_bytes)(Index depth);

    // Copy a token's features into a scratch row, in the order and type in which `rows` wants them.
    void (*encode)(const void *features, Index depth, void *row);

    // out[m * out_stride + r] = dot(w[r * depth + ...], x[m]) for r < num_rows, m < num_tokens. `next` is what will
    // be read after these rows (prefetched towards their end) or null, in which case nothing is prefetched at all.
    void (*rows)(const void *w, Index num_rows, Index depth, const void *const *x, Index num_tokens, float *out,
                 Index out_stride, const void *next);

    // Features first .. first + count of the hidden row of `depth`: silu(gate) * up, rounded to the weight type.
    void (*swiglu)(const float *gate, const float *up, Index first, Index count, Index depth, void *row);

    // y[i] = sum over k, in order, of weights[k] * outs[k][i], in float32, rounded once to the weight type.
    void (*mix)(const float *const *outs, const float *weights, Index num_outs, Index count, void *y);
};

// One pair per translation unit; null where the compiler could not build for that instruction set.
extern const Kernels *const avx512_bf16_bfloat16;
extern const Kernels *const avx512_bfloat16;
extern const Kernels *const avx512_float32;
extern const Kernels *const avx2_bfloat16;
extern const Kernels *const avx2_float32;
extern const Kernels *const portable_bfloat16;
extern const Kernels *const portable_float32;

}  // namespace expertshare
