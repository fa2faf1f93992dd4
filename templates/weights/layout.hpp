// Where the packed weights of one expert lie. All formats have the strips and blocks of gemm/interface.hpp; the scales
// follow behind the last block.
//
//   bfloat16             2 KB a block: the pairs themselves
//   8 bit                1 KB a block: a byte for each value of the pairs, in their order
//   4 bit               512 B a block: words of 16 bits with a nibble for each of four lines of the pairs
//
//       word    0               1                    31
//     line 0   [w00 .. .. ..]  [w01 .. .. ..]  ...  [...]      w00, w01: the pair of output 0, as in a tile
//     line 1   [.. w02 .. ..]  [.. w03 .. ..]                  the first line is in the lowest bits
//
//   scales     fp8_block: [out / 128, in / 128] as shipped; rows: one an output; groups: [strip, in / group, 32], so that
//              a block finds those of its outputs side by side in both passes
//
// Codes behind the last column are those that were shipped; all else of the padding is zero.
#pragma once
#include <type_traits>

#include "weights/codes.hpp"

namespace jitmoe {

inline constexpr int64_t kTileElements = kTile * kKStep;
inline constexpr int64_t kBlockElements = kStrip * kKStep;
inline constexpr int64_t kBlocksOfScale = 128 / kKStep;  // of fp8_block, on both axes

// The shape of the same weights, decoded.
constexpr Shape as_pairs(Shape shape) {
  shape.format = Format::bfloat16;
  shape.group_size = 0;
  shape.scale = Scale::none;
  return shape;
}

template <Shape S>
struct Layout {
  static constexpr bool kPlain = S.format == Format::bfloat16;
  static constexpr bool kNibbles = S.format == Format::int4_group || S.format == Format::mxfp4;
  static constexpr bool kSquares = S.format == Format::fp8_block;  // a scale for squares, else for outputs
  static constexpr bool kGroups = kNibbles;
  // What packed memory is counted in.
  using Item = std::conditional_t<kPlain, bf16, uint8_t>;
  static constexpr int64_t kBlockItems = kNibbles ? kBlockElements / 2 : kBlockElements;
  static constexpr int64_t kGroupBlocks = S.format == Format::int4_group ? S.group_size / kKStep : 1;
  using ScaleType = ScaleOf<S.scale>;
  using ScaleItem = typename ScaleType::type;

  static constexpr int64_t strip_items(int64_t in) { return ceil_div(in, kKStep) * kBlockItems; }
  static constexpr int64_t code_items(int64_t out, int64_t in) {
    return ceil_div(out, kStrip) * strip_items(in);
  }
  // Scales of one row of them.
  static constexpr int64_t scale_columns(int64_t in) {
    if (kSquares) return ceil_div(in, kBlocksOfScale * kKStep);
    return kGroups ? ceil_div(in, kGroupBlocks * kKStep) : 1;
  }
  static constexpr int64_t scales(int64_t out, int64_t in) {
    if (kPlain) return 0;
    if (kSquares) return ceil_div(out, kBlocksOfScale * kStrip) * scale_columns(in);
    return round_up(out, kStrip) * scale_columns(in);
  }
  // From one expert to the next; a multiple of a cache line.
  static constexpr int64_t items(int64_t out, int64_t in) {
    if (kPlain) return code_items(out, in);
    return round_up(code_items(out, in) + scales(out, in) * static_cast<int64_t>(sizeof(ScaleItem)), 64);
  }
  // The first scale of a block: the only one of a square, else that of the first of 32 outputs.
  static int64_t scale_at(int64_t strip, int64_t block, int64_t columns) {
    if constexpr (kSquares) return strip / kBlocksOfScale * columns + block / kBlocksOfScale;
    return (strip * columns + (kGroups ? block / kGroupBlocks : 0)) * kStrip;
  }
  static const ScaleItem* scales_of(const Item* matrix, int64_t out, int64_t in) {
    return reinterpret_cast<const ScaleItem*>(matrix + code_items(out, in));
  }

  // Code of the value `at` of a block of pairs.
  static uint8_t code(const Item* block, int64_t at) {
    if constexpr (!kNibbles) return static_cast<uint8_t>(block[at]);
    const int64_t line = at / kKStep, nibble = line % 4;
    const uint8_t byte = block[(line / 4 * kKStep + at % kKStep) * 2 + nibble / 2];
    return nibble % 2 ? byte >> 4 : byte & 0xf;
  }
  // Puts a code into a block that is zero there.
  static void put(Item* block, int64_t at, uint8_t code) {
    if constexpr (!kNibbles) {
      block[at] = code;
    } else {
      const int64_t line = at / kKStep, nibble = line % 4;
      block[(line / 4 * kKStep + at % kKStep) * 2 + nibble / 2] |= nibble % 2 ? code << 4 : code;
    }
  }
};

// Place of w[out, in] of a block in its pairs.
constexpr int64_t pair_at(int64_t out, int64_t in) {
  return out / kTile * kTileElements + in / 2 * kKStep + out % kTile * 2 + in % 2;
}

}  // namespace jitmoe
