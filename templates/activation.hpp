// The activations and their derivatives, written for loops over strips that the compiler turns into vectors. A call that it
// chose not to inline would leave the loop scalar (29 cycles an element instead of 2): hence always_inline.
#pragma once
#include <bit>
#include <cstdint>

#include "shape.hpp"

namespace jitmoe {

// e^x to about 1 ulp over the whole range: x = n ln 2 + f, |f| <= ln 2 / 2, a degree-6 polynomial for e^f
// (Cephes expf), and 2^n applied in two halves so that results near overflow and underflow come out right.
[[gnu::always_inline]] inline float exponential(float x) {
  x = x > 89.0f ? 89.0f : x;  // beyond the largest float32; comparisons let a NaN through
  x = x < -104.0f ? -104.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  float f = x - n * 0.693359375f;
  f = f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - 0x4b400000;
  const int32_t half = exponent >> 1;
  const float first = std::bit_cast<float>((half + 127) << 23);
  const float second = std::bit_cast<float>((exponent - half + 127) << 23);
  return p * first * second;
}

[[gnu::always_inline]] inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// x / (1 + e^-x), as torch computes it: -inf gives NaN, +inf gives +inf.
[[gnu::always_inline]] inline float silu(float x) { return x / (1.0f + exponential(-x)); }

// The numbers of an activation: gate is clamped from above and up on both sides by `limit`.
struct ActivationNumbers {
  float alpha;
  float limit;
};

// An activation: its value, and with the value its derivatives. Each is written once, for both passes.
template <Activation A>
struct ActivationOf;

struct ActivationGradient {
  float value;
  float by_gate;
  float by_up;
};

// silu(gate) * up
template <>
struct ActivationOf<Activation::silu> {
  [[gnu::always_inline]] static float value(float gate, float up, const ActivationNumbers&) {
    return silu(gate) * up;
  }

  [[gnu::always_inline]] static ActivationGradient gradient(float gate, float up, const ActivationNumbers&) {
    const float s = sigmoid(gate);
    return {silu(gate) * up, up * s * (1.0f + gate * (1.0f - s)), silu(gate)};
  }
};

// Both with the bound itself inside, as torch.clamp has it, and letting a NaN through.
[[gnu::always_inline]] inline float clamp_above(float x, float limit) { return x > limit ? limit : x; }
[[gnu::always_inline]] inline float clamp_below(float x, float limit) { return x < limit ? limit : x; }

// act(min(gate, limit)) * g(clamp(up, -limit, limit)): slopes are zero where a clamp holds.
template <class Inner>
struct Clamped {
  [[gnu::always_inline]] static float value(float gate, float up, const ActivationNumbers& numbers) {
    return Inner::value(clamp_above(gate, numbers.limit),
                        clamp_below(clamp_above(up, numbers.limit), -numbers.limit), numbers);
  }

  [[gnu::always_inline]] static ActivationGradient gradient(float gate, float up,
                                                            const ActivationNumbers& numbers) {
    const ActivationGradient inner =
        Inner::gradient(clamp_above(gate, numbers.limit),
                        clamp_below(clamp_above(up, numbers.limit), -numbers.limit), numbers);
    const bool gate_held = gate > numbers.limit;
    const bool up_held = (up > numbers.limit) | (up < -numbers.limit);
    return {inner.value, gate_held ? 0.0f : inner.by_gate, up_held ? 0.0f : inner.by_up};
  }
};

// silu of the clamped gate times the clamped up (DeepSeek-V4).
template <>
struct ActivationOf<Activation::silu_clamped> : Clamped<ActivationOf<Activation::silu>> {};

// gate * sigmoid(alpha * gate) * (up + 1)
struct SwishOfUpPlusOne {
  [[gnu::always_inline]] static float value(float gate, float up, const ActivationNumbers& numbers) {
    return gate / (1.0f + exponential(-numbers.alpha * gate)) * (up + 1.0f);
  }

  [[gnu::always_inline]] static ActivationGradient gradient(float gate, float up,
                                                            const ActivationNumbers& numbers) {
    const float s = sigmoid(numbers.alpha * gate);
    const float swish = gate / (1.0f + exponential(-numbers.alpha * gate));
    // The slope as s + alpha swish (1 - s): alpha gate may overflow where swish is zero.
    return {swish * (up + 1.0f), (up + 1.0f) * (s + numbers.alpha * swish * (1.0f - s)), swish};
  }
};

// The same of the clamped gate and up (gpt-oss).
template <>
struct ActivationOf<Activation::gpt_oss> : Clamped<SwishOfUpPlusOne> {};

}  // namespace jitmoe
