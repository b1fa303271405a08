// Products of all rows of a matrix with all tokens: a dense projection without bias, and the head, which keeps the best
// token and its probability without a logit in memory.
#pragma once

#include <algorithm>
#include <cmath>

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
    int useful_threads() const {
        const Index bytes = matrix_.num_rows * matrix_.row_bytes;
        return static_cast<int>(std::min<Index>(num_threads_, 1 + bytes / kBytesPerThread));
    }

    void run(int worker) override {
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

   protected:
    static constexpr Index kMostRows = 256;

    // `chunk_rows` is a multiple of 32, at most kMostRows. Throws std::bad_alloc.
    RowPass(const Matrix &matrix, const PassKernels &kernels, Arena &arena, int num_threads, Index chunk_rows,
            Index num_bests)
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
        arena.lay_out([&] {
            packed_ = arena.carve<char>(num_blocks_ * block_stride_);
            blocks_ = arena.carve<const void *>(num_blocks_);
            sums_ = arena.carve_own<float>(num_threads, num_sums);
            bests_ = arena.carve<Best>(num_bests);
        });
        for (Index block = 0; block < num_blocks_; block++) blocks_[block] = packed_ + block * block_stride_;
        pack_.fill(num_blocks_);
        chunks_.fill(num_chunks_);
    }

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
    static Index balanced_rows(const Matrix &matrix, int num_threads) {
        const Index rows = matrix.num_rows / (kItemsPerThread * num_threads) / kRowGranule * kRowGranule;
        return std::clamp(rows, kRowGranule, kMostRows);
    }

    static Index num_chunks(const Matrix &matrix, Index chunk_rows) { return ceil_div(matrix.num_rows, chunk_rows); }

    const Matrix matrix_;
    const Kernels &floats_;
    const Index chunk_, num_chunks_, piece_;
    Best *bests_ = nullptr;  // num_bests, for the derived class

   private:
    static constexpr Index kPieceBytes = 128 << 10;  // two of them and the tokens fit the second cache
    static constexpr Index kRowGranule = 32;  // a multiple of every tile: the same rows are the odd ones for all
    static constexpr Index kItemsPerThread = 8;
    static constexpr Index kBytesPerThread = 128 << 10;  // less than this is not worth waking one more thread

    void pass(int worker, Index chunk, Index next_chunk) {
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

    Index num_rows(Index chunk) const { return std::min(chunk_, matrix_.num_rows - chunk * chunk_); }
    Rows rows(Index row) const {
        const Rows &w = matrix_.w;
        return {w.codes + row * matrix_.row_bytes, w.scales == nullptr ? nullptr : w.scales + row * matrix_.scale_bytes,
                nullptr};
    }

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
    Linear(const Matrix &matrix, void *y, const PassKernels &kernels, Arena &arena, int num_threads)
        : RowPass(matrix, kernels, arena, num_threads, balanced_rows(matrix, num_threads), 0), y_(y) {}

   private:
    void take(const Sums &sums) override {
        for (Index m = 0; m < sums.num_tokens; m++) {
            const Index at = (sums.first_token + m) * matrix_.num_rows + sums.first_row;
            floats_.round(sums.out + m * sums.stride, sums.num_rows, static_cast<char *>(y_) + at * matrix_.element);
        }
    }
    void finish(int) override {}

    void *y_;
};

// What a chunk of the vocabulary says of a token is kept and merged in the order of chunks, which are the same for any
// number of threads or tokens: so is the result.
class Head final : public RowPass {
   public:
    // The fields of es_projection of these names.
    struct Choice {
        const int64_t *excluded;
        Index num_excluded;
        int64_t *ids;
        float *probabilities;
    };
    Head(const Matrix &matrix, const Choice &choice, const PassKernels &kernels, Arena &arena, int num_threads)
        : RowPass(matrix, kernels, arena, num_threads, kMostRows,
                  matrix.num_tokens * num_chunks(matrix, kMostRows)),
          choice_(choice) {
        merge_.fill(matrix.num_tokens);
    }

   private:
    void take(const Sums &sums) override {
        exclude(sums);
        for (Index m = 0; m < sums.num_tokens; m++) {
            Best best = floats_.choose(sums.out + m * sums.stride, sums.num_rows);
            best.index += static_cast<int>(sums.first_row);
            bests_[(sums.first_token + m) * num_chunks_ + sums.chunk] = best;
        }
    }

    void finish(int worker) override {
        drain(merge_, worker, [this](Index token, Index) { merge(token); });
    }

    // Rows that are left out never win and weigh nothing; a logit that is not finite stays, for the caller has to see
    // it.
    void exclude(const Sums &sums) const {
        for (Index i = 0; i < choice_.num_excluded; i++) {
            const Index row = choice_.excluded[i] - sums.first_row;
            if (row < 0 || row >= sums.num_rows) continue;
            for (Index m = 0; m < sums.num_tokens; m++) {
                float &logit = sums.out[m * sums.stride + row];
                if (std::isfinite(logit)) logit = kExcluded;
            }
        }
    }

    void merge(Index token) {
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

    const Choice choice_;
    Queue merge_;
};

}  // namespace expertshare
