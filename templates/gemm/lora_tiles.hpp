// LoRA on tiles. Float32 values are split into two bfloat16 halves, so that nothing is lost that the operands held: x
// and the gradients that flow back are bfloat16 already. h, l: halves of u or du; H, L: halves of a LoRA matrix.
//
//   u = s x A^T        x . [H0 .. H7 | L0 .. L7]         a tile of 8 ranks; then s (H + L)
//
//   K-step             [h0 l0] [h1 l1] .. [h0 h1] ..     `low`, row blocks like those of a panel
//                    . [H0 H0] [H1 H1] .. [L0 L1] ..     `right`, blocks of pairs: 10 ranks are one step
//
//   gradients          rank 0   h of rows 0 .. 31        `left`: for each row block one tile of up to 8 ranks, or
//                       ..                               tiles of 16 high halves, then as many of low ones
//                      rank 0   l of rows 0 .. 31
//                       ..                             . [v0 v1] [v2 v3] ..: pairs of rows of a strip, in bfloat16
//
// Of more than 8 ranks the gradient of B takes the high halves of u alone. The sum over rows hides that rounding, while
// gradients of A come near the yardstick's limit without low halves (0.77 of 0.8, 2026-11-25).
//
// LoRA parameters in bfloat16 have no low halves: tiles of A have 16 ranks, and the K-step ends before [h0 h1]. The
// product of two low halves is left out, 2^-16 of the value.
#pragma once
#include "gemm/tile_packing.hpp"
#include "gemm/tile_product.hpp"
#include "gemm/tuning.hpp"
#include "lora.hpp"

namespace jitmoe {

template <Shape S, class Gemm>
struct LoraTiles {
  using View = typename LoraMatrix<S>::View;
  static constexpr bool kPairs = true;
  static constexpr int64_t kTiles = S.m_step / kTile;          // of a row block, side by side
  static constexpr int64_t kRanks = kTileRanks<S.lora_bf16>;   // of a tile of A or B
  static constexpr int64_t kBlockFloats = kBlockElements / 2;  // sizes of scratch are in float32
  static constexpr int64_t kTileFloats = kTileElements / 2;

  static int64_t steps(int64_t rank) { return ceil_div(rank * (S.lora_bf16 ? 2 : 3), kKStep); }
  // Whether both halves of all ranks share one tile of a gradient.
  static bool share_tile(int64_t rank) { return rank <= kTile / 2; }
  static int64_t grad_tiles(int64_t rank) { return ceil_div(rank, kTile); }
  static int64_t left_tiles(int64_t rank) { return share_tile(rank) ? 1 : 2 * grad_tiles(rank); }
  static int64_t low_floats(int64_t rank) { return steps(rank) * kTiles * kTileFloats; }
  static int64_t left_floats(int64_t, int64_t blocks, int64_t rank) {
    return blocks * left_tiles(rank) * kTileFloats;
  }

  // The matrix is packed on the way, two tiles of ranks and one chunk of k at a time.
  static void low_rank(const bf16* block, int64_t rows, int64_t k, const View& lora, int64_t rank,
                       float scale, float* low, const LowRankRows& to) {
    std::memset(low, 0, low_floats(rank) * sizeof(float));
    if (to.left) std::memset(to.left, 0, left_floats(rows, 1, rank) * sizeof(float));
    for (int64_t first = 0; first < rank; first += 2 * kRanks) {
      const int64_t ranks = smaller(2 * kRanks, rank - first);
      alignas(64) float product[S.m_step * kStrip];
      if (ranks > kRanks)
        multiply<2>(block, rows, k, lora, first, ranks, product);
      else
        multiply<1>(block, rows, k, lora, first, ranks, product);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = 0; j < ranks; ++j) {
          const float* sum = product + row * kStrip + j / kRanks * kTile + j % kRanks;
          const float value = (S.lora_bf16 ? sum[0] : sum[0] + sum[kRanks]) * scale;
          put_low(low, rank, row, first + j, value);
          if (to.saved) to.saved[row * rank + first + j] = value;
          if (to.left) put_left(to.left, rank, row, first + j, to.weights ? value * to.weights[row] : value);
        }
    }
  }
  static float low_at(const float* low, int64_t, int64_t row, int64_t r) {
    const bf16* const values = as_bf16s(low);
    return to_float(values[low_place(row, 2 * r)]) + to_float(values[low_place(row, 2 * r + 1)]);
  }

