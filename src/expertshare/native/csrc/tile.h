// Rows of W dotted with token rows: every cache line of W comes from memory once.
//
// Few tokens: one row of W after the other, as they lie, so that memory sees a single stream; M sums in registers. More:
// R rows by M tokens at a time, so that each load of a token serves R rows.
//
// A vector type V gives: Weight, Act; kStep (features per step); Acc, zero(); Loaded, load(w), load_some(w, n) with
// zeros behind n; dot(acc, loaded, x); sum4(acc, acc, acc, acc), each summed in the same order; kMaxTokens: M with four
// rows; kHoldsRows: whether all R vectors of W stay in registers, or one at a time while x is reloaded. Everything has
// internal linkage: no file may end up with another instruction set's copy.
//
// The depth is cut into segments. Each has a sum of its own, and the sums of a row are added in order: so tiles may
// take segments in whatever order suits the caches, and the bits stay the same.
#pragma once

#include <algorithm>

#include "activation.h"
#include "choice.h"
#include "fetch.h"
#include "kernels.h"

namespace {

typedef float Quad __attribute__((vector_size(16)));

// Features of a segment. What two tiles of tokens have of one fits the first cache beside the rows that pass by: a load
// that misses it waits for one of the few buffers that the lines on their way from memory hold (docs/performance.md).
constexpr Index kSegment = 512;

// Tokens that meet one row at a time. More need too many loads for each row.
constexpr int kFewTokens = 8;
constexpr Index kFewBytes = 36 << 10;   // of them, so that the rows that pass by leave them in the first cache
constexpr Index kFewAhead = 16 << 10;  // with no more than four tokens half of it is quicker

template <int N>
struct Count {
    static constexpr int value = N;
};

constexpr int quads(int tokens) { return (tokens + 3) / 4; }

// Adds the sums of `count` features of one row from w on, and of M tokens from `at` on: one segment, or what is left
// behind the last.
template <class V, int M, bool Fetch>
inline __attribute__((always_inline)) void add_piece(const typename V::Weight *w, Index at, Index count,
                                                     const void *const *x, const char *ahead, Quad *totals) {
    constexpr Index kColumn = kLine / sizeof(typename V::Weight);
    const typename V::Act *tokens[M];
    typename V::Acc acc[4 * quads(M)];
    for (int m = 0; m < 4 * quads(M); m++) acc[m] = V::zero();
    for (int m = 0; m < M; m++) tokens[m] = static_cast<const typename V::Act *>(x[m]) + at;
    const auto add = [&](const typename V::Loaded &loaded, Index i) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) acc[m] = V::dot(acc[m], loaded, tokens[m] + i);
    };
    Index i = 0;
#pragma GCC unroll 4
    for (; i + kColumn <= count; i += kColumn) {
        if constexpr (Fetch) prefetch(ahead), ahead += kLine;
#pragma GCC unroll 16
        for (Index s = 0; s < kColumn; s += V::kStep) add(V::load(w + i + s), i + s);
    }
    for (; i + V::kStep <= count; i += V::kStep) add(V::load(w + i), i);
    if (i < count) add(V::load_some(w + i, static_cast<int>(count - i)), i);
    for (int q = 0; q < quads(M); q++) {
        const Quad sums = V::sum4(acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]);
        totals[q] = at == 0 ? sums : totals[q] + sums;
    }
}

template <class V, int M, bool Fetch>
__attribute__((noinline)) void few_tokens(const typename V::Weight *w, Index num_rows, Index depth,
                                          const void *const *x, float *out, Index out_stride,
                                          const typename V::Weight *next) {
    constexpr Index kBytes = sizeof(typename V::Weight);
    const Stream stream = {reinterpret_cast<const char *>(w), reinterpret_cast<const char *>(next),
                           num_rows * depth * kBytes, M <= 4 ? kFewAhead / 2 : kFewAhead};
    for (Index row = 0; row < num_rows; row++) {
        const typename V::Weight *of_row = w + row * depth;
        Quad totals[quads(M)];
        Index at = 0;
        for (; at + kSegment <= depth; at += kSegment) {
            add_piece<V, M, Fetch>(of_row + at, at, kSegment, x, stream.behind((row * depth + at) * kBytes), totals);
        }
        if (at < depth) {
            add_piece<V, M, Fetch>(of_row + at, at, depth - at, x, stream.behind((row * depth + at) * kBytes), totals);
        }
        for (int m = 0; m < M; m++) out[m * out_stride + row] = totals[m / 4][m % 4];
    }
}

