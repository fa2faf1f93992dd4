// The vector registers of an interrupted thread, in the XSAVE image of its signal frame (SDM volume 1,
// chapter 13). Linux writes the standard format; the compacted one is read from its own header.
#pragma once
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>

namespace jitmoe::emulator {

// State components by their bit in XCR0.
enum Component { kSse = 1, kAvx = 2, kOpmask = 5, kZmmHigh = 6, kZmm16to31 = 7, kComponents = 32 };

struct XsaveLayout {
  uint32_t size[kComponents] = {}, offset[kComponents] = {};
  bool aligned[kComponents] = {};

  XsaveLayout() {
    for (int i = 2; i < kComponents; ++i) {
      uint32_t flags, unused;
      asm("cpuid" : "=a"(size[i]), "=b"(offset[i]), "=c"(flags), "=d"(unused) : "a"(0xd), "c"(i));
      aligned[i] = flags & 2;
    }
  }
};

// Read when the library is loaded: in a virtual machine CPUID traps, which takes longer than an emulation.
inline const XsaveLayout xsave_layout;

constexpr int kLegacyXmm = 160, kSoftwareBytes = 464, kHeader = 512, kExtended = 576;

class VectorRegisters {
 public:
  explicit VectorRegisters(const ucontext_t* context)
      : image_(reinterpret_cast<uint8_t*>(context->uc_mcontext.fpregs)) {
    struct {
      uint32_t magic, extended_size;
      uint64_t features;
    } software;
    if (!image_) return;
    memcpy(&software, image_ + kSoftwareBytes, sizeof software);
    if (software.magic != FP_XSTATE_MAGIC1) return;
    memcpy(&compaction_, image_ + kHeader + 8, 8);
    features_ = software.features & (compacted() ? compaction_ : ~uint64_t{0});
  }

  bool has_avx512() const {
    constexpr uint64_t needed = 1 << kAvx | 1 << kOpmask | 1 << kZmmHigh | 1 << kZmm16to31;
    return (features_ & needed) == needed;
  }

  void read(int number, uint8_t (&bytes)[64]) const {
    if (number >= 16) return read(kZmm16to31, (number - 16) * 64, 64, bytes);
    read(kSse, number * 16, 16, bytes);
    read(kAvx, number * 16, 16, bytes + 16);
    read(kZmmHigh, number * 32, 32, bytes + 32);
  }

  void write(int number, const uint8_t (&bytes)[64]) {
    if (number >= 16) return write(kZmm16to31, (number - 16) * 64, 64, bytes);
    write(kSse, number * 16, 16, bytes);
    write(kAvx, number * 16, 16, bytes + 16);
    write(kZmmHigh, number * 32, 32, bytes + 32);
  }

  uint64_t mask(int number) const {
    uint8_t bytes[8];
    read(kOpmask, number * 8, 8, bytes);
    uint64_t mask;
    memcpy(&mask, bytes, 8);
    return mask;
  }

 private:
  bool compacted() const { return compaction_ >> 63; }

  uint8_t* component(int wanted) const {
    if (wanted == kSse) return image_ + kLegacyXmm;
    if (!compacted()) return image_ + xsave_layout.offset[wanted];
    uint32_t offset = kExtended;
    for (int i = 2;; ++i) {
      if (!(compaction_ >> i & 1)) continue;
      if (xsave_layout.aligned[i]) offset = (offset + 63) & ~63u;
      if (i == wanted) return image_ + offset;
      offset += xsave_layout.size[i];
    }
  }

  uint64_t present() const {
    uint64_t bits;
    memcpy(&bits, image_ + kHeader, 8);
    return bits;
  }

  // A component whose bit in XSTATE_BV is clear stands for zeros, whatever the memory holds.
  void read(int part, int offset, int size, uint8_t* bytes) const {
    if (present() >> part & 1)
      memcpy(bytes, component(part) + offset, size);
    else
      memset(bytes, 0, size);
  }

  void write(int part, int offset, int size, const uint8_t* bytes) {
    const uint64_t bits = present(), with_part = bits | 1ull << part;
    if (bits != with_part) {
      memset(component(part), 0, part == kSse ? 256 : xsave_layout.size[part]);
      memcpy(image_ + kHeader, &with_part, 8);
    }
    memcpy(component(part) + offset, bytes, size);
  }

  uint8_t* image_;
  uint64_t features_ = 0, compaction_ = 0;
};

}  // namespace jitmoe::emulator
