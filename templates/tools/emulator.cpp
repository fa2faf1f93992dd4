// Executes AMX and AVX512-BF16 instructions on x86-64 CPUs that lack them: a SIGILL handler decodes the
// instruction that trapped, does what Intel's Software Developer's Manual (SDM) says, and resumes behind it.
//
//   signal -> decode -> execute -> state        tiles and counters here, vector registers in the signal frame
//
// What hardware would refuse ends the process with a message that names the instruction and its address.
// A SIGILL from anything else goes on to the handler that was there before.
#include <dlfcn.h>
#include <errno.h>
#include <immintrin.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cmath>

#include "bf16.hpp"
#include "tools/emulator_decode.hpp"
#include "tools/emulator_registers.hpp"

namespace jitmoe::emulator {
namespace {

// ---- State: counters ---------------------------------------------------------------------------------

alignas(64) std::atomic<uint64_t> counters[static_cast<int>(Count::kNumber)];

void count(Count what, uint64_t amount = 1) {
  counters[static_cast<int>(what)].fetch_add(amount, std::memory_order_relaxed);
}

// ---- State: tiles of each thread ---------------------------------------------------------------------

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

// No instruction shows the bytes outside a tile's shape: they hold anything.
struct Tile {
  uint8_t rows, row_bytes;
  alignas(64) uint8_t row[kRows][kRowBytes];
  bool valid() const { return rows != 0; }
};

struct TileState {
  std::atomic<bool> taken;
  uint8_t start_row;
  Tile tile[kTiles];
};

// A thread owns a state from LDTILECFG to TILERELEASE only: a handler cannot allocate, and a thread without
// configuration has nothing to keep. 9 MB of zero pages, untouched but for the few in use.
constexpr int kStates = 1024;
TileState states[kStates];

// One pointer of initial-exec TLS: the dynamic model may call malloc at a thread's first access, which a
// signal handler must not, and the static block that dlopen can use has no room for the tiles themselves.
[[gnu::tls_model("initial-exec")]] constinit thread_local TileState* tiles = nullptr;

TileState* take_state() {
  for (TileState& state : states)
    if (!state.taken.exchange(true, std::memory_order_acquire)) return &state;
  return nullptr;
}

void release_tiles() {
  if (tiles) tiles->taken.store(false, std::memory_order_release);
  tiles = nullptr;
}

// ---- Execute: tiles ----------------------------------------------------------------------------------

bool refuse(Machine& machine, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(machine.reason, sizeof machine.reason, format, arguments);
  va_end(arguments);
  return false;
}

// Finds the tile of an operand; null after a refusal.
Tile* find_tile(Machine& machine, int number) {
  if (!tiles)
    refuse(machine,
           "#UD, no tiles are configured on this thread (LDTILECFG missing, or use after TILERELEASE)");
  else if (number >= kTiles)
    refuse(machine, "#UD, tmm%d does not exist", number);
  else if (!tiles->tile[number].valid())
    refuse(machine, "#UD, tmm%d has no rows in the configuration", number);
  else
    return &tiles->tile[number];
  return nullptr;
}

bool is_zero(const uint8_t* bytes, int first, int last) {
  for (int i = first; i <= last; ++i)
    if (bytes[i]) return false;
  return true;
}

// Offsets in the 64 bytes of a tile configuration.
constexpr int kPalette = 0, kStartRow = 1, kColumnBytes = 16, kRowCounts = 48;

bool check_configuration(Machine& machine, const uint8_t* config) {
  if (config[kPalette] > 1) return refuse(machine, "#GP, palette %d does not exist", config[kPalette]);
  if (config[kPalette] == 0) return true;
  if (!is_zero(config, 2, 15) || !is_zero(config, 32, 47) || !is_zero(config, 56, 63))
    return refuse(machine, "#GP, reserved bytes of the configuration are not zero");
  for (int i = 0; i < kTiles; ++i) {
    uint16_t row_bytes;
    memcpy(&row_bytes, config + kColumnBytes + 2 * i, 2);
    const int rows = config[kRowCounts + i];
    if (rows > kRows || row_bytes > kRowBytes || (rows == 0) != (row_bytes == 0))
      return refuse(machine, "#GP, tmm%d cannot have %d rows of %d bytes", i, rows, row_bytes);
  }
  return true;
}

bool load_configuration(Machine& machine, const Instruction& instruction) {
  uint8_t config[64];
  memcpy(config, instruction.memory, sizeof config);
  if (!check_configuration(machine, config)) return false;
  if (config[kPalette] == 0) {
    release_tiles();
    return true;
  }
  if (!tiles) tiles = take_state();
  if (!tiles)
    return refuse(machine, "more than %d threads hold tiles at once: is TILERELEASE missing?", kStates);
  tiles->start_row = config[kStartRow];
  for (int i = 0; i < kTiles; ++i) {
    tiles->tile[i] = Tile{};
    tiles->tile[i].rows = config[kRowCounts + i];
    tiles->tile[i].row_bytes = config[kColumnBytes + 2 * i];
  }
  return true;
}

bool store_configuration(Machine&, const Instruction& instruction) {
  uint8_t config[64] = {};
  if (tiles) {
    config[kPalette] = 1;
    config[kStartRow] = tiles->start_row;
    for (int i = 0; i < kTiles; ++i) {
      config[kRowCounts + i] = tiles->tile[i].rows;
      config[kColumnBytes + 2 * i] = tiles->tile[i].row_bytes;
    }
  }
  memcpy(instruction.memory, config, sizeof config);
  return true;
}

bool release(Machine&, const Instruction&) {
  release_tiles();
  return true;
}

bool zero_tile(Machine& machine, const Instruction& instruction) {
  Tile* tile = find_tile(machine, instruction.reg);
  if (!tile) return false;
  memset(tile->row, 0, sizeof tile->row);
  tiles->start_row = 0;
  return true;
}

// Common to loads and stores: null after a refusal.
Tile* find_memory_tile(Machine& machine, const Instruction& instruction) {
  Tile* tile = find_tile(machine, instruction.reg);
  if (!tile) return nullptr;
  if (tile->row_bytes % 4 == 0 && tiles->start_row < tile->rows) return tile;
  refuse(machine, "#UD, tmm%d has %d rows of %d bytes and start_row is %d", instruction.reg, tile->rows,
         tile->row_bytes, tiles->start_row);
  return nullptr;
}

bool load_tile(Machine& machine, const Instruction& instruction) {
  Tile* tile = find_memory_tile(machine, instruction);
  if (!tile) return false;
  for (int64_t m = tiles->start_row; m < tile->rows; ++m)
    memcpy(tile->row[m], instruction.memory + m * instruction.stride, tile->row_bytes);
  tiles->start_row = 0;
  return true;
}

bool store_tile(Machine& machine, const Instruction& instruction) {
  Tile* tile = find_memory_tile(machine, instruction);
  if (!tile) return false;
  for (int64_t m = tiles->start_row; m < tile->rows; ++m)
    memcpy(instruction.memory + m * instruction.stride, tile->row[m], tile->row_bytes);
  tiles->start_row = 0;
  return true;
}

// c[m, n] += Σ_k a[m, k] b[k, n]; one k is a 32-bit lane of two bfloat16 or four bytes.
struct Product {
  Tile *c, *a, *b;
};

bool find_product(Machine& machine, const Instruction& instruction, Product& product) {
  const int c = instruction.reg, a = instruction.rm, b = instruction.vvvv;
  if (!(product.c = find_tile(machine, c)) || !(product.a = find_tile(machine, a)) ||
      !(product.b = find_tile(machine, b)))
    return false;
  if (c == a || c == b || a == b)
    return refuse(machine, "#UD, tmm%d, tmm%d, tmm%d are not different", c, a, b);
  const Tile &tc = *product.c, &ta = *product.a, &tb = *product.b;
  if (tc.row_bytes % 4 == 0 && ta.row_bytes % 4 == 0 && tc.rows == ta.rows && tc.row_bytes == tb.row_bytes &&
      ta.row_bytes / 4 == tb.rows)
    return true;
  return refuse(machine, "#UD, rows x bytes do not fit: C tmm%d %dx%d, A tmm%d %dx%d, B tmm%d %dx%d", c,
                tc.rows, tc.row_bytes, a, ta.rows, ta.row_bytes, b, tb.rows, tb.row_bytes);
}

void finish_product(const Product& product, int terms) {
  tiles->start_row = 0;
  count(Count::kUsefulRows, product.a->rows);
  count(Count::kUsefulFlop,
        uint64_t{2} * terms * product.a->rows * product.b->rows * (product.c->row_bytes / 4));
}

// Even and odd elements are two chains of fused multiply-adds over k; then even + odd, then + C. All 16
// columns are computed; nobody reads those outside the tile.
__attribute__((target("avx2,fma"))) bool tdpbf16ps(Machine& machine, const Instruction& instruction) {
  Product product;
  if (!find_product(machine, instruction, product)) return false;
  alignas(32) float even_b[kRows][16], odd_b[kRows][16];
  for (int k = 0; k < product.b->rows; ++k)
    for (int n = 0; n < 16; n += 8) {
      const __m256i pairs = _mm256_load_si256(reinterpret_cast<__m256i*>(product.b->row[k] + 4 * n));
      const __m256i odd = _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
      _mm256_store_ps(even_b[k] + n, _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)));
      _mm256_store_ps(odd_b[k] + n, _mm256_castsi256_ps(odd));
    }
  for (int m = 0; m < product.a->rows; ++m) {
    uint16_t a[2 * kRows];
    memcpy(a, product.a->row[m], sizeof a);
    __m256 even[2] = {}, odd[2] = {};
    for (int k = 0; k < product.b->rows; ++k) {
      const __m256 even_a = _mm256_set1_ps(to_float(a[2 * k])),
                   odd_a = _mm256_set1_ps(to_float(a[2 * k + 1]));
      for (int half = 0; half < 2; ++half) {
        even[half] = _mm256_fmadd_ps(even_a, _mm256_load_ps(even_b[k] + 8 * half), even[half]);
        odd[half] = _mm256_fmadd_ps(odd_a, _mm256_load_ps(odd_b[k] + 8 * half), odd[half]);
      }
    }
    float* c = reinterpret_cast<float*>(product.c->row[m]);
    for (int half = 0; half < 2; ++half)
      _mm256_store_ps(c + 8 * half,
                      _mm256_add_ps(_mm256_load_ps(c + 8 * half), _mm256_add_ps(even[half], odd[half])));
  }
  finish_product(product, 2);
  return true;
}

