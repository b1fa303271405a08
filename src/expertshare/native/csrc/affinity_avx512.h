// Vectors of sixteen tokens, for files that are built for 512-bit vectors.
#pragma once

#include <immintrin.h>

#include "affinity_tile.h"

namespace {

struct Tokens512 {
    using Vector = __m512;
    static constexpr Index kLanes = 16;
    // Sixteen sums. More rows would not pay: at a power of two of features they all fall into one set of the cache.
    static constexpr int kRows = 8;

    static Vector zero() { return _mm512_setzero_ps(); }
    static Vector load(const float *from) { return _mm512_loadu_ps(from); }
    static Vector splat(float value) { return _mm512_set1_ps(value); }
    static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
    static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
    static void store(float *to, Vector value) { _mm512_storeu_ps(to, value); }
    static Vector widen_all(const float *from) { return load(from); }
    static Vector widen_all(const std::uint16_t *from) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }

    // Within the 128-bit lanes, then the lanes themselves.
    static void transpose(Vector (&square)[kLanes]) {
        Vector t[kLanes];
        for (int i = 0; i < 16; i += 4) {
            const Vector a = _mm512_unpacklo_ps(square[i], square[i + 1]);
            const Vector b = _mm512_unpackhi_ps(square[i], square[i + 1]);
            const Vector c = _mm512_unpacklo_ps(square[i + 2], square[i + 3]);
            const Vector d = _mm512_unpackhi_ps(square[i + 2], square[i + 3]);
            t[i] = _mm512_shuffle_ps(a, c, 0x44);
            t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
            t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
            t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
        }
        for (int i = 0; i < 4; i++) {
            const Vector a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
            const Vector b = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
            const Vector c = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
            const Vector d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
            square[i] = _mm512_shuffle_f32x4(a, b, 0x88);
            square[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
            square[i + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
            square[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
        }
    }
};

}  // namespace
