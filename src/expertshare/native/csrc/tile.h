// Rows of W dotted with token rows: every cache line of W comes from memory once.
//
// Few tokens: one row of W after the other, in order, so that memory sees a single stream; M sums in registers. More:
// R rows by M tokens at a time, so that each load of a token serves R rows.
//
// A type V gives: Weight, Act; kStep (features per step); Loaded, load(w), load_some(w, n) with zeros behind n;
// dot(acc, loaded, x); position_of(i), where feature i is in a packed token; kMaxTokens: M with four rows; kHoldsRows:
// whether all R vectors of W stay in registers, or one at a time while x is reloaded.
//
// The depth is cut into segments. Each has a sum of its own, and the sums of a row are added in order: so tiles may
// take segments in whatever order suits the caches, and the bits stay the same.
#pragma once

#include <algorithm>

#include "epilogue.h"
#include "kernels.h"
#include "vec.h"

namespace {

// What is `ahead` bytes behind an offset into some weights, and behind their end where `next` begins; null: nothing.
struct Stream {
    const char *from, *next;
    Index bytes, ahead;

    const char *behind(Index at) const {
        if (next == nullptr) return nullptr;
        return at + ahead < bytes ? from + at + ahead : next + (at + ahead - bytes);
    }
};

constexpr int kShareColumns = 4;

// For several tiles of tokens. `ahead` is where to go on; of rows that are in the second cache already, `num_near` from
// `near` on are fetched into the first, as much of them as the segment.
struct Share {
    const char *ahead, *near;
    Index num_near, row_bytes;

    // The line at `offset` and those behind it, one with each of four calls, and `Lines` of what is ahead.
    template <int Lines>
    inline __attribute__((always_inline)) void column(Index offset, int nth) {
#pragma GCC unroll 8
        for (int i = Lines * nth / kShareColumns; i < Lines * (nth + 1) / kShareColumns; i++) {
            prefetch(ahead + i * kLineBytes);
        }
        if (nth == kShareColumns - 1) ahead += Lines * kLineBytes;
        if (nth != 0) return;
        for (Index r = 0; r < num_near; r++) {
#pragma GCC unroll 8
            for (int i = 0; i < kShareColumns; i++) prefetch(near + r * row_bytes + offset + i * kLineBytes);
        }
    }
};

// Features of a segment. What two tiles of tokens have of one fits the first cache beside the rows that pass by: a load
// that misses it waits for one of the few buffers that the lines on their way from memory hold (docs/performance.md).
constexpr Index kSegment = 512;

// Tokens that meet one row at a time. More need too many loads for each row.
constexpr int kFewTokens = 8;
constexpr Index kFewBytes = 36 << 10;   // of them, so that the rows that pass by leave them in the first cache
constexpr Index kFewAhead = 16 << 10;  // with no more than four tokens half of it is quicker

constexpr int quads(int tokens) { return (tokens + 3) / 4; }

// Adds the sums of `count` features of one row from w on, and of M tokens from `at` on: one segment, or what is left
// behind the last.
template <class V, int M, bool Fetch>
EXPERTSHARE_INLINE void add_piece(const typename V::Weight *w, Index at, Index count,
                                                     const void *const *x, const char *ahead, Quad *totals) {
    constexpr Index kColumn = kLineBytes / sizeof(typename V::Weight);
    const typename V::Act *tokens[M];
    Floats acc[4 * quads(M)];
    for (int m = 0; m < 4 * quads(M); m++) acc[m] = Floats{};
    for (int m = 0; m < M; m++) tokens[m] = static_cast<const typename V::Act *>(x[m]) + at;
    const auto add = [&](const typename V::Loaded &loaded, Index i) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) acc[m] = V::dot(acc[m], loaded, tokens[m] + i);
    };
    Index i = 0;
