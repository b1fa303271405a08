// One call of the expert layer: group tokens by expert, gate and up with SiLU, down, mix.
#pragma once

#include "abi.h"
#include "arena.h"
#include "kernels.h"
#include "pool.h"
#include "queue.h"

namespace expertshare {

// Tokens of one expert: pairs first_pair .. first_pair + num_tokens.
struct Group {
    Index expert, first_pair, num_tokens;
};

// Every number is computed by one thread, in one order, whichever thread that is: results do not depend on how many
// there are. Threads with even numbers take the largest groups first and the others the smallest, so that at any time
// some cores are busy with arithmetic while others have the memory for themselves.
class ExpertLayer final : public Work {
   public:
    // Throws std::bad_alloc. `kernels` are those of the layer's weight type.
    ExpertLayer(const es_layer &layer, const Kernels &kernels, Arena &arena);

    bool ids_in_range() const { return ids_in_range_; }
    int useful_threads() const;
    void run(int worker) override;

   private:
    void lay_out(Arena &arena);
    void group_tokens();
    void choose_chunks();

    void encode_token(Index token);
    void hidden_chunk(int worker, Index item, Index next_item);
    void out_chunk(Index item, Index next_item);
    void mix_token(int worker, Index token);

    const char *gate_rows(Index item) const;
    const char *down_rows(Index item) const;
    char *hidden_row(Index pair) const { return hidden_ + pair * hidden_stride_; }
    float *out_row(Index pair) const { return outs_ + pair * out_stride_; }

    const es_layer &layer_;
    const Kernels &kernels_;
    const Index element_, hidden_depth_, inner_depth_;  // bytes of a weight; D; F
    bool ids_in_range_ = true;

    Group *groups_ = nullptr;
    Index num_groups_ = 0, num_pairs_ = 0;
    Index *pair_of_slot_ = nullptr;      // [T * K], -1 for unused slots
    Index *first_of_expert_ = nullptr;   // [E + 1]
    const void **x_of_pair_ = nullptr;   // scratch rows
    const void **h_of_pair_ = nullptr;
    char *tokens_ = nullptr, *hidden_ = nullptr;
    float *outs_ = nullptr;
    Index token_stride_ = 0, hidden_stride_ = 0, out_stride_ = 0;  // bytes, bytes, floats
    float *gate_up_ = nullptr;  // per thread: gate, then up, of one chunk of one block of tokens
    Index gate_up_per_thread_ = 0;
    const float **outs_of_token_ = nullptr;  // per thread: [K]
    float *weights_of_token_ = nullptr;

    Index hidden_chunk_ = 0, hidden_chunks_ = 0, out_chunk_ = 0, out_chunks_ = 0;
    Queue encode_, to_hidden_, to_out_, mix_;
};

}  // namespace expertshare
