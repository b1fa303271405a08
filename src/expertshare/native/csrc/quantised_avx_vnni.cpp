// VPDPBUSD on 256-bit vectors, for processors that have it without AVX-512.
#include "kernels.h"

#if defined(__AVXVNNI__) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "quantised_256.h"

namespace {

struct Vnni256 : Pairs256 {
    static constexpr std::int32_t zero_of(int bits) { return bits == 8 ? 128 : 8; }

    template <int Bits>
    static Codes codes(const char *bytes) {
        if constexpr (Bits == 4) return halves(bytes);
        const __m256i sign = _mm256_set1_epi8(-128);
        const Codes c = whole(bytes);
        return {_mm256_xor_si256(c.low_a, sign), _mm256_xor_si256(c.low_b, sign), _mm256_xor_si256(c.high_a, sign),
                _mm256_xor_si256(c.high_b, sign)};
    }
    template <int Bits>
    static Ints dot(Ints sums, const Codes &c, const std::int8_t *token) {
        sums.a = _mm256_dpbusd_avx_epi32(sums.a, c.low_a, bytes_at(token));
        sums.b = _mm256_dpbusd_avx_epi32(sums.b, c.low_b, bytes_at(token + 32));
        return {_mm256_dpbusd_avx_epi32(sums.a, c.high_a, bytes_at(token + 64)),
                _mm256_dpbusd_avx_epi32(sums.b, c.high_b, bytes_at(token + 96))};
    }
};

constexpr expertshare::Kernels kernels[] = EXPERTSHARE_QUANTISED_KERNELS(Vnni256);

}  // namespace

const expertshare::Kernels *const expertshare::quantised_avx_vnni = kernels;
#else
const expertshare::Kernels *const expertshare::quantised_avx_vnni = nullptr;
#endif
