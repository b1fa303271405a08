// bfloat16, accumulated in float32: by VDPBF16PS, or widened.
#include "kernels.h"

#include <type_traits>

#include "tile.h"

namespace {

#if EXPERTSHARE_LEVEL == EXPERTSHARE_LEVEL_avx512_bf16
// 32 products an instruction.
struct Bfloat16 {
    using Act = std::uint16_t;
    using Loaded = Words;
    static constexpr Index kStep = 2 * kLanes, kMaxTokens = 6;
    static constexpr bool kHoldsRows = true;

    static Index position_of(Index i) { return i; }
    static Loaded widened(Words pairs) { return pairs; }
    static Floats dot(Floats acc, Loaded w, const Act *x) {
        return _mm512_dpbf16_ps(acc, bits_as<__m512bh>(w), load_vec<__m512bh>(x));
    }
#elif EXPERTSHARE_LEVEL != EXPERTSHARE_LEVEL_portable
// Of each 32-bit word the low half is shifted up and the high half masked: even features, then odd ones. Activations
// are in the scratch memory in that order, as float32, so that one vector of weights costs two instructions for all
// tokens.
struct Bfloat16 {
    using Act = float;
    struct Loaded {
        Floats even, odd;
    };
    static constexpr Index kStep = 2 * kLanes, kMaxTokens = kLanes == 16 ? 5 : 3;
    static constexpr bool kHoldsRows = kLanes == 16;

    static Index position_of(Index i) { return i / kStep * kStep + i % 2 * (kStep / 2) + i % kStep / 2; }
    static Loaded widened(Words pairs) { return {widen_even(pairs), widen_odd(pairs)}; }
    static Floats dot(Floats acc, Loaded w, const Act *x) {
        return fma(w.odd, load_vec<Floats>(x + kLanes), fma(w.even, load_vec<Floats>(x), acc));
    }
#else
// Four at a time, in order.
struct Bfloat16 {
    using Act = float;
    using Loaded = Floats;
    static constexpr Index kStep = kLanes, kMaxTokens = 2;
    static constexpr bool kHoldsRows = false;

    static Index position_of(Index i) { return i; }
    static Loaded widened(Vec<std::uint16_t> bits) {
        return bits_as<Floats>(__builtin_convertvector(bits, Words) << 16);
    }
    static Floats dot(Floats acc, Loaded w, const Act *x) { return fma(w, load_vec<Floats>(x), acc); }
#endif
    using Weight = std::uint16_t;
    using Bits = std::conditional_t<kStep == kLanes, Vec<std::uint16_t>, Words>;
    static Loaded load(const Weight *w) { return widened(load_vec<Bits>(w)); }
    static Loaded load_some(const Weight *w, int n) { return widened(::load_some<Bits>(w, n)); }
};

constexpr expertshare::Kernels kernels = kernels_of<Bfloat16>();

}  // namespace

const expertshare::Kernels *const expertshare::EXPERTSHARE_TABLE(bfloat16) = &kernels;
