// float32 by fused multiply-add on 256-bit vectors, and bfloat16 widened to it.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "tile.h"

namespace {

struct Sums256 {
    using Acc = __m256;
    static constexpr bool kHoldsRows = false;  // sixteen registers
    static Acc zero() { return _mm256_setzero_ps(); }
    static Quad sum4(Acc a, Acc b, Acc c, Acc d) {
        const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
    }
};

struct Floats256 : Sums256 {
    using Weight = float;
    using Act = float;
    using Loaded = __m256;
    static constexpr Index kStep = 8, kMaxTokens = 3;

    static Index place(Index i) { return i; }
    static Loaded load(const Weight *w) { return _mm256_loadu_ps(w); }
    static Loaded load_some(const Weight *w, int n) {
        float padded[kStep] = {};
        std::memcpy(padded, w, static_cast<std::size_t>(n) * sizeof(Weight));
        return _mm256_loadu_ps(padded);
    }
    static Acc dot(Acc acc, Loaded w, const Act *x) { return _mm256_fmadd_ps(w, _mm256_loadu_ps(x), acc); }
};

// As in avx512.cpp: even features of each step, then odd ones.
struct Widened256 : Sums256 {
    using Weight = std::uint16_t;
    using Act = float;
    struct Loaded {
        __m256 even, odd;
    };
    static constexpr Index kStep = 16, kMaxTokens = 3;

    static Index place(Index i) { return i / kStep * kStep + i % 2 * (kStep / 2) + i % kStep / 2; }
    static Loaded split(__m256i words) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536)))};
    }
    static Loaded load(const Weight *w) { return split(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(w))); }
    static Loaded load_some(const Weight *w, int n) {
        Weight padded[kStep] = {};
        std::memcpy(padded, w, static_cast<std::size_t>(n) * sizeof(Weight));
        return load(padded);
    }
    static Acc dot(Acc acc, Loaded w, const Act *x) {
        acc = _mm256_fmadd_ps(w.even, _mm256_loadu_ps(x), acc);
        return _mm256_fmadd_ps(w.odd, _mm256_loadu_ps(x + kStep / 2), acc);
    }
};

constexpr expertshare::Kernels floats = kernels_of<Floats256>();
constexpr expertshare::Kernels widened = kernels_of<Widened256>();

}  // namespace

const expertshare::Kernels *const expertshare::avx2_float32 = &floats;
const expertshare::Kernels *const expertshare::avx2_bfloat16 = &widened;
#else
const expertshare::Kernels *const expertshare::avx2_float32 = nullptr;
const expertshare::Kernels *const expertshare::avx2_bfloat16 = nullptr;
#endif
