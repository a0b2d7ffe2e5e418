// Several threads at one small job after another: what `parallel_for` is too slow for.
//
// One thread leads and goes on with or without the others, so nothing here can hang: it offers a job in parts, takes
// parts itself, and waits only for parts that another running thread has taken.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace fastwm {

class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads) {}

  int64_t threads() const { return threads_; }

  // Leader: f(part) for every part below `parts`.
  template <typename F>
  void run(int64_t parts, const F& f) {
    job_ = [](const void* context, int64_t part) { (*static_cast<const F*>(context))(part); };
    context_ = &f;
    done_.store(0, std::memory_order_relaxed);
    ++epoch_;
    offer_.store(epoch_ << 32 | uint64_t(parts), std::memory_order_release);
    while (take()) {
    }
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < parts; ++spins) {
      wait(spins);
    }
  }

  // The others: takes parts until the leader is through.
  void help() {
    for (int64_t spins = 0; !finished_.load(std::memory_order_acquire); ++spins) {
      if (take()) {
        spins = 0;
      } else {
        wait(spins);
      }
    }
  }

  // Held by the leader while there may be jobs: the others are let go however it ends.
  class Lead {
   public:
    explicit Lead(Team& team) : team_(team) {}
    ~Lead() { team_.finished_.store(true, std::memory_order_release); }
    Lead(const Lead&) = delete;
    Lead& operator=(const Lead&) = delete;

   private:
    Team& team_;
  };

 private:
  bool take() {
    uint64_t offer = offer_.load(std::memory_order_acquire);
    if ((offer & 0xffffffffu) == 0) {
      return false;
    }
    // Taken only if the offer is still this one; until this part is done the leader makes no other.
    if (!offer_.compare_exchange_strong(offer, offer - 1, std::memory_order_acq_rel)) {
      return true; // somebody was quicker: look again
    }
    job_(context_, int64_t(offer & 0xffffffffu) - 1);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  // A moment; after many of them the core is lent to whoever else wants it, perhaps the thread that is waited for.
  static void wait(int64_t spins) {
    if (spins > kPatience) {
      std::this_thread::yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr int64_t kPatience = 500; // some 10 us

  const int64_t threads_;
  void (*job_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  uint64_t epoch_ = 0;
  alignas(64) std::atomic<uint64_t> offer_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> finished_{false};
};

} // namespace fastwm
