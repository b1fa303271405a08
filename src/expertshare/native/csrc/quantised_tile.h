// Rows of quantised weights dotted with quantised tokens, 4 x M at a time in registers: codes are unpacked once for M
// tokens, and every cache line of them comes from memory once.
//
// Of each span of 128 features the products are summed as integers, in 16 lanes, and then become floats: times the
// weights' scale, and fused times the tokens' scale into the sums. Since integers are exact and the order of floats is
// fixed, every instruction set gets the same bits.
//
// A vector type V gives: Ints and Floats of 16 lanes, zero(), load(ints), floats(ints), multiply(a, b), fma(a, b, acc),
// all(float), lanes(floats); Codes, codes<bits>(bytes of a span), dot<bits>(ints, codes, tokens' codes), zero_of(bits);
// spread<group>(float16 scales of a span): each in the lanes of its group; sum4; kMaxTokens.
#pragma once

#include <algorithm>
#include <type_traits>

#include "quantised_span.h"

namespace {

using expertshare::Rows;

constexpr Index kLineBytes = 64;
constexpr Index kBlockRows = 4;
constexpr Index kFetchAheadBytes = 16384;  // 4 to 128 KiB do as well

// What to fetch while computing, block by block, spread over its spans as in tile.h.
struct Ahead {
    Rows from;
    Index lines_per_span, scale_lines;  // of codes; of scales, at the beginning of a block
};
constexpr Ahead kNothingAhead = {{nullptr, nullptr, nullptr}, 0, 0};

inline void fetch(const char *line, Index num_lines) {
    for (Index i = 0; i < num_lines; i++) __builtin_prefetch(line + i * kLineBytes, 0, 3);
}

struct Strides {
    Index codes, scales;  // bytes from one row to the next
};

template <class V, class F, int R, int M>
inline __attribute__((always_inline)) void add_span(typename V::Floats (&acc)[M][R], const Rows &w, Strides strides,
                                                    const Span *const *tokens, Index span) {
    constexpr int kScaleBytes = F::kGroup == 0 ? 0 : static_cast<int>(kSpan) / (F::kGroup == 0 ? 1 : F::kGroup) * 2;
    for (int r = 0; r < R; r++) {
        const typename V::Codes codes = V::template codes<F::kBits>(w.codes + r * strides.codes);
        [[maybe_unused]] typename V::Floats scale, minimum;
        if constexpr (kScaleBytes != 0) scale = V::template spread<F::kGroup>(w.scales + r * strides.scales);
        if constexpr (F::kMinima) minimum = V::template spread<F::kGroup>(w.minima + r * strides.scales);
        for (int m = 0; m < M; m++) {
            const Span &token = tokens[m][span];
            const typename V::Ints start = F::kMinima ? V::zero() : V::load(token.start);
            typename V::Floats sums = V::floats(V::template dot<F::kBits>(start, codes, token.codes));
            if constexpr (kScaleBytes != 0) sums = V::multiply(sums, scale);
            acc[m][r] = V::fma(sums, V::all(token.scale), acc[m][r]);
            if constexpr (F::kMinima) acc[m][r] = V::fma(minimum, V::lanes(token.sums), acc[m][r]);
        }
    }
}

// The last span of R rows, filled up with zeros, and where it lies.
template <class F, int R>
struct Tail {
    static constexpr Index kScales = F::kGroup == 0 ? 1 : kSpan / (F::kGroup == 0 ? 1 : F::kGroup);
    char codes[R][kSpan * F::kBits / 8] = {};
    char scales[R][kScales * 2] = {};
    char minima[R][kScales * 2] = {};

