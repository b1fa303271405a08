// One pass over the rows of a matrix for all tokens: what a dense projection and the head have in common.
#pragma once

#include "arena.h"
#include "kernels.h"
#include "pool.h"
#include "queue.h"

namespace expertshare {

struct Matrix {
    const void *x;  // [num_tokens, depth]
    const void *w;  // [num_rows, depth], read once
    Index num_tokens, num_rows, depth, element;  // element: bytes of a weight
};

// Rows are cut into chunks that threads take from a queue. Every product is computed by one thread, in an order that
// depends neither on the chunks nor on the other tokens.
class RowPass : public Work {
   public:
    int useful_threads() const;
    void run(int worker) override;

   protected:
    // `chunk_rows` is a multiple of 32, at most 256. `extra_bytes` of the arena are left to the derived class. Throws
    // std::bad_alloc.
    RowPass(const Matrix &matrix, const Kernels &kernels, Arena &arena, int num_threads, Index chunk_rows,
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

    // Rows that fit the cache.
    static Index cached_rows(const Matrix &matrix);
    // As many, or fewer where that would leave threads without work.
    static Index balanced_rows(const Matrix &matrix, int num_threads);
    static Index num_chunks(const Matrix &matrix, Index chunk_rows);

    const Matrix matrix_;
    const Kernels &kernels_;
    const Index chunk_, num_chunks_;

   private:
    void pass(int worker, Index chunk, Index next_chunk, bool cached);
    void few(Index chunk, Index next_chunk, float *out);
    void many(Index chunk, Index next_chunk, bool cached, float *out);
    Index num_rows(Index chunk) const;
    const char *rows(Index chunk) const;

    const int num_threads_;
    const Index tile_tokens_;
    char *tokens_ = nullptr;
    const void **x_ = nullptr;  // scratch rows of tokens_
    float *sums_ = nullptr;     // per thread
    Index token_stride_ = 0;
    Queue encode_, chunks_;
};

}  // namespace expertshare
