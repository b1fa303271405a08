// What one token can reach of the experts, and its best among them.
#pragma once

#include "ranking.h"

namespace expertshare {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// How far a token sees: all experts, or those in `kept` of `groups` equal groups whose two best have the largest sum.
struct GroupRule {
    int groups, kept;
};

// Ranks the experts that a group of tokens may choose from. Owns its scratch: one for each thread.
class Reach {
   public:
    Reach(int64_t experts, int64_t k, GroupRule rule)
        : rule_(rule), experts_(static_cast<int>(experts)), k_(static_cast<int>(k)),
          group_size_(experts_ / rule.groups) {
        scores_.resize(size(experts));
        keys_.resize(size(experts));
        ids_.resize(size(experts));
        ends_.resize(size(rule.groups));
        group_keys_.resize(size(rule.groups));
        kept_.resize(size(rule.groups));
        groups_.reset(rule.kept);
        podium_.reset(k_);
    }

    bool is_for(int64_t k, GroupRule rule) const {
        return k_ == k && rule_.groups == rule.groups && rule_.kept == rule.kept;
    }

    // coreset: [experts], or null for all of them.
    void enter_group(const std::uint8_t *coreset) {
        int count = 0;
        for (int part = 0; part < rule_.groups; part++) {
            for (int e = part * group_size_; e < (part + 1) * group_size_; e++) {
                if (coreset == nullptr || coreset[e] != 0) ids_[size(count++)] = e;
            }
            ends_[size(part)] = count;
        }
        all_ = count == experts_;
    }

    // The best of a token whose scores are row[0 .. experts), in podium(): those above -inf.
    void rank(const float *row) {
        const int count = ends_.back();
        const float *scores = row;
        if (!all_) {
            for (int i = 0; i < count; i++) scores_[size(i)] = row[ids_[size(i)]];
            scores = scores_.data();
        }
        for (int i = 0; i < count; i++) keys_[size(i)] = ordered(scores[i]);
        podium_.reset(k_);
        const std::int32_t never = ordered(kNever);
        if (rule_.kept == rule_.groups) {
            podium_.offer(keys_.data(), count, ids_.data(), 0, never);
            return;
        }
        keep_groups(scores);
        int begin = 0;
        for (int part = 0; part < rule_.groups; part++) {
            const int end = ends_[size(part)];
            if (kept_[size(part)] != 0) podium_.offer(&keys_[size(begin)], end - begin, &ids_[size(begin)], 0, never);
            begin = end;
        }
    }

    const Podium &podium() const { return podium_; }

   private:
    template <class Number>
    static std::size_t size(Number i) {
        return static_cast<std::size_t>(i);
    }

    // A group of two or more scores the sum of its two best, -inf with fewer usable; of equals the lower is kept.
    void keep_groups(const float *scores) {
        int begin = 0;
        for (int part = 0; part < rule_.groups; part++) {
            const int end = ends_[size(part)];
            group_keys_[size(part)] = ordered(best_two(scores + begin, end - begin));
            begin = end;
        }
        groups_.reset(rule_.kept);
        groups_.offer(group_keys_.data(), rule_.groups, nullptr, 0,
                      std::numeric_limits<std::int32_t>::min());
        std::fill(kept_.begin(), kept_.end(), std::uint8_t{0});
        for (int place = 0; place < groups_.size(); place++) kept_[size(groups_.id(place))] = 1;
    }

    float best_two(const float *scores, int count) const {
        constexpr int kLanes = 8;
        float first = kNever, next = kNever;
        const int whole = count / kLanes * kLanes;
        for (int i = whole; i < count; i++) add(scores[i], first, next);
        if (whole > 0) {  // few of a small coreset are in one group
            float most[kLanes], second[kLanes];
            std::fill_n(most, kLanes, kNever);
            std::fill_n(second, kLanes, kNever);
            for (int i = 0; i < whole; i += kLanes) {
                for (int lane = 0; lane < kLanes; lane++) add(scores[i + lane], most[lane], second[lane]);
            }
            for (int lane = 0; lane < kLanes; lane++) {
                add(most[lane], first, next);
                next = next < second[lane] ? second[lane] : next;
            }
        }
        return group_size_ == 1 ? first : first + next;
    }

    static void add(float score, float &most, float &second) {
        const float smaller = score < most ? score : most;
        second = second < smaller ? smaller : second;
        most = most < score ? score : most;
    }

    GroupRule rule_;
    int experts_, k_, group_size_;
    bool all_ = false;
    std::vector<float> scores_;
    std::vector<std::int32_t> keys_, group_keys_;
    std::vector<int> ids_, ends_;
    std::vector<std::uint8_t> kept_;
    Podium podium_, groups_;
};

}  // namespace expertshare
