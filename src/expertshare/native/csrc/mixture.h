// From a token's experts to their weights.
#pragma once

#include <cstdint>

namespace expertshare {

constexpr int kMostSlots = 64;  // experts per token that drop_lightest takes

// In the order in which torch adds up a short row of float32, so that both give the same bits (up to 31 numbers).
inline float sum_like_torch(const float *row, int64_t count) {
    float lanes[8] = {0.0f};
    const int64_t width = count < 8 ? 4 : 8, whole = count / width * width;
    for (int64_t i = 0; i < whole; i++) lanes[i % width] += row[i];
    float total = 0.0f;
    if (width == 8) {
        for (int64_t i = whole; i < count; i++) total += row[i];
    } else {
        for (int64_t i = whole; i < count; i++) lanes[0] += row[i];
    }
    for (int64_t lane = 0; lane < width; lane++) total += lanes[lane];
    return total;
}

inline void drop_lightest(const float *weights, int k, double share, uint8_t *kept) {
    double total = 0.0;
    for (int i = 0; i < k; i++) total += static_cast<double>(weights[i]);
    if (!(total > 1e-20)) total = 1e-20;
    int order[kMostSlots];  // lightest first; of equals the one that ranks last
    for (int i = 0; i < k; i++) {
        int place = i;
        for (; place > 0 && weights[order[place - 1]] >= weights[i]; place--) order[place] = order[place - 1];
        order[place] = i;
    }
    double upto = 0.0;
    for (int i = 0; i < k; i++) {
        upto += static_cast<double>(weights[order[i]]) / total;
        kept[order[i]] = i == k - 1 || upto >= share ? 1 : 0;
    }
}

// The model's rule for one token's weights. An id that is not kept becomes -1, and weighs 0 as all unused slots do.
inline void weigh(int64_t *ids, const float *affinity, const std::uint8_t *kept, int64_t k, bool renormalise,
                  float scaling, float *weights) {
    for (int64_t slot = 0; slot < k; slot++) {
        if (kept != nullptr && kept[slot] == 0) ids[slot] = -1;
        weights[slot] = ids[slot] < 0 ? 0.0f : affinity[slot];
    }
    if (renormalise) {
        const float total = sum_like_torch(weights, k) + 1e-20f;
        for (int64_t slot = 0; slot < k; slot++) weights[slot] /= total;
    }
    if (scaling != 1.0f) {
        for (int64_t slot = 0; slot < k; slot++) weights[slot] *= scaling;
    }
}

}  // namespace expertshare
