// The scalar back end: simple, for any CPU, and the reference of the others. Row blocks are row-major float32
// [m_step, k].
#pragma once
#include "gemm/interface.hpp"

namespace jitmoe {

template <Shape S>
struct GemmRef {
  using Operand = float;
  static int64_t block_elements(int64_t k) { return S.m_step * k; }

  // W[out, in] of one packed block.
  static float weight(const bf16* block, int64_t out, int64_t in) {
    const bf16* tile = block + out / kTile * kTileElements;
    return to_float(tile[in / 2 * kKStep + out % kTile * 2 + in % 2]);
  }

  static void pack_rows(const bf16* rows, int64_t stride, int64_t count, int64_t k, Operand* block) {
    for (int64_t row = 0; row < count; ++row)
      for (int64_t column = 0; column < k; ++column)
        block[row * k + column] = to_float(rows[row * stride + column]);
  }

  static void pack_strip(const float* strip, int64_t count, int64_t column, int64_t columns, int64_t k,
                         Operand* block) {
    for (int64_t row = 0; row < count; ++row)
      for (int64_t c = 0; c < columns; ++c) block[row * k + column + c] = strip[row * kStrip + c];
  }

  static void forward(const Operand* panel, int64_t rows, int64_t k, const Weights<S>& weights,
                      const SumStart& start, float* strip, float*) {
    multiply(panel, rows, k, weights, start, strip,
             [](const bf16* block, int64_t c, int64_t i) { return weight(block, c, i); });
  }

  static void backward(const Operand* panel, int64_t rows, int64_t n, const Weights<S>& weights,
                       const SumStart& start, float* strip, float*) {
    multiply(panel, rows, n, weights, start, strip,
             [](const bf16* block, int64_t c, int64_t i) { return weight(block, i, c); });
  }

  static int64_t column_at(int64_t lane) { return lane; }
  static void to_natural_order(float*, int64_t) {}

  static void low_rank(const Operand* block, int64_t rows, int64_t k, LoraView<S.lora_bf16> lora,
                       int64_t rank, float* low) {
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t row = 0; row < rows; ++row) {
        float sum = 0;
        for (int64_t i = 0; i < k; ++i) sum += block[row * k + i] * lora.at(i, r);
        low[r * S.m_step + row] = sum;
      }
  }

  static void outer(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t k, float* c) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < kStrip; ++column)
        for (int64_t i = 0; i < k; ++i)
          c[row * kStrip + column] += a[i * a_stride + row] * b[i * kStrip + column];
  }

  static void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                        int64_t to_stride) {
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t row = 0; row < rows; ++row)
        to[column * to_stride + row] = from[row * from_stride + column];
  }

  static void transpose_padded(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                               float* to, int64_t to_stride) {
    transpose(from, from_stride, rows, columns, to, to_stride);
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t row = rows; row < kStrip; ++row) to[column * to_stride + row] = 0.0f;
  }

 private:
  // Each sum takes its products in the order of the contraction; weight(block, column, i) is that of place i of it.
  template <class Weight>
  static void multiply(const Operand* panel, int64_t rows, int64_t k, const Weights<S>& weights,
                       const SumStart& start, float* strip, Weight&& weight) {
    const RowBlocks blocks(rows, S.m_step);
    begin(blocks, start, strip);
    Pairs<S> pairs(weights);
    for (int64_t first = 0; first < k; first += kKStep) {
      const bf16* block = pairs.block(first / kKStep);
      for (int64_t b = 0; b < blocks.count; ++b)
        for (int64_t row = 0; row < blocks.size(b); ++row)
          for (int64_t c = 0; c < kStrip; ++c)
            for (int64_t i = first; i < smaller(first + kKStep, k); ++i)
              strip[(blocks.begin(b) + row) * kStrip + c] +=
                  panel[b * block_elements(k) + row * k + i] * weight(block, c, i - first);
    }
  }

  static void begin(const RowBlocks& blocks, const SumStart& start, float* strip) {
    for (int64_t row = 0; row < blocks.rows; ++row)
      for (int64_t c = 0; c < kStrip; ++c) strip[row * kStrip + c] = start.from[row * start.stride + c];
    for (int64_t b = 0; b < blocks.count; ++b)
      outer(start.low + b * start.rank * S.m_step, S.m_step, blocks.size(b), start.lora, start.rank,
            strip + blocks.begin(b) * kStrip);
  }
};

template <Shape S>
  requires(S.isa == Isa::ref)
struct BackEndOf<S> {
  using type = GemmRef<S>;
};

}  // namespace jitmoe
