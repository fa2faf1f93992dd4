// bfloat16 <-> float32. bfloat16 is the upper half of a float32.
#pragma once
#include <bit>
#include <cstdint>

namespace jitmoe {

using bf16 = uint16_t;

inline float to_float(bf16 value) { return std::bit_cast<float>(uint32_t{value} << 16); }

// The bits of a float32 with those of its nearest bfloat16 in the upper half, ties to even. A NaN is made quiet
// instead of rounded: the carry out of its mantissa would turn it into infinity or zero.
[[gnu::always_inline]] inline uint32_t rounded_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const uint32_t quiet = bits | 0x400000;
  return (bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
}

[[gnu::always_inline]] inline bf16 to_bf16(float value) {
  return static_cast<bf16>(rounded_bits(value) >> 16);
}

// Not by way of bf16: the 16-bit value in between would halve the vectors of a loop.
[[gnu::always_inline]] inline float round_to_bf16(float value) {
  return std::bit_cast<float>(rounded_bits(value) & 0xffff0000);
}

inline float load_lora(const float* value) { return *value; }
inline float load_lora(const bf16* value) { return to_float(*value); }

}  // namespace jitmoe
