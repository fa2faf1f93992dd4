// Decodes the instructions that the emulator executes, from their bytes and the general registers.
//
//   [segment] C4 RXBmmmmm WvvvvLpp opcode ModRM [SIB] [disp]                      VEX: AMX
//   [segment] 62 RXBR0mmm Wvvvv1pp zLLbVaaa opcode ModRM [SIB] [disp]             EVEX: AVX512-BF16
//
// R, X, B, V and vvvv are stored inverted and extend the register numbers of ModRM and SIB.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <span>

namespace jitmoe::emulator {

enum class Encoding : uint8_t { kVex, kEvex };

// The pp field, which stands for a legacy prefix.
enum class Prefix : uint8_t { kNone, k66, kF3, kF2 };

// Operands of an instruction: what ModRM and vvvv must be.
enum class Form : uint8_t {
  kConfiguration,  // memory, /0
  kRelease,        // C0
  kTile,           // register, rm = 0
  kTileMemory,     // memory with SIB, whose index is the stride
  kTiles,          // three registers
  kVectors,        // register, vvvv, register or memory
  kConvert,        // register, register or memory
};

enum class Count {
  kTdpbf16ps,
  kTdpbssd,
  kTdpbsud,
  kTdpbusd,
  kTdpbuud,
  kTileLoads,
  kTileStores,
  kTileZeros,
  kConfigurations,
  kConfigurationStores,
  kReleases,
  kAvx512Bf16,
  kUsefulRows,
  kUsefulFlop,
  kNumber,
};

struct Instruction {
  int length = 0;
  int reg = 0, rm = 0, vvvv = 0;
  uint8_t* memory = nullptr;  // effective address, or null for a register in rm
  int64_t stride = 0;         // Form::kTileMemory
  int vector_bytes = 16;      // the rest is EVEX only
  int mask = 0;
  bool zeroing = false, broadcast = false;
};

// The interrupted thread's registers, and the reason if its instruction is refused.
struct Machine {
  ucontext_t* context;
  char reason[200];
};

struct Opcode {
  const char* name;
  Encoding encoding;
  Prefix prefix;
  uint8_t byte;
  Form form;
  Count count;
  bool (*execute)(Machine&, const Instruction&);
};

// `opcode` is null if the table lacks the instruction; `fault` says why hardware would refuse it, or is null.
struct Decoded {
  const Opcode* opcode = nullptr;
  const char* fault = nullptr;
  Instruction instruction = {};
};

namespace decoding {

constexpr uint8_t kMap0f38 = 2;

inline uint64_t general_register(const ucontext_t* context, int number) {
  constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<uint64_t>(context->uc_mcontext.gregs[kOrder[number]]);
}

// By ABI the first word at %fs:0 is the address that %fs stands for; the handler runs on the same thread.
inline uint64_t fs_base() {
  uint64_t base;
  asm("mov %%fs:0, %0" : "=r"(base));
  return base;
}

class Bytes {
 public:
  explicit Bytes(const uint8_t* code) : start_(code), next_(code) {}
  // Byte by byte: memory behind the instruction may not be mapped.
  uint8_t take() { return *next_++; }
  uint8_t peek() const { return *next_; }
  int64_t take_displacement(int size) {
    int8_t near = 0;
    int32_t far = 0;
    memcpy(size == 1 ? static_cast<void*>(&near) : &far, next_, size);
    next_ += size;
    return size == 1 ? near : far;
  }
  int taken() const { return static_cast<int>(next_ - start_); }