    Tail(const Rows &w, Strides strides, Index features) {
        for (int r = 0; r < R; r++) {
            std::memcpy(codes[r], w.codes + r * strides.codes, static_cast<std::size_t>(F::row_bytes(features)));
            if constexpr (F::kGroup == 0) continue;
            const std::size_t bytes = static_cast<std::size_t>(F::scale_bytes(features));
            std::memcpy(scales[r], w.scales + r * strides.scales, bytes);
            if constexpr (F::kMinima) std::memcpy(minima[r], w.minima + r * strides.scales, bytes);
        }
    }
    Rows rows() const { return {codes[0], scales[0], minima[0]}; }
    static Strides strides() { return {sizeof codes[0], sizeof scales[0]}; }
};

inline Rows skip(const Rows &w, Strides strides, Index num_rows) {
    const auto at = [num_rows](const char *from, Index stride) {
        return from == nullptr ? nullptr : from + num_rows * stride;
    };
    return {at(w.codes, strides.codes), at(w.scales, strides.scales), at(w.minima, strides.scales)};
}

template <class V, class F, int R, int M>
inline __attribute__((always_inline)) void store_sums(const typename V::Floats (&acc)[M][R], const char *row_scales,
                                                      float *out, Index out_stride) {
    for (int m = 0; m < M; m++) {
        float sums[4];
        float *to = R == 4 ? out + m * out_stride : sums;
        V::sum4(acc[m][0], acc[m][R > 1 ? 1 : 0], acc[m][R > 2 ? 2 : 0], acc[m][R > 3 ? 3 : 0], to);
        if constexpr (F::kGroup == 0) {
            for (int r = 0; r < R; r++) {
                float scale;
                std::memcpy(&scale, row_scales + r * sizeof scale, sizeof scale);
                to[r] *= scale;
            }
        }
        if constexpr (R != 4) std::memcpy(out + m * out_stride, sums, R * sizeof(float));
    }
}

// Blocks of R rows, one after the other, for M tokens.
template <class V, class F, int R, int M>
void quantised_blocks(const Rows &from, Index num_blocks, Index depth, const void *const *x, float *out,
                      Index out_stride, const Ahead &fetched) {
    const Span *tokens[M];
    for (int m = 0; m < M; m++) tokens[m] = static_cast<const Span *>(x[m]);
    const Strides strides = {F::row_bytes(depth), F::scale_bytes(depth)};
    const Index whole = depth / kSpan;
    for (Index b = 0; b < num_blocks; b++, out += R) {
        Rows w = skip(from, strides, b * R);
        const Rows then = skip(fetched.from, strides, b * R);
        fetch(then.scales, fetched.scale_lines);
        if constexpr (F::kMinima) fetch(then.minima, fetched.scale_lines);
        typename V::Floats acc[M][R];
        for (int m = 0; m < M; m++) {
            for (int r = 0; r < R; r++) acc[m][r] = V::all(0.0f);
        }
        const char *row_scales = w.scales;
        for (Index span = 0; span < whole; span++) {
            fetch(then.codes + span * fetched.lines_per_span * kLineBytes, fetched.lines_per_span);
            add_span<V, F, R, M>(acc, w, strides, tokens, span);
            w.codes += F::row_bytes(kSpan);
            if constexpr (F::kGroup != 0) w.scales += F::scale_bytes(kSpan);
            if constexpr (F::kMinima) w.minima += F::scale_bytes(kSpan);
        }
        if (depth % kSpan != 0) {
            const Tail<F, R> tail(w, strides, depth % kSpan);
            add_span<V, F, R, M>(acc, tail.rows(), tail.strides(), tokens, whole);
        }
        store_sums<V, F, R, M>(acc, row_scales, out, out_stride);
    }
}

using Blocks = void (*)(const Rows &from, Index num_blocks, Index depth, const void *const *x, float *out,
                        Index out_stride, const Ahead &fetched);

template <class V, class F, int R, int M = V::kMaxTokens>
Blocks blocks_for(Index num_tokens) {
    if constexpr (M > 1) {
        if (num_tokens < M) return blocks_for<V, F, R, M - 1>(num_tokens);
    }
    return quantised_blocks<V, F, R, M>;
}

// Of many tokens several tiles, as evenly divided as it goes, meet each block: only the first meets it in memory.
template <class V, class F, int R>
void blocks_of_tiles(const Rows &w, Index num_blocks, Index depth, const void *const *x, Index num_tokens, float *out,
                     Index out_stride, const Ahead &ahead) {
    const Index num_tiles = (num_tokens + V::kMaxTokens - 1) / V::kMaxTokens;
    if (num_tiles == 1) return blocks_for<V, F, R>(num_tokens)(w, num_blocks, depth, x, out, out_stride, ahead);
    const Strides strides = {F::row_bytes(depth), F::scale_bytes(depth)};
    for (Index b = 0; b < num_blocks; b++) {
        Ahead part = {skip(ahead.from, strides, b * R), (ahead.lines_per_span + num_tiles - 1) / num_tiles,
                      ahead.scale_lines};
        for (Index i = 0; i < num_tiles; i++) {
            const Index first = num_tokens * i / num_tiles, size = num_tokens * (i + 1) / num_tiles - first;
            blocks_for<V, F, R>(size)(skip(w, strides, b * R), 1, depth, x + first,
                                      out + first * out_stride + b * R, out_stride, part);
            if (part.from.codes != nullptr) part.from.codes += depth / kSpan * part.lines_per_span * kLineBytes;
            part.scale_lines = 0;
        }
    }
}

inline Index lines_of(Index bytes) { return (bytes + kLineBytes - 1) / kLineBytes; }

// All blocks but the last few fetch what follows within these rows; those fetch the beginning of the next.
template <class V, class F>
void quantised_rows(const Rows &w, Index num_rows, Index depth, const void *const *x, Index num_tokens, float *out,
                    Index out_stride, const Rows &next) {
    const Strides strides = {F::row_bytes(depth), F::scale_bytes(depth)};
    const Index num_blocks = num_rows / kBlockRows, block_bytes = kBlockRows * strides.codes;
    const Index distance = std::min(num_blocks, (kFetchAheadBytes + block_bytes - 1) / block_bytes);
    const Index near = num_blocks - distance;
    Ahead here = kNothingAhead, there = kNothingAhead;
    if (next.codes != nullptr) {
        const Index lines = (lines_of(block_bytes) + num_spans(depth) - 1) / num_spans(depth);
        const Index scale_lines = lines_of(kBlockRows * strides.scales);
        here = {skip(w, strides, distance * kBlockRows), lines, scale_lines};
        there = {next, lines, scale_lines};
    }
    const auto run = [&](auto rows, Index first, Index count, const Ahead &ahead) {
        constexpr int R = decltype(rows)::value;
        blocks_of_tiles<V, F, R>(skip(w, strides, first), count, depth, x, num_tokens, out + first, out_stride, ahead);
    };
    run(std::integral_constant<int, kBlockRows>{}, 0, near, here);
    run(std::integral_constant<int, kBlockRows>{}, near * kBlockRows, distance, there);
    run(std::integral_constant<int, 1>{}, num_blocks * kBlockRows, num_rows - num_blocks * kBlockRows, kNothingAhead);
}

template <class V, class F, class Token>
constexpr expertshare::Kernels quantised_kernels_of() {
    return {kSpan,          span_row_bytes, encode_spans<V, F, Token>, quantised_rows<V, F>, 0, nullptr,
            swiglu_spans<V, F>, mix<MixedInto<Token>>, nullptr, nullptr, nullptr};
}

// In the order of expertshare::Format.
#define EXPERTSHARE_BOTH_TOKENS(V, F) quantised_kernels_of<V, F, float>(), quantised_kernels_of<V, F, std::uint16_t>()
#define EXPERTSHARE_QUANTISED_KERNELS(V)                                                                   \
    {                                                                                                      \
        EXPERTSHARE_BOTH_TOKENS(V, Int8), EXPERTSHARE_BOTH_TOKENS(V, Int4By32),                            \
            EXPERTSHARE_BOTH_TOKENS(V, Int4By64), EXPERTSHARE_BOTH_TOKENS(V, Int4By32Minima),              \
            EXPERTSHARE_BOTH_TOKENS(V, Int4By64Minima)                                                     \
    }

using Int8 = Format<8, 0, false>;
using Int4By32 = Format<4, 32, false>;
using Int4By64 = Format<4, 64, false>;
using Int4By32Minima = Format<4, 32, true>;
using Int4By64Minima = Format<4, 64, true>;

}  // namespace
