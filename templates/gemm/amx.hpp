// AMX. Row blocks are left operands of tiles (gemm/tile_product.hpp): for each 32 k, the tile of rows 0..15 and, where
// m_step is 32, behind it the tile of rows 16..31, 1 KB each and contiguous. k is padded with zeros to 32. Packed weights
// are right operands as they are.
//
//   sums of a strip      start + [u | v] . [B | W]^T          LoRA's steps first (gemm/lora_tiles.hpp), then the blocks
//                        start + [du | dv] . [A ; W], twice where gate and up meet in dx: one contraction
//
// A configuration with a shorter k cannot end the contraction, as LDTILECFG clears all tiles, the sums among them.
// Instead the last block of weights is copied without its padding, which times zero would be a NaN if it held one.
#pragma once
#include "gemm/lora_tiles.hpp"
#include "gemm/pair.hpp"
#ifdef __AVX512BF16__
#include "gemm/avx512.hpp"
#else
#include "gemm/avx2.hpp"
#endif

namespace jitmoe {

// The vectors beside the tiles: they transpose gradients.
#ifdef __AVX512BF16__
using BesideTiles = VectorBlock<most_rows(Isa::avx512), Simd512>;
#else
using BesideTiles = VectorBlock<most_rows(Isa::avx2), Simd256>;
#endif

template <Shape S>
struct GemmAmx {
  using Operand = bf16;
  static constexpr int64_t kTiles = S.m_step / amx::kRows;  // of a row block, side by side
  static constexpr auto& transpose = BesideTiles::transpose<false>;
  static constexpr auto& transpose_padded = BesideTiles::transpose<true>;

  static int64_t block_elements(int64_t k) { return ceil_div(k, kKStep) * kTiles * kTileElements; }

  // Row `row` of the tile that holds `column`.
  static Operand* row_of(Operand* block, int64_t row, int64_t column) {
    return block + (column / kKStep * kTiles + row / amx::kRows) * kTileElements + row % amx::kRows * kKStep;
  }

  static void pack_rows(const bf16* rows, int64_t stride, int64_t count, int64_t k, Operand* block) {
    for (int64_t row = 0; row < count; ++row)
      for (int64_t column = 0; column < k; column += kKStep)
        std::memcpy(row_of(block, row, column), rows + row * stride + column, kKStep * sizeof(bf16));
  }

  static void pack_strip(const float* strip, int64_t count, int64_t column, int64_t columns, int64_t,
                         Operand* block) {
    for (int64_t row = 0; row < count; ++row)
      pack_rounded(strip + row * kStrip, columns, row_of(block, row, column));
  }

  static void forward(const Operand* panel, int64_t rows, int64_t k, const Weights<S>& weights,
                      const SumStart& start, float* strip, float* scratch) {
    const int64_t whole = k / kKStep, all = ceil_div(k, kKStep);
    auto* room = reinterpret_cast<bf16*>(scratch);
    Pairs<S> pairs(weights);
    const bf16* blocks = pairs.run(0, whole, room);
    bf16* last = blocks == room ? room + whole * kBlockElements : room;
    if (k % kKStep) cut_pairs(pairs.block(whole), k % kKStep, last);
    const Term term[] = {{panel, blocks, whole, k % kKStep ? last : nullptr, weights, all, start}};
    sweep(term, rows, start, strip);
  }

  static void backward(const Operand* panel, int64_t rows, int64_t n, const Weights<S>& weights,
                       const SumStart& start, float* strip, float* scratch) {
    const int64_t all = ceil_div(n, kKStep);
    const Term term[] = {{panel, repair(n, weights, scratch), all, nullptr, weights, all, start}};
    sweep(term, rows, start, strip);
  }