#pragma GCC unroll 4
    for (; i + kColumn <= count; i += kColumn) {
        if constexpr (Fetch) prefetch(ahead), ahead += kLineBytes;
#pragma GCC unroll 16
        for (Index s = 0; s < kColumn; s += V::kStep) add(V::load(w + i + s), i + s);
    }
    for (; i + V::kStep <= count; i += V::kStep) add(V::load(w + i), i);
    if (i < count) add(V::load_some(w + i, static_cast<int>(count - i)), i);
    for (int q = 0; q < quads(M); q++) {
        const Quad sums = sum4(acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]);
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
template <class V, int R, int M, int Lines>
EXPERTSHARE_INLINE void add_segment(const typename V::Weight *w, Index depth, Index at, Index count,
                                                       const void *const *x, float *out, Index out_stride,
                                                       Share share) {
    constexpr Index kColumn = kLineBytes / sizeof(typename V::Weight);
    const typename V::Act *tokens[M];
    Floats acc[M][R];
    for (int m = 0; m < M; m++) {
        tokens[m] = static_cast<const typename V::Act *>(x[m]) + at;
        for (int r = 0; r < R; r++) acc[m][r] = Floats{};
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
    const auto column = [&](Index i, int nth) __attribute__((always_inline)) {
        share.template column<Lines>(i * static_cast<Index>(sizeof(typename V::Weight)), nth);
#pragma GCC unroll 8
        for (Index s = 0; s < kColumn; s += V::kStep) step(i + s);
    };
    Index i = 0;
    for (; i + kShareColumns * kColumn <= count; i += kShareColumns * kColumn) {
#pragma GCC unroll 4
        for (int nth = 0; nth < kShareColumns; nth++) column(i + nth * kColumn, nth);
    }
    for (int nth = 0; i + kColumn <= count; i += kColumn, nth++) column(i, nth);
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
            Quad sums = sum4(acc[m][r], acc[m][r + 1], acc[m][r + 2], acc[m][r + 3]), before;
            if (at != 0) {
                std::memcpy(&before, to, sizeof before);
                sums = before + sums;
            }
            std::memcpy(to, &sums, sizeof sums);
        }
    }
}

template <class V>
using Segment = void (*)(const typename V::Weight *, Index, Index, Index, const void *const *, float *, Index,
                         const Share &);

// By reference: a copy of `share` on the stack would be read in other pieces than it was written in, and wait for all
// stores before it.
template <class V, int R, int M, int Lines>
void segment(const typename V::Weight *w, Index depth, Index at, Index count, const void *const *x, float *out,
             Index out_stride, const Share &share) {
    if (count == kSegment) {
        add_segment<V, R, M, Lines>(w, depth, at, kSegment, x, out, out_stride, share);
    } else {
        add_segment<V, R, M, Lines>(w, depth, at, count, x, out, out_stride, share);
    }
}

// Calls `run` with the number of tokens as a constant, 1 to M.
template <int M, class Run>
EXPERTSHARE_INLINE void with_tokens(Index num_tokens, Run run) {
    if constexpr (M > 1) {
        if (num_tokens < M) return with_tokens<M - 1>(num_tokens, run);
    }
    run(std::integral_constant<int, M>{});
}

constexpr int kShares[] = {0, 1, 2, 3, 4, 5, 6, 8, 16};  // lines in four columns
constexpr int kNumShares = sizeof kShares / sizeof *kShares;

// Which of them is `lines` or the next above, as far as that goes.
inline int share_of(Index lines) {
    int which = 0;
    while (which + 1 < kNumShares && kShares[which] < lines) which++;
    return which;
}

template <class V, int R, int Which, int M>
Segment<V> segment_for(Index num_tokens) {
    if constexpr (M > 1) {
        if (num_tokens < M) return segment_for<V, R, Which, M - 1>(num_tokens);
    }
    return segment<V, R, M, kShares[Which]>;
}

template <class V, int R, int M, int Which = 0>
Segment<V> sharing_segment(int which, Index num_tokens) {
    if constexpr (Which + 1 < kNumShares) {
        if (which > Which) return sharing_segment<V, R, M, Which + 1>(which, num_tokens);
    }
    return segment_for<V, R, Which, M>(num_tokens);
}

// Two tiles of tokens at most, as even as it goes, and which of the next rows each fetches into the first cache.
template <class V, int R, int M>
struct Part {
    struct TokenTile {
        Index from, size, near, num_near;
        Segment<V> idle, sharing;
    };
    Index num_tiles;
    TokenTile tiles[2];

    Part(Index first, Index size) : num_tiles((size + M - 1) / M) {
        for (Index i = 0; i < num_tiles; i++) {
            const Index from = size * i / num_tiles, near = R * i / num_tiles;
            TokenTile &tile = tiles[i];
            tile = {first + from, size * (i + 1) / num_tiles - from, near, R * (i + 1) / num_tiles - near, nullptr,
                    nullptr};
            tile.idle = sharing_segment<V, R, M>(0, tile.size);
        }
    }

    // Before a pass: from now on each tile is to fetch kShares[which] lines in four columns.
    void share(int which) {
        for (Index i = 0; i < num_tiles; i++) tiles[i].sharing = sharing_segment<V, R, M>(which, tiles[i].size);
    }
};

