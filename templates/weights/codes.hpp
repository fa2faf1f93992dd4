// What one code of a weight format stands for, and one scale. A weight is bfloat16(code * scale): the product of the
// two as float32, rounded to nearest even. That is what the products multiply with, in both passes.
//
//               code                       scale, and the weights that share it
//   fp8_block   E4M3                       float32, 128 outputs x 128 inputs
//   fp8_row     E4M3                       float32 or bfloat16, one output
//   int8_row    two's complement           float32, one output
//   int4_group  nibble - 8                 bfloat16, float16 or float32, group_size inputs of one output
//   mxfp4       nibble of E2M1             E8M0, 32 inputs of one output
#pragma once
#include "bf16.hpp"
#include "shape.hpp"

namespace jitmoe {

// Sign, 4 bits of exponent with bias 7, 3 bits of mantissa. There is no infinity: all ones are a NaN.
inline float from_e4m3(uint8_t code) {
  const uint32_t sign = uint32_t{code & 0x80u} << 24, exponent = code >> 3 & 0xf, mantissa = code & 7;
  if ((code & 0x7f) == 0x7f) return std::bit_cast<float>(sign | 0x7fc00000);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-9f;
  const uint32_t normal = (exponent + 120) << 23 | mantissa << 20;
  return std::bit_cast<float>(sign | (exponent ? normal : std::bit_cast<uint32_t>(subnormal)));
}

inline constexpr float kE2m1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
inline float from_e2m1(uint8_t code) { return code & 8 ? -kE2m1[code & 7] : kE2m1[code]; }

inline float from_int8(uint8_t code) { return static_cast<int8_t>(code); }
inline float from_int4(uint8_t code) { return static_cast<float>(code) - 8.0f; }

// 2^-127 is a denormal.
inline float from_e8m0(uint8_t exponent) {
  if (exponent == 0xff) return std::bit_cast<float>(0x7fc00000);
  return std::bit_cast<float>(exponent ? uint32_t{exponent} << 23 : 0x400000);
}

// IEEE 754 half precision.
inline float from_half(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16, exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  const uint32_t normal = (exponent == 0x1f ? 0xff : exponent + 112) << 23 | mantissa << 13;
  return std::bit_cast<float>(sign | (exponent ? normal : std::bit_cast<uint32_t>(subnormal)));
}

// A NaN is 0x7fc0, with the sign of a code that is one: else it would depend on which operand came first.
inline bf16 weight_of(float code, float scale) {
  const float product = code * scale;
  if (product == product) return to_bf16(product);
  return code == code ? 0x7fc0 : std::bit_cast<uint32_t>(code) >> 16;
}

template <Format F>
float value_of_code(uint8_t code) {
  if constexpr (F == Format::fp8_block || F == Format::fp8_row) return from_e4m3(code);
  if constexpr (F == Format::int8_row) return from_int8(code);
  if constexpr (F == Format::int4_group) return from_int4(code);
  if constexpr (F == Format::mxfp4) return from_e2m1(code);
  return 0.0f;
}

template <Scale K>
struct ScaleOf {
  using type = float;
  static float value(float scale) { return scale; }
};
template <>
struct ScaleOf<Scale::bfloat16> {
  using type = bf16;
  static float value(bf16 scale) { return to_float(scale); }
};
template <>
struct ScaleOf<Scale::float16> {
  using type = uint16_t;
  static float value(uint16_t scale) { return from_half(scale); }
};
template <>
struct ScaleOf<Scale::e8m0> {
  using type = uint8_t;
  static float value(uint8_t scale) { return from_e8m0(scale); }
};

}  // namespace jitmoe
