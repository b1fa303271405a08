// int8 rows dotted with quantised tokens, lanes along rows: 64 rows of a span of 128 features are rearranged once, four
// features of each row side by side, as experts lie in memory already (panel_tile.h), and then meet all tokens.
//
// Every sum is: of each span the exact integer, as a float, fused times the token's scale into the sum of the spans
// before it; at the end times the row's scale. The same bits with every instruction set.
//
// A vector type V gives, for kRows rows at a time: Ints, Weights, all(int), weights(packed), dot(ints, weights,
// token(codes)), accumulate(ints, scale, sums in memory); zero_of(bits), pack(rows of a span, packed), kMaxTokens.
#pragma once

#include "packed_kernels.h"
#include "quantised_span.h"

namespace {

using expertshare::kPackedRows;
using expertshare::PackedRows;

using RowCodes = Format<8, 0, false>;
constexpr Index kQuads = kSpan / 4, kQuadBytes = kPackedRows * 4;

// Four codes of each row side by side, by plain copies.
inline void pack_by_copies(const char *const *rows, char *packed) {
    for (Index r = 0; r < kPackedRows; r++) {
        for (Index q = 0; q < kQuads; q++) std::memcpy(packed + q * kQuadBytes + r * 4, rows[r] + q * 4, 4);
    }
}

template <class V, int M>
inline __attribute__((always_inline)) void add_quad(typename V::Ints (&sums)[M], const char *packed,
                                                    const Span *const *tokens, Index quad) {
    const typename V::Weights w = V::weights(packed);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[m] = V::dot(sums[m], w, V::token(tokens[m]->codes + quad * 4));
}

template <class V, int M>
void packed_tokens(const char *packed, const Span *const *tokens, float *out, Index out_stride) {
    for (Index first = 0; first < kPackedRows; first += V::kRows) {
        typename V::Ints sums[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) sums[m] = V::all(tokens[m]->start[0]);
        for (Index q = 0; q < kQuads; q++) add_quad<V, M>(sums, packed + q * kQuadBytes + first * 4, tokens, q);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) V::accumulate(sums[m], tokens[m]->scale, out + m * out_stride + first);
    }
}

template <class V, int M = V::kMaxTokens>
void some_tokens(Index count, const char *packed, const Span *const *tokens, float *out, Index out_stride) {
    if constexpr (M > 1) {
        if (count < M) return some_tokens<V, M - 1>(count, packed, tokens, out, out_stride);
    }
    packed_tokens<V, M>(packed, tokens, out, out_stride);
}

inline void fetch_lines(const char *from, Index first, Index last) {
    for (Index line = first; line < last; line++) __builtin_prefetch(from + line * 64, 0, 2);
}

template <class V>
void packed_rows(const PackedRows &w, Index depth, const void *const *x, Index num_tokens, float *out,
                 Index out_stride, char *scratch, const char *next, Index next_bytes) {
    const Index spans = num_spans(depth), lines = (next_bytes + 63) / 64;
    const Index num_tiles = (num_tokens + V::kMaxTokens - 1) / V::kMaxTokens;
    for (Index m = 0; m < num_tokens; m++) {
        for (Index r = 0; r < kPackedRows; r++) out[m * out_stride + r] = 0.0f;
    }
    char padded[kPackedRows][kSpan];
    for (Index s = 0; s < spans; s++) {
        const Index count = depth - s * kSpan < kSpan ? depth - s * kSpan : kSpan;
        const char *rows[kPackedRows];
        for (Index r = 0; r < kPackedRows; r++) {
            rows[r] = w.codes + (r < w.num_rows ? r : w.num_rows - 1) * depth + s * kSpan;
            if (count == kSpan) continue;
            std::memcpy(padded[r], rows[r], static_cast<std::size_t>(count));
            std::memset(padded[r] + count, 0, static_cast<std::size_t>(kSpan - count));
            rows[r] = padded[r];
        }
        V::pack(rows, scratch);
        for (Index tile = 0; tile < num_tiles; tile++) {
            const Index first = num_tokens * tile / num_tiles, size = num_tokens * (tile + 1) / num_tiles - first;
            const Index turn = s * num_tiles + tile, turns = spans * num_tiles;
            fetch_lines(next, lines * turn / turns, lines * (turn + 1) / turns);
            const Span *tokens[V::kMaxTokens];
            for (Index m = 0; m < size; m++) tokens[m] = static_cast<const Span *>(x[first + m]) + s;
            some_tokens<V>(size, scratch, tokens, out + first * out_stride, out_stride);
        }
    }
    alignas(64) float scales[kPackedRows] = {};
    std::memcpy(scales, w.scales, static_cast<std::size_t>(w.num_rows) * sizeof(float));
    for (Index m = 0; m < num_tokens; m++) {
        for (Index r = 0; r < kPackedRows; r++) out[m * out_stride + r] *= scales[r];
    }
}

template <class V>
constexpr expertshare::PackedKernels packed_kernels_of() {
    return {span_row_bytes, encode_spans<V, RowCodes, float>, encode_spans<V, RowCodes, std::uint16_t>, packed_rows<V>};
}

}  // namespace
