// Panels of quantised weights dotted with quantised tokens. A panel is 16 rows: of each line of 64 bytes the first four
// codes are four features of the first row, and so on, so that lanes are rows, a token's four features meet a line by
// one instruction, and a sum needs no adding up across lanes. With 4 bits the halves of a line's bytes are two such
// lines: the low ones in the first half of their group of features, the high ones as far on in the second.
//
// R panels meet M tokens at a time in registers: codes are unpacked once for M tokens, and every line comes from memory
// once. Of each group of features the products are summed as integers, which become floats and go, times the weights'
// scales, into the sum of a span, and that, times the token's scale, into the total; with 8 bits a row's scale comes
// last. Since integers are exact and the order of floats is fixed, every instruction set gets the same bits.
#include "kernels.h"

#include <algorithm>
#include <type_traits>

#include "quantised_panel.h"
#include "quantised_span.h"

namespace {

using expertshare::kPanelRows;
using expertshare::Rows;

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

    // What to fetch while R panels are read that begin `codes` and `scales` bytes before those from `first` on: as
    // much, in the order of addresses.
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

// Panels and tokens that meet in registers.
constexpr int kMostPanels = kLanes == 16 ? 2 : 1, kMaxTokens = kLanes == 16 ? 6 : 2;

constexpr Index kStretchSpans = 4;  // of two panels: 16 KiB of int8

// At least, in whole panels. Into the first cache: int8 gains nothing from more. With 4 bits arithmetic takes as long
// as memory, alternately: far ahead a group of many tokens fetches for those of few.
template <class F>
constexpr Index kAheadBytes = F::kBits == 8 ? 16 << 10 : 128 << 10;

// Of a unit: its lines hold so many features of 16 rows.
template <class F>
constexpr Index kUnitFeatures = kUnit * kLineBytes * 8 / F::kBits / kPanelRows;

template <class F>
inline Strides strides_of(Index depth) {
    return {kPanelRows * F::row_bytes(depth), kPanelRows * F::scale_bytes(depth)};
}

// Sums of R panels by M tokens. Those of a span stay in registers, the totals of all spans in `out`.
template <class F, int R, int M>
struct Tile {
    using Sums = Ints16[M][R];
    using Totals = Floats16[M][R];

    const Strides strides;
    Rows w;
    const Span *tokens[M];
    Ahead ahead;
    float *const out;
    const Index out_stride;

    // One line of each panel; `at` is where its features begin among a token's codes.
    EXPERTSHARE_INLINE void add_line(Sums &sums, const char *line, Index at) {
        Codes16 first[R], second[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const char *of_panel = line + r * strides.codes;
            if constexpr (F::kBits == 8) {
                first[r] = whole(of_panel);
            } else {
                first[r] = low(of_panel), second[r] = high(of_panel);
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const auto token = four_of(tokens[m]->codes + at);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[m][r] = dot<F::kBits>(sums[m][r], first[r], token);
            if constexpr (F::kBits == 4) {
                const auto behind = four_of(tokens[m]->codes + at + F::kGroup / 2);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sums[m][r] = dot<F::kBits>(sums[m][r], second[r], behind);
            }
        }
    }

    EXPERTSHARE_INLINE void sum_group(Sums &sums, Index group, Index lines) {
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const Ints16 start = all(F::kMinima ? 0 : tokens[m]->start[group]);
            for (int r = 0; r < R; r++) sums[m][r] = start;
        }
        for (Index line = 0; line < lines; line += kUnit) {
            ahead.fetch();
#pragma GCC unroll 4
            for (Index i = 0; i < kUnit; i++) {
                add_line(sums, w.codes + i * kLineBytes, group * F::kRun + (line + i) * kQuad);
            }
            w.codes += kUnit * kLineBytes;
        }
    }

