#include "projection.h"

#include <algorithm>
#include <cmath>

namespace expertshare {
namespace {

constexpr Index kPieceBytes = 128 << 10;  // two of them and the tokens fit the second cache
constexpr Index kRowGranule = 32;         // a multiple of every tile: which rows are the odd ones is the same for all
constexpr Index kItemsPerThread = 8;
constexpr Index kBytesPerThread = 128 << 10;  // less than this is not worth waking one more thread

}  // namespace

Index RowPass::balanced_rows(const Matrix &matrix, int num_threads) {
    const Index rows = matrix.num_rows / (kItemsPerThread * num_threads) / kRowGranule * kRowGranule;
    return std::clamp(rows, kRowGranule, kMostRows);
}

Index RowPass::num_chunks(const Matrix &matrix, Index chunk_rows) { return ceil_div(matrix.num_rows, chunk_rows); }

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
      sum_stride_(chunk_ + 64 / static_cast<Index>(sizeof(float))),
      num_blocks_(ceil_div(matrix.num_tokens, products_.width)),
      block_stride_(spread_over_sets(products_.block_bytes(matrix.depth))) {
    const Index num_sums = std::min(kTokenBlock, matrix.num_tokens) * sum_stride_;
    arena.reserve(Arena::padded<char>(num_blocks_ * block_stride_) + Arena::padded<const void *>(num_blocks_) +
                  Arena::padded_own<float>(num_threads, num_sums) + extra_bytes);
    packed_ = arena.carve<char>(num_blocks_ * block_stride_);
    blocks_ = arena.carve<const void *>(num_blocks_);
    sums_ = arena.carve_own<float>(num_threads, num_sums);
    for (Index block = 0; block < num_blocks_; block++) blocks_[block] = packed_ + block * block_stride_;
    pack_.fill(num_blocks_);
    chunks_.fill(num_chunks_);
}

int RowPass::useful_threads() const {
    const Index bytes = matrix_.num_rows * matrix_.row_bytes;
    return static_cast<int>(std::min<Index>(num_threads_, 1 + bytes / kBytesPerThread));
}

void RowPass::run(int worker) {
    const auto features = [this](Index token) {
        return static_cast<const char *>(matrix_.x) + token * matrix_.depth * matrix_.element;
    };
    drain(pack_, worker, [&](Index block, Index) {
        pack_block(products_, block * products_.width, matrix_.num_tokens, matrix_.depth, 0, matrix_.depth,
                   packed_ + block * block_stride_, features);
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
    const Index whole = in_panels_ ? ceil_div(count, kPanelRows) * kPanelRows : count;
    const Index then = (next_chunk >= 0 ? next_chunk : chunk) * chunk_;
    for (Index m = 0; m < matrix_.num_tokens; m += kTokenBlock) {
        const Index num_tokens = std::min(kTokenBlock, matrix_.num_tokens - m);
        for (Index row = 0; row < whole; row += piece_) {
            const Rows next = rows(row + piece_ < whole ? first + row + piece_ : then);
            products_.multiply(rows(first + row), std::min(piece_, whole - row), matrix_.depth,
                               blocks_ + m / products_.width, num_tokens, out + row, sum_stride_,
                               m == 0 ? next : kNothing);
        }
        take({chunk, first, count, m, num_tokens, out, sum_stride_});
    }
}

Linear::Linear(const Matrix &matrix, void *y, const PassKernels &kernels, Arena &arena, int num_threads)
    : RowPass(matrix, kernels, arena, num_threads, balanced_rows(matrix, num_threads), 0), y_(y) {}

void Linear::take(const Sums &sums) {
    for (Index m = 0; m < sums.num_tokens; m++) {
        const Index at = (sums.first_token + m) * matrix_.num_rows + sums.first_row;
        floats_.round(sums.out + m * sums.stride, sums.num_rows, static_cast<char *>(y_) + at * matrix_.element);
    }
}

Head::Head(const Matrix &matrix, const Choice &choice, const PassKernels &kernels, Arena &arena, int num_threads)
    : RowPass(matrix, kernels, arena, num_threads, kMostRows,
              Arena::padded<Best>(matrix.num_tokens * num_chunks(matrix, kMostRows))),
      choice_(choice) {
    bests_ = arena.carve<Best>(matrix.num_tokens * num_chunks_);
    merge_.fill(matrix.num_tokens);
}

// Rows that are left out never win and weigh nothing; a logit that is not finite stays, for it must still be told.
void Head::exclude(const Sums &sums) const {
    for (Index i = 0; i < choice_.num_excluded; i++) {
        const Index row = choice_.excluded[i] - sums.first_row;
        if (row < 0 || row >= sums.num_rows) continue;
        for (Index m = 0; m < sums.num_tokens; m++) {
            float &logit = sums.out[m * sums.stride + row];
            if (std::isfinite(logit)) logit = kExcluded;
        }
    }
}

void Head::take(const Sums &sums) {
    exclude(sums);
    for (Index m = 0; m < sums.num_tokens; m++) {
        Best best = floats_.choose(sums.out + m * sums.stride, sums.num_rows);
        best.index += static_cast<int>(sums.first_row);
        bests_[(sums.first_token + m) * num_chunks_ + sums.chunk] = best;
    }
}

void Head::finish(int worker) {
    drain(merge_, worker, [this](Index token, Index) { merge(token); });
}

void Head::merge(Index token) {
    const Best *bests = bests_ + token * num_chunks_;
    Best best = bests[0];
    for (Index chunk = 1; chunk < num_chunks_; chunk++) {
        if (bests[chunk].logit > best.logit) best = bests[chunk];
    }
    double sum = 0.0;
    for (Index chunk = 0; chunk < num_chunks_; chunk++) {
        sum += static_cast<double>(bests[chunk].sum * std::exp(bests[chunk].logit - best.logit));
    }
    choice_.ids[token] = best.index;
    choice_.probabilities[token] = static_cast<float>(1.0 / sum);
}

}  // namespace expertshare
