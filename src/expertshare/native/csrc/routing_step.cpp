#include "routing_step.h"

#include <algorithm>
#include <type_traits>

#include "mixture.h"

namespace expertshare {
namespace {

constexpr Index kMostScratches = 16;  // more threads than that only wait while tokens are ranked

GroupRule ballot_rule(const es_rule &rule) { return {rule.ballot_groups, rule.ballot_kept_groups}; }
GroupRule inside_rule(const es_rule &rule) { return {rule.expert_groups, rule.kept_groups}; }

bool casts_ballots(const es_rule &rule) { return rule.ranking == ES_VOTES || rule.ranking == ES_COVERAGE; }
bool any(const uint8_t *of, Index count) {
    return std::any_of(of, of + count, [](uint8_t one) { return one != 0; });
}

}  // namespace

RankingScratch::RankingScratch(const es_step &step)
    : ballot(step.num_experts, step.top_k, ballot_rule(step.rule)),
      inside(step.num_experts, step.top_k, inside_rule(step.rule)),
      votes(step.num_experts),
      ranking(static_cast<std::size_t>(step.num_experts)),
      front(static_cast<std::size_t>(step.num_experts)) {
    ballot.enter_group(nullptr);
}

bool RankingScratch::fits(const es_step &step) const {
    return ranking.size() == static_cast<std::size_t>(step.num_experts) &&
           ballot.is_for(step.top_k, ballot_rule(step.rule)) && inside.is_for(step.top_k, inside_rule(step.rule));
}

Index RoutingStep::groups_at_a_time(const es_step &step) {
    return std::max<Index>(1, RouterScores::kTokensAtATime / std::max<Index>(1, step.length));
}

RoutingStep::RoutingStep(const es_step &step, const RouterKernels &kernels, Index first_group, Index num_groups,
                         Arena &scores_arena, Arena &arena, std::vector<RankingScratch> &scratch)
    : step_(step),
      rule_(step.rule),
      first_group_(first_group),
      num_groups_(num_groups),
      num_experts_(step.num_experts),
      first_token_(first_group * step.length),
      shares_(step.rule.ranking != ES_ALL_EXPERTS || step.previous != nullptr),
      tokens_(carve(arena)),
      router_scores_(step, tokens_, kernels, scores_arena),
      scratch_(scratch) {
    const auto num_scratches = static_cast<std::size_t>(std::min<Index>(step.num_threads, kMostScratches));
    if (scratch.size() != num_scratches || !scratch.front().fits(step)) {
        scratch.clear();
        for (std::size_t i = 0; i < num_scratches; i++) scratch.emplace_back(step);
    }
    for (RankingScratch &one : scratch) one.entered = RankingScratch::kNoGroup;
    if (step.active != nullptr && shares_) find_voters();
    to_score_.fill(num_groups * step.length);
    to_elect_.fill(num_groups);
    to_assign_.fill(num_groups * step.length);
}

// Memory for all that is between a token's features and its plan, where the caller does not want it.
RouterScores::Tokens RoutingStep::carve(Arena &arena) {
    const Index tokens = num_groups_ * step_.length, scores = tokens * num_experts_, slots = tokens * step_.top_k;
    const auto wanted_or_ours = [&](auto *wanted, Index first, Index count) {
        return wanted != nullptr ? wanted + first : arena.carve<std::remove_pointer_t<decltype(wanted)>>(count);
    };
    RouterScores::Tokens of = {first_token_, tokens, nullptr, nullptr};
    arena.lay_out([&] {
        of.affinity = wanted_or_ours(step_.affinity, first_token_ * num_experts_, scores);
        if (step_.bias != nullptr) of.choice = wanted_or_ours(step_.choice, first_token_ * num_experts_, scores);
        coreset_ = wanted_or_ours(step_.coreset, first_group_ * num_experts_, num_groups_ * num_experts_);
        ballots_ = arena.carve<int32_t>(slots);
        best_ = arena.carve<float>(slots);
        kept_ = arena.carve<uint8_t>(slots);
        votes_ = arena.carve<uint8_t>(tokens);
    });
    return of;
}

// That of the step before, if it has members; otherwise null.
const uint8_t *RoutingStep::kept_coreset(Index group) const {
    if (step_.previous == nullptr) return nullptr;
    const uint8_t *previous = step_.previous + (first_group_ + group) * num_experts_;
    return any(previous, num_experts_) ? previous : nullptr;
}

// The live tokens, or the masked ones of a group that has any; none of a group that keeps its coreset.
void RoutingStep::find_voters() {
    for (Index group = 0; group < num_groups_; group++) {
        const Index length = step_.length, first = first_token_ + group * length;
        const uint8_t *live = step_.live + first;
        uint8_t *votes = votes_ + group * length;
        if (kept_coreset(group) != nullptr) {
            std::fill_n(votes, length, uint8_t{0});
            continue;
        }
        std::copy_n(live, length, votes);
        if (rule_.only_masked_vote == 0 || step_.masked == nullptr) continue;
        const uint8_t *masked = step_.masked + first;
        for (Index i = 0; i < length; i++) votes[i] = live[i] != 0 && masked[i] != 0 ? 1 : 0;
        if (!any(votes, length)) std::copy_n(live, length, votes);
    }
}

const float *RoutingStep::choice(Index token) const {
    return (tokens_.choice != nullptr ? tokens_.choice : tokens_.affinity) + token * num_experts_;
}

void RoutingStep::run(int worker) {
    router_scores_.multiply_all(worker);
    if (worker >= static_cast<int>(scratch_.size())) return;  // nothing is read that others are still to write
    RankingScratch &scratch = scratch_[static_cast<std::size_t>(worker)];
    drain(to_score_, worker, [&](Index token, Index) { score(token, scratch); });
    if (step_.active == nullptr || (!shares_ && step_.coreset == nullptr)) return;
    drain(to_elect_, worker, [&](Index group, Index) { elect(group, scratch); });
    if (!shares_) return;
    drain(to_assign_, worker, [&](Index token, Index) { assign(token, scratch); });
}

// Its scores, and what they are enough for: the plan without a coreset, or the ballot.
void RoutingStep::score(Index token, RankingScratch &scratch) {
    router_scores_.finish(token);
    if (step_.active == nullptr) return;
    if (!shares_) return assign(token, scratch);
    if (!casts_ballots(rule_) || votes_[token] == 0) return;
    scratch.ballot.rank(choice(token));
    const Podium &podium = scratch.ballot.podium();
    int32_t *ballot = ballots_ + token * step_.top_k;
    for (int place = 0; place < step_.top_k; place++) ballot[place] = place < podium.size() ? podium.id(place) : -1;
}

void RoutingStep::tally(Index group, RankingScratch &scratch) {
    scratch.votes.clear();
    std::fill(scratch.front.begin(), scratch.front.end(), uint8_t{0});
    for (Index token = group * step_.length; token < (group + 1) * step_.length; token++) {
        if (votes_[token] == 0) continue;
        for (Index place = 0; place < step_.top_k; place++) {
            const int32_t expert = ballots_[token * step_.top_k + place];
            if (expert < 0) break;
            scratch.votes.add(expert, choice(token)[expert]);
            if (place < rule_.num_protected) scratch.front[static_cast<std::size_t>(expert)] = 1;
        }
    }
    scratch.votes.write(scratch.ranking.data());
}

void RoutingStep::elect_by_cover(Index group, RankingScratch &scratch, uint8_t *member) {
    scratch.cover.clear(num_experts_, step_.top_k);
    for (Index token = group * step_.length; token < (group + 1) * step_.length; token++) {
        if (votes_[token] == 0) continue;
        scratch.cover.add(ballots_ + token * step_.top_k, tokens_.affinity + token * num_experts_, rule_.saturation);
    }
    scratch.cover.take(rule_.size, member);
}

void RoutingStep::elect(Index group, RankingScratch &scratch) {
    uint8_t *member = coreset_ + group * num_experts_;
    if (const uint8_t *previous = kept_coreset(group)) {
        std::copy_n(previous, num_experts_, member);
        return;
    }
    std::fill_n(member, num_experts_, rule_.ranking == ES_ALL_EXPERTS ? uint8_t{1} : uint8_t{0});
    if (rule_.ranking == ES_ALL_EXPERTS) return;
    if (rule_.ranking == ES_COVERAGE) return elect_by_cover(group, scratch, member);
    const Index first = group * step_.length;
    const float *ranking = scratch.ranking.data();
    const uint8_t *front = rule_.num_protected > 0 ? scratch.front.data() : nullptr;
    if (rule_.ranking == ES_VOTES) {
        tally(group, scratch);
    } else {
        highest(choice(first), votes_ + first, step_.length, num_experts_, scratch.ranking.data());
    }
    if (rule_.prefix_share >= 0.0) scratch.rows.add_shortest_prefix(ranking, num_experts_, rule_.prefix_share, member);
    const bool prefix_is_enough = front == nullptr && std::count(member, member + num_experts_, 1) >= rule_.size;
    if (front != nullptr && rule_.keep_protected != 0) {
        for (Index e = 0; e < num_experts_; e++) member[e] |= front[e];
        if (std::count(front, front + num_experts_, 1) >= rule_.size) return;
    }
    if (prefix_is_enough) return;
    scratch.rows.best(ranking, front, num_experts_, rule_.size, [member](int id) { member[id] = 1; });
}

void RoutingStep::assign(Index token, RankingScratch &scratch) {
    const Index group = token / step_.length, top_k = step_.top_k;
    const Index wanted = shares_ ? group : RankingScratch::kAllExperts;
    if (scratch.entered != wanted) {
        scratch.inside.enter_group(shares_ ? coreset_ + group * num_experts_ : nullptr);
        scratch.entered = wanted;
    }
    const bool is_live = step_.live[first_token_ + token] != 0;
    if (is_live) scratch.inside.rank(choice(token));
    const Podium &podium = scratch.inside.podium();
    const int found = is_live ? podium.size() : 0;
    const Index slot = token * top_k, kept_slots = std::min(rule_.experts_per_token, top_k);
    int64_t *ids = step_.ids + first_token_ * top_k + slot;
    for (int place = 0; place < top_k; place++) {
        ids[place] = place < found && place < kept_slots ? podium.id(place) : -1;
        best_[slot + place] = place < found ? tokens_.affinity[token * num_experts_ + podium.id(place)] : 0.0f;
    }
    const uint8_t *kept = nullptr;
    if (rule_.drop_share >= 0.0) {
        drop_lightest(best_ + slot, static_cast<int>(kept_slots), rule_.drop_share, kept_ + slot);
        std::fill(kept_ + slot + kept_slots, kept_ + slot + top_k, uint8_t{0});
        kept = kept_ + slot;
    }
    weigh(ids, best_ + slot, kept, top_k, rule_.renormalise != 0, rule_.scaling,
          step_.weights + first_token_ * top_k + slot);
}

void RoutingStep::count(const es_step &step) {
    const Index slots = step.length * step.top_k;
    std::vector<Index> last(static_cast<std::size_t>(step.num_experts), -1);  // the last group that used an expert
    std::fill_n(step.load, step.num_experts, int64_t{0});
    for (Index group = 0; group < step.groups; group++) {
        step.unique[group] = 0;
        for (Index slot = group * slots; slot < (group + 1) * slots; slot++) {
            if (step.ids[slot] < 0) continue;
            Index &seen = last[static_cast<std::size_t>(step.ids[slot])];
            step.load[step.ids[slot]]++;
            step.unique[group] += seen == group ? 0 : 1;
            seen = group;
        }
    }
    for (Index e = 0; e < step.num_experts; e++) step.active[e] = step.load[e] != 0 ? 1 : 0;
}

}  // namespace expertshare
