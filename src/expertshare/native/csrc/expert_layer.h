// One call of the expert layer: group tokens by expert, gate and up with SiLU, down, mix. Experts that are still on their
// way come last.
#pragma once

#include "abi.h"
#include "arena.h"
#include "arrivals.h"
#include "kernels.h"
#include "pool.h"
#include "queue.h"

namespace expertshare {

// Tokens of one expert: pairs first_pair .. first_pair + num_tokens. The first is the first of a block of either kernel.
struct Group {
    Index expert, first_pair, num_tokens;
};

// Where the rows of one projection are, with their scales and minima.
struct Matrices {
    Matrices(const es_weight &of, Index depth);
    Rows rows(Index expert, Index row) const;

    const es_weight &weight;
    const Index row_bytes, scale_bytes;  // codes of a row; its scales
};

// Every number is computed by one thread, in one order, whichever thread that is: results do not depend on how many
// there are. Threads with even numbers take the largest groups first and the others the smallest, so that at any time
// some cores are busy with arithmetic while others have the memory for themselves.
class ExpertLayer final : public Work {
   public:
    // Throws std::bad_alloc. The kernels are those of gate_up and of down.
    ExpertLayer(const es_layer &layer, const Kernels &to_hidden, const Kernels &to_out, Arena &arena);

    bool ids_in_range() const { return ids_in_range_; }
    bool all_arrived() const { return arrivals_.all_came(); }
    std::int64_t waited_ns() const;
    int useful_threads() const;
    void run(int worker) override;

   private:
    void lay_out(Arena &arena);
    void group_tokens();
    void choose_chunks();

    void pack_tokens(Index item);
    void hidden_chunk(int worker, Index item, Index next_item, Index then);
    void out_chunk(Index item, Index next_item);
    void run_late(int worker);
    bool came(int worker, Index item, Index chunks);
    void mix_token(int worker, Index token);

    Rows gate_rows(Index item) const;
    Rows down_rows(Index item) const;
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
