// Quantised weights as they are shipped <-> packed, bit for bit, and packed weights of any format -> bfloat16.
//
//   values   8 bit: [out, in]; 4 bit: rows of nibbles along in, low one first, in words of 8 nibbles (int4_group) or in
//            groups of 32 (mxfp4): what fills the last word or group is kept too
//   scales   fp8_block: [out / 128, in / 128]; rows: [out]; groups: [out, in / group]
#pragma once
#include "gemm/pack.hpp"
#include "parallel.hpp"
#include "weights/decode.hpp"

namespace jitmoe {

template <Shape S>
struct Canonical {
  using L = Layout<S>;
  using Scale = typename L::ScaleItem;
  static constexpr int64_t kFilled = S.format == Format::mxfp4 ? kKStep : L::kNibbles ? 8 : 1;

  static int64_t columns(int64_t in) { return round_up(in, kFilled); }
  static int64_t value_bytes(int64_t out, int64_t in) {
    return out * (L::kNibbles ? columns(in) / 2 : columns(in));
  }
  static int64_t scale_count(int64_t out, int64_t in) {
    return L::kSquares ? L::scales(out, in) : out * L::scale_columns(in);
  }

  static uint8_t code(const uint8_t* row, int64_t column) {
    if constexpr (!L::kNibbles) return row[column];
    return column % 2 ? row[column / 2] >> 4 : row[column / 2] & 0xf;
  }
  static void put(uint8_t* row, int64_t column, uint8_t code) {
    if constexpr (!L::kNibbles)
      row[column] = code;
    else
      row[column / 2] |= column % 2 ? code << 4 : code;
  }

  // One strip of 32 outputs; f(row of values, output in the strip) for those that exist.
  template <class Byte, class F>
  static void for_each_row(Byte* values, int64_t out, int64_t in, int64_t strip, F&& f) {
    const int64_t row_bytes = value_bytes(1, in);
    for (int64_t o = 0; o < smaller(kStrip, out - strip * kStrip); ++o)
      f(values + (strip * kStrip + o) * row_bytes, o);
  }
  static void pack_strip(const uint8_t* values, uint8_t* packed, int64_t out, int64_t in, int64_t strip) {
    uint8_t* blocks = packed + strip * L::strip_items(in);
    std::memset(blocks, 0, L::strip_items(in));
    for_each_row(values, out, in, strip, [&](const uint8_t* row, int64_t o) {
      for (int64_t i = 0; i < columns(in); ++i)
        L::put(blocks + i / kKStep * L::kBlockItems, pair_at(o, i % kKStep), code(row, i));
    });
  }
  static void unpack_strip(const uint8_t* packed, uint8_t* values, int64_t out, int64_t in, int64_t strip) {
    const uint8_t* blocks = packed + strip * L::strip_items(in);
    for_each_row(values, out, in, strip, [&](uint8_t* row, int64_t o) {
      std::memset(row, 0, value_bytes(1, in));
      for (int64_t i = 0; i < columns(in); ++i)
        put(row, i, L::code(blocks + i / kKStep * L::kBlockItems, pair_at(o, i % kKStep)));
    });
  }

  // Calls f(shipped scale, packed scale) with the places of each.
  template <class F>
  static void for_each_scale(int64_t out, int64_t in, F&& f) {
    const int64_t columns = L::scale_columns(in);
    for (int64_t i = 0; i < scale_count(out, in); ++i) {
      const int64_t o = i / columns, group = i % columns;
      f(i, L::kSquares ? i : (o / kStrip * columns + group) * kStrip + o % kStrip);
    }
  }
};

// `values` and `scales` of `experts` matrices, stacked -> packed. Of bfloat16 there are no scales.
template <Shape S>
void pack_weights(const void* values, const void* scales, void* packed, int64_t experts, int64_t out,
                  int64_t in, int64_t threads) {
  if constexpr (Layout<S>::kPlain) {
    pack(static_cast<const bf16*>(values), static_cast<bf16*>(packed), experts, out, in, threads);
  } else {
    using C = Canonical<S>;
    using L = Layout<S>;
    const int64_t strips = ceil_div(out, kStrip);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (int64_t item = 0; item < experts * strips; ++item) {
      const int64_t expert = item / strips;
      auto* to = static_cast<uint8_t*>(packed) + expert * L::items(out, in);
      C::pack_strip(static_cast<const uint8_t*>(values) + expert * C::value_bytes(out, in), to, out, in,
                    item % strips);
      if (item % strips) continue;
      std::memset(to + L::code_items(out, in), 0, L::items(out, in) - L::code_items(out, in));
      const auto* shipped = static_cast<const typename C::Scale*>(scales) + expert * C::scale_count(out, in);
      auto* kept = const_cast<typename C::Scale*>(L::scales_of(to, out, in));
      C::for_each_scale(out, in, [&](int64_t from, int64_t place) { kept[place] = shipped[from]; });
    }
  }
}

// The inverse.
template <Shape S>
void unpack_weights(const void* packed, void* values, void* scales, int64_t experts, int64_t out, int64_t in,
                    int64_t threads) {
  if constexpr (Layout<S>::kPlain) {
    unpack(static_cast<const bf16*>(packed), static_cast<bf16*>(values), experts, out, in, threads);
  } else {
    using C = Canonical<S>;
    using L = Layout<S>;
    const int64_t strips = ceil_div(out, kStrip);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (int64_t item = 0; item < experts * strips; ++item) {
      const int64_t expert = item / strips;
      const auto* from = static_cast<const uint8_t*>(packed) + expert * L::items(out, in);
      C::unpack_strip(from, static_cast<uint8_t*>(values) + expert * C::value_bytes(out, in), out, in,
                      item % strips);
      if (item % strips) continue;
      const auto* kept = L::scales_of(from, out, in);
      auto* shipped = static_cast<typename C::Scale*>(scales) + expert * C::scale_count(out, in);
      C::for_each_scale(out, in, [&](int64_t to, int64_t place) { shipped[to] = kept[place]; });
    }
  }
}

// Packed -> bfloat16 [experts, out, in]: what the products multiply with.
template <Shape S>
void decode_weights(const void* packed, bf16* decoded, int64_t experts, int64_t out, int64_t in,
                    int64_t threads) {
  using L = Layout<S>;
  const int64_t strips = ceil_div(out, kStrip);
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    [[maybe_unused]] const FloatMode mode;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < experts * strips; ++item) {
      const int64_t expert = item / strips, strip = item % strips;
      const auto* matrix = static_cast<const typename L::Item*>(packed) + expert * L::items(out, in);
      const Weights<S> weights{matrix + strip * L::strip_items(in),
                               nullptr,
                               L::kBlockItems,
                               L::scales_of(matrix, out, in),
                               L::scale_columns(in),
                               strip};
      Pairs<S> pairs(weights);
      for (int64_t i = 0; i < in; i += kKStep) {
        const bf16* block = pairs.block(i / kKStep);
        for (int64_t tile = 0; tile < kStrip; tile += kTile) {
          const int64_t o = strip * kStrip + tile;
          const TileExtent extent{smaller(kTile, out > o ? out - o : 0), smaller(kKStep, in - i)};
          unpack_tile(block + tile * kKStep, extent, decoded + (expert * out + o) * in + i, in);
        }
      }
    }
  }
}

}  // namespace jitmoe
