// Weights that another thread is still bringing while we compute with those that are there.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "kernels.h"
#include "pool.h"

namespace expertshare {

class Arrivals {
   public:
    enum State : std::uint8_t { kOnTheWay, kThere, kWillNotCome };

    explicit Arrivals(const std::uint8_t *states) : states_(states) {}

    bool there(Index expert) const { return states_ == nullptr || state(expert) == kThere; }

    // Whether the expert is there in the end. Not if it will not come, nor if it takes so long that the caller should
    // look after it (and hear of an interrupt); once given up, nobody waits any more. Adds what it waited.
    bool await(Index expert, std::int64_t &waited_ns) {
        if (there(expert)) return true;
        const Clock::time_point start = Clock::now();
        const bool came = wait_for(expert, start + kPatience);
        waited_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
        if (!came) given_up_.store(true, std::memory_order_relaxed);
        return came;
    }

    bool all_came() const { return !given_up_.load(std::memory_order_relaxed); }

   private:
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::milliseconds kPatience{100};
    static constexpr std::chrono::microseconds kNap{50};  // the core is for those who bring
    static constexpr int kSpins = 500;

    std::uint8_t state(Index expert) const { return __atomic_load_n(states_ + expert, __ATOMIC_ACQUIRE); }

    bool wait_for(Index expert, Clock::time_point until) const {
        for (int spins = 0; all_came(); spins++) {
            const std::uint8_t now = state(expert);
            if (now != kOnTheWay) return now == kThere;
            if (spins < kSpins) {
                relax();
            } else if (Clock::now() < until) {
                std::this_thread::sleep_for(kNap);
            } else {
                return false;
            }
        }
        return false;
    }

    const std::uint8_t *states_;
    std::atomic<bool> given_up_{false};
};

}  // namespace expertshare
