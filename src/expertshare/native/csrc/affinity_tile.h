// The gate's arithmetic over a vector type V: kLanes, load, splat, zero, fma, add, store; kRows rows at a time against
// a block of two vectors of tokens. Everything has internal linkage, as in tile.h.
//
// A feature of W is spread over a vector and multiplied with two vectors of tokens: no sums across lanes, and the tokens,
// which lie in the second cache, are read once for every kRows experts. Each sum is taken in strips of kStrip features,
// whose sums are added up in order: 2048 terms in one chain would round more than torch's product does.
#pragma once

#include <cmath>

#include "activation.h"
#include "affinity_kernels.h"

namespace {

using expertshare::GateRows;
using expertshare::Index;

constexpr Index kStrip = 256;

template <int N>
struct Count {
    static constexpr int value = N;
};

constexpr Index kLineBytes = 64;

// As much of the rows that follow as is read now, front to back: rows lie behind each other, and memory likes order.
// `offset`: bytes into a row.
inline void fetch_lines(const void *next, Index num_rows, Index offset) {
    if (next == nullptr) return;
    const char *from = static_cast<const char *>(next) + offset * num_rows;
    for (Index r = 0; r < num_rows; r++) __builtin_prefetch(from + r * kLineBytes, 0, 3);
}

// What a strip adds to the logits of its rows.
template <class V, int Rows, int Halves>
inline void add_strip(const typename V::Vector (&sums)[Rows][Halves], bool is_first, float *logits) {
    for (int r = 0; r < Rows; r++) {
        for (int half = 0; half < Halves; half++) {
            float *to = logits + (2 * r + half) * V::kLanes;
            V::store(to, is_first ? sums[r][half] : V::add(V::load(to), sums[r][half]));
        }
    }
}

template <class V, int Rows, int Halves, class Weight>
void multiply_rows(const Weight *w, Index depth, const float *packed, float *logits, const void *next) {
    constexpr Index kWidth = 2 * V::kLanes, kLine = kLineBytes / static_cast<Index>(sizeof(Weight));
    for (Index begin = 0; begin < depth; begin += kStrip) {
        const Index end = begin + kStrip < depth ? begin + kStrip : depth;
        typename V::Vector sums[Rows][Halves];
        for (int r = 0; r < Rows; r++) {
            for (int half = 0; half < Halves; half++) sums[r][half] = V::zero();
        }
        for (Index line = begin; line < end; line += kLine) {
            fetch_lines(next, Rows, line * static_cast<Index>(sizeof(Weight)));
            const Index stop = line + kLine < end ? line + kLine : end;
            for (Index i = line; i < stop; i++) {
                typename V::Vector x[Halves];
                for (int half = 0; half < Halves; half++) x[half] = V::load(packed + i * kWidth + half * V::kLanes);
                for (int r = 0; r < Rows; r++) {
                    const typename V::Vector spread = V::splat(load(w[r * depth + i]));
                    for (int half = 0; half < Halves; half++) sums[r][half] = V::fma(spread, x[half], sums[r][half]);
                }
            }
        }
        add_strip<V, Rows, Halves>(sums, begin == 0, logits);
    }
}

// `tile(rows, halves)` for whole blocks, row by row for the last ones; one vector is enough for few tokens.
template <class V, class Tile>
void in_tiles(Index num_rows, Index num_tokens, Tile tile) {
    const auto of_height = [&](auto rows, Index first) {
        if (num_tokens <= V::kLanes) return tile(rows, Count<1>{}, first);
        tile(rows, Count<2>{}, first);
    };
    if (num_rows == V::kRows) return of_height(Count<V::kRows>{}, 0);
    for (Index r = 0; r < num_rows; r++) of_height(Count<1>{}, r);
}

template <class V, class Weight>
void multiply_all(const Weight *w, Index num_rows, Index depth, const float *packed, Index num_tokens, float *logits,
                  const void *next) {
    in_tiles<V>(num_rows, num_tokens, [&](auto rows, auto halves, Index first) {
        constexpr int kRows = decltype(rows)::value, kHalves = decltype(halves)::value;
        multiply_rows<V, kRows, kHalves>(w + first * depth, depth, packed, logits + first * 2 * V::kLanes,
                                         kRows == 1 ? nullptr : next);
    });
}

template <class V>
void multiply(const GateRows &w, Index num_rows, Index depth, const float *packed, bool /*is_bfloat16*/,
              Index num_tokens, float *logits) {
    if (w.is_bfloat16) {
        return multiply_all<V>(static_cast<const std::uint16_t *>(w.at), num_rows, depth, packed, num_tokens, logits,
                               w.next);
    }
    multiply_all<V>(static_cast<const float *>(w.at), num_rows, depth, packed, num_tokens, logits, w.next);
}

template <class V, class Feature>
void pack_of(const Feature *x, Index num_tokens, Index depth, Index begin, Index end, float *packed) {
    constexpr Index kWidth = 2 * V::kLanes;
    Index i = begin;
    for (; i + V::kLanes <= end; i += V::kLanes) {
        for (Index from = 0; from < kWidth; from += V::kLanes) {
            typename V::Vector square[V::kLanes];
            for (Index t = 0; t < V::kLanes; t++) {
                square[t] = from + t < num_tokens ? V::widen_all(x + (from + t) * depth + i) : V::zero();
            }
            V::transpose(square);
            for (Index k = 0; k < V::kLanes; k++) V::store(packed + (i + k) * kWidth + from, square[k]);
        }
    }
    for (; i < end; i++) {
        for (Index t = 0; t < kWidth; t++) packed[i * kWidth + t] = t < num_tokens ? load(x[t * depth + i]) : 0.0f;
    }
}

template <class V>
void pack(const void *x, bool is_bfloat16, Index num_tokens, Index depth, Index begin, Index end, float *packed) {
    if (is_bfloat16) return pack_of<V>(static_cast<const std::uint16_t *>(x), num_tokens, depth, begin, end, packed);
    pack_of<V>(static_cast<const float *>(x), num_tokens, depth, begin, end, packed);
}

inline float clamped(float x) {  // a NaN passes both comparisons
    x = x > 87.0f ? 87.0f : x;
    return x < -87.0f ? -87.0f : x;
}

inline void softmax(float *row, Index count) {
    constexpr Index kSums = 16;
    float most = row[0];
    for (Index e = 1; e < count; e++) most = most < row[e] ? row[e] : most;
    float sums[kSums] = {};
    const Index whole = count / kSums * kSums;
    for (Index e = 0; e < count; e++) row[e] = exp_clamped(clamped(row[e] - most));
    for (Index e = 0; e < whole; e += kSums) {
        for (Index i = 0; i < kSums; i++) sums[i] += row[e + i];
    }
    for (Index e = whole; e < count; e++) sums[0] += row[e];
    float total = 0.0f;
    for (Index i = 0; i < kSums; i++) total += sums[i];
    for (Index e = 0; e < count; e++) row[e] /= total;
}

template <class V>
void finish(const float *logits, Index num_experts, bool is_softmax, const float *bias, float *affinity,
            float *choice) {
    for (Index e = 0; e < num_experts; e++) affinity[e] = logits[e * 2 * V::kLanes];
    if (is_softmax) {
        softmax(affinity, num_experts);
    } else {
        for (Index e = 0; e < num_experts; e++) affinity[e] = 1.0f / (1.0f + exp_clamped(clamped(-affinity[e])));
    }
    if (choice == nullptr) return;
    for (Index e = 0; e < num_experts; e++) choice[e] = affinity[e] + bias[e];
}

template <class V>
constexpr expertshare::AffinityKernels affinity_kernels_of() {
    return {2 * V::kLanes, V::kRows, pack<V>, multiply<V>, finish<V>};
}

}  // namespace
