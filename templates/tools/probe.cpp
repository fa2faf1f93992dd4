// Tests whether this process may use AMX tiles, beyond the feature bits of CPUID: palettes, the permission of Linux,
// and a product in a child process, which may die of it.
#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <initializer_list>

#include "bf16.hpp"
#include "gemm/tiles.hpp"

namespace {

using namespace jitmoe;

constexpr int kWrong = -1, kNoProcess = -2;

// Rows 1..16 of a times columns 1..16 of b: every result is an integer that float32 holds exactly.
bool product_is_right() {
  constexpr int kPairs = 16;
  alignas(64) bf16 a[amx::kRows][2 * kPairs], b[kPairs][2 * amx::kRows];
  alignas(64) float c[amx::kRows][amx::kRows] = {};
  for (int i = 0; i < amx::kRows; ++i)
    for (int pair = 0; pair < kPairs; ++pair)
      for (int half = 0; half < 2; ++half) {
        a[i][2 * pair + half] = to_bf16(static_cast<float>(i + 1));
        b[pair][2 * i + half] = to_bf16(static_cast<float>(i + 1));
      }
  amx::Configuration configuration = {};
  configuration.palette = 1;
  for (int tile = 0; tile < 3; ++tile) {
    configuration.rows[tile] = amx::kRows;
    configuration.row_bytes[tile] = amx::kRowBytes;
  }
  amx::load_configuration(configuration);
  amx::load<0>(c, amx::kRowBytes);
  amx::load<1>(a, amx::kRowBytes);
  amx::stream<2>(b, amx::kRowBytes);
  amx::multiply_add<0, 1, 2>();
  amx::store<0>(c, amx::kRowBytes);
  amx::release();
  for (int m = 0; m < amx::kRows; ++m)
    for (int n = 0; n < amx::kRows; ++n)
      if (c[m][n] != static_cast<float>(2 * kPairs * (m + 1) * (n + 1))) return false;
  return true;
}

}  // namespace

extern "C" {

// Palettes of tiles that CPUID reports.
int jitmoe_tile_palettes(void) {
  unsigned most, b, c, d;
  return __get_cpuid_count(0x1d, 0, &most, &b, &c, &d) ? static_cast<int>(most) : 0;
}

// Asks Linux for the tile registers, for this process and its children. Returns 0 or an errno.
int jitmoe_request_tiles(void) {
  constexpr int kArchReqXcompPerm = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) ? errno : 0;
}

// Runs a product in a child. Returns 0 if it was right, the signal that killed the child, kWrong or kNoProcess. The
// system call makes the child, as fork() would run handlers of libraries that the child never uses. It drops handlers
// of SIGILL: the emulator must not answer for the CPU.
int jitmoe_test_tiles(void) {
  void* page = mmap(nullptr, sizeof(int), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return kNoProcess;
  auto* right = static_cast<volatile int*>(page);
  const auto child = static_cast<pid_t>(syscall(SYS_fork));
  if (child == 0) {
    for (int number : {SIGILL, SIGSEGV, SIGBUS, SIGFPE}) signal(number, SIG_DFL);
    *right = product_is_right();
    syscall(SYS_exit_group, 0);
  }
  int status = 0;
  while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  const int verdict = child < 0 ? kNoProcess : *right ? 0 : WIFSIGNALED(status) ? WTERMSIG(status) : kWrong;
  munmap(page, sizeof(int));
  return verdict;
}
}
