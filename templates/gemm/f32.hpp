// Back end for vectors of float32 with fused multiply-add; `V` wraps one register width. Row blocks are
// float32 and k-major, [k, rows of the block]: the values that one step of the contraction broadcasts lie side by
// side, and what a block of few rows reads of it is short.
//
// One register block, m_step rows x 2 vectors (AVX-512: 14 x 32 columns, 28 accumulators of 32 registers;
// AVX2: 6 x 16 columns, 12 of 16, twice for a strip):
//
//                    w[k, 0..]      w[k, lanes..]      two loads from the expanded panel (L1/L2)
//     x[k, 0]   ->   sum[0][0]      sum[0][1]
//     x[k, 1]   ->   sum[1][0]      sum[1][1]          m_step broadcasts, 2 m_step multiply-adds
//       ...
//
// Each element is one chain of fused multiply-adds, the LoRA K-step first and then k ascending, in every form
// below: a row's bits do not depend on the number of rows beside it.
#pragma once
#include "gemm/interface.hpp"

namespace jitmoe {

template <Shape S, class V>
struct GemmF32 {
  using Operand = float;
  using Float = typename V::Float;
  using Bits = typename V::Bits;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kWidth = 2 * kLanes;    // columns of one register block
  static constexpr int64_t kDirectBlocks = 2;  // row blocks up to which the weights are expanded in registers
  static constexpr int kStreamedRows = kLanes == 16 ? 6 : 3;  // rows up to which memory is the limit
  static constexpr int64_t kBlocksAhead = 16;
  static constexpr int64_t kChunkBlocks = kChunk / kKStep;
  static_assert(S.m_step <= kLanes, "a row block must fit the lanes of one vector");

  static int64_t block_elements(int64_t k) { return S.m_step * k; }

  static void pack_rows(const bf16* rows, int64_t stride, int64_t count, int64_t k, Operand* block) {
    for (int64_t column = 0; column < k; column += kWidth) {
      Bits pairs[kLanes];
      for (int row = 0; row < kLanes; ++row)
        pairs[row] = row < count ? V::load_bits(rows + row * stride + column) : V::zero_bits();
      V::transpose(pairs);
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t at = column + 2 * i;
        if (at < k) V::store_some(block + at * count, count, V::low_half(pairs[i]));
        if (at + 1 < k) V::store_some(block + (at + 1) * count, count, V::high_half(pairs[i]));
      }
    }
  }

