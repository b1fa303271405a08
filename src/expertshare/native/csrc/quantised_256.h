// What the kernels for 256-bit vectors share: 16 rows are two vectors.
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
    using Codes = Ints;
    static constexpr int kPanels = 1, kMaxTokens = 2;

    static __m256i bytes_at(const char *from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)); }
    static Ints all(std::int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
    static Floats all(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
    static Floats floats(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
    static Floats multiply(Floats v, Floats w) { return {_mm256_mul_ps(v.a, w.a), _mm256_mul_ps(v.b, w.b)}; }
    static Floats fma(Floats v, Floats w, Floats acc) {
        return {_mm256_fmadd_ps(v.a, w.a, acc.a), _mm256_fmadd_ps(v.b, w.b, acc.b)};
    }
    static Floats scales(const char *halves) {
        const __m256i both = bytes_at(halves);
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(both)), _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1))};
    }
    static Floats load(const float *from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
    static void store(Floats v, float *out) { _mm256_storeu_ps(out, v.a), _mm256_storeu_ps(out + 8, v.b); }

    static Codes low(const char *line) {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(bytes_at(line), mask), _mm256_and_si256(bytes_at(line + 32), mask)};
    }
    static Codes high(const char *line) {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(_mm256_srli_epi16(bytes_at(line), 4), mask),
                _mm256_and_si256(_mm256_srli_epi16(bytes_at(line + 32), 4), mask)};
    }
    static __m256i token(const std::int8_t *codes) {
        std::int32_t four;
        std::memcpy(&four, codes, sizeof four);
        return _mm256_set1_epi32(four);
    }
};

}  // namespace
