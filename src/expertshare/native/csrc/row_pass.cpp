#include "row_pass.h"

#include <algorithm>

namespace expertshare {
namespace {

constexpr Index kPieceBytes = 128 << 10;  // two of them and the tokens leave room in the second cache
constexpr Index kRowGranule = 32;         // a multiple of every tile: which rows are the odd ones is the same for all
constexpr Index kItemsPerThread = 8;
constexpr Index kBytesPerThread = 128 << 10;  // less than this is not worth waking one more thread

}  // namespace

Index RowPass::balanced_rows(const Matrix &matrix, int num_threads) {
    const Index rows = matrix.num_rows / (kItemsPerThread * num_threads) / kRowGranule * kRowGranule;
    return std::clamp(rows, kRowGranule, kMostRows);
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
      piece_(std::max(kPieceBytes / matrix.row_bytes / kRowGranule * kRowGranule, kRowGranule)),
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

Rows RowPass::rows(Index row) const {
    const Rows &w = matrix_.w;
    return {w.codes + row * matrix_.row_bytes, w.scales == nullptr ? nullptr : w.scales + row * matrix_.scale_bytes,
            nullptr};
}

Index RowPass::num_rows(Index chunk) const { return std::min(chunk_, matrix_.num_rows - chunk * chunk_); }

void RowPass::pass(int worker, Index chunk, Index next_chunk) {
    float *out = sums_.of(worker);
    const Index first = chunk * chunk_, count = num_rows(chunk);
    const Index whole = in_panels_ ? (count + kPanelRows - 1) / kPanelRows * kPanelRows : count;
    const Index then = (next_chunk >= 0 ? next_chunk : chunk) * chunk_;
    for (Index m = 0; m < matrix_.num_tokens; m += kTokenBlock) {
        const Index num_tokens = std::min(kTokenBlock, matrix_.num_tokens - m);
        for (Index row = 0; row < whole; row += piece_) {
            const Rows next = rows(row + piece_ < whole ? first + row + piece_ : then);
            products_.rows(rows(first + row), std::min(piece_, whole - row), matrix_.depth, x_ + m, num_tokens,
                           out + row, sum_stride_, m == 0 ? next : kNothing);
        }
        take({chunk, first, count, m, num_tokens, out, sum_stride_});
    }
}

}  // namespace expertshare
