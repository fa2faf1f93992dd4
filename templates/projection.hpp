// gate, up and down as the steps see them: where each lies in a call, how wide it is, and what its tensors are called.
#pragma once
#include "call.hpp"
#include "shape.hpp"
#include "watch/timed.hpp"
#include "watch/traced.hpp"
#include "weights/decode.hpp"

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
  using L = Layout<S>;
  using Item = typename L::Item;
  const Item* matrix(int64_t expert) const {
    return static_cast<const Item*>(at.weights) + expert * L::items(kOut, kIn);
  }
  const Item* strip(int64_t expert, int64_t index) const {
    return matrix(expert) + index * L::strip_items(kIn);
  }
  const Item* column(int64_t expert, int64_t index) const { return matrix(expert) + index * L::kBlockItems; }

  // What a product over a strip, and over a column of blocks, contracts with.
  Weights<S> strip_weights(int64_t expert, int64_t index, const Item* next) const {
    return {
        strip(expert, index), next, L::kBlockItems, scales(expert), L::scale_columns(kIn), index, 0, false};
  }
  Weights<S> column_weights(int64_t expert, int64_t index, const Item* next) const {
    return {column(expert, index),
            next,
            L::strip_items(kIn),
            scales(expert),
            L::scale_columns(kIn),
            0,
            index,
            true};
  }

 private:
  auto scales(int64_t expert) const { return L::scales_of(matrix(expert), kOut, kIn); }
};

}  // namespace jitmoe
