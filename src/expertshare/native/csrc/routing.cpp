#include "routing.h"

#include <cmath>
#include <limits>
#include <new>

#include "ranking.h"

#define EXPERTSHARE_EXPORT __attribute__((visibility("default")))

namespace expertshare {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int kShort = 64;  // rankings up to this length are kept in order while they grow

enum { kDone = 0, kOutOfMemory = 2 };

// Exceptions must not cross into C, and none but this can occur.
template <class Call>
int guarded(Call call) {
    try {
        call();
    } catch (const std::bad_alloc &) {
        return kOutOfMemory;
    }
    return kDone;
}

// The arguments of es_reachable_best.
struct Question {
    const float *choice;
    const uint8_t *live, *coreset;
    const float *affinity;
    int64_t *ids;
    float *best;
    uint8_t *cast;
    int64_t groups, length, experts, k, expert_groups, kept_groups;
};

// The experts that a group of tokens may choose from, and what one of its tokens can reach of them.
class Reach {
   public:
    explicit Reach(const Question &of)
        : of_(of), experts_(static_cast<int>(of.experts)), group_size_(experts_ / static_cast<int>(of.expert_groups)) {
        scores_.resize(static_cast<std::size_t>(experts_));
        keys_.resize(static_cast<std::size_t>(experts_));
        ids_.resize(static_cast<std::size_t>(experts_));
        ends_.resize(static_cast<std::size_t>(of.expert_groups));
        group_keys_.resize(static_cast<std::size_t>(of.expert_groups));
    }

    void enter_group(int64_t group) {
        int count = 0;
        for (int64_t part = 0; part < of_.expert_groups; part++) {
            for (int e = static_cast<int>(part) * group_size_; e < static_cast<int>(part + 1) * group_size_; e++) {
                if (of_.coreset == nullptr || of_.coreset[group * of_.experts + e] != 0) ids_[size(count++)] = e;
            }
            ends_[size(part)] = count;
        }
        all_ = count == experts_;
    }

    // The token's best, in podium().
    void rank(int64_t token) {
        const float *row = of_.choice + token * of_.experts;
        const int count = ends_.back();
        const float *scores = row;
        if (!all_) {
            for (int i = 0; i < count; i++) scores_[size(i)] = row[ids_[size(i)]];
            scores = scores_.data();
        }
        for (int i = 0; i < count; i++) keys_[size(i)] = ordered(scores[i]);
        podium_.reset(static_cast<int>(of_.k));
        const std::int32_t never = ordered(kNever);
        if (of_.kept_groups == of_.expert_groups) {
            podium_.offer(keys_.data(), count, ids_.data(), 0, never);
            return;
        }
        keep_groups(scores);
        int begin = 0;
        for (int64_t part = 0; part < of_.expert_groups; part++) {
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
        for (int64_t part = 0; part < of_.expert_groups; part++) {
            const int end = ends_[size(part)];
            group_keys_[size(part)] = ordered(best_two(scores + begin, end - begin));
            begin = end;
        }
        groups_.reset(static_cast<int>(of_.kept_groups));
        groups_.offer(group_keys_.data(), static_cast<int>(of_.expert_groups), nullptr, 0,
                      std::numeric_limits<std::int32_t>::min());
        kept_.assign(size(of_.expert_groups), 0);
        for (int place = 0; place < groups_.size(); place++) kept_[size(groups_.id(place))] = 1;
    }

    float best_two(const float *scores, int count) const {
        constexpr int kLanes = 8;
        float most[kLanes], second[kLanes];
        std::fill_n(most, kLanes, kNever);
        std::fill_n(second, kLanes, kNever);
        int i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            for (int lane = 0; lane < kLanes; lane++) add(scores[i + lane], most[lane], second[lane]);
        }
        float first = kNever, next = kNever;
        for (; i < count; i++) add(scores[i], first, next);
        for (int lane = 0; lane < kLanes; lane++) {
            add(most[lane], first, next);
            next = next < second[lane] ? second[lane] : next;
        }
        return group_size_ == 1 ? first : first + next;
    }

    static void add(float score, float &most, float &second) {
        const float smaller = score < most ? score : most;
        second = second < smaller ? smaller : second;
        most = most < score ? score : most;
    }

