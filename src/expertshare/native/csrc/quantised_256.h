// What the kernels for 256-bit vectors share: 16 lanes are two vectors.
#pragma once

#include <immintrin.h>

#include "quantised_tile.h"

namespace {

struct Pairs256 {
    struct Ints {
        __m256i a, b;
    };
    struct Floats {
        __m256 a, b;
    };
    struct Codes {
        __m256i low_a, low_b, high_a, high_b;
    };
    static constexpr Index kMaxTokens = 2;

    static __m256i bytes_at(const void *from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }
    static Ints zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Ints load(const std::int32_t *ints) { return {bytes_at(ints), bytes_at(ints + 8)}; }
    static Floats floats(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
    static Floats multiply(Floats v, Floats w) { return {_mm256_mul_ps(v.a, w.a), _mm256_mul_ps(v.b, w.b)}; }
    static Floats fma(Floats v, Floats w, Floats acc) {
        return {_mm256_fmadd_ps(v.a, w.a, acc.a), _mm256_fmadd_ps(v.b, w.b, acc.b)};
    }
    static Floats all(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
    static Floats lanes(const float *a) { return {_mm256_loadu_ps(a), _mm256_loadu_ps(a + 8)}; }

    static Codes halves(const char *bytes) {
        const __m256i mask = _mm256_set1_epi8(15), a = bytes_at(bytes), b = bytes_at(bytes + 32);
        return {_mm256_and_si256(a, mask), _mm256_and_si256(b, mask), _mm256_and_si256(_mm256_srli_epi16(a, 4), mask),
                _mm256_and_si256(_mm256_srli_epi16(b, 4), mask)};
    }
    static Codes whole(const char *bytes) {
        return {bytes_at(bytes), bytes_at(bytes + 32), bytes_at(bytes + 64), bytes_at(bytes + 96)};
    }
    template <int Group>
    static Floats spread(const char *scales) {
        __m128i halves = _mm_setzero_si128();
        std::memcpy(&halves, scales, Group == 32 ? 8 : 4);
        const __m256 some = _mm256_castps128_ps256(_mm_cvtph_ps(halves));
        if constexpr (Group == 32) {
            return {_mm256_permutevar8x32_ps(some, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
                    _mm256_permutevar8x32_ps(some, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3))};
        } else {
            return {_mm256_broadcastss_ps(_mm256_castps256_ps128(some)),
                    _mm256_permutevar8x32_ps(some, _mm256_set1_epi32(1))};
        }
    }
    // In the order of avx512_sum.h.
    static __m256 quarters(__m256 a, __m256 b, __m256 c, __m256 d) {
        const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    }
    static void sum4(Floats a, Floats b, Floats c, Floats d, float *out) {
        const __m256 half = _mm256_add_ps(quarters(a.a, b.a, c.a, d.a), quarters(a.b, b.b, c.b, d.b));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
};

}  // namespace