// The four integer products differ only in the sign of their bytes. The sums wrap.
template <typename A, typename B>
__attribute__((target("avx2"))) bool tdp_bytes(Machine& machine, const Instruction& instruction) {
  Product product;
  if (!find_product(machine, instruction, product)) return false;
  for (int m = 0; m < product.a->rows; ++m) {
    uint32_t sums[16];
    memcpy(sums, product.c->row[m], sizeof sums);
    for (int k = 0; k < product.b->rows; ++k)
      for (int n = 0; n < 16; ++n)
        for (int i = 0; i < 4; ++i)
          sums[n] +=
              static_cast<A>(product.a->row[m][4 * k + i]) * static_cast<B>(product.b->row[k][4 * n + i]);
    memcpy(product.c->row[m], sums, sizeof sums);
  }
  finish_product(product, 4);
  return true;
}

// ---- Execute: vectors --------------------------------------------------------------------------------

union Vector {
  alignas(64) uint8_t bytes[64];
  uint16_t half[32];
  uint32_t lane[16];
};

// bfloat16 of a float32: denormals become zero, the rest as everywhere in this library.
uint16_t convert(uint32_t bits) {
  const bool tiny = (bits & 0x7f800000) == 0;
  return tiny ? bits >> 16 & 0x8000 : to_bf16(std::bit_cast<float>(bits));
}

