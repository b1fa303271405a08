// The k largest of some scores with exact ties: the order is by (score down, id up), -0 equal to 0.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace expertshare {

// An integer whose order is that of the floats, above the least there is.
inline std::int32_t ordered(float score) {
    score += 0.0f;  // -0 becomes 0
    std::int32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    const std::int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
    return std::max(key, std::numeric_limits<std::int32_t>::min() + 1);  // one NaN would be that
}

// Keeps the k largest of what is offered in the order of ids. A later one must be larger to displace.
class Podium {
   public:
    void reset(int k) {
        k_ = k;
        size_ = 0;
        keys_.resize(static_cast<std::size_t>(k));
        ids_.resize(static_cast<std::size_t>(k));
    }

    // keys[0 .. count), all above `above`; id of keys[i] is ids[i], or first_id + i where ids is null.
    void offer(const std::int32_t *keys, int count, const int *ids, int first_id, std::int32_t above) {
        if (size_ == 0 && count >= k_ * kPiece) above = std::max(above, least_useful(keys, count) - 1);
        for (int i = 0; i < count; i += kPiece) {
            const int end = std::min(count, i + kPiece);
            if (end == i + kPiece && !any_above(keys + i, least(above))) continue;
            for (int j = i; j < end; j++) {
                if (keys[j] > least(above)) insert(keys[j], ids != nullptr ? ids[j] : first_id + j);
            }
        }
    }

    int size() const { return size_; }
    int id(int place) const { return ids_[static_cast<std::size_t>(place)]; }

   private:
    static constexpr int kPiece = 16;

    static bool any_above(const std::int32_t *keys, std::int32_t least) {
        std::int32_t any = 0;
        for (int i = 0; i < kPiece; i++) any |= keys[i] > least ? 1 : 0;
        return any != 0;
    }

    static std::int32_t most(const std::int32_t *keys) {
        std::int32_t largest = keys[0];
        for (int i = 1; i < kPiece; i++) largest = largest < keys[i] ? keys[i] : largest;
        return largest;
    }

    std::int32_t least(std::int32_t above) const {
        return size_ < k_ ? above : keys_[static_cast<std::size_t>(k_ - 1)];
    }

    // The k-th largest of the pieces' largest: k keys are no smaller, so most others need never be inserted.
    std::int32_t least_useful(const std::int32_t *keys, int count) {
        for (int i = 0; i + kPiece <= count; i += kPiece) {
            const std::int32_t largest = most(keys + i);
            if (largest > least(std::numeric_limits<std::int32_t>::min())) insert(largest, 0);
        }
        size_ = 0;
        return keys_[static_cast<std::size_t>(k_ - 1)];
    }

    void insert(std::int32_t key, int id) {
        int place = size_ < k_ ? size_++ : k_ - 1;
        std::int32_t *keys = keys_.data();
        int *ids = ids_.data();
        for (; place > 0 && keys[place - 1] < key; place--) {
            keys[place] = keys[place - 1];
            ids[place] = ids[place - 1];
        }
        keys[place] = key;
        ids[place] = id;
    }

    int k_ = 0, size_ = 0;
    std::vector<std::int32_t> keys_;
    std::vector<int> ids_;
};

// All of a long ranking: keys that hold score and id (n < 2^31), sorted as a whole.
class Sorted {
   public:
    // front: null, or whose ids outrank all others.
    void rank(const float *scores, const std::uint8_t *front, int n, int k) {
        keys_.resize(static_cast<std::size_t>(n));
        for (int i = 0; i < n; i++) {
            const std::uint64_t first = front != nullptr && front[i] != 0 ? 1 : 0;
            keys_[static_cast<std::size_t>(i)] = key(first, scores[i], i);
        }
        sort(k);
    }

    // Of those above `least` only; returns how many there are.
    int rank_above(const float *scores, float least, int n) {
        keys_.clear();
        for (int i = 0; i < n; i++) {
            if (scores[i] > least) keys_.push_back(key(0, scores[i], i));
        }
        sort(static_cast<int>(keys_.size()));
        return static_cast<int>(keys_.size());
    }

    int id(int place) const {
        return static_cast<int>(kLastId - (keys_[static_cast<std::size_t>(place)] & kLastId));
    }

   private:
    static constexpr std::uint32_t kLastId = 0x7fffffffu;

    static std::uint64_t key(std::uint64_t first, float score, int id) {
        const std::uint32_t order = static_cast<std::uint32_t>(ordered(score)) ^ 0x80000000u;
        return first << 63 | static_cast<std::uint64_t>(order) << 31 | (kLastId - static_cast<std::uint32_t>(id));
    }

    void sort(int k) {
        const auto down = [](std::uint64_t a, std::uint64_t b) { return a > b; };
        if (k < static_cast<int>(keys_.size()) / 2) {
            std::partial_sort(keys_.begin(), keys_.begin() + k, keys_.end(), down);
        } else {
            std::sort(keys_.begin(), keys_.end(), down);
        }
    }

    std::vector<std::uint64_t> keys_;
};

}  // namespace expertshare
