// Norm and rotation of a row, as plain loops that the compiler vectorises for each instruction set.
//
// Built without contraction (setup.py): a product that torch rounds before it adds is rounded here too.
#include "kernels.h"

#include <cmath>

#include "epilogue.h"

namespace {

template <class T>
inline float rounded(float value) {
    T to;
    store(&to, value);
    return load(to);
}

template <class T>
float over_root_mean_square(const T *x, Index count, float eps) {
    float sums[kPartials] = {};
    const Index whole = count / kPartials * kPartials;
    for (Index i = 0; i < whole; i += kPartials) {
        for (Index j = 0; j < kPartials; j++) sums[j] += load(x[i + j]) * load(x[i + j]);
    }
    for (Index i = whole; i < count; i++) sums[i - whole] += load(x[i]) * load(x[i]);
    return 1.0f / std::sqrt(sum_of(sums) / static_cast<float>(count) + eps);
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
void norm_and_rotate(void *head, const void *scale, Index head_dim, float eps, const void *cos, const void *sin,
                     Index rotary_dim) {
    T *x = static_cast<T *>(head);
    const T *scales = static_cast<const T *>(scale);
    const float by = over_root_mean_square(x, head_dim, eps);
    for (Index i = 0; i < head_dim; i++) store(&x[i], load(scales[i]) * rounded<T>(load(x[i]) * by));
    const Index half = rotary_dim / 2;
    rotate(x, x + half, half, static_cast<const T *>(cos), static_cast<const T *>(sin));
}

constexpr expertshare::NormPair kernels = {{norm<std::uint16_t>, norm_and_rotate<std::uint16_t>},
                                            {norm<float>, norm_and_rotate<float>}};

}  // namespace

const expertshare::NormPair *const expertshare::EXPERTSHARE_TABLE(norm) = &kernels;
