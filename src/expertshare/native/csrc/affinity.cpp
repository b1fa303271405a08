#include "affinity.h"

#include <algorithm>

#include "isa.h"

namespace expertshare {
namespace {

constexpr Index kStripDepth = 128;       // features that one item of packing transposes
constexpr Index kMacsPerThread = 1 << 19;  // less than this is not worth waking one more thread

Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

bool takes_from_back(int worker) { return worker % 2 != 0; }

// `now` and then items until there are none, each with the one that comes next (-1: none); then waits for all threads.
template <class Item>
void each(Queue &queue, int worker, Index now, Item item) {
    Index taken = 0;
    for (Index next; now >= 0; now = next) {
        next = queue.take(takes_from_back(worker));
        item(now, next);
        taken++;
    }
    if (taken > 0) queue.finish(taken);
    queue.wait();
}

template <class Item>
void each(Queue &queue, int worker, Item item) {
    each(queue, worker, queue.take(takes_from_back(worker)), item);
}

}  // namespace

Affinity::Affinity(const es_gate &gate, const AffinityKernels &kernels, Arena &arena)
    : gate_(gate),
      kernels_(kernels),
      width_(kernels.width),
      token_blocks_(ceil_div(gate.num_tokens, kernels.width)),
      row_blocks_(ceil_div(gate.num_experts, kernels.rows)),
      strips_(ceil_div(gate.depth, kStripDepth)),
      row_bytes_(gate.depth * (gate.w_is_bfloat16 != 0 ? 2 : 4)) {
    const Index num_packed = token_blocks_ * gate.depth * width_;
    const Index num_logits = token_blocks_ * gate.num_experts * width_;
    arena.reserve(Arena::padded<float>(num_packed) + Arena::padded<float>(num_logits));
    packed_ = arena.carve<float>(num_packed);
    logits_ = arena.carve<float>(num_logits);
    to_pack_.fill(token_blocks_ * strips_);
    to_multiply_.fill(row_blocks_);
    to_finish_.fill(gate.num_tokens);
}

int Affinity::useful_threads() const {
    const Index macs = gate_.num_tokens * gate_.depth * gate_.num_experts;
    return static_cast<int>(std::min<Index>(gate_.num_threads, 1 + macs / kMacsPerThread));
}

void Affinity::run(int worker) {
    multiply_all(worker);
    each(to_finish_, worker, [this](Index token, Index) { finish(token); });
}

void Affinity::multiply_all(int worker) {
    const Index first = to_multiply_.take(takes_from_back(worker));  // its weights are fetched while tokens are packed
    Index fetched = 0;
    each(to_pack_, worker, [&](Index item, Index) {
        if (first >= 0) fetched = fetch(first, fetched);
        pack(item);
    });
    each(to_multiply_, worker, first, [this](Index item, Index next) { multiply(item, next); });
}

const char *Affinity::rows(Index item) const {
    return static_cast<const char *>(gate_.w) + item * kernels_.rows * row_bytes_;
}

// A thread's part of the packing long, from `line` on; returns the line to go on with.
Index Affinity::fetch(Index item, Index line) const {
    constexpr Index kLine = 64;
    const Index rows = std::min<Index>(kernels_.rows, gate_.num_experts - item * kernels_.rows);
    const Index num_lines = rows * row_bytes_ / kLine;
    const Index end = std::min(num_lines, line + ceil_div(num_lines * gate_.num_threads, token_blocks_ * strips_));
    for (; line < end; line++) __builtin_prefetch(this->rows(item) + line * kLine, 0, 3);
    return line;
}

void Affinity::pack(Index item) {
    const Index block = item / strips_, begin = item % strips_ * kStripDepth;
    const Index token = block * width_;
    const char *x = static_cast<const char *>(gate_.x) + token * gate_.depth * (gate_.is_bfloat16 != 0 ? 2 : 4);
    kernels_.pack(x, gate_.is_bfloat16 != 0, std::min<Index>(width_, gate_.num_tokens - token), gate_.depth, begin,
                  std::min<Index>(gate_.depth, begin + kStripDepth), packed_ + block * gate_.depth * width_);
}

void Affinity::multiply(Index item, Index next_item) {
    const Index first = item * kernels_.rows;
    const Index num_rows = std::min<Index>(kernels_.rows, gate_.num_experts - first);
    const bool whole_next = next_item >= 0 && (next_item + 1) * kernels_.rows <= gate_.num_experts;
    GateRows w = {rows(item), whole_next ? rows(next_item) : nullptr, gate_.w_is_bfloat16 != 0};
    for (Index block = 0; block < token_blocks_; block++) {
        kernels_.multiply(w, num_rows, gate_.depth, packed_ + block * gate_.depth * width_, gate_.is_bfloat16 != 0,
                          std::min<Index>(width_, gate_.num_tokens - block * width_),
                          logits_ + (block * gate_.num_experts + first) * width_);
        w.next = nullptr;
    }
}

void Affinity::finish(Index token) {
    const float *logits = logits_ + token / width_ * gate_.num_experts * width_ + token % width_;
    kernels_.finish(logits, gate_.num_experts, gate_.is_softmax != 0, gate_.bias,
                    gate_.affinity + token * gate_.num_experts,
                    gate_.choice == nullptr ? nullptr : gate_.choice + token * gate_.num_experts);
}

}  // namespace expertshare
