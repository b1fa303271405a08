// Packed int8 rows on every processor: plain loops over 8 rows.
#include "fused.h"
#include "packed_tile.h"

namespace {

struct PackedLoops {
    static constexpr Index kRows = 8, kMaxTokens = 2;
    struct Ints {
        std::int32_t of[kRows];
    };
    struct Weights {
        std::int8_t of[4 * kRows];
    };

    static constexpr std::int32_t zero_of(int) { return 0; }
    static Ints all(std::int32_t a) {
        Ints v;
        for (Index i = 0; i < kRows; i++) v.of[i] = a;
        return v;
    }
    static Weights weights(const char *packed) {
        Weights w;
        std::memcpy(w.of, packed, sizeof w.of);
        return w;
    }
    static const std::int8_t *token(const std::int8_t *codes) { return codes; }
    static Ints dot(Ints sums, const Weights &w, const std::int8_t *t) {
        for (Index i = 0; i < kRows; i++) {
            const std::int8_t *four = w.of + 4 * i;
            sums.of[i] += (four[0] * t[0] + four[1] * t[1]) + (four[2] * t[2] + four[3] * t[3]);
        }
        return sums;
    }
    static void accumulate(const Ints &sums, float scale, float *out) {
        for (Index i = 0; i < kRows; i++) out[i] = fused(static_cast<float>(sums.of[i]), scale, out[i]);
    }
    static void pack(const char *const *rows, char *packed) { pack_by_copies(rows, packed); }
};

constexpr expertshare::PackedKernels kernels = packed_kernels_of<PackedLoops>();

}  // namespace

const expertshare::PackedKernels *const expertshare::packed_portable = &kernels;
