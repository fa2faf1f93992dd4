// AVX-512F back end. Row blocks are float32 and k-major, [k, m_step]: the m_step values that one step of
// the contraction broadcasts lie side by side.
//
// One register block, rows x 32 columns (m_step = 14: 28 accumulators, 2 weights, 1 broadcast):
//
//                    w[k, 0..15]    w[k, 16..31]        two loads from the expanded panel (L1/L2)
//     x[k, 0]   ->   sum[0][0]      sum[0][1]
//     x[k, 1]   ->   sum[1][0]      sum[1][1]           m_step broadcasts, 2 m_step multiply-adds
//       ...
//
// Each element is one chain of fused multiply-adds in ascending k, in every form below: a row's bits
// do not depend on the number of rows beside it.
#pragma once
#include <immintrin.h>

#include "gemm.hpp"

namespace jitmoe {

template <Shape S>
struct GemmAvx512 {
  using Operand = float;
  static constexpr int64_t kFetchSweeps = 4;  // sweeps that together prefetch one chunk, a line every 4 k
  static constexpr int64_t kDirectRows = 4;   // up to here the weights are expanded in registers

  static __m512 low_half(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static __m512 high_half(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }

  static void pack_rows(const bf16* rows, int64_t stride, int64_t count, int64_t k, Operand* block) {
    for (int64_t row = 0; row < count; ++row)
      for (int64_t column = 0; column < k; ++column)
        block[column * S.m_step + row] = to_float(rows[row * stride + column]);
  }

  static void pack_strip(const float* strip, int64_t count, int64_t column, int64_t columns, int64_t,
                         Operand* block) {
    for (int64_t row = 0; row < count; ++row)
      for (int64_t c = 0; c < columns; ++c) block[(column + c) * S.m_step + row] = strip[row * kStrip + c];
  }

  static void forward(const Operand* panel, int64_t rows, int64_t k, const bf16* weights, float* strip,
                      float* scratch) {
    const RowBlocks blocks(rows, S.m_step);
    if constexpr (S.m_step <= kDirectRows) {
      for (int64_t b = 0; b < blocks.count; ++b)
        with_rows(blocks.size(b), [&]<int R>() {
          direct<R>(panel + b * S.m_step * k, weights, k, strip + blocks.begin(b) * kStrip);
        });
    } else {
      for (int64_t first = 0; first < k; first += kChunk) {
        const int64_t count = smaller(kChunk, k - first);
        const bf16* source = weights + first * kStrip;
        for (int64_t i = 0; i < count; i += kKStep) expand(source + i * kStrip, scratch + i * kStrip);
        sweep(panel, blocks, k, first, count, source + kChunk * kStrip, scratch, strip);
      }
    }
  }

  // The strip is left in the lane order of the expanded panel: even columns, then odd; see settle().
  static void backward(const Operand* panel, int64_t rows, int64_t n, int64_t k_blocks, const bf16* weights,
                       float* strip, float* scratch) {
    const RowBlocks blocks(rows, S.m_step);
    const int64_t stride = k_blocks * kBlockElements;
    for (int64_t first = 0; first < n; first += kChunk) {
      const int64_t count = smaller(kChunk, n - first);
      for (int64_t i = 0; i < count; i += kStrip) {
        const bf16* block = weights + (first + i) / kStrip * stride;
        if (first + i + kChunk < n) prefetch_block(block + kChunk / kStrip * stride);
        transpose_expand(block, scratch + i * kStrip);
        transpose_expand(block + kTileElements, scratch + (i + kTile) * kStrip);
      }
      sweep(panel, blocks, n, first, count, nullptr, scratch, strip);
    }
  }

  static void settle(float* strip, int64_t rows) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int64_t row = 0; row < rows; ++row) {
      const __m512 even = _mm512_loadu_ps(strip + row * kStrip);
      const __m512 odd = _mm512_loadu_ps(strip + row * kStrip + 16);
      _mm512_storeu_ps(strip + row * kStrip, _mm512_permutex2var_ps(even, low, odd));
      _mm512_storeu_ps(strip + row * kStrip + 16, _mm512_permutex2var_ps(even, high, odd));
    }
  }