  static void pack_strip(const float* strip, int64_t count, int64_t column, int64_t columns, int64_t,
                         Operand* block) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      Bits values[kLanes];
      for (int row = 0; row < kLanes; ++row)
        values[row] = row < count ? V::load_bits(strip + row * kStrip + c) : V::zero_bits();
      V::transpose(values);
      for (int64_t i = 0; i < smaller(kLanes, columns - c); ++i)
        V::store_some(block + (column + c + i) * count, count, V::as_float(values[i]));
    }
  }

  static void forward(const Operand* panel, int64_t rows, int64_t k, const Weights& weights,
                      const Start& start, float* strip, float* scratch) {
    const RowBlocks blocks(rows, S.m_step);
    if (blocks.count > kDirectBlocks)
      return chunked(panel, blocks, k, weights, start, strip, scratch, expand);
    for (int64_t b = 0; b < blocks.count; ++b)
      with_rows(blocks.size(b), [&]<int R>() {
        direct<R>(panel + b * block_elements(k), weights, b == 0, k, of_block(start, b),
                  strip + blocks.begin(b) * kStrip);
      });
  }

  static void backward(const Operand* panel, int64_t rows, int64_t n, const Weights& weights,
                       const Start& start, float* strip, float* scratch) {
    chunked(panel, RowBlocks(rows, S.m_step), n, weights, start, strip, scratch, transpose_expand);
  }

  // The lane order of the expanded panel: even columns, then odd.
  static int64_t column_at(int64_t lane) { return lane % kTile * 2 + lane / kTile; }

  static void settle(float* strip, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      float lanes[kStrip];
      for (int64_t i = 0; i < kStrip; ++i) lanes[i] = strip[row * kStrip + i];
      for (int64_t i = 0; i < kStrip; ++i) strip[row * kStrip + column_at(i)] = lanes[i];
    }
  }

  static void low_rank(const Operand* block, int64_t rows, int64_t k, LoraView<S.lora_bf16> lora,
                       int64_t rank, float* low) {
    low_rank_rows(
        k, rank, [&](int64_t i, int64_t r) { return lora.at(i, r); },
        [&](int64_t i) { return V::load_some(block + i * rows, rows); }, low);
  }

  static void outer(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t k, float* c) {
    for (int64_t row = 0; row < rows; row += S.m_step)
      with_rows(smaller(S.m_step, rows - row), [&]<int R>() {
        for (int64_t column = 0; column < kStrip; column += kWidth)
          accumulate<R>(a + row, a_stride, b + column, k, kAdd, c + row * kStrip + column, nullptr, 0);
      });
  }

  template <bool Padded>
  static void turn(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                   int64_t to_stride) {
    for (int64_t row = 0; row < (Padded ? kStrip : rows); row += kLanes)
      for (int64_t column = 0; column < columns; column += kLanes) {
        const int64_t down = rows - row, across = smaller(kLanes, columns - column);
        Bits block[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          block[i] = i < down ? V::as_bits(V::load_some(from + (row + i) * from_stride + column, across))
                              : V::zero_bits();
        V::transpose(block);
        float* place = to + column * to_stride + row;
        for (int64_t i = 0; i < across; ++i)
          if (Padded || down >= kLanes)
            V::store(place + i * to_stride, V::as_float(block[i]));
          else
            V::store_some(place + i * to_stride, down, V::as_float(block[i]));
      }
  }

 protected:
  static constexpr Start kAdd{false, nullptr, nullptr, 0};  // the sums go on from the strip

  static Start of_block(const Start& start, int64_t block) {
    return {start.zero, start.low + block * start.rank * S.m_step, start.lora, start.rank};
  }
  static Start of_column(const Start& start, int64_t column) {
    return {start.zero, start.low, start.lora + column, start.rank};
  }

  // Sums of R rows and two vectors of columns, `apart` columns from each other.
  template <int R>
  [[gnu::always_inline]] static void begin_sums(const Start& start, const float* c, int64_t apart,
                                                Float (&sum)[R][2]) {
#pragma GCC unroll 14
    for (int row = 0; row < R; ++row) {
      sum[row][0] = start.zero ? V::set(0.0f) : V::load(c + row * kStrip);
      sum[row][1] = start.zero ? V::set(0.0f) : V::load(c + row * kStrip + apart);
    }
    for (int64_t r = 0; r < start.rank; ++r)
      fma_row<R>(start.low + r * S.m_step, V::load(start.lora + r * kStrip),
                 V::load(start.lora + r * kStrip + apart), sum);
  }

  template <int R>
  [[gnu::always_inline]] static void store_sums(float* c, int64_t apart, const Float (&sum)[R][2]) {
#pragma GCC unroll 14
    for (int row = 0; row < R; ++row) {
      V::store(c + row * kStrip, sum[row][0]);
      V::store(c + row * kStrip + apart, sum[row][1]);
    }
  }

  template <int R>
  [[gnu::always_inline]] static void fma_row(const float* a, Float left, Float right, Float (&sum)[R][2]) {
#pragma GCC unroll 14
    for (int row = 0; row < R; ++row) {
      const Float x = V::set(a[row]);
      sum[row][0] = V::fma(x, left, sum[row][0]);
      sum[row][1] = V::fma(x, right, sum[row][1]);
    }
  }

  // Calls f.operator()<rows>() for rows in 1..m_step.
  template <int R = S.m_step, class F>
  static void with_rows(int64_t rows, F&& f) {
    if (rows == R) return f.template operator()<R>();
    if constexpr (R > 1) with_rows<R - 1>(rows, f);
  }

  // low [rank, m_step] = sum over k of lora(k, r) * rows_at(k). Lanes are the rows of the block; eight
  // ranks at a time keep eight chains of additions in flight.
  template <class Lora, class RowsAt>
  static void low_rank_rows(int64_t k, int64_t rank, Lora&& lora, RowsAt&& rows_at, float* low) {
    constexpr int kRanks = 8;
    for (int64_t r = 0; r < rank; r += kRanks) {
      const int64_t ranks = smaller(kRanks, rank - r);
      Float sum[kRanks];
      for (int j = 0; j < kRanks; ++j) sum[j] = V::set(0.0f);
      for (int64_t i = 0; i < k; ++i) {
        const Float x = rows_at(i);
#pragma GCC unroll 8
        for (int j = 0; j < kRanks; ++j)
          sum[j] = V::fma(x, V::set(lora(i, r + smaller(j, ranks - 1))), sum[j]);
      }
      for (int64_t j = 0; j < ranks; ++j) V::store_some(low + (r + j) * S.m_step, S.m_step, sum[j]);
    }
  }

 private:
  // Chunk by chunk of the contraction: expand the weights once, sweep all row blocks over them.
  static void chunked(const Operand* panel, const RowBlocks& blocks, int64_t k, const Weights& weights,
                      const Start& start, float* strip, float* scratch, void (*fill)(const bf16*, float*)) {
    const int64_t all = ceil_div(k, kKStep);
    for (int64_t first = 0; first < all; first += kChunkBlocks) {
      const int64_t count = smaller(kChunkBlocks, all - first);
      for (int64_t i = 0; i < count; ++i) fill(weights.block(first + i), scratch + i * kBlockElements);
      const Ahead ahead(weights, first, kChunkBlocks, all, blocks.count);
      for (int64_t b = 0; b < blocks.count; ++b)
        with_rows(blocks.size(b), [&]<int R>() {
          const float* a = panel + b * block_elements(k) + first * kKStep * R;
          const Start from = first ? kAdd : of_block(start, b);
          for (int64_t column = 0; column < kStrip; column += kWidth)
            accumulate<R>(a, R, scratch + column, smaller(count * kKStep, k - first * kKStep),
                          of_column(from, column), strip + blocks.begin(b) * kStrip + column,
                          column == 0 ? &ahead : nullptr, b);
        });
    }
  }

  // One register block. The sums are the same with and without `ahead`, which only prefetches.
  template <int R>
  static void accumulate(const float* a, int64_t a_stride, const float* b, int64_t k, const Start& start,
                         float* c, const Ahead* ahead, int64_t sweep) {
    Float sum[R][2];
    begin_sums<R>(start, c, kLanes, sum);
    for (int64_t first = 0; first < k; first += kKStep) {
      if (ahead) ahead->fetch(sweep, first / kKStep);
      for (int64_t i = first; i < smaller(first + kKStep, k); ++i)
        fma_row<R>(a + i * a_stride, V::load(b + i * kStrip), V::load(b + i * kStrip + kLanes), sum);
    }
    store_sums<R>(c, kLanes, sum);
  }

  // Expansion in registers costs less than writing and reading a panel. Very few rows wait for memory: tile after tile
  // they read it front to back, which the hardware prefetches better than any instruction (58 against 39 GB/s with
  // two rows on two threads of Zen 4, 2026-11-24). More rows take the chains of two tiles to fill the multipliers, and
  // the first of them brings each block to L2 long before it is read.
  template <int R>
  static void direct(const float* a, const Weights& weights, bool first_rows, int64_t k, const Start& start,
                     float* c) {
    for (int column = 0; column < kTile; column += kLanes) {  // vectors across one row of a tile
      Float sum[R][2];
      begin_sums<R>(of_column(start, column), c + column, kTile, sum);
      for (int64_t first = 0; first < k; first += kKStep) {
        const int64_t block = first / kKStep, here = smaller(kKStep, k - first);
        const float* x = a + first * R;
        const bf16* pairs = weights.block(block) + 2 * column;
        if constexpr (R <= kStreamedRows) {
          fma_tile<R, 0>(x, pairs, here, sum);
          fma_tile<R, 1>(x, pairs + kTileElements, here, sum);
        } else {
          if (first_rows && column == 0)
            if (const bf16* later = weights.later(block + kBlocksAhead, ceil_div(k, kKStep)))
              prefetch_to_l2(later, kBlockElements);
          fma_block<R>(x, pairs, here, sum);
        }
      }
      store_sums<R>(c + column, kTile, sum);
    }
  }

  // The steps of one tile.
  template <int R, int Tile>
  [[gnu::always_inline]] static void fma_tile(const float* a, const bf16* pairs, int64_t count,
                                              Float (&sum)[R][2]) {
    for (int64_t i = 0; i < count; i += 2, pairs += kKStep) {
      const Bits both = V::load_bits(pairs);
      const Float even = V::low_half(both), odd = V::high_half(both);
#pragma GCC unroll 14
      for (int row = 0; row < R; ++row) sum[row][Tile] = V::fma(V::set(a[i * R + row]), even, sum[row][Tile]);
      if (i + 1 == count) break;
#pragma GCC unroll 14
      for (int row = 0; row < R; ++row)
        sum[row][Tile] = V::fma(V::set(a[(i + 1) * R + row]), odd, sum[row][Tile]);
    }
  }

  // The steps of both tiles side by side.
  template <int R>
  [[gnu::always_inline]] static void fma_block(const float* a, const bf16* pairs, int64_t count,
                                               Float (&sum)[R][2]) {
    constexpr int64_t kAhead = 4096 / sizeof(bf16);
    for (int64_t i = 0; i < count; i += 2, pairs += kKStep) {
      prefetch_to_l1(pairs + kAhead);
      prefetch_to_l1(pairs + kAhead + kTileElements);
      const Bits left = V::load_bits(pairs), right = V::load_bits(pairs + kTileElements);
      fma_row<R>(a + i * R, V::low_half(left), V::low_half(right), sum);
      if (i + 1 < count) fma_row<R>(a + (i + 1) * R, V::high_half(left), V::high_half(right), sum);
    }
  }

  // One packed block of 32 columns of the contraction -> 32 rows of 32 float32.
  static void expand(const bf16* block, float* panel) {
    for (int64_t pair = 0; pair < kKStep / 2; ++pair)
      for (int64_t c = 0; c < kStrip; c += kLanes) {
        const Bits pairs = V::load_bits(block + c / kTile * kTileElements + pair * kKStep + c % kTile * 2);
        V::store(panel + 2 * pair * kStrip + c, V::low_half(pairs));
        V::store(panel + (2 * pair + 1) * kStrip + c, V::high_half(pairs));
      }
  }

  // One packed block read along its outputs: a transpose of the 32-bit pairs of a tile gives, for each
  // output, its 32 inputs; low halves are the even inputs, high halves the odd ones.
  static void transpose_expand(const bf16* block, float* panel) {
    for (int64_t out = 0; out < kStrip; out += kLanes)
      for (int64_t pair = 0; pair < kTile; pair += kLanes) {
        const bf16* tile = block + out / kTile * kTileElements + out % kTile * 2;
        Bits pairs[kLanes];
        for (int i = 0; i < kLanes; ++i) pairs[i] = V::load_bits(tile + (pair + i) * kKStep);
        V::transpose(pairs);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          V::store(panel + (out + i) * kStrip + pair, V::low_half(pairs[i]));
          V::store(panel + (out + i) * kStrip + kTile + pair, V::high_half(pairs[i]));
        }
      }
  }
};

}  // namespace jitmoe