    // The sums of a group, as floats, times the scales of its weights.
    EXPERTSHARE_INLINE void add_group(Totals &span, Index group) {
        constexpr Index lines = kPanelRows * F::kRun * F::kBits / 8 / kLineBytes;
        Sums sums;
        sum_group(sums, group, lines);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const Floats16 scale = scales(w.scales + r * strides.scales);
            [[maybe_unused]] Floats16 minimum;
            if constexpr (F::kMinima) minimum = scales(w.minima + r * strides.scales);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                span[m][r] = fused(floats(sums[m][r]), scale, span[m][r]);
                if constexpr (F::kMinima) span[m][r] = fused(minimum, all(tokens[m]->sums[group]), span[m][r]);
            }
        }
        w.scales += kPanelRows * sizeof(std::uint16_t);
        if constexpr (F::kMinima) w.minima += kPanelRows * sizeof(std::uint16_t);
    }

    EXPERTSHARE_INLINE void add_span(Index features) {
        Totals span;
        if constexpr (F::kGroup == 0) {
            Sums sums;
            sum_group(sums, 0, features / kQuad);
            for (int m = 0; m < M; m++) {
                for (int r = 0; r < R; r++) span[m][r] = floats(sums[m][r]);
            }
        } else {
            for (int m = 0; m < M; m++) {
                for (int r = 0; r < R; r++) span[m][r] = all(0.0f);
            }
            for (Index group = 0; group < features / F::kRun; group++) add_group(span, group);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                float *total = out + m * out_stride + r * kPanelRows;
                store16(total, fused(span[m][r], all(tokens[m]->scale), load16(total)));
            }
            tokens[m]++;
        }
    }

    void add_spans(Index features) {
        for (; features >= kSpan; features -= kSpan) add_span(kSpan);
        if (features != 0) add_span(features);
    }
};

// Adds `features` features from `w` on, which meet the tokens' spans x[m] + span and following, to `out`. What a call
// needs passes as numbers: a structure would be read in other pieces than it was written in, and wait for all stores
// before it.
#define EXPERTSHARE_PANELS_TILE                                                                               \
    const char *codes, const char *scales, const char *minima, Index codes_stride, Index scales_stride,      \
        const void *const *x, Index span, Index features, float *out, Index out_stride, const char *ahead_at, \
        Index ahead_lines, Index ahead_left, const char *ahead_scales, const char *ahead_minima, Index scale_step

template <class F, int R, int M>
void panels_tile(EXPERTSHARE_PANELS_TILE) {
    const Ahead ahead = {ahead_at, ahead_lines, ahead_left, ahead_scales, ahead_minima, scale_step};
    Tile<F, R, M> tile = {{codes_stride, scales_stride}, {codes, scales, minima}, {}, ahead, out, out_stride};
    for (int m = 0; m < M; m++) tile.tokens[m] = static_cast<const Span *>(x[m]) + span;
    tile.add_spans(features);
}

using PanelsTile = void (*)(EXPERTSHARE_PANELS_TILE);

template <class F, int R, int M = kMaxTokens>
PanelsTile tile_for(Index num_tokens) {
    if constexpr (M > 1) {
        if (num_tokens < M) return tile_for<F, R, M - 1>(num_tokens);
    }
    return panels_tile<F, R, M>;
}

inline void fill(float *out, Index panels, Index num_tokens, Index out_stride) {
    for (Index m = 0; m < num_tokens; m++) {
        for (Index r = 0; r < panels; r++) store16(out + m * out_stride + r * kPanelRows, all(0.0f));
    }
}

inline void scale_rows(const float *scales, float *out, Index panels, Index num_tokens, Index out_stride) {
    for (Index m = 0; m < num_tokens; m++) {
        for (Index r = 0; r < panels; r++) {
            float *total = out + m * out_stride + r * kPanelRows;
            store16(total, multiply(load16(total), load16(scales + r * kPanelRows)));
        }
    }
}

// Tokens of a call in tiles, as evenly as it goes. Made once: a division takes as long as a line of a panel.
struct Tiles {
    Index count, begin[(expertshare::kTokenBlock + kMaxTokens - 1) / kMaxTokens + 1];

    explicit Tiles(Index num_tokens) : count((num_tokens + kMaxTokens - 1) / kMaxTokens) {
        for (Index i = 0; i <= count; i++) begin[i] = num_tokens * i / count;
    }

    // Of so many things what each tile does, if all do the same and nothing may be left.
    Index share(Index all) const { return count == 1 ? all : (all + count - 1) / count; }
};

