// From the scores of a block's tokens to the experts that it shares.
#pragma once

#include <cmath>

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
    // `found(id)` for the k best, those in front (null: none) before all others.
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
        for (int place = 0; place < k; place++) found(is_short ? podium_.id(place) : sorted_.id(place));
    }

    // Adds those above -inf before which at most `share` of the mass lies, which is the sum of scores above 0.
    void add_shortest_prefix(const float *scores, int64_t n, double share, std::uint8_t *member) {
        const int count = sorted_.rank_above(scores, kNever, static_cast<int>(n));
        double total = 0.0, upto = 0.0;
        const auto mass = [scores](int id) { return scores[id] > 0.0f ? static_cast<double>(scores[id]) : 0.0; };
        for (int place = 0; place < count; place++) total += mass(sorted_.id(place));
        for (int place = 0; place < count; place++) {
            const int id = sorted_.id(place);
            upto += mass(id);
            const bool wanted = share == 1.0 || upto - mass(id) <= share * total;  // 1: whatever the rounding
            if (wanted) member[id] = 1;
        }
    }

   private:
    static constexpr int kShort = 64;
    Podium podium_;
    Sorted sorted_;
    std::vector<std::int32_t> keys_;
};

// Greedy maximum coverage over the ballots of a group. Masses are whole numbers in double: their sums are exact, so
// that the order of tokens does not matter.
class Cover {
   public:
    void clear(int64_t experts, int64_t top_k) {
        experts_ = static_cast<std::size_t>(experts);
        top_k_ = static_cast<std::size_t>(top_k);
        votes_.assign(experts_, 0.0);
        ballots_.clear();
        masses_.clear();
        wanted_.clear();
    }

    // A token's ballot, -1 behind the last, and the affinity that it gives each expert.
    void add(const std::int32_t *ballot, const float *affinity, double saturation) {
        double total = 0.0;
        for (std::size_t place = 0; place < top_k_; place++) {
            const std::int32_t expert = ballot[place];
            const double units = expert < 0 ? 0.0 : std::nearbyint(static_cast<double>(affinity[expert]) * kUnits);
            const double mass = units == units ? units : 0.0;  // NaN would be no best
            ballots_.push_back(expert);
            masses_.push_back(mass);
            total += mass;
            if (expert >= 0) votes_[static_cast<std::size_t>(expert)] += mass;
        }
        wanted_.push_back(std::floor(total * saturation));
    }

    // Adds `size` experts, each the one that adds most; once all tokens have enough, the one with most mass.
    void take(int64_t size, std::uint8_t *member) {
        for (int64_t taken = 0; taken < size; taken++) {
            gains_.assign(experts_, 0.0);
            bool anything = false;
            for (std::size_t i = 0; i < ballots_.size(); i++) {
                const double gain = std::min(masses_[i], wanted_[i / top_k_]);
                if (ballots_[i] >= 0) gains_[static_cast<std::size_t>(ballots_[i])] += gain;
                anything = anything || gain != 0.0;
            }
            const std::vector<double> &gains = anything ? gains_ : votes_;
            std::size_t best = experts_;
            for (std::size_t e = 0; e < experts_; e++) {
                if (member[e] == 0 && (best == experts_ || gains[e] > gains[best])) best = e;
            }
            member[best] = 1;
            for (std::size_t i = 0; i < ballots_.size(); i++) {
                if (ballots_[i] != static_cast<std::int32_t>(best)) continue;
                wanted_[i / top_k_] = std::max(0.0, wanted_[i / top_k_] - masses_[i]);
                masses_[i] = 0.0;
            }
        }
    }

   private:
    static constexpr double kUnits = 4294967296.0;  // of mass in an affinity of 1
    std::size_t experts_ = 0, top_k_ = 0;
    std::vector<std::int32_t> ballots_;         // [tokens, top_k]
    std::vector<double> masses_, wanted_;       // [tokens, top_k]; [tokens], what is still to be covered
    std::vector<double> votes_, gains_;         // [experts]
};

}  // namespace expertshare