  // The sum of two products of backward in one contraction.
  static void backward(const Contraction<S, GemmAmx> (&both)[2], int64_t rows, int64_t n, float* strip,
                       float* scratch) {
    const int64_t all = ceil_div(n, kKStep);
    const auto &one = both[0], &two = both[1];
    float* const behind = scratch + all * kBlockElements / 2;
    const Term terms[] = {
        {one.panel, repair(n, one.weights, scratch), all, nullptr, one.weights, all, one.start},
        {two.panel, repair(n, two.weights, behind), all, nullptr, two.weights, all, two.start}};
    sweep(terms, rows, one.start, strip);
  }

  static int64_t column_at(int64_t lane) { return lane; }
  static void to_natural_order(float*, int64_t) {}

 private:
  // One product of a contraction: its LoRA K-step, `whole` blocks of pairs side by side and, unless null, the block
  // `last`.
  struct Term {
    const Operand* panel;
    const bf16* blocks;
    int64_t whole;
    const bf16* last;
    const Weights<S>& weights;
    int64_t all;
    const SumStart& lora;

    template <class Step, class Fetch>
    void add(int64_t block, Step&& step, Fetch&& fetch) const {
      const int64_t steps = LoraTiles<S, GemmAmx>::steps(lora.rank);
      const Operand* a = reinterpret_cast<const bf16*>(lora.low) + block * steps * kTiles * kTileElements;
      for (int64_t i = 0; i < steps; ++i, a += kTiles * kTileElements)
        step(a, reinterpret_cast<const bf16*>(lora.lora) + i * kBlockElements);
      a = panel + block * all * kTiles * kTileElements;
      for (int64_t i = 0; i < whole; ++i, a += kTiles * kTileElements) {
        fetch(i);
        step(a, blocks + i * kBlockElements);
      }
      if (last) step(a, last);
    }
  };

  // Blocks with pairs along the outputs, the last one without its padding.
  static const bf16* repair(int64_t n, const Weights<S>& weights, float* scratch) {
    auto* paired = reinterpret_cast<bf16*>(scratch);
    Pairs<S> pairs(weights);
    for (int64_t i = 0; i < ceil_div(n, kKStep); ++i)
      pair_outputs(pairs.block(i), paired + i * kBlockElements);
    bf16* last = paired + n / kKStep * kBlockElements;
    if (n % kKStep) cut_pairs(last, n % kKStep, last);
    return paired;
  }

  // Row blocks share nothing, so the last, partial one comes first where its configuration is still loaded: each strip
  // then changes the configuration once instead of twice.
  template <int Terms>
  static void sweep(const Term (&terms)[Terms], int64_t rows, const SumStart& start, float* strip) {
    const RowBlocks blocks(rows, S.m_step);
    const int64_t last = blocks.count - 1;
    const int64_t first = configured_rows == bottom_rows(blocks.size(last)) ? last : 0;
    for (int64_t i = 0; i < blocks.count; ++i) {
      const int64_t b = (first + i) % blocks.count;
      const SumStart from{start.from + blocks.begin(b) * start.stride, start.stride};
      multiply_block<2>(blocks.size(b), from, strip + blocks.begin(b) * kStrip, [&](auto step) {
        for (const Term& term : terms) {
          const NextChunk<S> next(term.weights, 0, term.all, term.all, blocks.count);
          term.add(b, step, [&](int64_t block) { next.fetch(i, block); });
        }
      });
    }
  }
};

template <Shape S>
  requires(has_tiles(S.isa))
struct BackEndOf<S> {
  using type = GemmAmx<S>;
};

template <Shape S>
struct LoraFormOf<S, GemmAmx<S>> {
  using type = LoraTiles<S, GemmAmx<S>>;
};

// A thread holds its tiles from the beginning of a parallel region to the end. Another library may have left a
// configuration before, and finds none of ours after.
template <Shape S>
struct ThreadState<GemmAmx<S>> {
  ThreadState() { configure_tiles(amx::kRows); }
  ~ThreadState() {
    amx::release();
    configured_rows = 0;
  }
  ThreadState(const ThreadState&) = delete;
  ThreadState& operator=(const ThreadState&) = delete;
};

}  // namespace jitmoe
