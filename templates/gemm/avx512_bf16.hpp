// AVX512-BF16: VDPBF16PS multiplies pairs of bfloat16 and adds both products to a float32. It reads packed weights as
// they are, so nothing is expanded. Row blocks are k-major pairs, [k / 2, rows of the block] lanes of 32 bits, padded
// with a zero where k is odd.
//
//                     w pairs 0..15   w pairs 16..31    two loads from the packed strip itself
//     x pair of row 0 ->  sum[0][0]       sum[0][1]
//     x pair of row 1 ->  sum[1][0]       sum[1][1]     28 dot products for 14 broadcasts
//       ...
//
// The instruction flushes denormal operands and results to zero.
#pragma once
#include "gemm/avx512.hpp"
#include "gemm/pair.hpp"

namespace jitmoe {

template <Shape S>
struct GemmAvx512Bf16 {
  using V = Simd512;
  using Vectors = VectorBlock<S.m_step, V>;
  using Operand = uint32_t;
  static constexpr Avx512Bf16Tuning kTuned = kAvx512Bf16Tuning;
  static constexpr auto& outer = Vectors::outer;
  static constexpr auto& transpose = Vectors::template transpose<false>;
  static constexpr auto& transpose_padded = Vectors::template transpose<true>;

  static int64_t pairs_of(int64_t k) { return ceil_div(k, 2); }
  static int64_t block_elements(int64_t k) { return S.m_step * pairs_of(k); }

  static void pack_rows(const bf16* rows, int64_t stride, int64_t count, int64_t k, Operand* block) {
    for (int64_t column = 0; column < k; column += kKStep) {
      __m512i pairs[16];
      for (int row = 0; row < 16; ++row)
        pairs[row] = row < count ? V::load_bits(rows + row * stride + column) : V::zero_bits();
      store_pairs(pairs, count, column, k, block);
    }
  }

  static void pack_strip(const float* strip, int64_t count, int64_t column, int64_t columns, int64_t,
                         Operand* block) {
    const int64_t lefts = smaller(columns, 16), rights = columns - lefts;
    __m512i pairs[16];
    for (int row = 0; row < 16; ++row) {
      const bool inside = row < count;  // rows beyond may be of another strip, or no memory at all
      const float* values = strip + row * kStrip;
      const __m512 left = V::load_some(values, inside ? lefts : 0);
      const __m512 right = V::load_some(values + 16, inside ? rights : 0);
      pairs[row] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(right, left));
    }
    store_pairs(pairs, count, column, column + columns, block);
  }

  static void forward(const Operand* panel, int64_t rows, int64_t k, const Weights<S>& weights,
                      const SumStart& start, float* strip, float* scratch) {
    const RowBlocks blocks(rows, S.m_step);
    const int64_t all = ceil_div(k, kKStep);
    constexpr int64_t kChunkBlocks = Pairs<S>::kPlain ? kTuned.forward_blocks : kTuned.decoded_blocks;
    if constexpr (!Pairs<S>::kPlain)
      if (blocks.count == 1 && rows <= kTuned.direct_rows)
        return Vectors::template with_rows<smaller(S.m_step, kTuned.direct_rows)>(
            rows, [&]<int R>() { dot_codes<R>(panel, weights, k, start.of_block(blocks, 0), strip); });
    Pairs<S> pairs(weights);
    for (int64_t first = 0; first < all; first += kChunkBlocks) {
      const int64_t count = smaller(kChunkBlocks, all - first);
      sweep<Pairs<S>::kPlain>(panel, blocks, k, first,
                              pairs.run(first, count, reinterpret_cast<bf16*>(scratch)),
                              NextChunk<S>(weights, first, kChunkBlocks, all, blocks.count), count,
                              first ? SumStart::strip(strip) : start, strip);
    }
  }

