// Quantised weights on every processor: plain loops over 16 lanes.
#include "fused.h"
#include "quantised_tile.h"

namespace {

inline float from_half(std::uint16_t half) {
    const std::uint32_t magnitude = half & 0x7fffu;
    const std::uint32_t bits = magnitude << 13 | (magnitude >= 0x7c00u ? 0x70000000u : 0u);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value *= magnitude >= 0x7c00u ? 1.0f : 0x1p112f;  // the exponents' biases differ by 112
    return half >> 15 ? -value : value;
}

struct Loops16 {
    struct Ints {
        std::int32_t of[kLanes];
    };
    struct Floats {
        float of[kLanes];
    };
    struct Codes {
        std::int8_t of[kSpan];
    };
    static constexpr Index kMaxTokens = 2;

    static constexpr std::int32_t zero_of(int bits) { return bits == 8 ? 0 : 8; }
    static Ints zero() { return {}; }
    static Ints load(const std::int32_t *ints) {
        Ints v;
        std::memcpy(v.of, ints, sizeof v.of);
        return v;
    }
    static Floats floats(const Ints &v) {
        Floats w;
        for (Index i = 0; i < kLanes; i++) w.of[i] = static_cast<float>(v.of[i]);
        return w;
    }
    static Floats multiply(Floats v, const Floats &w) {
        for (Index i = 0; i < kLanes; i++) v.of[i] *= w.of[i];
        return v;
    }
    static Floats fma(const Floats &v, const Floats &w, Floats acc) {
        for (Index i = 0; i < kLanes; i++) acc.of[i] = fused(v.of[i], w.of[i], acc.of[i]);
        return acc;
    }
    static Floats all(float a) {
        Floats v;
        for (Index i = 0; i < kLanes; i++) v.of[i] = a;
        return v;
    }
    static Floats lanes(const float *a) {
        Floats v;
        std::memcpy(v.of, a, sizeof v.of);
        return v;
    }
    template <int Bits>
    static Codes codes(const char *bytes) {
        Codes c;
        if constexpr (Bits == 8) {
            std::memcpy(c.of, bytes, sizeof c.of);
        } else {
            const auto *packed = reinterpret_cast<const unsigned char *>(bytes);
            for (Index i = 0; i < kSpan / 2; i++) {
                c.of[i] = static_cast<std::int8_t>(packed[i] & 15);
                c.of[i + kSpan / 2] = static_cast<std::int8_t>(packed[i] >> 4);
            }
        }
        return c;
    }
    template <int Bits>
    static Ints dot(Ints sums, const Codes &c, const std::int8_t *token) {
        for (Index half = 0; half < kSpan; half += kSpan / 2) {
            for (Index i = 0; i < kLanes; i++) {
                const std::int8_t *w = c.of + half + kCodesOfLane * i, *t = token + half + kCodesOfLane * i;
                sums.of[i] += (w[0] * t[0] + w[1] * t[1]) + (w[2] * t[2] + w[3] * t[3]);
            }
        }
        return sums;
    }
    template <int Group>
    static Floats spread(const char *scales) {
        constexpr Index lanes_of_group = Group / 8;
        Floats v;
        for (Index i = 0; i < kLanes; i++) {
            std::uint16_t half;
            std::memcpy(&half, scales + i / lanes_of_group * 2, sizeof half);
            v.of[i] = from_half(half);
        }
        return v;
    }
    // In the order of avx512_sum.h.
    static float sum(const Floats &v) {
        float quarter[4];
        for (Index i = 0; i < 4; i++) {
            const float *of = v.of + 4 * i;
            quarter[i] = (of[0] + of[2]) + (of[1] + of[3]);
        }
        return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
    }
    static void sum4(const Floats &a, const Floats &b, const Floats &c, const Floats &d, float *out) {
        out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
    }
};

constexpr expertshare::Kernels kernels[] = EXPERTSHARE_QUANTISED_KERNELS(Loops16);

}  // namespace

const expertshare::Kernels *const expertshare::quantised_portable = kernels;
