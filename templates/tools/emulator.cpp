// Executes AMX and AVX512-BF16 instructions on x86-64 CPUs that lack them: a SIGILL handler decodes the
// instruction that trapped, does what Intel's Software Developer's Manual (SDM) says, and resumes behind it.
//
//   signal -> decode -> execute -> state        emulator_decode.hpp, emulator_tiles.hpp, emulator_vectors.hpp
//
// An instruction that hardware would refuse ends the process with a message that names it and its address. A SIGILL
// from anything else goes on to the handler that was there before.
#include <dlfcn.h>
#include <errno.h>
#include <immintrin.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>

#include "tools/emulator_decode.hpp"
#include "tools/emulator_tiles.hpp"
#include "tools/emulator_vectors.hpp"

namespace jitmoe::emulator {
namespace {

// ---- The instructions --------------------------------------------------------------------------------

constexpr Opcode kOpcodes[] = {
    {"LDTILECFG", Encoding::kVex, Prefix::kNone, 0x49, Form::kConfiguration, Count::kConfigurations,
     load_configuration},
    {"STTILECFG", Encoding::kVex, Prefix::k66, 0x49, Form::kConfiguration, Count::kConfigurationStores,
     store_configuration},
    {"TILERELEASE", Encoding::kVex, Prefix::kNone, 0x49, Form::kRelease, Count::kReleases, release},
    {"TILEZERO", Encoding::kVex, Prefix::kF2, 0x49, Form::kTile, Count::kTileZeros, zero_tile},
    {"TILELOADD", Encoding::kVex, Prefix::kF2, 0x4b, Form::kTileMemory, Count::kTileLoads, load_tile},
    {"TILELOADDT1", Encoding::kVex, Prefix::k66, 0x4b, Form::kTileMemory, Count::kTileLoads, load_tile},
    {"TILESTORED", Encoding::kVex, Prefix::kF3, 0x4b, Form::kTileMemory, Count::kTileStores, store_tile},
    {"TDPBF16PS", Encoding::kVex, Prefix::kF3, 0x5c, Form::kTiles, Count::kTdpbf16ps, tdpbf16ps},
    {"TDPBSSD", Encoding::kVex, Prefix::kF2, 0x5e, Form::kTiles, Count::kTdpbssd, tdp_bytes<int8_t, int8_t>},
    {"TDPBSUD", Encoding::kVex, Prefix::kF3, 0x5e, Form::kTiles, Count::kTdpbsud, tdp_bytes<int8_t, uint8_t>},
    {"TDPBUSD", Encoding::kVex, Prefix::k66, 0x5e, Form::kTiles, Count::kTdpbusd, tdp_bytes<uint8_t, int8_t>},
    {"TDPBUUD", Encoding::kVex, Prefix::kNone, 0x5e, Form::kTiles, Count::kTdpbuud,
     tdp_bytes<uint8_t, uint8_t>},
    {"VDPBF16PS", Encoding::kEvex, Prefix::kF3, 0x52, Form::kVectors, Count::kAvx512Bf16,
     with_vectors<vdpbf16ps>},
    {"VCVTNEPS2BF16", Encoding::kEvex, Prefix::kF3, 0x72, Form::kConvert, Count::kAvx512Bf16,
     with_vectors<vcvtneps2bf16>},
    {"VCVTNE2PS2BF16", Encoding::kEvex, Prefix::kF2, 0x72, Form::kVectors, Count::kAvx512Bf16,
     with_vectors<vcvtne2ps2bf16>},
};

// ---- Signal ------------------------------------------------------------------------------------------

// The arithmetic of these instructions: round to nearest, denormals are zero, no exception is raised.
class FlushingArithmetic {
 public:
  FlushingArithmetic() { _mm_setcsr(0x9fc0); }
  ~FlushingArithmetic() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_ = _mm_getcsr();
};

std::atomic<void (*)(const char*)> error_hook = nullptr;

// snprintf of words and integers neither locks nor allocates in glibc, and nothing runs after abort.
void report(const char* name, uint64_t address, const char* reason) {
  Dl_info where = {};
  char message[512];
  const bool known = dladdr(reinterpret_cast<void*>(address), &where) && where.dli_fname;
  snprintf(message, sizeof message, "jitmoe emulator: %s at 0x%llx (%s+0x%llx): %s\n", name,
           static_cast<unsigned long long>(address), known ? where.dli_fname : "no library",
           static_cast<unsigned long long>(address - reinterpret_cast<uint64_t>(where.dli_fbase)), reason);
  if (auto hook = error_hook.load()) return hook(message);
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, message, strlen(message));
  abort();
}

// Executes the instruction at the context's RIP, if the table has it, and moves RIP behind it.
bool step(ucontext_t* context) {
  const Decoded decoded = decode(context, kOpcodes);
  if (!decoded.opcode) return false;
  Machine machine = {context, {}};
  const char* fault = decoded.fault;
  if (!fault) {
    const FlushingArithmetic arithmetic;
    if (!decoded.opcode->execute(machine, decoded.instruction)) fault = machine.reason;
  }
  auto& rip = context->uc_mcontext.gregs[REG_RIP];
  if (fault)
    report(decoded.opcode->name, static_cast<uint64_t>(rip), fault);
  else
    count(decoded.opcode->count);
  rip += decoded.instruction.length;
  return true;
}

struct sigaction previous;

void pass_on(int signal, siginfo_t* info, void* context) {
  const bool fault = info->si_code > 0;
  if (previous.sa_handler == SIG_DFL || (previous.sa_handler == SIG_IGN && fault)) {
    // The default action needs the default handler; a fault comes back by itself, a sent signal does not.
    struct sigaction terminate = {};
    terminate.sa_handler = SIG_DFL;
    sigaction(signal, &terminate, nullptr);
    if (!fault) raise(signal);
  } else if (previous.sa_handler != SIG_IGN) {
    if (previous.sa_flags & SA_SIGINFO)
      previous.sa_sigaction(signal, info, context);
    else
      previous.sa_handler(signal);
  }
}

void handle_sigill(int signal, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  // A signal that somebody sent says nothing about the instruction at RIP.
  if (info->si_code <= 0 || !step(static_cast<ucontext_t*>(context))) pass_on(signal, info, context);
  errno = saved_errno;
}

}  // namespace
}  // namespace jitmoe::emulator

