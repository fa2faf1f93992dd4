// LoRA rides in the base products: u = s v A^T is a panel of `rank` more columns, B^T more rows of weights.
//
//     strip = [ v | u ] . [ W | B ]^T            forward; in backward [ dv | du ] . [ W ; A ] with du = s dv B
//
// The parameters are read where their owner keeps them in every call and never packed, so an optimizer step can't be
// missed; gradients are written where their owner wants them. Both may have any strides. Gradients are outer products
// of low-rank rows with the strips already at hand.
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

// low = scale * block . lora, kept as [rank, m_step] for the K-step that follows and, where `as_rows` is
// given, as rows [count, rank] (times row_weight) for the gradients.
template <Shape S, class Gemm>
void low_rank_block(const typename Gemm::Operand* block, int64_t count, int64_t k,
                    typename LoraMatrix<S>::View lora, int64_t rank, float scale, float* low, float* as_rows,
                    const float* row_weight) {
  Gemm::low_rank(block, count, k, lora, rank, low);
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t row = 0; row < count; ++row) {
      const float value = low[r * S.m_step + row] * scale;
      low[r * S.m_step + row] = value;
      if (as_rows) as_rows[row * rank + r] = row_weight ? value * row_weight[row] : value;
    }
}

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

// The gradient of A or B: += low_rows^T . strip, for low_rows [rows, rank] and strip [rows, 32].
//
// The sums of a strip lie in `scratch` [rank, 32]. Where the lanes of the gradient are contiguous (A as torch makes it)
// they are copied, where its ranks are (B as torch makes it) they are transposed in registers.
template <class Gemm>
void add_grad(const float* low_rows, int64_t rows, int64_t rank, const float* strip, const GradStrip& to,
              float* scratch) {
  const bool transposed = to.rank_stride == 1 && to.lane_stride != 1;
  if (to.first || !transposed) std::memset(scratch, 0, rank * kStrip * sizeof(float));
  if (!to.first) {
    if (transposed)
      Gemm::transpose_padded(to.at, to.lane_stride, to.lanes, rank, scratch, kStrip);
    else
      load_grad(to, rank, scratch);
  }
  Gemm::outer(low_rows, rank, rank, strip, rows, scratch);
  if (transposed)
    Gemm::transpose(scratch, kStrip, rank, to.lanes, to.at, to.lane_stride);
  else if (to.lane_stride == 1 && to.lanes == kStrip)
    store_grad(scratch, rank, kStrip,
               {to.at, to.rank_stride, 1, kStrip, to.first});  // constants become vectors
  else
    store_grad(scratch, rank, to.lanes, to);
}

}  // namespace jitmoe
