// The barrier between steps.
#pragma once
#include <linux/futex.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace jitmoe {

// Holds the threads of one parallel region until all are there; what each wrote before is seen by all after.
//
// A thread spins for as long as a wake-up takes, and then sleeps. GOMP's own barrier spins for milliseconds: on a busy
// machine that uses up the thread's turn on its core, and a call of 0.4 ms took 100 (2026-11-25, two CPUs with another
// process on each).
class Barrier {
 public:
  void wait() {
    const uint32_t threads = static_cast<uint32_t>(omp_get_num_threads());
    if (threads == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      futex(FUTEX_WAKE_PRIVATE, INT_MAX);
      return;
    }
    for (int spin = 0; spin < kSpins; ++spin) {
      if (round_.load(std::memory_order_acquire) != round) return;
      pause();
    }
    while (round_.load(std::memory_order_acquire) == round) futex(FUTEX_WAIT_PRIVATE, round);
  }

 private:
  static constexpr int kSpins = 200;  // 5 to 10 microseconds

  void futex(int operation, uint32_t value) {
    static_assert(sizeof(round_) == sizeof(uint32_t), "the system reads the counter where it lies");
    syscall(SYS_futex, &round_, operation, value, nullptr, nullptr, 0);
  }

  static void pause() {
#ifdef __SSE2__
    __builtin_ia32_pause();
#endif
  }

  std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};  // apart from what arriving threads write to
};

}  // namespace jitmoe