  // u of a row block as forward saved it -> the left operand of gradients.
  static void left_of_saved(const float* saved, int64_t rows, int64_t rank, const float* weights,
                            float* left) {
    std::memset(left, 0, left_floats(rows, 1, rank) * sizeof(float));
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t r = 0; r < rank; ++r)
        put_left(left, rank, row, r, saved[row * rank + r] * (weights ? weights[row] : 1.0f));
  }

  // The right operand of a K-step from 32 columns of a LoRA matrix, `strip` [rank, 32]: behind it, as number `index`.
  static const float* right(float* strip, int64_t rank, int64_t index) {
    float* const floats = strip + rank * kStrip + index * steps(rank) * kBlockFloats;
    bf16* const blocks = as_bf16s(floats);
    const int64_t all = steps(rank) * kTile, used = rank + (S.lora_bf16 ? 0 : ceil_div(rank, 2));
    alignas(64) bf16 nobody[kKStep];
    for (int64_t tile = 0; tile < 2; ++tile) {
      for (int64_t r = 0; r < rank; r += 2) {
        const float* const even = strip + r * kStrip + tile * kTile;
        const bool two = r + 1 < rank;
        pair_halves(even, two ? even + kStrip : kZeros, line(blocks, r, tile),
                    two ? line(blocks, r + 1, tile) : nobody,
                    S.lora_bf16 ? nobody : line(blocks, rank + r / 2, tile));
      }
      for (int64_t at = used; at < all; ++at) std::memset(line(blocks, at, tile), 0, kRowBytes);
    }
    return floats;
  }

  // Rows of a segment, bfloat16 or float32 [rows, 32] -> the right operand of gradients, a block for each row block.
  template <class T>
  static const float* operand(const T* rows, int64_t count, float* pairs) {
    static constexpr T kNothing[kStrip] = {};
    const RowBlocks blocks(count, S.m_step);
    bf16* to = as_bf16s(pairs);
    for (int64_t b = 0; b < blocks.count; ++b, to += kBlockElements) {
      const T* const first = rows + blocks.begin(b) * kStrip;
      for (int64_t row = 0; row < kKStep; row += 2)
        pair_rows(row < blocks.size(b) ? first + row * kStrip : kNothing,
                  row + 1 < blocks.size(b) ? first + (row + 1) * kStrip : kNothing, to + row / 2 * kKStep);
    }
    return pairs;
  }

  // += left . pairs, with the low halves of many ranks only where `exact`. The products of tiles lie behind the first
  // [rank, 32] of `scratch`.
  static void add_grad(const float* left, int64_t rows, int64_t rank, bool exact, const float* pairs,
                       const GradStrip& to, float* scratch) {
    const int64_t blocks = ceil_div(rows, S.m_step), tiles = grad_tiles(rank), all = left_tiles(rank);
    const int64_t used = exact ? all : smaller(all, tiles);
    float* const product = scratch + rank * kStrip;
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      const bf16* const a = as_bf16s(left) + tile * kTileElements;
      multiply_block<2>(smaller(2, tiles - tile) * kTile, SumStart::zeros(), product + tile * kTile * kStrip,
                        [&](auto step) {
                          for (int64_t b = 0; b < blocks; ++b)
                            for (int64_t half = 0; half < used; half += tiles)
                              step(a + (b * all + half) * kTileElements,
                                   as_bf16s(pairs) + b * kBlockElements);
                        });
    }
    if (share_tile(rank))
      for (int64_t i = 0; i < rank * kStrip; ++i) product[i] += product[kTile / 2 * kStrip + i];
    if (transposed(to))
      add_transposed(product, rank, to, scratch);
    else if (to.lane_stride == 1 && to.lanes == kStrip)
      add_lanes(product, rank, {to.at, to.rank_stride, 1, kStrip, to.first});  // constants become vectors
    else
      add_lanes(product, rank, to);
  }

 private:
  static constexpr int64_t kRowBytes = kKStep * sizeof(bf16);
  static bf16* as_bf16s(float* values) { return reinterpret_cast<bf16*>(values); }
  static const bf16* as_bf16s(const float* values) { return reinterpret_cast<const bf16*>(values); }

  // 16 pairs of a line of blocks of pairs.
  static bf16* line(bf16* blocks, int64_t at, int64_t tile) {
    return blocks + at / kTile * kBlockElements + tile * kTileElements + at % kTile * kKStep;
  }

  template <int Columns>
  static void multiply(const bf16* block, int64_t rows, int64_t k, const View& lora, int64_t rank,
                       int64_t ranks, float* product) {
    constexpr int64_t kLoraChunk = kAmxTuning.lora_chunk;
    alignas(64) bf16 pairs[kLoraChunk * kStrip];
    for (int64_t first = 0; first < k; first += kLoraChunk) {
      const int64_t count = smaller(kLoraChunk, k - first);
      for (int64_t i = 0; i < count; i += kKStep)
        for (int64_t tile = 0; tile < Columns; ++tile)
          pack_lora(lora, first + i, smaller(kKStep, k - first - i), rank + tile * kRanks,
                    smaller(kRanks, ranks - tile * kRanks), pairs + i * kStrip + tile * kTileElements);
      const bf16* a = block + first * kTiles * kTile;
      multiply_block<Columns>(rows, first ? SumStart::strip(product) : SumStart::zeros(), product,
                              [&](auto step) {
                                for (int64_t i = 0; i < count; i += kKStep)
                                  step(a + i * kTiles * kTile, pairs + i * kStrip);
                              });
    }
  }

  [[gnu::always_inline]] static void add_lanes(const float* product, int64_t rank, const GradStrip& to) {
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t c = 0; c < to.lanes; ++c) {
        float& grad = to.at[r * to.rank_stride + c * to.lane_stride];
        grad = (to.first ? 0.0f : grad) + product[r * kStrip + c];
      }
  }
  // Where the ranks of a gradient are contiguous: through `turned` [lanes, ranks].
  static void add_transposed(const float* product, int64_t rank, const GradStrip& to, float* turned) {
    Gemm::transpose(product, kStrip, rank, to.lanes, turned, rank);
    for (int64_t c = 0; c < to.lanes; ++c)
      for (int64_t r = 0; r < rank; ++r) {
        float& grad = to.at[c * to.lane_stride + r];
        grad = (to.first ? 0.0f : grad) + turned[c * rank + r];
      }
  }

  // Element of `low`, in columns of the contraction.
  static int64_t low_place(int64_t row, int64_t column) {
    return (column / kKStep * kTiles + row / kTile) * kTileElements + row % kTile * kKStep + column % kKStep;
  }
  static void put_low(float* low, int64_t rank, int64_t row, int64_t r, float value) {
    const Halves halves = split(value);
    as_bf16s(low)[low_place(row, 2 * r)] = halves.high;
    as_bf16s(low)[low_place(row, 2 * r + 1)] = halves.low;
    if constexpr (!S.lora_bf16) as_bf16s(low)[low_place(row, 2 * rank + r)] = halves.high;
  }
  static void put_left(float* left, int64_t rank, int64_t row, int64_t r, float value) {
    const Halves halves = split(value);
    bf16* const at = as_bf16s(left) + r * kKStep + row;  // tiles of 16 ranks follow each other
    at[0] = halves.high;
    at[share_tile(rank) ? kTileElements / 2 : grad_tiles(rank) * kTileElements] = halves.low;
  }
};

}  // namespace jitmoe
