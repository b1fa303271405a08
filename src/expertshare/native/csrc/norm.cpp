#include "norm.h"

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace expertshare {
namespace {

constexpr Index kFeaturesPerThread = 16 << 10;  // less than this is not worth waking one more thread

int threads_for(Index features, int num_threads) {
    return static_cast<int>(std::min<Index>(num_threads, 1 + features / kFeaturesPerThread));
}

}  // namespace

Norm::Norm(const es_norm &call, const NormKernels &kernels) : call_(call), kernels_(kernels) {
    tokens_.fill(call.num_tokens);
}

int Norm::useful_threads() const { return threads_for(call_.num_tokens * call_.depth, call_.num_threads); }

void Norm::run(int worker) {
    drain(tokens_, worker, [this](Index token, Index) {
        const Index at = token * call_.depth * (call_.is_bfloat16 ? 2 : 4);
        const auto row = [at](void *of) { return of == nullptr ? nullptr : static_cast<char *>(of) + at; };
        kernels_.norm(static_cast<const char *>(call_.x) + at,
                      call_.delta == nullptr ? nullptr : static_cast<const char *>(call_.delta) + at, call_.scale,
                      call_.depth, call_.eps, row(call_.sum), row(call_.y));
    });
}

Heads::Heads(const es_heads &call, const NormKernels &kernels)
    : call_(call), kernels_(kernels), element_(call.is_bfloat16 ? 2 : 4) {
    tokens_.fill(call.batch * call.length);
}

int Heads::useful_threads() const {
    const Index heads = call_.num_heads + 2 * call_.num_kv_heads;
    return threads_for(call_.batch * call_.length * heads * call_.head_dim, call_.num_threads);
}

void Heads::run(int worker) {
    drain(tokens_, worker, [this](Index token, Index) { turn(token); });
}

void Heads::turn(Index token) {
    const Index bytes = call_.head_dim * element_, turned = call_.num_heads + call_.num_kv_heads;
    char *heads = static_cast<char *>(call_.qkv) + token * (turned + call_.num_kv_heads) * bytes;
    const char *cos = static_cast<const char *>(call_.cos) + token * call_.rotary_dim * element_;
    const char *sin = static_cast<const char *>(call_.sin) + token * call_.rotary_dim * element_;
    for (Index head = 0; head < turned; head++) {
        kernels_.turn(heads + head * bytes, head < call_.num_heads ? call_.q_scale : call_.k_scale, call_.head_dim,
                      call_.eps, cos, sin, call_.rotary_dim);
    }
    if (call_.keys == nullptr) return;
    for (Index head = 0; head < call_.num_kv_heads; head++) {
        place(heads + (call_.num_heads + head) * bytes, token, head, call_.keys, call_.keys_batch_stride,
              call_.keys_head_stride);
        place(heads + (turned + head) * bytes, token, head, call_.values, call_.values_batch_stride,
              call_.values_head_stride);
    }
}

void Heads::place(const char *head, Index token, Index kv_head, void *to, Index batch_stride,
                  Index head_stride) const {
    const Index row = token / call_.length, position = call_.starts[row] + token % call_.length;
    const Index at = row * batch_stride + kv_head * head_stride + position * call_.head_dim;
    std::memcpy(static_cast<char *>(to) + at * element_, head, static_cast<std::size_t>(call_.head_dim * element_));
}

}  // namespace expertshare