// `count` features of R rows from w on, and of M tokens from `at` on: one segment, or what is left behind the last. The
// first of a row sets `out`, the others add to it.
template <class V, int R, int M, class Fetch>
inline __attribute__((always_inline)) void add_segment(const typename V::Weight *w, Index depth, Index at, Index count,
                                                       const void *const *x, float *out, Index out_stride, Fetch fetch) {
    constexpr Index kBytes = sizeof(typename V::Weight), kColumn = kLine / kBytes;
    const typename V::Act *tokens[M];
    typename V::Acc acc[M][R];
    for (int m = 0; m < M; m++) {
        tokens[m] = static_cast<const typename V::Act *>(x[m]) + at;
        for (int r = 0; r < R; r++) acc[m][r] = V::zero();
    }
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
    const auto column = [&](Index i, int turn) __attribute__((always_inline)) {
        fetch.column(at * kBytes, i * kBytes, turn);
#pragma GCC unroll 8
        for (Index s = 0; s < kColumn; s += V::kStep) step(i + s);
    };
    Index i = 0;
    for (; i + Fetch::kTurns * kColumn <= count; i += Fetch::kTurns * kColumn) {
#pragma GCC unroll 4
        for (int turn = 0; turn < Fetch::kTurns; turn++) column(i + turn * kColumn, turn);
    }
    for (int turn = 0; i + kColumn <= count; i += kColumn, turn++) column(i, turn);
    for (; i + V::kStep <= count; i += V::kStep) step(i);
    if (i < count) {
        for (int r = 0; r < R; r++) {
            const typename V::Loaded loaded = V::load_some(w + r * depth + i, static_cast<int>(count - i));
            for (int m = 0; m < M; m++) acc[m][r] = V::dot(acc[m][r], loaded, tokens[m] + i);
        }
    }
    for (int m = 0; m < M; m++) {
        for (int r = 0; r < R; r += 4) {
            float *to = out + m * out_stride + r;
            Quad sums = V::sum4(acc[m][r], acc[m][r + 1], acc[m][r + 2], acc[m][r + 3]), before;
            if (at != 0) {
                std::memcpy(&before, to, sizeof before);
                sums = before + sums;
            }
            std::memcpy(to, &sums, sizeof sums);
        }
    }
}

// By reference: a copy of `fetch` on the stack would be read in other pieces than it was written in, and wait for all
// stores before it.
template <class V, int R, int M, class Fetch>
__attribute__((noinline)) void segment(const typename V::Weight *w, Index depth, Index at, Index count,
                                       const void *const *x, float *out, Index out_stride, const Fetch &fetch) {
    if (count == kSegment) {
        add_segment<V, R, M>(w, depth, at, kSegment, x, out, out_stride, fetch);
    } else {
        add_segment<V, R, M>(w, depth, at, count, x, out, out_stride, fetch);
    }
}

// Calls `run` with the number of tokens as a constant, 1 to M.
template <int M, class Run>
inline __attribute__((always_inline)) void with_tokens(Index num_tokens, Run run) {
    if constexpr (M > 1) {
        if (num_tokens < M) return with_tokens<M - 1>(num_tokens, run);
    }
    run(Count<M>{});
}

// Calls `run` with at least so many lines in four columns, as far as that goes.
template <class Run>
inline __attribute__((always_inline)) void with_share(Index lines, Run run) {
    switch (lines) {
        case 0: return run(Count<0>{});
        case 1: return run(Count<1>{});
        case 2: return run(Count<2>{});
        case 3: return run(Count<3>{});
        case 4: return run(Count<4>{});
        case 5: return run(Count<5>{});
        case 6: return run(Count<6>{});
        case 7: case 8: return run(Count<8>{});
    }
    run(Count<16>{});
}

