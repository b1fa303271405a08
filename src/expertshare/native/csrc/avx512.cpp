// float32 by fused multiply-add on 512-bit vectors, and bfloat16 widened to it where there is no VDPBF16PS.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "avx512_sum.h"
#include "tile.h"

namespace {

struct Floats512 {
    using Weight = float;
    using Act = float;
    using Acc = __m512;
    using Loaded = __m512;
    static constexpr Index kStep = 16, kMaxTokens = 6;
    static constexpr bool kHoldsRows = true;

    static Index place(Index i) { return i; }
    static Acc zero() { return _mm512_setzero_ps(); }
    static Loaded load(const Weight *w) { return _mm512_loadu_ps(w); }
    static Loaded load_some(const Weight *w, int n) {
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), w);
    }
    static Acc dot(Acc acc, Loaded w, const Act *x) { return _mm512_fmadd_ps(w, _mm512_loadu_ps(x), acc); }
    static Quad sum4(Acc a, Acc b, Acc c, Acc d) { return sums_of_four(a, b, c, d); }
};

// Of each 32-bit word the low half is shifted up and the high half masked: even features, then odd ones. Activations
// lie in the scratch in that order, as float32, so that one vector of weights costs two instructions for all tokens.
struct Widened512 {
    using Weight = std::uint16_t;
    using Act = float;
    using Acc = __m512;
    struct Loaded {
        __m512 even, odd;
    };
    static constexpr Index kStep = 32, kMaxTokens = 5;
    static constexpr bool kHoldsRows = true;

    static Index place(Index i) { return i / kStep * kStep + i % 2 * (kStep / 2) + i % kStep / 2; }
    static Acc zero() { return _mm512_setzero_ps(); }
    static Loaded split(__m512i words) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)))};
    }
    static Loaded load(const Weight *w) { return split(_mm512_loadu_si512(w)); }
    static Loaded load_some(const Weight *w, int n) { return split(_mm512_maskz_loadu_epi16((1u << n) - 1u, w)); }
    static Acc dot(Acc acc, Loaded w, const Act *x) {
        acc = _mm512_fmadd_ps(w.even, _mm512_loadu_ps(x), acc);
        return _mm512_fmadd_ps(w.odd, _mm512_loadu_ps(x + kStep / 2), acc);
    }
    static Quad sum4(Acc a, Acc b, Acc c, Acc d) { return sums_of_four(a, b, c, d); }
};

constexpr expertshare::Kernels floats = kernels_of<Floats512>();
constexpr expertshare::Kernels widened = kernels_of<Widened512>();

}  // namespace

const expertshare::Kernels *const expertshare::avx512_float32 = &floats;
const expertshare::Kernels *const expertshare::avx512_bfloat16 = &widened;
#else
const expertshare::Kernels *const expertshare::avx512_float32 = nullptr;
const expertshare::Kernels *const expertshare::avx512_bfloat16 = nullptr;
#endif
