// VPDPBUSD on 512-bit vectors: four features of 16 rows an instruction.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__F16C__)
#include <immintrin.h>

#include "quantised_tile.h"

namespace {

struct Vnni512 {
    using Ints = __m512i;
    using Floats = __m512;
    using Codes = __m512i;
    static constexpr int kPanels = 2, kMaxTokens = 6;

    static constexpr std::int32_t zero_of(int bits) { return bits == 8 ? 128 : 8; }
    static Ints all(std::int32_t a) { return _mm512_set1_epi32(a); }
    static Floats all(float a) { return _mm512_set1_ps(a); }
    static Floats floats(Ints a) { return _mm512_cvtepi32_ps(a); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats acc) { return _mm512_fmadd_ps(a, b, acc); }
    static Floats scales(const char *halves) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(halves)));
    }
    static Floats load(const float *floats) { return _mm512_loadu_ps(floats); }
    static void store(Floats a, float *out) { _mm512_storeu_ps(out, a); }

    static Codes whole(const char *line) {  // plus 128, as unsigned bytes
        return _mm512_xor_si512(_mm512_loadu_si512(line), _mm512_set1_epi8(-128));
    }
    static Codes low(const char *line) { return _mm512_and_si512(_mm512_loadu_si512(line), _mm512_set1_epi8(15)); }
    static Codes high(const char *line) {
        return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(line), 4), _mm512_set1_epi8(15));
    }
    static __m512i token(const std::int8_t *codes) {
        std::int32_t four;
        std::memcpy(&four, codes, sizeof four);
        return _mm512_set1_epi32(four);
    }
    // Not by the intrinsic: GCC 12 then also stores each sum of a tile at every step.
    template <int Bits>
    static Ints dot(Ints sums, Codes codes, __m512i token) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(token));
        return sums;
    }
};

constexpr expertshare::Kernels kernels[] = EXPERTSHARE_QUANTISED_KERNELS(Vnni512);

}  // namespace

const expertshare::Kernels *const expertshare::quantised_avx512_vnni = kernels;
#else
const expertshare::Kernels *const expertshare::quantised_avx512_vnni = nullptr;
#endif