bool is_nan(uint32_t bits) { return (bits & 0x7fffffff) > 0x7f800000; }

// One lane of VDPBF16PS: two fused multiply-adds, the odd element first. With NaN among the operands the
// first in this order is the result (SDM, table of NaN propagation priorities).
__attribute__((target("avx2,fma"))) uint32_t multiply_pairs(uint32_t sum, uint32_t a, uint32_t b) {
  for (uint32_t operand : {a << 16, b << 16, a & 0xffff0000, b & 0xffff0000, sum})
    if (is_nan(operand)) return operand | 0x00400000;
  const float odd = std::fma(to_float(a >> 16), to_float(b >> 16), std::bit_cast<float>(sum));
  return std::bit_cast<uint32_t>(
      std::fma(to_float(static_cast<bf16>(a)), to_float(static_cast<bf16>(b)), odd));
}

// Loads the lanes of the last operand that `wanted` names; masked-off memory is not touched.
Vector load_operand(const VectorRegisters& registers, const Instruction& instruction, uint32_t wanted) {
  Vector operand = {};
  if (!instruction.memory) {
    registers.read(instruction.rm, operand.bytes);
    return operand;
  }
  for (int i = 0; i < instruction.vector_bytes / 4; ++i)
    if (wanted >> i & 1)
      memcpy(&operand.lane[i], instruction.memory + (instruction.broadcast ? 0 : 4 * i), 4);
  return operand;
}

