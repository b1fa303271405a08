// Scratch memory that is kept between calls and only ever grows.
#pragma once

#include <cstdlib>
#include <new>

#include "kernels.h"

namespace expertshare {

// A stride for rows of tokens. What a tile reads of each is a piece of a kilobyte or so; at a stride that is a power of
// two the pieces of all tokens would fall into the same few sets of the first cache.
inline Index spread_over_sets(Index bytes) {
    constexpr Index kPiece = 1024;
    return bytes < kPiece ? (bytes + 63) / 64 * 64 + 64 : ((bytes + kPiece - 1) / kPiece | 1) * kPiece;
}

// A piece for each thread.
template <class T>
struct Own {
    T *first = nullptr;
    Index stride = 0;

    T *of(int worker) const { return first + worker * stride; }
};

class Arena {
   public:
    ~Arena() { std::free(memory_); }

    // Runs `carve_all`, which carves all that a call needs, twice: to count the bytes, and to give them. What was
    // carved before is void. Throws std::bad_alloc.
    template <class CarveAll>
    void lay_out(CarveAll carve_all) {
        used_ = 0;
        counting_ = true;
        carve_all();
        reserve(used_);
        used_ = 0;
        counting_ = false;
        carve_all();
    }

    template <class T>
    T *carve(Index count) {
        T *from = counting_ ? nullptr : reinterpret_cast<T *>(memory_ + used_);
        used_ += padded<T>(count);
        return from;
    }

    template <class T>
    static Index padded(Index count) {
        return (count * static_cast<Index>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    }

    // Far apart. A core's prefetcher follows a stride beyond the end of what its own thread writes; if it runs into
    // lines that another one writes, they go back and forth: a projection of 24 tokens then took 1.7 times as long.
    template <class T>
    Own<T> carve_own(Index threads, Index count) {
        const Index stride = (padded<T>(count) + kApart) / static_cast<Index>(sizeof(T));
        return {carve<T>(threads * stride), stride};
    }

   private:
    static constexpr Index kAlignment = 64, kApart = 64 << 10;

    void reserve(Index bytes) {
        if (bytes <= size_) return;
        std::free(memory_);
        size_ = 0;
        memory_ = static_cast<char *>(std::aligned_alloc(kAlignment, static_cast<std::size_t>(bytes)));
        if (memory_ == nullptr) throw std::bad_alloc();
        size_ = bytes;
    }

    char *memory_ = nullptr;
    Index size_ = 0, used_ = 0;
    bool counting_ = false;
};

}  // namespace expertshare
