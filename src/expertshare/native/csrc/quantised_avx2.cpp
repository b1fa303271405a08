// VPMADDUBSW on 256-bit vectors. It saturates at 16 bits, which these products never reach: two of at most 15 * 127, or
// two of 127 * 127 where the sign of the weight is moved to the token.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "quantised_256.h"

namespace {

struct Words256 : Pairs256 {
    static constexpr std::int32_t zero_of(int bits) { return bits == 8 ? 0 : 8; }

    static Codes whole(const char *line) { return {bytes_at(line), bytes_at(line + 32)}; }
    template <int Bits>
    static __m256i add(__m256i sums, __m256i codes, __m256i token) {
        const __m256i words = Bits == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(token, codes))
                                        : _mm256_maddubs_epi16(codes, token);
        return _mm256_add_epi32(sums, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
    }
    template <int Bits>
    static Ints dot(Ints sums, const Codes &c, __m256i token) {
        return {add<Bits>(sums.a, c.a, token), add<Bits>(sums.b, c.b, token)};
    }
};

constexpr expertshare::Kernels kernels[] = EXPERTSHARE_QUANTISED_KERNELS(Words256);

}  // namespace

const expertshare::Kernels *const expertshare::quantised_avx2 = kernels;
#else
const expertshare::Kernels *const expertshare::quantised_avx2 = nullptr;
#endif