// Writes `value` where the mask allows, in elements of `size` bytes; above them the register becomes zero.
void write_masked(VectorRegisters& registers, const Instruction& instruction, uint32_t mask, int size,
                  int elements, const Vector& value) {
  Vector old, result = value;
  registers.read(instruction.reg, old.bytes);
  for (int i = 0; i < elements; ++i)
    if (!(mask >> i & 1)) {
      if (instruction.zeroing)
        memset(result.bytes + i * size, 0, size);
      else
        memcpy(result.bytes + i * size, old.bytes + i * size, size);
    }
  memset(result.bytes + elements * size, 0, sizeof result.bytes - elements * size);
  registers.write(instruction.reg, result.bytes);
}

uint32_t write_mask(const VectorRegisters& registers, const Instruction& instruction) {
  return instruction.mask ? static_cast<uint32_t>(registers.mask(instruction.mask)) : ~uint32_t{0};
}

bool vdpbf16ps(VectorRegisters& registers, const Instruction& instruction) {
  const int lanes = instruction.vector_bytes / 4;
  const uint32_t mask = write_mask(registers, instruction);
  const Vector b = load_operand(registers, instruction, mask);
  Vector a, sum;
  registers.read(instruction.vvvv, a.bytes);
  registers.read(instruction.reg, sum.bytes);
  for (int i = 0; i < lanes; ++i) sum.lane[i] = multiply_pairs(sum.lane[i], a.lane[i], b.lane[i]);
  write_masked(registers, instruction, mask, 4, lanes, sum);
  return true;
}

bool vcvtneps2bf16(VectorRegisters& registers, const Instruction& instruction) {
  const int lanes = instruction.vector_bytes / 4;
  const uint32_t mask = write_mask(registers, instruction);
  const Vector source = load_operand(registers, instruction, mask);
  Vector result = {};
  for (int i = 0; i < lanes; ++i) result.half[i] = convert(source.lane[i]);
  write_masked(registers, instruction, mask, 2, lanes, result);
  return true;
}

// The last operand fills the lower half. Its exception class (E4NF) reads all of it, whatever the mask.
bool vcvtne2ps2bf16(VectorRegisters& registers, const Instruction& instruction) {
  const int lanes = instruction.vector_bytes / 4;
  const Vector low = load_operand(registers, instruction, ~uint32_t{0});
  Vector high, result = {};
  registers.read(instruction.vvvv, high.bytes);
  for (int i = 0; i < lanes; ++i) {
    result.half[i] = convert(low.lane[i]);
    result.half[lanes + i] = convert(high.lane[i]);
  }
  write_masked(registers, instruction, write_mask(registers, instruction), 2, 2 * lanes, result);
  return true;
}

template <bool (*Execute)(VectorRegisters&, const Instruction&)>
bool with_vectors(Machine& machine, const Instruction& instruction) {
  VectorRegisters registers(machine.context);
  if (!registers.has_avx512()) return refuse(machine, "the signal frame holds no AVX-512 registers");
  return Execute(registers, instruction);
}

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

// Executes the instruction at the context's RIP if it is one of the table and moves RIP behind it.
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

// Takes SIGILL for the whole process; again is the same. Call it before threads start. Returns 0 or an errno:
// ENOSYS if the CPU lacks AVX2 and FMA, EBUSY if somebody has put a handler over this one.
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

// For tests. The hook gets the message of a refused instruction, which is then skipped, instead of abort;
// it runs inside the signal handler. Null restores the abort.
void jitmoe_emulator_on_error(void (*hook)(const char* message)) { error_hook.store(hook); }

// For tests on CPUs that execute the instruction themselves: one step with the registers in `context`
// (a ucontext_t). Returns 1 if the instruction at its RIP was emulated, 0 if it is none of these.
int jitmoe_emulator_step(void* context) { return step(static_cast<ucontext_t*>(context)); }
}