  // Lanes are the rows of the block; eight ranks at a time keep eight chains of additions in flight.
  static void low_rank(const Operand* block, int64_t rows, int64_t k, LoraView<S.lora_bf16> lora, int64_t rank,
                       float* low) {
    const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1);
    constexpr int kRanks = 8;
    for (int64_t r = 0; r < rank; r += kRanks) {
      const int64_t ranks = smaller(kRanks, rank - r);
      __m512 sum[kRanks];
      for (int j = 0; j < kRanks; ++j) sum[j] = _mm512_setzero_ps();
      for (int64_t i = 0; i < k; ++i) {
        const __m512 x = _mm512_maskz_loadu_ps(mask, block + i * S.m_step);
#pragma GCC unroll 8
        for (int j = 0; j < kRanks; ++j)
          sum[j] = _mm512_fmadd_ps(x, _mm512_set1_ps(lora.at(i, r + smaller(j, ranks - 1))), sum[j]);
      }
      for (int64_t j = 0; j < ranks; ++j) _mm512_mask_storeu_ps(low + (r + j) * S.m_step, mask, sum[j]);
    }
  }

  static void outer(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t k, float* c) {
    for (int64_t row = 0; row < rows; row += S.m_step)
      with_rows(smaller(S.m_step, rows - row),
                [&]<int R>() { accumulate<R>(a + row, a_stride, b, k, nullptr, c + row * kStrip); });
  }

 private:
  // Calls f.operator()<rows>() for rows in 1..m_step.
  template <int R = S.m_step, class F>
  static void with_rows(int64_t rows, F&& f) {
    if (rows == R) return f.template operator()<R>();
    if constexpr (R > 1) with_rows<R - 1>(rows, f);
  }

  // All row blocks over one expanded chunk, while the next chunk of weights comes into the cache.
  static void sweep(const Operand* panel, const RowBlocks& blocks, int64_t k, int64_t first, int64_t count,
                    const bf16* next, const float* scratch, float* strip) {
    for (int64_t b = 0; b < blocks.count; ++b)
      with_rows(blocks.size(b), [&]<int R>() {
        const bf16* ahead = next && b < kFetchSweeps ? next + b * count * 8 : nullptr;
        accumulate<R>(panel + (b * k + first) * S.m_step, S.m_step, scratch, count, ahead,
                      strip + blocks.begin(b) * kStrip);
      });
  }

  template <int R>
  static void accumulate(const float* a, int64_t a_stride, const float* b, int64_t k, const bf16* next, float* c) {
    __m512 sum[R][2];
#pragma GCC unroll 14
    for (int row = 0; row < R; ++row) {
      sum[row][0] = _mm512_loadu_ps(c + row * kStrip);
      sum[row][1] = _mm512_loadu_ps(c + row * kStrip + 16);
    }
    for (int64_t i = 0; i < k; ++i) {
      if (next && i % 4 == 0) _mm_prefetch(reinterpret_cast<const char*>(next + i * 8), _MM_HINT_T1);
      const __m512 left = _mm512_loadu_ps(b + i * kStrip);
      const __m512 right = _mm512_loadu_ps(b + i * kStrip + 16);
#pragma GCC unroll 14
      for (int row = 0; row < R; ++row) {
        const __m512 x = _mm512_set1_ps(a[i * a_stride + row]);
        sum[row][0] = _mm512_fmadd_ps(x, left, sum[row][0]);
        sum[row][1] = _mm512_fmadd_ps(x, right, sum[row][1]);
      }
    }
#pragma GCC unroll 14
    for (int row = 0; row < R; ++row) {
      _mm512_storeu_ps(c + row * kStrip, sum[row][0]);
      _mm512_storeu_ps(c + row * kStrip + 16, sum[row][1]);
    }
  }

  // Few rows: the expansion costs less than writing and reading a panel. 4 KB ahead is beyond what the
  // hardware prefetcher keeps in flight on one page.
  template <int R>
  static void direct(const float* a, const bf16* weights, int64_t k, float* c) {
    constexpr int64_t kAhead = 4096 / sizeof(bf16);
    __m512 sum[R][2];
    for (int row = 0; row < R; ++row)
      for (int half = 0; half < 2; ++half) sum[row][half] = _mm512_loadu_ps(c + row * kStrip + half * 16);
    for (int64_t i = 0; i < k; i += 2) {
      const bf16* pairs = weights + i / kKStep * kBlockElements + i % kKStep / 2 * kKStep;
      _mm_prefetch(reinterpret_cast<const char*>(pairs + kAhead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(pairs + kAhead + kTileElements), _MM_HINT_T0);
      const __m512i left = _mm512_loadu_si512(pairs);
      const __m512i right = _mm512_loadu_si512(pairs + kTileElements);
      fma_row<R>(a + i * S.m_step, low_half(left), low_half(right), sum);
      if (i + 1 < k) fma_row<R>(a + (i + 1) * S.m_step, high_half(left), high_half(right), sum);
    }
    for (int row = 0; row < R; ++row)
      for (int half = 0; half < 2; ++half) _mm512_storeu_ps(c + row * kStrip + half * 16, sum[row][half]);
  }

  template <int R>
  static void fma_row(const float* a, __m512 left, __m512 right, __m512 (&sum)[R][2]) {
#pragma GCC unroll 14
    for (int row = 0; row < R; ++row) {
      const __m512 x = _mm512_set1_ps(a[row]);
      sum[row][0] = _mm512_fmadd_ps(x, left, sum[row][0]);
      sum[row][1] = _mm512_fmadd_ps(x, right, sum[row][1]);
    }
  }

  // One packed block of 32 columns of the contraction -> 32 rows of 32 float32.
  static void expand(const bf16* block, float* panel) {
    for (int64_t pair = 0; pair < kKStep / 2; ++pair)
      for (int64_t tile = 0; tile < 2; ++tile) {
        const __m512i pairs = _mm512_loadu_si512(block + tile * kTileElements + pair * kKStep);
        _mm512_storeu_ps(panel + 2 * pair * kStrip + tile * 16, low_half(pairs));
        _mm512_storeu_ps(panel + (2 * pair + 1) * kStrip + tile * 16, high_half(pairs));
      }
  }

  // One tile read along its outputs: a 16 x 16 transpose of its 32-bit pairs gives, for each output, its
  // 32 inputs; low halves are the even inputs, high halves the odd ones.
  static void transpose_expand(const bf16* tile, float* panel) {
    __m512i row[16], next[16];
    for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(tile + i * kKStep);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      next[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
      next[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      row[i] = _mm512_unpacklo_epi64(next[i], next[i + 2]);
      row[i + 1] = _mm512_unpackhi_epi64(next[i], next[i + 2]);
      row[i + 2] = _mm512_unpacklo_epi64(next[i + 1], next[i + 3]);
      row[i + 3] = _mm512_unpackhi_epi64(next[i + 1], next[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i a = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
      const __m512i b = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
      const __m512i c = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
      const __m512i d = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
      store_row(_mm512_shuffle_i32x4(a, c, 0x88), panel + i * kStrip);
      store_row(_mm512_shuffle_i32x4(b, d, 0x88), panel + (i + 4) * kStrip);
      store_row(_mm512_shuffle_i32x4(a, c, 0xdd), panel + (i + 8) * kStrip);
      store_row(_mm512_shuffle_i32x4(b, d, 0xdd), panel + (i + 12) * kStrip);
    }
  }

  static void store_row(__m512i pairs, float* panel) {
    _mm512_storeu_ps(panel, low_half(pairs));
    _mm512_storeu_ps(panel + 16, high_half(pairs));
  }

  static void prefetch_block(const bf16* block) {
    for (int64_t i = 0; i < kBlockElements; i += 32)
      _mm_prefetch(reinterpret_cast<const char*>(block + i), _MM_HINT_T1);
  }
};

}  // namespace jitmoe
