// Scratch memory that is kept between calls and only ever grows.
#pragma once

#include <cstdlib>
#include <new>

#include "kernels.h"

namespace expertshare {

class Arena {
   public:
    ~Arena() { std::free(memory_); }

    // Room for `bytes`, which every later `carve` takes from; what was carved before is void.
    void reserve(Index bytes) {
        used_ = 0;
        if (bytes <= size_) return;
        std::free(memory_);
        size_ = 0;
        const Index rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
        memory_ = static_cast<char *>(std::aligned_alloc(kAlignment, static_cast<std::size_t>(rounded)));
        if (memory_ == nullptr) throw std::bad_alloc();
        size_ = rounded;
    }

    template <class T>
    T *carve(Index count) {
        T *from = reinterpret_cast<T *>(memory_ + used_);
        used_ += padded<T>(count);
        return from;
    }

    template <class T>
    static Index padded(Index count) {
        return (count * static_cast<Index>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    }

   private:
    static constexpr Index kAlignment = 64;
    char *memory_ = nullptr;
    Index size_ = 0, used_ = 0;
};

}  // namespace expertshare
