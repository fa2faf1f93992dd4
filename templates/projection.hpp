// gate, up and down as the steps see them: where each lies in a call, how wide it is, and what its tensors are called.
#pragma once
#include "call.hpp"
#include "gemm/pack.hpp"
#include "shape.hpp"
#include "watch/timed.hpp"
#include "watch/traced.hpp"

namespace jitmoe {

enum class Name { gate, up, down };

// One projection for the steps: its place in the call, its extents, and what its tensors and phases are called.
template <Shape S, Name N>
struct ProjectionOf {
  const Projection& at;
  static constexpr bool kDown = N == Name::down;
  static constexpr int64_t kOut = kDown ? S.hidden : S.intermediate;
  static constexpr int64_t kIn = kDown ? S.intermediate : S.hidden;
  static constexpr Tensor kValue = kDown ? Tensor::down : N == Name::up ? Tensor::up : Tensor::gate;
  static constexpr Tensor kGrad = kDown ? Tensor::dout : N == Name::up ? Tensor::dup : Tensor::dgate;
  static constexpr Tensor kU = kDown ? Tensor::down_u : N == Name::up ? Tensor::up_u : Tensor::gate_u;
  static constexpr Tensor kDu = kDown ? Tensor::down_du : N == Name::up ? Tensor::up_du : Tensor::gate_du;
  static constexpr Phase kForward = kDown ? Phase::down : Phase::gate_up;
  static constexpr Phase kBackward = kDown ? Phase::act_grad : Phase::x_grad;

  // The first block of a strip of 32 outputs, and of a column of blocks of 32 inputs, one block in each strip.
  const bf16* strip(int64_t expert, int64_t index) const {
    return at.weights + expert * packed_elements(kOut, kIn) + index * packed_elements(kStrip, kIn);
  }
  const bf16* column(int64_t expert, int64_t index) const {
    return strip(expert, 0) + index * kBlockElements;
  }
};

}  // namespace jitmoe
