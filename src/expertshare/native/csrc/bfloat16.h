// bfloat16 as bits. Included by files built for different instruction sets: everything has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline float widen(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// To nearest, ties to even, as torch rounds. Any NaN becomes the quiet one: rounding could turn it into infinity.
inline std::uint16_t narrow(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void store(float *to, float value) { *to = value; }
inline void store(std::uint16_t *to, float value) { *to = narrow(value); }
inline float load(float value) { return value; }
inline float load(std::uint16_t bits) { return widen(bits); }

}  // namespace
