// A layer's routing in one call: router scores, coresets, plan and counts, under the fields of a sharing rule
// (routing/rule.py). routing/select.py and routing/assign.py say what they mean; the bits here are the same.
#pragma once

#include <vector>

#include "election.h"
#include "router_scores.h"

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
// coreset, all assign experts of it to tokens.
class RoutingStep final : public Work {
   public:
    // Throws std::bad_alloc. scores_arena: scratch of the router scores; arena: ours; scratch: made to fit, one for
    // each thread that ranks.
    RoutingStep(const es_step &step, const RouterKernels &kernels, Index first_group, Index num_groups,
                Arena &scores_arena, Arena &arena, std::vector<RankingScratch> &scratch);

    static Index groups_at_a_time(const es_step &step);
    // Once all groups are done.
    static void count(const es_step &step);

    int useful_threads() const { return router_scores_.useful_threads(); }
    void run(int worker) override;

   private:
    RouterScores::Tokens carve(Arena &arena);
    const uint8_t *kept_coreset(Index group) const;
    void find_voters();
    void score(Index token, RankingScratch &scratch);
    void elect(Index group, RankingScratch &scratch);
    void elect_by_cover(Index group, RankingScratch &scratch, uint8_t *member);
    void tally(Index group, RankingScratch &scratch);
    void assign(Index token, RankingScratch &scratch);
    const float *choice(Index token) const;

    const es_step &step_;
    const es_rule &rule_;
    const Index first_group_, num_groups_, num_experts_, first_token_;
    const bool shares_;           // whether tokens look into a coreset
    int32_t *ballots_ = nullptr;  // [tokens, top_k]: experts, -1 behind the last. These five before `carve` sets them
    uint8_t *coreset_ = nullptr;  // [groups, num_experts]
    uint8_t *votes_ = nullptr;    // [tokens]: whether it casts a ballot
    float *best_ = nullptr;       // [tokens, top_k]
    uint8_t *kept_ = nullptr;     // [tokens, top_k]
    const RouterScores::Tokens tokens_;
    RouterScores router_scores_;
    std::vector<RankingScratch> &scratch_;
    Queue to_score_, to_elect_, to_assign_;
};

}  // namespace expertshare
