// Decoding with vectors of float32, for every format: codes to float32, times the scales, rounded. `V` wraps one register
// width (weights/decode_avx2.hpp, weights/decode_avx512.hpp).
//
// What is rare is left to the scalar decoder: scales and codes that are not finite, and where `V` rounds with an
// instruction that flushes denormals, scales so small that a weight could be one.
#pragma once
#include "weights/decode.hpp"

namespace jitmoe {

// Scales of which no product with a code is a NaN or, if they are not zero, a denormal: the smallest code but zero is
// 2^-9, of E4M3. The largest may be taken 256 times.
inline constexpr float kLeastScale = 0x1p-117f, kMostScale = 0x1p119f;

template <Shape S, class V>
class VectorDecoder {
  using L = Layout<S>;
  using Float = typename V::Float;
  static constexpr int kLanes = V::kLanes;
  static constexpr bool kE4m3 = S.format == Format::fp8_block || S.format == Format::fp8_row;

 public:
  void decode(const typename L::Item* block, const typename L::ScaleItem* scales, bf16* pairs) {
    if (scales != known_) prepare(scales);
    if (!usual_ || (kE4m3 && V::any_nan(block))) return ScalarDecoder<S>().decode(block, scales, pairs);
    for (int64_t line = 0; line < kStrip; line += L::kNibbles ? 4 : 1)
      for (int64_t e = 0; e < kKStep; e += 2 * kLanes) {
        const Float* scale = scales_[line / kTile] + e / kLanes;
        if constexpr (L::kNibbles)
          decode_words(block + (line / 4 * kKStep + e) * 2, scale, pairs + line * kKStep + e);
        else
          V::store_rounded(pairs + line * kKStep + e,
                           V::multiply(values(block + line * kKStep + e), scale[0]),
                           V::multiply(values(block + line * kKStep + e + kLanes), scale[1]));
      }
  }

 private:
  void prepare(const typename L::ScaleItem* scales) {
    known_ = scales;
    usual_ = true;
    for (int64_t i = 0; i < kStrip / kLanes; ++i) {
      const Float of_outputs = L::kSquares ? V::broadcast(L::ScaleType::value(*scales))
                                           : V::template load_scales<S.scale>(scales + i * kLanes);
      usual_ &= V::all_within(of_outputs, V::kFlushes ? kLeastScale : 0.0f, kMostScale);
      V::twice(kE4m3 ? V::multiply(of_outputs, V::broadcast(V::kE4m3Factor)) : of_outputs,
               scales_[i * kLanes / kTile] + i * kLanes % kTile * 2 / kLanes);
    }
  }
  static Float values(const uint8_t* codes) {
    if constexpr (kE4m3) return V::from_e4m3(codes);
    return V::from_int8(codes);
  }
  // Two vectors of words: a nibble of each belongs to one of four lines.
  static void decode_words(const uint8_t* words, const Float* scale, bf16* pairs) {
    const auto low = V::load_words(words), high = V::load_words(words + 2 * kLanes);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n)
      V::store_rounded(pairs + n * kKStep, V::multiply(V::template nibbles<S.format>(low, n), scale[0]),
                       V::multiply(V::template nibbles<S.format>(high, n), scale[1]));
  }

  const typename L::ScaleItem* known_ = nullptr;
  bool usual_ = false;
  Float scales_[2][kKStep / kLanes];  // of each tile, those of an output twice, as its pairs lie
};

}  // namespace jitmoe
