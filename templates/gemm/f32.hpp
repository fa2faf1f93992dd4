// Back end for vectors of float32 with fused multiply-add; `V` wraps one register width. Row blocks are float32 and
// k-major, [k, rows of the block]: the values that one step of the contraction broadcasts lie side by side, and a block
// of few rows is short.
//
// A segment of few row blocks expands the weights in registers, from the packed tiles. More row blocks, and backward,
// expand them once into 256 x 32 float32 of scratch, and sweep over that:
//
//     packed block -> [k, 32] with columns in natural order; in backward even inputs, then odd ones
//
// Each element is the same chain of additions in every form (gemm/vectors.hpp), so a row's bits do not depend on the
// rows beside it.
#pragma once
#include "gemm/tuning.hpp"
#include "gemm/vectors.hpp"

namespace jitmoe {

template <Shape S, class V, F32Tuning T>
struct GemmF32 {
  using Operand = float;
  using Vectors = VectorBlock<S.m_step, V>;
  using Float = typename V::Float;
  using Bits = typename V::Bits;
  static constexpr int kLanes = V::kLanes;
  static constexpr int64_t kChunkBlocks = kChunk / kKStep;
  // The shape of weights that lie as pairs.
  static constexpr Shape kAsPairs = as_pairs(S);
  static constexpr auto& outer = Vectors::outer;
  static constexpr auto& transpose = Vectors::template transpose<false>;
  static constexpr auto& transpose_padded = Vectors::template transpose<true>;

  static int64_t block_elements(int64_t k) { return S.m_step * k; }

  static void pack_rows(const bf16* rows, int64_t stride, int64_t count, int64_t k, Operand* block) {
    for (int64_t column = 0; column < k; column += Vectors::kWidth) {
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

  static void forward(const Operand* panel, int64_t rows, int64_t k, const Weights<S>& weights,
                      const SumStart& start, float* strip, float* scratch) {
    const RowBlocks blocks(rows, S.m_step);
    if (blocks.count > T.direct_blocks)
      return chunked(panel, blocks, k, weights, start, strip, scratch, expand);
    if constexpr (Pairs<S>::kPlain)
      for (int64_t b = 0; b < blocks.count; ++b)
        Vectors::with_rows(blocks.size(b), [&]<int R>() {
          direct<R>(panel + b * block_elements(k), weights, b == 0, k, start.of_block(blocks, b),
                    strip + blocks.begin(b) * kStrip);
        });
    else if (kInRegisters && blocks.count == 1 && rows <= T.streamed_rows)
      Vectors::template with_rows<smaller(S.m_step, T.streamed_rows)>(rows, [&]<int R>() {
        if constexpr (kInRegisters) direct_codes<R>(panel, weights, k, start.of_block(blocks, 0), strip);
      });
    else
      decoded(panel, blocks, k, weights, start, strip, reinterpret_cast<bf16*>(scratch));
  }

  static void backward(const Operand* panel, int64_t rows, int64_t n, const Weights<S>& weights,
                       const SumStart& start, float* strip, float* scratch) {
    chunked(panel, RowBlocks(rows, S.m_step), n, weights, start, strip, scratch, transpose_expand);
  }

  // The order of transpose_expand: even columns, then odd.
  static int64_t column_at(int64_t lane) { return lane % kTile * 2 + lane / kTile; }

  static void to_natural_order(float* strip, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      float lanes[kStrip];
      for (int64_t i = 0; i < kStrip; ++i) lanes[i] = strip[row * kStrip + i];
      for (int64_t i = 0; i < kStrip; ++i) strip[row * kStrip + column_at(i)] = lanes[i];
    }
  }

  static void low_rank(const Operand* block, int64_t rows, int64_t k, LoraView<S.lora_bf16> lora,
                       int64_t rank, float* low) {
    Vectors::low_rank_rows(
        k, rank, [&](int64_t i, int64_t r) { return lora.at(i, r); },
        [&](int64_t i) { return V::load_some(block + i * rows, rows); }, low);
  }

 private:
  // For each chunk of the contraction, expands the weights once and sweeps all row blocks over them.
  static void chunked(const Operand* panel, const RowBlocks& blocks, int64_t k, const Weights<S>& weights,
                      const SumStart& start, float* strip, float* scratch,
                      void (*fill)(const bf16*, float*)) {
    const int64_t all = ceil_div(k, kKStep);
    Pairs<S> pairs(weights);
    for (int64_t first = 0; first < all; first += kChunkBlocks) {
      const int64_t count = smaller(kChunkBlocks, all - first);
      for (int64_t i = 0; i < count; ++i) fill(pairs.block(first + i), scratch + i * kBlockElements);
      const NextChunk<S> next(weights, first, kChunkBlocks, all, blocks.count);
      for (int64_t b = 0; b < blocks.count; ++b)
        Vectors::with_rows(blocks.size(b), [&]<int R>() {
          const float* a = panel + b * block_elements(k) + first * kKStep * R;
          float* const c = strip + blocks.begin(b) * kStrip;
          const SumStart from = first ? SumStart::strip(c) : start.of_block(blocks, b);
          for (int64_t column = 0; column < kStrip; column += Vectors::kWidth)
            Vectors::template multiply<R>(a, R, scratch, smaller(count * kKStep, k - first * kKStep), from,
                                          column, c, column == 0 ? &next : nullptr, b);
        });
    }
  }

  // A vector holds a line of pairs, so that a decoder may leave it in a register.
  static constexpr bool kInRegisters = kLanes == kTile;

  // One row block of few rows on weights of another format, which are decoded in registers.
  template <int R>
  static void direct_codes(const float* a, const Weights<S>& weights, int64_t k, const SumStart& start,
                           float* strip) {
    Float sum[R][2];
    Vectors::template begin_sums<R>(start, 0, kTile, sum);
    typename DecoderOf<S>::type decoder;
    for (int64_t first = 0; first < k; first += kKStep, a += kKStep * R) {
      const auto* block = weights.block(first / kKStep);
      const auto* scales = weights.scales_of(first / kKStep);
      const int64_t here = smaller(kKStep, k - first);
      if (here < kKStep || !decoder.begin(block, scales)) {
        alignas(64) bf16 room[kBlockElements];
        decoder.decode(block, scales, room);
        fma_tile<R, 0>(a, room, here, sum);
        fma_tile<R, 1>(a, room + kTileElements, here, sum);
        continue;
      }
      for (int64_t i = 0; i < kTile; i += 4) {
        Bits left[4][1], right[4][1];
        decoder.four(block, i, left);
        decoder.four(block, kTile + i, right);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          const float* x = a + 2 * (i + n) * R;
          Vectors::template fma_row<R>(x, V::low_half(left[n][0]), V::low_half(right[n][0]), sum);
          Vectors::template fma_row<R>(x + R, V::high_half(left[n][0]), V::high_half(right[n][0]), sum);
        }
      }
    }
    Vectors::template store_sums<R>(strip, kTile, sum);
  }

