// What all vector back ends do in float32: the sums of a register block, and the products and transposes of LoRA. `V`
// wraps one register width.
//
// One register block, up to MStep rows x 2 vectors (AVX-512: 14 x 32 columns, 28 accumulators of 32 registers;
// AVX2: 6 x 16 columns, 12 of 16, twice for a strip):
//
//                    b[k, 0..]      b[k, lanes..]      two loads
//     a[k, 0]   ->   sum[0][0]      sum[0][1]
//     a[k, 1]   ->   sum[1][0]      sum[1][1]          MStep broadcasts, 2 MStep multiply-adds
//       ...
//
// Each element is one chain of fused multiply-adds: first the LoRA K-step, then k ascending.
#pragma once
#include "gemm/interface.hpp"

namespace jitmoe {

template <int64_t MStep, class V>
struct VectorBlock {
  using Float = typename V::Float;
  using Bits = typename V::Bits;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kWidth = 2 * kLanes;  // columns of one register block
  static_assert(MStep <= kLanes, "a row block must fit the lanes of one vector");

  // Sums of R rows and two vectors of columns, the second `apart` columns behind the first, which is at `column`.
  template <int R>
  [[gnu::always_inline]] static void begin_sums(const SumStart& start, int64_t column, int64_t apart,
                                                Float (&sum)[R][2]) {
    const float* from = start.from + column;
#pragma GCC unroll 14
    for (int row = 0; row < R; ++row) {
      sum[row][0] = V::load(from + row * start.stride);
      sum[row][1] = V::load(from + row * start.stride + apart);
    }
    for (int64_t r = 0; r < start.rank; ++r) {
      const float* lora = start.lora + r * kStrip + column;
      fma_row<R>(start.low + r * MStep, V::load(lora), V::load(lora + apart), sum);
    }
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
  template <int R = MStep, class F>
  static void with_rows(int64_t rows, F&& f) {
    if (rows == R) return f.template operator()<R>();
    if constexpr (R > 1) with_rows<R - 1>(rows, f);
  }

  // low [rank, m_step] = sum over k of lora(k, r) * rows_at(k). Lanes are the rows of the block. Eight ranks at a time
  // keep eight chains of additions in flight.
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
      for (int64_t j = 0; j < ranks; ++j) V::store_some(low + (r + j) * MStep, MStep, sum[j]);
    }
  }

  // Two vectors of columns of a strip = start + a [k, R]^T . b [k, 32]. `next` only prefetches and may be null.
  template <int R, class Next>
  static void multiply(const float* a, int64_t a_stride, const float* b, int64_t k, const SumStart& start,
                       int64_t column, float* strip, const Next* next, int64_t sweep) {
    Float sum[R][2];
    begin_sums<R>(start, column, kLanes, sum);
    b += column;
    for (int64_t first = 0; first < k; first += kKStep) {
      if (next) next->fetch(sweep, first / kKStep);
      for (int64_t i = first; i < smaller(first + kKStep, k); ++i)
        fma_row<R>(a + i * a_stride, V::load(b + i * kStrip), V::load(b + i * kStrip + kLanes), sum);
    }
    store_sums<R>(strip + column, kLanes, sum);
  }

  static void outer(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t k, float* c) {
    for (int64_t row = 0; row < rows; row += MStep)
      with_rows(smaller(MStep, rows - row), [&]<int R>() {
        for (int64_t column = 0; column < kStrip; column += kWidth)
          multiply<R, NoChunk>(a + row, a_stride, b, k, SumStart::strip(c + row * kStrip), column,
                               c + row * kStrip, nullptr, 0);
      });
  }

  template <bool Padded>
  static void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
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
};

}  // namespace jitmoe
