// Which lines of weights are fetched ahead of their use, and when. Everything has internal linkage: no file may end up
// with another instruction set's copy.
#pragma once

#include "kernels.h"

namespace {

using expertshare::Index;

constexpr Index kLine = 64;

inline void prefetch(const char *line) { __builtin_prefetch(line, 0, 3); }

// What lies `ahead` bytes behind a place among some weights, and behind their end where `next` begins; null: nothing.
struct Stream {
    const char *from, *next;
    Index bytes, ahead;

    const char *behind(Index at) const {
        if (next == nullptr) return nullptr;
        return at + ahead < bytes ? from + at + ahead : next + (at + ahead - bytes);
    }
};

constexpr int kShareTurns = 4;

// For several tiles of tokens. `ahead` is where to go on; of rows that are in the second cache already, `num_near` from
// `near` on are fetched into the first, as much of them as the segment.
struct Share {
    const char *ahead, *near;
    Index num_near, row_bytes;

    // The line at `offset` and those behind it, in turns; `Lines` of what lies ahead in four of them.
    template <int Lines>
    inline __attribute__((always_inline)) void column(Index offset, int turn) {
#pragma GCC unroll 8
        for (int i = Lines * turn / kShareTurns; i < Lines * (turn + 1) / kShareTurns; i++) prefetch(ahead + i * kLine);
        if (turn == kShareTurns - 1) ahead += Lines * kLine;
        if (turn != 0) return;
        for (Index r = 0; r < num_near; r++) {
#pragma GCC unroll 8
            for (int i = 0; i < kShareTurns; i++) prefetch(near + r * row_bytes + offset + i * kLine);
        }
    }
};

}  // namespace
