// One call of the expert layer: group tokens by expert, gate and up with SiLU, down, mix. Experts that are still on
// their way come last.
#pragma once

#include <algorithm>

#include "abi.h"
#include "arena.h"
#include "arrivals.h"
#include "kernels.h"
#include "pool.h"
#include "queue.h"

namespace expertshare {

// Tokens of one expert: pairs first_pair .. first_pair + num_tokens. The first is the first of a block of either
// kernel.
struct Group {
    Index expert, first_pair, num_tokens;
};

// Where the rows of one projection are, with their scales and minima.
struct Matrices {
    Matrices(const es_weight &of, Index depth)
        : weight(of),
          row_bytes(depth * of.bits / 8),
          scale_bytes(of.bits == 4 ? depth / of.group_size * 2 : of.bits == 8 ? 4 : 0) {}

    Rows rows(Index expert, Index row) const {
        const auto at = [expert, row](const void *from, Index stride, Index bytes) {
            return from == nullptr ? nullptr : static_cast<const char *>(from) + expert * stride + row * bytes;
        };
        return {at(weight.codes, weight.codes_stride, row_bytes), at(weight.scales, weight.scales_stride, scale_bytes),
                at(weight.minima, weight.minima_stride, scale_bytes)};
    }

    const es_weight &weight;
    const Index row_bytes, scale_bytes;  // codes of a row; its scales
};

// Every number is computed by one thread, in one order, whichever thread that is: results do not depend on how many
// there are. Threads with even numbers take the largest groups first and the others the smallest, so that at any time
// some cores are busy with arithmetic while others have the memory for themselves.
class ExpertLayer final : public Work {
   public:
    // Throws std::bad_alloc. The kernels are those of gate_up and of down.
    ExpertLayer(const es_layer &layer, const Kernels &to_hidden, const Kernels &to_out, Arena &arena)
        : layer_(layer),
          gate_up_kernels_(to_hidden),
          down_kernels_(to_out),
          token_bytes_(layer.is_bfloat16 ? 2 : 4),
          hidden_depth_(layer.hidden),
          inner_depth_(layer.inner),
          width_(std::max(to_hidden.width, to_out.width)),
          gate_up_weights_(layer_.gate_up, hidden_depth_),
          down_weights_(layer_.down, inner_depth_),
          arrivals_(layer.arrivals) {
        lay_out(arena);
        group_tokens();
        if (!ids_in_range_) return;
        choose_chunks();
        packing_.fill(to_hidden.width == 1 ? layer_.num_tokens : num_pairs_ / to_hidden.width);
        to_hidden_.fill(num_there_ * hidden_chunks_);
        to_out_.fill(num_there_ * out_chunks_);
        late_to_hidden_.fill((num_groups_ - num_there_) * hidden_chunks_);
        late_to_out_.fill((num_groups_ - num_there_) * out_chunks_);
        mixing_.fill(layer_.num_tokens);
    }

    bool ids_in_range() const { return ids_in_range_; }
    bool all_arrived() const { return arrivals_.all_came(); }
    // Threads wait side by side: their sum would count time twice.
    std::int64_t waited_ns() const {
        std::int64_t most = 0;
        for (int worker = 0; worker < layer_.num_threads; worker++) most = std::max(most, *waited_ns_.of(worker));
        return most;
    }

    int useful_threads() const {
        const Index bytes =
            num_groups_ * (2 * inner_depth_ * gate_up_weights_.row_bytes + hidden_depth_ * down_weights_.row_bytes);
        return static_cast<int>(std::min<Index>(layer_.num_threads, 1 + bytes / kBytesPerThread));
    }

    void run(int worker) override {
        drain(packing_, worker, [this](Index item, Index) { pack_tokens(item); });
        const Index then = worker % 2 == 0 ? 0 : num_there_ * out_chunks_ - 1;
        drain(to_hidden_, worker, [=](Index item, Index next) { hidden_chunk(worker, item, next, then); });
        drain(to_out_, worker, [this](Index item, Index next) { out_chunk(item, next); });
        if (num_there_ < num_groups_) run_late(worker);
        drain(mixing_, worker, [this, worker](Index token, Index) { mix_token(worker, token); });
    }

