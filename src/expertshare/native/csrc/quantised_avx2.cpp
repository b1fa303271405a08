// VPMADDUBSW on 256-bit vectors. It saturates at 16 bits, which these products never reach: two of at most 15 * 127 and
// their sum with two more, or two of 128 * 127 where the sign of the weight is moved to the token.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "quantised_256.h"

namespace {

struct Words256 : Pairs256 {
    static constexpr std::int32_t zero_of(int bits) { return bits == 8 ? 0 : 8; }

    template <int Bits>
    static Codes codes(const char *bytes) {
        return Bits == 8 ? whole(bytes) : halves(bytes);
    }
    static __m256i pairs(__m256i words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }
    static __m256i signed_words(__m256i weights, __m256i token) {
        return _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(token, weights));
    }
    template <int Bits>
    static __m256i lanes_of(__m256i sums, __m256i low, __m256i high, const std::int8_t *token) {
        const __m256i t = bytes_at(token), u = bytes_at(token + 64);
        if constexpr (Bits == 8) {
            sums = _mm256_add_epi32(sums, pairs(signed_words(low, t)));
            return _mm256_add_epi32(sums, pairs(signed_words(high, u)));
        } else {
            const __m256i words = _mm256_add_epi16(_mm256_maddubs_epi16(low, t), _mm256_maddubs_epi16(high, u));
            return _mm256_add_epi32(sums, pairs(words));
        }
    }
    template <int Bits>
    static Ints dot(Ints sums, const Codes &c, const std::int8_t *token) {
        return {lanes_of<Bits>(sums.a, c.low_a, c.high_a, token), lanes_of<Bits>(sums.b, c.low_b, c.high_b, token + 32)};
    }
};

constexpr expertshare::Kernels kernels[] = EXPERTSHARE_QUANTISED_KERNELS(Words256);

}  // namespace

const expertshare::Kernels *const expertshare::quantised_avx2 = kernels;
#else
const expertshare::Kernels *const expertshare::quantised_avx2 = nullptr;
#endif
