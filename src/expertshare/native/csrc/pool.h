// A thread pool: threads spin briefly for work, then sleep. The caller of `run` is one of them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace expertshare {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Wait until `ready()`: by spinning, and soon by giving the core to others, who may be what we wait for.
template <class Ready>
void wait_until(Ready ready) {
    for (int i = 0; i < 2000; i++) {
        if (ready()) return;
        relax();
    }
    while (!ready()) std::this_thread::yield();
}

class Work {
   public:
    virtual void run(int worker) = 0;

   protected:
    ~Work() = default;
};

class Pool {
   public:
    explicit Pool(int num_threads);  // throws std::system_error if they cannot be started
    ~Pool();
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

    // `work.run` in at most `width` threads, the caller among them as worker 0. A thread that wakes after the caller
    // has finished does not take part: `run` must do all that is left, however many take part.
    void run(Work &work, int width);

   private:
    void serve(int worker);
    void stop();

    std::mutex mutex_;
    std::condition_variable woken_;
    std::atomic<std::uint64_t> calls_{0};
    std::atomic<int> inside_{0};
    Work *work_ = nullptr;  // guarded by mutex_, as the two below
    int width_ = 0;
    bool stopping_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace expertshare
