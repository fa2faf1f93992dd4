// What the phases of forward and backward share: the walk over segments, row blocks and strips inside one
// OpenMP region, and the scratch of the calling thread.
#pragma once
#include <omp.h>
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

#include "call.hpp"
#include "gemm/interface.hpp"
#include "watch/checked.hpp"

namespace jitmoe {

// The segments of one group, which hold the panels at the same time.
struct Group {
  const Segment* segments;
  int64_t count;
  int64_t blocks;     // row blocks of all segments
  int64_t first_row;  // row 0 of the group's row-major scratch
  int64_t rows;
};

inline Group group_of(const Call& call, int64_t index, int64_t m_step) {
  const Segment* begin = call.segments + call.group_segments[index];
  const int64_t count = call.group_segments[index + 1] - call.group_segments[index];
  const Segment& last = begin[count - 1];
  return {begin, count, last.block + ceil_div(last.rows, m_step), begin->row,
          last.row + last.rows - begin->row};
}

struct Block {
  const Segment* segment;
  int64_t index;  // in the group's panels
  int64_t row;    // first row, in the order sorted by expert
  int64_t rows;
};

inline Block block_of(const Group& group, int64_t index, int64_t m_step) {
  const Segment* segment = group.segments;
  while (segment + 1 < group.segments + group.count && segment[1].block <= index) ++segment;
  const RowBlocks blocks(segment->rows, m_step);
  const int64_t b = index - segment->block;
  return {segment, index, segment->row + blocks.begin(b), blocks.size(b)};
}

// Work is handed out dynamically: who computes an item never changes its bits. Each loop ends in a barrier.
template <Shape S, class F>
void for_each_block(const Group& group, F&& f) {
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < group.blocks; ++i) f(block_of(group, i, S.m_step));
}

// Strips in a row for one thread, so that what it prefetches is its own.
inline constexpr int kNeighbours = 4;

template <class F>
void for_each_segment_strip(const Group& group, int64_t columns, F&& f) {
  const int64_t strips = ceil_div(columns, kStrip);
#pragma omp for schedule(dynamic, kNeighbours)
  for (int64_t i = 0; i < group.count * strips; ++i) f(group.segments[i / strips], i % strips);
}

// Where this thread goes after an item: what it may prefetch.
struct Next {
  int64_t expert;
  int64_t strip;
};

// A strip of token sums belongs to one thread, which walks the experts in ascending order: f(segment, next,
// strip). Several strips at a time, so that the panel of an expert is read from L2 by all but the first of
// them; few enough that every thread has some.
template <class F>
void for_each_strip(const Group& group, int64_t columns, F&& f) {
  constexpr int64_t kMost = 8;
  const int64_t strips = ceil_div(columns, kStrip);
  const int64_t share = strips / (4 * omp_get_num_threads());
  const int64_t step = share < 1 ? 1 : smaller(share, kMost);
#pragma omp for schedule(dynamic)
  for (int64_t first = 0; first < strips; first += step) {
    const int64_t end = smaller(first + step, strips);
    for (int64_t s = 0; s < group.count; ++s)
      for (int64_t strip = first; strip < end; ++strip) {
        const int64_t following = group.segments[smaller(s + 1, group.count - 1)].expert;
        const bool last = strip + 1 == end;
        f(group.segments[s], Next{last ? following : group.segments[s].expert, last ? first : strip + 1},
          strip);
      }
  }
}

// Rounding to nearest and denormals as IEEE 754 has them, while it lives. Another library may have set
// flush-to-zero, and on the calling thread alone: bits would depend on which thread computed what.
struct FloatMode {
#ifdef __SSE2__
  const unsigned before = _mm_getcsr();
  FloatMode() { _mm_setcsr(kDefault); }
  ~FloatMode() { _mm_setcsr(before); }

 private:
  static constexpr unsigned kDefault = 0x1f80;  // all exceptions masked, round to nearest
#endif
};

