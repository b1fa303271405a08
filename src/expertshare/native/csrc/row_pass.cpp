#include "row_pass.h"

#include <algorithm>

namespace expertshare {
namespace {

constexpr Index kTokenBlock = 64;         // tokens that share one pass over a chunk of weights in the L2 cache
constexpr Index kChunkBytes = 256 << 10;  // with the tokens of a block it fits that cache
constexpr Index kRowGranule = 32;         // a multiple of every tile: which rows are the odd ones is the same for all
constexpr Index kMostRows = 256;
constexpr Index kItemsPerThread = 8;
constexpr Index kBytesPerThread = 128 << 10;  // less than this is not worth waking one more thread

// Rows are spread over the cache's sets: at a stride that is a power of two all would fall into the same few.
Index spread(Index bytes) { return (bytes + 63) / 64 * 64 + 64; }

}  // namespace

Index RowPass::cached_rows(const Matrix &matrix) {
    const Index rows = std::min(kChunkBytes / (matrix.depth * matrix.element), kMostRows);
    return std::max(rows / kRowGranule * kRowGranule, kRowGranule);
}

Index RowPass::balanced_rows(const Matrix &matrix, int num_threads) {
    const Index rows = matrix.num_rows / (kItemsPerThread * num_threads) / kRowGranule * kRowGranule;
    return std::min(cached_rows(matrix), std::max(rows, kRowGranule));
}

Index RowPass::num_chunks(const Matrix &matrix, Index chunk_rows) {
    return (matrix.num_rows + chunk_rows - 1) / chunk_rows;
}

RowPass::RowPass(const Matrix &matrix, const Kernels &kernels, Arena &arena, int num_threads, Index chunk_rows,
                 Index extra_bytes)
    : matrix_(matrix),
      kernels_(kernels),
      chunk_(chunk_rows),
      num_chunks_(num_chunks(matrix, chunk_rows)),
      num_threads_(num_threads) {
    token_stride_ = spread(kernels.row_bytes(matrix.depth));
    const Index num_sums = num_threads * kTokenBlock * chunk_;
    arena.reserve(Arena::padded<char>(matrix.num_tokens * token_stride_) +
                  Arena::padded<const void *>(matrix.num_tokens) + Arena::padded<float>(num_sums) + extra_bytes);
    tokens_ = arena.carve<char>(matrix.num_tokens * token_stride_);
    x_ = arena.carve<const void *>(matrix.num_tokens);
    sums_ = arena.carve<float>(num_sums);
    for (Index token = 0; token < matrix.num_tokens; token++) x_[token] = tokens_ + token * token_stride_;
    encode_.fill(matrix.num_tokens);
    chunks_.fill(num_chunks_);
}

int RowPass::useful_threads() const {
    const Index bytes = matrix_.num_rows * matrix_.depth * matrix_.element;
    return static_cast<int>(std::min<Index>(num_threads_, 1 + bytes / kBytesPerThread));
}

void RowPass::run(int worker) {
    drain(encode_, worker, [this](Index token, Index) {
        kernels_.encode(static_cast<const char *>(matrix_.x) + token * matrix_.depth * matrix_.element, matrix_.depth,
                        tokens_ + token * token_stride_);
    });
    drain(chunks_, worker, [this, worker](Index chunk, Index next) { pass(worker, chunk, next); });
    finish(worker);
}

const char *RowPass::rows(Index chunk) const {
    return static_cast<const char *>(matrix_.w) + chunk * chunk_ * matrix_.depth * matrix_.element;
}

void RowPass::pass(int worker, Index chunk, Index next_chunk) {
    const Index first = chunk * chunk_, count = std::min(chunk_, matrix_.num_rows - first);
    const char *next = rows(next_chunk >= 0 ? next_chunk : chunk);
    float *out = sums_ + worker * kTokenBlock * chunk_;
    for (Index m = 0; m < matrix_.num_tokens; m += kTokenBlock) {
        const Index num_tokens = std::min(kTokenBlock, matrix_.num_tokens - m);
        kernels_.rows(rows(chunk), count, matrix_.depth, x_ + m, num_tokens, out, chunk_, m == 0 ? next : nullptr);
        take({chunk, first, count, m, num_tokens, out, chunk_});
    }
}

}  // namespace expertshare
