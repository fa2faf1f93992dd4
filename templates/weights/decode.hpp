// From the packed blocks of any format to the pairs that the back ends multiply.
#pragma once
#include "weights/layout.hpp"

namespace jitmoe {

// One block after the other, each with its scales. This one is scalar and obviously right; those of the vectors give
// the same bits, and leave to it what is rare (scales and codes that are not finite, denormals).
template <Shape S>
struct ScalarDecoder {
  using L = Layout<S>;
  void decode(const typename L::Item* block, const typename L::ScaleItem* scales, bf16* pairs) const {
    for (int64_t at = 0; at < kBlockElements; ++at) {
      const int64_t out = at / kTileElements * kTile + at % kKStep / 2;
      const float scale = L::ScaleType::value(scales[L::kSquares ? 0 : out]);
      pairs[at] = weight_of(value_of_code<S.format>(L::code(block, at)), scale);
    }
  }
};

// The decoder of a shape; those for vectors specialise it.
template <Shape S>
struct DecoderOf {
  using type = ScalarDecoder<S>;
};

// The packed blocks that one product contracts over: blocks of a strip in forward, `stride` items apart, and one of
// each strip in backward. `next` is the first block of this thread's next product, or null.
template <Shape S>
struct Weights {
  using L = Layout<S>;
  using Item = typename L::Item;
  const Item* blocks;
  const Item* next;
  int64_t stride;
  // Of scales: all of the matrix, those of a row of them, and which block of the matrix the first one is.
  const typename L::ScaleItem* scales = nullptr;
  int64_t scale_columns = 0;
  int64_t strip = 0;
  int64_t column = 0;
  bool down = false;  // the blocks are those of a column

  const Item* block(int64_t index) const { return blocks + index * stride; }
  // Block `index`, counted on beyond the `all` blocks of this product into the next one; null where there is none.
  const Item* later(int64_t index, int64_t all) const {
    return index < all ? block(index) : next ? next + (index - all) * stride : nullptr;
  }
  const typename L::ScaleItem* scales_of(int64_t index) const {
    return scales + L::scale_at(strip + (down ? index : 0), column + (down ? 0 : index), scale_columns);
  }
};

// Reads the blocks of one product as pairs: where they lie, or decoded.
template <Shape S>
class Pairs {
 public:
  static constexpr bool kPlain = Layout<S>::kPlain;
  explicit Pairs(const Weights<S>& weights) : weights_(weights) {}

  // One block, until the next call.
  const bf16* block(int64_t index) {
    if constexpr (kPlain) {
      return weights_.block(index);
    } else {
      into(index, room_);
      return room_;
    }
  }
  // Block `first` and those behind it, side by side: in `room` for `count` blocks, if they are not plain.
  const bf16* run(int64_t first, int64_t count, bf16* room) {
    if constexpr (kPlain) {
      return weights_.block(first);
    } else {
      for (int64_t i = 0; i < count; ++i) into(first + i, room + i * kBlockElements);
      return room;
    }
  }

 private:
  void into(int64_t index, bf16* pairs) {
    decoder_.decode(weights_.block(index), weights_.scales_of(index), pairs);
  }
  struct Nothing {};
  const Weights<S>& weights_;
  [[no_unique_address]] std::conditional_t<kPlain, Nothing, typename DecoderOf<S>::type> decoder_;
  alignas(64) bf16 room_[kPlain ? 1 : kBlockElements];
};

}  // namespace jitmoe
