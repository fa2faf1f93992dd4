// LoRA rides in the base products: u = s v A^T is a panel of `rank` more columns, B^T more rows of weights.
//
//     strip = [ v | u ] . [ W | B ]^T            forward; in backward [ dv | du ] . [ W ; A ] with du = s dv B
//
// The parameters are read where their owner keeps them in every call and never packed, so an optimizer step can't be
// missed; gradients are written where their owner wants them. Both may have any strides. Gradients are outer products
// of low-rank rows with the strips already at hand. `LoraVectors` is the form for float32 vectors; gemm/lora_tiles.hpp has
// that for tiles.
#pragma once
#include <cstring>

#include "call.hpp"
#include "gemm/interface.hpp"

namespace jitmoe {

// One LoRA matrix of one expert, [rows, columns] with strides in elements.
template <Shape S>
struct LoraMatrix {
  using View = LoraView<S.lora_bf16>;
  using Element = typename View::Element;
  const Element* data;
  int64_t row;
  int64_t column;
  LoraMatrix(const Matrices<const void>& matrices, int64_t expert)
      : data(static_cast<const Element*>(matrices.data) + expert * matrices.expert),
        row(matrices.row),
        column(matrices.column) {}
  View along_rows() const { return {data, row, column}; }     // contraction over the rows: B [out, r]
  View along_columns() const { return {data, column, row}; }  // contraction over the columns: A [r, in]
  float at(int64_t i, int64_t j) const { return load_lora(data + i * row + j * column); }
};

// Rows `first`... of a B matrix [out, r] as a strip [r, 32], zeros beyond `count`.
template <Shape S, class Gemm>
void load_rows(const LoraMatrix<S>& b, int64_t rank, int64_t first, int64_t count, float* strip) {
  if constexpr (!S.lora_bf16)
    if (b.column == 1)
      return Gemm::transpose_padded(b.data + first * b.row, b.row, count, rank, strip, kStrip);
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t c = 0; c < kStrip; ++c) strip[r * kStrip + c] = c < count ? b.at(first + c, r) : 0.0f;
}

// Columns `first`... of an A matrix [r, in] as a strip [r, 32] in the order of backward, zeros beyond `count`.
template <Shape S, class Gemm>
void load_columns(const LoraMatrix<S>& a, int64_t rank, int64_t first, int64_t count, float* strip) {
  for (int64_t r = 0; r < rank; ++r, strip += kStrip) {
    const auto* from = a.data + r * a.row + first * a.column;
    if (count == kStrip && a.column == 1) {  // bounds and strides that are constant become vectors
      for (int64_t i = 0; i < kStrip; ++i) strip[i] = load_lora(from + Gemm::column_at(i));
    } else {
      for (int64_t i = 0; i < kStrip; ++i)
        strip[i] = Gemm::column_at(i) < count ? load_lora(from + Gemm::column_at(i) * a.column) : 0.0f;
    }
  }
}

// Where 32 columns or less of a gradient go: lane c of rank r to at[r * rank_stride + c * lane_stride]. `first` says
// that these are the first rows of their expert, so that what lies there is not read: it may be anything.
struct GradStrip {
  float* at;
  int64_t rank_stride;
  int64_t lane_stride;
  int64_t lanes;
  bool first;
};

// Columns `column`... of the gradient [r, in] of an A matrix; rows `column`... of the gradient [out, r] of a B matrix.
inline GradStrip a_strip(const Matrices<float>& grad, int64_t expert, int64_t column, int64_t lanes,
                         bool first) {
  return {grad.data + expert * grad.expert + column * grad.column, grad.row, grad.column, lanes, first};
}
inline GradStrip b_strip(const Matrices<float>& grad, int64_t expert, int64_t row, int64_t lanes,
                         bool first) {
  return {grad.data + expert * grad.expert + row * grad.row, grad.column, grad.row, lanes, first};
}

inline void load_grad(const GradStrip& from, int64_t rank, float* strip) {
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t c = 0; c < from.lanes; ++c)
      strip[r * kStrip + c] = from.at[r * from.rank_stride + c * from.lane_stride];
}

