// A thread pool: threads spin briefly for work, then sleep. The caller of `run` is one of them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#endif

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

// About 50 microseconds: longer than the steps between two calls within a layer, shorter than what others would miss.
constexpr int kSpins = 2000;

// Signals are for the threads of the program, not for ours, which inherit the mask of the thread that starts them.
class SignalsBlocked {
#if defined(__unix__) || defined(__APPLE__)
   public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

   private:
    sigset_t before_;
#endif
};

class Pool {
   public:
    explicit Pool(int num_threads) {  // throws std::system_error if they cannot be started
        const SignalsBlocked guard;
        try {
            for (int worker = 1; worker < num_threads; worker++) {
                threads_.emplace_back([this, worker] { serve(worker); });
            }
        } catch (...) {
            stop();
            throw;
        }
    }
    ~Pool() { stop(); }
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

    // `work.run` in at most `width` threads, the caller among them as worker 0. A thread that wakes after the caller
    // has finished does not take part: `run` must do all that is left, however many take part.
    void run(Work &work, int width) {
        if (width <= 1 || threads_.empty()) return work.run(0);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work;
            width_ = width;
            calls_.fetch_add(1, std::memory_order_release);
        }
        woken_.notify_all();
        work.run(0);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = nullptr;
        }
        wait_until([this] { return inside_.load(std::memory_order_acquire) == 0; });
    }

   private:
    void stop() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
            calls_.fetch_add(1, std::memory_order_release);
        }
        woken_.notify_all();
        for (std::thread &thread : threads_) thread.join();
    }

    void serve(int worker) {
        std::uint64_t seen = 0;
        for (;;) {
            for (int i = 0; i < kSpins && calls_.load(std::memory_order_relaxed) == seen; i++) relax();
            Work *work = nullptr;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                woken_.wait(lock, [&] { return calls_.load(std::memory_order_relaxed) != seen; });
                seen = calls_.load(std::memory_order_relaxed);
                if (stopping_) return;
                if (worker < width_) work = work_;
                if (work != nullptr) inside_.fetch_add(1, std::memory_order_relaxed);
            }
            if (work == nullptr) continue;
            work->run(worker);
            inside_.fetch_sub(1, std::memory_order_release);
        }
    }

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
