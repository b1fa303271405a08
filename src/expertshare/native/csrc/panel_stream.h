// Panels of quantised weights as they lie in memory, and where a reader of them fetches ahead. Everything has internal
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

// Lines that a tile fetches ahead: so many with every unit that it reads, `left` in all.
struct Ahead {
    const char *at;
    Index lines, left;

    inline __attribute__((always_inline)) void fetch() {
        const Index count = std::min(lines, left);
        for (Index i = 0; i < count; i++) __builtin_prefetch(at + i * kLineBytes, 0, 3);
        at += count * kLineBytes, left -= count;
    }
};

// The panels of one call, and behind them those of the next.
struct Region {
    Rows w, next;
    Strides strides;
    Index num_panels;

    Rows panel(Index k) const { return k < num_panels ? skip(w, strides, k) : skip(next, strides, k - num_panels); }

    // What to fetch while R panels are read that begin `bytes` before those from `first` on: as many lines, in the order
    // of addresses.
    template <int R>
    const char *ahead(Index first, Index bytes) const {
        if (next.codes == nullptr) return nullptr;
        Index at = R * bytes;
        for (; at >= strides.codes; at -= strides.codes) first++;
        return panel(first).codes + at;
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