// What a timed instance measures; kernels.py has the names in the same order.
enum class Step {
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

// This thread's part of the per-thread buffers, and its clocks.
struct ThreadScratch {
  float* weights;
  float* strips;
  bf16* rows;
  float* lora;
  explicit ThreadScratch(const Call& call)
      : weights(part(call.thread_weights, call.weights_stride)),
        strips(part(call.thread_strips, call.strips_stride)),
        rows(part(call.thread_rows, call.rows_stride)),
        lora(part(call.thread_lora, call.lora_stride)) {}
  mutable double seconds[static_cast<int>(Step::count)] = {};
  float* strip(int64_t index, int64_t rows) const { return strips + index * rows * kStrip; }

 private:
  template <class T>
  static T* part(T* base, int64_t stride) {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(base) + omp_get_thread_num() * stride);
  }
};

// Adds the time until the end of its scope to a step of this thread. Scopes of different steps do not nest.
template <Shape S>
class Lap {
 public:
  Lap(const ThreadScratch& scratch, Step step) : seconds_(scratch.seconds[static_cast<int>(step)]) {
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
void report_laps(const Call& call, const ThreadScratch& scratch) {
  if constexpr (S.watch == Watch::time) {
#pragma omp critical
    for (int step = 0; step < static_cast<int>(Step::count); ++step)
      call.step_seconds[step] += scratch.seconds[step];
  }
}

// Token sums lie strip by strip: rows of the full width H would, at a power of two, all fall into the
// same sets of the L1 cache.
inline float* sums_of(const Call& call, int64_t strip) { return call.sums + strip * call.tokens * kStrip; }

template <Shape S>
void announce_sums(const Call& call, Access access, int64_t strip) {
  announce<S>(call, access, &Call::sums, sums_of(call, strip), call.tokens * kStrip * sizeof(float));
}

// No barrier: the steps before the first addition end in some. A call without rows has no such steps, and a checked
// one changes the lives of buffers at the first of them.
template <Shape S>
void clear_sums(const Call& call, const ThreadScratch& scratch) {
  const Lap<S> lap(scratch, Step::sums);
#pragma omp for schedule(static) nowait
  for (int64_t strip = 0; strip < ceil_div(S.hidden, kStrip); ++strip) {
    announce_sums<S>(call, Access::write, strip);
    for (int64_t i = 0; i < call.tokens * kStrip; ++i) sums_of(call, strip)[i] = 0.0f;
  }
  if (!call.groups || S.watch == Watch::memory) {
#pragma omp barrier
  }
}

// The one rounding of the sums into the result.
template <Shape S>
void write_result(const Call& call, const ThreadScratch& scratch) {
  const Lap<S> lap(scratch, Step::sums);
#pragma omp for schedule(static)
  for (int64_t token = 0; token < call.tokens; ++token)
    for (int64_t column = 0; column < S.hidden; column += kStrip) {
      const float* sums = sums_of(call, column / kStrip) + token * kStrip;
      announce<S>(call, Access::read, &Call::sums, sums, kStrip * sizeof(float));
      const int64_t columns = smaller(kStrip, S.hidden - column);
      const int64_t at = token * S.hidden + column;
      for (int64_t c = 0; c < columns; ++c) {
        if (call.result) call.result[at + c] = to_bf16(sums[c]);
        if (call.result_float) call.result_float[at + c] = sums[c];
      }
    }
}

// A pass: group after group on all threads, between clearing the token sums and rounding them.
template <Shape S, class Gemm, class F>
void run(const Call& call, F&& run_group) {
#pragma omp parallel num_threads(static_cast<int>(call.threads))
  {
    [[maybe_unused]] const FloatMode mode;
    [[maybe_unused]] const ThreadState<Gemm> state;
    const ThreadScratch scratch(call);
    enter_call<S>(call);
    if (call.sums) clear_sums<S>(call, scratch);
    for (int64_t g = 0; g < call.groups; ++g) run_group(call, group_of(call, g, S.m_step), scratch);
    if (call.sums) write_result<S>(call, scratch);
    leave_call<S>(call);
    report_laps<S>(call, scratch);
  }
}

}  // namespace jitmoe
