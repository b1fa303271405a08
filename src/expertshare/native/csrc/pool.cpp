#include "pool.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#endif

namespace expertshare {
namespace {

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

}  // namespace

Pool::Pool(int num_threads) {
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

Pool::~Pool() { stop(); }

void Pool::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
        calls_.fetch_add(1, std::memory_order_release);
    }
    woken_.notify_all();
    for (std::thread &thread : threads_) thread.join();
}

void Pool::run(Work &work, int width) {
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

void Pool::serve(int worker) {
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

}  // namespace expertshare