using namespace jitmoe::emulator;

extern "C" {

// Takes SIGILL for the whole process; a second call does nothing. Call it before threads start. Returns 0 or an errno:
// ENOSYS if the CPU lacks AVX2 or FMA, EBUSY if another handler was put over this one.
int jitmoe_emulator_install(void) {
  static bool installed = false;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return ENOSYS;
  struct sigaction current = {};
  if (sigaction(SIGILL, nullptr, &current)) return errno;
  if (current.sa_sigaction == handle_sigill) return 0;
  if (installed) return EBUSY;
  previous = current;
  // Without SA_ONSTACK: a frame with AVX-512 registers takes 3 KB and the tiles of a product 2 KB more, while
  // threads may have alternate stacks of 2 KB. The interrupted kernel's own stack has room.
  struct sigaction action = {};
  action.sa_sigaction = handle_sigill;
  action.sa_flags = SA_SIGINFO | (previous.sa_flags & SA_NODEFER);
  action.sa_mask = previous.sa_mask;
  if (sigaction(SIGILL, &action, nullptr)) return errno;
  installed = true;
  return 0;
}

// Fills `values` with the first `number` counters, in the order of Count; returns how many there are.
int jitmoe_emulator_counts(uint64_t* values, int number) {
  const int all = static_cast<int>(Count::kNumber);
  for (int i = 0; i < number && i < all; ++i) values[i] = counters[i].load(std::memory_order_relaxed);
  return all;
}

void jitmoe_emulator_reset(void) {
  for (auto& counter : counters) counter.store(0, std::memory_order_relaxed);
}

// For tests. Instead of an abort, the hook gets the message of a refused instruction, which is then skipped. It runs
// inside the signal handler. Null restores the abort.
void jitmoe_emulator_on_error(void (*hook)(const char* message)) { error_hook.store(hook); }

// For tests on CPUs that execute the instruction themselves: one step with the registers in `context`
// (a ucontext_t). Returns 1 if the instruction at its RIP was emulated, 0 if it is none of these.
int jitmoe_emulator_step(void* context) { return step(static_cast<ucontext_t*>(context)); }
}
