// A whole routing step in one call: gate, selection, assignment and counts, of the policies that can be said in a few
// numbers. Every part is the one that the primitives of routing.h are made of, so both give the same bits.
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
};

// routing/recipe.py, field by field.
struct es_recipe {
    int64_t size;               // of the coreset, the front before all others
    int64_t num_firsts;         // votes: every token's first so many are in front
    double prefix_share;        // or the shortest prefix of the ranking that passes this share; below 0: not
    double drop_share;          // each token drops its lightest experts, up to this share; below 0: not
    int64_t most_slots;         // and what is behind so many
    int32_t ranking;            // es_ranking
    int32_t front_is_whole;     // a front larger than `size` stays whole
    int32_t ballot_groups, ballot_kept_groups;  // what a ballot may name
    int32_t expert_groups, kept_groups;         // what a token may be given inside its coreset
};

struct es_step {
    es_gate gate;         // num_tokens = groups * length; affinity and choice are not used
    es_recipe recipe;
    const uint8_t *live;  // [groups, length]
    uint8_t *coreset;     // [groups, num_experts]; or null
    int64_t *ids;         // [groups * length, top_k]
    float *weights;       // [groups * length, top_k]
    uint8_t *active;      // [num_experts]
    int64_t *load;        // [num_experts]
    int64_t *unique;      // [groups]
    int64_t groups, length, top_k;
    float scaling;
    int32_t renormalise;
};

// step: what stays the same from call to call: the gate's weights and rule, the recipe, top_k, scaling, renormalise. The
// others are as there. isa: below 0 for the best; ES_ISA_NAMED if EXPERTSHARE_ISA names one, which the caller must read.
int es_route(const es_step *step, const void *x, const uint8_t *live, uint8_t *coreset, int64_t *ids, float *weights,
             uint8_t *active, int64_t *load, int64_t *unique, int64_t groups, int64_t length, int32_t is_bfloat16,
             int32_t num_threads, es_team team, int32_t isa);
}

namespace expertshare {

// What one thread needs to rank. It is kept from step to step: layers of a model are alike.
struct RankingScratch {
    Reach ballot, inside;
    Votes votes;
    RowRanking rows;
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
    es_gate gate_of(const es_step &step, Index num_groups, Arena &arena);
    void score(Index token, RankingScratch &scratch);
    void elect(Index group, RankingScratch &scratch);
    void tally(Index group, RankingScratch &scratch);
    void place(Index token, RankingScratch &scratch);
    const float *choice(Index token) const;

    const es_step &step_;
    const es_recipe &recipe_;
    const Index first_group_, num_groups_, num_experts_;
    int32_t *ballots_ = nullptr;  // [tokens, top_k]: experts, -1 behind the last. These four before gate_of sets them
    uint8_t *coreset_ = nullptr;  // [groups, num_experts]
    float *best_ = nullptr;       // [tokens, top_k]
    uint8_t *kept_ = nullptr;     // [tokens, top_k]
    const es_gate gate_;
    Affinity affinity_;
    std::vector<RankingScratch> &scratch_;
    Queue to_score_, to_elect_, to_place_;
};

}  // namespace expertshare
