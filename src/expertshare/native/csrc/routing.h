// The primitives of expert routing: exact rankings and what is counted from them. One thread: they take microseconds.
// Scores are float32; ties go to the lower id. Masks are bytes, 0 or 1. Pointers marked so may be null.
#pragma once

#include <cstdint>

extern "C" {

// The k best of each of num_rows rows of n scores, best first, NaN above all (torch's own fallback ranks it so).
// front: [num_rows, n] or null; ids in front outrank all others. ids: [num_rows, k] or null; member: [num_rows, n] or
// null, written in full.
int es_top_k(const float *scores, const uint8_t *front, int64_t num_rows, int64_t n, int64_t k, int64_t *ids,
             uint8_t *member);

// Each live token's k best experts within its reach, of those whose score is above -inf. A token reaches the experts of
// its group's coreset, in the `kept_groups` of `expert_groups` equal groups whose two best have the largest sum.
int es_reachable_best(const float *choice,     // [groups * length, experts]
                      const uint8_t *live,     // [groups * length]
                      const uint8_t *coreset,  // [groups, experts]; null: all experts
                      const float *affinity,   // [groups * length, experts]; null without `best`
                      int64_t *ids,            // [groups * length, k], best first, -1 behind the last; or null
                      float *best,             // affinity of ids, 0 where -1; or null
                      uint8_t *cast,           // [groups * length, experts]: membership; or null
                      int64_t groups, int64_t length, int64_t experts, int64_t k, int64_t expert_groups,
                      int64_t kept_groups);

// es_reachable_best and es_tally in one, without a coreset; firsts[g, e]: whether any token of the group has e among its
// `num_firsts` best.
int es_votes(const float *choice, const uint8_t *live, int64_t groups, int64_t length, int64_t experts, int64_t k,
             int64_t expert_groups, int64_t kept_groups, int64_t num_firsts, float *votes, uint8_t *firsts);

// votes[g, e] = sum over tokens of cast * choice, in double, rounded once; -inf where no token of the group cast e.
int es_tally(const float *choice, const uint8_t *cast, int64_t groups, int64_t length, int64_t experts, float *votes);

// max over live tokens of choice, -inf where none is live.
int es_group_max(const float *choice, const uint8_t *live, int64_t groups, int64_t length, int64_t experts, float *most);

// Of each row's ranking: those before which at most `share` of the row's mass lies, if above -inf. Mass: scores above 0.
int es_shortest_prefix(const float *scores, int64_t num_rows, int64_t n, double share, uint8_t *member);

// All but the lightest of each row whose cumulative share of the row's sum is below `share`; k <= 64.
int es_drop_lightest(const float *weights, int64_t num_rows, int64_t k, double share, uint8_t *kept);

// Unused slots: -1 on entry, or not kept. weights: the model's rule. active: which experts are used at all.
int es_weigh(int64_t *ids, const float *affinity, const uint8_t *kept, int64_t num_tokens, int64_t k, int64_t experts,
             int renormalise, float scaling, float *weights, uint8_t *active);

// load[e]: slots that use e. unique[g]: experts that a group's slots use.
int es_count_load(const int64_t *ids, int64_t groups, int64_t slots, int64_t experts, int64_t *load, int64_t *unique);
}
