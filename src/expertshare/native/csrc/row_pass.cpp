#include "row_pass.h"

#include <algorithm>

namespace expertshare {
namespace {

constexpr Index kChunkBytes = 256 << 10;  // two of them and the tokens fit the second cache
constexpr Index kRowGranule = 32;         // a multiple of every tile: which rows are the odd ones is the same for all
constexpr Index kMostRows = 256;
constexpr Index kItemsPerThread = 8;
constexpr Index kBytesPerThread = 128 << 10;  // less than this is not worth waking one more thread

}  // namespace

Index RowPass::cached_rows(const Matrix &matrix) {
    const Index rows = std::min(kChunkBytes / matrix.row_bytes, kMostRows);
    return std::max(rows / kRowGranule * kRowGranule, kRowGranule);
}

Index RowPass::balanced_rows(const Matrix &matrix, int num_threads) {
    const Index rows = matrix.num_rows / (kItemsPerThread * num_threads) / kRowGranule * kRowGranule;
    return std::min(cached_rows(matrix), std::max(rows, kRowGranule));
}

Index RowPass::num_chunks(const Matrix &matrix, Index chunk_rows) {
    return (matrix.num_rows + chunk_rows - 1) / chunk_rows;
}

RowPass::RowPass(const Matrix &matrix, const PassKernels &kernels, Arena &arena, int num_threads, Index chunk_rows,
                 Index extra_bytes)
    : matrix_(matrix),
      floats_(kernels.floats),
      chunk_(chunk_rows),
      num_chunks_(num_chunks(matrix, chunk_rows)),
      products_(kernels.products),
      num_threads_(num_threads),
      in_panels_(matrix.w.scales != nullptr),
      sum_stride_(chunk_ + 64 / static_cast<Index>(sizeof(float))) {
    token_stride_ = spread_over_sets(products_.row_bytes(matrix.depth));
    const Index num_sums = std::min(kTokenBlock, matrix.num_tokens) * sum_stride_;
    arena.reserve(Arena::padded<char>(matrix.num_tokens * token_stride_) +
                  Arena::padded<const void *>(matrix.num_tokens) +
                  Arena::padded_own<float>(num_threads, num_sums) + extra_bytes);
    tokens_ = arena.carve<char>(matrix.num_tokens * token_stride_);
    x_ = arena.carve<const void *>(matrix.num_tokens);
    sums_ = arena.carve_own<float>(num_threads, num_sums);
    for (Index token = 0; token < matrix.num_tokens; token++) x_[token] = tokens_ + token * token_stride_;
    encode_.fill(matrix.num_tokens);
    chunks_.fill(num_chunks_);
}

int RowPass::useful_threads() const {
    const Index bytes = matrix_.num_rows * matrix_.row_bytes;
    return static_cast<int>(std::min<Index>(num_threads_, 1 + bytes / kBytesPerThread));
}

void RowPass::run(int worker) {
    drain(encode_, worker, [this](Index token, Index) {
        products_.encode(static_cast<const char *>(matrix_.x) + token * matrix_.depth * matrix_.element, matrix_.depth,
                         tokens_ + token * token_stride_);
    });
    drain(chunks_, worker, [this, worker](Index chunk, Index next) { pass(worker, chunk, next); });
    finish(worker);
}

Rows RowPass::rows(Index chunk) const {
    const Rows &w = matrix_.w;
    const Index row = chunk * chunk_;
    return {w.codes + row * matrix_.row_bytes, w.scales == nullptr ? nullptr : w.scales + row * matrix_.scale_bytes,
            nullptr};
}

Index RowPass::num_rows(Index chunk) const { return std::min(chunk_, matrix_.num_rows - chunk * chunk_); }

void RowPass::pass(int worker, Index chunk, Index next_chunk) {
    float *out = sums_.of(worker);
    const Index count = num_rows(chunk), whole = (count + kPanelRows - 1) / kPanelRows * kPanelRows;
    const Rows next = rows(next_chunk >= 0 ? next_chunk : chunk);
    for (Index m = 0; m < matrix_.num_tokens; m += kTokenBlock) {
        const Index num_tokens = std::min(kTokenBlock, matrix_.num_tokens - m);
        products_.rows(rows(chunk), in_panels_ ? whole : count, matrix_.depth, x_ + m, num_tokens, out, sum_stride_,
                       m == 0 ? next : kNothing);
        take({chunk, chunk * chunk_, count, m, num_tokens, out, sum_stride_});
    }
}

}  // namespace expertshare
