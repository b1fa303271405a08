// VPDPBUSD on 256-bit vectors, for processors that have it without AVX-512.
#include "kernels.h"

#if defined(__AVXVNNI__) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "quantised_256.h"

namespace {

struct Vnni256 : Pairs256 {
    static constexpr std::int32_t zero_of(int bits) { return bits == 8 ? 128 : 8; }

    static Codes whole(const char *line) {  // plus 128, as unsigned bytes
        const __m256i sign = _mm256_set1_epi8(-128);
        return {_mm256_xor_si256(bytes_at(line), sign), _mm256_xor_si256(bytes_at(line + 32), sign)};
    }
    template <int Bits>
    static Ints dot(Ints sums, const Codes &c, __m256i token) {
        return {_mm256_dpbusd_avx_epi32(sums.a, c.a, token), _mm256_dpbusd_avx_epi32(sums.b, c.b, token)};
    }
};

constexpr expertshare::Kernels kernels[] = EXPERTSHARE_QUANTISED_KERNELS(Vnni256);

}  // namespace

const expertshare::Kernels *const expertshare::quantised_avx_vnni = kernels;
#else
const expertshare::Kernels *const expertshare::quantised_avx_vnni = nullptr;
#endif
