// float32 by multiplication and addition, fused where the processor can.
#include "kernels.h"

#include "tile.h"

namespace {

struct Float32 {
    using Weight = float;
    using Act = float;
    using Loaded = Floats;
    static constexpr Index kStep = kLanes, kMaxTokens = kLanes == 16 ? 6 : kLanes == 8 ? 3 : 2;
    static constexpr bool kHoldsRows = kLanes == 16;

    static Index position_of(Index i) { return i; }
    static Loaded load(const Weight *w) { return load_vec<Floats>(w); }
    static Loaded load_some(const Weight *w, int n) { return ::load_some<Floats>(w, n); }
    static Floats dot(Floats acc, Loaded w, const Act *x) { return fma(w, load_vec<Floats>(x), acc); }
};

constexpr expertshare::Kernels kernels = kernels_of<Float32>();

}  // namespace

const expertshare::Kernels *const expertshare::EXPERTSHARE_TABLE(float32) = &kernels;
