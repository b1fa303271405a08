// VPMADDUBSW on 256-bit vectors, with the sign of the weight moved to the token: two products of at most 128 * 127 never
// saturate 16 bits.
#include "packed_kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include "packed_tile.h"

namespace {

struct PackedWords256 {
    struct Ints {
        __m256i a, b;
    };
    using Weights = Ints;
    static constexpr Index kRows = 16, kMaxTokens = 3;

    static constexpr std::int32_t zero_of(int) { return 0; }
    static Ints all(std::int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
    static Weights weights(const char *packed) {
        const __m256i *from = reinterpret_cast<const __m256i *>(packed);
        return {_mm256_load_si256(from), _mm256_load_si256(from + 1)};
    }
    static __m256i token(const std::int8_t *codes) {
        std::int32_t four;
        std::memcpy(&four, codes, sizeof four);
        return _mm256_set1_epi32(four);
    }
    static __m256i dot_eight(__m256i sums, __m256i w, __m256i token) {
        const __m256i words = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(token, w));
        return _mm256_add_epi32(sums, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
    }
    static Ints dot(Ints sums, Weights w, __m256i token) {
        return {dot_eight(sums.a, w.a, token), dot_eight(sums.b, w.b, token)};
    }
    static void add(__m256i sums, __m256 scale, float *out) {
        _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale, _mm256_loadu_ps(out)));
    }
    static void accumulate(Ints sums, float scale, float *out) {
        add(sums.a, _mm256_set1_ps(scale), out), add(sums.b, _mm256_set1_ps(scale), out + 8);
    }
    static void pack(const char *const *rows, char *packed) { pack_by_copies(rows, packed); }
};

constexpr expertshare::PackedKernels kernels = packed_kernels_of<PackedWords256>();

}  // namespace

const expertshare::PackedKernels *const expertshare::packed_avx2 = &kernels;
#else
const expertshare::PackedKernels *const expertshare::packed_avx2 = nullptr;
#endif
