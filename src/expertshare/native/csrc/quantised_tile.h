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

#include "quantised_span.h"

namespace {

using expertshare::Rows;

constexpr Index kLineBytes = 64;
constexpr Index kBlockRows = 4;
constexpr Index kFetchAheadBytes = 16384;  // as in tile.h

struct Fetch {
    const char *line;
    Index left;  // lines; spread over the tiles of a block as in tile.h
};

inline void fetch(Fetch &ahead, Index num_lines) {
    const Index n = num_lines < ahead.left ? num_lines : ahead.left;
    for (Index i = 0; i < n; i++) __builtin_prefetch(ahead.line + i * kLineBytes, 0, 3);
    ahead.line += n * kLineBytes;
    ahead.left -= n;
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

template <class V, class F, int R, int M>
void quantised_tile(Rows w, Index depth, const void *const *x, float *out, Index out_stride, Fetch &ahead,
                    Index tiles_left) {
    typename V::Floats acc[M][R];
    const Span *tokens[M];
    for (int m = 0; m < M; m++) {
        tokens[m] = static_cast<const Span *>(x[m]);
        for (int r = 0; r < R; r++) acc[m][r] = V::all(0.0f);
    }
    const Strides strides = {F::row_bytes(depth), F::scale_bytes(depth)};
    const Index whole = depth / kSpan, steps = num_spans(depth) * tiles_left;
    const Index lines = (ahead.left + steps - 1) / steps;
    const char *row_scales = w.scales;
    for (Index span = 0; span < whole; span++) {
        if (lines > 0) fetch(ahead, lines);
        add_span<V, F, R, M>(acc, w, strides, tokens, span);
        w.codes += F::row_bytes(kSpan);
        if constexpr (F::kGroup != 0) w.scales += F::scale_bytes(kSpan);
        if constexpr (F::kMinima) w.minima += F::scale_bytes(kSpan);
    }
    if (depth % kSpan != 0) {
        const Tail<F, R> tail(w, strides, depth % kSpan);
        add_span<V, F, R, M>(acc, tail.rows(), tail.strides(), tokens, whole);
    }
    for (int m = 0; m < M; m++) {
        float sums[4];
        V::sum4(acc[m][0], acc[m][R > 1 ? 1 : 0], acc[m][R > 2 ? 2 : 0], acc[m][R > 3 ? 3 : 0], sums);
        for (int r = 0; r < R; r++) {
            float scale = 1.0f;
            if constexpr (F::kGroup == 0) std::memcpy(&scale, row_scales + r * strides.scales, sizeof scale);
            out[m * out_stride + r] = sums[r] * scale;
        }
    }
}

template <class V, class F, int R, int M>
void quantised_tile_of(Index num_tokens, const Rows &w, Index depth, const void *const *x, float *out,
                       Index out_stride, Fetch &ahead, Index tiles_left) {
    if constexpr (M > 1) {
        if (num_tokens < M) {
            return quantised_tile_of<V, F, R, M - 1>(num_tokens, w, depth, x, out, out_stride, ahead, tiles_left);
        }
    }
    quantised_tile<V, F, R, M>(w, depth, x, out, out_stride, ahead, tiles_left);
}

// R rows for all tokens; only the first tile meets them in memory, the others in the cache.
template <class V, class F, int R, int M>
void quantised_block(const Rows &w, Index depth, const void *const *x, Index num_tokens, float *out, Index out_stride,
                     Fetch ahead) {
    const Index num_tiles = (num_tokens + M - 1) / M;
    for (Index i = 0; i < num_tiles; i++) {
        const Index from = num_tokens * i / num_tiles, to = num_tokens * (i + 1) / num_tiles;
        quantised_tile_of<V, F, R, M>(to - from, w, depth, x + from, out + from * out_stride, out_stride, ahead,
                                      num_tiles - i);
    }
}

inline Rows skip(const Rows &w, Strides strides, Index num_rows) {
    const auto at = [num_rows](const char *from, Index stride) {
        return from == nullptr ? nullptr : from + num_rows * stride;
    };
    return {at(w.codes, strides.codes), at(w.scales, strides.scales), at(w.minima, strides.scales)};
}

inline Index lines_of(Index bytes) { return (bytes + kLineBytes - 1) / kLineBytes; }

template <class V, class F>
void quantised_rows(const Rows &w, Index num_rows, Index depth, const void *const *x, Index num_tokens, float *out,
                    Index out_stride, const Rows &next) {
    const Strides strides = {F::row_bytes(depth), F::scale_bytes(depth)};
    const Index code_bytes = kBlockRows * strides.codes, scale_bytes = kBlockRows * strides.scales;
    const Index distance = (kFetchAheadBytes + code_bytes - 1) / code_bytes;
    const Index num_blocks = num_rows / kBlockRows;
    for (Index b = 0; b < num_blocks; b++) {
        Fetch ahead = {nullptr, 0};
        if (next.codes != nullptr) {
            const Index later = b + distance - num_blocks;
            const Rows then = later < 0 ? skip(w, strides, (b + distance) * kBlockRows)
                                        : skip(next, strides, later * kBlockRows);
            ahead = {then.codes, lines_of(code_bytes)};
            Fetch scales = {then.scales, lines_of(scale_bytes)}, minima = {then.minima, lines_of(scale_bytes)};
            fetch(scales, scales.left);
            if constexpr (F::kMinima) fetch(minima, minima.left);
        }
        quantised_block<V, F, kBlockRows, V::kMaxTokens>(skip(w, strides, b * kBlockRows), depth, x, num_tokens,
                                                         out + b * kBlockRows, out_stride, ahead);
    }
    for (Index r = num_blocks * kBlockRows; r < num_rows; r++) {
        quantised_block<V, F, 1, 1>(skip(w, strides, r), depth, x, num_tokens, out + r, out_stride, Fetch{nullptr, 0});
    }
}

template <class V, class F, class Token>
constexpr expertshare::Kernels quantised_kernels_of() {
    return {kSpan,          span_row_bytes, encode_spans<V, F, Token>, quantised_rows<V, F>, swiglu_spans<V, F>,
            mix<MixedInto<Token>>};
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
