// From the scores of a block's tokens to the experts that it shares.
#pragma once

#include "reach.h"

namespace expertshare {

// Sums of one group, in double.
class Votes {
   public:
    explicit Votes(int64_t experts)
        : sums_(static_cast<std::size_t>(experts)), any_(static_cast<std::size_t>(experts)) {}

    void clear() {
        std::fill(sums_.begin(), sums_.end(), 0.0);
        std::fill(any_.begin(), any_.end(), uint8_t{0});
    }
    void add(int64_t expert, float score) {
        sums_[static_cast<std::size_t>(expert)] += static_cast<double>(score);
        any_[static_cast<std::size_t>(expert)] = 1;
    }
    void write(float *votes) const {
        for (std::size_t e = 0; e < sums_.size(); e++) votes[e] = any_[e] != 0 ? static_cast<float>(sums_[e]) : kNever;
    }

   private:
    std::vector<double> sums_;
    std::vector<uint8_t> any_;
};

// most[e]: the highest score that a live token gives, -inf where none is live.
inline void highest(const float *choice, const std::uint8_t *live, int64_t length, int64_t experts, float *most) {
    std::fill_n(most, experts, kNever);
    for (int64_t token = 0; token < length; token++) {
        if (live[token] == 0) continue;
        const float *row = choice + token * experts;
        for (int64_t e = 0; e < experts; e++) most[e] = most[e] < row[e] ? row[e] : most[e];
    }
}

// Rankings of whole rows; those of a few in many are kept in order while they grow.
class RowRanking {
   public:
    // `found(place, id)` for the k best, those in front (null: none) before all others.
    template <class Found>
    void best(const float *scores, const std::uint8_t *front, int64_t n, int64_t k, Found found) {
        const bool is_short = k <= kShort && k < n && front == nullptr;
        if (is_short) {
            keys_.resize(static_cast<std::size_t>(n));
            for (int64_t i = 0; i < n; i++) keys_[static_cast<std::size_t>(i)] = ordered(scores[i]);
            podium_.reset(static_cast<int>(k));
            podium_.offer(keys_.data(), static_cast<int>(n), nullptr, 0, std::numeric_limits<std::int32_t>::min());
        } else {
            sorted_.rank(scores, front, static_cast<int>(n), static_cast<int>(k));
        }
        for (int place = 0; place < k; place++) found(place, is_short ? podium_.id(place) : sorted_.id(place));
    }

    // See es_shortest_prefix; member: written in full.
    void shortest_prefix(const float *scores, int64_t n, double share, std::uint8_t *member) {
        std::memset(member, 0, static_cast<std::size_t>(n));
        const int count = sorted_.rank_above(scores, kNever, static_cast<int>(n));  // who is at -inf is no member
        double total = 0.0, upto = 0.0;
        const auto mass = [scores](int id) { return scores[id] > 0.0f ? static_cast<double>(scores[id]) : 0.0; };
        for (int place = 0; place < count; place++) total += mass(sorted_.id(place));
        for (int place = 0; place < count; place++) {
            const int id = sorted_.id(place);
            upto += mass(id);
            const bool wanted = share == 1.0 || upto - mass(id) <= share * total;  // 1: whatever the rounding
            member[id] = wanted ? 1 : 0;
        }
    }

   private:
    static constexpr int kShort = 64;
    Podium podium_;
    Sorted sorted_;
    std::vector<std::int32_t> keys_;
};

}  // namespace expertshare
