// The gate on 256-bit vectors: 16 tokens a block.
#include "affinity_kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "affinity_tile.h"

namespace {

struct Tokens256 {
    using Vector = __m256;
    static constexpr Index kLanes = 8;
    static constexpr int kRows = 6;  // twelve sums, of sixteen registers

    static Vector zero() { return _mm256_setzero_ps(); }
    static Vector load(const float *from) { return _mm256_loadu_ps(from); }
    static Vector splat(float value) { return _mm256_set1_ps(value); }
    static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
    static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
    static void store(float *to, Vector value) { _mm256_storeu_ps(to, value); }
    static Vector widen_all(const float *from) { return load(from); }
    static Vector widen_all(const std::uint16_t *from) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }

    static void transpose(Vector (&square)[kLanes]) {
        Vector t[kLanes];
        for (int i = 0; i < 8; i += 4) {
            const Vector a = _mm256_unpacklo_ps(square[i], square[i + 1]);
            const Vector b = _mm256_unpackhi_ps(square[i], square[i + 1]);
            const Vector c = _mm256_unpacklo_ps(square[i + 2], square[i + 3]);
            const Vector d = _mm256_unpackhi_ps(square[i + 2], square[i + 3]);
            t[i] = _mm256_shuffle_ps(a, c, 0x44);
            t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
            t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
            t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
        }
        for (int i = 0; i < 4; i++) {
            square[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
            square[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
        }
    }
};

constexpr expertshare::AffinityKernels kernels = affinity_kernels_of<Tokens256>();

}  // namespace

const expertshare::AffinityKernels *const expertshare::avx2_affinity = &kernels;
#else
const expertshare::AffinityKernels *const expertshare::avx2_affinity = nullptr;
#endif
