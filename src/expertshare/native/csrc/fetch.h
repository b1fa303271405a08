// Which lines of weights are fetched ahead of their use, and when. A tile calls `column` for every 64 bytes of its rows:
// they begin `offset` bytes into its segment, which begins at `at` in a row, and `turn` counts the calls from 0 to
// kTurns - 1. Everything has internal linkage: no file may end up with another instruction set's copy.
#pragma once

#include "kernels.h"

namespace {

using expertshare::Index;

constexpr Index kLine = 64;

inline void prefetch(const char *line) { __builtin_prefetch(line, 0, 3); }

struct FetchNothing {
    static constexpr int kTurns = 1;
    void column(Index, Index, int) const {}
};

// R rows further on, in the order in which tiles read them, side by side: with the tokens of a tile and what is being
// read they fit the first cache; whole rows, or a block more, do not.
template <int R>
struct FetchColumns {
    static constexpr int kTurns = 1;
    const char *here, *then;  // of the block that the columns before `until` belong to, and of the one behind it
    Index until, row_bytes;

    inline __attribute__((always_inline)) void column(Index at, Index offset, int) const {
        const char *line = (at + offset < until ? here : then) + at + offset;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) prefetch(line + r * row_bytes);
    }
};

// R rows further on in the order of addresses: where memory is the limit, one stream is faster than several.
template <int R>
struct FetchRows {
    static constexpr int kTurns = 1;
    const char *from;

    inline __attribute__((always_inline)) void column(Index at, Index offset, int) const {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) prefetch(from + (at + offset) * R + r * kLine);
    }
};

// Blocks of R rows that are read once, one after the other, and behind them those at `next`.
template <int R>
struct Blocks {
    const char *from, *next;
    Index count, row_bytes;

    const char *block(Index b) const {
        return b < count ? from + b * R * row_bytes : next + (b - count) * R * row_bytes;
    }

    FetchColumns<R> columns(Index b, Index ahead) const {
        const Index num_columns = (row_bytes + kLine - 1) / kLine;
        const Index later = b + ahead / num_columns, shift = ahead % num_columns * kLine;
        const Index whole = num_columns * kLine;
        return {block(later) + shift, block(later + 1) + shift - whole, whole - shift, row_bytes};
    }

    FetchRows<R> rows(Index b, Index ahead_bytes) const {
        const Index block_bytes = R * row_bytes;
        return {block(b + (ahead_bytes + block_bytes - 1) / block_bytes)};
    }
};

constexpr int kShareTurns = 4;

// `Lines` in four turns, from `ahead` on; and, of rows that are in the second cache already, as much as the segment.
template <int Lines>
struct FetchShare {
    static constexpr int kTurns = kShareTurns;
    const char *ahead, *near;
    Index num_near, row_bytes;

    inline __attribute__((always_inline)) void column(Index, Index offset, int turn) {
#pragma GCC unroll 8
        for (int i = Lines * turn / kTurns; i < Lines * (turn + 1) / kTurns; i++) prefetch(ahead + i * kLine);
        if (turn == kTurns - 1) ahead += Lines * kLine;
        if (turn != 0) return;
        for (Index r = 0; r < num_near; r++) {
#pragma GCC unroll 8
            for (int i = 0; i < kTurns; i++) prefetch(near + r * row_bytes + offset + i * kLine);
        }
    }
};

}  // namespace
