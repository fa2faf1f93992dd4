// The walk over segments, row blocks and strips inside one OpenMP region. Each loop is a step of its pass: it begins by
// telling a checked instance so, and ends in a barrier.
#pragma once
#include <omp.h>
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

#include "barrier.hpp"
#include "call.hpp"
#include "gemm/interface.hpp"
#include "watch/checked.hpp"
#include "watch/timed.hpp"

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

// This thread's part of the per-thread buffers, its clocks, and where it waits for the others.
struct Thread {
  float* weights;
  float* strips;
  bf16* rows;
  float* lora;
  Barrier& barrier;
  Thread(const Call& call, Barrier& barrier)
      : weights(part(call.thread_weights)),
        strips(part(call.thread_strips)),
        rows(part(call.thread_rows)),
        lora(part(call.thread_lora)),
        barrier(barrier) {}
  mutable Clocks clocks;

 private:
  template <class T>
  static T* part(const PerThread<T>& buffer) {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(buffer.data) + omp_get_thread_num() * buffer.stride);
  }
};

// Work is handed out dynamically: who computes an item never changes its bits.
template <Shape S, class AnyStep, class F>
void for_each_block(const Call& call, const Group& group, const Thread& thread, AnyStep step, F&& f) {
  enter_step<S>(call, step);
#pragma omp for schedule(dynamic) nowait
  for (int64_t i = 0; i < group.blocks; ++i) f(block_of(group, i, S.m_step));
  thread.barrier.wait();
}

// Strips in a row for one thread, so that what it prefetches is its own.
inline constexpr int kNeighbours = 4;

template <Shape S, class AnyStep, class F>
void for_each_segment_strip(const Call& call, const Group& group, const Thread& thread, int64_t columns,
                            AnyStep step, F&& f) {
  const int64_t strips = ceil_div(columns, kStrip);
  enter_step<S>(call, step);
#pragma omp for schedule(dynamic, kNeighbours) nowait
  for (int64_t i = 0; i < group.count * strips; ++i) f(group.segments[i / strips], i % strips);
  thread.barrier.wait();
}

// The strip of weights that this thread reads after an item, to be prefetched.
struct Following {
  int64_t expert;
  int64_t strip;
};

// A strip of token sums belongs to one thread, which walks the experts in ascending order: f(segment, following,
// strip). Several strips at a time, so that the panel of an expert is read from L2 by all but the first of
// them; few enough that every thread has some.
template <Shape S, class AnyStep, class F>
void for_each_strip(const Call& call, const Group& group, const Thread& thread, int64_t columns, AnyStep step,
                    F&& f) {
  constexpr int64_t kMost = 8;
  const int64_t strips = ceil_div(columns, kStrip);
  const int64_t share = strips / (4 * omp_get_num_threads());
  const int64_t width = share < 1 ? 1 : smaller(share, kMost);
  enter_step<S>(call, step);
#pragma omp for schedule(dynamic) nowait
  for (int64_t first = 0; first < strips; first += width) {
    const int64_t end = smaller(first + width, strips);
    for (int64_t s = 0; s < group.count; ++s)
      for (int64_t strip = first; strip < end; ++strip) {
        const int64_t expert = group.segments[s].expert;
        const int64_t next_expert = group.segments[smaller(s + 1, group.count - 1)].expert;
        const bool last = strip + 1 == end;
        f(group.segments[s], last ? Following{next_expert, first} : Following{expert, strip + 1}, strip);
      }
  }
  thread.barrier.wait();
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

// Token sums lie strip by strip: rows of the full width H would, at a power of two, all fall into the
// same sets of the L1 cache.
template <Shape S>
float* sums_of(const Call& call, Access access, int64_t strip) {
  const int64_t count = call.tokens * kStrip;
  return touch<S>(call, access, call.sums, call.sums + strip * count, count * sizeof(float));
}

// No barrier: the steps before the first addition end in some. A call without rows has no such steps, and a checked
// one changes the lives of buffers at the first of them.
template <Shape S>
void clear_sums(const Call& call, const Thread& thread) {
  const Lap<S> lap(thread.clocks, Phase::sums);
#pragma omp for schedule(static) nowait
  for (int64_t strip = 0; strip < ceil_div(S.hidden, kStrip); ++strip) {
    float* sums = sums_of<S>(call, Access::write, strip);
    for (int64_t i = 0; i < call.tokens * kStrip; ++i) sums[i] = 0.0f;
  }
  if (!call.groups || S.watch == Watch::memory) thread.barrier.wait();
}

// The one rounding of the sums into the result.
template <Shape S>
void write_result(const Call& call, const Thread& thread) {
  const Lap<S> lap(thread.clocks, Phase::sums);
#pragma omp for schedule(static) nowait
  for (int64_t token = 0; token < call.tokens; ++token)
    for (int64_t column = 0; column < S.hidden; column += kStrip) {
      const float* sums = call.sums + (column / kStrip * call.tokens + token) * kStrip;
      sums = touch<S>(call, Access::read, call.sums, sums, kStrip * sizeof(float));
      const int64_t columns = smaller(kStrip, S.hidden - column);
      const int64_t at = token * S.hidden + column;
      for (int64_t c = 0; c < columns; ++c) {
        if (call.result) call.result[at + c] = to_bf16(sums[c]);
        if (call.result_float) call.result_float[at + c] = sums[c];
      }
    }
  thread.barrier.wait();
}

// A pass: group after group on all threads, between clearing the token sums and rounding them.
template <Shape S, class Gemm, class F>
void run(const Call& call, F&& run_group) {
  Barrier barrier;
#pragma omp parallel num_threads(static_cast<int>(call.threads))
  {
    [[maybe_unused]] const FloatMode mode;
    [[maybe_unused]] const ThreadState<Gemm> state;
    const Thread thread(call, barrier);
    enter_call<S>(call);
    if (call.sums) clear_sums<S>(call, thread);
    for (int64_t g = 0; g < call.groups; ++g) run_group(call, group_of(call, g, S.m_step), thread);
    if (call.sums) write_result<S>(call, thread);
    leave_call<S>(call);
    report_clocks<S>(call, thread.clocks);
  }
}

}  // namespace jitmoe