  static void backward(const Operand* panel, int64_t rows, int64_t n, const Weights<S>& weights,
                       const SumStart& start, float* strip, float* scratch) {
    const RowBlocks blocks(rows, S.m_step);
    const int64_t all = ceil_div(n, kKStep);
    bf16* paired = reinterpret_cast<bf16*>(scratch);
    constexpr int64_t kChunkBlocks = kTuned.backward_blocks;
    Pairs<S> pairs(weights);
    for (int64_t first = 0; first < all; first += kChunkBlocks) {
      const int64_t count = smaller(kChunkBlocks, all - first);
      for (int64_t i = 0; i < count; ++i) pair_outputs(pairs.block(first + i), paired + i * kBlockElements);
      sweep<false>(panel, blocks, n, first, paired,
                   NextChunk<S>(weights, first, kChunkBlocks, all, blocks.count), count,
                   first ? SumStart::strip(strip) : start, strip);
    }
  }

  static int64_t column_at(int64_t lane) { return lane; }
  static void to_natural_order(float*, int64_t) {}

  static void low_rank(const Operand* block, int64_t rows, int64_t k, LoraView<S.lora_bf16> lora,
                       int64_t rank, float* low) {
    Vectors::low_rank_rows(
        k, rank, [&](int64_t i, int64_t r) { return lora.at(i, r); },
        [&](int64_t i) {
          const __m512i pairs = _mm512_maskz_loadu_epi32(V::first(rows), block + i / 2 * rows);
          return i % 2 ? V::high_half(pairs) : V::low_half(pairs);
        },
        low);
  }

 private:
  // Sixteen rows of sixteen pairs from `column` on -> their place in the k-major block.
  static void store_pairs(__m512i (&pairs)[16], int64_t rows, int64_t column, int64_t k, Operand* block) {
    V::transpose(pairs);
    const int64_t count = smaller(16, pairs_of(k - column));
    for (int64_t i = 0; i < count; ++i)
      _mm512_mask_storeu_epi32(block + (column / 2 + i) * rows, V::first(rows), pairs[i]);
  }

  // All row blocks over `count` blocks of pairs, packed ones in forward and re-paired ones in backward.
  template <bool Packed>
  static void sweep(const Operand* panel, const RowBlocks& blocks, int64_t k, int64_t first,
                    const bf16* pairs, const NextChunk<S>& next, int64_t count, const SumStart& start,
                    float* strip) {
    for (int64_t b = 0; b < blocks.count; ++b)
      Vectors::with_rows(blocks.size(b), [&]<int R>() {
        dot<R, Packed>(
            panel + b * block_elements(k) + first * kTile * R, pairs, count, k - first * kKStep,
            [&](int64_t block) { next.fetch(b, block); }, start.of_block(blocks, b),
            strip + blocks.begin(b) * kStrip);
      });
  }

  // One row block. Few rows read packed weights tile after tile, front to back. More rows read two tiles side by side,
  // and prefetch their lines.
  template <int R, bool Packed, class Fetch>
  static void dot(const Operand* a, const bf16* pairs, int64_t count, int64_t k, Fetch&& fetch,
                  const SumStart& start, float* c) {
    __m512 sum[R][2];
    Vectors::template begin_sums<R>(start, 0, kTile, sum);
    for (int64_t block = 0; block < count; ++block) {
      const int64_t here = smaller(kKStep, k - block * kKStep);
      const bf16* pair = pairs + block * kBlockElements;
      if constexpr (Packed && R <= kTuned.streamed_rows) {
        dot_tile<R, 0>(a, pair, here / 2, sum);
        dot_tile<R, 1>(a, pair + kTileElements, here / 2, sum);
        pair += here / 2 * kKStep;
        a += here / 2 * R;
      } else {
        fetch(block);
        for (int64_t i = 0; i < here / 2; ++i, pair += kKStep, a += R) {
          if constexpr (Packed) {
            prefetch_to_l1(pair + kTuned.l1_blocks * kBlockElements);
            prefetch_to_l1(pair + kTuned.l1_blocks * kBlockElements + kTileElements);
          }
          dot_row<R>(a, V::load_bits(pair), V::load_bits(pair + kTileElements), sum);
        }
      }
      if (here % 2) dot_row<R>(a, first_of_pair(pair), first_of_pair(pair + kTileElements), sum);
    }
    Vectors::template store_sums<R>(c, kTile, sum);
  }

