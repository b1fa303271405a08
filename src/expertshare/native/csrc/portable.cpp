// For every processor: vectors of four floats in the compiler's own notation, which it maps to what is there.
#include "tile.h"

namespace {

using Four = Quad;
typedef std::uint32_t FourWords __attribute__((vector_size(16)));
typedef std::uint16_t FourHalves __attribute__((vector_size(8)));

struct Sums4 {
    using Acc = Four;
    using Act = float;
    using Loaded = Four;
    static constexpr bool kHoldsRows = false;
    static constexpr Index kStep = 4, kMaxTokens = 2;

    static Index place(Index i) { return i; }
    static Acc zero() { return Four{0.0f, 0.0f, 0.0f, 0.0f}; }
    static Acc dot(Acc acc, Loaded w, const Act *x) {
        Four features;
        std::memcpy(&features, x, sizeof features);
        return acc + w * features;
    }
    static Quad sum4(Acc a, Acc b, Acc c, Acc d) {
        const auto sum = [](Acc of) { return (of[0] + of[1]) + (of[2] + of[3]); };
        return Quad{sum(a), sum(b), sum(c), sum(d)};
    }
};

struct Floats4 : Sums4 {
    using Weight = float;
    static Loaded load_some(const Weight *w, int n) {
        Four loaded = zero();
        std::memcpy(&loaded, w, static_cast<std::size_t>(n) * sizeof(Weight));
        return loaded;
    }
    static Loaded load(const Weight *w) { return load_some(w, kStep); }
};

struct Widened4 : Sums4 {
    using Weight = std::uint16_t;
    static Loaded load_some(const Weight *w, int n) {
        FourHalves bits = {0, 0, 0, 0};
        std::memcpy(&bits, w, static_cast<std::size_t>(n) * sizeof(Weight));
        const FourWords words = __builtin_convertvector(bits, FourWords) << 16;
        Four loaded;
        std::memcpy(&loaded, &words, sizeof loaded);
        return loaded;
    }
    static Loaded load(const Weight *w) { return load_some(w, kStep); }
};

constexpr expertshare::Kernels floats = kernels_of<Floats4>();
constexpr expertshare::Kernels widened = kernels_of<Widened4>();

}  // namespace

const expertshare::Kernels *const expertshare::portable_float32 = &floats;
const expertshare::Kernels *const expertshare::portable_bfloat16 = &widened;
