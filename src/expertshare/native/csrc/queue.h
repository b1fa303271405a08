// Items of one phase, taken from both ends, and a count of those that are done.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels.h"
#include "pool.h"

namespace expertshare {

// On lines of its own: every item taken would otherwise throw what is beside it out of the other caches.
class alignas(128) Queue {
   public:
    void fill(Index num_items) {
        size_ = num_items;
        ends_.store(static_cast<std::uint64_t>(num_items), std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
    }

    // The next item from the front or from the back; -1 when there is none.
    Index take(bool from_back) {
        std::uint64_t ends = ends_.load(std::memory_order_relaxed);
        for (;;) {
            const std::uint64_t front = ends >> 32, back = ends & 0xffffffffu;
            if (front == back) return -1;
            const std::uint64_t rest = from_back ? ends - 1 : ends + (std::uint64_t{1} << 32);
            if (ends_.compare_exchange_weak(ends, rest, std::memory_order_relaxed)) {
                return static_cast<Index>(from_back ? back - 1 : front);
            }
        }
    }

    void finish(Index num_items) { done_.fetch_add(num_items, std::memory_order_release); }

    // Returns when every item has been finished, with all that was written for them visible.
    void wait() const {
        wait_until([this] { return done_.load(std::memory_order_acquire) == size_; });
    }

   private:
    Index size_ = 0;
    std::atomic<std::uint64_t> ends_{0};  // front in the high half, back in the low one
    std::atomic<Index> done_{0};
};

// Does `now`, unless it is -1, and then items until there are none; returns when those of all threads are done. Each
// item is claimed one ahead, so that the end of one can already fetch the beginning of the next (-1 if there is none).
template <class Item>
void drain_from(bool from_back, Queue &queue, Index now, Item item) {
    Index taken = 0;
    for (Index next; now >= 0; now = next) {
        next = queue.take(from_back);
        item(now, next);
        taken++;
    }
    if (taken > 0) queue.finish(taken);
    queue.wait();
}

// From both ends.
template <class Item>
void drain(Queue &queue, int worker, Item item) {
    drain_from(worker % 2 != 0, queue, queue.take(worker % 2 != 0), item);
}

// All threads from the front.
template <class Item>
void drain_in_order(Queue &queue, Item item) {
    drain_from(false, queue, queue.take(false), item);
}

}  // namespace expertshare