// More tokens: two tiles of them at a time meet the same rows one after the other, segment by segment. With three tiles
// or more, tokens that are only ever read from the first cache grow old in the second, which then takes them out of
// both. `next` is fetched meanwhile, evenly, so that arithmetic on many tokens and the memory's work overlap. Whatever
// takes a division is done once a pass: a segment is some two hundred cycles.
template <class V, int R, int M>
void many_tokens(const typename V::Weight *w, Index num_blocks, Index depth, const void *const *x, Index num_tokens,
                 float *out, Index out_stride, const typename V::Weight *next) {
    constexpr Index kPart = 2 * M;
    constexpr Index kBytes = sizeof(typename V::Weight), kFour = kShareColumns * kLineBytes / kBytes;
    const Index num_parts = (num_tokens + kPart - 1) / kPart, num_segments = (depth + kSegment - 1) / kSegment;
    Share share = {reinterpret_cast<const char *>(next), nullptr, 0, depth * kBytes};
    Index left = next == nullptr ? 0 : num_blocks * R * depth * kBytes / kLineBytes;
    for (Index p = 0; p < num_parts; p++) {
        const Index first = num_tokens * p / num_parts;
        Part<V, R, M> part(first, num_tokens * (p + 1) / num_parts - first);
        for (Index at = 0; at < depth; at += kSegment) {
            const Index count = std::min(kSegment, depth - at), fours = count / kFour;
            const Index passes = (num_parts - p) * num_segments - at / kSegment;
            const Index units = passes * num_blocks * part.num_tiles * fours;
            const int which = share_of(left > 0 && units > 0 ? (left + units - 1) / units : 0);
            const Index lines = kShares[which] * fours;
            part.share(which);
            for (Index b = 0; b < num_blocks; b++) {
                const typename V::Weight *block = w + b * R * depth + at;
                const typename V::Weight *then = b + 1 < num_blocks ? block + R * depth : w + at + count;
                for (Index i = 0; i < part.num_tiles; i++) {
                    const auto &tile = part.tiles[i];
                    share.near = reinterpret_cast<const char *>(then + tile.near * depth);
                    share.num_near = tile.num_near;
                    const Segment<V> run = left > 0 ? tile.sharing : tile.idle;
                    float *to = out + tile.from * out_stride + b * R;
                    run(block, depth, at, count, x + tile.from, to, out_stride, share);
                    share.ahead += lines * kLineBytes, left -= lines;
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
void multiply(const expertshare::Rows &w, Index num_rows, Index depth, const void *const *x, Index num_tokens,
              float *out, Index out_stride, const expertshare::Rows &next) {
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

// A token is packed as its features in the order of V::position_of, with zeros up to a whole vector: weights that are
// zeros times garbage could be NaN.
template <class V>
Index block_bytes(Index depth) {
    return (depth + V::kStep - 1) / V::kStep * V::kStep * static_cast<Index>(sizeof(typename V::Act));
}

template <class V>
void pad(Index end, Index depth, typename V::Act *token) {
    for (Index i = depth; end == depth && i % V::kStep != 0; i++) token[V::position_of(i)] = 0;
}

template <class V>
void pack(const void *const *x, Index, Index depth, Index begin, Index end, void *block) {
    using Weight = typename V::Weight;
    const Weight *from = static_cast<const Weight *>(x[0]);
    auto *to = static_cast<typename V::Act *>(block);
    if constexpr (sizeof(Weight) == sizeof(typename V::Act)) {
        std::memcpy(to + begin, from + begin, static_cast<std::size_t>(end - begin) * sizeof(Weight));
    } else {
        for (Index i = begin; i < end; i++) to[V::position_of(i)] = load(from[i]);
    }
    pad<V>(end, depth, to);
}

template <class V>
void swiglu(const float *gate, const float *up, Index first, Index count, Index depth, void *block, Index) {
    auto *to = static_cast<typename V::Act *>(block);
    float piece[kPiece];
    for (Index start = 0; start < count; start += kPiece) {
        const Index n = count - start < kPiece ? count - start : kPiece;
        for (Index i = 0; i < n; i++) piece[i] = silu(gate[start + i]) * up[start + i];
        for (Index i = 0; i < n; i++) {
            typename V::Weight rounded;
            store(&rounded, piece[i]);
            store(&to[V::position_of(first + start + i)], load(rounded));
        }
    }
    pad<V>(first + count, depth, to);
}

constexpr Index kGranule = 32;  // a multiple of every vector length: items never share a vector of a hidden token

template <class V>
constexpr expertshare::Kernels kernels_of() {
    return {1,         kGranule, block_bytes<V>, pack<V>,      multiply<V>,
            swiglu<V>, mix<V>,   round_row<V>,   exponentials, choose<V>};
}

}  // namespace