inline void store_grad(const float* strip, int64_t rank, int64_t lanes, const GradStrip& to) {
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t c = 0; c < lanes; ++c)
      to.at[r * to.rank_stride + c * to.lane_stride] = strip[r * kStrip + c];
}

// The sums of a strip of a gradient lie in `sums` [rank, 32]. Where the lanes of the gradient are contiguous (A as torch
// makes it) they are copied, where its ranks are (B as torch makes it) they are transposed in registers.
inline bool transposed(const GradStrip& grad) { return grad.rank_stride == 1 && grad.lane_stride != 1; }

// What the sums begin with: zeros, or what lies in the gradient.
template <class Gemm>
void begin_grad(const GradStrip& from, int64_t rank, float* sums) {
  if (from.first || !transposed(from)) std::memset(sums, 0, rank * kStrip * sizeof(float));
  if (from.first) return;
  if (transposed(from))
    Gemm::transpose_padded(from.at, from.lane_stride, from.lanes, rank, sums, kStrip);
  else
    load_grad(from, rank, sums);
}

template <class Gemm>
void end_grad(const float* sums, int64_t rank, const GradStrip& to) {
  if (transposed(to))
    Gemm::transpose(sums, kStrip, rank, to.lanes, to.at, to.lane_stride);
  else if (to.lane_stride == 1 && to.lanes == kStrip)
    store_grad(sums, rank, kStrip, {to.at, to.rank_stride, 1, kStrip, to.first});  // constants become vectors
  else
    store_grad(sums, rank, to.lanes, to);
}

// Where u or du of a row block goes beside `low`; null where it is not wanted.
struct LowRankRows {
  float* saved;          // [rows, rank]
  float* left;           // left operand of a gradient, in the form of the back end
  const float* weights;  // of the rows, factors of `left`
};

// LoRA as products of float32 vectors. Scratch:
//
//   low     [blocks, rank, m_step]     left operand of the K-step
//   left    [rows, rank]               left operand of gradients
//   lora    [rank, 32]                 right operand of the K-step; sums of a gradient
template <Shape S, class Gemm>
struct LoraVectors {
  using View = typename LoraMatrix<S>::View;
  // Whether gradients multiply pairs of rows of bfloat16. The gradient of the result is such rows, and without the
  // routing weights: these are then factors of u. What forward saved of u is put into the form of `left`.
  static constexpr bool kPairs = false;

  static int64_t low_floats(int64_t rank) { return rank * S.m_step; }
  static int64_t left_floats(int64_t rows, int64_t, int64_t rank) { return rows * rank; }

  // low = scale * block . lora
  static void low_rank(const typename Gemm::Operand* block, int64_t count, int64_t k, View lora, int64_t rank,
                       float scale, float* low, const LowRankRows& to) {
    Gemm::low_rank(block, count, k, lora, rank, low);
    float* const as_rows = to.saved ? to.saved : to.left;
    const float* const row_weight = to.weights;
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t row = 0; row < count; ++row) {
        const float value = low[r * S.m_step + row] * scale;
        low[r * S.m_step + row] = value;
        if (as_rows) as_rows[row * rank + r] = row_weight ? value * row_weight[row] : value;
      }
  }
  static float low_at(const float* low, int64_t, int64_t row, int64_t r) { return low[r * S.m_step + row]; }

  static const float* right(float* strip, int64_t, int64_t) { return strip; }
  static const float* operand(const float* strip, int64_t, float*) { return strip; }

  // += left^T . strip, for a strip [rows, 32] of a segment
  static void add_grad(const float* left, int64_t rows, int64_t rank, bool, const float* strip,
                       const GradStrip& to, float* scratch) {
    begin_grad<Gemm>(to, rank, scratch);
    Gemm::outer(left, rank, rank, strip, rows, scratch);
    end_grad<Gemm>(scratch, rank, to);
  }
};

}  // namespace jitmoe