// Many tokens are several tiles, which meet the same R panels, a stretch of features at a time: what the first tile has
// read is in the first cache for the others. `distance`: panels from those that are read to those that are fetched.
template <class F, int R>
void panels_of_tiles(const Region &region, Index first_panel, Index distance, Index depth, const void *const *x,
                     const Tiles &tiles, float *out, Index out_stride) {
    constexpr bool kScalesOfRows = F::kGroup == 0;
    const Index stretch = tiles.count == 1 ? depth : std::min(depth, kStretchSpans * kSpan);
    const Index lines_a_unit = tiles.share(R * kUnit);
    const Index scale_step = kScalesOfRows ? 0 : tiles.share(R * kPanelRows * F::scale_bytes(kUnitFeatures<F>));
    const Rows w = region.panel(first_panel);
    const Strides strides = region.strides;
    if constexpr (kScalesOfRows) region.fetch_scales(first_panel + R, R);
    fill(out, R, tiles.begin[tiles.count], out_stride);
    for (Index begin = 0; begin < depth; begin += stretch) {
        const Index features = std::min(stretch, depth - begin);
        const Index codes = kPanelRows * F::row_bytes(begin);
        const Index scales = kScalesOfRows ? 0 : kPanelRows * F::scale_bytes(begin);
        Rows ahead = region.template ahead<R>(first_panel + distance, codes, scales);
        if (kScalesOfRows) ahead.scales = nullptr;
        Index left = ahead.codes == nullptr ? 0 : R * kPanelRows * F::row_bytes(features) / kLineBytes;
        const Index share = tiles.share(left), step = features / kUnitFeatures<F> * scale_step;
        for (Index i = 0; i < tiles.count; i++) {
            const Index first = tiles.begin[i], lines = std::min(share, left);
            tile_for<F, R>(tiles.begin[i + 1] - first)(
                w.codes + codes, w.scales + scales, F::kMinima ? w.minima + scales : nullptr, strides.codes,
                strides.scales, x + first, begin / kSpan, features, out + first * out_stride, out_stride, ahead.codes,
                lines_a_unit, lines, ahead.scales, F::kMinima ? ahead.minima : nullptr, scale_step);
            ahead.codes += lines * kLineBytes, left -= lines;
            if (ahead.scales != nullptr) ahead.scales += step;
            if (F::kMinima && ahead.minima != nullptr) ahead.minima += step;
        }
    }
    if constexpr (kScalesOfRows) {
        const float *row_scales = reinterpret_cast<const float *>(region.panel(first_panel).scales);
        scale_rows(row_scales, out, R, tiles.begin[tiles.count], out_stride);
    }
}

// Rows that begin and end a panel. One panel after the other is one stream from memory; where tokens are many,
// arithmetic counts more, and several panels share each load of a token.
template <class F>
void multiply_panels(const Rows &w, Index num_rows, Index depth, const void *const *x, Index num_tokens, float *out,
                    Index out_stride, const Rows &next) {
    const Region region = {w, next, strides_of<F>(depth), num_rows / kPanelRows};
    Index first = 0;
    const Tiles tiles(num_tokens);
    const auto run = [&](auto panels) {
        constexpr int R = decltype(panels)::value;
        const Index distance = (kAheadBytes<F> + R * region.strides.codes - 1) / (R * region.strides.codes) * R;
        for (; first + R <= region.num_panels; first += R) {
            panels_of_tiles<F, R>(region, first, distance, depth, x, tiles, out + first * kPanelRows, out_stride);
        }
    };
    if (num_tokens > kMaxTokens) run(std::integral_constant<int, kMostPanels>{});
    run(std::integral_constant<int, 1>{});
}

template <class F, class Token>
constexpr expertshare::Kernels quantised_kernels_of() {
    return {1,       kSpan,   span_bytes, pack_spans<F, Token>, multiply_panels<F>, swiglu_spans<F>,
            mix<MixedInto<Token>>, nullptr, nullptr, nullptr};
}

using Int8 = Format<8, 0, false>;
using Int4By32 = Format<4, 32, false>;
using Int4By64 = Format<4, 64, false>;
using Int4By32Minima = Format<4, 32, true>;
using Int4By64Minima = Format<4, 64, true>;

// In the order of expertshare::Format.
#define EXPERTSHARE_BOTH_TOKENS(F) quantised_kernels_of<F, float>(), quantised_kernels_of<F, std::uint16_t>()
constexpr expertshare::Kernels kernels[] = {
    EXPERTSHARE_BOTH_TOKENS(Int8), EXPERTSHARE_BOTH_TOKENS(Int4By32), EXPERTSHARE_BOTH_TOKENS(Int4By64),
    EXPERTSHARE_BOTH_TOKENS(Int4By32Minima), EXPERTSHARE_BOTH_TOKENS(Int4By64Minima)};

}  // namespace

const expertshare::Kernels *const expertshare::EXPERTSHARE_TABLE(quantised) = kernels;
