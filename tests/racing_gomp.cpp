// The part of libgomp that the kernels call, for ThreadSanitizer, which does not see into libgomp and would take each
// of its barriers for none. Handing out work orders nothing between threads here, as OpenMP promises no more: what
// orders the steps of a pass is the kernels' own barrier alone.
#include <pthread.h>

#include <atomic>
#include <thread>
#include <vector>

namespace {

constexpr int kLoops = 1 << 12;  // of one parallel region

struct Team {
  int threads;
  pthread_barrier_t barrier;
  std::vector<std::atomic<long>> given;  // items of each loop that were handed out
  explicit Team(int count) : threads(count), given(kLoops) { pthread_barrier_init(&barrier, nullptr, count); }
  ~Team() { pthread_barrier_destroy(&barrier); }
};

thread_local Team* team = nullptr;
thread_local int number = 0;
thread_local int loop = -1;
thread_local long first, last, step, chunk;

}  // namespace

extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team ? team->threads : 1; }

void GOMP_barrier() {
  if (team) pthread_barrier_wait(&team->barrier);
}

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  Team own(threads ? static_cast<int>(threads) : 1);
  auto run = [&](int index) {
    team = &own;
    number = index;
    loop = -1;
    work(data);
    team = nullptr;
    number = 0;
  };
  std::vector<std::thread> others;
  for (int index = 1; index < own.threads; ++index) others.emplace_back(run, index);
  run(0);
  for (std::thread& other : others) other.join();
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  const long at = first + team->given[loop % kLoops].fetch_add(chunk, std::memory_order_relaxed) * step;
  if (at >= last) return false;
  *begin = at;
  *end = at + chunk * step < last ? at + chunk * step : last;
  return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long from, long to, long by, long size, long* begin, long* end) {
  ++loop;
  first = from, last = to, step = by, chunk = size;
  return GOMP_loop_nonmonotonic_dynamic_next(begin, end);
}

void GOMP_loop_end_nowait() {}
void GOMP_loop_end() { GOMP_barrier(); }

}  // extern "C"
