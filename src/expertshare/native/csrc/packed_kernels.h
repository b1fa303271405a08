// What one instruction set offers for int8 rows that many tokens meet: the head of a large vocabulary.
#pragma once

#include "kernels.h"

namespace expertshare {

constexpr Index kPackedRows = 64;
constexpr Index kPackedScratch = kPackedRows * 128;  // bytes

struct PackedRows {
    const char *codes;    // int8 [num_rows, depth]
    const char *scales;   // float32 [num_rows]
    Index num_rows;       // at most kPackedRows
};

struct PackedKernels {
    // Bytes of one encoded token, and how to encode one of floats or of bfloat16.
    Index (*row_bytes)(Index depth);
    void (*encode_float32)(const void *features, Index depth, void *row);
    void (*encode_bfloat16)(const void *features, Index depth, void *row);

    // out[m * out_stride + r] = row r dotted with token m; all kPackedRows columns are written, those behind the rows
    // with anything. Meanwhile `next_bytes` from `next` on are fetched into the second cache.
    void (*rows)(const PackedRows &w, Index depth, const void *const *x, Index num_tokens, float *out,
                 Index out_stride, char *scratch, const char *next, Index next_bytes);
};

// Null where the compiler could not build for that instruction set.
extern const PackedKernels *const packed_avx512_vnni;
extern const PackedKernels *const packed_avx2;
extern const PackedKernels *const packed_portable;

}  // namespace expertshare
