#include "routing.h"

#include <new>

#include "election.h"
#include "load.h"
#include "mixture.h"

#define EXPERTSHARE_EXPORT __attribute__((visibility("default")))

namespace expertshare {
namespace {

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

// Where es_reachable_best writes.
struct Answer {
    const float *affinity;
    int64_t *ids;
    float *best;
    uint8_t *cast;
    int64_t experts, k;
};

void write(const Answer &to, int64_t token, const Podium &podium, int found) {
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

}  // namespace
}  // namespace expertshare

using namespace expertshare;

extern "C" {

EXPERTSHARE_EXPORT int es_top_k(const float *scores, const uint8_t *front, int64_t num_rows, int64_t n, int64_t k,
                                int64_t *ids, uint8_t *member) {
    return guarded([=] {
        static thread_local RowRanking ranking;
        if (member != nullptr) std::memset(member, 0, static_cast<std::size_t>(num_rows * n));
        for (int64_t row = 0; row < num_rows; row++) {
            ranking.best(scores + row * n, front == nullptr ? nullptr : front + row * n, n, k, [&](int place, int id) {
                if (ids != nullptr) ids[row * k + place] = id;
                if (member != nullptr) member[row * n + id] = 1;
            });
        }
    });
}

EXPERTSHARE_EXPORT int es_reachable_best(const float *choice, const uint8_t *live, const uint8_t *coreset,
                                         const float *affinity, int64_t *ids, float *best, uint8_t *cast,
                                         int64_t groups, int64_t length, int64_t experts, int64_t k,
                                         int64_t expert_groups, int64_t kept_groups) {
    return guarded([=] {
        const Answer answer = {affinity, ids, best, cast, experts, k};
        Reach within(experts, k, {static_cast<int>(expert_groups), static_cast<int>(kept_groups)});
        for (int64_t group = 0; group < groups; group++) {
            if (group == 0 || coreset != nullptr) {
                within.enter_group(coreset == nullptr ? nullptr : coreset + group * experts);
            }
            for (int64_t token = group * length; token < (group + 1) * length; token++) {
                if (live[token] != 0) within.rank(choice + token * experts);
                write(answer, token, within.podium(), live[token] != 0 ? within.podium().size() : 0);
            }
        }
    });
}

EXPERTSHARE_EXPORT int es_votes(const float *choice, const uint8_t *live, int64_t groups, int64_t length,
                                int64_t experts, int64_t k, int64_t expert_groups, int64_t kept_groups,
                                int64_t num_firsts, float *votes, uint8_t *firsts) {
    return guarded([=] {
        Reach within(experts, k, {static_cast<int>(expert_groups), static_cast<int>(kept_groups)});
        within.enter_group(nullptr);
        Votes counted(experts);
        std::memset(firsts, 0, static_cast<std::size_t>(groups * experts));
        for (int64_t group = 0; group < groups; group++) {
            counted.clear();
            for (int64_t token = group * length; token < (group + 1) * length; token++) {
                if (live[token] == 0) continue;
                within.rank(choice + token * experts);
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
    for (int64_t group = 0; group < groups; group++) {
        const int64_t token = group * length;
        highest(choice + token * experts, live + token, length, experts, most + group * experts);
    }
    return kDone;
}

EXPERTSHARE_EXPORT int es_shortest_prefix(const float *scores, int64_t num_rows, int64_t n, double share,
                                          uint8_t *member) {
    return guarded([=] {
        static thread_local RowRanking ranking;
        for (int64_t row = 0; row < num_rows; row++) {
            ranking.shortest_prefix(scores + row * n, n, share, member + row * n);
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
        const int64_t first = token * k;
        weigh(ids + first, affinity + first, kept == nullptr ? nullptr : kept + first, k, renormalise != 0, scaling,
              weights + first);
        for (int64_t slot = first; slot < first + k; slot++) {
            if (ids[slot] >= 0) active[ids[slot]] = 1;
        }
    }
    return kDone;
}

EXPERTSHARE_EXPORT int es_count_load(const int64_t *ids, int64_t groups, int64_t slots, int64_t experts, int64_t *load,
                                     int64_t *unique) {
    return guarded([=] {
        Load counted(experts);
        std::memset(load, 0, static_cast<std::size_t>(experts) * sizeof *load);
        for (int64_t group = 0; group < groups; group++) {
            unique[group] = counted.add_group(ids + group * slots, slots, load);
        }
    });
}
}
