// Quantised weights on every processor: plain loops over the 16 rows of a panel.
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
        std::int32_t of[kPanelRows];
    };
    struct Floats {
        float of[kPanelRows];
    };
    struct Codes {
        std::int8_t of[kLineBytes];
    };
    static constexpr int kPanels = 1, kMaxTokens = 2;

    static constexpr std::int32_t zero_of(int bits) { return bits == 8 ? 0 : 8; }
    static Ints all(std::int32_t a) {
        Ints v;
        for (Index i = 0; i < kPanelRows; i++) v.of[i] = a;
        return v;
    }
    static Floats all(float a) {
        Floats v;
        for (Index i = 0; i < kPanelRows; i++) v.of[i] = a;
        return v;
    }
    static Floats floats(const Ints &v) {
        Floats w;
        for (Index i = 0; i < kPanelRows; i++) w.of[i] = static_cast<float>(v.of[i]);
        return w;
    }
    static Floats multiply(Floats v, const Floats &w) {
        for (Index i = 0; i < kPanelRows; i++) v.of[i] *= w.of[i];
        return v;
    }
    static Floats fma(const Floats &v, const Floats &w, Floats acc) {
        for (Index i = 0; i < kPanelRows; i++) acc.of[i] = fused(v.of[i], w.of[i], acc.of[i]);
        return acc;
    }
    static Floats scales(const char *halves) {
        Floats v;
        for (Index i = 0; i < kPanelRows; i++) {
            std::uint16_t half;
            std::memcpy(&half, halves + 2 * i, sizeof half);
            v.of[i] = from_half(half);
        }
        return v;
    }
    static Floats load(const float *floats) {
        Floats v;
        std::memcpy(v.of, floats, sizeof v.of);
        return v;
    }
    static void store(const Floats &v, float *out) { std::memcpy(out, v.of, sizeof v.of); }

    static Codes whole(const char *line) {
        Codes c;
        std::memcpy(c.of, line, sizeof c.of);
        return c;
    }
    static Codes low(const char *line) {
        Codes c;
        for (Index i = 0; i < kLineBytes; i++) c.of[i] = static_cast<std::int8_t>(line[i] & 15);
        return c;
    }
    static Codes high(const char *line) {
        Codes c;
        for (Index i = 0; i < kLineBytes; i++) c.of[i] = static_cast<std::int8_t>(line[i] >> 4 & 15);
        return c;
    }
    static const std::int8_t *token(const std::int8_t *codes) { return codes; }
    template <int Bits>
    static Ints dot(Ints sums, const Codes &c, const std::int8_t *t) {
        for (Index i = 0; i < kPanelRows; i++) {
            const std::int8_t *w = c.of + kQuad * i;
            sums.of[i] += (w[0] * t[0] + w[1] * t[1]) + (w[2] * t[2] + w[3] * t[3]);
        }
        return sums;
    }
};

constexpr expertshare::Kernels kernels[] = EXPERTSHARE_QUANTISED_KERNELS(Loops16);

}  // namespace

const expertshare::Kernels *const expertshare::quantised_portable = kernels;