    const Question &of_;
    int experts_, group_size_;
    bool all_ = false;
    std::vector<float> scores_;
    std::vector<std::int32_t> keys_, group_keys_;
    std::vector<int> ids_, ends_;
    std::vector<std::uint8_t> kept_;
    Podium podium_, groups_;
};

void write(const Question &to, int64_t token, const Podium &podium, int found) {
    if (to.cast != nullptr) {
        uint8_t *cast = to.cast + token * to.experts;
        std::memset(cast, 0, static_cast<std::size_t>(to.experts));
        for (int place = 0; place < found; place++) cast[podium.id(place)] = 1;
    }
    for (int place = 0; place < to.k && to.ids != nullptr; place++) {
        to.ids[token * to.k + place] = place < found ? podium.id(place) : -1;
    }
    for (int place = 0; place < to.k && to.best != nullptr; place++) {
        to.best[token * to.k + place] = place < found ? to.affinity[token * to.experts + podium.id(place)] : 0.0f;
    }
}

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

// `found(expert)` for every expert that the token cast; eight at a time, as nearly all are zero.
template <class Found>
void each_cast(const uint8_t *cast, int64_t experts, Found found) {
    int64_t e = 0;
    for (; e + 8 <= experts; e += 8) {
        std::uint64_t eight;
        std::memcpy(&eight, cast + e, sizeof eight);
        if (eight == 0) continue;
        for (int64_t i = e; i < e + 8; i++) {
            if (cast[i] != 0) found(i);
        }
    }
    for (; e < experts; e++) {
        if (cast[e] != 0) found(e);
    }
}

// In the order in which torch adds up a short row of float32, so that both give the same bits (up to 31 numbers).
float sum_like_torch(const float *row, int64_t count) {
    float lanes[8] = {0.0f};
    const int64_t width = count < 8 ? 4 : 8, whole = count / width * width;
    for (int64_t i = 0; i < whole; i++) lanes[i % width] += row[i];
    float total = 0.0f;
    if (width == 8) {
        for (int64_t i = whole; i < count; i++) total += row[i];
    } else {
        for (int64_t i = whole; i < count; i++) lanes[0] += row[i];
    }
    for (int64_t lane = 0; lane < width; lane++) total += lanes[lane];
    return total;
}

void drop_lightest(const float *weights, int k, double share, uint8_t *kept) {
    double total = 0.0;
    for (int i = 0; i < k; i++) total += static_cast<double>(weights[i]);
    if (!(total > 1e-20)) total = 1e-20;
    int order[kShort];  // lightest first; of equals the one that ranks last
    for (int i = 0; i < k; i++) {
        int place = i;
        for (; place > 0 && weights[order[place - 1]] >= weights[i]; place--) order[place] = order[place - 1];
        order[place] = i;
    }
    double upto = 0.0;
    for (int i = 0; i < k; i++) {
        upto += static_cast<double>(weights[order[i]]) / total;
        kept[order[i]] = i == k - 1 || upto >= share ? 1 : 0;
    }
}

}  // namespace
}  // namespace expertshare

using namespace expertshare;

