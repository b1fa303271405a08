// The gate for every processor: vectors of four floats in the compiler's own notation, 8 tokens a block.
#include "affinity_tile.h"

namespace {

typedef float Floats __attribute__((vector_size(16)));

struct Tokens4 {
    using Vector = Floats;
    static constexpr Index kLanes = 4;
    static constexpr int kRows = 4;

    static Vector zero() { return splat(0.0f); }
    static Vector load(const float *from) {
        Vector value;
        std::memcpy(&value, from, sizeof value);
        return value;
    }
    static Vector splat(float value) { return Vector{value, value, value, value}; }
    static Vector fma(Vector a, Vector b, Vector c) { return c + a * b; }
    static Vector add(Vector a, Vector b) { return a + b; }
    static void store(float *to, Vector value) { std::memcpy(to, &value, sizeof value); }
    static Vector widen_all(const float *from) { return load(from); }
    static Vector widen_all(const std::uint16_t *from) {
        return Vector{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
    }
    static void transpose(Vector (&square)[kLanes]) {
        for (int i = 0; i < 4; i++) {
            for (int j = 0; j < i; j++) {
                const float upper = square[i][j];
                square[i][j] = square[j][i];
                square[j][i] = upper;
            }
        }
    }
};

constexpr expertshare::AffinityKernels kernels = affinity_kernels_of<Tokens4>();

}  // namespace

const expertshare::AffinityKernels *const expertshare::portable_affinity = &kernels;