   private:
    static constexpr Index kChunkBytes = 256 << 10;  // of weights an item reads: with a block's tokens it fits the L2
    static constexpr Index kItemsPerThread = 8;
    static constexpr Index kBytesPerThread = 128 << 10;  // less than this is not worth waking one more thread

    void lay_out(Arena &arena) {
        const Index slots = layer_.num_tokens * layer_.top_k, threads = layer_.num_threads;
        const Index most_groups = std::min<Index>(slots, layer_.num_experts);
        const Index pairs = ceil_div(slots + most_groups * (width_ - 1), width_) * width_;
        const Index x_width = gate_up_kernels_.width, x_blocks = x_width == 1 ? layer_.num_tokens : pairs / x_width;
        token_stride_ = spread_over_sets(gate_up_kernels_.block_bytes(hidden_depth_));
        hidden_stride_ = spread_over_sets(down_kernels_.block_bytes(inner_depth_));
        out_stride_ = spread_over_sets(hidden_depth_ * 4) / 4;
        const Index granule = down_kernels_.granule;
        const Index most_rows = std::max(granule, kChunkBytes / (2 * gate_up_weights_.row_bytes));
        const Index gate_up_floats = 2 * kTokenBlock * std::min(most_rows, ceil_div(inner_depth_, granule) * granule);

        arena.lay_out([&] {
            groups_ = arena.carve<Group>(most_groups);
            pair_of_slot_ = arena.carve<Index>(slots);
            first_of_expert_ = arena.carve<Index>(layer_.num_experts + 1);
            token_of_pair_ = arena.carve<Index>(pairs);
            x_blocks_ = arena.carve<const void *>(pairs);
            h_blocks_ = arena.carve<const void *>(pairs);
            tokens_ = arena.carve<char>(x_blocks * token_stride_);
            hidden_ = arena.carve<char>(pairs / down_kernels_.width * hidden_stride_);
            outs_ = arena.carve<float>(pairs * out_stride_);
            gate_up_ = arena.carve_own<float>(threads, gate_up_floats);
            outs_of_token_ = arena.carve_own<const float *>(threads, layer_.top_k);
            weights_of_token_ = arena.carve_own<float>(threads, layer_.top_k);
            waited_ns_ = arena.carve_own<std::int64_t>(threads, 1);
        });
        for (int worker = 0; worker < threads; worker++) *waited_ns_.of(worker) = 0;
    }

    // Counting sort of the used slots by expert; tokens stay in order within an expert.
    void group_tokens() {
        const Index slots = layer_.num_tokens * layer_.top_k;
        std::fill_n(first_of_expert_, layer_.num_experts + 1, Index{0});
        for (Index slot = 0; slot < slots; slot++) {
            const int64_t expert = layer_.ids[slot];
            if (expert < -1 || expert >= layer_.num_experts) {
                ids_in_range_ = false;
                return;
            }
            if (expert >= 0) first_of_expert_[expert + 1]++;
        }
        for (Index expert = 0; expert < layer_.num_experts; expert++) {
            const Index count = first_of_expert_[expert + 1];
            if (count > 0) groups_[num_groups_++] = {expert, num_pairs_, count};
            num_pairs_ = ceil_div(num_pairs_ + count, width_) * width_;
            first_of_expert_[expert + 1] = num_pairs_;
        }
        std::fill_n(token_of_pair_, num_pairs_, Index{-1});
        for (Index slot = 0; slot < slots; slot++) {
            const int64_t expert = layer_.ids[slot];
            const Index pair = expert < 0 ? -1 : first_of_expert_[expert]++;
            pair_of_slot_[slot] = pair;
            if (pair < 0) continue;
            const Index x_width = gate_up_kernels_.width;
            token_of_pair_[pair] = slot / layer_.top_k;
            const Index x_block = x_width == 1 ? token_of_pair_[pair] : pair / x_width;
            x_blocks_[pair / x_width] = tokens_ + x_block * token_stride_;
            h_blocks_[pair / down_kernels_.width] = hidden_block(pair);
        }
        Group *const end = groups_ + num_groups_;
        Group *const late =
            std::partition(groups_, end, [this](const Group &group) { return arrivals_.there(group.expert); });
        num_there_ = late - groups_;
        std::sort(groups_, late, [](const Group &a, const Group &b) {
            return a.num_tokens != b.num_tokens ? a.num_tokens > b.num_tokens : a.expert < b.expert;
        });
        // In the order in which they are asked for.
        std::sort(late, end, [](const Group &a, const Group &b) { return a.expert < b.expert; });
    }