extern "C" {

EXPERTSHARE_EXPORT int es_top_k(const float *scores, const uint8_t *front, int64_t num_rows, int64_t n, int64_t k,
                                int64_t *ids, uint8_t *member) {
    return guarded([=] {
        static thread_local Podium podium;
        static thread_local Sorted sorted;
        static thread_local std::vector<std::int32_t> keys;
        const bool is_short = k <= kShort && k < n && front == nullptr;
        if (member != nullptr) std::memset(member, 0, static_cast<std::size_t>(num_rows * n));
        for (int64_t row = 0; row < num_rows; row++) {
            if (is_short) {
                keys.resize(static_cast<std::size_t>(n));
                for (int64_t i = 0; i < n; i++) keys[static_cast<std::size_t>(i)] = ordered(scores[row * n + i]);
                podium.reset(static_cast<int>(k));
                podium.offer(keys.data(), static_cast<int>(n), nullptr, 0, std::numeric_limits<std::int32_t>::min());
            } else {
                sorted.rank(scores + row * n, front == nullptr ? nullptr : front + row * n, static_cast<int>(n),
                            static_cast<int>(k));
            }
            for (int place = 0; place < k; place++) {
                const int id = is_short ? podium.id(place) : sorted.id(place);
                if (ids != nullptr) ids[row * k + place] = id;
                if (member != nullptr) member[row * n + id] = 1;
            }
        }
    });
}

EXPERTSHARE_EXPORT int es_reachable_best(const float *choice, const uint8_t *live, const uint8_t *coreset,
                                         const float *affinity, int64_t *ids, float *best, uint8_t *cast,
                                         int64_t groups, int64_t length, int64_t experts, int64_t k,
                                         int64_t expert_groups, int64_t kept_groups) {
    return guarded([=] {
        const Question question = {choice, live,   coreset, affinity, ids,           best,       cast,
                                   groups, length, experts, k,        expert_groups, kept_groups};
        Reach within(question);
        for (int64_t group = 0; group < groups; group++) {
            if (group == 0 || coreset != nullptr) within.enter_group(group);
            for (int64_t token = group * length; token < (group + 1) * length; token++) {
                if (live[token] != 0) within.rank(token);
                write(question, token, within.podium(), live[token] != 0 ? within.podium().size() : 0);
            }
        }
    });
}

EXPERTSHARE_EXPORT int es_votes(const float *choice, const uint8_t *live, int64_t groups, int64_t length,
                                int64_t experts, int64_t k, int64_t expert_groups, int64_t kept_groups,
                                int64_t num_firsts, float *votes, uint8_t *firsts) {
    return guarded([=] {
        const Question question = {choice, live,   nullptr, nullptr, nullptr,       nullptr,    nullptr,
                                   groups, length, experts, k,       expert_groups, kept_groups};
        Reach within(question);
        within.enter_group(0);
        Votes counted(experts);
        std::memset(firsts, 0, static_cast<std::size_t>(groups * experts));
        for (int64_t group = 0; group < groups; group++) {
            counted.clear();
            for (int64_t token = group * length; token < (group + 1) * length; token++) {
                if (live[token] == 0) continue;
                within.rank(token);
                for (int place = 0; place < within.podium().size(); place++) {
                    const int expert = within.podium().id(place);
                    counted.add(expert, choice[token * experts + expert]);
                    if (place < num_firsts) firsts[group * experts + expert] = 1;
                }
            }
            counted.write(votes + group * experts);
        }
    });
}

EXPERTSHARE_EXPORT int es_tally(const float *choice, const uint8_t *cast, int64_t groups, int64_t length,
                                int64_t experts, float *votes) {
    return guarded([=] {
        Votes counted(experts);
        for (int64_t group = 0; group < groups; group++) {
            counted.clear();
            for (int64_t token = group * length; token < (group + 1) * length; token++) {
                each_cast(cast + token * experts, experts,
                          [&](int64_t e) { counted.add(e, choice[token * experts + e]); });
            }
            counted.write(votes + group * experts);
        }
    });
}

EXPERTSHARE_EXPORT int es_group_max(const float *choice, const uint8_t *live, int64_t groups, int64_t length,
                                    int64_t experts, float *most) {
    std::fill_n(most, groups * experts, kNever);
    for (int64_t token = 0; token < groups * length; token++) {
        if (live[token] == 0) continue;
        float *of_group = most + token / length * experts;
        const float *row = choice + token * experts;
        for (int64_t e = 0; e < experts; e++) of_group[e] = of_group[e] < row[e] ? row[e] : of_group[e];
    }
    return kDone;
}

EXPERTSHARE_EXPORT int es_shortest_prefix(const float *scores, int64_t num_rows, int64_t n, double share,
                                          uint8_t *member) {
    return guarded([=] {
        static thread_local Sorted sorted;
        std::memset(member, 0, static_cast<std::size_t>(num_rows * n));
        for (int64_t row = 0; row < num_rows; row++) {
            const float *of_row = scores + row * n;
            sorted.rank(of_row, nullptr, static_cast<int>(n), static_cast<int>(n));
            double total = 0.0, upto = 0.0;
            const auto mass = [of_row](int id) { return of_row[id] > 0.0f ? static_cast<double>(of_row[id]) : 0.0; };
            for (int place = 0; place < n; place++) total += mass(sorted.id(place));
            for (int place = 0; place < n; place++) {
                const int id = sorted.id(place);
                upto += mass(id);
                const bool wanted = share == 1.0 || upto - mass(id) <= share * total;  // 1: whatever the rounding
                member[row * n + id] = wanted && of_row[id] > kNever ? 1 : 0;
            }
        }
    });
}

EXPERTSHARE_EXPORT int es_drop_lightest(const float *weights, int64_t num_rows, int64_t k, double share,
                                        uint8_t *kept) {
    for (int64_t row = 0; row < num_rows; row++) {
        drop_lightest(weights + row * k, static_cast<int>(k), share, kept + row * k);
    }
    return kDone;
}

EXPERTSHARE_EXPORT int es_weigh(int64_t *ids, const float *affinity, const uint8_t *kept, int64_t num_tokens,
                                int64_t k, int64_t experts, int renormalise, float scaling, float *weights,
                                uint8_t *active) {
    std::memset(active, 0, static_cast<std::size_t>(experts));
    for (int64_t token = 0; token < num_tokens; token++) {
        float *of_token = weights + token * k;
        for (int64_t slot = token * k; slot < (token + 1) * k; slot++) {
            if (kept != nullptr && kept[slot] == 0) ids[slot] = -1;
            weights[slot] = ids[slot] < 0 ? 0.0f : affinity[slot];
            if (ids[slot] >= 0) active[ids[slot]] = 1;
        }
        if (renormalise != 0) {
            const float total = sum_like_torch(of_token, k) + 1e-20f;
            for (int64_t slot = 0; slot < k; slot++) of_token[slot] /= total;
        }
        if (scaling != 1.0f) {
            for (int64_t slot = 0; slot < k; slot++) of_token[slot] *= scaling;
        }
    }
    return kDone;
}

EXPERTSHARE_EXPORT int es_count_load(const int64_t *ids, int64_t groups, int64_t slots, int64_t experts, int64_t *load,
                                     int64_t *unique) {
    return guarded([=] {
        std::vector<int64_t> last(static_cast<std::size_t>(experts), -1);  // the last group that used an expert
        std::memset(load, 0, static_cast<std::size_t>(experts) * sizeof *load);
        for (int64_t group = 0; group < groups; group++) {
            unique[group] = 0;
            for (int64_t slot = group * slots; slot < (group + 1) * slots; slot++) {
                if (ids[slot] < 0 || ids[slot] >= experts) continue;
                int64_t &seen = last[static_cast<std::size_t>(ids[slot])];
                load[ids[slot]]++;
                unique[group] += seen == group ? 0 : 1;
                seen = group;
            }
        }
    });
}
}
