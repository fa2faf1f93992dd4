// A checked instance holds its calls to the plan of their scratch. Each step announces what it reads and
// writes, and a map of owners has an entry for each line of 64 bytes of the arena:
//
//   arena    | canary | x_panel ......... | canary | gate.low ... | canary |
//   owners       0      2  2  2  2  2  2      0      7  7  7  7       0          0: nobody
//
// A write takes its lines, which must be free or the writer's own; a read must find them taken by its own
// buffer. At the end of a life the canaries on both sides are looked at and the lines are free again. Before and
// after it the bytes are NaNs, for readers that announce nothing. A part of a thread is an owner of its own.
//
// The first fault is kept: that of the earliest step, and in it that of the first buffer, so that it matters
// little which thread came first. A lost canary comes last, as the announced write beside it is its cause. The
// call runs to its end, and inspect/checked.py raises the fault.
#pragma once
#include <omp.h>

#include <cstddef>

#include "call.hpp"
#include "shape.hpp"

namespace jitmoe {

enum class Access { read, write };

// inspect/checked.py has a sentence for each, in this order.
enum class Fault : int64_t { none, outside_life, outside_buffer, foreign_read, foreign_write, canary };

// What the plan promises about one buffer. Steps count from 0 in each group.
struct Life {
  int64_t offset;  // in the arena
  int64_t nbytes;  // 0 for a buffer that this call has not
  int64_t first;   // step
  int64_t last;
  int64_t alive;  // whether the present step lies between the two
};

// Plan and outcome of one checked call; mirrored in jit/abi.py.
struct Checks {
  char* arena;
  uint32_t* owners;  // of each line
  Life* lives;       // one for each field of Call, most of them of no buffer
  int64_t step;      // the present one
  int64_t entered;   // steps entered so far, in all groups
  Fault fault;
  int64_t fault_entered;
  int64_t fault_step;
  int64_t fault_buffer;
  int64_t fault_offset;  // in the arena
  int64_t fault_owner;
};

inline constexpr int64_t kLine = 64;
inline constexpr int64_t kFields = sizeof(Call) / sizeof(void*);
inline constexpr int64_t kCanary = 0x7fc0dead7fc0dead;  // NaNs too, for a reader
inline constexpr uint32_t kPoison = 0x7fc07fc0;         // a NaN as float32 and as two bfloat16

// Place of the pointer to a buffer among the fields of Call.
template <class T>
int64_t index_of(const Call& call, T* const& buffer) {
  return (reinterpret_cast<const char*>(&buffer) - reinterpret_cast<const char*>(&call)) /
         static_cast<int64_t>(sizeof(void*));
}

// Whether a fault found now is to be kept instead of the one that is.
inline bool precedes(const Checks& checks, Fault fault, int64_t buffer, int64_t offset) {
  if (checks.fault == Fault::none) return true;
  if (checks.entered != checks.fault_entered) return false;
  const bool canary = fault == Fault::canary, canary_before = checks.fault == Fault::canary;
  if (canary != canary_before) return canary_before;
  return buffer != checks.fault_buffer ? buffer < checks.fault_buffer : offset < checks.fault_offset;
}

inline void record(Checks& checks, Fault fault, int64_t buffer, int64_t offset, uint32_t owner) {
#pragma omp critical(jitmoe_checks)
  if (precedes(checks, fault, buffer, offset)) {
    checks.fault = fault;
    checks.fault_entered = checks.entered;
    checks.fault_step = checks.step;
    checks.fault_buffer = buffer;
    checks.fault_offset = offset;
    checks.fault_owner = owner;
  }
}

// Two threads may take one line of a buffer that both write parts of, hence the atomic exchange.
inline void check_access(Checks& checks, Access access, int64_t buffer, int64_t part, const void* at,
                         int64_t bytes) {
  const Life& life = checks.lives[buffer];
  if (!life.alive) return record(checks, Fault::outside_life, buffer, life.offset, 0);
  const int64_t begin = reinterpret_cast<intptr_t>(at) - reinterpret_cast<intptr_t>(checks.arena);
  if (begin < life.offset || begin + bytes > life.offset + life.nbytes)
    return record(checks, Fault::outside_buffer, buffer, begin, 0);
  const auto own = static_cast<uint32_t>(1 + buffer + part * kFields);
  for (int64_t line = begin / kLine; line * kLine < begin + bytes; ++line) {
    uint32_t owner = __atomic_load_n(checks.owners + line, __ATOMIC_RELAXED);
    if (owner == own) continue;
    if (access == Access::read) return record(checks, Fault::foreign_read, buffer, line * kLine, owner);
    owner = 0;
    if (!__atomic_compare_exchange_n(checks.owners + line, &owner, own, false, __ATOMIC_RELAXED,
                                     __ATOMIC_RELAXED) &&
        owner != own)
      return record(checks, Fault::foreign_write, buffer, line * kLine, owner);
  }
}

inline void poison(char* begin, int64_t bytes) {
  auto* words = reinterpret_cast<uint32_t*>(begin);
  for (int64_t i = 0; i < bytes / static_cast<int64_t>(sizeof(uint32_t)); ++i) words[i] = kPoison;
}

// f(word, its offset in the arena) for the canaries before and behind a buffer.
template <class F>
void for_each_canary(Checks& checks, const Life& life, F&& f) {
  const int64_t begins[] = {life.offset - kLine, life.offset + life.nbytes};
  for (const int64_t begin : begins)
    for (int64_t at = begin; at < begin + kLine; at += sizeof(int64_t))
      f(*reinterpret_cast<int64_t*>(checks.arena + at), at);
}

inline void begin_life(Checks& checks, Life& life) {
  life.alive = 1;
  poison(checks.arena + life.offset, life.nbytes);
  for_each_canary(checks, life, [](int64_t& word, int64_t) { word = kCanary; });
}

inline void end_life(Checks& checks, int64_t buffer) {
  Life& life = checks.lives[buffer];
  for_each_canary(checks, life, [&](int64_t word, int64_t at) {
    if (word != kCanary) record(checks, Fault::canary, buffer, at, 0);
  });
  life.alive = 0;
  poison(checks.arena + life.offset, life.nbytes);
  for (int64_t line = life.offset / kLine; line < (life.offset + life.nbytes) / kLine; ++line)
    checks.owners[line] = 0;
}

// Ends the lives that do not reach `step`, then begins those that do. Step 0 begins a group, which only the
// token sums outlive.
inline void change_lives(Checks& checks, int64_t step, int64_t sums) {
  for (int64_t buffer = 0; buffer < kFields; ++buffer) {
    const Life& life = checks.lives[buffer];
    const bool new_group = step == 0 && buffer != sums;
    if (life.alive && (step > life.last || new_group)) end_life(checks, buffer);
  }
  checks.step = step;
  ++checks.entered;
  for (int64_t buffer = 0; buffer < kFields; ++buffer) {
    Life& life = checks.lives[buffer];
    if (life.nbytes && !life.alive && life.first <= step && step <= life.last) begin_life(checks, life);
  }
}

// Says that this thread is about to read or write `bytes` of a buffer, and gives back where.
template <Shape S, class T, class At>
[[gnu::always_inline]] inline At* touch(const Call& call, Access access, T* const& buffer, At* at,
                                        int64_t bytes) {
  if constexpr (S.watch == Watch::memory) {
    const int64_t index = index_of(call, buffer);
    const int64_t part = index < index_of(call, call.thread_weights.data) ? 0 : omp_get_thread_num();
    if (bytes > 0) check_access(*call.checks, access, index, part, at, bytes);
  }
  return at;
}

// Called by all threads, after the barrier of the step before; `step` as the lives of the plan count them.
template <Shape S, class AnyStep>
[[gnu::always_inline]] inline void enter_step(const Call& call, AnyStep step) {
  if constexpr (S.watch == Watch::memory) {
#pragma omp single
    change_lives(*call.checks, static_cast<int64_t>(step), index_of(call, call.sums));
  }
}

// As enter_step, around all groups: before the token sums are cleared, and after they are read.
template <Shape S>
void enter_call(const Call& call) {
  if constexpr (S.watch == Watch::memory) {
    Life& sums = call.checks->lives[index_of(call, call.sums)];
#pragma omp single
    if (call.sums && sums.first == 0) begin_life(*call.checks, sums);
  }
}

template <Shape S>
void leave_call(const Call& call) {
  if constexpr (S.watch == Watch::memory) {
#pragma omp single
    for (int64_t buffer = 0; buffer < kFields; ++buffer)
      if (call.checks->lives[buffer].alive) end_life(*call.checks, buffer);
  }
}

}  // namespace jitmoe