    static Index chunk_rows(Index num_rows, Index row_bytes, Index granule, Index num_groups, Index num_threads) {
        const Index by_cache = kChunkBytes / row_bytes;
        const Index by_balance = num_rows * num_groups / (kItemsPerThread * num_threads);
        const Index rows = std::min(by_cache, by_balance) / granule * granule;
        return std::max(rows, granule);
    }

    void choose_chunks() {
        const Index threads = useful_threads(), granule = down_kernels_.granule;
        hidden_chunk_ = chunk_rows(inner_depth_, 2 * gate_up_weights_.row_bytes, granule, num_groups_, threads);
        hidden_chunk_ = std::min(hidden_chunk_, ceil_div(inner_depth_, granule) * granule);
        hidden_chunks_ = ceil_div(inner_depth_, hidden_chunk_);
        out_chunk_ = chunk_rows(hidden_depth_, down_weights_.row_bytes, down_kernels_.granule, num_groups_, threads);
        out_chunks_ = ceil_div(hidden_depth_, out_chunk_);
    }

    // A token for all its experts, or where tokens are side by side a block of one expert's.
    void pack_tokens(Index item) {
        const Index width = gate_up_kernels_.width, first = item * width;
        const auto pack = [=](Index end, auto token_of) {
            const auto features = [=](Index i) {
                return static_cast<const char *>(layer_.x) + token_of(i) * hidden_depth_ * token_bytes_;
            };
            pack_block(gate_up_kernels_, first, end, hidden_depth_, 0, hidden_depth_, tokens_ + item * token_stride_,
                       features);
        };
        if (width == 1) return pack(item + 1, [](Index token) { return token; });
        Index end = first;
        while (end < first + width && token_of_pair_[end] >= 0) end++;
        if (end > first) pack(end, [this](Index pair) { return token_of_pair_[pair]; });
    }

    // `then`: the item of the down projection with which this thread goes on after the last chunk.
    void hidden_chunk(int worker, Index item, Index next_item, Index then) {
        const Group &group = groups_[item / hidden_chunks_];
        const Index first = item % hidden_chunks_ * hidden_chunk_;
        const Index count = std::min(hidden_chunk_, inner_depth_ - first);
        const Rows gate = gate_rows(item), up = gate_up_weights_.rows(group.expert, inner_depth_ + first);
        const Rows next = next_item >= 0 ? gate_rows(next_item) : down_rows(then);
        float *gates = gate_up_.of(worker);
        float *ups = gates + kTokenBlock * hidden_chunk_;
        for (Index m = 0; m < group.num_tokens; m += kTokenBlock) {
            const Index num_tokens = std::min(kTokenBlock, group.num_tokens - m);
            const void *const *x = x_blocks_ + (group.first_pair + m) / gate_up_kernels_.width;
            gate_up_kernels_.multiply(gate, count, hidden_depth_, x, num_tokens, gates, hidden_chunk_,
                                      m == 0 ? up : kNothing);
            gate_up_kernels_.multiply(up, count, hidden_depth_, x, num_tokens, ups, hidden_chunk_,
                                      m == 0 ? next : kNothing);
            for (Index t = 0; t < num_tokens; t++) {
                const Index pair = group.first_pair + m + t;
                down_kernels_.swiglu(gates + t * hidden_chunk_, ups + t * hidden_chunk_, first, count, inner_depth_,
                                     hidden_block(pair), pair % down_kernels_.width);
            }
        }
    }

