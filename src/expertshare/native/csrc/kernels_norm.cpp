// Norm and rotation of a row, as plain loops that the compiler vectorises for each instruction set.
//
// Built without contraction (setup.py): a product that torch rounds before it adds is rounded here too.
#include "kernels.h"

#if !defined(EXPERTSHARE_ABSENT)
#include <cmath>

#include "bfloat16.h"

namespace {

using expertshare::Index;

constexpr Index kSums = 16;  // side by side, whatever the vector length

template <class T>
inline float rounded(float value) {
    T to;
    store(&to, value);
    return load(to);
}

template <class T>
float over_root_mean_square(const T *x, Index count, float eps) {
    float sums[kSums] = {};
    const Index whole = count / kSums * kSums;
    for (Index i = 0; i < whole; i += kSums) {
        for (Index j = 0; j < kSums; j++) sums[j] += load(x[i + j]) * load(x[i + j]);
    }
    for (Index i = whole; i < count; i++) sums[i - whole] += load(x[i]) * load(x[i]);
    for (Index half = kSums / 2; half > 0; half /= 2) {
        for (Index j = 0; j < half; j++) sums[j] += sums[j + half];
    }
    return 1.0f / std::sqrt(sums[0] / static_cast<float>(count) + eps);
}

template <class T>
void add(const T *__restrict x, const T *__restrict delta, Index count, T *__restrict sum) {
    for (Index i = 0; i < count; i++) store(&sum[i], load(x[i]) + load(delta[i]));
}

template <class T>
void scaled(const T *__restrict x, float by, const T *__restrict scale, Index count, T *__restrict y) {
    for (Index i = 0; i < count; i++) store(&y[i], load(scale[i]) * rounded<T>(load(x[i]) * by));
}

template <class T>
void norm(const void *x, const void *delta, const void *scale, Index count, float eps, void *sum, void *y) {
    const T *from = static_cast<const T *>(x);
    if (delta != nullptr) {
        add(from, static_cast<const T *>(delta), count, static_cast<T *>(sum));
        from = static_cast<const T *>(sum);
    }
    scaled(from, over_root_mean_square(from, count, eps), static_cast<const T *>(scale), count, static_cast<T *>(y));
}

template <class T>
void rotate(T *__restrict left, T *__restrict right, Index half, const T *__restrict cos, const T *__restrict sin) {
    for (Index i = 0; i < half; i++) {
        const float a = load(left[i]), b = load(right[i]);
        store(&left[i], rounded<T>(a * load(cos[i])) - rounded<T>(b * load(sin[i])));
        store(&right[i], rounded<T>(b * load(cos[half + i])) + rounded<T>(a * load(sin[half + i])));
    }
}

template <class T>
void turn(void *head, const void *scale, Index head_dim, float eps, const void *cos, const void *sin,
          Index rotary_dim) {
    T *x = static_cast<T *>(head);
    const T *scales = static_cast<const T *>(scale);
    const float by = over_root_mean_square(x, head_dim, eps);
    for (Index i = 0; i < head_dim; i++) store(&x[i], load(scales[i]) * rounded<T>(load(x[i]) * by));
    const Index half = rotary_dim / 2;
    rotate(x, x + half, half, static_cast<const T *>(cos), static_cast<const T *>(sin));
}

constexpr expertshare::NormPair kernels = {{norm<std::uint16_t>, turn<std::uint16_t>}, {norm<float>, turn<float>}};

}  // namespace

const expertshare::NormPair *const expertshare::EXPERTSHARE_TABLE(norm) = &kernels;
#else
const expertshare::NormPair *const expertshare::EXPERTSHARE_TABLE(norm) = nullptr;
#endif
