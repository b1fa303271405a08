// Vectors in the compiler's own notation, and the few operations on them that it has no notation for.
//
// For sources that are compiled once for each instruction set (setup.py), whose name is EXPERTSHARE_ISA. Everything
// here and in the headers of such sources has internal linkage: no object may end up with another instruction set's
// copy.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"

// Numbers to compare EXPERTSHARE_LEVEL with: each has what those before it have, but avx_vnni is no part of avx512.
#define EXPERTSHARE_LEVEL_portable 0
#define EXPERTSHARE_LEVEL_avx2 1
#define EXPERTSHARE_LEVEL_avx_vnni 2
#define EXPERTSHARE_LEVEL_avx512 3
#define EXPERTSHARE_LEVEL_avx512_vnni 4
#define EXPERTSHARE_LEVEL_avx512_bf16 5
#define EXPERTSHARE_LEVEL EXPERTSHARE_JOIN(EXPERTSHARE_LEVEL_, EXPERTSHARE_ISA)

#if EXPERTSHARE_LEVEL != EXPERTSHARE_LEVEL_portable
#include <immintrin.h>
#endif

#define EXPERTSHARE_INLINE inline __attribute__((always_inline))

namespace {

using expertshare::Index;

constexpr int kLanes = EXPERTSHARE_LEVEL >= EXPERTSHARE_LEVEL_avx512     ? 16
                       : EXPERTSHARE_LEVEL != EXPERTSHARE_LEVEL_portable ? 8
                                                                         : 4;

template <class T, int N>
struct VecOf {
    typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, int N = kLanes>
using Vec = typename VecOf<T, N>::type;

using Floats = Vec<float>;
using Words = Vec<std::uint32_t>;
using Quad = Vec<float, 4>;

constexpr Index kLineBytes = 64;
EXPERTSHARE_INLINE void prefetch(const char *line) { __builtin_prefetch(line, 0, 3); }

// From and to any address.
template <class V>
EXPERTSHARE_INLINE V load_vec(const void *from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class V>
EXPERTSHARE_INLINE void store_vec(void *to, V value) {
    std::memcpy(to, &value, sizeof value);
}
template <class V, class T>
EXPERTSHARE_INLINE V splat(T value) {
    return value - V{};  // not plus: -0 would become 0
}
template <class To, class From>
EXPERTSHARE_INLINE To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "no bit may be lost");
    return load_vec<To>(&value);
}

// The first n of a vector, and zeros behind them; nothing behind them is read.
template <class V, class T>
EXPERTSHARE_INLINE V load_some(const T *from, int n) {
#if EXPERTSHARE_LEVEL >= EXPERTSHARE_LEVEL_avx512
    if constexpr (sizeof(T) == 4) {
        return bits_as<V>(_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n) - 1u), from));
    } else if constexpr (sizeof(V) == 64) {
        return bits_as<V>(_mm512_maskz_loadu_epi16((1u << n) - 1u, from));
    }
#endif
    V value = {};
    std::memcpy(&value, from, static_cast<std::size_t>(n) * sizeof(T));
    return value;
}

// a * b + c, rounded once where the processor has an instruction for it.
EXPERTSHARE_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if EXPERTSHARE_LEVEL >= EXPERTSHARE_LEVEL_avx512
    return _mm512_fmadd_ps(a, b, c);
#elif EXPERTSHARE_LEVEL != EXPERTSHARE_LEVEL_portable
    return _mm256_fmadd_ps(a, b, c);
#else
    return c + a * b;
#endif
}

// The same on every processor. Without the instruction the product is exact in double and the sum rounded twice, which
// shows once in 2^29 times.
EXPERTSHARE_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if EXPERTSHARE_LEVEL != EXPERTSHARE_LEVEL_portable
    return fma(a, b, c);
#elif defined(__FP_FAST_FMAF)
    for (int i = 0; i < kLanes; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    using Doubles = Vec<double>;
    const Doubles product = __builtin_convertvector(a, Doubles) * __builtin_convertvector(b, Doubles);
    return __builtin_convertvector(product + __builtin_convertvector(c, Doubles), Floats);
#endif
}

// bfloat16 to float32: of as many as a vector of floats holds, or of the even and the odd ones of twice as many.
EXPERTSHARE_INLINE Floats widen_all(const std::uint16_t *from) {
    return bits_as<Floats>(__builtin_convertvector(load_vec<Vec<std::uint16_t>>(from), Words) << 16);
}
EXPERTSHARE_INLINE Floats widen_all(const float *from) { return load_vec<Floats>(from); }
EXPERTSHARE_INLINE Floats widen_even(Words pairs) { return bits_as<Floats>(pairs << 16); }
EXPERTSHARE_INLINE Floats widen_odd(Words pairs) { return bits_as<Floats>(pairs & 0xffff0000u); }

// The sums of a, b, c and d, each in the same order.
EXPERTSHARE_INLINE Quad sum4(Floats a, Floats b, Floats c, Floats d) {
#if EXPERTSHARE_LEVEL >= EXPERTSHARE_LEVEL_avx512
    // A 4 x 4 transposition inside each 128-bit lane, then across the lanes.
    const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512 abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
    const __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
    return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#elif EXPERTSHARE_LEVEL != EXPERTSHARE_LEVEL_portable
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm256_castps256_ps128(abcd) + _mm256_extractf128_ps(abcd, 1);
#else
    const auto sum = [](Floats of) { return (of[0] + of[1]) + (of[2] + of[3]); };
    return Quad{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// Elements At(0), At(1) and so on of a and b: those of b are counted on from those of a.
template <int At(int), std::size_t... I>
EXPERTSHARE_INLINE Floats shuffled(Floats a, Floats b, std::index_sequence<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, At(static_cast<int>(I))...);
#else
    return __builtin_shuffle(a, b, Vec<std::int32_t>{At(static_cast<int>(I))...});
#endif
}

// Of two vectors that differ in bit D of their number in a matrix, what belongs to the first and to the second of the
// transposed one. Inside 128 bits as x86 has instructions for it, which leaves the second and third of four exchanged.
template <int D>
constexpr int first_of_two(int i) {
    const int of_four = i % 4, from_b = D == 1 ? of_four % 2 : of_four / 2, at = D == 1 ? of_four / 2 : of_four % 2;
    return D < 4 ? i - of_four + at + from_b * kLanes : (i & D) == 0 ? i : i - D + kLanes;
}
template <int D>
constexpr int second_of_two(int i) {
    return first_of_two<D>(i) + (D < 4 ? 2 : D);
}

template <int D>
EXPERTSHARE_INLINE void exchange(Floats (&square)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
        if ((i & D) != 0) continue;
        const Floats a = square[i], b = square[i + D];
        square[i] = shuffled<first_of_two<D>>(a, b, std::make_index_sequence<kLanes>());
        square[i + D] = shuffled<second_of_two<D>>(a, b, std::make_index_sequence<kLanes>());
    }
}

EXPERTSHARE_INLINE void transpose(Floats (&square)[kLanes]) {
    exchange<1>(square);
    exchange<2>(square);
    if constexpr (kLanes > 4) exchange<4>(square);
    if constexpr (kLanes > 8) exchange<8>(square);
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i += 4) std::swap(square[i + 1], square[i + 2]);
}

}  // namespace
