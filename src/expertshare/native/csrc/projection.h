// Products of all rows of a matrix with all tokens: a dense projection without bias, and the head, which keeps the best
// token and its probability without a logit in memory.
#pragma once

#include "abi.h"
#include "arena.h"
#include "kernels.h"
#include "pool.h"
#include "queue.h"

namespace expertshare {

struct Matrix {
    const void *x;  // [num_tokens, depth]
    Rows w;         // [num_rows, depth], read once; quantised: the last panel is whole
    Index num_tokens, num_rows, depth;
    Index element;                 // bytes of a feature of x
    Index row_bytes, scale_bytes;  // of a row of w: its weights or codes; its scales
};

// Which kernels multiply, and which treat the sums: those of the type of x, whatever the weights are.
struct PassKernels {
    const Kernels &products, &floats;
};

// Rows are cut into chunks that threads take from a queue, and these into pieces that all tokens meet while they are in
// the second cache. Every product is computed by one thread, in an order that depends neither on the chunks nor on the
// other tokens.
class RowPass : public Work {
   public:
    int useful_threads() const;
    void run(int worker) override;

   protected:
    static constexpr Index kMostRows = 256;

    // `chunk_rows` is a multiple of 32, at most kMostRows. `extra_bytes` of the arena are left to the derived class. Throws
    // std::bad_alloc.
    RowPass(const Matrix &matrix, const PassKernels &kernels, Arena &arena, int num_threads, Index chunk_rows,
            Index extra_bytes);
    ~RowPass() = default;

    // out[m * stride + r]: sums of rows first_row + r and tokens first_token + m.
    struct Sums {
        Index chunk, first_row, num_rows, first_token, num_tokens;
        float *out;
        Index stride;
    };
    virtual void take(const Sums &sums) = 0;
    virtual void finish(int worker) = 0;  // after all chunks of all threads

    // kMostRows, or fewer where that would leave threads without work.
    static Index balanced_rows(const Matrix &matrix, int num_threads);
    static Index num_chunks(const Matrix &matrix, Index chunk_rows);

    const Matrix matrix_;
    const Kernels &floats_;
    const Index chunk_, num_chunks_, piece_;

   private:
    void pass(int worker, Index chunk, Index next_chunk);
    Index num_rows(Index chunk) const;
    Rows rows(Index row) const;

    const Kernels &products_;
    const int num_threads_;
    const bool in_panels_;
    const Index sum_stride_, num_blocks_, block_stride_;  // floats; of packed tokens
    char *packed_ = nullptr;
    const void **blocks_ = nullptr;
    Own<float> sums_;
    Queue pack_, chunks_;
};

class Linear final : public RowPass {
   public:
    // y: [num_tokens, num_rows] of the type of x.
    Linear(const Matrix &matrix, void *y, const PassKernels &kernels, Arena &arena, int num_threads);

   private:
    void take(const Sums &sums) override;
    void finish(int) override {}

    void *y_;
};

// What a chunk of the vocabulary says of a token is kept and merged in the order of chunks, which are the same for any
// number of threads or tokens: so is the result.
class Head final : public RowPass {
   public:
    // The fields of es_head and es_quantised_head of these names.
    struct Choice {
        const int64_t *excluded;
        Index num_excluded;
        int64_t *ids;
        float *probabilities;
    };
    Head(const Matrix &matrix, const Choice &choice, const PassKernels &kernels, Arena &arena, int num_threads);

   private:
    void take(const Sums &sums) override;
    void finish(int worker) override;
    void exclude(const Sums &sums) const;
    void merge(Index token);

    const Choice choice_;
    Best *bests_ = nullptr;  // [num_tokens, num_chunks]
    Queue merge_;
};

}  // namespace expertshare
