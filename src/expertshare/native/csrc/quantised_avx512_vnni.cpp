// VPDPBUSD on 512-bit vectors: 64 products of an unsigned and a signed byte an instruction.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__F16C__)
#include "avx512_sum.h"
#include "quantised_tile.h"

namespace {

struct Vnni512 {
    using Ints = __m512i;
    using Floats = __m512;
    struct Codes {
        __m512i low, high;
    };
    static constexpr Index kMaxTokens = 4;

    static constexpr std::int32_t zero_of(int bits) { return bits == 8 ? 128 : 8; }
    static Ints zero() { return _mm512_setzero_si512(); }
    static Ints load(const std::int32_t *ints) { return _mm512_load_si512(ints); }
    static Floats floats(Ints a) { return _mm512_cvtepi32_ps(a); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats acc) { return _mm512_fmadd_ps(a, b, acc); }
    static Floats all(float a) { return _mm512_set1_ps(a); }
    static Floats lanes(const float *a) { return _mm512_load_ps(a); }

    template <int Bits>
    static Codes codes(const char *bytes) {
        const __m512i first = _mm512_loadu_si512(bytes);
        if constexpr (Bits == 8) {  // plus 128, as unsigned bytes
            const __m512i sign = _mm512_set1_epi8(-128);
            return {_mm512_xor_si512(first, sign), _mm512_xor_si512(_mm512_loadu_si512(bytes + 64), sign)};
        } else {
            const __m512i mask = _mm512_set1_epi8(15);
            return {_mm512_and_si512(first, mask), _mm512_and_si512(_mm512_srli_epi16(first, 4), mask)};
        }
    }
    template <int Bits>
    static Ints dot(Ints sums, Codes codes, const std::int8_t *token) {
        sums = _mm512_dpbusd_epi32(sums, codes.low, _mm512_load_si512(token));
        return _mm512_dpbusd_epi32(sums, codes.high, _mm512_load_si512(token + 64));
    }
    template <int Group>
    static Floats spread(const char *scales) {
        if constexpr (Group == 32) {
            const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            const __m128 four = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(scales)));
            return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(four));
        } else {
            const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            int both;
            std::memcpy(&both, scales, sizeof both);
            return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi32_si128(both))));
        }
    }
    static void sum4(Floats a, Floats b, Floats c, Floats d, float *out) { store_sum4(a, b, c, d, out); }
};

constexpr expertshare::Kernels kernels[] = EXPERTSHARE_QUANTISED_KERNELS(Vnni512);

}  // namespace

const expertshare::Kernels *const expertshare::quantised_avx512_vnni = kernels;
#else
const expertshare::Kernels *const expertshare::quantised_avx512_vnni = nullptr;
#endif
