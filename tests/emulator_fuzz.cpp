// Random bytes for the emulator's decoder, at the end of memory that can be read: see test_fuzz_readers.py.
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <random>

#include "tools/emulator_decode.hpp"

using namespace jitmoe::emulator;

namespace {

constexpr int kLongest = 15;  // bytes of an x86 instruction

constexpr Opcode kTable[] = {
    {"configuration", Encoding::kVex, Prefix::kNone, 0x49, Form::kConfiguration, Count::kNumber, nullptr},
    {"release", Encoding::kVex, Prefix::kNone, 0x49, Form::kRelease, Count::kNumber, nullptr},
    {"tile", Encoding::kVex, Prefix::kF2, 0x49, Form::kTile, Count::kNumber, nullptr},
    {"load", Encoding::kVex, Prefix::kF2, 0x4b, Form::kTileMemory, Count::kNumber, nullptr},
    {"tiles", Encoding::kVex, Prefix::kF3, 0x5c, Form::kTiles, Count::kNumber, nullptr},
    {"vectors", Encoding::kEvex, Prefix::kF3, 0x52, Form::kVectors, Count::kNumber, nullptr},
    {"convert", Encoding::kEvex, Prefix::kF3, 0x72, Form::kConvert, Count::kNumber, nullptr},
};

bool within(const Decoded& found) {
  const Instruction& i = found.instruction;
  const bool tiles = found.opcode->encoding == Encoding::kVex;
  const int registers = tiles ? 16 : 32;  // the upper eight tiles are refused when they are executed
  return i.length > 0 && i.reg < registers && i.rm < registers && i.vvvv < registers && i.mask < 8 &&
         (tiles || i.vector_bytes == 16 || i.vector_bytes == 32 || i.vector_bytes == 64);
}

}  // namespace

// Decodes `count` texts; returns how many were instructions of the table, or -1 - n if text n was decoded to registers
// that do not exist. Every third byte string begins as one of ours.
extern "C" int64_t fuzz(uint64_t seed, int64_t count) {
  const long page = sysconf(_SC_PAGESIZE);
  auto* memory = static_cast<uint8_t*>(
      mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(memory + page, page, PROT_NONE);
  std::mt19937_64 random(seed);
  ucontext_t context = {};
  int64_t known = 0;
  for (int64_t n = 0; n < count; ++n) {
    // Prefixes come before the longest instruction: hardware refuses the sum in another way, and nobody asks us.
    uint8_t* code = memory + page - kLongest - 8;
    for (int at = 0; at < kLongest + 8; ++at) code[at] = static_cast<uint8_t>(random());
    if (n % 3) {
      const Opcode& like = kTable[random() % (sizeof kTable / sizeof *kTable)];
      int at = static_cast<int>(random() % 3);
      for (int prefix = 0; prefix < at; ++prefix) code[prefix] = 0x64;
      code[at] = like.encoding == Encoding::kEvex ? 0x62 : 0xc4;
      code[at + 1] = static_cast<uint8_t>((random() & 0xf0) | 2);
      code[at + (like.encoding == Encoding::kEvex ? 4 : 3)] = like.byte;
    }
    for (auto& value : context.uc_mcontext.gregs) value = static_cast<long long>(random());
    context.uc_mcontext.gregs[REG_RIP] = reinterpret_cast<long long>(code);
    const Decoded found = decode(&context, kTable);
    if (!found.opcode || found.fault) continue;
    if (!within(found)) return -1 - n;
    ++known;
  }
  munmap(memory, 2 * page);
  return known;
}
