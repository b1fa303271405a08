// What a plan asks of the experts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace expertshare {

// Counts the slots of one group after another.
class Load {
   public:
    explicit Load(int64_t experts) : last_(static_cast<std::size_t>(experts), -1) {}

    // load[e] grows by the slots that use e; returns how many experts are used. -1 and ids of no expert do not count.
    int64_t add_group(const int64_t *ids, int64_t slots, int64_t *load) {
        int64_t unique = 0;
        group_++;
        for (int64_t slot = 0; slot < slots; slot++) {
            if (ids[slot] < 0 || ids[slot] >= static_cast<int64_t>(last_.size())) continue;
            int64_t &seen = last_[static_cast<std::size_t>(ids[slot])];
            load[ids[slot]]++;
            unique += seen == group_ ? 0 : 1;
            seen = group_;
        }
        return unique;
    }

   private:
    std::vector<int64_t> last_;  // the last group that used an expert
    int64_t group_ = -1;
};

}  // namespace expertshare
