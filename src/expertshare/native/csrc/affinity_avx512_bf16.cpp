// The gate for bfloat16 tokens by VDPBF16PS, where the weights are bfloat16 too: twice the products an instruction.
//
// Routers are kept in float32, but most checkpoints hold them in bfloat16. Whether a strip of rows does is seen when it
// is read: if the low halves of all its weights are zero, their high halves are all there is. Products of two bfloat16
// are exact in float32, and so are the sums taken; a strip with other weights is multiplied in float32 as elsewhere.
#include "affinity_kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "affinity_avx512.h"

namespace {

using V = Tokens512;

// Two features of a token are a word; tokens lie side by side as words. An odd depth is packed as float32 instead.
bool in_pairs(bool is_bfloat16, Index depth) { return is_bfloat16 && depth % 2 == 0; }

void pack_words(const void *x, bool is_bfloat16, Index num_tokens, Index depth, Index begin, Index end, float *packed) {
    if (!in_pairs(is_bfloat16, depth)) return pack<V>(x, is_bfloat16, num_tokens, depth, begin, end, packed);
    pack_of<V>(static_cast<const float *>(x), num_tokens, depth / 2, begin / 2, end / 2, packed);
}

struct Strip {
    const float *w;
    Index depth, begin, end;
    alignas(64) std::uint32_t pairs[V::kRows][kStrip / 2];
};

// The high halves, side by side; returns whether they are all there is.
template <int Rows>
bool narrow_strip(Strip &strip) {
    alignas(64) std::uint16_t odd_halves[32];
    for (int i = 0; i < 32; i++) odd_halves[i] = static_cast<std::uint16_t>(2 * i + 1);
    const __m512i order = _mm512_load_si512(odd_halves);
    __m512i low = _mm512_setzero_si512();
    const Index count = strip.end - strip.begin;
    for (int r = 0; r < Rows; r++) {
        const float *row = strip.w + r * strip.depth + strip.begin;
        for (Index i = 0; i < count; i += 32) {
            const Index left = count - i;
            const __mmask16 first = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1u);
            const __mmask16 second = static_cast<__mmask16>(left >= 32 ? 0xffffu : left <= 16 ? 0u : (1u << (left - 16)) - 1u);
            const __m512i a = _mm512_maskz_loadu_epi32(first, row + i);
            const __m512i b = _mm512_maskz_loadu_epi32(second, row + i + 16);
            low = _mm512_or_si512(low, _mm512_or_si512(a, b));
            _mm512_store_si512(&strip.pairs[r][i / 2], _mm512_permutex2var_epi16(a, order, b));
        }
    }
    return _mm512_test_epi32_mask(low, _mm512_set1_epi32(0xffff)) == 0;
}

template <int Rows, int Halves>
void dot_pairs(const Strip &strip, const float *packed, const float *next, __m512 (&sums)[Rows][Halves]) {
    for (Index word = 0; word < (strip.end - strip.begin) / 2; word++) {
        if (word % (kLineFloats / 2) == 0) fetch_lines(next, Rows, strip.begin + 2 * word);
        __m512bh x[Halves];
        for (int half = 0; half < Halves; half++) {
            x[half] = reinterpret_cast<__m512bh>(
                _mm512_loadu_si512(packed + (strip.begin / 2 + word) * 2 * V::kLanes + half * V::kLanes));
        }
        for (int r = 0; r < Rows; r++) {
            const auto spread = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(strip.pairs[r][word])));
            for (int half = 0; half < Halves; half++) sums[r][half] = _mm512_dpbf16_ps(sums[r][half], spread, x[half]);
        }
    }
}

template <int Rows, int Halves>
void dot_widened(const Strip &strip, const float *packed, const float *next, __m512 (&sums)[Rows][Halves]) {
    for (Index i = strip.begin; i < strip.end; i += 2) {
        if (i % kLineFloats == 0) fetch_lines(next, Rows, i);
        for (int half = 0; half < Halves; half++) {
            const __m512i words = _mm512_loadu_si512(packed + i * V::kLanes + half * V::kLanes);
            const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
            const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
            for (int r = 0; r < Rows; r++) {
                const float *w = strip.w + r * strip.depth + i;
                sums[r][half] = V::fma(V::splat(w[1]), odd, V::fma(V::splat(w[0]), even, sums[r][half]));
            }
        }
    }
}

template <int Rows, int Halves>
void multiply_strips(const float *w, Index depth, const float *packed, float *logits, const float *next) {
    Strip strip;
    strip.w = w;
    strip.depth = depth;
    for (strip.begin = 0; strip.begin < depth; strip.begin = strip.end) {
        strip.end = strip.begin + kStrip < depth ? strip.begin + kStrip : depth;
        __m512 sums[Rows][Halves];
        for (int r = 0; r < Rows; r++) {
            for (int half = 0; half < Halves; half++) sums[r][half] = V::zero();
        }
        if (narrow_strip<Rows>(strip)) {
            dot_pairs<Rows, Halves>(strip, packed, next, sums);
        } else {
            dot_widened<Rows, Halves>(strip, packed, next, sums);
        }
        add_strip<V, Rows, Halves>(sums, strip.begin == 0, logits);
    }
}

void multiply_words(const float *w, Index num_rows, Index depth, const float *packed, bool is_bfloat16,
                    Index num_tokens, float *logits, const float *next) {
    if (!in_pairs(is_bfloat16, depth)) {
        return multiply<V>(w, num_rows, depth, packed, is_bfloat16, num_tokens, logits, next);
    }
    in_tiles<V>(num_rows, num_tokens, [&](auto rows, auto halves, Index first) {
        constexpr int kRows = decltype(rows)::value, kHalves = decltype(halves)::value;
        multiply_strips<kRows, kHalves>(w + first * depth, depth, packed, logits + first * 2 * V::kLanes,
                                        kRows == 1 ? nullptr : next);
    });
}

constexpr expertshare::AffinityKernels kernels = {2 * V::kLanes, V::kRows, pack_words, multiply_words, finish<V>};

}  // namespace

const expertshare::AffinityKernels *const expertshare::avx512_bf16_affinity = &kernels;
#else
const expertshare::AffinityKernels *const expertshare::avx512_bf16_affinity = nullptr;
#endif
