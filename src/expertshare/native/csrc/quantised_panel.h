// The 16 rows of a panel of quantised weights, side by side in as many vectors as they take.
#pragma once

#include "vec.h"

namespace {

constexpr int kParts = expertshare::kPanelRows / kLanes;

using Ints = Vec<std::int32_t>;
using Shorts = Vec<std::int16_t, 2 * kLanes>;
using UnsignedShorts = Vec<std::uint16_t, 2 * kLanes>;

template <class V>
struct Parts {
    V part[kParts];
};
using Ints16 = Parts<Ints>;
using Floats16 = Parts<Floats>;
using Codes16 = Parts<Words>;  // four features of each row

#define EXPERTSHARE_EACH_PART _Pragma("GCC unroll 4") for (int p = 0; p < kParts; p++)

EXPERTSHARE_INLINE Ints16 all(std::int32_t value) {
    Ints16 v;
    EXPERTSHARE_EACH_PART v.part[p] = splat<Ints>(value);
    return v;
}
EXPERTSHARE_INLINE Floats16 all(float value) {
    Floats16 v;
    EXPERTSHARE_EACH_PART v.part[p] = splat<Floats>(value);
    return v;
}
EXPERTSHARE_INLINE Floats16 floats(const Ints16 &v) {
    Floats16 w;
    EXPERTSHARE_EACH_PART w.part[p] = __builtin_convertvector(v.part[p], Floats);
    return w;
}
EXPERTSHARE_INLINE Floats16 multiply(const Floats16 &v, const Floats16 &w) {
    Floats16 product;
    EXPERTSHARE_EACH_PART product.part[p] = v.part[p] * w.part[p];
    return product;
}
EXPERTSHARE_INLINE Floats16 fused(const Floats16 &v, const Floats16 &w, const Floats16 &acc) {
    Floats16 sum;
    EXPERTSHARE_EACH_PART sum.part[p] = fused(v.part[p], w.part[p], acc.part[p]);
    return sum;
}
EXPERTSHARE_INLINE Floats16 load16(const float *from) {
    Floats16 v;
    EXPERTSHARE_EACH_PART v.part[p] = load_vec<Floats>(from + p * kLanes);
    return v;
}
EXPERTSHARE_INLINE void store16(float *to, const Floats16 &v) {
    EXPERTSHARE_EACH_PART store_vec(to + p * kLanes, v.part[p]);
}

EXPERTSHARE_INLINE Floats from_halves(const char *halves) {
#if EXPERTSHARE_LEVEL >= EXPERTSHARE_LEVEL_avx512
    return _mm512_cvtph_ps(load_vec<__m256i>(halves));
#elif EXPERTSHARE_LEVEL != EXPERTSHARE_LEVEL_portable
    return _mm256_cvtph_ps(load_vec<__m128i>(halves));
#else
    const Words half = __builtin_convertvector(load_vec<Vec<std::uint16_t>>(halves), Words);
    const Words magnitude = half & 0x7fffu, not_finite = bits_as<Words>(magnitude >= 0x7c00u);
    const Floats value = bits_as<Floats>(magnitude << 13 | (not_finite & 0x70000000u));
    const Floats factor = bits_as<Floats>((not_finite & 0x3f800000u) | (~not_finite & 0x77800000u));  // 1 or 2^112,
    return bits_as<Floats>(bits_as<Words>(value * factor) | (half & 0x8000u) << 16);  // by which the exponents differ
#endif
}
EXPERTSHARE_INLINE Floats16 scales(const char *halves) {
    Floats16 v;
    EXPERTSHARE_EACH_PART v.part[p] = from_halves(halves + p * kLanes * 2);
    return v;
}

// What stands for zero, as `dot` multiplies codes of so many bits: VPDPBUSD takes unsigned bytes.
#if EXPERTSHARE_LEVEL == EXPERTSHARE_LEVEL_avx512_vnni || EXPERTSHARE_LEVEL == EXPERTSHARE_LEVEL_avx_vnni
constexpr std::int32_t zero_of(int bits) { return bits == 8 ? 128 : 8; }
#else
constexpr std::int32_t zero_of(int bits) { return bits == 8 ? 0 : 8; }
#endif

// A line of 64 bytes: all of them, or their low or high halves.
EXPERTSHARE_INLINE Codes16 whole(const char *line) {
    Codes16 codes;
    EXPERTSHARE_EACH_PART {
        codes.part[p] = load_vec<Words>(line + p * sizeof(Words)) ^ (zero_of(8) == 128 ? 0x80808080u : 0u);
    }
    return codes;
}
EXPERTSHARE_INLINE Codes16 low(const char *line) {
    Codes16 codes;
    EXPERTSHARE_EACH_PART codes.part[p] = load_vec<Words>(line + p * sizeof(Words)) & 0x0f0f0f0fu;
    return codes;
}
EXPERTSHARE_INLINE Codes16 high(const char *line) {
    Codes16 codes;
    EXPERTSHARE_EACH_PART codes.part[p] = load_vec<Words>(line + p * sizeof(Words)) >> 4 & 0x0f0f0f0fu;
    return codes;
}

// Four features of a token, for all rows.
EXPERTSHARE_INLINE Ints four_of(const std::int8_t *token) {
    std::int32_t four;
    std::memcpy(&four, token, sizeof four);
    return splat<Ints>(four);
}

// sums + codes * token, four products for each row.
template <int Bits>
EXPERTSHARE_INLINE Ints dot(Ints sums, Words codes, Ints token) {
#if EXPERTSHARE_LEVEL == EXPERTSHARE_LEVEL_avx512_vnni
    // Not by the intrinsic: GCC 12 then also stores each sum of a tile at every step.
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(token));
    return sums;
#elif EXPERTSHARE_LEVEL == EXPERTSHARE_LEVEL_avx_vnni
    return bits_as<Ints>(_mm256_dpbusd_avx_epi32(bits_as<__m256i>(sums), bits_as<__m256i>(codes),
                                                 bits_as<__m256i>(token)));
#elif EXPERTSHARE_LEVEL != EXPERTSHARE_LEVEL_portable
    // VPMADDUBSW saturates at 16 bits, which these products never reach: two of at most 15 * 127, or two of 127 * 127
    // where the sign of the weight is moved to the token.
    const __m256i w = bits_as<__m256i>(codes), x = bits_as<__m256i>(token);
    const __m256i words = Bits == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
                                    : _mm256_maddubs_epi16(w, x);
    return sums + bits_as<Ints>(_mm256_madd_epi16(words, _mm256_set1_epi16(1)));
#else
    // Nor is a sum of two products of at most 128 * 127 more than 16 bits.
    const auto even = [](auto bytes) { return bits_as<Shorts>(bits_as<UnsignedShorts>(bytes) << 8) >> 8; };
    const auto odd = [](auto bytes) { return bits_as<Shorts>(bytes) >> 8; };
    const Words pairs = bits_as<Words>(even(codes) * even(token) + odd(codes) * odd(token));
    return sums + (bits_as<Ints>(pairs << 16) >> 16) + (bits_as<Ints>(pairs) >> 16);
#endif
}
template <int Bits>
EXPERTSHARE_INLINE Ints16 dot(Ints16 sums, const Codes16 &codes, Ints token) {
    EXPERTSHARE_EACH_PART sums.part[p] = dot<Bits>(sums.part[p], codes.part[p], token);
    return sums;
}

}  // namespace
