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

// What decoders for vectors have in common: `Own` has prepare(scales), usual(block) and four(block, line, vectors).
template <Shape S, class Own, class V>
class BlockDecoder {
  using L = Layout<S>;
  using Bits = typename V::Bits;

 public:
  static constexpr int kParts = kKStep * sizeof(bf16) / sizeof(Bits);  // vectors of a line

  // Whether four() may decode the block; else it is one for decode().
  bool begin(const typename L::Item* block, const typename L::ScaleItem* scales) {
    if (scales != known_) own().prepare(scales);
    known_ = scales;
    return own().usual(block);
  }
  void decode(const typename L::Item* block, const typename L::ScaleItem* scales, bf16* pairs) {
    if (!begin(block, scales)) return ScalarDecoder<S>().decode(block, scales, pairs);
    for (int64_t line = 0; line < kStrip; line += 4) {
      Bits lines[4][kParts];
      own().four(block, line, lines);
      for (int64_t n = 0; n < 4; ++n)
        for (int64_t part = 0; part < kParts; ++part)
          V::store(pairs + (line + n) * kKStep + part * (kKStep / kParts), lines[n][part]);
    }
  }

 private:
  Own& own() { return static_cast<Own&>(*this); }
  const typename L::ScaleItem* known_ = nullptr;
};

template <Shape S, class V>
class VectorDecoder : public BlockDecoder<S, VectorDecoder<S, V>, V> {
  using L = Layout<S>;
  using Float = typename V::Float;
  using Bits = typename V::Bits;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kParts = kKStep / (2 * kLanes);
  static constexpr bool kE4m3 = S.format == Format::fp8_block || S.format == Format::fp8_row;

 public:
  void prepare(const typename L::ScaleItem* scales) {
    usual_ = true;
    for (int64_t i = 0; i < kStrip / kLanes; ++i) {
      const Float of_outputs = L::kSquares ? V::broadcast(L::ScaleType::value(*scales))
                                           : V::template load_scales<S.scale>(scales + i * kLanes);
      usual_ &= V::all_within(of_outputs, V::kFlushes ? kLeastScale : 0.0f, kMostScale);
      V::twice(kE4m3 ? V::multiply(of_outputs, V::broadcast(V::kE4m3Factor)) : of_outputs,
               scales_[i * kLanes / kTile] + i * kLanes % kTile * 2 / kLanes);
    }
  }
  bool usual(const typename L::Item* block) const { return usual_ && !(kE4m3 && V::any_nan(block)); }

  // Lines `line`... of the pairs, a multiple of four.
  [[gnu::always_inline]] void four(const typename L::Item* block, int64_t line,
                                   Bits (&lines)[4][kParts]) const {
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t e = part * 2 * kLanes;
      const Float* scale = scales_[line / kTile] + 2 * part;
      if constexpr (L::kNibbles) {
        const uint8_t* words = block + (line / 4 * kKStep + e) * 2;
        const auto low = V::load_words(words), high = V::load_words(words + 2 * kLanes);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n)
          lines[n][part] = V::rounded(V::multiply(V::template nibbles<S.format>(low, n), scale[0]),
                                      V::multiply(V::template nibbles<S.format>(high, n), scale[1]));
      } else {
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          const uint8_t* codes = block + (line + n) * kKStep + e;
          lines[n][part] =
              V::rounded(V::multiply(values(codes), scale[0]), V::multiply(values(codes + kLanes), scale[1]));
        }
      }
    }
  }

 private:
  static Float values(const uint8_t* codes) {
    if constexpr (kE4m3) return V::from_e4m3(codes);
    return V::from_int8(codes);
  }
  bool usual_ = false;
  Float scales_[2][kKStep / kLanes];  // of each tile, those of an output twice, as its pairs lie
};

}  // namespace jitmoe
