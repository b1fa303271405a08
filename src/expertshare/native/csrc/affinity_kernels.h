// What the gate needs of an instruction set.
#pragma once

#include "kernels.h"

namespace expertshare {

// Rows of the router's weights, and where those begin that will be read after them: fetched meanwhile, unless null.
struct GateRows {
    const void *at, *next;
    bool is_bfloat16;  // otherwise float32
};

struct AffinityKernels {
    Index width;  // tokens of a block
    Index rows;   // experts of a block

    // Features begin .. end (begin a multiple of 128) of up to `width` tokens, side by side: packed[i * width + t], zero
    // for t >= num_tokens. In what form is the kernel's own affair, but for bfloat16 and for float32 always the same.
    void (*pack)(const void *x, bool is_bfloat16, Index num_tokens, Index depth, Index begin, Index end, float *packed);

    // logits[r * width + t] = dot(row r of w, token t) for r < num_rows <= rows and t < num_tokens.
    void (*multiply)(const GateRows &w, Index num_rows, Index depth, const float *packed, bool is_bfloat16,
                     Index num_tokens, float *logits);

    // affinity[e] of logits[e * width]; choice = affinity + bias unless null.
    void (*finish)(const float *logits, Index num_experts, bool is_softmax, const float *bias, float *affinity,
                   float *choice);
};

extern const AffinityKernels *const gate_portable, *const gate_avx2, *const gate_avx512, *const gate_avx512_bf16;

// By number, as isa.h counts them; null unless usable.
const AffinityKernels *affinity_kernels_for(int isa);

}  // namespace expertshare
