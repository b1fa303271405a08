// The gate for bfloat16 tokens by VDPBF16PS, where the weights are bfloat16 too: twice the products an instruction,
// each exact in float32, and so are the sums taken. Weights in float32 are multiplied in float32, as elsewhere.
#include "affinity_kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include <algorithm>

#include "affinity_avx512.h"

namespace {

using V = Tokens512;

// Two features of a token are a word; tokens lie side by side as words. An odd depth is packed as float32 instead.
bool in_pairs(bool is_bfloat16, Index depth) { return is_bfloat16 && depth % 2 == 0; }

void pack_words(const void *x, bool is_bfloat16, Index num_tokens, Index depth, Index begin, Index end, float *packed) {
    if (!in_pairs(is_bfloat16, depth)) return pack<V>(x, is_bfloat16, num_tokens, depth, begin, end, packed);
    pack_of<V>(static_cast<const float *>(x), num_tokens, depth / 2, begin / 2, end / 2, packed);
}

// Features begin .. end of Rows rows, two at a time.
template <int Rows, int Halves>
void dot_pairs(const std::uint16_t *w, Index depth, Index begin, Index end, const float *packed, const void *next,
               __m512 (&sums)[Rows][Halves]) {
    for (Index i = begin; i < end; i += 2) {
        if (2 * i % kLineBytes == 0) fetch_lines(next, Rows, 2 * i);
        __m512bh x[Halves];
        for (int half = 0; half < Halves; half++) {
            x[half] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(packed + i * V::kLanes + half * V::kLanes));
        }
        for (int r = 0; r < Rows; r++) {
            std::int32_t pair;
            std::memcpy(&pair, w + r * depth + i, sizeof pair);
            const auto spread = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
            for (int half = 0; half < Halves; half++) sums[r][half] = _mm512_dpbf16_ps(sums[r][half], spread, x[half]);
        }
    }
}

template <int Rows, int Halves>
void dot_pairs(const float *w, Index depth, Index begin, Index end, const float *packed, const void *next,
               __m512 (&sums)[Rows][Halves]) {
    for (Index i = begin; i < end; i += 2) {
        if (4 * i % kLineBytes == 0) fetch_lines(next, Rows, 4 * i);
        for (int half = 0; half < Halves; half++) {
            const __m512i words = _mm512_loadu_si512(packed + i * V::kLanes + half * V::kLanes);
            const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
            const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
            for (int r = 0; r < Rows; r++) {
                const float *pair = w + r * depth + i;
                sums[r][half] = V::fma(V::splat(pair[1]), odd, V::fma(V::splat(pair[0]), even, sums[r][half]));
            }
        }
    }
}

template <class Weight>
void multiply_pairs(const Weight *w, Index num_rows, Index depth, const float *packed, Index num_tokens, float *logits,
                    const void *next) {
    in_tiles<V>(num_rows, num_tokens, [&](auto rows, auto halves, Index first) {
        constexpr int kRows = decltype(rows)::value, kHalves = decltype(halves)::value;
        for (Index begin = 0; begin < depth; begin += kStrip) {
            __m512 sums[kRows][kHalves];
            for (int r = 0; r < kRows; r++) {
                for (int half = 0; half < kHalves; half++) sums[r][half] = V::zero();
            }
            dot_pairs<kRows, kHalves>(w + first * depth, depth, begin, std::min(depth, begin + kStrip), packed,
                                      kRows == 1 ? nullptr : next, sums);
            add_strip<V, kRows, kHalves>(sums, begin == 0, logits + first * 2 * V::kLanes);
        }
    });
}

void multiply_words(const GateRows &w, Index num_rows, Index depth, const float *packed, bool is_bfloat16,
                    Index num_tokens, float *logits) {
    if (!in_pairs(is_bfloat16, depth)) {
        return multiply<V>(w, num_rows, depth, packed, is_bfloat16, num_tokens, logits);
    }
    if (w.is_bfloat16) {
        return multiply_pairs(static_cast<const std::uint16_t *>(w.at), num_rows, depth, packed, num_tokens, logits,
                              w.next);
    }
    multiply_pairs(static_cast<const float *>(w.at), num_rows, depth, packed, num_tokens, logits, w.next);
}

constexpr expertshare::AffinityKernels kernels = {2 * V::kLanes, V::kRows, pack_words, multiply_words, finish<V>};

}  // namespace

const expertshare::AffinityKernels *const expertshare::avx512_bf16_affinity = &kernels;
#else
const expertshare::AffinityKernels *const expertshare::avx512_bf16_affinity = nullptr;
#endif
