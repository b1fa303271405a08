#include "quantised_head.h"

#include <algorithm>

#include "chunk_bests.h"

namespace expertshare {
namespace {

constexpr Index kChunkRows = 256;
constexpr Index kLogitStride = kChunkRows + 16;  // of tokens: not a power of two
constexpr Index kBytesPerThread = 128 << 10;     // less than this is not worth waking one more thread

Index spread(Index bytes) { return (bytes + 63) / 64 * 64 + 64; }

}  // namespace

QuantisedHead::QuantisedHead(const es_quantised_head &head, const PackedKernels &packed, const Kernels &floats,
                             Arena &arena)
    : head_(head),
      packed_(packed),
      floats_(floats),
      num_chunks_((head.vocabulary + kChunkRows - 1) / kChunkRows),
      token_bytes_(head.is_bfloat16 ? 2 : 4),
      token_stride_(spread(packed.row_bytes(head.depth))) {
    const Index tokens = head.num_tokens, num_logits = head.num_threads * tokens * kLogitStride;
    const Index num_bests = head.logits == nullptr ? tokens * num_chunks_ : 0;
    arena.reserve(Arena::padded<char>(tokens * token_stride_) + Arena::padded<const void *>(tokens) +
                  Arena::padded<float>(num_logits) + Arena::padded<char>(head.num_threads * kPackedScratch) +
                  Arena::padded<Best>(num_bests));
    tokens_ = arena.carve<char>(tokens * token_stride_);
    x_ = arena.carve<const void *>(tokens);
    logits_ = arena.carve<float>(num_logits);
    scratch_ = arena.carve<char>(head.num_threads * kPackedScratch);
    bests_ = arena.carve<Best>(num_bests);
    for (Index token = 0; token < tokens; token++) x_[token] = tokens_ + token * token_stride_;
    encode_.fill(tokens);
    chunks_.fill(num_chunks_);
    merge_.fill(head.logits == nullptr ? tokens : 0);
}

int QuantisedHead::useful_threads() const {
    return static_cast<int>(
        std::min<Index>(head_.num_threads, 1 + head_.vocabulary * head_.depth / kBytesPerThread));
}

void QuantisedHead::run(int worker) {
    const auto encode = head_.is_bfloat16 ? packed_.encode_bfloat16 : packed_.encode_float32;
    drain(encode_, worker, [this, encode](Index token, Index) {
        encode(static_cast<const char *>(head_.x) + token * head_.depth * token_bytes_, head_.depth,
               tokens_ + token * token_stride_);
    });
    drain(chunks_, worker, [this, worker](Index chunk, Index next) { compute(worker, chunk, next); });
    drain(merge_, worker, [this](Index token, Index) {
        merge_bests(bests_ + token * num_chunks_, num_chunks_, head_.ids + token, head_.probabilities + token);
    });
}

Index QuantisedHead::rows_of(Index chunk) const { return std::min(kChunkRows, head_.vocabulary - chunk * kChunkRows); }

PackedRows QuantisedHead::block(Index first_row) const {
    return {static_cast<const char *>(head_.codes) + first_row * head_.depth,
            reinterpret_cast<const char *>(head_.scales + first_row),
            std::min(kPackedRows, head_.vocabulary - first_row)};
}

// Each block of rows fetches the one that this thread will compute next.
void QuantisedHead::compute(int worker, Index chunk, Index next_chunk) {
    float *logits = logits_ + worker * head_.num_tokens * kLogitStride;
    const Index first = chunk * kChunkRows, end = first + rows_of(chunk);
    for (Index row = first; row < end; row += kPackedRows) {
        const Index then = row + kPackedRows < end ? row + kPackedRows : next_chunk * kChunkRows;
        const PackedRows rows = block(row), next = then < 0 ? PackedRows{rows.codes, rows.scales, 0} : block(then);
        packed_.rows(rows, head_.depth, x_, head_.num_tokens, logits + (row - first), kLogitStride,
                     scratch_ + worker * kPackedScratch, next.codes, next.num_rows * head_.depth);
    }
    take(chunk, logits);
}

void QuantisedHead::take(Index chunk, float *logits) {
    const Index first = chunk * kChunkRows, count = rows_of(chunk);
    if (head_.logits == nullptr) {
        exclude_rows(head_.excluded, head_.num_excluded, {first, count, head_.num_tokens, logits, kLogitStride});
    }
    for (Index token = 0; token < head_.num_tokens; token++) {
        const float *of_token = logits + token * kLogitStride;
        if (head_.logits != nullptr) {
            const Index at = token * head_.vocabulary + first;
            floats_.round(of_token, count, static_cast<char *>(head_.logits) + at * token_bytes_);
            continue;
        }
        Best best = floats_.choose(of_token, count);
        best.index += static_cast<int>(first);
        bests_[token * num_chunks_ + chunk] = best;
    }
}

}  // namespace expertshare