  // Few row blocks on weights of another format: chunk after chunk of them is decoded to pairs, and stays in L1.
  static void decoded(const Operand* panel, const RowBlocks& blocks, int64_t k, const Weights<S>& weights,
                      const SumStart& start, float* strip, bf16* room) {
    constexpr int64_t kDecoded = T.decoded_blocks;
    const int64_t all = ceil_div(k, kKStep);
    Pairs<S> pairs(weights);
    for (int64_t first = 0; first < all; first += kDecoded) {
      const Weights<kAsPairs> chunk{pairs.run(first, smaller(kDecoded, all - first), room), nullptr,
                                    kBlockElements};
      const int64_t columns = smaller(kDecoded * kKStep, k - first * kKStep);
      for (int64_t b = 0; b < blocks.count; ++b)
        Vectors::with_rows(blocks.size(b), [&]<int R>() {
          float* const c = strip + blocks.begin(b) * kStrip;
          direct<R>(panel + b * block_elements(k) + first * kKStep * R, chunk, false, columns,
                    first ? SumStart::strip(c) : start.of_block(blocks, b), c);
        });
    }
  }

  // One row block on packed weights. Blocks of few rows stream the tiles one by one. Others take two tiles side by
  // side, whose chains keep the multipliers busy; the first of them brings each block to L2 long before it is read.
  template <int R>
  static void direct(const float* a, const Weights<kAsPairs>& weights, bool first_rows, int64_t k,
                     const SumStart& start, float* strip) {
    for (int column = 0; column < kTile; column += kLanes) {  // vectors across one row of a tile
      Float sum[R][2];
      Vectors::template begin_sums<R>(start, column, kTile, sum);
      for (int64_t first = 0; first < k; first += kKStep) {
        const int64_t block = first / kKStep, here = smaller(kKStep, k - first);
        const float* x = a + first * R;
        const bf16* pairs = weights.block(block) + 2 * column;
        if constexpr (R <= T.streamed_rows) {
          fma_tile<R, 0>(x, pairs, here, sum);
          fma_tile<R, 1>(x, pairs + kTileElements, here, sum);
        } else {
          if (first_rows && column == 0)
            if (const bf16* later = weights.later(block + T.l2_blocks, ceil_div(k, kKStep)))
              prefetch_to_l2(later, kBlockElements);
          fma_block<R>(x, pairs, here, sum);
        }
      }
      Vectors::template store_sums<R>(strip + column, kTile, sum);
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
    for (int64_t i = 0; i < count; i += 2, pairs += kKStep) {
      prefetch_to_l1(pairs + T.l1_elements);
      prefetch_to_l1(pairs + T.l1_elements + kTileElements);
      const Bits left = V::load_bits(pairs), right = V::load_bits(pairs + kTileElements);
      Vectors::template fma_row<R>(a + i * R, V::low_half(left), V::low_half(right), sum);
      if (i + 1 < count)
        Vectors::template fma_row<R>(a + (i + 1) * R, V::high_half(left), V::high_half(right), sum);
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

  // One packed block -> 32 outputs of 32 inputs: transposing the 32-bit pairs of a tile gives the inputs of each
  // output, even ones in the low halves, odd ones in the high halves.
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
