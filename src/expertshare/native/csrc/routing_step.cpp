#include "routing_step.h"

#include <algorithm>

#include "mixture.h"

namespace expertshare {
namespace {

constexpr Index kMostScratches = 16;  // more threads than that only wait while tokens are ranked

GroupRule ballot_rule(const es_recipe &recipe) { return {recipe.ballot_groups, recipe.ballot_kept_groups}; }
GroupRule inside_rule(const es_recipe &recipe) { return {recipe.expert_groups, recipe.kept_groups}; }

bool has_front(const es_recipe &recipe) { return recipe.num_firsts > 0 || recipe.prefix_share >= 0.0; }

}  // namespace

RankingScratch::RankingScratch(const es_step &step)
    : ballot(step.gate.num_experts, step.top_k, ballot_rule(step.recipe)),
      inside(step.gate.num_experts, step.top_k, inside_rule(step.recipe)),
      votes(step.gate.num_experts),
      ranking(static_cast<std::size_t>(step.gate.num_experts)),
      front(static_cast<std::size_t>(step.gate.num_experts)) {
    ballot.enter_group(nullptr);
}

bool RankingScratch::fits(const es_step &step) const {
    return ranking.size() == static_cast<std::size_t>(step.gate.num_experts) &&
           ballot.is_for(step.top_k, ballot_rule(step.recipe)) && inside.is_for(step.top_k, inside_rule(step.recipe));
}

Index RoutingStep::groups_at_a_time(const es_step &step) {
    return std::max<Index>(1, Affinity::kTokensAtATime / std::max<Index>(1, step.length));
}

RoutingStep::RoutingStep(const es_step &step, const AffinityKernels &kernels, Index first_group, Index num_groups,
                         Arena &gate_arena, Arena &arena, std::vector<RankingScratch> &scratch)
    : step_(step),
      recipe_(step.recipe),
      first_group_(first_group),
      num_groups_(num_groups),
      num_experts_(step.gate.num_experts),
      gate_(gate_of(step, num_groups, arena)),
      affinity_(gate_, kernels, gate_arena),
      scratch_(scratch) {
    const Index tokens = num_groups * step.length;
    const auto num_scratches = static_cast<std::size_t>(std::min<Index>(step.gate.num_threads, kMostScratches));
    if (scratch.size() != num_scratches || !scratch.front().fits(step)) {
        scratch.clear();
        for (std::size_t i = 0; i < num_scratches; i++) scratch.emplace_back(step);
    }
    for (RankingScratch &one : scratch) one.entered = RankingScratch::kNoGroup;
    to_score_.fill(tokens);
    to_elect_.fill(num_groups);
    to_place_.fill(tokens);
}

// The part of the gate that these groups need, and memory for all that is between a token's features and its plan.
es_gate RoutingStep::gate_of(const es_step &step, Index num_groups, Arena &arena) {
    const Index tokens = num_groups * step.length, scores = tokens * num_experts_, slots = tokens * step.top_k;
    arena.reserve(2 * Arena::padded<float>(scores) + Arena::padded<int32_t>(slots) + Arena::padded<float>(slots) +
                  Arena::padded<uint8_t>(slots) + Arena::padded<uint8_t>(num_groups * num_experts_));
    es_gate gate = step.gate;
    gate.num_tokens = tokens;
    gate.x = static_cast<const char *>(gate.x) +
             first_group_ * step.length * gate.depth * (gate.is_bfloat16 != 0 ? 2 : 4);
    gate.affinity = arena.carve<float>(scores);
    gate.choice = gate.bias == nullptr ? nullptr : arena.carve<float>(scores);
    ballots_ = arena.carve<int32_t>(slots);
    best_ = arena.carve<float>(slots);
    kept_ = arena.carve<uint8_t>(slots);
    coreset_ = step.coreset != nullptr ? step.coreset + first_group_ * num_experts_
                                       : arena.carve<uint8_t>(num_groups * num_experts_);
    return gate;
}

const float *RoutingStep::choice(Index token) const {
    return (gate_.choice != nullptr ? gate_.choice : gate_.affinity) + token * num_experts_;
}

void RoutingStep::run(int worker) {
    affinity_.multiply_all(worker);
    if (worker >= static_cast<int>(scratch_.size())) return;  // nothing is read that others are still to write
    RankingScratch &scratch = scratch_[static_cast<std::size_t>(worker)];
    drain(to_score_, worker, [&](Index token, Index) { score(token, scratch); });
    if (recipe_.ranking == ES_ALL_EXPERTS && step_.coreset == nullptr) return;
    drain(to_elect_, worker, [&](Index group, Index) { elect(group, scratch); });
    if (recipe_.ranking == ES_ALL_EXPERTS) return;
    drain(to_place_, worker, [&](Index token, Index) { place(token, scratch); });
}

// Its scores, and what they are enough for: the plan without a coreset, or the ballot.
void RoutingStep::score(Index token, RankingScratch &scratch) {
    affinity_.finish(token);
    if (recipe_.ranking == ES_ALL_EXPERTS) return place(token, scratch);
    if (recipe_.ranking != ES_VOTES || step_.live[first_group_ * step_.length + token] == 0) return;
    scratch.ballot.rank(choice(token));
    const Podium &podium = scratch.ballot.podium();
    int32_t *ballot = ballots_ + token * step_.top_k;
    for (int place = 0; place < step_.top_k; place++) ballot[place] = place < podium.size() ? podium.id(place) : -1;
}

void RoutingStep::tally(Index group, RankingScratch &scratch) {
    scratch.votes.clear();
    std::fill(scratch.front.begin(), scratch.front.end(), uint8_t{0});
    for (Index token = group * step_.length; token < (group + 1) * step_.length; token++) {
        if (step_.live[first_group_ * step_.length + token] == 0) continue;
        for (Index place = 0; place < step_.top_k; place++) {
            const int32_t expert = ballots_[token * step_.top_k + place];
            if (expert < 0) break;
            scratch.votes.add(expert, choice(token)[expert]);
            if (place < recipe_.num_firsts) scratch.front[static_cast<std::size_t>(expert)] = 1;
        }
    }
    scratch.votes.write(scratch.ranking.data());
}

void RoutingStep::elect(Index group, RankingScratch &scratch) {
    uint8_t *member = coreset_ + group * num_experts_;
    if (recipe_.ranking == ES_ALL_EXPERTS) {
        std::fill_n(member, num_experts_, uint8_t{1});
        return;
    }
    if (recipe_.ranking == ES_VOTES) {
        tally(group, scratch);
    } else {
        highest(choice(group * step_.length), step_.live + (first_group_ + group) * step_.length, step_.length,
                num_experts_, scratch.ranking.data());
    }
    const float *ranking = scratch.ranking.data();
    uint8_t *front = scratch.front.data();
    if (recipe_.prefix_share >= 0.0) scratch.rows.shortest_prefix(ranking, num_experts_, recipe_.prefix_share, front);
    if (has_front(recipe_) && recipe_.front_is_whole != 0) {
        std::copy_n(front, num_experts_, member);
        if (std::count(front, front + num_experts_, uint8_t{1}) >= recipe_.size) return;
    } else {
        std::fill_n(member, num_experts_, uint8_t{0});
    }
    scratch.rows.best(ranking, has_front(recipe_) ? front : nullptr, num_experts_, recipe_.size,
                      [member](int, int id) { member[id] = 1; });
}

void RoutingStep::place(Index token, RankingScratch &scratch) {
    const Index group = token / step_.length;
    const bool shares = recipe_.ranking != ES_ALL_EXPERTS;
    const Index wanted = shares ? group : RankingScratch::kAllExperts;
    if (scratch.entered != wanted) {
        scratch.inside.enter_group(shares ? coreset_ + group * num_experts_ : nullptr);
        scratch.entered = wanted;
    }
    const bool is_live = step_.live[first_group_ * step_.length + token] != 0;
    if (is_live) scratch.inside.rank(choice(token));
    const Podium &podium = scratch.inside.podium();
    const int found = is_live ? podium.size() : 0;
    const Index slot = token * step_.top_k;
    int64_t *ids = step_.ids + first_group_ * step_.length * step_.top_k + slot;
    for (int place = 0; place < step_.top_k; place++) {
        ids[place] = place < found ? podium.id(place) : -1;
        best_[slot + place] = place < found ? gate_.affinity[token * num_experts_ + podium.id(place)] : 0.0f;
    }
    const uint8_t *kept = nullptr;
    if (recipe_.drop_share >= 0.0) {
        drop_lightest(best_ + slot, static_cast<int>(step_.top_k), recipe_.drop_share, kept_ + slot);
        kept = kept_ + slot;
    }
    for (Index behind = recipe_.most_slots; behind < step_.top_k; behind++) ids[behind] = -1;
    weigh(ids, best_ + slot, kept, step_.top_k, step_.renormalise != 0, step_.scaling,
          step_.weights + first_group_ * step_.length * step_.top_k + slot);
}

void RoutingStep::count(const es_step &step) {
    const Index slots = step.length * step.top_k;
    Load counted(step.gate.num_experts);
    std::fill_n(step.load, step.gate.num_experts, int64_t{0});
    for (Index group = 0; group < step.groups; group++) {
        step.unique[group] = counted.add_group(step.ids + group * slots, slots, step.load);
    }
    for (Index e = 0; e < step.gate.num_experts; e++) step.active[e] = step.load[e] != 0 ? 1 : 0;
}

}  // namespace expertshare
