// bfloat16 by VDPBF16PS: 32 products an instruction, accumulated in float32.
#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include "avx512_sum.h"
#include "tile.h"

namespace {

struct Pairs512 {
    using Weight = std::uint16_t;
    using Act = std::uint16_t;
    using Acc = __m512;
    using Loaded = __m512i;
    static constexpr Index kStep = 32, kMaxTokens = 6;
    static constexpr bool kHoldsRows = true;

    static Index place(Index i) { return i; }
    static Acc zero() { return _mm512_setzero_ps(); }
    static Loaded load(const Weight *w) { return _mm512_loadu_si512(w); }
    static Loaded load_some(const Weight *w, int n) { return _mm512_maskz_loadu_epi16((1u << n) - 1u, w); }
    static Acc dot(Acc acc, Loaded w, const Act *x) {
        return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w),
                                reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)));
    }
    static Quad sum4(Acc a, Acc b, Acc c, Acc d) { return sums_of_four(a, b, c, d); }
};

constexpr expertshare::Kernels pairs = kernels_of<Pairs512>();

}  // namespace

const expertshare::Kernels *const expertshare::avx512_bf16_bfloat16 = &pairs;
#else
const expertshare::Kernels *const expertshare::avx512_bf16_bfloat16 = nullptr;
#endif