    void out_chunk(Index item, Index next_item) {
        const Group &group = groups_[item / out_chunks_];
        const Index first = item % out_chunks_ * out_chunk_;
        const Index count = std::min(out_chunk_, hidden_depth_ - first);
        const Rows down = down_rows(item);
        const Rows next = next_item >= 0 ? down_rows(next_item) : down;
        for (Index m = 0; m < group.num_tokens; m += kTokenBlock) {
            const Index num_tokens = std::min(kTokenBlock, group.num_tokens - m);
            const Index pair = group.first_pair + m;
            down_kernels_.multiply(down, count, inner_depth_, h_blocks_ + pair / down_kernels_.width, num_tokens,
                                   out_row(pair) + first, out_stride_, m == 0 ? next : kNothing);
        }
    }

    // As they come. After one that does not nothing is waited for, and what is left of the sums is of no use.
    void run_late(int worker) {
        const Index hidden = num_there_ * hidden_chunks_, out = num_there_ * out_chunks_;
        drain_in_order(late_to_hidden_, [=](Index item, Index next) {
            if (!came(worker, hidden + item, hidden_chunks_)) return;
            hidden_chunk(worker, hidden + item, next < 0 ? next : hidden + next, out);
        });
        drain_in_order(late_to_out_, [=](Index item, Index next) {
            if (came(worker, out + item, out_chunks_)) out_chunk(out + item, next < 0 ? next : out + next);
        });
    }

    bool came(int worker, Index item, Index chunks) {
        return arrivals_.await(groups_[item / chunks].expert, *waited_ns_.of(worker));
    }

    void mix_token(int worker, Index token) {
        const float **outs = outs_of_token_.of(worker);
        float *weights = weights_of_token_.of(worker);
        Index used = 0;
        for (Index slot = token * layer_.top_k; slot < (token + 1) * layer_.top_k; slot++) {
            if (pair_of_slot_[slot] < 0) continue;
            outs[used] = out_row(pair_of_slot_[slot]);
            weights[used++] = layer_.weights[slot];
        }
        down_kernels_.mix(outs, weights, used, hidden_depth_,
                          static_cast<char *>(layer_.y) + token * hidden_depth_ * token_bytes_);
    }

    Rows gate_rows(Index item) const {
        return gate_up_weights_.rows(groups_[item / hidden_chunks_].expert, item % hidden_chunks_ * hidden_chunk_);
    }

    Rows down_rows(Index item) const {
        return down_weights_.rows(groups_[item / out_chunks_].expert, item % out_chunks_ * out_chunk_);
    }

    char *hidden_block(Index pair) const { return hidden_ + pair / down_kernels_.width * hidden_stride_; }
    float *out_row(Index pair) const { return outs_ + pair * out_stride_; }

    const es_layer &layer_;
    const Kernels &gate_up_kernels_, &down_kernels_;
    const Index token_bytes_, hidden_depth_, inner_depth_;  // bytes of a token's feature; D; F
    const Index width_;                                     // of the wider blocks
    const Matrices gate_up_weights_, down_weights_;
    Arrivals arrivals_;
    bool ids_in_range_ = true;

    Group *groups_ = nullptr;  // those that are there first
    Index num_groups_ = 0, num_there_ = 0, num_pairs_ = 0;
    Index *pair_of_slot_ = nullptr;      // [T * K], -1 for unused slots
    Index *first_of_expert_ = nullptr;   // [E + 1]
    Index *token_of_pair_ = nullptr;     // -1 behind the last of a group
    const void **x_blocks_ = nullptr;    // of pairs; those of one token are the same for all its experts
    const void **h_blocks_ = nullptr;
    char *tokens_ = nullptr, *hidden_ = nullptr;
    float *outs_ = nullptr;
    Index token_stride_ = 0, hidden_stride_ = 0, out_stride_ = 0;  // bytes, bytes, floats
    Own<float> gate_up_;  // gate, then up, of one chunk of one block of tokens
    Own<const float *> outs_of_token_;  // [K]
    Own<float> weights_of_token_;
    Own<std::int64_t> waited_ns_;

    Index hidden_chunk_ = 0, hidden_chunks_ = 0, out_chunk_ = 0, out_chunks_ = 0;
    Queue packing_, to_hidden_, to_out_, late_to_hidden_, late_to_out_, mixing_;
};

}  // namespace expertshare
