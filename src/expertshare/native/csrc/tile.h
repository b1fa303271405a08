// Rows of W dotted with token rows, R x M at a time in registers: every cache line of W comes from memory once.
//
// A vector type V gives: Weight, Act; kStep (features per step); Acc, zero(); Loaded, load(w), load_some(w, n) with
// zeros behind n; dot(acc, loaded, x); sum(acc); sum4(acc, acc, acc, acc, out); kMaxTokens (with 4 rows at a time) and
// kWideTokens (with 8); kHoldsRows: whether all R vectors of W stay in registers, or one at a time while x is reloaded.
// Everything has internal linkage: no file may end up with another instruction set's copy.
//
// In registers: R * M sums, R vectors of W, one of x. In fours rows share each load of x; with one or two tokens eights
// keep enough independent sums for the latency of the multiply-add (6 cycles, 2 a cycle, on Zen 5).
#pragma once

#include "activation.h"
#include "choice.h"
#include "kernels.h"

namespace {

constexpr Index kLine = 64;
template <int N>
struct Count {
    static constexpr int value = N;
};
// At 15 GB/s a microsecond, several times the latency of memory. Anything from 4 to 128 KiB, into the first or the
// second cache, does as well; without prefetching six tokens an expert take a third longer (Zen 5).
constexpr Index kAheadBytes = 16384;

// Steps over which prefetches are spread where there is less than a line or two to fetch in a step: a count for every
// single step would be too coarse then, and whole blocks would come in bursts. With more, step by step is faster: 6 % of
// an expert layer at 70 to 128 unique experts (docs/performance.md).
constexpr int kSpread = 4;

inline void prefetch(const char *line) { __builtin_prefetch(line, 0, 3); }

// Lines still to be fetched ahead. They are spread over all tiles of a block, so that arithmetic on many tokens and
// the memory's work overlap: fetched by the first tile alone, they would come in bursts with pauses between.
struct Ahead {
    const char *line;
    Index left;
};

template <class V, int R, int M, int Lines, int Group>
inline __attribute__((always_inline)) void tile_loop(const typename V::Weight *w, Index depth, const void *const *x,
                                                     float *out, Index out_stride, const char *ahead) {
    using Act = typename V::Act;
    typename V::Acc acc[M][R];
    const Act *tokens[M];
    for (int m = 0; m < M; m++) {
        tokens[m] = static_cast<const Act *>(x[m]);
        for (int r = 0; r < R; r++) acc[m][r] = V::zero();
    }
    const Index whole = depth / V::kStep * V::kStep;
    const auto step = [&](Index i) __attribute__((always_inline)) {
        if constexpr (V::kHoldsRows) {
            typename V::Loaded loaded[R];
            for (int r = 0; r < R; r++) loaded[r] = V::load(w + r * depth + i);
            for (int m = 0; m < M; m++) {
                for (int r = 0; r < R; r++) acc[m][r] = V::dot(acc[m][r], loaded[r], tokens[m] + i);
            }
        } else {
            for (int r = 0; r < R; r++) {
                const typename V::Loaded loaded = V::load(w + r * depth + i);
                for (int m = 0; m < M; m++) acc[m][r] = V::dot(acc[m][r], loaded, tokens[m] + i);
            }
        }
    };
    Index i = 0;
    for (; i + Group * V::kStep <= whole; i += Group * V::kStep) {
        for (int s = 0; s < Group; s++) {
            for (int line = Lines * s / Group; line < Lines * (s + 1) / Group; line++) prefetch(ahead + line * kLine);
            step(i + s * V::kStep);
        }
        ahead += Lines * kLine;
    }
    for (; i < whole; i += V::kStep) step(i);
    if (whole < depth) {
        for (int r = 0; r < R; r++) {
            const typename V::Loaded loaded = V::load_some(w + r * depth + whole, static_cast<int>(depth - whole));
            for (int m = 0; m < M; m++) acc[m][r] = V::dot(acc[m][r], loaded, tokens[m] + whole);
        }
    }
    for (int m = 0; m < M; m++) {
        if constexpr (R % 4 == 0) {
            for (int r = 0; r < R; r += 4) {
                V::sum4(acc[m][r], acc[m][r + 1], acc[m][r + 2], acc[m][r + 3], out + m * out_stride + r);
            }
        } else {
            for (int r = 0; r < R; r++) out[m * out_stride + r] = V::sum(acc[m][r]);
        }
    }
}

template <class V, int R, int M>
void tile(const typename V::Weight *w, Index depth, const void *const *x, float *out, Index out_stride, Ahead &ahead,
          Index tiles_left) {
    const Index steps = depth / V::kStep;
    const char *from = ahead.line;
    const auto run = [&](auto lines, auto group) {
        constexpr int kLines = decltype(lines)::value, kGroup = decltype(group)::value;
        tile_loop<V, R, M, kLines, kGroup>(w, depth, x, out, out_stride, from);
        ahead.line += kLines * (steps / kGroup) * kLine;
        ahead.left -= kLines * (steps / kGroup);
    };
    const auto in_each = [&](Index units) {
        return units == 0 ? 0 : (ahead.left + units * tiles_left - 1) / (units * tiles_left);
    };
    const Index a_step = in_each(steps), spread = in_each(steps / kSpread);
    if (a_step <= 0) return run(Count<0>{}, Count<1>{});
    if (a_step > 4) return run(Count<8>{}, Count<1>{});
    if (a_step > 2 || steps < kSpread) return run(Count<4>{}, Count<1>{});
    if (spread == 1) return run(Count<1>{}, Count<kSpread>{});
    if (spread == 2) return run(Count<2>{}, Count<kSpread>{});
    if (spread == 3) return run(Count<3>{}, Count<kSpread>{});
    if (spread == 4) return run(Count<4>{}, Count<kSpread>{});
    run(Count<8>{}, Count<kSpread>{});
}

template <class V, int R, int M>
void tile_of(Index num_tokens, const typename V::Weight *w, Index depth, const void *const *x, float *out,
             Index out_stride, Ahead &ahead, Index tiles_left) {
    if constexpr (M > 1) {
        if (num_tokens < M) return tile_of<V, R, M - 1>(num_tokens, w, depth, x, out, out_stride, ahead, tiles_left);
    }
    tile<V, R, M>(w, depth, x, out, out_stride, ahead, tiles_left);
}

// Tokens that fit one tile: every row passes through the registers once, prefetched kAheadBytes before.
template <class V, int R, int M>
void few_tokens(const typename V::Weight *w, Index num_blocks, Index depth, const void *const *x, Index num_tokens,
                float *out, Index out_stride, const typename V::Weight *next) {
    const Index block_bytes = R * depth * static_cast<Index>(sizeof(typename V::Weight));
    const Index distance = (kAheadBytes + block_bytes - 1) / block_bytes;
    for (Index b = 0; b < num_blocks; b++) {
        Ahead ahead = {nullptr, 0};
        if (next != nullptr) {
            const Index later = b + distance - num_blocks;
            ahead.line = later < 0 ? reinterpret_cast<const char *>(w) + (b + distance) * block_bytes
                                   : reinterpret_cast<const char *>(next) + later * block_bytes;
            ahead.left = (block_bytes + kLine - 1) / kLine;
        }
        tile_of<V, R, M>(num_tokens, w + b * R * depth, depth, x, out + b * R, out_stride, ahead, 1);
    }
}

// More tokens: a tile of them stays in the first cache while all rows of this call, which the second cache holds, pass
// by; meanwhile as many rows of `next` are prefetched. With rows in the outer loop the tokens would push prefetched
// lines out of the first cache again: then the time is that of memory plus that of arithmetic (docs/performance.md).
template <class V, int R, int M>
void many_tokens(const typename V::Weight *w, Index num_blocks, Index depth, const void *const *x, Index num_tokens,
                 float *out, Index out_stride, const typename V::Weight *next) {
    const Index block_bytes = R * depth * static_cast<Index>(sizeof(typename V::Weight));
    const Index num_tiles = (num_tokens + M - 1) / M;
    Ahead ahead = {reinterpret_cast<const char *>(next), next == nullptr ? 0 : num_blocks * block_bytes / kLine};
    for (Index i = 0; i < num_tiles; i++) {
        const Index from = num_tokens * i / num_tiles, to = num_tokens * (i + 1) / num_tiles;
        for (Index b = 0; b < num_blocks; b++) {
            tile_of<V, R, M>(to - from, w + b * R * depth, depth, x + from, out + from * out_stride + b * R, out_stride,
                             ahead, (num_tiles - i) * num_blocks - b);
        }
    }
}

// What does not fill R rows.
template <class V>
void single_rows(const typename V::Weight *w, Index first, Index end, Index depth, const void *const *x,
                 Index num_tokens, float *out, Index out_stride) {
    for (Index r = first; r < end; r++) {
        for (Index m = 0; m < num_tokens; m++) {
            Ahead nothing = {nullptr, 0};
            tile<V, 1, 1>(w + r * depth, depth, x + m, out + m * out_stride + r, out_stride, nothing, 1);
        }
    }
}

template <class V, int R, int M>
void blocks(const typename V::Weight *w, Index num_rows, Index depth, const void *const *x, Index num_tokens,
            float *out, Index out_stride, const typename V::Weight *next) {
    const Index num_blocks = num_rows / R;
    if (num_tokens <= M) {
        few_tokens<V, R, M>(w, num_blocks, depth, x, num_tokens, out, out_stride, next);
    } else {
        many_tokens<V, R, M>(w, num_blocks, depth, x, num_tokens, out, out_stride, next);
    }
    single_rows<V>(w, num_blocks * R, num_rows, depth, x, num_tokens, out, out_stride);
}

template <class V>
void rows(const expertshare::Rows &w, Index num_rows, Index depth, const void *const *x, Index num_tokens, float *out,
          Index out_stride, const expertshare::Rows &next) {
    const auto *from = reinterpret_cast<const typename V::Weight *>(w.codes);
    const auto *then = reinterpret_cast<const typename V::Weight *>(next.codes);
    if (num_tokens > V::kWideTokens) {
        return blocks<V, 4, V::kMaxTokens>(from, num_rows, depth, x, num_tokens, out, out_stride, then);
    }
    const Index by_eights = num_rows / 8 * 8;
    blocks<V, 8, V::kWideTokens>(from, by_eights, depth, x, num_tokens, out, out_stride, then);
    // In fours again, which sums lanes in the same order: how a row is summed must not depend on who shares it.
    blocks<V, 4, V::kMaxTokens>(from + by_eights * depth, num_rows - by_eights, depth, x, num_tokens, out + by_eights,
                                out_stride, then);
}

// At most kMaxTokens tokens, which stay in the first cache while W comes from the second: with more tokens than that
// it is they who would have to come from there, for every four rows anew.
template <class V>
void tile_rows(const void *w, Index num_rows, Index depth, const void *const *x, Index num_tokens, float *out,
               Index out_stride, const void *next, Index next_bytes) {
    constexpr int kRows = 4;
    const auto *from = static_cast<const typename V::Weight *>(w);
    const Index num_blocks = num_rows / kRows;
    Ahead ahead = {static_cast<const char *>(next), (next_bytes + kLine - 1) / kLine};
    for (Index b = 0; b < num_blocks; b++) {
        tile_of<V, kRows, V::kMaxTokens>(num_tokens, from + b * kRows * depth, depth, x, out + b * kRows, out_stride,
                                         ahead, num_blocks - b);
    }
    single_rows<V>(from, num_blocks * kRows, num_rows, depth, x, num_tokens, out, out_stride);
}

constexpr Index kRowGranule = 32;  // a multiple of every vector length: items never share a vector of a hidden row

template <class V>
constexpr expertshare::Kernels kernels_of() {
    return {kRowGranule, row_bytes<V>, encode<V>, rows<V>,      V::kMaxTokens, tile_rows<V>,
            swiglu<V>,   mix<V>,       round_row<V>, exponentials, choose<V>};
}

}  // namespace