// More tokens: two tiles of them at a time meet the same rows by turns, a segment after the other. With three tiles or
// more, tokens that are only ever read from the first cache grow old in the second, which then takes them out of both.
// `next` is fetched meanwhile, evenly, so that arithmetic on many tokens and the memory's work overlap.
template <class V, int R, int M>
void many_tokens(const typename V::Weight *w, Index num_blocks, Index depth, const void *const *x, Index num_tokens,
                 float *out, Index out_stride, const typename V::Weight *next) {
    constexpr Index kPart = 2 * M;
    constexpr Index kBytes = sizeof(typename V::Weight), kShare = kShareTurns * kLine / kBytes;
    const Index num_parts = (num_tokens + kPart - 1) / kPart, num_segments = (depth + kSegment - 1) / kSegment;
    const char *ahead = reinterpret_cast<const char *>(next);
    Index left = next == nullptr ? 0 : num_blocks * R * depth * kBytes / kLine;
    for (Index part = 0; part < num_parts; part++) {
        const Index first = num_tokens * part / num_parts, size = num_tokens * (part + 1) / num_parts - first;
        const Index num_tiles = (size + M - 1) / M;
        Index tiles_left = (num_parts - part) * num_segments * num_blocks * num_tiles;
        for (Index at = 0; at < depth; at += kSegment) {
            const Index count = std::min(kSegment, depth - at);
            for (Index b = 0; b < num_blocks; b++) {
                const typename V::Weight *block = w + b * R * depth + at;
                const typename V::Weight *then = b + 1 < num_blocks ? block + R * depth : w + at + count;
                for (Index i = 0; i < num_tiles; i++) {
                    const Index from = first + size * i / num_tiles, to = first + size * (i + 1) / num_tiles;
                    const Index near = R * i / num_tiles, num_near = R * (i + 1) / num_tiles - near;
                    const Index turns = count / kShare, units = turns * tiles_left--;
                    const auto run = [&](auto lines, auto tokens) {
                        constexpr int kLines = decltype(lines)::value;
                        const FetchShare<kLines> fetch = {ahead, reinterpret_cast<const char *>(then + near * depth),
                                                          num_near, depth * kBytes};
                        segment<V, R, decltype(tokens)::value>(block, depth, at, count, x + from,
                                                               out + from * out_stride + b * R, out_stride, fetch);
                        ahead += kLines * turns * kLine, left -= kLines * turns;
                    };
                    with_share(left > 0 && units > 0 ? (left + units - 1) / units : 0, [&](auto lines) {
                        with_tokens<M>(to - from, [&](auto tokens) { run(lines, tokens); });
                    });
                }
            }
        }
    }
}

template <class V>
void rows_by_few(const typename V::Weight *w, Index num_rows, Index depth, const void *const *x, Index num_tokens,
                 float *out, Index out_stride, const typename V::Weight *next) {
    for (Index m = 0; m < num_tokens; m += kFewTokens) {
        with_tokens<kFewTokens>(std::min<Index>(num_tokens - m, kFewTokens), [&](auto tokens) {
            constexpr int M = decltype(tokens)::value;
            const auto run = next == nullptr ? few_tokens<V, M, false> : few_tokens<V, M, true>;
            run(w, num_rows, depth, x + m, out + m * out_stride, out_stride, next);
        });
    }
}

template <class V>
void rows(const expertshare::Rows &w, Index num_rows, Index depth, const void *const *x, Index num_tokens, float *out,
          Index out_stride, const expertshare::Rows &next) {
    const auto *from = reinterpret_cast<const typename V::Weight *>(w.codes);
    const auto *then = reinterpret_cast<const typename V::Weight *>(next.codes);
    const Index token_bytes = depth * static_cast<Index>(sizeof(typename V::Act));
    if (num_tokens <= kFewTokens && num_tokens * token_bytes <= kFewBytes) {
        return rows_by_few<V>(from, num_rows, depth, x, num_tokens, out, out_stride, then);
    }
    const Index whole = num_rows / 4 * 4;
    many_tokens<V, 4, V::kMaxTokens>(from, whole / 4, depth, x, num_tokens, out, out_stride, then);
    rows_by_few<V>(from + whole * depth, num_rows - whole, depth, x, num_tokens, out + whole, out_stride, nullptr);
}

constexpr Index kRowGranule = 32;  // a multiple of every vector length: items never share a vector of a hidden row

template <class V>
constexpr expertshare::Kernels kernels_of() {
    return {kRowGranule, row_bytes<V>, encode<V>, rows<V>, swiglu<V>, mix<V>, round_row<V>, exponentials, choose<V>};
}

}  // namespace
