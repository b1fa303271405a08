// The arithmetic of router scores, side by side for a block of two vectors of tokens.
//
// A feature of W is spread over a vector and multiplied with two vectors of tokens: no sums across lanes, and the
// tokens, which stay in the second cache, are read once for every kRows experts. Each sum is taken in strips of kStrip
// features, whose sums are added up in order: 2048 terms in one chain would round more than torch's product does.
#include "kernels.h"

#include <algorithm>

#include "epilogue.h"
#include "vec.h"

namespace {

using expertshare::Rows;

// At a time: sixteen sums of 32 registers, or twelve of sixteen. More than eight would not pay: at a power of two of
// features they all fall into one set of the cache.
constexpr int kRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 4;
constexpr Index kWidth = 2 * kLanes;
constexpr Index kStrip = 256;

// As much of the rows that follow as is read now, front to back: rows are contiguous, and memory is fastest in order.
// `offset`: bytes into a row.
inline void fetch_lines(const void *next, Index num_rows, Index offset) {
    if (next == nullptr) return;
    const char *from = static_cast<const char *>(next) + offset * num_rows;
    for (Index r = 0; r < num_rows; r++) prefetch(from + r * kLineBytes);
}

// Packed one by one: features begin .. end of the rows of w.
template <int R, int Halves, class Weight>
struct OneByOne {
    static void add(const Weight *w, Index depth, Index begin, Index end, const float *packed, const void *next,
                    Floats (&sums)[R][Halves]) {
        constexpr Index kLine = kLineBytes / static_cast<Index>(sizeof(Weight));
        for (Index line = begin; line < end; line += kLine) {
            fetch_lines(next, R, line * static_cast<Index>(sizeof(Weight)));
            const Index stop = std::min(line + kLine, end);
            for (Index i = line; i < stop; i++) {
                Floats x[Halves];
                const float *features = packed + i * kWidth;
                for (int half = 0; half < Halves; half++) x[half] = load_vec<Floats>(features + half * kLanes);
                for (int r = 0; r < R; r++) {
                    const Floats spread = splat<Floats>(load(w[r * depth + i]));
                    for (int half = 0; half < Halves; half++) sums[r][half] = fma(spread, x[half], sums[r][half]);
                }
            }
        }
    }
};

#if EXPERTSHARE_LEVEL == EXPERTSHARE_LEVEL_avx512_bf16
// Packed in pairs: two features of a token are a word. Twice the products an instruction where the weights are bfloat16
// too, each exact in float32, and so are the sums taken; weights in float32 are multiplied in float32, as elsewhere.
template <int R, int Halves, class Weight>
struct InPairs {
    static void add(const Weight *w, Index depth, Index begin, Index end, const float *packed, const void *next,
                    Floats (&sums)[R][Halves]) {
        for (Index i = begin; i < end; i += 2) {
            const Index offset = i * static_cast<Index>(sizeof(Weight));
            if (offset % kLineBytes == 0) fetch_lines(next, R, offset);
            Words x[Halves];
            for (int half = 0; half < Halves; half++) x[half] = load_vec<Words>(packed + (i + half) * kLanes);
            for (int r = 0; r < R; r++) {
                const Weight *pair = w + r * depth + i;
                for (int half = 0; half < Halves; half++) sums[r][half] = dot(pair, x[half], sums[r][half]);
            }
        }
    }
    static Floats dot(const std::uint16_t *pair, Words x, Floats sum) {
        std::uint32_t both;
        std::memcpy(&both, pair, sizeof both);
        return _mm512_dpbf16_ps(sum, bits_as<__m512bh>(splat<Words>(both)), bits_as<__m512bh>(x));
    }
    static Floats dot(const float *pair, Words x, Floats sum) {
        return fma(splat<Floats>(pair[1]), widen_odd(x), fma(splat<Floats>(pair[0]), widen_even(x), sum));
    }
};

// An odd depth is packed one by one.
template <class Token>
bool in_pairs(Index depth) {
    return sizeof(Token) == 2 && depth % 2 == 0;
}
#else
template <int R, int Halves, class Weight>
using InPairs = OneByOne<R, Halves, Weight>;

template <class Token>
bool in_pairs(Index) {
    return false;
}
#endif

template <class Product, int R, int Halves, class Weight>
void multiply_rows(const Weight *w, Index depth, const float *packed, Index num_tokens, float *out, Index out_stride,
                   const void *next) {
    alignas(64) float totals[R][Halves * kLanes];
    for (Index begin = 0; begin < depth; begin += kStrip) {
        Floats sums[R][Halves] = {};
        Product::add(w, depth, begin, std::min(begin + kStrip, depth), packed, next, sums);
        for (int r = 0; r < R; r++) {
            for (int half = 0; half < Halves; half++) {
                float *total = totals[r] + half * kLanes;
                store_vec(total, begin == 0 ? sums[r][half] : load_vec<Floats>(total) + sums[r][half]);
            }
        }
    }
    for (Index t = 0; t < num_tokens; t++) {
        for (int r = 0; r < R; r++) out[t * out_stride + r] = totals[r][t];
    }
}

// As many whole blocks of rows as there are, the others one after the other; one vector is enough for few tokens.
template <template <int, int, class> class Product, class Weight>
void multiply_block(const Weight *w, Index num_rows, Index depth, const float *packed, Index num_tokens, float *out,
                    Index out_stride, const void *next) {
    const auto of_height = [&](auto rows, Index first, const void *then) {
        constexpr int R = decltype(rows)::value;
        const auto run = num_tokens <= kLanes ? multiply_rows<Product<R, 1, Weight>, R, 1, Weight>
                                              : multiply_rows<Product<R, 2, Weight>, R, 2, Weight>;
        run(w + first * depth, depth, packed, num_tokens, out + first, out_stride, then);
    };
    Index r = 0;
    for (; r + kRows <= num_rows; r += kRows) {
        of_height(std::integral_constant<int, kRows>{}, r, r + 2 * kRows <= num_rows ? nullptr : next);
    }
    for (; r < num_rows; r++) of_height(std::integral_constant<int, 1>{}, r, nullptr);
}

template <class Token, class Weight>
void multiply(const Rows &w, Index num_rows, Index depth, const void *const *blocks, Index num_tokens, float *out,
              Index out_stride, const Rows &next) {
    const auto run = in_pairs<Token>(depth) ? multiply_block<InPairs, Weight> : multiply_block<OneByOne, Weight>;
    for (Index m = 0; m < num_tokens; m += kWidth) {
        run(reinterpret_cast<const Weight *>(w.codes), num_rows, depth, static_cast<const float *>(blocks[m / kWidth]),
            std::min(kWidth, num_tokens - m), out + m * out_stride, out_stride, m == 0 ? next.codes : nullptr);
    }
}

// [depth, kWidth]: zeros behind the last token.
template <class Feature>
void pack_features(const void *const *x, Index num_tokens, Index begin, Index end, float *packed) {
    const auto token = [x](Index t) { return static_cast<const Feature *>(x[t]); };
    Index i = begin;
    for (; i + kLanes <= end; i += kLanes) {
        for (Index from = 0; from < kWidth; from += kLanes) {
            Floats square[kLanes];
            for (Index t = 0; t < kLanes; t++) {
                square[t] = from + t < num_tokens ? widen_all(token(from + t) + i) : Floats{};
            }
            transpose(square);
            for (Index k = 0; k < kLanes; k++) store_vec(packed + (i + k) * kWidth + from, square[k]);
        }
    }
    for (; i < end; i++) {
        for (Index t = 0; t < kWidth; t++) packed[i * kWidth + t] = t < num_tokens ? load(token(t)[i]) : 0.0f;
    }
}

template <class Token>
void pack(const void *const *x, Index num_tokens, Index depth, Index begin, Index end, void *block) {
    float *packed = static_cast<float *>(block);
    if (in_pairs<Token>(depth)) return pack_features<float>(x, num_tokens, begin / 2, end / 2, packed);  // words
    pack_features<Token>(x, num_tokens, begin, end, packed);
}

Index block_bytes(Index depth) { return depth * kWidth * static_cast<Index>(sizeof(float)); }

inline void softmax(float *row, Index count) {
    constexpr Index kSums = 16;
    float most = row[0];
    for (Index e = 1; e < count; e++) most = most < row[e] ? row[e] : most;
    float sums[kSums] = {};
    const Index whole = count / kSums * kSums;
    for (Index e = 0; e < count; e++) row[e] = exp_clamped(clamped(row[e] - most));
    for (Index e = 0; e < whole; e += kSums) {
        for (Index i = 0; i < kSums; i++) sums[i] += row[e + i];
    }
    for (Index e = whole; e < count; e++) sums[0] += row[e];
    float total = 0.0f;
    for (Index i = 0; i < kSums; i++) total += sums[i];
    for (Index e = 0; e < count; e++) row[e] /= total;
}

void finish(float *logits, Index num_experts, bool is_softmax, const float *bias, float *choice) {
    if (is_softmax) {
        softmax(logits, num_experts);
    } else {
        for (Index e = 0; e < num_experts; e++) logits[e] = 1.0f / (1.0f + exp_clamped(clamped(-logits[e])));
    }
    if (choice == nullptr) return;
    for (Index e = 0; e < num_experts; e++) choice[e] = logits[e] + bias[e];
}

template <class Token, class Weight>
constexpr expertshare::Kernels product() {
    return {kWidth,  2 * kLanes, block_bytes, pack<Token>, multiply<Token, Weight>,
            nullptr, nullptr,    nullptr,     nullptr,     nullptr};
}

constexpr expertshare::RouterKernels kernels = {
    {{product<float, float>(), product<float, std::uint16_t>()},
     {product<std::uint16_t, float>(), product<std::uint16_t, std::uint16_t>()}},
    kRows,
    finish};

}  // namespace

const expertshare::RouterKernels *const expertshare::EXPERTSHARE_TABLE(router) = &kernels;
