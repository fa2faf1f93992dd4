// bfloat16 <-> float32. bfloat16 is the upper half of a float32.
#pragma once
#include <bit>
#include <cstdint>

namespace jitmoe {

using bf16 = uint16_t;

inline float to_float(bf16 value) { return std::bit_cast<float>(uint32_t{value} << 16); }

// Round to nearest even. A NaN is made quiet instead of rounded: the carry out of its mantissa would
// turn it into infinity or zero.
[[gnu::always_inline]] inline bf16 to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40;
  return static_cast<bf16>((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

[[gnu::always_inline]] inline float round_to_bf16(float value) { return to_float(to_bf16(value)); }

inline float load_lora(const float* value) { return *value; }
inline float load_lora(const bf16* value) { return to_float(*value); }

}  // namespace jitmoe