 private:
  const uint8_t *start_, *next_;
};

struct Fields {
  Encoding encoding;
  uint8_t map, prefix, opcode, mod, reg, rm;  // reg and rm as in ModRM
  bool wide, reserved;                        // W; a bit that must be zero or one is not
  int length_code;                            // L or LL: 128, 256, 512 bits
  int r, x, b, r_high, vvvv;                  // register extensions, no longer inverted
  int mask;
  bool zeroing, broadcast;
};

inline Fields take_fields(Bytes& bytes) {
  Fields f = {};
  f.encoding = bytes.take() == 0x62 ? Encoding::kEvex : Encoding::kVex;
  const bool evex = f.encoding == Encoding::kEvex;
  const uint8_t first = bytes.take(), second = bytes.take(), third = evex ? bytes.take() : 0;
  f.r = ~first >> 7 & 1;
  f.x = ~first >> 6 & 1;
  f.b = ~first >> 5 & 1;
  f.map = first & (evex ? 0xf : 0x1f);
  f.wide = second >> 7;
  f.vvvv = ~second >> 3 & 15;
  f.prefix = second & 3;
  f.length_code = second >> 2 & 1;
  if (evex) {
    f.r_high = ~first >> 4 & 1;
    f.reserved = !(second & 4);
    f.length_code = third >> 5 & 3;
    f.vvvv |= (~third >> 3 & 1) << 4;
    f.mask = third & 7;
    f.zeroing = third >> 7;
    f.broadcast = third >> 4 & 1;
  }
  f.opcode = bytes.take();
  const uint8_t modrm = bytes.take();
  f.mod = modrm >> 6;
  f.reg = modrm >> 3 & 7;
  f.rm = modrm & 7;
  return f;
}

inline bool matches(const Opcode& opcode, const Fields& f) {
  if (f.encoding != opcode.encoding || f.map != kMap0f38 || f.opcode != opcode.byte ||
      f.prefix != static_cast<uint8_t>(opcode.prefix))
    return false;
  switch (opcode.form) {
    case Form::kConfiguration:
      return f.mod != 3 && f.reg == 0;
    case Form::kRelease:
      return f.mod == 3 && f.reg == 0 && f.rm == 0;
    case Form::kTile:
      return f.mod == 3 && f.rm == 0;
    case Form::kTileMemory:
      return f.mod != 3;
    case Form::kTiles:
      return f.mod == 3;
    case Form::kVectors:
    case Form::kConvert:
      return true;
  }
  return false;
}

inline const char* find_fault(Form form, const Fields& f) {
  const bool memory = f.mod != 3;
  if (f.wide || f.reserved) return "#UD, a reserved bit of the prefix is set";
  if (f.encoding == Encoding::kVex && f.length_code) return "#UD, VEX.L is set";
  if (f.length_code == 3) return "#UD, vector length 3 does not exist";
  if (form != Form::kTiles && form != Form::kVectors && f.vvvv) return "#UD, vvvv is used and must not be";
  if (form == Form::kTileMemory && f.rm != 4) return "#UD, a tile's memory operand needs an SIB byte";
  if (f.broadcast && !memory) return "#UD, broadcast from a register";
  if (f.zeroing && !f.mask) return "#UD, zeroing without a mask";
  return nullptr;
}

// ModRM, SIB and displacement to the effective address, and for tiles base and stride.
inline void take_memory(Bytes& bytes, const Fields& f, const ucontext_t* context, int near_scale,
                        Instruction& instruction, bool tile, uint64_t segment_base) {
  uint64_t address = segment_base;
  int displacement_size = f.mod == 1 ? 1 : f.mod == 2 ? 4 : 0;
  bool rip_relative = false;
  if (f.rm == 4) {
    const uint8_t sib = bytes.take();
    const int index = (sib >> 3 & 7) | f.x << 3, base = sib & 7;
    if (f.mod == 0 && base == 5)
      displacement_size = 4;
    else
      address += general_register(context, base | f.b << 3);
    // Index 4 is "none"; r12 is 12.
    const uint64_t scaled = index == 4 ? 0 : general_register(context, index) << (sib >> 6);
    if (tile)
      instruction.stride = static_cast<int64_t>(scaled);
    else
      address += scaled;
  } else if (f.mod == 0 && f.rm == 5) {
    displacement_size = 4;
    rip_relative = true;
  } else {
    address += general_register(context, f.rm | f.b << 3);
  }
  if (displacement_size) {
    const int64_t displacement = bytes.take_displacement(displacement_size);
    address += static_cast<uint64_t>(displacement * (displacement_size == 1 ? near_scale : 1));
  }
  if (rip_relative)
    address +=
        static_cast<uint64_t>(context->uc_mcontext.gregs[REG_RIP]) + static_cast<uint64_t>(bytes.taken());
  instruction.memory = reinterpret_cast<uint8_t*>(address);
}

}  // namespace decoding

// Decodes the instruction at the context's RIP.
inline Decoded decode(const ucontext_t* context, std::span<const Opcode> table) {
  using namespace decoding;
  Bytes bytes(reinterpret_cast<const uint8_t*>(context->uc_mcontext.gregs[REG_RIP]));
  uint8_t segment = 0;
  // Segment overrides other than %fs and %gs (2E, 36, 3E, 26) mean nothing in 64-bit mode.
  for (; memchr("\x64\x65\x2e\x36\x3e\x26", bytes.peek(), 6) && bytes.taken() < 8; bytes.take())
    if (bytes.peek() == 0x64 || bytes.peek() == 0x65) segment = bytes.peek();
  if (bytes.peek() != 0x62 && bytes.peek() != 0xc4) return {};
  const Fields f = take_fields(bytes);
  for (const Opcode& opcode : table) {
    if (!matches(opcode, f)) continue;
    Decoded decoded = {&opcode, find_fault(opcode.form, f), {}};
    if (segment == 0x65) decoded.fault = "addresses in %gs are not emulated";
    Instruction& instruction = decoded.instruction;
    instruction.reg = f.reg | f.r << 3 | f.r_high << 4;
    instruction.vvvv = f.vvvv;
    instruction.vector_bytes = 16 << f.length_code;
    instruction.mask = f.mask;
    instruction.zeroing = f.zeroing;
    instruction.broadcast = f.broadcast;
    if (f.mod == 3) {
      instruction.rm = f.rm | f.b << 3 | (f.encoding == Encoding::kEvex ? f.x << 4 : 0);
    } else {
      // EVEX counts its one-byte displacements in operands.
      const int near_scale = f.encoding == Encoding::kVex ? 1 : f.broadcast ? 4 : instruction.vector_bytes;
      take_memory(bytes, f, context, near_scale, instruction, opcode.form == Form::kTileMemory,
                  segment == 0x64 ? fs_base() : 0);
    }
    instruction.length = bytes.taken();
    return decoded;
  }
  return {};
}

}  // namespace jitmoe::emulator
