// VPDPBUSD on 512-bit vectors: four features of 16 rows an instruction.
#include "packed_kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__F16C__)
#include <immintrin.h>

#include "packed_tile.h"

namespace {

struct PackedVnni512 {
    struct Ints {
        __m512i a, b, c, d;
    };
    using Weights = Ints;
    static constexpr Index kRows = 64, kMaxTokens = 6;

    static constexpr std::int32_t zero_of(int) { return 128; }
    static Ints all(std::int32_t a) {
        const __m512i each = _mm512_set1_epi32(a);
        return {each, each, each, each};
    }
    static Weights weights(const char *packed) {
        return {_mm512_load_si512(packed), _mm512_load_si512(packed + 64), _mm512_load_si512(packed + 128),
                _mm512_load_si512(packed + 192)};
    }
    static __m512i token(const std::int8_t *codes) {
        std::int32_t four;
        std::memcpy(&four, codes, sizeof four);
        return _mm512_set1_epi32(four);
    }
    // Not by the intrinsic: GCC 12 then also stores each of the 24 sums of a tile at every step.
    static void add_four(__m512i &sums, __m512i w, __m512i token) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(token));
    }
    static Ints dot(Ints sums, Weights w, __m512i token) {
        add_four(sums.a, w.a, token), add_four(sums.b, w.b, token);
        add_four(sums.c, w.c, token), add_four(sums.d, w.d, token);
        return sums;
    }
    static void add(__m512i sums, __m512 scale, float *out) {
        _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, _mm512_loadu_ps(out)));
    }
    static void accumulate(Ints sums, float scale, float *out) {
        const __m512 all = _mm512_set1_ps(scale);
        add(sums.a, all, out), add(sums.b, all, out + 16), add(sums.c, all, out + 32), add(sums.d, all, out + 48);
    }

    // 16 rows by 16 words of four codes, transposed; codes plus 128, as unsigned bytes.
    static void transpose(const char *const *rows, Index from, char *to) {
        const __m512i sign = _mm512_set1_epi8(-128);
        __m512i a[16], b[16];
        for (int r = 0; r < 16; r++) a[r] = _mm512_xor_si512(_mm512_loadu_si512(rows[r] + from), sign);
        for (int r = 0; r < 16; r += 2) {
            b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
            b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
        }
        for (int r = 0; r < 16; r += 4) {
            a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
            a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
            a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
            a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
        }
        for (int word = 0; word < 4; word++) {  // a[4 g + word]: rows 4 g .., words word, word + 4, + 8, + 12
            const __m512i even01 = _mm512_shuffle_i32x4(a[word], a[4 + word], 0x88);
            const __m512i odd01 = _mm512_shuffle_i32x4(a[word], a[4 + word], 0xdd);
            const __m512i even23 = _mm512_shuffle_i32x4(a[8 + word], a[12 + word], 0x88);
            const __m512i odd23 = _mm512_shuffle_i32x4(a[8 + word], a[12 + word], 0xdd);
            _mm512_store_si512(to + word * kQuadBytes, _mm512_shuffle_i32x4(even01, even23, 0x88));
            _mm512_store_si512(to + (word + 4) * kQuadBytes, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
            _mm512_store_si512(to + (word + 8) * kQuadBytes, _mm512_shuffle_i32x4(even01, even23, 0xdd));
            _mm512_store_si512(to + (word + 12) * kQuadBytes, _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
        }
    }
    static void pack(const char *const *rows, char *packed) {
        for (Index r = 0; r < kPackedRows; r += 16) {
            transpose(rows + r, 0, packed + r * 4);
            transpose(rows + r, 64, packed + 16 * kQuadBytes + r * 4);
        }
    }
};

constexpr expertshare::PackedKernels kernels = packed_kernels_of<PackedVnni512>();

}  // namespace

const expertshare::PackedKernels *const expertshare::packed_avx512_vnni = &kernels;
#else
const expertshare::PackedKernels *const expertshare::packed_avx512_vnni = nullptr;
#endif
