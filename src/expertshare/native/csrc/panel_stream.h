// Panels of quantised weights as they lie in memory, and where a reader of them fetches ahead. Everything has internal
// linkage: no file may end up with another instruction set's copy.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels.h"

namespace {

using expertshare::Index;
using expertshare::kPanelRows;
using expertshare::Rows;

constexpr Index kLineBytes = 64;
constexpr Index kUnit = 4;  // lines of a panel at a time: any depth that is a multiple of 16 has whole ones

// Bytes from one panel to the next.
struct Strides {
    Index codes, scales;
};

inline Rows skip(const Rows &w, Strides strides, Index panels) {
    const auto at = [panels](const char *from, Index stride) {
        return from == nullptr ? nullptr : from + panels * stride;
    };
    return {at(w.codes, strides.codes), at(w.scales, strides.scales), at(w.minima, strides.scales)};
}

// Where one panel's reader fetches ahead: from `at` on for `left` lines, then from `then` on.
struct Stream {
    const char *at, *then;
    Index left;

    void skip(Index lines) {
        if (lines < left) {
            at += lines * kLineBytes, left -= lines;
        } else {
            at = then + (lines - left) * kLineBytes, left = std::numeric_limits<Index>::max();
        }
    }
};

// Of several tiles over the same R panels each fetches every `turns`th unit; with 0 turns nothing is fetched.
template <int R>
struct Ahead {
    Stream streams[R];
    Index wait, turns;

    Ahead turn(Index i, Index of) const {
        Ahead part = *this;
        part.wait = i, part.turns *= of;
        return part;
    }

    void skip(Index lines) {
        for (Stream &of : streams) of.skip(lines);
    }

    // As many lines as one unit of work reads.
    inline __attribute__((always_inline)) void fetch() {
        if (turns == 0) return;
        const bool mine = wait-- == 0;
        if (mine) wait = turns - 1;
#pragma GCC unroll 4
        for (Stream &of : streams) {
            if (mine) {
                for (Index i = 0; i < kUnit; i++) __builtin_prefetch(of.at + i * kLineBytes, 0, 3);
            }
            of.skip(kUnit);
        }
    }
};

// The panels of one call, and behind them those of the next.
struct Region {
    Rows w, next;
    Strides strides;
    Index num_panels, ahead_bytes;

    Rows panel(Index k) const { return k < num_panels ? skip(w, strides, k) : skip(next, strides, k - num_panels); }

    // R readers, the first of them in panel `first`.
    template <int R>
    Ahead<R> ahead(Index first) const {
        Ahead<R> found = {};
        if (next.codes == nullptr) return found;
        const Index blocks = ahead_bytes / (R * strides.codes), rest = ahead_bytes / R % strides.codes;
        for (int r = 0; r < R; r++) {
            found.streams[r] = {panel(first + r + R * blocks).codes + rest, panel(first + r + R * (blocks + 1)).codes,
                                (strides.codes - rest) / kLineBytes};
        }
        found.turns = 1;
        return found;
    }

    void fetch_scales(Index first, Index count, bool minima) const {
        if (next.codes == nullptr) return;
        const Rows from = panel(first);
        for (Index at = 0; at < count * strides.scales; at += kLineBytes) {
            __builtin_prefetch(from.scales + at, 0, 3);
            if (minima) __builtin_prefetch(from.minima + at, 0, 3);
        }
    }
};

}  // namespace