  // One row block of few rows on weights of another format, which are decoded in registers.
  template <int R>
  static void dot_codes(const Operand* a, const Weights<S>& weights, int64_t k, const SumStart& start,
                        float* c) {
    __m512 sum[R][2];
    Vectors::template begin_sums<R>(start, 0, kTile, sum);
    typename DecoderOf<S>::type decoder;
    const int64_t all = ceil_div(k, kKStep);
    for (int64_t b = 0; b < all; ++b) {
      const auto* block = weights.block(b);
      if constexpr (R > kTuned.streamed_codes)
        if (const auto* later = weights.later(b + kTuned.codes_ahead, all))
          prefetch_to_l2(later, Layout<S>::kBlockItems);
      const int64_t here = smaller(kKStep, k - b * kKStep);
      if (here < kKStep || !decoder.begin(block, weights.scales_of(b))) {
        alignas(64) bf16 room[kBlockElements];
        decoder.decode(block, weights.scales_of(b), room);
        dot_block<R>(a, room, here, sum);
      } else {
        for (int64_t i = 0; i < kTile; i += 4) {
          __m512i left[4][1], right[4][1];
          decoder.four(block, i, left);
          decoder.four(block, kTile + i, right);
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) dot_row<R>(a + (i + n) * R, left[n][0], right[n][0], sum);
        }
      }
      a += kTile * R;
    }
    Vectors::template store_sums<R>(c, kTile, sum);
  }

  template <int R>
  static void dot_block(const Operand* a, const bf16* pair, int64_t count, __m512 (&sum)[R][2]) {
    for (int64_t i = 0; i < count / 2; ++i, pair += kKStep, a += R)
      dot_row<R>(a, V::load_bits(pair), V::load_bits(pair + kTileElements), sum);
    if (count % 2) dot_row<R>(a, first_of_pair(pair), first_of_pair(pair + kTileElements), sum);
  }

  // Where only half of the last pair is inside the matrix, the other half becomes zero: a NaN in the padding times zero
  // would be a NaN.
  static __m512i first_of_pair(const bf16* pair) {
    return _mm512_and_si512(V::load_bits(pair), _mm512_set1_epi32(0xffff));
  }

  static __m512bh broadcast(Operand pair) {
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
  }

  // The steps of one tile.
  template <int R, int Tile>
  [[gnu::always_inline]] static void dot_tile(const Operand* a, const bf16* pair, int64_t count,
                                              __m512 (&sum)[R][2]) {
    for (int64_t i = 0; i < count; ++i) {
      const __m512bh pairs = reinterpret_cast<__m512bh>(V::load_bits(pair + i * kKStep));
#pragma GCC unroll 14
      for (int row = 0; row < R; ++row)
        sum[row][Tile] = _mm512_dpbf16_ps(sum[row][Tile], broadcast(a[i * R + row]), pairs);
    }
  }

  template <int R>
  [[gnu::always_inline]] static void dot_row(const Operand* a, __m512i left, __m512i right,
                                             __m512 (&sum)[R][2]) {
#pragma GCC unroll 14
    for (int row = 0; row < R; ++row) {
      const __m512bh x = broadcast(a[row]);
      sum[row][0] = _mm512_dpbf16_ps(sum[row][0], x, reinterpret_cast<__m512bh>(left));
      sum[row][1] = _mm512_dpbf16_ps(sum[row][1], x, reinterpret_cast<__m512bh>(right));
    }
  }
};

template <Shape S>
  requires(S.isa == Isa::avx512_bf16)
struct BackEndOf<S> {
  using type = GemmAvx512Bf16<S>;
};

}  // namespace jitmoe
