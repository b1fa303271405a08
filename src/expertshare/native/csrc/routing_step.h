// A layer's routing in one call: router scores, coresets, plan and counts, under the fields of a sharing rule
// (routing/rule.py). routing/select.py and routing/assign.py say what they mean; the bits here are the same.
#pragma once

#include <vector>

#include "affinity.h"
#include "election.h"
#include "load.h"

extern "C" {

// By what a group's experts are ranked.
enum es_ranking {
    ES_ALL_EXPERTS = 0,  // by nothing: all are members
    ES_VOTES = 1,        // sums over the ballots cast, each token's K best
    ES_HIGHEST = 2,      // the highest score that a token gives
    ES_COVERAGE = 3,     // one by one, by what they add to the affinity that the coreset covers
};

// SharingRule, with the model's group limit and K put in.
struct es_rule {
    int64_t size, num_protected;
    double prefix_share, saturation, drop_share;  // below 0: there is none
    int64_t experts_per_token;
    int32_t ranking;  // es_ranking
    int32_t keep_protected, only_masked_vote;
    int32_t ballot_groups, ballot_kept_groups;  // what a ballot may name
    int32_t expert_groups, kept_groups;         // what a token may be given inside its coreset
    int32_t renormalise;
    float scaling;
    int32_t padding;
};

// kernels/cpu_route.py packs this: what stays the same for a layer, then what a call brings.
struct es_step {
    const void *w;      // [num_experts, depth]
    const float *bias;  // [num_experts], or null
    int64_t depth, num_experts, top_k;
    int32_t w_is_bfloat16, is_softmax;
    es_rule rule;

    const void *x;            // [groups * length, depth]
    const uint8_t *live;      // [groups, length]
    const uint8_t *masked;    // [groups, length]: still to be decided; or null
    const uint8_t *previous;  // [groups, num_experts]: a row with members is that group's coreset; or null
    uint8_t *coreset;         // [groups, num_experts], written in full; or null
    float *affinity;          // [groups * length, num_experts], or null
    float *choice;            // the same, with a bias; or null
    int64_t *ids;             // [groups * length, top_k]
    float *weights;           // [groups * length, top_k]
    uint8_t *active;          // [num_experts]; null: only scores are wanted
    int64_t *load;            // [num_experts]
    int64_t *unique;          // [groups]
    int64_t groups, length;
    int32_t is_bfloat16;
    int32_t isa, num_threads;
    es_team team;  // null: threads of our own
};

int es_route(const es_step *step);
}

namespace expertshare {

// What one thread needs to rank. It is kept from step to step: layers of a model are alike.
struct RankingScratch {
    Reach ballot, inside;
    Votes votes;
    RowRanking rows;
    Cover cover;
    std::vector<float> ranking;
    std::vector<uint8_t> front;
    Index entered = kNoGroup;  // the group whose coreset `inside` holds

    static constexpr Index kNoGroup = -1, kAllExperts = -2;

    explicit RankingScratch(const es_step &step);
    bool fits(const es_step &step) const;
};

// So many groups of a step, from `first_group` on: all threads finish tokens and cast ballots, one elects a group's
// coreset, all place tokens inside it.
class RoutingStep final : public Work {
   public:
    // Throws std::bad_alloc. gate_arena: the gate's scratch; arena: ours; scratch: made to fit, one for
    // each thread that ranks.
    RoutingStep(const es_step &step, const AffinityKernels &kernels, Index first_group, Index num_groups,
                Arena &gate_arena, Arena &arena, std::vector<RankingScratch> &scratch);

    static Index groups_at_a_time(const es_step &step);
    // Once all groups are done.
    static void count(const es_step &step);

    int useful_threads() const { return affinity_.useful_threads(); }
    void run(int worker) override;

   private:
    es_gate gate_of(Arena &arena);
    void find_voters();
    void score(Index token, RankingScratch &scratch);
    void elect(Index group, RankingScratch &scratch);
    void elect_by_cover(Index group, RankingScratch &scratch, uint8_t *member);
    void tally(Index group, RankingScratch &scratch);
    void place(Index token, RankingScratch &scratch);
    const float *choice(Index token) const;

    const es_step &step_;
    const es_rule &rule_;
    const Index first_group_, num_groups_, num_experts_, first_token_;
    const bool shares_;           // whether tokens look into a coreset
    int32_t *ballots_ = nullptr;  // [tokens, top_k]: experts, -1 behind the last. These five before gate_of sets them
    uint8_t *coreset_ = nullptr;  // [groups, num_experts]
    uint8_t *votes_ = nullptr;    // [tokens]: whether it casts a ballot
    float *best_ = nullptr;       // [tokens, top_k]
    uint8_t *kept_ = nullptr;     // [tokens, top_k]
    const es_gate gate_;
    Affinity affinity_;
    std::vector<RankingScratch> &scratch_;
    Queue to_score_, to_elect_, to_place_;
};

}  // namespace expertshare
