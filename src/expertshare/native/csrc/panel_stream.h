// Panels of quantised weights in memory, and where a reader of them fetches ahead. Everything has internal
// linkage: no file may end up with another instruction set's copy.
#pragma once

#include <algorithm>

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

inline void prefetch(const char *line) { __builtin_prefetch(line, 0, 3); }

// What a tile fetches ahead: so many lines of codes with every unit that it reads, `left` in all; and of scales and
// minima, where they are not null, the line of every `scale_step` bytes. All of a panel's scales at once would find the
// buffers for lines on their way full, and the processor drops what it has no buffer for.
struct Ahead {
    const char *at;
    Index lines, left;
    const char *scales, *minima;
    Index scale_step;

    inline __attribute__((always_inline)) void fetch() {
        const Index count = std::min(lines, left);
        for (Index i = 0; i < count; i++) prefetch(at + i * kLineBytes);
        at += count * kLineBytes, left -= count;
        if (scales != nullptr) prefetch(scales), scales += scale_step;
        if (minima != nullptr) prefetch(minima), minima += scale_step;
    }
};

// The panels of one call, and behind them those of the next.
struct Region {
    Rows w, next;
    Strides strides;
    Index num_panels;

    Rows panel(Index k) const { return k < num_panels ? skip(w, strides, k) : skip(next, strides, k - num_panels); }

    // What to fetch while R panels are read that begin `codes` and `scales` bytes before those from `first` on: as much,
    // in the order of addresses.
    template <int R>
    Rows ahead(Index first, Index codes, Index scales) const {
        if (next.codes == nullptr) return expertshare::kNothing;
        codes *= R, scales *= R;
        for (; codes >= strides.codes; codes -= strides.codes, scales -= strides.scales) first++;
        const Rows from = panel(first);
        return {from.codes + codes, from.scales + scales, from.minima == nullptr ? nullptr : from.minima + scales};
    }

    // Of rows that have one scale each.
    void fetch_scales(Index first, Index count) const {
        if (next.codes == nullptr) return;
        const char *scales = panel(first).scales;
        for (Index at = 0; at < count * strides.scales; at += kLineBytes) prefetch(scales + at);
    }
};

}  // namespace
