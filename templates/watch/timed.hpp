// A timed instance measures the seconds that its threads spend in each phase of their work.
#pragma once
#include <omp.h>

#include "call.hpp"
#include "shape.hpp"

namespace jitmoe {

// PHASES in jitmoe/jit/abi.py has the names in the same order.
enum class Phase {
  gather,
  pack,
  low_rank,
  gate_up,
  activation,
  down,
  combine,
  act_grad,
  x_grad,
  lora_grads,
  sums,
  count
};

// The clocks of one thread.
struct Clocks {
  double seconds[static_cast<int>(Phase::count)] = {};
};

// Adds the time until the end of its scope to a phase of this thread. Scopes of different phases do not nest.
template <Shape S>
class Lap {
 public:
  Lap(Clocks& clocks, Phase phase) : seconds_(clocks.seconds[static_cast<int>(phase)]) {
    if constexpr (S.watch == Watch::time) start_ = omp_get_wtime();
  }
  ~Lap() {
    if constexpr (S.watch == Watch::time) seconds_ += omp_get_wtime() - start_;
  }
  Lap(const Lap&) = delete;
  Lap& operator=(const Lap&) = delete;

 private:
  double& seconds_;
  double start_ = 0;
};

template <Shape S>
void report_clocks(const Call& call, const Clocks& clocks) {
  if constexpr (S.watch == Watch::time) {
#pragma omp critical
    for (int phase = 0; phase < static_cast<int>(Phase::count); ++phase)
      call.phase_seconds[phase] += clocks.seconds[phase];
  }
}

}  // namespace jitmoe
